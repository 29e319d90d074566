"""linear: the own and the vendor's products against float64, values and gradients."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, evaluate

from gpt2_fast.ops.linear import add_product, gelu, gelu_product, linear, linear_reference, product, samples
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy, cpu_policy

OWN = [CpuPolicy("mkl", native, "", own=True) for native in (False, True)]
POLICIES = [*OWN, CpuPolicy("onednn", True, ""), CpuPolicy("mkl", True, "")]
# (M, N, K): one number; less than a tile; tiles and what is left over; two blocks of inputs; two of rows and of inputs.
SIZES = [(1, 1, 1), (5, 3, 2), (37, 51, 20), (65, 130, 97), (33, 65, 3101), (1600, 49, 1601)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", dispatch.implementations("linear", DEVICE)[:-1])
def test_values_and_gradients(impl, dtype):
    for inputs in samples(DEVICE, dtype):
        check_op(lambda *t: linear(*t, impl=impl), linear_reference, inputs, dtype, f"{impl} {dtype}")


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_policy_is_right(policy, dtype, use_policy):
    """What another processor would choose is right on this one too."""
    use_policy(policy)
    for inputs in samples("cpu", dtype):
        check_op(linear, linear_reference, inputs, dtype, f"{policy} {dtype}")


def test_policy_override(monkeypatch):
    choose = cpu_policy.__wrapped__
    monkeypatch.setenv("GPT2_FAST_GEMM", "onednn")
    assert (choose().float32, choose().own) == ("onednn", False)
    monkeypatch.setenv("GPT2_FAST_GEMM", "cpp")
    assert choose().own
    monkeypatch.setenv("GPT2_FAST_GEMM", "blas")
    with pytest.raises(ValueError, match="'blas'; set it to cpp, onednn, mkl, or unset it"):
        choose()


def _matrix(rows, columns, dtype, transposed):
    matrix = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    return matrix.to(dtype)


@pytest.mark.parametrize("policy", OWN, ids=["widened", "native"])
@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_product(isa, dtype, layout, policy, use_policy):
    """Every layout of both sides, whole and partial tiles, several blocks; sums as exact as eager float32's."""
    use_policy(policy)
    for M, N, K in SIZES[: 6 if isa.startswith("avx512") else 5]:
        a, b = _matrix(M, K, dtype, layout[0]), _matrix(K, N, dtype, layout[1])
        bias = torch.randn(N).to(dtype)
        actual = product(a, b, bias, torch.float32, impl="cpp")
        eager, truth = a.float() @ b.float() + bias.float(), a.double() @ b.double() + bias.double()
        assert_as_exact(actual, eager, truth, f"{M} x {N} x {K}")


def test_own_product_takes_two_dtypes_and_any_strides(use_policy):
    use_policy(OWN[1])
    a, b = torch.randn(40, 3, 30)[:, 1], torch.randn(60, 90)[::2, ::2].bfloat16()
    actual, truth = product(a, b, impl="cpp"), a.double() @ b.double()
    assert_as_exact(actual, a @ b.float(), truth, "float32 by bfloat16")
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("policy", [*OWN, CpuPolicy("onednn", False, ""), CpuPolicy("mkl", False, "")], ids=str)
def test_sum_of_products(policy, use_policy):
    use_policy(policy)
    for M, N, K in SIZES[:5]:
        total, a, b = torch.randn(M, N), torch.randn(M, K), torch.randn(K, N)
        truth, eager = total.double() + a.double() @ b.double(), total + a @ b
        add_product(total, a, b)
        assert_as_exact(total, eager, truth, f"{M} x {N} x {K}")


@pytest.mark.parametrize("erf", [False, True], ids=["tanh", "erf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_with_gelu(isa, dtype, erf, use_policy):
    """u is rounded once, and y is GELU of u as it was rounded; nothing else is written without u."""
    use_policy(OWN[1])
    gelu = lambda u: torch.nn.functional.gelu(u, approximate="none" if erf else "tanh")
    for M, N, K in SIZES[:5]:
        a, b, bias = (torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), (N,)))
        y, u = gelu_product(a, b, bias, dtype, True, erf)
        assert_as_exact(u, a @ b + bias, a.double() @ b.double() + bias.double(), "u", dtype)
        assert_as_exact(y, gelu(u), gelu(u.double()), "y", dtype)
        alone, nothing = gelu_product(a, b, bias, dtype, False, erf)
        assert_same_bits([alone], [y])
        assert nothing is None


@pytest.mark.parametrize("pairs", [False, True], ids=["widened", "native"])
def test_own_product_gives_the_same_bits_on_any_number_of_threads(pairs, threads, use_policy):
    use_policy(OWN[pairs])
    runs, (M, N, K) = [], (201, 290, 1700)
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).t().bfloat16()
    for n in (1, 2, 3, 6):
        threads(n)
        runs.append(product(a, b, None, torch.float32, impl="cpp"))
    for other in runs[1:]:
        assert_same_bits(runs[:1], [other])


def test_products_of_nothing(use_policy):
    use_policy(OWN[1])
    assert product(torch.empty(0, 3), torch.empty(3, 2)).shape == (0, 2)
    assert torch.equal(product(torch.empty(40, 0), torch.empty(0, 2), impl="cpp"), torch.zeros(40, 2))


def test_strided_inputs():
    x, weight = torch.randn(6, 4, 48).transpose(0, 1), torch.randn(33, 48).t()
    check_op(linear, linear_reference, [x, weight, torch.randn(33)], torch.float32)


@pytest.mark.parametrize("library", ["cpp", "mkl", "onednn"])
def test_weight_of_nn_linear(library, use_policy):
    """Its gradient is laid out as nn.Linear stores it, and autograd keeps that memory."""
    use_policy(CpuPolicy("mkl" if library == "cpp" else library, False, "", own=library == "cpp"))
    stored, seen = torch.randn(33, 48, requires_grad=True), []
    stored.register_hook(lambda g: seen.append(g.data_ptr()))
    linear(torch.randn(6, 4, 48), stored.t()).sum().backward()
    assert stored.grad.is_contiguous()
    assert stored.grad.data_ptr() == seen[0]


def test_frozen_weight_gets_no_gradient():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5)
    y = linear(x, weight, torch.zeros(5))
    (dx,) = torch.autograd.grad(y.sum(), [x])
    torch.testing.assert_close(dx, weight.sum(1).expand(3, 8))


def test_autocast_casts_everything():
    x, weight, bias = torch.randn(3, 8), torch.randn(8, 5, requires_grad=True), torch.randn(5)
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x, weight, bias)
    expected = x.bfloat16().double() @ weight.bfloat16().double() + bias.bfloat16().double()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=2**-7, atol=2**-7)
    (dweight,) = torch.autograd.grad(y.float().sum(), [weight])
    assert dweight.dtype == torch.float32


def test_same_bits_twice():
    inputs = [torch.randn(65, 96, requires_grad=True), torch.randn(96, 33, requires_grad=True)]
    runs = [evaluate(linear, inputs, [torch.ones(65, 33)]) for _ in range(2)]
    assert_same_bits([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]])


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_of_is_kept_in_the_place_of_x(isa, dtype, approximate):
    """The same bits, forward and backward, and x is not among what is saved."""
    for rows, width in ((1, 1), (3, 20), (65, 97)):
        u = torch.randn(rows, width).to(dtype)
        y = gelu(u, approximate)
        assert_as_exact(y, F.gelu(u, approximate=approximate), F.gelu(u.double(), approximate=approximate), "y", dtype)
        weight, bias = torch.randn(width, 33).to(dtype), torch.randn(33).to(dtype)
        inputs, upstream = [y.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()], [torch.randn(rows, 33)]
        plain = evaluate(linear, inputs, upstream)
        remade = evaluate(partial(linear, gelu_of=u, approximate=approximate), inputs, upstream)
        assert_same_bits([*plain[0], *plain[1]], [*remade[0], *remade[1]])
        kept = {t.data_ptr() for t in linear(*inputs, gelu_of=u, approximate=approximate).grad_fn.saved_tensors}
        assert kept == {u.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("erf", [False, True], ids=["tanh", "erf"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_again_is_the_products_gelu(isa, dtype, erf, use_policy):
    use_policy(OWN[1])
    a, b, bias = (torch.randn(shape).to(dtype) for shape in ((65, 40), (40, 97), (97,)))
    y, u = gelu_product(a, b, bias, dtype, True, erf)
    assert_same_bits([gelu(u, "none" if erf else "tanh")], [y])


def test_operator_contract():
    x, weight, dy = torch.randn(2, 3, 8), torch.randn(8, 5), torch.randn(2, 3, 5)
    torch.library.opcheck(torch.ops.gpt2_fast.linear.default, (x, weight, torch.randn(5), "auto"))
    for layout in (weight, weight.t().contiguous().t()):
        torch.library.opcheck(
            torch.ops.gpt2_fast.linear_backward.default, (dy, x, layout, "tanh", True, True, True, "auto")
        )
        torch.library.opcheck(
            torch.ops.gpt2_fast.linear_backward.default, (dy, x, layout, None, True, True, True, "auto")
        )


def test_compiles_whole():
    x, weight = torch.randn(3, 8, requires_grad=True), torch.randn(8, 5, requires_grad=True)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    upstream = [torch.randn(3, 5)]
    torch.testing.assert_close(evaluate(compiled, [x, weight], upstream), evaluate(linear, [x, weight], upstream))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"x ends in 8 and weight is \(5, 8\)"):
        linear(torch.randn(3, 8), torch.randn(5, 8))
    with pytest.raises(ValueError, match=r"bias is \(4,\)"):
        linear(torch.randn(3, 8), torch.randn(8, 5), torch.randn(4))
    with pytest.raises(ValueError, match="weight is torch.float32 on cpu and x torch.bfloat16"):
        linear(torch.randn(3, 8).bfloat16(), torch.randn(8, 5))
    with pytest.raises(ValueError, match=r"gelu_of is torch.float32 \(3, 7\); x is gelu of it"):
        linear(torch.randn(3, 8), torch.randn(8, 5), gelu_of=torch.randn(3, 7))
