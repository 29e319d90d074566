"""A head tied to wte: the gradient of the table is the sum of the head's and of the token rows."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op

from gpt2_fast.config import GPT2Config
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops.embedding import embedding, embedding_reference, samples
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

V, C = 23, 40


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    tables = [torch.randn(n, C, generator=generator).to(DEVICE).requires_grad_() for n in (V, 9)]
    return torch.randint(V, (3, 9), generator=generator).to(DEVICE), *tables


def _loss(ids, wte, wpe):
    return linear_cross_entropy(embedding(ids, wte, wpe), wte, ids.roll(-1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_sum_of_both(dtype):
    for *tensors, options in samples(DEVICE, dtype):

        def run(ids, wte, wpe, options=options):
            return embedding(ids, wte, wpe, **options), wte * 3

        def reference(ids, wte, wpe, options=options):
            return embedding_reference(ids, wte, wpe, **options), wte * 3

        check_op(run, reference, tensors, dtype, f"{dtype} {tuple(tensors[0].shape)}")


def test_loss_against_the_reference(inputs):
    def reference(ids, wte, wpe):
        return linear_cross_entropy_reference(embedding_reference(ids, wte, wpe), wte, ids.roll(-1, 1))

    check_op(_loss, reference, inputs, torch.float32)


def test_second_backward_and_micro_batches(inputs):
    _, wte, wpe = inputs
    loss = _loss(*inputs)
    first = torch.autograd.grad(loss, [wte, wpe], retain_graph=True)
    kept = [g.clone() for g in first]
    assert_same_bits(torch.autograd.grad(loss, [wte, wpe]), kept)
    assert_same_bits(first, kept)
    for count in (1, 2):
        _loss(*inputs).backward()
        torch.testing.assert_close(wte.grad, count * kept[0])


def test_compiles_whole(inputs):
    expected = torch.autograd.grad(_loss(*inputs), inputs[1:])
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs[1:]), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_model(recompute):
    """The tied gradient of a model, with checkpointing or without, is that of its parts untied."""
    sizes = {"vocab_size": V, "n_positions": 9, "n_embd": C, "n_layer": 1, "n_head": 2}
    sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    model, untied = (
        GPT2LMHeadModel(GPT2Config(**sizes, tie_word_embeddings=tied)).to(DEVICE).train() for tied in (True, False)
    )
    model.gradient_checkpointing_enable(recompute)
    untied.load_state_dict(model.state_dict())
    ids = torch.randint(V, (2, 9), device=DEVICE)
    model(ids, labels=ids).loss.backward()
    untied(ids, labels=ids).loss.backward()
    assert_same_bits(
        [model.transformer.wte.weight.grad], [untied.lm_head.weight.grad + untied.transformer.wte.weight.grad]
    )
