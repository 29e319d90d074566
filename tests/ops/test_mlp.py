"""layernorm_linear_gelu: every implementation against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from gpt2_fast.ops.layernorm_linear_gelu import (
    ACTIVATIONS,
    _bias_gelu,
    _bias_gelu_backward,
    layernorm_linear_gelu,
    layernorm_linear_gelu_reference,
    samples,
)
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, evaluate

from gpt2_fast import config
from gpt2_fast.ops.add_layernorm import normalized
from gpt2_fast.ops.add_layernorm import samples as ln_samples
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


def _check(inputs, options, dtype, impl):
    def run(*tensors):
        return layernorm_linear_gelu(*tensors, **options, impl=impl)

    def reference(*tensors):
        return layernorm_linear_gelu_reference(*tensors, **options)

    check_op(run, reference, inputs, dtype, f"{impl} {dtype} {tuple(inputs[0].shape)}")


def _samples(impl, dtype):
    """Triton's interpreter is slow: where the product is Triton's, of few rows, small samples alone there."""
    for x, *rest in samples(DEVICE, dtype):
        if impl != "triton" or DEVICE != "cpu" or x.numel() < 1000 or x.shape[0] > 64:
            yield x, *rest


def _inputs(n_rows=3, n_embd=96, width=40, **options):
    shapes = [(n_rows, n_embd), (n_rows, n_embd), (n_embd,), (n_embd,), (n_embd, width), (width,)]
    return [torch.randn(shape, device=DEVICE, **options) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, dtype):
    for *inputs, options in _samples(impl, dtype):
        _check(inputs, options, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, "cpp")


@pytest.mark.parametrize("own", [False, True], ids=["vendor", "own"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_processors_products(use_policy, native, own, dtype):
    """The tensors between the passes have the dtype in which the product runs, whichever that is."""
    use_policy(CpuPolicy("mkl", native, "a test", own))
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, "cpp")


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_gelu_far_from_zero(isa, approximate):
    """Values and derivatives where exp saturates, in the tails, and just beside 0."""
    u = torch.tensor([-1e9, -1e4, -100.0, -13.0, -5.0, -0.75, -1e-6, 0.0, 1e-6, 3.0, 5.5, 30.0, 1e4, 1e9])
    u = torch.cat([u, torch.linspace(-8, 8, 1001)]).reshape(1, -1)
    dy, erf = torch.ones_like(u), approximate == "none"
    y, _ = _bias_gelu(u.clone(), torch.zeros(u.shape[1]), torch.float32, True, erf)
    du, dbias = _bias_gelu_backward(dy, u, torch.float32, erf)
    leaf = u.double().requires_grad_()
    truth = torch.nn.functional.gelu(leaf, approximate=approximate)
    if erf:  # where 1 + erf loses its digits, in float64 too
        truth = torch.where(leaf < 0, leaf / 2 * torch.special.erfc(-leaf / 2**0.5), truth)
    (slope,) = torch.autograd.grad(truth.sum(), leaf)
    # exp(-x) is known to x units in the last place of its argument: the far tail to its distance.
    torch.testing.assert_close(y.double(), truth.detach(), rtol=2e-6 if erf else 3e-6, atol=1e-12)
    torch.testing.assert_close(du.double(), slope, rtol=2e-6, atol=1e-7)
    assert torch.equal(dbias, du[0])


def test_not_a_number_stays_one(isa):
    u = torch.full((1, 20), torch.nan)
    for erf in (False, True):
        y, _ = _bias_gelu(u.clone(), torch.zeros(20), torch.float32, True, erf)
        du, _ = _bias_gelu_backward(torch.ones_like(u), u, torch.float32, erf)
        assert y.isnan().all()
        assert du.isnan().all()


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_activations(impl):
    """Each name is F.gelu's form of it, the two forms differ, and another name is refused."""
    x, _, ln_weight, ln_bias, weight, bias = _inputs()
    u = torch.nn.functional.layer_norm(x, (96,), ln_weight, ln_bias) @ weight + bias
    for activation, approximate in {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}.items():
        y, _ = layernorm_linear_gelu(x, None, ln_weight, ln_bias, weight, bias, activation=activation, impl=impl)
        expected = torch.nn.functional.gelu(u.double(), approximate=approximate).float()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=2e-5)
        other = torch.nn.functional.gelu(u.double(), approximate="none" if approximate == "tanh" else "tanh")
        assert (y - other).abs().max() > 1e-4
    with pytest.raises(ValueError, match="activation is 'relu'; choose gelu_new, gelu_pytorch_tanh, gelu"):
        layernorm_linear_gelu(x, None, ln_weight, ln_bias, weight, bias, activation="relu", impl=impl)
    assert ACTIVATIONS.keys() == set(config.ACTIVATIONS)


@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(impl):
    """The stream and the parameters stay float32, the product and y are bfloat16."""
    inputs = [t.requires_grad_() for t in _inputs(5)]
    with torch.autocast(DEVICE, torch.bfloat16):
        y, h = layernorm_linear_gelu(*inputs, impl=impl)
        eager, _ = layernorm_linear_gelu(*inputs, impl="reference")
    truth, _ = layernorm_linear_gelu_reference(*[t.detach().double() for t in inputs])
    assert y.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    assert_as_exact(y, eager, truth, "y", torch.bfloat16)
    gradients = torch.autograd.grad(y.float().square().sum() + h.sum(), inputs)
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_drops_the_reference_mask(impl):
    _, _, *rest = _inputs(37, 100)
    x, residual = torch.ones(37, 100, device=DEVICE), torch.zeros(37, 100, device=DEVICE)
    rng = torch.tensor([-987654321012345], device=DEVICE)
    _, h = layernorm_linear_gelu(x, residual, *rest, dropout_p=0.3, rng=rng, site=7, impl=impl)
    assert torch.equal(h != 0, philox.keep_rows(rng, 7, 37, 100, 0.3))


def test_strided_inputs():
    x = torch.randn(6, 4, 48).transpose(0, 1)
    weight = torch.randn(40, 48).t()
    _check([x, torch.randn(4, 6, 96)[..., ::2], torch.randn(48), torch.randn(48), weight, torch.randn(40)],
           {}, torch.float32, "cpp")  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_weight_of_nn_linear(impl, dtype):
    """A transposed view of [out, in]: its gradient is laid out as it is, and autograd keeps that memory."""
    x, residual, ln_weight, ln_bias, weight, bias = (t.to(dtype) for t in _inputs())
    _check([x, residual, ln_weight, ln_bias, weight.t().contiguous().t(), bias], {"activation": "gelu"}, dtype, impl)
    stored = weight.t().contiguous().requires_grad_()
    seen = []
    handle = stored.register_hook(lambda g: seen.append(g.data_ptr()))
    layernorm_linear_gelu(x, residual, ln_weight, ln_bias, stored.t(), bias, impl=impl)[0].sum().backward()
    handle.remove()
    assert stored.grad.is_contiguous()
    assert stored.grad.data_ptr() == seen[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_backward(dtype):
    """h, u and two float32 numbers a row: neither the normalised rows nor y, nor x of the product after it."""
    N, C, width, parameters = 33, 96, 384, set()
    saved = {}

    def pack(t):
        if t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t.nbytes
        return t

    inputs = [t.to(dtype).requires_grad_() for t in _inputs(N, C, width)]
    project = torch.randn(width, C).to(dtype).requires_grad_()
    parameters |= {t.data_ptr() for t in (*inputs[2:], project)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, h, u = layernorm_linear_gelu(*inputs, return_u=True, impl="cpp")
        m = linear(y, project, gelu_of=u)
    assert sum(saved.values()) == dtype.itemsize * N * (C + width) + 8 * N
    assert y.data_ptr() not in saved
    assert not u.requires_grad
    (m.float().square().mean() + h.float().mean()).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in (*inputs, project))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_rows_again_are_the_same_bits(isa, dtype):
    for x, residual, weight, bias, options in ln_samples("cpu", dtype):
        n, h, mean, rstd = torch.ops.gpt2_fast.add_layernorm(
            x, residual, weight, bias, 1e-5, options["dropout_p"], options["rng"], options["site"], dtype, "cpp"
        )
        h = x if residual is None else h
        assert_same_bits([normalized(h, weight, bias, mean, rstd, dtype)], [n])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_u_only_where_it_is_worth_the_time(impl):
    inputs = [t.requires_grad_() for t in _inputs()]
    assert (layernorm_linear_gelu(*inputs, return_u=True, impl=impl)[2] is None) == (impl != "cpp")
    with torch.no_grad():
        assert layernorm_linear_gelu(*inputs, return_u=True, impl=impl)[2] is None


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_saved_when_no_gradient_is_wanted(impl):
    inputs = _inputs()
    expected, h = layernorm_linear_gelu(*[t.clone().requires_grad_() for t in inputs], impl=impl)
    y, h_alone = layernorm_linear_gelu(*inputs, impl=impl)
    assert_same_bits([y, h_alone], [expected.detach(), h.detach()])
    with torch.no_grad():
        y, _ = layernorm_linear_gelu(*[t.requires_grad_() for t in inputs], impl=impl)
    assert y.grad_fn is None


def test_same_bits_whatever_the_threads(threads):
    """Of the passes here; how a vendor's product sums is its own affair."""
    product, dy, bias = torch.randn(257, 200), torch.randn(257, 200), torch.randn(200)
    runs = []
    for count in (2, 1, 2):
        threads(count)
        runs.append([*_bias_gelu(product.clone(), bias, torch.float32, True, True),
                     *_bias_gelu_backward(dy, product, torch.float32, True)])  # fmt: skip
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice(impl):
    inputs = [t.requires_grad_() for t in _inputs(33)]
    upstream = [torch.randn(33, 40, device=DEVICE), torch.randn(33, 96, device=DEVICE)]
    runs = [evaluate(lambda *t: layernorm_linear_gelu(*t, impl=impl), inputs, upstream) for _ in range(2)]
    assert_same_bits([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]])


@pytest.mark.parametrize("transposed", [False, True])
def test_operator_contract(transposed):
    x, residual, ln_weight, ln_bias, weight, bias = (t.cpu() for t in _inputs())
    weight = weight.t().contiguous().t() if transposed else weight
    rng = torch.tensor([5])
    arguments = (x, residual, ln_weight, ln_bias, weight, bias, 1e-5, 0.1, rng, 1, transposed, True, "cpp")
    torch.library.opcheck(torch.ops.gpt2_fast.layernorm_linear_gelu.default, arguments)
    y, h, u, mean, rstd = torch.ops.gpt2_fast.layernorm_linear_gelu(*arguments)
    torch.library.opcheck(
        torch.ops.gpt2_fast.layernorm_linear_gelu_backward.default,
        (y, x, h, u, mean, rstd, ln_weight, ln_bias, weight, 0.1, rng, 1, transposed, torch.float32, True, "cpp"),
    )


def test_compiles_whole():
    def step(*tensors):
        y, h = layernorm_linear_gelu(*tensors, activation="gelu")
        return y.square().sum() + h.sum()

    inputs = [t.requires_grad_() for t in _inputs()]
    one = [torch.ones(())]
    expected, gradients = evaluate(step, inputs, one)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, inputs, one), (expected, gradients))


def test_bad_input_is_named():
    x, residual, ln_weight, ln_bias, weight, bias = _inputs()
    rest = (ln_weight, ln_bias, weight, bias)
    with pytest.raises(ValueError, match=r"residual is \(3, 95\) and x is \(3, 96\)"):
        layernorm_linear_gelu(x, residual[:, :95], *rest)
    with pytest.raises(ValueError, match=r"ln_bias is \(95,\)"):
        layernorm_linear_gelu(x, residual, ln_weight, ln_bias[:-1], weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(40, 96\); it must be \[96, out\]"):
        layernorm_linear_gelu(x, residual, ln_weight, ln_bias, weight.t(), bias)
    with pytest.raises(ValueError, match=r"bias is \(39,\); weight gives 40"):
        layernorm_linear_gelu(x, residual, ln_weight, ln_bias, weight, bias[:-1])
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16 and x torch.float32"):
        layernorm_linear_gelu(x, residual, ln_weight, ln_bias, weight.bfloat16(), bias)
    with pytest.raises(ValueError, match=r"residual is torch.bfloat16 and x torch.float32"):
        layernorm_linear_gelu(x, residual.bfloat16(), *rest)
    with pytest.raises(ValueError, match="rng is None"):
        layernorm_linear_gelu(x, residual, *rest, dropout_p=0.1)
    with pytest.raises(ValueError, match="residual is None; dropout acts on"):
        layernorm_linear_gelu(x, None, *rest, dropout_p=0.1, rng=torch.tensor([5], device=DEVICE))
    with pytest.raises(ImplementationUnavailable, match=r"not torch.float64; use impl='reference'"):
        layernorm_linear_gelu(*[t.double() for t in (x, residual, *rest)], impl=IMPLS[0])
