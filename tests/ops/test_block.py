"""block: the bits of the four operations that it stands for, and when a model calls it."""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from numerics import assert_same_bits
from torch.autograd.graph import saved_tensors_hooks

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.layers import GPT2MLP, Conv1D, GPT2Attention
from gpt2_fast.ops import block as room
from gpt2_fast.ops.add_layernorm import add_layernorm
from gpt2_fast.ops.attention import attention
from gpt2_fast.ops.block import block
from gpt2_fast.ops.bound import Operations
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.mlp import mlp
from gpt2_fast.ops.runtime import blas
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout, new_key

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = [i.name for i in room.OP.inputs]
# Whose products: (own, the vendor's), which `cpu_policy` chooses by processor.
POLICIES = {
    "own": {"own": True},
    "blas": {"own": False, "own_tiles": False, "float32": "mkl", "native_bfloat16": False},
}


@pytest.fixture(params=POLICIES)
def products(request, use_policy):
    use_policy(replace(cpu_policy(), **POLICIES[request.param]))
    if request.param == "blas" and torch.backends.mkl.is_available():
        assert blas.sgemm(), "torch's MKL is not found: a layer would be four calls of Python on every Intel processor"
    return request.param


def in_turn(
    m, h, segments, ln_1_weight, ln_1_bias, c_attn, c_attn_bias, attn_proj, attn_proj_bias, ln_2_weight, ln_2_bias,
    *rest, n_head, scale=None, activation="gelu_new", attn_pdrop=0.0, dropout=NO_DROPOUT,
):  # fmt: skip
    """The same layer by `add_layernorm`, `linear`, `attention` and `mlp`."""
    (B, T, C), of_attention = m.shape, dropout._replace(p=attn_pdrop, site=dropout.site + 1)
    y, h = add_layernorm(m, h, ln_1_weight, ln_1_bias, dropout=NO_DROPOUT if h is None else dropout)
    qkv = linear(y, c_attn, c_attn_bias).view(B, T, 3, n_head, C // n_head)
    out = attention(qkv, scale=scale, segments=segments, dropout=of_attention if attn_pdrop else NO_DROPOUT)
    a = linear(out.reshape(B, T, C), attn_proj, attn_proj_bias)
    dropout = dropout._replace(site=dropout.site + 2)
    return mlp(a, h, ln_2_weight, ln_2_bias, *rest, dropout=dropout, activation=activation)


def run(call, tensors, options, frozen=()):
    """{"m_out", "h_out", and of each input its gradient}, for the upstream gradients of a fixed seed."""
    leaves = [t if t is None or t.dtype == torch.int32 else t.detach().clone() for t in tensors]
    for name, leaf in zip(NAMES, leaves, strict=True):
        if leaf is not None and leaf.is_floating_point() and name not in frozen:
            leaf.requires_grad_()
    outputs = call(*leaves, **options)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    torch.autograd.backward(outputs, upstream)
    found = {name: leaf.grad for name, leaf in zip(NAMES, leaves, strict=True) if leaf is not None}
    return {"m_out": outputs[0].detach(), "h_out": outputs[1].detach()} | found


def assert_equal(found: dict, wanted: dict, without: tuple[str, ...] = ()) -> None:
    assert found.keys() == wanted.keys()
    for name, t in wanted.items():
        if t is None:
            assert found[name] is None, name
        elif name not in without:
            assert_same_bits([found[name]], [t], name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["Conv1D", "Linear"])
def test_the_bits_of_the_operations_in_turn(products, dtype, transposed):
    for *tensors, options in room.samples(dtype=dtype):
        if transposed:
            tensors = [
                t.t().contiguous().t() if t is not None and t.ndim == 2 and t.is_floating_point() else t
                for t in tensors
            ]
        found, wanted = run(block, tensors, options), run(in_turn, tensors, options)
        # Where there is no stream, m has two gradients in turn, each of which is rounded before they are added.
        assert_equal(found, wanted, without=("m",) if tensors[1] is None and dtype != torch.float32 else ())
        if transposed:
            assert found["c_fc_weight"].t().is_contiguous()


def test_weights_of_both_layouts_at_once(products):
    *tensors, options = list(room.samples())[1]
    wanted = run(block, tensors, options)
    for name in ("attn_proj_weight", "c_fc_weight"):
        i = NAMES.index(name)
        tensors[i] = tensors[i].t().contiguous().t()
    assert_equal(run(block, tensors, options), wanted)


@pytest.mark.parametrize(
    "frozen",
    [room.WEIGHTS, ("c_attn_bias", "mlp_proj_bias"), ("c_fc_weight",), ("ln_1_weight", "ln_2_bias", "m")],
    ids=str,
)
def test_what_is_frozen_has_no_gradient_and_changes_no_other(products, frozen):
    *tensors, options = list(room.samples())[1]
    wanted = run(block, tensors, options)
    assert_equal(run(block, tensors, options, frozen), wanted | dict.fromkeys(frozen))


def test_scratch_that_is_not_held(products, monkeypatch):
    *tensors, options = list(room.samples(dtype=torch.bfloat16))[-1]
    wanted = run(block, tensors, options)
    monkeypatch.setattr(room, "HELD", 0)
    assert_equal(run(block, tensors, options), wanted)


@pytest.mark.parametrize("transposed", [False, True], ids=["Conv1D", "Linear"])
@pytest.mark.parametrize("first", ["packed", "plain"])
def test_a_hook_may_unpack_weights_that_are_laid_out_otherwise(products, transposed, first):
    """What a call of one kind found of layouts is kept for the next, whose gradients are right all the same."""
    *tensors, options = list(room.samples())[3]
    if transposed:
        tensors = [t.t().contiguous().t() if t is not None and t.ndim == 2 else t for t in tensors]
    wanted = run(in_turn, tensors, options)
    room.OP._known.clear()
    other = lambda t: t.contiguous() if transposed else t.t().contiguous().t() if t.ndim == 2 else t
    for which in (first, "packed", "plain"):
        hooks = saved_tensors_hooks(other, lambda t: t) if which == "packed" else contextlib.nullcontext()
        with hooks:
            found = run(block, tensors, options)
        assert_equal(found, wanted)
        assert found["c_fc_weight"].t().is_contiguous() == transposed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_parameters_cast_before_backward(products, dtype):
    """`model.to(dtype)` leaves no trace that autograd sees; what backward reads is cast back."""
    *tensors, options = list(room.samples(dtype=torch.bfloat16))[3]
    wanted = run(block, tensors, options)

    def cast_since(*leaves, **options):
        outputs = block(*leaves, **options)
        for leaf in leaves[3:]:
            leaf.data = leaf.data.to(dtype)
        return outputs

    found = run(cast_since, tensors, options)
    assert_equal({name: t.bfloat16() for name, t in found.items()}, wanted)


@pytest.mark.parametrize("T", [300, 513])
def test_keys_shared_out_among_threads(products, T):
    """Few heads and many keys: each thread leaves its own part of dq, in scratch."""
    C = 32
    shapes = [(1, T, C)] * 2 + [
        (C,),
        (C,),
        (C, 3 * C),
        (3 * C,),
        (C, C),
        (C,),
        (C,),
        (C,),
        (C, 48),
        (48,),
        (48, C),
        (C,),
    ]
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(s, generator=generator) * s[0] ** -0.5 for s in shapes]
    tensors.insert(2, None)
    assert_equal(run(block, tensors, {"n_head": 1}), run(in_turn, tensors, {"n_head": 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_head": 3}, r"block: c_attn_weight is \[40, 120\] and n_head 3; it must be \[C, 3 C\], C by n_head"),
        ({"n_head": 0}, "n_head 0"),
        ({"n_head": 4, "impl": "cpp"}, "block: head size 10 is outside 16 to 128"),
        ({"attn_pdrop": 1.0}, "block: attn_pdrop is 1.0; it must be at least 0 and below 1"),
        ({"dropout": NO_DROPOUT}, "block: attn_pdrop is above 0 and dropout's p is 0"),
        ({"scale": 0.0}, "block: scale is 0.0; it must be positive"),
        ({"ln_1_eps": -1.0}, "block: ln_1_eps is -1.0; it must be at least 0 and finite"),
        ({"ln_2_eps": float("nan")}, "block: ln_2_eps is nan; it must be at least 0 and finite"),
        ({"activation": "relu"}, "block: activation is 'relu'"),
    ],
    ids=str,
)
def test_what_does_not_fit_raises(change, message):
    *tensors, options = list(room.samples())[1]
    with pytest.raises(ValueError, match=message):
        block(*tensors, **(options | change))


def test_autocast_raises():
    """One dtype for all of it is not what autocast means; a model calls the operations in turn there."""
    *tensors, options = next(iter(room.samples()))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="block: m is torch.float32 inside torch.autocast; it must be outside"),
    ):
        block(*tensors, **options)


def test_a_projection_of_another_width_raises():
    *tensors, options = next(iter(room.samples()))
    tensors[NAMES.index("c_attn_weight")] = torch.randn(20, 40)
    tensors[NAMES.index("c_attn_bias")] = torch.randn(40)
    with pytest.raises(ValueError, match=r"c_attn_weight is \[20, 40\] and n_head 1"):
        block(*tensors, **options)


def test_a_blas_that_multiplies_wrongly_is_not_called(monkeypatch):
    names = (ctypes.c_void_p,) * 13
    wrong = ctypes.CFUNCTYPE(None, *names)(lambda *_: None)
    assert not blas._multiplies(wrong)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: SimpleNamespace(sgemm_=wrong))
    assert blas.sgemm.__wrapped__() == 0
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda path: SimpleNamespace())
    assert blas.sgemm.__wrapped__() == 0


def test_the_first_look_for_a_blas_may_be_inside_a_transform(use_policy):
    use_policy(replace(cpu_policy(), **POLICIES["blas"]))
    blas.sgemm.cache_clear()
    found = torch.func.vmap(lambda x: x * (2.0 if blas.sgemm() else 3.0))(torch.ones(2))
    assert found[0] == (2.0 if torch.backends.mkl.is_available() else 3.0)


# ---- when a model calls it ----


def _model(**options) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=48, vocab_size=65, n_positions=32, **options)).train()


IDS = torch.arange(2 * 32).view(2, 32) % 65


@pytest.fixture
def calls(monkeypatch, use_policy) -> list:
    """One entry for each call of `block` by a model, on a machine whose products are this package's own."""
    use_policy(replace(cpu_policy(), own=True))
    made, run_one = [], Operations.run

    def counted(self, op, *tensors, **options):
        made.extend([op] if op is block else [])
        return run_one(self, op, *tensors, **options)

    monkeypatch.setattr(Operations, "run", counted)
    return made


def _gradients(model, **options) -> dict:
    model.zero_grad()
    model(IDS, labels=IDS, **options).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"attn_pdrop": 0.0}, {"resid_pdrop": 0.0, "attn_pdrop": 0.0}], ids=str)
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_model_calls_it_and_its_gradients_have_the_same_bits(calls, monkeypatch, options, recomputed):
    model, key = _model(**options), new_key("cpu")
    if recomputed:
        model.gradient_checkpointing_enable()
    found = _gradients(model, dropout_key=key)
    assert len(calls) == 4 if recomputed else 2
    monkeypatch.setattr(Operations, "whole_layers", False)
    wanted = _gradients(model, dropout_key=key)
    assert len(calls) == 4 if recomputed else 2
    assert_equal(found, wanted)


def _hook(module, *_):
    module.called = True


@pytest.mark.parametrize(
    "part", ["attn", "attn.c_attn", "attn.c_proj", "ln_1", "ln_2", "mlp", "mlp.c_fc", "mlp.c_proj"]
)
def test_who_listens_to_a_part_of_a_layer_hears_it(calls, part):
    model = _model()
    module = model.transformer.h[1].get_submodule(part)
    module.register_forward_hook(_hook)
    model(IDS)
    assert module.called
    assert len(calls) == 1  # the other layer


@pytest.mark.parametrize("kind", [GPT2Attention, GPT2MLP, Conv1D])
def test_a_class_with_another_forward_is_called(calls, monkeypatch, kind):
    """As programs give it that bring kernels of their own."""
    heard, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, *a: heard.append(self) or forward(self, *a))
    _model()(IDS)
    assert heard
    assert not calls


def test_what_a_program_put_in_the_place_of_a_part_is_called(calls, monkeypatch):
    model, heard = _model(), []
    attention_of = model.transformer.ops.attention
    model.transformer.ops.attention = lambda *a, **k: heard.append(1) or attention_of(*a, **k)
    model(IDS)
    assert len(heard) == 2
    model, plain = _model(), GPT2MLP.__call__
    monkeypatch.setattr(GPT2MLP, "__call__", lambda self, *a: heard.append(2) or plain(self, *a))
    model(IDS)
    assert heard[2:] == [2, 2]
    assert not calls


def test_heads_that_do_not_fit_raise_as_before(calls):
    model = _model()
    model.transformer.h[0].attn.n_head = 3
    with pytest.raises(RuntimeError, match="invalid for input"):
        model(IDS)


def test_where_only_attention_drops_the_operations_are_called_in_turn(calls):
    model = _model(resid_pdrop=0.0)
    _gradients(model)
    assert not calls
    _gradients(model.eval())
    assert len(calls) == 2


@pytest.mark.parametrize("case", ["reference", "float64", "autocast", "LayerNorms in float32", "generate"])
def test_what_it_does_not_take_is_computed_as_before(calls, case):
    model = _model(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    if case == "reference":
        model.transformer.impl = "reference"
    if case == "float64":
        model.double()
    if case == "LayerNorms in float32":
        model.bfloat16()
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.float()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), torch.no_grad():
        if case == "generate":
            model.eval().generate(IDS[:, :4], max_new_tokens=2)
        else:
            model(IDS, labels=IDS)
    assert not calls


def test_dropout_at_three_sites():
    """What each site drops is what the reference drops, from one key."""
    *tensors, options = list(room.samples())[1]
    for p, attn_pdrop in ((0.5, 0.0), (0.5, 0.5)):
        options |= {"dropout": Dropout(p, torch.tensor([77]), 6), "attn_pdrop": attn_pdrop}
        found, wanted = (block(*tensors, **options, impl=impl) for impl in ("auto", "reference"))
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("B", "T", "C", "F"), [(1, 1, 16, 1), (1, 40, 16, 1), (2, 1, 16, 5), (1, 1, 48, 64)])
def test_matrices_of_one_row_or_column(products, B, T, C, F):
    """Whose strides do not say which way they lie. A BLAS that refuses them says so on standard output and goes on."""
    shapes = [(B, T, C)] * 2 + [(C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,), (C,), (C,), (C, F), (F,), (F, C), (C,)]
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=generator) * s[0] ** -0.5 for s in shapes]
    tensors.insert(2, None)
    found, wanted = run(block, tensors, {"n_head": 1}), run(in_turn, tensors, {"n_head": 1})
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, atol=1e-5, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
