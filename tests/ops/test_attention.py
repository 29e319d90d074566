"""attention and attention_decode: every implementation against float64, values and gradients."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, check_operators, evaluate

from gpt2_fast.ops.attention import (
    attention,
    attention_decode,
    attention_decode_reference,
    attention_reference,
    keep_mask,
    samples,
    segments_from,
)
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable
from gpt2_fast.ops.runtime.philox import Dropout

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]
INTERPRETED = DEVICE == "cpu"  # Triton takes most of a second a tile there


def _check(qkv, options, impl):
    def run(x):
        return attention(x, **options, impl=impl)

    def reference(x):
        return attention_reference(x, **options)

    check_op(run, reference, [qkv], qkv.dtype, f"{impl} {qkv.dtype} {tuple(qkv.shape)} {sorted(options)}")


def _inputs(impl, dtype):
    for qkv, options in samples(DEVICE, dtype):
        if impl == "triton" and INTERPRETED:
            if qkv.shape[1] > 63 or (qkv.shape[1] > 17 and dtype != torch.float32):
                continue
            qkv = qkv[:, :, :, :1]
        yield qkv, options


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values_and_gradients(impl, dtype):
    for qkv, options in _inputs(impl, dtype):
        _check(qkv, options, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for qkv, options in samples("cpu", dtype):
        _check(qkv, options, "cpp")


@pytest.mark.parametrize("D", [16, 20, 64, 80, 128])
@pytest.mark.parametrize("T", [1, 17, 63, 65, 129])
def test_sizes(isa, T, D):
    _check(torch.randn(1, T, 3, 2, D), {}, "cpp")


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


def test_not_a_number_is_not_hidden(isa):
    qkv = torch.randn(1, 70, 3, 2, 64)
    qkv[0, 40, 0, 1, 3] = float("nan")
    out = attention(qkv, impl="cpp")
    assert out[0, 40, 1].isnan().all()
    assert out[0, :, 0].isfinite().all()
    assert out[0, :40].isfinite().all()


def test_strided_qkv():
    _check(torch.randn(3, 21, 2, 3, 16).transpose(2, 3), {}, "cpp")
    _check(torch.randn(21, 2, 3, 2, 32).transpose(0, 1)[..., ::2], {}, "cpp")


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


def test_autocast_decides_the_dtype():
    qkv = torch.randn(1, 9, 3, 2, 16, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = attention(qkv)
    assert out.dtype == torch.bfloat16
    (dqkv,) = torch.autograd.grad(out.float().sum(), qkv)
    assert dqkv.dtype == torch.float32


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
@pytest.mark.parametrize("impl", IMPLS)
def test_decode(impl, dtype):
    for S, D in ((1, 16), (131, 64), (70, 80)):
        _check_decode(3, 1 if impl == "triton" else 2, S, D, dtype, impl)


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


# ---- the operators' contract ----


def test_operator_contract():
    qkv, segments = torch.randn(2, 9, 3, 2, 16, requires_grad=True), torch.zeros(2, 9, dtype=torch.int32)
    dropout = Dropout(0.1, torch.tensor([5]), 1)
    names = check_operators(lambda: attention(qkv, segments=segments, dropout=dropout, impl="cpp").sum().backward())
    assert names == ["attention", "attention_backward"]
    bounds = {"starts": torch.zeros(2, dtype=torch.int32), "lengths": torch.full((2,), 7, dtype=torch.int32)}
    cache = (torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16))
    assert check_operators(lambda: attention_decode(torch.randn(2, 2, 16), *cache, **bounds)) == ["attention_decode"]


def test_compiles_whole():
    dropout = Dropout(0.1, torch.tensor([5]))

    def step(qkv, mask):
        return attention(qkv * 1.5, segments=segments_from(mask), dropout=dropout).square().sum()

    one, compiled = [torch.ones(())], torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (7, 9):
        inputs = [torch.randn(1, T, 3, 2, 16, requires_grad=True), (torch.arange(T) > 1)[None]]
        torch.testing.assert_close(evaluate(compiled, inputs, one), evaluate(step, inputs, one))


def test_functional_transforms():
    qkv = torch.randn(3, 2, 7, 3, 2, 16)
    value = lambda x: attention(x, impl="cpp").square().sum()
    one = [torch.func.grad(value)(x) for x in qkv]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(value))(qkv), torch.stack(one))
    torch.testing.assert_close(one[0], torch.func.grad(lambda x: attention_reference(x).square().sum())(qkv[0]))


def test_second_derivative_raises():
    qkv = torch.randn(1, 5, 3, 1, 16, requires_grad=True)
    (dqkv,) = torch.autograd.grad(attention(qkv, impl="cpp").square().sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="attention: its gradient .* use impl='reference'"):
        dqkv.square().sum().backward()


def test_decoding_has_no_gradient_and_says_so():
    q, k, v = (t.requires_grad_() for t in _cache(2, 1, 9, 16, torch.float32, "cpu"))
    bounds = {"starts": torch.zeros(2, dtype=torch.int32), "lengths": torch.full((2,), 7, dtype=torch.int32)}
    out = attention_decode(q, k, v, **bounds, impl="cpp")
    with torch.no_grad():
        assert_same_bits([out], [attention_decode(q, k, v, **bounds, impl="cpp")])
    with pytest.raises(RuntimeError, match="attention_decode: its kernels have no gradient; use impl='reference'"):
        out.sum().backward()


def test_strided_segments_and_caches():
    """Every other token of a table of segments, a cache that is a part of a longer one."""
    segments = segments_from(torch.ones(2, 18), torch.arange(36).view(2, 18) // 4)[:, ::2]
    _check(torch.randn(2, 9, 3, 2, 16), {"segments": segments}, "cpp")
    q, k, v = _cache(4, 2, 40, 16, torch.float32, "cpu")
    bounds = torch.tensor([[0, 9], [2, 20], [1, 30], [0, 20]], dtype=torch.int32).t()
    tensors = (q[::2], k[::2, :, :20], v[::2, :, :20])
    actual = attention_decode(*tensors, starts=bounds[0, ::2], lengths=bounds[1, ::2], impl="cpp")
    expected = attention_decode_reference(*tensors, bounds[0, ::2], bounds[1, ::2])
    torch.testing.assert_close(actual, expected)


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


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_no_rows(impl):
    qkv = torch.randn(0, 5, 3, 2, 16, requires_grad=True)
    out = attention(qkv, impl=impl)
    assert out.shape == (0, 5, 2, 16)
    assert torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    none, cache = torch.zeros(0, dtype=torch.int32), torch.randn(0, 2, 9, 16)
    assert attention_decode(cache[:, :, 0], cache, cache, starts=none, lengths=none, impl=impl).shape == (0, 2, 16)


def test_float64_is_the_references():
    qkv = torch.randn(2, 5, 3, 2, 16, dtype=torch.float64)
    assert_same_bits([attention(qkv)], [attention_reference(qkv)])


def test_bad_input_is_named():
    qkv, key = torch.randn(2, 5, 3, 2, 16), torch.tensor([5])
    for match, arguments, options in [
        (r"attention: qkv is \(2, 5, 3, 32\); it must be \[B, T, 3, H, D\]", qkv.view(2, 5, 3, 32), {}),
        (r"qkv is \(2, 5, 2, 2, 16\); it must be \[B, T, 3, H, D\]", qkv[:, :, 1:], {}),
        (r"qkv is \(2, 0, 3, 2, 16\); T of .* must be at least 1", qkv[:, :0], {}),
        (r"qkv is \(2, 5, 3, 2, 0\); D of .* must be at least 1", qkv[..., :0], {}),
        (r"qkv is \(2, 5, 3, 0, 16\); H of .* must be at least 1", qkv[:, :, :, :0], {}),
        (r"qkv is torch.int64; it must be a floating dtype", qkv.long(), {}),
        (r"head size 8 is outside 16 to 128.*use impl='reference'", qkv[..., :8], {}),
        (r"segments is torch.int64; it must be torch.int32", qkv, {"segments": torch.zeros(2, 5, dtype=torch.int64)}),
        (r"segments is \(2, 6\); it must be \[B, T\] with B = 2, T = 5", qkv,
         {"segments": torch.zeros(2, 6, dtype=torch.int32)}),
        (r"segments is on meta and qkv on cpu", qkv,
         {"segments": torch.zeros(2, 5, dtype=torch.int32, device="meta")}),
        (r"dropout's p is 1.5", qkv, {"dropout": Dropout(1.5, key)}),
        (r"its key is None", qkv, {"dropout": Dropout(0.1)}),
        (r"scale is -1.0; it must be positive and finite", qkv, {"scale": -1.0}),
        (r"scale is nan", qkv, {"scale": float("nan")}),
        (r"scale is inf", qkv, {"scale": float("inf")}),
        (r"no implementation 'cuda' on cpu", qkv, {"impl": "cuda"}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match) as error:
            attention(arguments, **options)
        assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="qkv is a NoneType; it must be a tensor"):
        attention(None)
    with pytest.raises(ImplementationUnavailable, match=r"not torch.float64; use impl='reference'"):
        attention(qkv.double(), impl="cpp")
    with pytest.raises(ValueError, match="both None"):
        segments_from()
    with pytest.raises(ValueError, match=r"must be \[B, T\]"):
        segments_from(torch.ones(2, 1, 1, 5))


def test_bad_decode_input_is_named():
    q, k, bounds = torch.randn(2, 3, 16), torch.randn(2, 3, 9, 16), torch.ones(2, dtype=torch.int32)
    options = {"starts": bounds, "lengths": bounds}
    for match, tensors, others in [
        (r"attention_decode: k_cache is \(2, 3, 9, 16\); it must be \[B, H, S, D\] with B = 2, H = 3, .*D = 15",
         (q[..., :15], k, k), {}),
        (r"v_cache is \(2, 3, 8, 16\)", (q, k, k[:, :, 1:]), {}),
        (r"k_cache is \(2, 3, 0, 16\); S of .* must be at least 1", (q, k[:, :, :0], k), {}),
        (r"v_cache is torch.bfloat16; it must be torch.float32", (q, k, k.bfloat16()), {}),
        (r"lengths is torch.int64; it must be torch.int32", (q, k, k), {"lengths": bounds.long()}),
        (r"head size 8 is outside 16 to 128.*use impl='reference'", (q[..., :8], k[..., :8], k[..., :8]), {}),
        (r"scale is 0", (q, k, k), {"scale": 0}),
        (r"scale is nan", (q, k, k), {"scale": float("nan")}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=match):
            attention_decode(*tensors, **options | others)
