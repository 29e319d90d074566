"""embedding beside its reference, which is two F.embedding and an add: the library's own."""

import torch

from benchmarks.ops.harness import Case, Size
from gpt2_fast.ops.embedding import cost, embedding, embedding_reference

DIRECTIONS = ("forward", "backward")


def case(size: Size, dtype: torch.dtype, device: str) -> Case:
    ids = torch.randint(size.vocab_size, (size.B, size.T), device=device)
    wte, wpe = (torch.randn(n, size.n_embd, device=device).to(dtype) for n in (size.vocab_size, size.T))
    return Case(
        shape=f"ids [{size.B}, {size.T}], wte [{size.vocab_size}, {size.n_embd}]",
        inputs=(ids, wte, wpe),
        programs={"gpt2_fast": embedding, "eager": embedding_reference},
        cost=cost(size.B * size.T, size.T, size.n_embd, size.vocab_size, dtype.itemsize),
        check_inputs=(ids[:1], wte, wpe),
    )


def test_embedding(measure):
    measure(case)
