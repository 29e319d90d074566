"""linear_cross_entropy beside torch's: F.linear_cross_entropy from 2.13 on, before it F.cross_entropy of all logits.

The gradients are made in the forward pass, so what is timed is the loss alone and the loss with its gradients.
"""

import torch
import torch.nn.functional as F

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.linear_cross_entropy import cost, linear_cross_entropy, linear_cross_entropy_reference

HAS_FUSED = hasattr(F, "linear_cross_entropy")
DIRECTIONS = ("inference", "forward+backward")
LIBRARY = "F.linear_cross_entropy" if HAS_FUSED else "F.cross_entropy"
CHECKED_ROWS = 64


def _library(x, weight, labels):
    """float32, as the reference's; F.linear_cross_entropy gives a bfloat16 loss in bfloat16."""
    if HAS_FUSED:
        return F.linear_cross_entropy(x, weight, labels).float()
    return F.cross_entropy(F.linear(x, weight).float(), labels)


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    rows, C = size.B * size.T, size.n_embd
    x = torch.randn(rows, C, device=device).to(dtype)
    weight = (torch.randn(size.vocab_size, C, device=device) * C**-0.5).to(dtype)
    labels = torch.randint(size.vocab_size, (rows,), device=device)
    both = cost(rows, C, size.vocab_size, dtype.itemsize)
    return Case(
        shape=f"[{rows}, {C}] @ [{C}, {size.vocab_size}]",
        inputs=(x, weight, labels),
        programs={"gpt2_fast": linear_cross_entropy, "library": _library, "eager": linear_cross_entropy_reference},
        cost={
            "inference": both["forward"],
            "forward+backward": {k: both["forward"][k] + both["backward"][k] for k in ("bytes", "flops")},
        },
        check_inputs=(x[:CHECKED_ROWS], weight, labels[:CHECKED_ROWS]),
    )


def test_linear_cross_entropy(measure):
    measure(case)
