"""linear_cross_entropy: what is its own; test_shared.py has what all operations share."""

from __future__ import annotations

import subprocess
import sys
import weakref

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op

from gpt2_fast.ops import linear_cross_entropy as room
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, samples
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


@pytest.fixture(params=["one chunk", "chunks of 4 rows"])
def chunks(request, monkeypatch):
    """Whole, and cut so that 9 and 65 rows leave a last chunk of one."""
    if request.param != "one chunk":
        monkeypatch.setattr(room, "chunk_rows", lambda *_: 4)


def _check(x, weight, labels, options, dtype, impl):
    def run(x, weight):
        return linear_cross_entropy(x, weight, labels, **options, impl=impl)

    def reference(x, weight):
        return linear_cross_entropy_reference(x, weight, labels, **options)

    check_op(run, reference, [x, weight], dtype, f"{impl} {dtype} {tuple(x.shape)} {options}")


def _inputs(n_rows=9, n_embd=20, vocabulary=50):
    x, weight = torch.randn(n_rows, n_embd, device=DEVICE), torch.randn(vocabulary, n_embd, device=DEVICE)
    return x.requires_grad_(), weight.requires_grad_(), torch.randint(vocabulary, (n_rows,), device=DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_in_chunks(impl, dtype, monkeypatch):
    """9 and 65 rows, 4 at a time, leave a last chunk of one; Triton's interpreter has the small ones alone."""
    monkeypatch.setattr(room, "chunk_rows", lambda *_: 4)
    for x, weight, labels, options in samples(DEVICE, dtype):
        if impl != "triton" or DEVICE != "cpu" or x.numel() < 1000:
            _check(x, weight, labels, options, dtype, impl)


@pytest.mark.parametrize("own", [False, True], ids=["vendor", "own"])
@pytest.mark.parametrize(("vendor", "native"), [("onednn", False), ("mkl", True)], ids=["onednn", "native bfloat16"])
def test_other_processors_products(use_policy, vendor, native, own, chunks):
    use_policy(CpuPolicy(vendor, native, "a test", own))
    for dtype in (torch.float32, torch.bfloat16):
        for x, weight, labels, options in samples("cpu", dtype):
            _check(x, weight, labels, options, dtype, "cpp")


@pytest.mark.parametrize("impl", IMPLS)
def test_large_logits_and_confident_rows(impl):
    x, weight, labels = _inputs()
    _check(x.detach() * 300, weight.detach(), labels, {}, torch.float32, impl)
    hit = (x @ weight.t()).argmax(1)
    _check(x.detach() * 10, weight.detach(), hit, {"reduction": "none"}, torch.float32, impl)


def _softmax_tiles():
    """(itemsize, elements of a tile) of everything that is launched or may come to be, for any card."""
    from gpt2_fast.kernels import tuning

    rows = [r for r in tuning.rows("linear_cross_entropy") if r["kernel"] == "softmax_xent"]
    return sorted({(r["itemsize"], c["BLOCK_V"]) for r in rows for c in (r["config"], *r.get("candidates", []))})


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU num_warps belongs to a tile: the tests above run what ships")
@pytest.mark.parametrize(("vocabulary", "stride"), [(5, 12), (8192, 8192), (20011, 20018)])
def test_every_tile_that_a_card_may_get(monkeypatch, vocabulary, stride):
    """Rows shorter than a tile, of whole tiles, and of a first and a last one in part; what pads a row stays."""
    kernel = pytest.importorskip("gpt2_fast.kernels.linear_cross_entropy")
    for itemsize, block in _softmax_tiles():
        monkeypatch.setattr(kernel, "INTERPRETER_CONFIG", {"BLOCK_V": block, "num_warps": 4})
        memory = torch.randn(3, stride).mul_(4).to(torch.float32 if itemsize == 4 else torch.bfloat16)
        logits, before = memory[:, :vocabulary], memory.clone()
        labels = torch.tensor([vocabulary - 1, -100, 0])
        truth = before[:, :vocabulary].double().requires_grad_()
        expected = torch.nn.functional.cross_entropy(truth, labels, reduction="none")
        (gradient,) = torch.autograd.grad(expected.sum() * 0.5, truth)
        losses = torch.full((3,), float("nan"))
        kernel.softmax_xent_(logits, labels, losses, -100, torch.tensor([0.5]), True)
        torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits.double(), gradient, rtol=1e-5 if itemsize == 4 else 4e-3, atol=1e-6)
        assert_same_bits([memory[:, vocabulary:]], [before[:, vocabulary:]])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_all_rows_ignored(impl):
    """As in F.cross_entropy: the mean of nothing is nan, its gradients and the sum are 0."""
    x, weight, labels = _inputs()
    labels = torch.full_like(labels, -100)
    for reduction, expected in (("mean", float("nan")), ("sum", 0.0)):
        loss = linear_cross_entropy(x, weight, labels, reduction=reduction, impl=impl)
        torch.testing.assert_close(loss, torch.tensor(expected, device=DEVICE), equal_nan=True)
        assert not any(g.any() for g in torch.autograd.grad(loss, (x, weight)))


@pytest.mark.parametrize("impl", IMPLS)
def test_other_ignore_index(impl):
    x, weight, labels = _inputs()
    labels[4] = 0
    _check(x.detach(), weight.detach(), labels, {"ignore_index": 0}, torch.float32, impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_accumulated_micro_batches_equal_the_whole(impl):
    """num_items, as a number or a tensor: the micro-batches' losses and gradients add up to the batch's."""
    x, weight, labels = _inputs(10)
    labels[:3] = -100
    whole = linear_cross_entropy(x, weight, labels, impl=impl)
    expected = [whole, *torch.autograd.grad(whole, (x, weight))]
    for num_items in (7, torch.tensor(7, device=DEVICE)):
        parts = sum(
            linear_cross_entropy(x[i : i + 5], weight, labels[i : i + 5], num_items=num_items, impl=impl)
            for i in (0, 5)
        )
        torch.testing.assert_close([parts, *torch.autograd.grad(parts, (x, weight))], expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_and_second_backward(impl):
    x, weight, labels = _inputs()
    loss = linear_cross_entropy(x, weight, labels, impl=impl)
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    again = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    halved = torch.autograd.grad(loss * 0.5, (x, weight))
    assert_same_bits(first, again)
    torch.testing.assert_close([g * 2 for g in halved], list(first))


@pytest.mark.parametrize("scale", [1024.0, 2.0**18])
@pytest.mark.parametrize("impl", IMPLS)
def test_float16_gradients_of_a_scaled_loss(impl, scale):
    """As GradScaler scales it, so that gradients of a mean over many rows do not vanish; beyond float16 too."""
    x, weight, labels = _inputs(20)

    def scaled(function, **options):
        return lambda x, weight: function(x, weight, labels, num_items=2**20, **options) * scale

    inputs = [x.detach().half(), weight.detach().half()]
    check_op(scaled(linear_cross_entropy, impl=impl), scaled(linear_cross_entropy_reference), inputs, torch.float16)


@pytest.mark.parametrize("impl", IMPLS)
def test_only_the_gradients_that_are_wanted(impl, monkeypatch):
    wanted = []
    original = room._SOFTMAX_XENT[impl]
    monkeypatch.setitem(room._SOFTMAX_XENT, impl, lambda *a: (wanted.append(a[-1]), original(*a)))
    x, weight, labels = _inputs()
    expected = linear_cross_entropy(x, weight, labels, impl=impl)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, labels, impl=impl)
    assert wanted == [True, False]
    torch.testing.assert_close(loss, expected.detach())
    frozen = linear_cross_entropy(x, weight.detach(), labels, impl=impl)
    torch.testing.assert_close(torch.autograd.grad(frozen, x), torch.autograd.grad(expected, x))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, where the interpreter's float16 becomes infinite
@pytest.mark.parametrize("factor", [1.0, 0.375, 2.0**18, float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernel_multiplies_in_float32_and_leaves_where_the_factor_is_1(dtype, factor):
    """2 programs of 1,024 numbers at a time, and what is left over."""
    kernel = pytest.importorskip("gpt2_fast.kernels.linear_cross_entropy")
    from gpt2_fast.kernels import tuning

    gradient = torch.randn(5003, device=DEVICE).to(dtype)
    expected = (gradient.float() * factor).to(dtype)
    (index,) = [i for i, row in enumerate(tuning.rows("linear_cross_entropy")) if row["kernel"] == "scale"]
    with tuning.trial("linear_cross_entropy", index, {"BLOCK": 1024, "num_warps": 4, "programs": 2}):
        kernel.scale_(gradient, torch.tensor(factor, device=DEVICE))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of a signalling NaN
def test_where_the_upstream_gradient_is_1_nothing_is_read():
    """A product would make a quiet NaN of a signalling one."""
    kernel = pytest.importorskip("gpt2_fast.kernels.linear_cross_entropy")
    signalling = torch.full((3000,), 0x7F800001, dtype=torch.int32, device=DEVICE)
    kernel.scale_(signalling.view(torch.float32), torch.ones((), device=DEVICE))
    assert (signalling == 0x7F800001).all()
    kernel.scale_(signalling.view(torch.float32), torch.full((), 0.5, device=DEVICE))
    assert (signalling != 0x7F800001).all()


@pytest.mark.parametrize("upstream", [1.0, 0.5])
@pytest.mark.parametrize("impl", IMPLS)
def test_weight_keeps_the_gradient_it_is_given(impl, upstream):
    """weight.grad is the buffer that the forward pass filled, not a copy of V x C numbers."""
    x, weight, labels = _inputs()
    loss = linear_cross_entropy(x, weight, labels, impl=impl)
    address = loss.grad_fn.ahead[1].data_ptr()
    loss.backward(torch.tensor(upstream, device=DEVICE))
    assert weight.grad.data_ptr() == address


def test_a_chunk_is_all_of_the_logits_that_exists():
    """Chunks of 124M's vocabulary are large enough for fast products and bounded; one row is the least."""
    rows = room.chunk_rows("cpu", 50257, 4)
    assert rows >= 512
    assert rows * 50257 * 4 <= room.CHUNK_BYTES["cpu"]
    assert room.chunk_rows("cpu", 1 << 30, 4) == 1


def _sizes(n_rows, most):
    return [min(most, n_rows - start) for start in range(0, n_rows, most)]


@pytest.mark.parametrize(("vocabulary", "itemsize"), [(50257, 2), (50257, 4), (1 << 23, 2), (1 << 40, 4)])
@pytest.mark.parametrize("n_rows", [1, 127, 2671, 5341, 5342, 16384, 32000, 32768, 32769, 100_003])
def test_chunks_of_a_gpu_are_equal_and_no_larger_than_before(n_rows, vocabulary, itemsize):
    most = room.chunk_rows("cuda", vocabulary, itemsize)
    sizes = _sizes(n_rows, room.chunk_rows("cuda", vocabulary, itemsize, n_rows))
    step = 128 if most >= 128 else 1
    assert sum(sizes) == n_rows
    assert max(sizes) <= most
    assert len(sizes) == 1 or all(size % step == 0 for size in sizes[:-1])
    assert len(sizes) <= -(-n_rows // (most // step * step))
    assert max(sizes) - sizes[-1] < step * len(sizes)  # rounding alone makes the last one shorter
    assert room.chunk_rows("cpu", vocabulary, itemsize, n_rows) == room.chunk_rows("cpu", vocabulary, itemsize)


def test_the_gpt2_step_has_seven_chunks_of_whole_tiles():
    """32 texts of 1,024 tokens in bfloat16: it was 6 of 5,341 rows and one of 722."""
    assert _sizes(32768, room.chunk_rows("cuda", 50257, 2, 32768)) == [4736] * 6 + [4352]


def test_values_in_the_chunks_of_a_gpu(monkeypatch):
    """300 rows where 140 fit: 128, 128 and 44."""
    original, rows = room.chunk_rows, []
    monkeypatch.setitem(room.CHUNK_BYTES, "cuda", 140 * 50 * 4)
    monkeypatch.setattr(room, "chunk_rows", lambda _, *sizes: (rows.append(original("cuda", *sizes)), rows[-1])[1])
    x, weight, labels = _inputs(300)
    for options in ({}, {"reduction": "none"}):
        _check(x.detach(), weight.detach(), labels, options, torch.float32, "auto")
    assert set(rows) == {128}


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU every weight is aligned: the tests above")
@pytest.mark.parametrize("rows", [100, 4], ids=["one chunk", "chunks"])
def test_rows_of_zeros_that_align_the_weight_change_nothing(monkeypatch, rows):
    """What is done on a GPU, in Triton's interpreter: loss, gradients and their memory are of the words alone."""
    x, weight, labels = (t.detach().cpu() for t in _inputs())
    monkeypatch.setattr(room, "chunk_rows", lambda *_: rows)
    arguments = (x, weight, labels, torch.tensor(3.5), -100, "mean", [True, True, False, False], "triton")
    plain = room.OP.run_forward(*arguments)
    monkeypatch.setattr(room, "_aligned", lambda w: torch.nn.functional.pad(w, (0, 0, 0, -w.shape[0] % 64)))
    aligned = room.OP.run_forward(*arguments)
    torch.testing.assert_close(aligned, plain, rtol=1e-5, atol=1e-6)
    assert aligned[4].shape == weight.shape
    assert not aligned[4]._is_view()


@pytest.mark.parametrize("impl", ["cpp", "triton", "reference"] if DEVICE == "cpu" else ["cpp", "reference"])
@pytest.mark.parametrize("label", [50, -1, -(2**40)])
def test_label_outside_the_vocabulary_is_named(impl, label):
    x, weight, labels = (t.cpu() for t in _inputs())
    labels[6] = label
    with pytest.raises(IndexError, match=rf"label {label} at position 6 is outside the vocabulary of 50"):
        linear_cross_entropy(x, weight, labels, impl=impl)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a CPU the label is named: the test above")
@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_label_outside_the_vocabulary_stops_a_gpu(impl):
    """At the latest when the loss is read. In a process of its own, as the GPU takes no more work from that one."""
    program = f"""
import torch
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
x, weight = torch.randn(9, 20, device="cuda"), torch.randn(50, 20, device="cuda")
labels = torch.full((9,), 50, device="cuda")
try:
    print(linear_cross_entropy(x, weight, labels, impl="{impl}").item())
except RuntimeError as error:
    print("stopped", flush=True)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "stopped\n", done.stdout + done.stderr
    assert "a label is outside the vocabulary of 50 and is not ignore_index -100" in done.stderr


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_num_items_of_any_shape_gives_a_scalar(impl, shape):
    x, weight, labels = _inputs()
    expected = linear_cross_entropy_reference(x, weight, labels, reduction="sum") / 7
    loss = linear_cross_entropy(x, weight, labels, num_items=torch.full(shape, 7, device=DEVICE), impl=impl)
    torch.testing.assert_close(loss, expected)


def test_bad_options_are_named():
    x, weight, labels = _inputs()
    with pytest.raises(ValueError, match=r"reduction is 'average'; choose mean, sum, none"):
        linear_cross_entropy(x, weight, labels, reduction="average")
    with pytest.raises(ValueError, match=r"num_items is what reduction='mean' divides by; with 'sum' pass None"):
        linear_cross_entropy(x, weight, labels, reduction="sum", num_items=3)
    with pytest.raises(ValueError, match=r"num_items is \(2,\); it must be one number"):
        linear_cross_entropy(x, weight, labels, num_items=torch.ones(2))
    with pytest.raises(TypeError, match=r"num_items is a str; it must be one number"):
        linear_cross_entropy(x, weight, labels, num_items="3")


@pytest.mark.skipif(DEVICE != "cpu", reason="counts the chunks of the CPU")
def test_one_chunk_of_logits_lives_at_a_time(monkeypatch):
    alive, most, product = [], [], room.product

    def counted(a, b, *rest, **options):
        made = product(a, b, *rest, **options)
        if made.shape == (4, 50):  # a chunk of logits; the storage, which a view of them keeps as well
            alive.append(weakref.ref(made.untyped_storage()))
            most.append(sum(chunk() is not None for chunk in alive))
        return made

    monkeypatch.setattr(room, "chunk_rows", lambda *_: 4)
    monkeypatch.setattr(room, "product", counted)
    x, weight, labels = _inputs(n_rows=12)
    linear_cross_entropy(x, weight, labels, impl="cpp")
    assert most == [1, 1, 1]
