"""attention beside F.scaled_dot_product_attention, with the transposes that packed heads cost it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.attention import attention, attention_reference, cost

DIRECTIONS = ("forward", "backward")
LIBRARY = "F.scaled_dot_product_attention"


def sdpa(qkv: Tensor) -> Tensor:
    """[B, T, 3, H, D] -> [B, T, H, D], contiguous as the projection that follows wants it."""
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).contiguous()


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    qkv = torch.randn(size.B, size.T, 3, size.n_head, size.head_dim, device=device).to(dtype)
    return Case(
        shape=f"[{size.B}, {size.T}, 3, {size.n_head}, {size.head_dim}]",
        inputs=(qkv,),
        programs={"gpt2_fast": attention, "library": sdpa, "eager": attention_reference},
        cost=cost(size.B, size.T, size.n_head, size.head_dim, dtype.itemsize),
        check_inputs=(qkv[:1],),
    )


def test_attention(measure):
    measure(case)
