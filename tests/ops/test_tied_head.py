"""A head tied to wte: the embedding adds its rows to the head's gradient, in place when it is no one else's."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from cuda_on_cpu import CudaOnCpu
from numerics import DTYPES, assert_same_bits, check_op

from gpt2_fast.config import GPT2Config
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops.embedding import _Embedding, embedding, embedding_reference, samples
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.runtime import cuda

V, C = 23, 40


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(3)
    tables = [torch.randn(n, C, generator=generator).to(DEVICE).requires_grad_() for n in (V, 9)]
    return torch.randint(V, (3, 9), generator=generator).to(DEVICE), *tables


@pytest.fixture
def added(monkeypatch):
    """The addresses of the gradients that were added to in place."""
    seen, op = [], torch.ops.gpt2_fast.embedding_backward_into
    monkeypatch.setattr(
        torch.ops.gpt2_fast,
        "embedding_backward_into",
        lambda dwte, *rest: seen.append(dwte.data_ptr()) or op(dwte, *rest),
    )
    return seen


def _loss(ids, wte, wpe, tied=True, **options):
    h, table = embedding(ids, wte, wpe, return_table=True, **options)
    return linear_cross_entropy(h, table if tied else wte, ids.roll(-1, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_is_the_sum_of_both(added, dtype):
    for *tensors, options in samples(DEVICE, dtype):

        def run(*tensors, options=options):
            h, table = embedding(*tensors, **options, return_table=True)
            return h, table * 3

        def reference(ids, wte, wpe, options=options):
            return embedding_reference(ids, wte, wpe, **options), wte * 3

        check_op(run, reference, tensors, dtype, f"{dtype} {tuple(tensors[0].shape)}")
    assert len(added) == 5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_kernels_on_the_cpu(tmp_path, monkeypatch, dtype):
    on_cpu = CudaOnCpu(tmp_path)
    monkeypatch.setattr(cuda, "launch", on_cpu.launch)
    for ids, wte, wpe, options in samples("cpu", dtype):
        gradients = []
        for impl in ("cuda", "cpp"):
            leaf = wte.clone().requires_grad_()
            h, table = _Embedding.apply(
                ids, leaf, wpe, *(options[k] for k in ("position_ids", "token_type_ids", "dropout_p", "rng", "site")),
                dtype, impl, True,
            )  # fmt: skip
            gradients += torch.autograd.grad(h.float().square().sum() + (table * 3).float().square().sum(), leaf)
        assert_same_bits(gradients[:1], gradients[1:], "cuda against cpp")


def test_the_heads_gradient_becomes_wtes_without_another_table(inputs, added, monkeypatch):
    zeros = []
    new_zeros = torch.Tensor.new_zeros
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda t, *a, **k: zeros.append(a) or new_zeros(t, *a, **k))
    _, wte, wpe = inputs
    _loss(*inputs).backward()
    assert added == [wte.grad.data_ptr()]
    assert zeros == [wpe.shape]
    first = wte.grad.clone()
    _loss(*inputs).backward()
    assert len(added) == 2
    torch.testing.assert_close(wte.grad, 2 * first)


def test_second_backward_and_micro_batches(inputs, added):
    _, wte, wpe = inputs
    expected = torch.autograd.grad(_loss(*inputs, tied=False), [wte, wpe])
    loss = _loss(*inputs)
    first = torch.autograd.grad(loss, [wte, wpe], retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, [wte, wpe])
    assert_same_bits(first, kept)
    assert_same_bits(first, second)
    assert len(added) == 2
    torch.testing.assert_close(first, expected)
    seen = []
    wte.register_hook(lambda g: seen.append(g.clone()))
    _loss(*inputs).backward()
    assert_same_bits(seen, first[:1])


def test_what_others_hold_stays_as_it_is(inputs, added):
    _, wte, _ = inputs
    h, table = embedding(*inputs, return_table=True)
    (rows,) = torch.autograd.grad(h.sum(), wte, retain_graph=True)

    upstream = torch.ones_like(table)
    (dwte,) = torch.autograd.grad([h.sum(), table], wte, [None, upstream], retain_graph=True)
    assert torch.equal(dwte, rows + 1)
    assert (upstream == 1).all()

    dwte, dtable = torch.autograd.grad([h.sum(), (table * 3).sum()], [wte, table], retain_graph=True)
    assert torch.equal(dwte, rows + 3)
    assert (dtable == 3).all()

    other = torch.zeros_like(wte, requires_grad=True)
    dwte, dother = torch.autograd.grad([h.sum(), ((table + other) * 3).sum()], [wte, other], retain_graph=True)
    assert torch.equal(dwte, rows + 3)
    assert (dother == 3).all()

    viewed = torch.zeros(V * C, device=DEVICE, requires_grad=True)
    sums = [h.sum(), ((table + viewed.view(V, C)) * 3).sum()]
    dwte, dviewed = torch.autograd.grad(sums, [wte, viewed], retain_graph=True)
    assert torch.equal(dwte, rows + 3)
    assert (dviewed == 3).all()

    kept, views = [], []
    table.register_hook(kept.append)
    (dwte,) = torch.autograd.grad([h.sum(), (table * 3).sum()], wte, retain_graph=True)
    table.register_hook(lambda g: views.append(g.detach()) or kept.clear())
    torch.autograd.grad([h.sum(), (table * 3).sum()], wte)
    assert torch.equal(dwte, rows + 3)
    assert (views[0] == 3).all()
    assert not added


def test_hook_that_keeps_the_gradient(inputs, added):
    h, table = embedding(*inputs, return_table=True)
    kept = []
    table.register_hook(kept.append)
    torch.autograd.grad([h.sum(), (table * 3).sum()], inputs[1])
    assert (kept[0] == 3).all()
    assert not added


def test_one_output_used(inputs, added):
    _, wte, wpe = inputs
    (expected,) = torch.autograd.grad(embedding(*inputs).square().sum(), wte)
    h, table = embedding(*inputs, return_table=True)
    assert_same_bits(torch.autograd.grad(h.square().sum(), wte), [expected])
    h, table = embedding(*inputs, return_table=True)
    dwte, dwpe = torch.autograd.grad((table * 3).sum(), [wte, wpe], allow_unused=True)
    assert (dwte == 3).all()
    assert dwpe is None
    assert not added


def test_frozen_wte_asks_for_no_gradient(inputs, added):
    ids, wte, wpe = inputs
    h, table = embedding(ids, wte.detach(), wpe, return_table=True)
    assert h.requires_grad
    assert not table.requires_grad
    with torch.no_grad():
        assert embedding(*inputs, return_table=True)[1] is wte


def test_compiles_whole(inputs):
    expected = torch.autograd.grad(_loss(*inputs), inputs[1:])
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(*inputs), inputs[1:]), expected)


def test_operator_contract():
    ids, rng = torch.randint(10, (2, 5)), torch.tensor([5])
    arguments = (torch.randn(10, 24), torch.randn(2, 5, 24), ids, ids, 0.1, rng, 1, "cpp")
    torch.library.opcheck(torch.ops.gpt2_fast.embedding_backward_into.default, arguments)
    with pytest.raises(ValueError, match="must be contiguous"):
        torch.ops.gpt2_fast.embedding_backward_into(torch.randn(24, 10).t(), *arguments[1:])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_model(added, autocast, recompute):
    config = GPT2Config(vocab_size=V, n_positions=9, n_embd=C, n_layer=1, n_head=2)
    model, ids = GPT2LMHeadModel(config).to(DEVICE), torch.randint(V, (2, 9), device=DEVICE)
    model.gradient_checkpointing_enable(recompute)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        out = model.train()(ids, labels=ids)
    out.loss.backward()
    wte = model.transformer.wte.weight
    assert added == [wte.grad.data_ptr()]
    torch.optim.SGD(model.parameters()).step()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        assert out.logits.shape == (2, 9, V)
