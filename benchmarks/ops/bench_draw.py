"""draw beside the same by torch's own operations: a token of each of 8 rows of logits, top_k 50 and top_p 0.9."""

import torch

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.draw import Scratch, cost, draw, draw_reference

DIRECTIONS = ("inference",)
BATCH = 8
OPTIONS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    V, scratch = size.vocab_size, Scratch()
    logits = torch.randn(BATCH, V, device=device) * 3
    uniform = torch.rand(BATCH, dtype=torch.float64, device=device)

    def ours(logits):
        return draw(logits, uniform, **OPTIONS, scratch=scratch)[0]

    def reference(logits):
        return draw_reference(logits, uniform, **OPTIONS)[0]

    def check(run):
        assert torch.equal(run(logits), reference(logits.double())), "other tokens than in float64"

    return Case(
        shape=f"logits [{BATCH}, {V}], float32",
        inputs=(logits,),
        programs={"gpt2_fast": ours, "eager": reference},
        cost={"inference": cost(BATCH, V)["forward"]},
        check=check,
        differentiable=False,
    )


def test_draw(measure):
    measure(case)
