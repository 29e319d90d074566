"""FLOPs a token of training by three conventions, for model FLOPs utilisation; report.machine has the peaks."""

from __future__ import annotations

from gpt2_fast import GPT2Config
from gpt2_fast.report.inspect import flops_per_token


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
