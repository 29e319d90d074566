"""The suite notices: each kernel is broken on purpose, and the rule that guards it must object."""

from __future__ import annotations

import functools

import pytest
import torch
from numerics import check_op

from gpt2_fast.ops import add_layernorm as ln_room
from gpt2_fast.ops import attention as attention_room
from gpt2_fast.ops import linear as linear_room
from gpt2_fast.ops import linear_cross_entropy as loss_room
from gpt2_fast.ops import mlp as mlp_room
from gpt2_fast.ops.runtime.gelu import Gelu


def _objects(run, reference, inputs):
    """check_op passes as things are; returns a call that expects it to fail."""
    check_op(run, reference, inputs, torch.float32)

    def after_breaking():
        with pytest.raises(AssertionError, match="error|bits|finite"):
            check_op(run, reference, inputs, torch.float32)

    return after_breaking


def _spoil(monkeypatch, op, which, name, change=torch.zeros_like, impl="cpp"):
    """Changes what an implementation's forward or backward writes as `name`."""
    backend = op.backends[impl]

    def spoiled(a, out):
        getattr(backend, which)(a, out)
        setattr(out, name, change(getattr(out, name)))

    monkeypatch.setitem(op.backends, impl, backend._replace(**{which: spoiled}))


@pytest.mark.parametrize("name", ["dresidual", "dweight", "dbias"])
def test_add_layernorm_without_a_gradient(monkeypatch, name):
    inputs = [torch.randn(5, 96), torch.randn(5, 96), torch.randn(96), torch.randn(96)]
    objects = _objects(lambda *t: ln_room.add_layernorm(*t, impl="cpp"), ln_room.add_layernorm_reference, inputs)
    _spoil(monkeypatch, ln_room.OP, "backward", name)
    objects()


def test_add_layernorm_with_a_slightly_wrong_mean(monkeypatch):
    inputs = [torch.randn(5, 96), torch.randn(5, 96), torch.randn(96), torch.randn(96)]
    objects = _objects(lambda *t: ln_room.add_layernorm(*t, impl="cpp"), ln_room.add_layernorm_reference, inputs)
    _spoil(monkeypatch, ln_room.OP, "forward", "y", lambda y: y + 1e-4)
    objects()


def test_linear_without_a_bias_gradient(monkeypatch):
    inputs = [torch.randn(5, 8), torch.randn(8, 3), torch.randn(3)]
    objects = _objects(linear_room.linear, linear_room.linear_reference, inputs)
    _spoil(monkeypatch, linear_room.OP, "backward", "dbias", impl="auto")
    objects()


@pytest.mark.parametrize("name", ["dresidual", "dln_weight", "dfc_weight", "dfc_bias", "dproj_weight", "dproj_bias"])
def test_mlp_without_a_gradient(monkeypatch, name):
    inputs = [torch.randn(shape) for shape in ((5, 32), (5, 32), 32, 32, (32, 48), 48, (48, 32), 32)]
    objects = _objects(lambda *t: mlp_room.mlp(*t, impl="cpp"), mlp_room.mlp_reference, inputs)
    _spoil(monkeypatch, mlp_room.OP, "backward", name)
    objects()


def _attention(segments=None):
    qkv = torch.randn(2, 33, 3, 2, 16)
    run = lambda t: attention_room.attention(t, segments=segments, impl="cpp")
    return run, lambda t: attention_room.attention_reference(t, segments=segments), [qkv]


def test_attention_that_sees_the_future(monkeypatch):
    """A reference without the causal mask is what a kernel without it would give."""
    run, _, inputs = _attention()

    def uncausal(qkv):
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    with pytest.raises(AssertionError, match="output 0: error"):
        check_op(run, uncausal, inputs, torch.float32)


def test_attention_that_drops_the_padding_mask():
    segments = torch.zeros(2, 33, dtype=torch.int32)
    segments[1, :9] = -1
    run, reference, inputs = _attention(segments)
    check_op(run, reference, inputs, torch.float32)
    blind, _, _ = _attention(None)
    with pytest.raises(AssertionError, match="output 0"):
        check_op(blind, reference, inputs, torch.float32)


def test_mlp_with_the_other_gelu():
    """The exact GELU differs from the tanh form by less than 1e-3, and is still noticed."""
    inputs = [torch.randn(5, 32), torch.randn(5, 32), torch.ones(32), torch.zeros(32)]
    inputs += [torch.randn(32, 128) * 0.2, torch.randn(128), torch.randn(128, 32) * 0.1, torch.randn(32)]
    exact_gelu = functools.partial(mlp_room.mlp_reference, kind=Gelu.ERF)
    for room, count in ((mlp_room.layernorm_linear_gelu, 6), (mlp_room.mlp, 8)):
        run = functools.partial(room, impl="cpp")
        check_op(run, mlp_room.mlp_reference, inputs[:count], torch.float32)
        with pytest.raises(AssertionError, match="output 0: error"):
            check_op(run, exact_gelu, inputs[:count], torch.float32)


def test_loss_that_scores_ignored_labels():
    x, weight, labels = torch.randn(7, 16), torch.randn(37, 16), torch.randint(0, 37, (7,))
    labels[2] = -100
    run = lambda x, w: loss_room.linear_cross_entropy(x, w, labels, impl="cpp")
    reference = lambda x, w: loss_room.linear_cross_entropy_reference(x, w, labels)
    check_op(run, reference, [x, weight], torch.float32)
    scored = labels.clamp(min=0)
    with pytest.raises(AssertionError, match="error"):
        check_op(run, lambda x, w: loss_room.linear_cross_entropy_reference(x, w, scored), [x, weight], torch.float32)
