"""attention_decode beside F.scaled_dot_product_attention of one query: 8 sequences, caches that are full."""

import torch
import torch.nn.functional as F

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.attention import attention_decode, attention_decode_reference, decode_cost

DIRECTIONS = ("inference",)
LIBRARY = "F.scaled_dot_product_attention"
BATCH = 8


def _sdpa(q, k_cache, v_cache):
    return F.scaled_dot_product_attention(q.unsqueeze(2), k_cache, v_cache).squeeze(2)


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    B, H, S, D = BATCH, size.n_head, 4 * size.T, size.head_dim
    q, k_cache, v_cache = (torch.randn(s, device=device).to(dtype) for s in ((B, H, D), (B, H, S, D), (B, H, S, D)))
    starts = torch.zeros(B, dtype=torch.int32, device=device)
    lengths = torch.full_like(starts, S)

    def ours(q, k_cache, v_cache):
        return attention_decode(q, k_cache, v_cache, starts=starts, lengths=lengths)

    def reference(q, k_cache, v_cache):
        return attention_decode_reference(q, k_cache, v_cache, starts=starts, lengths=lengths)

    def check(run):
        from numerics import assert_as_exact

        truth = reference(*(t.double() for t in (q, k_cache, v_cache)))
        assert_as_exact(run(q, k_cache, v_cache), reference(q, k_cache, v_cache), truth, "out", dtype)

    return Case(
        shape=f"q [{B}, {H}, {D}], {S} keys",
        inputs=(q, k_cache, v_cache),
        programs={"gpt2_fast": ours, "library": _sdpa, "eager": reference},
        cost={"inference": decode_cost(B, H, S, D, dtype.itemsize)["forward"]},
        check=check,
        differentiable=False,
    )


def test_attention_decode(measure):
    measure(case)
