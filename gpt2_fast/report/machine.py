"""What a device's matrix products can reach: the denominator of model FLOPs utilisation."""

from __future__ import annotations

import functools
import re
import time

import torch

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


@functools.cache
def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of one square product here: the fastest of three after a first, measured once a process."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds[1:])


def peak(device: torch.device) -> float:
    """FLOPs a second: a card's bfloat16 peak by its maker, or `measured_peak`: of a CPU in float32."""
    if device.type != "cuda":
        return measured_peak(device, torch.float32)
    return card_peak(torch.cuda.get_device_name(device), "bfloat16") or measured_peak(device, torch.bfloat16)
