"""mlp: what is its own; test_shared.py holds it to float64 and to the contract of all operations."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op

from gpt2_fast import config
from gpt2_fast.ops import add_layernorm
from gpt2_fast.ops.mlp import layernorm_linear_gelu, mlp, mlp_reference, samples
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy
from gpt2_fast.ops.runtime.gelu import ACTIVATIONS, Gelu, bias_gelu, bias_gelu_backward
from gpt2_fast.ops.runtime.philox import Dropout, keep_rows

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


def _inputs(n_rows=3, n_embd=96, width=40, out=24):
    """x, residual, ln_weight, ln_bias, fc_weight, fc_bias, proj_weight, proj_bias."""
    shapes = [(n_rows, n_embd)] * 2 + [(n_embd,)] * 2 + [(n_embd, width), (width,), (width, out), (out,)]
    return [torch.randn(shape, device=DEVICE) for shape in shapes]


def _check(inputs, options, dtype, impl):
    reference = lambda *t: mlp_reference(*t, dropout=options["dropout"], kind=ACTIVATIONS[options["activation"]])
    check_op(lambda *t: mlp(*t, **options, impl=impl), reference, inputs, dtype, f"{impl} {dtype} {inputs[0].shape}")


@pytest.mark.parametrize("own", [False, True], ids=["vendor", "own"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_processors_products(use_policy, native, own, dtype):
    """The tensors between the passes have the dtype in which the product runs, whichever that is."""
    use_policy(CpuPolicy("mkl", native, "a test", own))
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, "cpp")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_up_to_the_gelu(impl, dtype):
    """Without c_proj, and with c_proj without a bias."""
    options = {"dropout": Dropout(0.1, torch.tensor([5], device=DEVICE)), "activation": "gelu"}
    inputs = [t.to(dtype) for t in _inputs(5)]
    _check([*inputs[:6], None, None], options, dtype, impl)
    _check([*inputs[:7], None], options, dtype, impl)
    options["activation"] = "gelu_new"
    whole = mlp(*inputs[:6], None, None, **options, impl=impl)
    assert_same_bits(layernorm_linear_gelu(*inputs[:6], **options, impl=impl), whole)


@pytest.mark.parametrize("kind", Gelu, ids=str)
def test_gelu_far_from_zero(isa, kind):
    """Values and derivatives where exp saturates, in the tails, and just beside 0."""
    u = torch.tensor([-1e9, -1e4, -100.0, -13.0, -5.0, -0.75, -1e-6, 0.0, 1e-6, 3.0, 5.5, 30.0, 1e4, 1e9])
    u = torch.cat([u, torch.linspace(-8, 8, 1001)]).reshape(1, -1)
    dy, erf = torch.ones_like(u), kind is Gelu.ERF
    y, _ = bias_gelu(u.clone(), torch.zeros(u.shape[1]), torch.float32, True, kind)
    du, dbias = bias_gelu_backward(dy, u, torch.float32, kind)
    leaf = u.double().requires_grad_()
    truth = torch.nn.functional.gelu(leaf, approximate=kind.approximate)
    if erf:  # where 1 + erf loses its digits, in float64 too
        truth = torch.where(leaf < 0, leaf / 2 * torch.special.erfc(-leaf / 2**0.5), truth)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    # exp(-x) is known to x units in the last place of its argument: the far tail to its distance.
    torch.testing.assert_close(y.double(), truth.detach(), rtol=2e-6 if erf else 3e-6, atol=1e-12)
    torch.testing.assert_close(du.double(), slope, rtol=2e-6, atol=1e-7)
    assert torch.equal(dbias, du[0])


def test_not_a_number_stays_one(isa):
    u = torch.full((1, 20), torch.nan)
    for kind in Gelu:
        y, _ = bias_gelu(u.clone(), torch.zeros(20), torch.float32, True, kind)
        du, _ = bias_gelu_backward(torch.ones_like(u), u, torch.float32, kind)
        assert y.isnan().all()
        assert du.isnan().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_activations(impl):
    """Each name is F.gelu's form of it, the two forms differ, and another name is refused."""
    x, _, ln_weight, ln_bias, *weights = _inputs()
    u = torch.nn.functional.layer_norm(x, (96,), ln_weight, ln_bias) @ weights[0] + weights[1]
    for activation, approximate in {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}.items():
        y, _ = layernorm_linear_gelu(x, None, ln_weight, ln_bias, *weights[:2], activation=activation, impl=impl)
        expected = torch.nn.functional.gelu(u.double(), approximate=approximate).float()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)
        other = torch.nn.functional.gelu(u.double(), approximate="none" if approximate == "tanh" else "tanh")
        assert (y - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="activation is 'relu'; choose gelu_new, gelu_pytorch_tanh, gelu"):
        mlp(x, None, ln_weight, ln_bias, *weights, activation="relu", impl=impl)
    assert ACTIVATIONS.keys() == set(config.ACTIVATIONS)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_drops_the_reference_mask(impl):
    _, _, *rest = _inputs(37, 100)
    x, residual = torch.ones(37, 100, device=DEVICE), torch.zeros(37, 100, device=DEVICE)
    dropout = Dropout(0.3, torch.tensor([-987654321012345], device=DEVICE), 7)
    _, h = mlp(x, residual, *rest, dropout=dropout, impl=impl)
    assert torch.equal(h != 0, keep_rows(dropout.key, 7, 37, 100, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_nn_linear(impl, dtype):
    """Transposed views of [out, in]: their gradients are laid out as they are, and autograd keeps that memory."""
    inputs = [t.to(dtype) for t in _inputs()]
    for at in (4, 6):
        inputs[at] = inputs[at].t().contiguous().t()
    _check(inputs, {"activation": "gelu", "dropout": Dropout()}, dtype, impl)
    stored, seen = [inputs[at].t().detach().requires_grad_() for at in (4, 6)], []
    handles = [t.register_hook(lambda g: seen.append(g.data_ptr())) for t in stored]
    inputs[4], inputs[6] = (t.t() for t in stored)
    mlp(*inputs, impl=impl)[0].sum().backward()
    for handle in handles:
        handle.remove()
    assert all(t.grad.is_contiguous() for t in stored)
    assert {t.grad.data_ptr() for t in stored} == set(seen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_backward(dtype):
    """On a CPU h, u and two float32 numbers a row: neither the normalised rows nor gelu(u)."""
    N, C, width, saved = 33, 96, 384, {}
    inputs = [t.to(dtype).requires_grad_() for t in _inputs(N, C, width)]
    parameters = {t.data_ptr() for t in inputs[2:]}

    def pack(t):
        if t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        m, h = mlp(*inputs, impl="cpp")
    assert sum(saved.values()) == dtype.itemsize * N * (C + width) + 8 * N
    (m.float().square().mean() + h.float().mean()).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_rows_again_are_the_same_bits(isa, dtype):
    for x, residual, weight, bias, options in add_layernorm.samples("cpu", dtype):
        arguments = (x, residual, weight, bias, 1e-5, *options["dropout"].flat(), dtype, True, "cpp")
        n, h, mean, rstd = add_layernorm.OP.run_forward(*arguments)
        h = x if residual is None else h
        assert_same_bits([add_layernorm.normalized(h, weight, bias, mean, rstd, dtype)], [n])


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_saved_when_no_gradient_is_wanted(impl):
    inputs = _inputs()
    expected = mlp(*[t.clone().requires_grad_() for t in inputs], impl=impl)
    assert_same_bits(mlp(*inputs, impl=impl), expected)
    with torch.no_grad():
        m, _ = mlp(*[t.requires_grad_() for t in inputs], impl=impl)
    assert m.grad_fn is None


def test_passes_around_a_vendors_product_give_the_same_bits_on_any_number_of_threads(threads):
    """How the product between them sums is its own affair."""
    product, dy, bias = torch.randn(257, 200), torch.randn(257, 200), torch.randn(200)
    runs = []
    for count in (2, 1, 2):
        threads(count)
        runs.append([*bias_gelu(product.clone(), bias, torch.float32, True, Gelu.ERF),
                     *bias_gelu_backward(dy, product, torch.float32, Gelu.ERF)])  # fmt: skip
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_what_does_not_go_together_is_named():
    x, residual, *rest = (t.cpu() for t in _inputs())
    with pytest.raises(ValueError, match="fc_weight is torch.bfloat16 and x torch.float32; they must match"):
        mlp(x, residual, *rest[:2], rest[2].bfloat16(), *rest[3:])
    with pytest.raises(ValueError, match="dropout's p is 0.1 and residual is None; it acts on what is added"):
        mlp(x, None, *rest, dropout=Dropout(0.1, torch.tensor([5])))
    with pytest.raises(ValueError, match="proj_weight is None and proj_bias is not"):
        mlp(x, residual, *rest[:4], None, rest[5])
