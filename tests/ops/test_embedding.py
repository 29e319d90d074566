"""embedding: what is its own; the CUDA kernels run on the CPU. test_shared.py has what all operations share."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import DEVICE
from cuda_on_cpu import CudaOnCpu
from numerics import DTYPES, assert_same_bits, check_op, evaluate

from gpt2_fast.ops.embedding import check_ids, embedding, embedding_reference, samples
from gpt2_fast.ops.runtime import cpp, cuda, dispatch, philox
from gpt2_fast.ops.runtime.declare import forget
from gpt2_fast.ops.runtime.philox import Dropout

IMPL = "cpp" if DEVICE == "cpu" else "cuda"


def _check(inputs, options, dtype, run=None):
    def default(input_ids, wte, wpe):
        return embedding(input_ids, wte, wpe, **options, impl=IMPL if wte.device.type == DEVICE else "cpp")

    def reference(input_ids, wte, wpe):
        return embedding_reference(input_ids, wte, wpe, **options)

    check_op(run or default, reference, inputs, dtype, f"{dtype} {tuple(inputs[0].shape)}")


def _leaves(*shapes, dtype=torch.float32):
    return [torch.randn(shape).to(DEVICE, dtype).requires_grad_() for shape in shapes]


def test_int32_and_strided_ids_and_tables():
    ids = torch.randint(50, (7, 4), dtype=torch.int32, device=DEVICE).t()
    wte, wpe = torch.randn(20, 50, device=DEVICE).t(), torch.randn(9, 40, device=DEVICE)[:, ::2]
    _check([ids, wte, wpe], {}, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_result_dtype(dtype):
    ids = torch.randint(10, (2, 5), device=DEVICE)
    wte, wpe = _leaves((10, 40), (5, 40))
    exact = embedding(ids, wte, wpe, impl=IMPL)
    assert torch.equal(embedding(ids, wte, wpe, dtype=dtype, impl=IMPL), exact.to(dtype))
    low = [t.detach().to(dtype).requires_grad_() for t in (wte, wpe)]
    wide = embedding(ids, *low, dtype=torch.float32, impl=IMPL)
    assert torch.equal(wide, low[0].float()[ids] + low[1].float())
    upstream = torch.randn_like(wide)
    gradients = torch.autograd.grad(wide, low, upstream)
    truth = torch.autograd.grad(embedding_reference(ids, *(t.double() for t in low)), low, upstream.double())
    for g, t in zip(gradients, truth, strict=True):
        torch.testing.assert_close(g, t.to(dtype), rtol=2**-7, atol=0)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert embedding(ids, wte, wpe, impl=IMPL).dtype == torch.float32


def test_dropout_drops_the_reference_mask():
    ids, key = torch.randint(10, (3, 37), device=DEVICE), torch.tensor([-987654321012345], device=DEVICE)
    wte, wpe = torch.ones(10, 100, device=DEVICE, requires_grad=True), torch.zeros(37, 100, device=DEVICE)
    h = embedding(ids, wte, wpe, dropout=Dropout(0.3, key, 7), impl=IMPL)
    keep = philox.keep_rows(key, 7, 3 * 37, 100, 0.3).view(3, 37, 100)
    assert torch.equal(h != 0, keep)
    torch.testing.assert_close(h[keep], torch.full_like(h[keep], philox.scale(0.3)))
    (dwte,) = torch.autograd.grad(h.sum(), wte)
    counts = torch.zeros(10, 100, device=DEVICE).index_add(0, ids.flatten(), keep.flatten(0, 1).float())
    torch.testing.assert_close(dwte, counts * philox.scale(0.3))


def test_one_token_many_times():
    """A run over many chunks beside runs that end where a chunk ends."""
    ids = torch.cat([torch.full((3000,), 2), torch.arange(96).repeat_interleave(32) % 3 * 2]).view(4, -1).to(DEVICE)
    _check([ids, *_leaves((5, 36), (ids.shape[1], 36))], {}, torch.float32)


# ---- csrc/embedding.cu, compiled for the CPU ----


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory):
    return CudaOnCpu(tmp_path_factory.mktemp("cuda_on_cpu"))


@pytest.fixture
def emulated(on_cpu, monkeypatch):
    """`impl="cuda"` on CPU tensors: the room's CUDA path as it stands, its launches run by the CPU."""
    monkeypatch.setattr(cuda, "launch", on_cpu.launch)
    on_cpu.launched.clear()
    choose = dispatch.choose
    monkeypatch.setattr(dispatch, "choose", lambda op, impl, *of: impl if impl == "cuda" else choose(op, impl, *of))
    yield functools.partial(embedding, impl="cuda")
    forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_kernels_on_the_cpu(emulated, on_cpu, dtype):
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, lambda *tensors, options=options: emulated(*tensors, **options))
        upstream = [torch.randn(*inputs[0].shape, inputs[1].shape[1]).to(dtype)]
        leaves = [inputs[0], *(t.clone().requires_grad_() for t in inputs[1:])]
        a = evaluate(lambda *t, options=options: emulated(*t, **options), leaves, upstream)
        b = evaluate(lambda *t, options=options: embedding(*t, **options, impl="cpp"), leaves, upstream)
        assert_same_bits([*a[0], *a[1]], [*b[0], *b[1]], "cuda against cpp")
    name = str(dtype).removeprefix("torch.")
    assert {f"embedding_reduce_{name}_{name}", f"embedding_finish_{name}_whole"} <= set(on_cpu.launched)


def test_the_integer_code_below_sm_80_rounds_to_bfloat16_as_torch_does(on_cpu):
    """Every upper half; of lower ones, which only say on which side of the middle a number lies, those at the edges."""
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF])
    bits = (torch.arange(1 << 16)[:, None] << 16) + torch.cat([low, torch.randint(1 << 16, (22,))])
    x = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32).flatten()
    ours, torchs = on_cpu.bfloats(x), x.bfloat16()
    assert torch.equal(ours.isnan(), x.isnan())
    assert torch.equal(ours.view(torch.int16)[~x.isnan()], torchs.view(torch.int16)[~x.isnan()])


def test_cuda_long_run(emulated):
    ids = torch.cat([torch.full((700,), 2), torch.arange(9).repeat_interleave(32) % 3 * 2]).view(4, -1)
    _check([ids, torch.randn(5, 40), torch.randn(ids.shape[1], 40)], {}, torch.float32, emulated)


def test_cuda_reports_an_id_outside_without_touching_anything_else(emulated):
    ids = torch.randint(10, (2, 5))
    wte, wpe = torch.randn(10, 24, requires_grad=True), torch.randn(5, 24)
    good = emulated(ids, wte, wpe)
    check_ids()
    ids[1, 2] = 10
    h = emulated(ids, wte, wpe)
    assert h[1, 2].isnan().all()
    assert torch.equal(h.flatten(0, 1)[:7], good.flatten(0, 1)[:7])
    assert torch.equal(h.flatten(0, 1)[8:], good.flatten(0, 1)[8:])
    (dwte,) = torch.autograd.grad(h, wte, torch.ones_like(h))
    counts = torch.bincount(ids.flatten(), minlength=11)[:10].float()
    assert torch.equal(dwte, counts[:, None].expand(10, 24))
    with pytest.raises(IndexError, match=r"input_ids, flat row 7 of B \* T on cpu, is 10, outside 0 to 9"):
        check_ids()
    check_ids()
    emulated(torch.zeros(1, 5, dtype=torch.int64), wte, wpe, position_ids=torch.tensor([0, 1, 2, 3, -1]))
    with pytest.raises(IndexError, match=r"position_ids, flat row 4 .* is -1, outside 0 to 4 \(n_positions is 5\)"):
        check_ids()


def test_offsets_beyond_32_bits(on_cpu):
    assert on_cpu.index("offset", 2**31 + 5, 50257, 3) == (2**31 + 5) * 50257 + 3
    for a, b in [(2**40 + 7, 3), (2**33, 2**20), (7, 2**33), (2**32 - 1, 2**16 + 1), (5, 7)]:
        assert on_cpu.index("divide", a, b) == a // b
    B, T = 2**21 + 3, 2**20
    for i in (0, B - 1, B, B * T - 1, 2**33 + 11):
        assert on_cpu.index("key_of_position_entry", i, B, T) == i // B
        assert on_cpu.index("row_of_position_entry", i, B, T) == (i % B) * T + i // B


def test_table_beyond_32_bits(tmp_path):
    """A table of more than 2^31 elements, in a sparse file: the last rows are read and written where they are."""
    C, V = 4096, 2**19 + 3
    wte = torch.from_numpy(np.memmap(tmp_path / "wte", np.int16, "w+", shape=(V, C))).view(torch.bfloat16)
    wte[-2:] = torch.tensor([[3.0], [5.0]])
    wpe = torch.zeros(3, C, dtype=torch.bfloat16)
    ids = torch.tensor([[V - 1, 0, V - 2]])
    assert embedding(ids, wte, wpe, impl="cpp")[0, :, 0].tolist() == [5.0, 0.0, 3.0]
    keys, order = torch.tensor([7, V - 1, V - 1]), torch.tensor([1, 0, 2])
    grad, partial = torch.tensor([[1.0], [2.0], [4.0]]).expand(3, C).contiguous(), torch.empty(1, 2, C)
    cpp.embedding_backward(
        keys=keys, order=order, grad=grad, partial=partial, dtable=wte, entries=3, rows=3, B=1, T=3, C=C, table_rows=V,
        chunk=32, dropout_key=None, dropout_threshold=0, dropout_scale=1.0, dropout_site=0,
    )  # fmt: skip
    assert wte[[0, 7, V - 2, V - 1], C - 1].tolist() == [0.0, 2.0, 3.0, 10.0]


# ---- the operator ----


@pytest.mark.parametrize("tables", [torch.float64, torch.float32])
@pytest.mark.parametrize("result", [torch.float64, torch.float32, None])
def test_float64(tables, result):
    """Of the tables or of the result; a kernel's result in float64 is what it computed, and so is its gradient."""
    ids = torch.randint(10, (2, 5))
    wte, wpe = (torch.randn(shape, dtype=tables, requires_grad=True) for shape in ((10, 24), (6, 24)))
    h, expected = embedding(ids, wte, wpe, dtype=result), embedding_reference(ids, wte, wpe)
    assert h.dtype == (result or tables)
    assert_same_bits([h], [expected.to(result or tables)])
    torch.testing.assert_close(torch.autograd.grad(h.sum(), wte), torch.autograd.grad(expected.sum(), wte))
    assert_same_bits([embedding(ids, wte, wpe, dtype=result, impl="reference")], [h])


@pytest.mark.parametrize("shape", [(5,), (1, 5), (2, 5)])
def test_positions_of_every_shape(shape):
    """[T] and [1, T] are for every row; int32 is read as int64 is."""
    positions = torch.randint(9, shape, dtype=torch.int32, device=DEVICE)
    _check([torch.randint(10, (2, 5), device=DEVICE), *_leaves((10, 24), (9, 24))], {"position_ids": positions},
           torch.float32)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "shape", "at", "value", "message"),
    [
        ("input_ids", (2, 5), (1, 3), 10, r"input_ids\[1, 3\] is 10, outside 0 to 9 \(vocab_size is 10\)"),
        ("input_ids", (2, 5), (0, 0), -1, r"input_ids\[0, 0\] is -1, outside 0 to 9"),
        ("position_ids", (5,), (4,), 6, r"position_ids\[0, 4\] is 6, outside 0 to 5 \(n_positions is 6\)"),
        ("input_ids", (2, 5), (1, 0), -(2**63), r"input_ids\[1, 0\] is -9223372036854775808, outside 0 to 9"),
        ("input_ids", (2, 5), (1, 0), 2**63 - 1, r"input_ids\[1, 0\] is 9223372036854775807, outside 0 to 9"),
        ("token_type_ids", (2, 5), (1, 4), 2**40, r"token_type_ids\[1, 4\] is 1099511627776, outside 0 to 9"),
    ],
)
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_id_outside_its_table(name, shape, at, value, message, impl):
    ids = {"input_ids": torch.zeros(2, 5, dtype=torch.int64), name: torch.zeros(shape, dtype=torch.int64)}
    ids[name][at] = value
    with pytest.raises(IndexError, match=message):
        embedding(ids.pop("input_ids"), torch.randn(10, 24), torch.randn(6, 24), **ids, impl=impl)


def test_what_its_sizes_and_dtypes_do_not_fit_is_named():
    ids, wte, wpe = torch.zeros(2, 5, dtype=torch.int64), torch.randn(10, 24), torch.randn(6, 24)
    with pytest.raises(ValueError, match=r"input_ids has 7 tokens a row; wpe has positions for 6"):
        embedding(torch.zeros(1, 7, dtype=torch.int64), wte, wpe)
    with pytest.raises(ValueError, match=r"position_ids is \(4,\); it must be \[B, T\] with B = 2, T = 5"):
        embedding(ids, wte, wpe, position_ids=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"dtype is torch.float16 and the tables are torch.bfloat16"):
        embedding(ids, wte.bfloat16(), wpe.bfloat16(), dtype=torch.float16)
    with pytest.raises(ValueError, match=r"dtype is torch.int64 and the tables are torch.float32"):
        embedding(ids, wte, wpe, dtype=torch.int64)
