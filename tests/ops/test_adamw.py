"""adamw: every implementation against the reference in float64, and against torch's own step."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits

from gpt2_fast.ops import adamw as room
from gpt2_fast.ops import adamw_table
from gpt2_fast.ops.adamw import adamw, adamw_reference, grad_norm_reference, samples
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION, ImplementationUnavailable

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]


def _clones(lists, dtype=None):
    """Fresh copies of the lists of tensors, in `dtype` where given; steps and groups as they are."""
    fresh = [[t.to(dtype or t.dtype, copy=True) for t in tensors] for tensors in lists[:5]]
    return [*fresh, *lists[5:]]


def _check(lists, hyper, options, dtype, impl):
    mine, eager, true = _clones(lists), _clones(lists), _clones(lists, torch.float64)
    if dtype in LOW_PRECISION:
        true[0], true[4] = true[4], []  # in float64 the master is the parameter
    norm = adamw(*mine, hyper, **options, impl=impl)
    eager_norm = adamw_reference(*eager, hyper, **options)
    true_norm = adamw_reference(*true, hyper, **options)
    if options["max_norm"] is None:
        assert norm is None
    else:
        assert_as_exact(norm, eager_norm, true_norm, "norm")
    assert_same_bits(mine[1], lists[1], "grad")
    names = ("exp_avg", "exp_avg_sq", "weight")
    weights = 4 if dtype in LOW_PRECISION else 0
    for name, at, at_truth in zip(names, (2, 3, weights), (2, 3, 0), strict=True):
        for i, (a, e, t) in enumerate(zip(mine[at], eager[at], true[at_truth], strict=True)):
            if a.numel():
                assert_as_exact(a, e, t, f"{impl} {dtype} {name} {i}")
    for p, master in zip(mine[0], mine[4], strict=False):
        assert torch.equal(p, master.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_values(impl, dtype):
    for *lists, hyper, options in samples(DEVICE, dtype):
        _check(lists, hyper, options, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(isa, dtype):
    for *lists, hyper, options in samples("cpu", dtype):
        _check(lists, hyper, options, dtype, "cpp")


@pytest.mark.parametrize("impl", IMPLS)
def test_dtypes_together(impl):
    """One call over float32 and low-precision parameters, misaligned ones too."""
    torch.manual_seed(1)
    base = torch.randn(200, device=DEVICE)
    params = [base[1:98], torch.randn(31, device=DEVICE).bfloat16(), torch.randn(7, device=DEVICE).half()]
    grads = [torch.randn_like(p) for p in params]
    averages = [[torch.rand(p.shape, device=DEVICE) for p in params] for _ in range(2)]
    masters = [p.float() for p in params[1:]]
    steps = [torch.tensor(3.0, device=DEVICE) for _ in params]
    hyper = torch.tensor([[1e-2, 0.9, 0.99, 1e-8, 0.1, 0.0]], dtype=torch.float64, device=DEVICE)
    lists = (params, grads, *averages, masters, steps, [0, 0, 0])
    expected = _clones(lists)
    before, after = base[0].clone(), base[98:].clone()
    expected_norm = adamw_reference(*expected, hyper, max_norm=1.0)
    norm = adamw(*lists, hyper, max_norm=1.0, impl=impl)
    torch.testing.assert_close(norm, expected_norm)
    for mine, theirs in zip(lists[:5], expected[:5], strict=True):
        torch.testing.assert_close(list(mine), theirs)
    assert base[0] == before
    assert torch.equal(base[98:], after)


def _written(dtype, shape=(3, 2731)):
    """Lists of one parameter, a chunk and one element, of which some are written; and the master that is right then."""
    generator = torch.Generator().manual_seed(0)
    g, m, master, written = (torch.randn(shape, generator=generator) for _ in range(4))
    v = torch.rand(shape, generator=generator)
    written += 8.0  # nowhere what was there
    master.view(-1)[:6] = torch.tensor([1e6, -1e6, 1e-9, -1e-9, 1.5e-40, torch.nan])  # inf and 0 are some's roundings
    param, expected = master.to(dtype), master.clone()
    for t in (param, expected):  # each third, and an end that is shorter than a vector
        t.view(-1)[7::3] = written.to(dtype).to(t.dtype).view(-1)[7::3]
        t.view(-1)[-4:] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    param.view(-1)[3] = expected.view(-1)[3] = 0.0  # where the rounding is -0 in float16
    lists = ([param], [g.to(dtype)], [m], [v], [master], [torch.tensor(2.0)], [0])
    on_device = [[t.to(DEVICE) for t in tensors] for tensors in lists[:6]]
    return [*on_device, [0]], expected.to(DEVICE)


def _hyper(lr):
    return torch.tensor([[lr, 0.9, 0.99, 1e-8, 0.1, 0.0]], dtype=torch.float64, device=DEVICE)


def _check_written(dtype, impl):
    lists, expected = _written(dtype)
    if (impl, DEVICE) == ("triton", "cpu"):  # Triton's interpreter makes 0 of a bfloat16 that is subnormal
        for t in (lists[0][0], lists[4][0], expected):
            t.view(-1)[4] = 0.0
    given = _clones(lists)
    given[4][0].copy_(expected)
    given[0][0].copy_(expected)
    for lr in (0.0, 0.1):  # without a rate, the step shows what it begins from
        mine, right = _clones(lists), _clones(given)
        adamw(*mine, _hyper(lr), max_norm=1.0, impl=impl)
        adamw(*right, _hyper(lr), max_norm=1.0, impl=impl)
        for at in (0, 2, 3, 4):  # of a NaN, that it is one
            assert_same_bits([t.nan_to_num(1e9) for t in mine[at]], [t.nan_to_num(1e9) for t in right[at]], impl)
            assert torch.equal(mine[at][0].isnan(), right[at][0].isnan())
        if lr == 0.0:
            assert torch.equal(mine[4][0].nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # Triton's interpreter, where float16 has inf
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_weight_that_is_not_its_masters_rounding_is_begun_from(impl, dtype):
    _check_written(dtype, impl)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_written_weight_in_every_instruction_set(isa, dtype):
    _check_written(dtype, "cpp")


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_step_that_is_left_out_leaves_a_written_weight_and_its_master(impl):
    lists, _ = _written(torch.float16)
    mine = _clones(lists)
    adamw(*mine, _hyper(0.1), found_inf=torch.ones((), device=DEVICE), impl=impl)
    for at in (0, 2, 3, 4):
        assert_same_bits(mine[at], lists[at])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_a_written_weight_with_strides(dtype):
    lists, expected = _written(dtype)
    lists[0][0] = lists[0][0].t().contiguous().t()
    adamw(*lists, _hyper(0.0), impl="reference")
    assert torch.equal(lists[4][0].nan_to_num(1e9), expected.nan_to_num(1e9))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("max_norm", [1.0, 1e6, float("inf")])
def test_clipping_is_torchs(impl, max_norm):
    params = [torch.nn.Parameter(torch.randn(s, device=DEVICE)) for s in ((40, 5), (9000,))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(params, theirs, strict=True):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    expected_norm = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    torch.optim.AdamW(theirs, lr=0.1).step()
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    steps = [torch.ones((), device=DEVICE) for _ in params]
    hyper = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 1e-2, 0.0]], dtype=torch.float64, device=DEVICE)
    grads = [p.grad for p in params]
    norm = adamw(params, grads, *zeros, [], steps, [0, 0], hyper, max_norm=max_norm, impl=impl)
    torch.testing.assert_close(norm, expected_norm)
    torch.testing.assert_close([p.detach() for p in params], [q.detach() for q in theirs], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_norm_that_is_given_and_norm_that_is_not_finite(impl):
    *lists, hyper, _ = list(samples(DEVICE))[1]
    one, two = _clones(lists), _clones(lists)
    norm = grad_norm_reference(lists[1]) * 3.0
    returned = adamw(*one, hyper, max_norm=0.5, norm=norm, impl=impl)
    torch.testing.assert_close(returned, norm)
    adamw_reference(*two, hyper, max_norm=0.5, norm=norm)
    torch.testing.assert_close(one[2], two[2])
    lists = _clones(lists)
    lists[1][0][0, 0] = float("nan")
    assert adamw(*lists, hyper, max_norm=0.5, impl=impl).isnan()
    assert lists[0][3].isnan().all()  # as after torch.nn.utils.clip_grad_norm_


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_norm_that_is_given_without_parameters_is_returned(impl):
    *_, hyper, _ = next(iter(samples(DEVICE)))
    nothing = [[] for _ in range(7)]
    assert adamw(*nothing, hyper, max_norm=1.0, norm=torch.tensor(3.0, device=DEVICE), impl=impl) == 3.0
    assert adamw(*nothing, hyper, max_norm=1.0, impl=impl) == 0.0
    assert adamw(*nothing, hyper, impl=impl) is None


def test_same_bits_whatever_the_threads(threads):
    *lists, hyper, _ = list(samples())[2]
    lists = [[t.repeat(40) if t.ndim == 1 else t.repeat(40, 1) for t in tensors] for tensors in lists[:5]] + lists[5:]
    runs = []
    for count in (2, 1, 2):
        threads(count)
        mine = _clones(lists)
        norm = adamw(*mine, hyper, max_norm=1.0, impl="cpp")
        runs.append([norm.reshape(1), *mine[0], *mine[2], *mine[3]])
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


def test_saved_values_are_seen_to_have_changed():
    *lists, hyper, _ = next(iter(samples()))
    weight = lists[0][0].requires_grad_()
    y = weight * weight
    adamw(*lists, hyper, impl="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_operator_contract():
    for dtype in (torch.float32, torch.bfloat16):
        *lists, hyper, options = list(samples("cpu", dtype))[1]
        arguments = (*_clones(lists), hyper, None, options["max_norm"], None, None, "cpp")
        torch.library.opcheck(room._operator, arguments)


def test_compiles_whole():
    *lists, hyper, options = list(samples())[1]
    mine, expected = _clones(lists), _clones(lists)

    def step(*tensors):
        return adamw(*tensors, hyper, **options)

    norm = torch.compile(step, fullgraph=True, backend="aot_eager")(*mine)
    torch.testing.assert_close(norm, step(*expected))
    assert_same_bits(mine[0], expected[0])


def _low():
    """Lists of bfloat16 parameters, contiguous states and masters, two of them of one shape."""
    *lists, hyper, _ = list(samples(DEVICE, torch.bfloat16))[1]
    return _clones(lists), hyper


def _replaced(lists, at, i, t):
    tensors = list(lists[at])
    tensors[i] = t
    return [*lists[:at], tensors, *lists[at + 1 :]]


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (4, lambda t: t[:, :2], r"master of param 0 is torch.float32 \(3, 2\) on .*\(3, 5\)"),
        (4, lambda t: t.bfloat16(), r"master of param 0 is torch.bfloat16 \(3, 5\)"),
        (4, lambda t: t.to("meta"), r"master of param 0 is torch.float32 \(3, 5\) on meta"),
        (2, lambda t: t[:2], r"exp_avg of param 0 is torch.float32 \(2, 5\)"),
        (3, lambda t: t.to("meta"), r"exp_avg_sq of param 0 is .* on meta"),
        (5, lambda t: t[None][:0], r"step of param 0 is torch.float32 \(0,\).*it must be one float32"),
        (5, lambda t: t.to("meta"), r"step of param 0 is .* on meta"),
        (5, lambda t: t.long(), r"step of param 0 is torch.int64"),
    ],
)
def test_states_that_do_not_fit_are_named(impl, at, change, message):
    lists, hyper = _low()
    with pytest.raises(ValueError, match=message):
        adamw(*_replaced(lists, at, 0, change(lists[at][0])), hyper, impl=impl)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_a_norm_that_is_no_number_is_named(impl):
    lists, hyper = _low()
    for norm in (torch.ones(0, device=DEVICE), torch.ones(2, device=DEVICE), torch.ones((), device="meta")):
        with pytest.raises(ValueError, match="norm is torch.float32 .* it must be one floating number"):
            adamw(*lists, hyper, max_norm=1.0, norm=norm, impl=impl)
    with pytest.raises(ValueError, match="max_norm is -1.0; it must be at least 0, or None"):
        adamw(*lists, hyper, max_norm=-1.0, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_hyperparameters_are_read_right(impl):
    lists, hyper = _low()
    expected = _clones(lists)
    adamw(*expected, hyper, max_norm=0.5, impl=impl)
    strided = torch.stack([hyper, torch.full_like(hyper, 0.7)], -1)[..., 0]
    adamw(*lists, strided, max_norm=0.5, norm=grad_norm_reference(lists[1]).reshape(1, 1), impl=impl)
    assert_same_bits(lists[4], expected[4])


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_tensors_that_share_memory_are_named(impl):
    lists, hyper = _low()
    for at, name in ((0, "param 3"), (2, "exp_avg 3"), (3, "exp_avg_sq 3"), (4, "master 3")):
        shared = lists[at][3].reshape(-1)[-15:].view(3, 5)  # the last elements of a larger one
        with pytest.raises(ValueError, match=f"shares memory with {name}|{name} shares memory with"):
            adamw(*_replaced(lists, at, 0, shared), hyper, impl=impl)
    with pytest.raises(ValueError, match="exp_avg_sq 1 shares memory with exp_avg 1"):
        adamw(*_replaced(lists, 3, 1, lists[2][1]), hyper, impl=impl)
    twice = [[tensors[0], tensors[0]] for tensors in lists[:6]]
    with pytest.raises(ValueError, match=r"adamw: (\w+) 1 shares memory with \1 0;"):
        adamw(*twice, [0, 0], hyper, impl=impl)


def test_elements_upon_each_other_are_named():
    """An expanded state, and windows of one memory, which torch writes into without a word."""
    lists, hyper = _low()
    for at, name in ((0, "param"), (2, "exp_avg"), (3, "exp_avg_sq"), (4, "master")):
        t = lists[at][0]
        for view in (t[:1].expand_as(t), t.reshape(-1).as_strided(t.shape, (1, 1))):
            with pytest.raises(ValueError, match=rf"{name} 0 is \(3, 5\) with strides .* lie upon each other"):
                adamw(*_replaced(lists, at, 0, view), hyper, impl="reference")
        adamw(*_replaced(_clones(lists), at, 0, t.t().contiguous().t()), hyper, impl="reference")


def test_parameters_that_lie_between_each_others_elements_are_updated_by_the_reference():
    both = torch.ones(6, 2, device=DEVICE)
    params, grads = [both[:, 0], both[:, 1]], [torch.ones(6, device=DEVICE) for _ in range(2)]
    averages = [[torch.zeros(6, device=DEVICE) for _ in range(2)] for _ in range(2)]
    steps = [torch.ones((), device=DEVICE) for _ in range(2)]
    hyper = torch.tensor([[0.25, 0.9, 0.999, 1e-8, 0.0, 0.0]], dtype=torch.float64, device=DEVICE)
    adamw(params, grads, *averages, [], steps, [0, 0], hyper, impl="reference")
    torch.testing.assert_close(both, torch.full_like(both, 0.75))


@pytest.mark.parametrize("impl", IMPLS)
def test_states_with_strides_are_named(impl):
    lists, hyper = _low()
    for at, name in ((2, "exp_avg"), (3, "exp_avg_sq"), (4, "master")):
        with pytest.raises(ValueError, match=rf"cannot update param 0: its {name} is .* with strides \(1, 3\)"):
            adamw(*_replaced(lists, at, 0, lists[at][0].t().contiguous().t()), hyper, impl=impl)


class _Device:
    """Stands for a GPU that a table is copied to."""

    type = "cuda"


def test_captures_in_a_row(monkeypatch):
    """None of them sees another's table, nor does a later eager step; where no memory is left it is said."""
    capturing = False

    def pin_memory(self):
        assert not capturing, "no pinned memory can be allocated in a capture"
        return self.clone()

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *_, **__: self)  # what a replay reads
    rows = [tuple(tuple(range(i, i + 10)) for i in (first, first + 100)) for first in (0, 1000, 2000)]
    device = _Device()
    adamw_table.device_table(rows[0], device)
    capturing = True
    tables = [adamw_table.device_table(r, device) for r in (rows[1], rows[2], rows[1])]
    assert len({t.data_ptr() for t in tables}) == 3
    assert [t.tolist() for t in tables] == [[list(row) for row in r] for r in (rows[1], rows[2], rows[1])]
    with pytest.raises(
        RuntimeError, match="over 1 parameters needs pinned memory.*take one step with these parameters"
    ):
        adamw_table.device_table(rows[0][:1], device)
    capturing = False
    eager = adamw_table.device_table(rows[1], device)
    assert eager.data_ptr() not in {t.data_ptr() for t in tables}


def test_bad_input_is_named():
    *lists, hyper, _ = list(samples())[1]
    params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups = lists
    averages = (exp_avgs, exp_avg_sqs, masters, steps)
    with pytest.raises(ValueError, match="3 grads for 4 params"):
        adamw(params, grads[1:], *averages, groups, hyper)
    with pytest.raises(ValueError, match=r"grad 0 must be a dense torch.float32 \(3, 5\)"):
        adamw(params, [grads[0].double(), *grads[1:]], *averages, groups, hyper)
    with pytest.raises(ValueError, match="param 1 is in group 2 and hyper has 2"):
        adamw(params, grads, *averages, [0, 2, 0, 0], hyper)
    with pytest.raises(ValueError, match=r"hyper is torch.float32 \(2, 6\)"):
        adamw(params, grads, *averages, groups, hyper.float())
    low = [[t.bfloat16() for t in tensors] for tensors in (params, grads)]
    with pytest.raises(ValueError, match="0 masters for 4 bfloat16 and float16 params"):
        adamw(*low, *averages, groups, hyper)
    with pytest.raises(ValueError, match=r"cannot update param 0: it is not contiguous"):
        adamw([params[0].t().contiguous().t(), *params[1:]], grads, *averages, groups, hyper, impl="cpp")
    double = [[t.double() for t in tensors] for tensors in lists[:4]]
    with pytest.raises(ImplementationUnavailable, match=r"not torch.float64; use impl='reference'"):
        adamw(*double, masters, steps, groups, hyper, impl="cpp")


def test_what_is_compiled_ahead_has_the_chunk_that_runs():
    kernel = pytest.importorskip("gpt2_fast.kernels.adamw")
    assert kernel.CHUNK == adamw_table.CHUNK
