"""attention and attention_decode: what is their own; test_shared.py has what all operations share."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, evaluate

from gpt2_fast.ops.attention import (
    attention,
    attention_decode,
    attention_decode_reference,
    attention_reference,
    keep_mask,
    segments_from,
)
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.philox import Dropout

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]
INTERPRETED = DEVICE == "cpu"  # Triton takes most of a second a tile there

DROPPED = {"dropout": Dropout(0.1, torch.tensor([5]))}


def _check(qkv, options, impl):
    def run(x):
        return attention(x, **options, impl=impl)

    def reference(x):
        return attention_reference(x, **options)

    check_op(run, reference, [qkv], qkv.dtype, f"{impl} {qkv.dtype} {tuple(qkv.shape)} {sorted(options)}")


@pytest.mark.parametrize("D", [16, 20, 64, 80, 128])
@pytest.mark.parametrize("T", [1, 17, 63, 65, 129])
def test_sizes(isa, T, D):
    _check(torch.randn(1, T, 3, 2, D), {}, "cpp")


@pytest.mark.parametrize("T", [1, 17, 40, 63, 65, 129])
def test_sizes_by_pairs(isa, T):
    """Of bfloat16. Nothing that an earlier call left in a thread's memory shows: here that is NaN."""
    for D in (20, 64, 128):
        left = torch.full((1, 129, 3, 2, D), math.nan, dtype=torch.bfloat16, requires_grad=True)
        attention(left, impl="cpp").sum().backward()
        _check(torch.randn(1, T, 3, 2, D).bfloat16(), {}, "cpp")


def test_a_query_that_sees_one_key_moves_neither(isa):
    """O is V in bfloat16 then, and dO V and dO O are summed in the same order: dS is 0, not nearly."""
    segments = segments_from(torch.ones(1, 40), torch.arange(40)[None])
    for D in (20, 64, 128):
        qkv = torch.randn(1, 40, 3, 2, D).bfloat16().requires_grad_()
        out = attention(qkv, segments=segments, impl="cpp")
        out.backward(torch.randn(out.shape).bfloat16())
        assert torch.count_nonzero(qkv.grad[:, :, :2]) == 0
        assert torch.count_nonzero(qkv.grad[:, :, 2]) > 0


@pytest.mark.parametrize("T", [257, 530])
def test_keys_in_several_groups(threads, T):
    """Past 256 keys dq is summed over groups: by one thread a head, or, with few heads, by several."""
    dropout = Dropout(0.1, torch.tensor([77]))
    segments = segments_from(torch.ones(1, T), (torch.arange(T) // 200)[None])
    qkv = torch.randn(1, T, 3, 2, 32)
    for count in (1, 4):  # 2 heads: sequential on 1 thread, shared out on 4
        threads(count)
        _check(qkv, {}, "cpp")
        _check(qkv, {"segments": segments, "dropout": dropout}, "cpp")


@pytest.mark.parametrize("side", ["left", "right", "both", "all"])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding(impl, side):
    T = 29
    keep = torch.ones(2, T, dtype=torch.int64)
    if side in ("left", "both"):
        keep[0, :7] = 0
    if side in ("right", "both"):
        keep[0, -9:] = 0
    if side == "all":
        keep[0] = 0
    segments = segments_from(keep).to(DEVICE)
    qkv = torch.randn(2, T, 3, 1, 32, device=DEVICE)
    _check(qkv, {"segments": segments}, impl)
    x = qkv.clone().requires_grad_()
    out = attention(x, segments=segments, impl=impl)
    blind = (keep.cumsum(1) == 0).to(DEVICE)
    assert (out[blind] == 0).all(), "a query that sees nothing must give 0"
    assert (out[~blind] != 0).any()
    (dqkv,) = torch.autograd.grad(out, x, torch.randn_like(out))
    assert (dqkv[:, :, 1:][keep.to(DEVICE) == 0] == 0).all(), "a padding key must have no gradient"
    assert (dqkv[:, :, 0][blind] == 0).all()
    # What lies in padding must not matter to what can be seen.
    other = qkv.clone()
    other[:, :, 1:][keep.to(DEVICE) == 0] = 1e4
    assert torch.equal(attention(other, segments=segments, impl=impl), out)


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_do_not_see_each_other(impl):
    """A row of documents and padding equals each document alone; neither order nor size of the ids matters."""
    qkv = torch.randn(1, 70, 3, 1, 16, device=DEVICE)  # more than a tile
    ids = torch.tensor([[9] * 20 + [2] * 37 + [2**31 - 1] * 13])
    mask = torch.ones(1, 70)
    mask[0, 55:57] = 0
    out = attention(qkv, segments=segments_from(mask, ids).to(DEVICE), impl=impl)
    for start, end in ((0, 20), (20, 55), (57, 70)):
        alone = attention(qkv[:, start:end], impl=impl)
        torch.testing.assert_close(out[:, start:end], alone, rtol=1e-5, atol=1e-6)
    dropout = Dropout(0.2, torch.tensor([99], device=DEVICE))
    _check(qkv, {"segments": segments_from(mask, ids).to(DEVICE), "dropout": dropout}, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_dropout_drops_the_reference_mask(impl):
    """With V the identity and equal scores, a row of the output is the row of kept weights."""
    T = D = 48 if impl == "triton" and INTERPRETED else 80
    device = "cpu" if impl == "cpp" else DEVICE
    dropout = Dropout(0.3, torch.tensor([-987654321012345], device=device), 11)
    qkv = torch.zeros(2, T, 3, 2, D, device=device)
    qkv[:, :, 2] = torch.eye(T, device=device)[None, :, None]
    out = attention(qkv, dropout=dropout, impl=impl)  # (B, query, H, key)
    keep = keep_mask(2, T, 2, dropout).tril()
    assert torch.equal(out.permute(0, 2, 1, 3) != 0, keep)
    weights = keep * dropout.scale / torch.arange(1, T + 1, device=device)[:, None]
    torch.testing.assert_close(out.permute(0, 2, 1, 3), weights.float())


def test_dropout_mask_of_every_instruction_set(isa):
    test_dropout_drops_the_reference_mask("cpp")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_stay_finite(isa, dtype):
    """Scores in the thousands: softmax is one-hot, and nothing overflows (in float16 eager's products nearly do)."""
    size = 20.0 if dtype == torch.float16 else 60.0
    qkv = torch.randn(1, 70, 3, 1, 64).mul(torch.tensor([size, size, 1.0]).view(3, 1, 1)).to(dtype).requires_grad_()
    out = attention(qkv, impl="cpp")
    (dqkv,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert out.isfinite().all()
    assert dqkv.isfinite().all()
    exact = attention_reference(qkv.double())
    assert_as_exact(out, attention_reference(qkv), exact, "output", dtype)


def _error(found, exact):
    return float((found.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("size", [3e2, 1e5, 1e18])
def test_huge_scores(isa, size, dtype, most):
    """Softmax is one-hot, or even between keys that are alike, in forward and backward; a score is size^2 or so."""
    documents = {"segments": segments_from(torch.ones(2, 270), (torch.arange(270) // 90).expand(2, 270))}
    for alike, T, options in [(False, 70, {}), (True, 70, {}), (True, 270, documents), (True, 270, DROPPED)]:
        qkv = torch.randn(2, T, 3, 2, 16)
        if alike:
            qkv[:, :, 1] = qkv[:, :1, 1]
        elif size < 1e5:
            continue  # a few of the largest two scores are near each other
        qkv = (qkv * torch.tensor([size, size, 1.0]).view(3, 1, 1)).to(dtype).requires_grad_()
        exact = qkv.detach().double().requires_grad_()
        grad = torch.randn(2, T, 2, 16).to(dtype)
        for x, run in ((qkv, attention), (exact, attention_reference)):
            out = run(x, **options, **({"impl": "cpp"} if x is qkv else {}))
            out.backward(grad.to(out.dtype))
            x.out = out.detach()
        assert _error(qkv.out, exact.out) < most
        for part in (slice(0, 2), slice(2, 3)):
            assert _error(qkv.grad[:, :, part], exact.grad[:, :, part]) < most


def test_huge_scores_leave_the_queries_beside_them_alone(isa):
    """To the bit: a query has neighbours in a vector, and in a block that is worked on again."""
    qkv, grads, outs = torch.randn(1, 140, 3, 1, 64), [], []
    grad = torch.randn(1, 140, 1, 64)
    grad[:, 75:] = 0
    for size in (1.0, 1e8):
        x = qkv.clone()
        x[:, 75:, 0] *= size
        x.requires_grad_()
        out = attention(x, impl="cpp")
        out.backward(grad)
        outs.append(out[:, :75])
        grads.append(x.grad[:, :75, 0])
    assert_same_bits(*[[out, grad] for out, grad in zip(outs, grads, strict=True)])


def test_not_a_number_is_not_hidden(isa):
    qkv = torch.randn(1, 70, 3, 2, 64)
    qkv[0, 40, 0, 1, 3] = float("nan")
    out = attention(qkv, impl="cpp")
    assert out[0, 40, 1].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert out[0, :40].isfinite().all()


def test_same_bits_whatever_the_threads(threads):
    dropout = Dropout(0.1, torch.tensor([5]))
    for shape in ((2, 150, 3, 3, 64), (1, 600, 3, 1, 16)):
        qkv, upstream = torch.randn(shape, requires_grad=True), [torch.randn(shape[0], shape[1], *shape[3:])]
        runs = []
        for count in (2, 1, 3, 2):
            threads(count)
            outputs, gradients = evaluate(lambda x: attention(x, dropout=dropout, impl="cpp"), [qkv], upstream)
            runs.append([*outputs, *gradients])
        for run in runs[1:]:
            assert_same_bits(runs[0], run, str(shape))


def test_segments_encoding():
    mask, ids = torch.tensor([[0, 1, 1, 0]]), torch.tensor([[3, 3, 8, 8]])
    assert segments_from(mask).tolist() == [[-1, 0, 0, -1]]
    assert segments_from(mask.bool()).tolist() == [[-1, 0, 0, -1]]
    assert segments_from(document_ids=ids).tolist() == ids.tolist()
    assert segments_from(mask.float(), ids).tolist() == [[~3, 3, 8, ~8]]
    assert segments_from(mask).dtype == segments_from(mask, ids).dtype == torch.int32


# ---- decoding ----


def _cache(B, H, S, D, dtype, device=DEVICE):
    q, k, v = torch.randn(B, H, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    return [t.to(device, dtype) for t in (q, k, v)]


def _check_decode(B, H, S, D, dtype, impl):
    device = "cpu" if impl == "cpp" else DEVICE
    tensors = _cache(B, H, S, D, dtype, device)
    options = {
        "starts": torch.tensor([0, S // 3, S][:B], dtype=torch.int32, device=device),
        "lengths": torch.tensor([S, max(S - 1, 1), S][:B], dtype=torch.int32, device=device),
    }
    truth = attention_decode_reference(*(t.double() for t in tensors), **options)
    eager = attention_decode_reference(*tensors, **options)
    actual = attention_decode(*tensors, **options, impl=impl)
    assert actual.dtype == dtype
    assert_as_exact(actual, eager, truth, f"{impl} {dtype} {(B, H, S, D)}", dtype)
    assert (actual[2:] == 0).all(), "a sequence that sees nothing must give 0"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decode_every_instruction_set(isa, dtype):
    for S in (1, 5, 64, 600):
        for D in (16, 20, 64, 80, 128):
            _check_decode(3, 2, S, D, dtype, "cpp")


@pytest.mark.parametrize("impl", IMPLS)
def test_decode_is_the_last_row_of_attention(impl):
    qkv = torch.randn(1, 40, 3, 2, 32, device=DEVICE)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    bounds = {
        "starts": torch.zeros(1, dtype=torch.int32, device=DEVICE),
        "lengths": torch.full((1,), 40, dtype=torch.int32, device=DEVICE),
    }
    last = attention_decode(q[:, :, -1], k, v, **bounds, impl=impl)
    torch.testing.assert_close(last, attention(qkv, impl=impl)[:, -1], rtol=1e-5, atol=1e-6)


def test_decode_alone_and_in_a_batch_same_bits(threads):
    q, k, v = _cache(3, 2, 700, 64, torch.float32)
    starts = torch.tensor([100, 0, 30], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([690, 5, 700], dtype=torch.int32, device=DEVICE)
    together = attention_decode(q, k, v, starts=starts, lengths=lengths)
    threads(1)
    # Alone, without its padding, in a cache of its own length.
    alone = attention_decode(
        q[:1], k[:1, :, 100:690], v[:1, :, 100:690], starts=starts[1:2], lengths=lengths[:1] - 100
    )  # fmt: skip
    assert_same_bits([together[:1]], [alone])


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-5), (torch.bfloat16, 1e-2)], ids=str)
def test_decode_huge_scores(isa, dtype, most):
    """All scores of the first sequence are below -1e30; the keys of the second are alike."""
    q, k, v = (torch.randn(shape) for shape in ((2, 2, 16), (2, 2, 300, 16), (2, 2, 300, 16)))
    q[0], k[0], k[1] = 1.0, -k[0].abs(), k[1, :, :1]
    q, k, v = (q * 1e18).to(dtype), (k * 1e18).to(dtype), v.to(dtype)
    bounds = {"starts": torch.tensor([0, 3], dtype=torch.int32), "lengths": torch.tensor([300, 290], dtype=torch.int32)}
    exact = attention_decode_reference(q.double(), k.double(), v.double(), **bounds)
    assert _error(attention_decode(q, k, v, **bounds, impl="cpp"), exact) < most


# ---- the operators' contract ----


@pytest.mark.parametrize("impl", IMPLS)
def test_bounds_outside_of_the_cache_read_nothing_there(impl):
    """Keys before the first and after the last are none; the tensors lie within larger ones whose rest is NaN."""
    B, S = 8, 150
    q = torch.randn(B, 1, 16, device=DEVICE)
    k, v = (torch.full((B + 4, 1, S, 16), float("nan"), device=DEVICE)[2:-2] for _ in range(2))
    for t in (k, v):
        t.copy_(torch.randn(B, 1, S, 16))
    most = 2**31 - 1
    starts = torch.tensor([-1, -200, -most - 1, S + 5, most, most - 100, 0, 3], dtype=torch.int32, device=DEVICE)
    lengths = torch.tensor([5, S, 7, S + 9, most, most, -7, most], dtype=torch.int32, device=DEVICE)
    actual = attention_decode(q, k, v, starts=starts, lengths=lengths, impl=impl)
    expected = attention_decode_reference(q, k, v, starts, lengths)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_python_and_the_kernels_agree_on_a_group_of_keys(monkeypatch, threads):
    """The scratch memory of both is measured in groups whose size the extension says."""
    asked, extension = [], dispatch.extension()
    group = extension.ATTENTION_KEY_GROUP
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: asked.append(a) or new_empty(t, *a, **k))
    threads(4)
    qkv = torch.randn(1, group + 1, 3, 1, 20, requires_grad=True)
    attention(qkv, impl="cpp").sum().backward()
    assert (1, 1, 2, group + 1, 32) in asked
    attention_decode(
        *(t.detach() for t in (qkv[:, 0, 0], *qkv.permute(2, 0, 3, 1, 4)[1:])),
        starts=torch.zeros(1, dtype=torch.int32), lengths=torch.ones(1, dtype=torch.int32), impl="cpp",
    )  # fmt: skip
    assert (1, 1, 2, 48) in asked


def test_what_the_kernels_do_not_take_is_named():
    qkv, q, k = torch.randn(2, 5, 3, 2, 16), torch.randn(2, 3, 16), torch.randn(2, 3, 9, 16)
    bounds = torch.ones(2, dtype=torch.int32)
    decode = lambda q, k, scale=None, impl="auto": attention_decode(
        q, k, k, starts=bounds, lengths=bounds, scale=scale, impl=impl
    )
    for call in (lambda i: attention(qkv[..., :8], impl=i), lambda i: decode(q[..., :8], k[..., :8], impl=i)):
        assert torch.equal(call("auto"), call("reference"))
        with pytest.raises(ValueError, match=r"head size 8 is outside 16 to 128.*use impl='reference'"):
            call("cpp")
    for scale, said in ((-1.0, "-1.0"), (0, "0"), (float("nan"), "nan"), (float("inf"), "inf")):
        for call in (lambda s: attention(qkv, scale=s), lambda s: decode(q, k, s)):
            with pytest.raises(ValueError, match=rf"scale is {said}; it must be positive and finite"):
                call(scale)
    with pytest.raises(ValueError, match="both None"):
        segments_from()
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        segments_from(torch.ones(2, 1, 1, 5))


@pytest.mark.parametrize(
    ("ids", "said"),
    [(torch.tensor([[0, 2**32]]), r"document_ids\[0, 1\] is 4294967296; number the documents of a row from 0 on"),
     (torch.tensor([[0, 1], [-1, 0]]), r"document_ids\[1, 0\] is -1; number"),
     (torch.tensor([[0, -5]], dtype=torch.int8), r"document_ids\[0, 1\] is -5; number"),
     (torch.tensor([[0.2, 0.7]]), r"document_ids is torch.float32; documents are whole numbers: pass int64")],
)  # fmt: skip
def test_document_ids_that_int32_would_change_are_refused(ids, said):
    with pytest.raises(ValueError, match=said):
        segments_from(document_ids=ids)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool])
def test_document_ids_of_each_dtype(dtype):
    ids = torch.tensor([[0, 0, 1, 1]]).to(dtype)
    assert segments_from(document_ids=ids).tolist() == [[0, 0, 1, 1]]
    assert segments_from(document_ids=torch.tensor([[7, 2**31 - 1]])).tolist() == [[7, 2**31 - 1]]
    compiled = torch.compile(lambda ids: segments_from(document_ids=ids) + 1, backend="eager", fullgraph=True)
    assert compiled(ids).tolist() == [[1, 1, 2, 2]]
