"""Model FLOPs utilisation: FLOPs a token by three conventions, over what the card, or a measured product, can do."""

from __future__ import annotations

import re

from gpt2_fast import GPT2Config
from gpt2_fast.inspect import flops_per_token

# Dense TFLOP/s by the makers' data sheets: (bfloat16 with float32 sums, float32 without tensor cores).
# The first name that the device's has as whole words decides, so longer names come first.
CARDS = {
    "B200": (2250.0, 75.0),
    "GH200": (989.4, 66.9),
    "H200 NVL": (835.5, 60.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.4, 51.2),
    "H100 NVL": (835.5, 60.0),
    "H100": (989.4, 66.9),
    "H800": (989.4, 66.9),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "A30": (165.0, 10.3),
    "A40": (149.7, 37.4),
    "RTX A6000": (154.8, 38.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 5090": (209.5, 104.8),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090 Ti": (80.0, 40.0),
    "RTX 3090": (71.0, 35.6),
}


def card_peak(device_name: str, dtype: str) -> float | None:
    """FLOPs a second of a card by its maker; None for one that is not in the table, a slice or a laptop's."""
    if re.search(r"\b(MIG|Laptop|Max-Q)\b", device_name):
        return None
    for name, (bfloat16, float32) in CARDS.items():
        if re.search(rf"\b{name}\b", device_name):
            return (bfloat16 if dtype == "bfloat16" else float32) * 1e12
    return None


def conventions(config: GPT2Config, context: int) -> dict[str, int]:
    """FLOPs a token of training, by who counts so (N parameters, L layers, C n_embd, T context, V vocabulary).

    llm.c: 6 N + 6 L C T, causal attention's half. palm: 6 (N - positions) + 12 L C T, the whole square, as nanoGPT
    (Chowdhery et al., 2022, arXiv:2204.02311). flash: 72 L C^2 (1 + T / 6C + V / 16LC), flash-attention's reports:
    three quarters of the formula with recomputed activations (Narayanan et al., 2021, arXiv:2104.04473, 5.1).
    """
    flops = flops_per_token(config, context)
    layers, width, vocabulary = config.n_layer, config.n_embd, config.vocab_size
    flash = 72 * layers * width**2 * (1 + context / (6 * width) + vocabulary / (16 * layers * width))
    return {"llm.c": flops["training"], "palm": flops["training (PaLM)"], "flash": round(flash)}
