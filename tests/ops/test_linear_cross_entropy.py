"""linear_cross_entropy: every implementation against float64, values and gradients."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, evaluate

from gpt2_fast.ops import linear_cross_entropy as room
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, samples
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


@pytest.fixture(params=["one chunk", "chunks of 4 rows"])
def chunks(request, monkeypatch):
    """Whole, and cut so that 9 and 65 rows leave a last chunk of one."""
    if request.param != "one chunk":
        monkeypatch.setattr(room, "chunk_rows", lambda *_: 4)


def _samples(impl, dtype):
    """Triton's interpreter takes a row at a time: small samples alone there."""
    for x, *rest in samples(DEVICE, dtype):
        if impl != "triton" or DEVICE != "cpu" or x.numel() < 1000:
            yield x, *rest


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
def test_values_and_gradients(impl, dtype, chunks):
    for x, weight, labels, options in _samples(impl, dtype):
        _check(x, weight, labels, options, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for x, weight, labels, options in samples("cpu", dtype):
        _check(x, weight, labels, options, dtype, "cpp")


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


@pytest.mark.parametrize("upstream", [1.0, 0.5])
def test_weight_keeps_the_gradient_it_is_given(upstream):
    """weight.grad is the buffer that the forward pass filled, not a copy of V x C numbers."""
    x, weight, labels = _inputs()
    loss = linear_cross_entropy(x, weight, labels)
    address = loss.grad_fn.ahead[1].data_ptr()
    loss.backward(torch.tensor(upstream, device=DEVICE))
    assert weight.grad.data_ptr() == address


def test_autocast():
    x, weight, labels = _inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = linear_cross_entropy(x, weight, labels)
        eager = linear_cross_entropy(x, weight, labels, impl="reference")
    truth = linear_cross_entropy_reference(x.detach().double(), weight.detach().double(), labels)
    assert loss.dtype == torch.float32
    assert_as_exact(loss, eager, truth, "loss", torch.bfloat16)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (x, weight)))


def test_strided_inputs():
    x, weight = torch.randn(6, 4, 96).transpose(0, 1)[..., ::2], torch.randn(48, 70).t()
    labels = torch.randint(70, (6, 4)).t()
    _check(x, weight, labels, {"reduction": "sum"}, torch.float32, "cpp")


def test_same_bits_whatever_the_threads(threads):
    """Of the pass here; how a vendor's product sums is its own affair."""
    logits, labels, scale = torch.randn(33, 5000), torch.randint(5000, (33,)), torch.rand(33)
    runs = []
    for count in (2, 1, 2):
        threads(count)
        dlogits, losses = logits.clone(), torch.empty(33)
        room._softmax_xent_cpp(dlogits, labels, losses, scale, -100, True)
        runs.append([dlogits, losses])
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_twice(impl):
    *inputs, labels = _inputs()
    upstream = [torch.rand(9, device=DEVICE)]
    for reduction in ("mean", "none"):

        def run(x, weight, reduction=reduction):
            return linear_cross_entropy(x, weight, labels, reduction=reduction, impl=impl).expand(9)

        runs = [evaluate(run, inputs, upstream) for _ in range(2)]
        assert_same_bits([*runs[0][0], *runs[0][1]], [*runs[1][0], *runs[1][1]])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_operator_contract(reduction):
    x, weight, labels = (t.detach().cpu() for t in _inputs())
    for needs in ([True, True, False, False], [False] * 4):
        arguments = (x, weight, labels, None, -100, reduction, needs, "cpp")
        torch.library.opcheck(room.OP.forward_op, arguments)
    loss, scale, *_ = room.OP.forward_op(*arguments)
    kept = (x, weight, labels, None if reduction == "none" else scale, None)
    arguments = (torch.ones_like(loss) * 0.5, *kept, -100, reduction, [True, False, False, False], "cpp")
    torch.library.opcheck(room.OP.backward_op, arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_whole(reduction):
    *inputs, labels = _inputs()

    def step(x, weight):
        return linear_cross_entropy(x, weight, labels, reduction=reduction).sum() * 0.5

    one = [torch.ones(())]
    expected, gradients = evaluate(step, inputs, one)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(evaluate(compiled, inputs, one), (expected, gradients))


def test_a_chunk_is_all_of_the_logits_that_exists():
    """Chunks of 124M's vocabulary are large enough for fast products and bounded; one row is the least."""
    rows = room.chunk_rows("cpu", 50257, 4)
    assert rows >= 512
    assert rows * 50257 * 4 <= room.CHUNK_BYTES["cpu"]
    assert room.chunk_rows("cpu", 1 << 30, 4) == 1


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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_derivative_raises(reduction):
    """Of the kernels'; it would be 0 for "none" and wrong for the others. The reference's is right."""
    x, weight, labels = _inputs()
    loss = linear_cross_entropy(x, weight, labels, reduction=reduction).sum() ** 2
    gradients = torch.autograd.grad(loss, (x, weight), create_graph=True)
    truth = linear_cross_entropy_reference(x, weight, labels, reduction=reduction).sum() ** 2
    torch.testing.assert_close(gradients, torch.autograd.grad(truth, (x, weight)), rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: .* use impl='reference' for second derivatives"):
        sum(g.square().sum() for g in gradients).backward()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_transforms_of_torch_func(reduction):
    """grad, and vmap of it over samples: each with the values of autograd on the samples alone."""
    x, weight, labels = torch.randn(3, 9, 20), torch.randn(50, 20), torch.randint(50, (3, 9))

    def loss(x, weight, labels):
        return linear_cross_entropy(x, weight, labels, reduction=reduction).sum() * 0.5

    derivative = torch.func.grad(loss, argnums=(0, 1))
    by_sample = torch.func.vmap(derivative, in_dims=(0, None, 0))(x, weight, labels)
    for i in range(3):
        leaves = x[i].clone().requires_grad_(), weight.clone().requires_grad_()
        reference = linear_cross_entropy_reference(*leaves, labels[i], reduction=reduction).sum() * 0.5
        expected = torch.autograd.grad(reference, leaves)
        torch.testing.assert_close(derivative(x[i], weight, labels[i]), expected)
        torch.testing.assert_close(tuple(g[i] for g in by_sample), expected)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction):
    """As F.cross_entropy: nan, 0, or nothing; the gradients are 0."""
    x, weight = torch.empty(0, 4, 20, requires_grad=True), torch.randn(50, 20, requires_grad=True)
    labels = torch.empty(0, 4, dtype=torch.int64)
    loss = linear_cross_entropy(x, weight, labels, reduction=reduction)
    expected = F.cross_entropy((x @ weight.t()).view(-1, 50), labels.view(-1), reduction=reduction)
    torch.testing.assert_close(loss, expected.view(labels.shape) if reduction == "none" else expected, equal_nan=True)
    gradients = torch.autograd.grad(loss.sum(), (x, weight))
    assert gradients[0].shape == x.shape
    assert not gradients[1].nan_to_num().any()


def test_a_compiler_takes_any_number_of_rows():
    inputs = [(torch.randn(n, 20), torch.randint(50, (n,))) for n in (9, 9, 5, 7)]
    weight = torch.randn(50, 20, requires_grad=True)
    step = lambda x, labels: linear_cross_entropy(x, weight, labels) * 0.5
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for x, labels in inputs:
        x.requires_grad_()
        found = [torch.autograd.grad(f(x, labels), (x, weight)) for f in (step, compiled)]
        torch.testing.assert_close(found[1], found[0])


def test_strided_and_expanded_gradients_of_rows():
    x, weight, labels = _inputs()
    upstream = torch.tensor([2.0, 3.0]).expand(9, 2)[:, 1]
    found = []
    for run in (linear_cross_entropy, linear_cross_entropy_reference):
        found.append(torch.autograd.grad(run(x, weight, labels, reduction="none"), (x, weight), upstream.to(DEVICE)))
    torch.testing.assert_close(*found)


def test_bad_input_is_named():
    x, weight, labels = _inputs()
    with pytest.raises(ValueError, match=r"weight is \(20, 50\); it must be \[V, C\] with .*C = 20"):
        linear_cross_entropy(x, weight.t(), labels)
    with pytest.raises(ValueError, match=r"labels is \(8,\); it must be \[...\] with ... = \(9,\)"):
        linear_cross_entropy(x, weight, labels[:-1])
    with pytest.raises(ValueError, match=r"labels is torch.int32; it must be torch.int64"):
        linear_cross_entropy(x, weight, labels.int())
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16; it must be torch.float32"):
        linear_cross_entropy(x, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"reduction is 'average'; choose mean, sum, none"):
        linear_cross_entropy(x, weight, labels, reduction="average")
    with pytest.raises(ValueError, match=r"num_items is what reduction='mean' divides by; with 'sum' pass None"):
        linear_cross_entropy(x, weight, labels, reduction="sum", num_items=3)
    with pytest.raises(ValueError, match=r"num_items is \(2,\); it must be one number"):
        linear_cross_entropy(x, weight, labels, num_items=torch.ones(2))
    with pytest.raises(ValueError, match=r"x is \(9, 0\); C of \[..., C\] must be at least 1"):
        linear_cross_entropy(x[:, :0], weight[:, :0], labels)
    with pytest.raises(ImplementationUnavailable, match=r"not torch.float64; use impl='reference'"):
        linear_cross_entropy(x.double(), weight.double(), labels, impl=IMPLS[0])
