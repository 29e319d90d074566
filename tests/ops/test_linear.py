"""linear and the products behind it: what is their own; test_shared.py has what all operations share."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op

from gpt2_fast.ops import linear_cross_entropy
from gpt2_fast.ops.linear import linear, linear_reference, samples
from gpt2_fast.ops.runtime import cpu_policy as cpu_policy_module
from gpt2_fast.ops.runtime import products
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy, cpu_policy
from gpt2_fast.ops.runtime.gelu import Gelu, gelu
from gpt2_fast.ops.runtime.products import add_product, gelu_product, product

OWN = [CpuPolicy("mkl", native, "", own=True) for native in (False, True)]
POLICIES = [*OWN, CpuPolicy("onednn", True, ""), CpuPolicy("mkl", True, "")]
# (M, N, K): one number; less than a tile; tiles and what is left over; inputs that fill every set's tile; two blocks of
# inputs; two of rows and of inputs.
SIZES = [(1, 1, 1), (5, 3, 2), (37, 51, 20), (70, 51, 96), (65, 130, 97), (33, 65, 3101), (1600, 49, 1601)]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_policy_is_right(policy, dtype, use_policy):
    """What another processor would choose is right on this one too."""
    use_policy(policy)
    for *inputs, _ in samples("cpu", dtype):
        check_op(linear, linear_reference, inputs, dtype, f"{policy} {dtype}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpus_sum_is_rounded_once_to_the_parameters_dtype(dtype):
    bias = pytest.importorskip("gpt2_fast.kernels.bias")
    x = torch.randn(301, 70, device=DEVICE).to(dtype)
    found = bias.column_sum(x)
    torch.testing.assert_close(found.double(), x.double().sum(0), rtol=1e-5, atol=1e-5)
    assert_same_bits([bias.column_sum(x, dtype)], [found.to(dtype)])


def test_policy_override(monkeypatch):
    choose = cpu_policy.__wrapped__
    monkeypatch.setenv("GPT2_FAST_GEMM", "onednn")
    assert (choose().float32, choose().own) == ("onednn", False)
    monkeypatch.setenv("GPT2_FAST_GEMM", "cpp")
    assert choose().own
    monkeypatch.setenv("GPT2_FAST_GEMM", "blas")
    with pytest.raises(ValueError, match="'blas'; set it to cpp, onednn, mkl, or unset it"):
        choose()


def test_tile_registers_take_bfloat16_alone(monkeypatch):
    """Of Intel's AMX, and where they are in use: a build or a system without them leaves bfloat16 to the vendor."""
    choose = cpu_policy.__wrapped__
    monkeypatch.delenv("GPT2_FAST_GEMM", raising=False)
    flags = frozenset({"avx512f", "avx512_bf16", "amx_bf16", "amx_tile"})
    monkeypatch.setattr(cpu_policy_module, "_vendor_and_flags", lambda: ("GenuineIntel", flags))
    taken = {(str(t), isa) for t in DTYPES for isa in ("avx512bf16", "amx") if choose().takes_own(t, isa)}
    assert taken == {("torch.bfloat16", "amx")}
    monkeypatch.setenv("GPT2_FAST_GEMM", "mkl")
    assert not choose().takes_own(torch.bfloat16, "amx")


def test_the_own_product_and_the_vendors_take_turns(use_policy):
    """Both set up the tile registers of a thread for themselves, where there are any."""
    use_policy(OWN[1])
    a, b = torch.randn(70, 96).bfloat16(), torch.randn(96, 80).bfloat16()
    truth = a.double() @ b.double()
    for _ in range(3):
        assert_as_exact(product(a, b, impl="cpp"), a @ b, truth, "in turns", torch.bfloat16)
        assert_as_exact(product(a, b, impl="aten"), a @ b, truth, "in turns", torch.bfloat16)


def _matrix(rows, columns, dtype, transposed):
    matrix = torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)
    return matrix.to(dtype)


@pytest.mark.parametrize("policy", OWN, ids=["widened", "native"])
@pytest.mark.parametrize("layout", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_own_product(isa, dtype, layout, policy, use_policy):
    """Every layout of both sides, whole and partial tiles, several blocks; sums as exact as eager float32's."""
    use_policy(policy)
    for M, N, K in SIZES if isa.startswith(("avx512", "amx")) else SIZES[:5]:
        a, b = _matrix(M, K, dtype, layout[0]), _matrix(K, N, dtype, layout[1])
        bias = torch.randn(N).to(dtype)
        actual = product(a, b, bias, torch.float32, impl="cpp")
        eager, truth = a.float() @ b.float() + bias.float(), a.double() @ b.double() + bias.double()
        assert_as_exact(actual, eager, truth, f"{M} x {N} x {K}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_own_product_touches_its_own_memory_alone(isa, dtype, use_policy):
    """Rows of A are read where they lie, and what lies between them may be anything; C's may lie apart as well."""
    use_policy(OWN[1])
    for M, K in ((37, 31), (33, 64), (70, 97)):
        around = torch.full((M + 2, K + 70), torch.nan, dtype=dtype)
        a, b = around[1:-1, 3 : 3 + K], torch.randn(K, 33).to(dtype)
        a.copy_(torch.randn(M, K))
        to = torch.full((M, 64), 7.0)
        products._own_product(a, b, None, to[:, :33], products.STORE)
        assert_as_exact(to[:, :33], a.float() @ b.float(), a.double() @ b.double(), f"{M} x {K}")
        assert (to[:, 33:] == 7).all()


def test_results_larger_than_the_caches_are_the_same(isa, threads, use_policy):
    """One thread's 2.2 MB are more than its cache, and tiles of whole lines go past it; those of two are not."""
    use_policy(OWN[1])
    (M, N, K), kind = (1030, 1088, 70), Gelu.TANH
    a, b, bias = torch.randn(M, K).bfloat16(), torch.randn(K, N).bfloat16(), torch.randn(N).bfloat16()
    found = []
    for n in (1, 2):
        threads(n)
        wide = torch.full((M, N), 7.0).bfloat16()
        products._own_product(a, b[:, :1058], bias[:1058], wide[:, :1058], products.STORE)
        assert (wide[:, 1058:] == 7).all()
        narrow = [product(a, b[:, :1058], bias[:1058], impl="cpp", by_lines=lines) for lines in (False, True)]
        assert [x.stride(0) for x in narrow] == [1058, N]
        whole, (y, u) = product(a, b, bias, impl="cpp"), gelu_product(a, b, bias, a.dtype, True, kind)
        assert_same_bits([whole, *narrow, wide[:, :1058]], [u, *[u[:, :1058]] * 3])
        found.append((y, u))
    assert_same_bits(found[0], found[1])
    assert_as_exact(u, a @ b + bias, a.double() @ b.double() + bias.double(), "u", a.dtype)
    assert_as_exact(y, F.gelu(u, approximate="tanh"), F.gelu(u.double(), approximate="tanh"), "y", a.dtype)


def test_a_result_that_is_not_rows_is_refused(use_policy):
    """The kernel knows one stride of it: another layout would be written wrongly."""
    use_policy(OWN[1])
    a, b = torch.randn(9, 5), torch.randn(5, 9)
    for total in (torch.zeros(9, 9).t(), torch.zeros(9, 18)[:, ::2], torch.zeros(1, 9).expand(9, 9)):
        with pytest.raises(ValueError, match="rows must be contiguous"):
            add_product(total, a, b)
        assert (total == 0).all()
    logits, labels = torch.zeros(6, 4).t(), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="rows must be contiguous"):
        linear_cross_entropy._softmax_xent_cpp(logits, labels, torch.zeros(4), torch.ones(1), -100, True)


def test_own_product_takes_two_dtypes_and_any_strides(use_policy):
    use_policy(OWN[1])
    a, b = torch.randn(40, 3, 30)[:, 1], torch.randn(60, 90)[::2, ::2].bfloat16()
    actual, truth = product(a, b, impl="cpp"), a.double() @ b.double()
    assert_as_exact(actual, a @ b.float(), truth, "float32 by bfloat16")
    assert actual.dtype == torch.float32


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_elements_upon_each_other(policy, use_policy):
    """Windows that move on by one element, rows that are one row, everything one number."""
    use_policy(policy)
    x, numbers = torch.randn(15, 36), torch.randn(54)
    for strides in ((1, 1), (0, 1), (1, 0), (0, 0)):
        weight = numbers.as_strided((36, 19), strides)
        check_op(linear, linear_reference, [x, weight, torch.randn(19)], torch.float32, f"strides {strides}")


@pytest.mark.parametrize("policy", [*OWN, CpuPolicy("onednn", False, ""), CpuPolicy("mkl", False, "")], ids=str)
def test_sum_of_products(policy, use_policy):
    use_policy(policy)
    for M, N, K in SIZES[:6]:
        total, a, b = torch.randn(M, N), torch.randn(M, K), torch.randn(K, N)
        truth, eager = total.double() + a.double() @ b.double(), total + a @ b
        add_product(total, a, b)
        assert_as_exact(total, eager, truth, f"{M} x {N} x {K}")


@pytest.mark.parametrize("kind", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product_with_gelu(isa, dtype, kind, use_policy):
    """u is rounded once, and y is GELU of u as it was rounded; nothing else is written without u."""
    use_policy(OWN[1])
    gelu = lambda u: F.gelu(u, approximate=kind.approximate)
    for M, N, K in SIZES[:6]:
        a, b, bias = (torch.randn(shape).to(dtype) for shape in ((M, K), (K, N), (N,)))
        y, u = gelu_product(a, b, bias, dtype, True, kind)
        assert_as_exact(u, a @ b + bias, a.double() @ b.double() + bias.double(), "u", dtype)
        assert_as_exact(y, gelu(u), gelu(u.double()), "y", dtype)
        alone, nothing = gelu_product(a, b, bias, dtype, False, kind)
        assert_same_bits([alone], [y])
        assert nothing is None


@pytest.mark.parametrize("pairs", [False, True], ids=["widened", "native"])
def test_own_product_gives_the_same_bits_on_any_number_of_threads(pairs, threads, use_policy):
    use_policy(OWN[pairs])
    # Several blocks, the last of which is smaller; a step that is not whole; fewer panels than threads.
    sizes = [(201, 290, 1700), (96, 700, 3104), (96, 700, 3101), (32, 65, 3104)]
    for (M, N, K), dtype in itertools.product(sizes, DTYPES[:2]):
        a, b = torch.randn(M, K).to(dtype), torch.randn(N, K).t().to(dtype)
        runs = []
        for n in (1, 2, 3, 6):
            threads(n)
            runs.append(product(a, b, None, torch.float32, impl="cpp"))
        for other in runs[1:]:
            assert_same_bits(runs[:1], [other])


@pytest.mark.parametrize("library", ["cpp", "mkl", "onednn"])
def test_weight_of_nn_linear(library, use_policy):
    """Its gradient is laid out as nn.Linear stores it, and autograd keeps that memory."""
    use_policy(CpuPolicy("mkl" if library == "cpp" else library, False, "", own=library == "cpp"))
    stored, seen = torch.randn(33, 48, requires_grad=True), []
    stored.register_hook(lambda g: seen.append(g.data_ptr()))
    linear(torch.randn(6, 4, 48), stored.t()).sum().backward()
    assert stored.grad.is_contiguous()
    assert stored.grad.data_ptr() == seen[0]


@pytest.mark.parametrize("kind", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_alone(isa, dtype, kind):
    for rows, width in ((1, 1), (3, 20), (65, 97)):
        u = torch.randn(rows, width).to(dtype)
        eager = lambda u: F.gelu(u, approximate=kind.approximate)
        assert_as_exact(gelu(u, kind), eager(u), eager(u.double()), "y", dtype)


@pytest.mark.parametrize("layout", ["Conv1D", "nn.Linear"])
def test_what_is_kept_for_backward(layout):
    """x and the weight, neither of them copied."""
    x, weight = torch.randn(6, 48, requires_grad=True), torch.randn(48, 33)
    weight = (weight if layout == "Conv1D" else weight.t().contiguous().t()).requires_grad_()
    y = linear(x, weight, torch.randn(33))
    assert {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("kind", Gelu)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gelu_again_is_the_products_gelu(isa, dtype, kind, use_policy):
    use_policy(OWN[1])
    a, b, bias = (torch.randn(shape).to(dtype) for shape in ((65, 40), (40, 97), (97,)))
    y, u = gelu_product(a, b, bias, dtype, True, kind)
    assert_same_bits([gelu(u, kind)], [y])
