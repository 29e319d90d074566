"""mlp: what is its own; test_shared.py holds it to float64 and to the contract of all operations."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_same_bits, check_op, evaluate
from torch._subclasses import FakeTensorMode

from gpt2_fast import config
from gpt2_fast.ops import mlp as room
from gpt2_fast.ops.add_layernorm import OP as LAYERNORM
from gpt2_fast.ops.add_layernorm import normalized
from gpt2_fast.ops.add_layernorm import samples as ln_samples
from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.mlp import layernorm_linear_gelu, mlp, mlp_reference, samples
from gpt2_fast.ops.runtime import philox
from gpt2_fast.ops.runtime.autograd import by_name
from gpt2_fast.ops.runtime.cpu_policy import CpuPolicy
from gpt2_fast.ops.runtime.gelu import ACTIVATIONS, Gelu, bias_gelu, bias_gelu_backward, kind_of
from gpt2_fast.ops.runtime.philox import Dropout

IMPLS = ["cpp", "triton"] if DEVICE == "cpu" else ["triton"]
NAMES = ["x", "residual", "ln_weight", "ln_bias", "fc_weight", "fc_bias", "proj_weight", "proj_bias"]
HALF = 6  # inputs of the operation without its c_proj


def _check(inputs, options, dtype, impl):
    """The whole operation and its first half, the latter by its own name."""
    kind = {"dropout": options.get("dropout", Dropout())}
    kind["kind"] = kind_of("test", options.get("activation", "gelu_new"))
    reference = partial(mlp_reference, **kind)
    what = f"{impl} {dtype} {tuple(inputs[0].shape)}"
    check_op(partial(mlp, **options, impl=impl), reference, inputs, dtype, what)
    half = partial(layernorm_linear_gelu, **options, impl=impl)
    check_op(half, reference, inputs[:HALF], dtype, f"half {what}")


def _inputs(n_rows=3, n_embd=96, width=40):
    shapes = [(n_rows, n_embd), (n_rows, n_embd), (n_embd,), (n_embd,), (n_embd, width), (width,), (width, n_embd)]
    return [torch.randn(shape, device=DEVICE) for shape in [*shapes, (n_embd,)]]


def _of_nn_linear(inputs):
    """The weights as transposed views of [out, in]."""
    return [t.t().contiguous().t() if i in (4, 6) else t for i, t in enumerate(inputs)]


@pytest.mark.parametrize("own", [False, True], ids=["vendor", "own"])
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_processors_products(use_policy, native, own, dtype):
    """The tensors between the passes have the dtype in which the product runs, whichever that is."""
    use_policy(CpuPolicy("mkl", native, "a test", own))
    for *inputs, options in samples("cpu", dtype):
        _check(inputs, options, dtype, "cpp")


@pytest.mark.parametrize("kind", Gelu)
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
    x, _, ln_weight, ln_bias, weight, bias = _inputs()[:HALF]
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
def test_dropout_drops_the_reference_mask(impl):
    _, _, *rest = _inputs(37, 100)
    x, residual = torch.ones(37, 100, device=DEVICE), torch.zeros(37, 100, device=DEVICE)
    key = torch.tensor([-987654321012345], device=DEVICE)
    _, h = mlp(x, residual, *rest, dropout=Dropout(0.3, key, 7), impl=impl)
    assert torch.equal(h != 0, philox.keep_rows(key, 7, 37, 100, 0.3))


@pytest.mark.parametrize("impl", IMPLS)
def test_projection_without_a_bias(impl):
    inputs = _inputs()
    inputs[-1] = None
    check_op(partial(mlp, impl=impl), mlp_reference, inputs, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_weights_of_nn_linear(impl, dtype):
    """Transposed views of [out, in]: their gradients are laid out as they are, and autograd keeps that memory."""
    inputs = _of_nn_linear([t.to(dtype) for t in _inputs()])
    _check(inputs, {"activation": "gelu"}, dtype, impl)
    stored, seen = {i: inputs[i].t().contiguous().requires_grad_() for i in (4, 6)}, {}
    for i, weight in stored.items():
        weight.register_hook(lambda g, i=i: seen.__setitem__(i, g.data_ptr()))
        inputs[i] = weight.t()
    mlp(*inputs, impl=impl)[0].sum().backward()
    for i, weight in stored.items():
        assert weight.grad.is_contiguous()
        assert weight.grad.data_ptr() == seen[i]


@pytest.mark.parametrize("N", [64, 65])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_kept_for_backward(impl, dtype, N):
    """h, u and two float32 numbers a row; on a GPU c_proj's x too, and the normalised rows where there are many."""
    C, width, saved = 24, 96, {}
    inputs = [t.to(dtype).requires_grad_() for t in _of_nn_linear(_inputs(N, C, width))]
    parameters = {t.data_ptr() for t in inputs[2:]}

    def pack(t):
        if t.data_ptr() not in parameters:
            saved[t.data_ptr()] = t.nbytes
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        m, h = mlp(*inputs, impl=impl)
    narrow, wide = (1, 1) if impl == "cpp" else (1 + (N > 64), 2)
    assert sum(saved.values()) == dtype.itemsize * N * (narrow * C + wide * width) + 8 * N
    (m.float().square().mean() + h.float().mean()).backward()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in inputs)


def _kernels():
    """The launchers, by Triton's interpreter where there is no GPU."""
    return pytest.importorskip("gpt2_fast.kernels.mlp")


@pytest.mark.parametrize("count", [len(NAMES), HALF], ids=["whole", "half"])
@pytest.mark.parametrize("rows", [5, 70])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_leaves_no_gradient_of_a_vector_to_be_cast(dtype, rows, count):
    """A profile of backward has no cast of one dimension: LayerNorm's and the biases' gradients need none."""
    _kernels()
    inputs = [t.to(dtype).requires_grad_() for t in _inputs(rows, 24, 40)[:count]]
    y, h = (mlp if count > HALF else layernorm_linear_gelu)(*inputs, impl="triton")
    upstream = [torch.ones_like(y), torch.ones_like(h)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        torch.autograd.backward([y, h], upstream)
    casts = [e.input_shapes[0] for e in profile.events() if e.name == "aten::_to_copy"]
    assert [shape for shape in casts if len(shape) == 1] == []
    assert {t.grad.dtype for t in inputs} == {dtype}


@pytest.fixture
def launched(monkeypatch):
    """Counts the kernels that are launched, by name."""
    kernel, counts = _kernels(), Counter()
    from gpt2_fast.kernels import bias

    for module in (kernel, kernel.add_layernorm, kernel.linear_gelu, bias):
        launch = module.launch
        count = lambda of, *a, launch=launch, **k: counts.update([of.fn.__name__]) or launch(of, *a, **k)
        monkeypatch.setattr(module, "launch", count)
    return counts


@pytest.mark.parametrize("count", [len(NAMES), HALF], ids=["whole", "half"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows_are_normalised_once(monkeypatch, launched, dtype, count):
    """Backward of many rows launches one kernel less than that of few, and has the bits that it has when n is lost."""
    kernel, made, launches = _kernels(), {}, {}
    run, backward = mlp if count > HALF else layernorm_linear_gelu, kernel.backward
    forgets = lambda du, dh, n, *rest: backward(du, dh, None, *rest)
    for rows, function in ((5, backward), (65, backward), (65, forgets)):
        monkeypatch.setattr(kernel, "backward", function)
        torch.manual_seed(0)
        inputs = [t.to(dtype).requires_grad_() for t in _inputs(rows, 24, 40)[:count]]
        y, h = run(*inputs, impl="triton")
        launched.clear()
        made[rows, function] = torch.autograd.grad([y, h], inputs, [torch.ones_like(y), torch.ones_like(h)])
        launches[rows, function] = launched.copy()
    assert launches[65, backward]["backward_kernel"] == 1
    for more in ((5, backward), (65, forgets)):
        assert launches[more] - launches[65, backward] == Counter({"normalize_kernel": 1})
        assert not launches[65, backward] - launches[more]
    assert_same_bits(made[65, backward], made[65, forgets])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [64, 65])
def test_tritons_fakes(rows, dtype):
    """They say which normalised rows are kept, and the dtypes of the gradients."""
    _kernels()
    inputs = [t.to(dtype) for t in _inputs(rows, 24, 40)]
    options = (1e-5, *Dropout().flat(), int(Gelu.TANH))
    forward = (*inputs, *options, True, "triton")
    made = by_name(room.OP.output_names, room.OP.forward_op(*forward))
    assert (made["n"] is None) == (rows == 64)
    kept = dict(zip(NAMES, inputs, strict=True)) | made
    backward = (made["m"], made["h"], *[kept[name] for name in room.OP.backward_tensors[2:]], *options, dtype, True)
    for operator, flat in (
        (room.OP.forward_op, forward),
        (room.OP.backward_op, (*backward, [True] * len(NAMES), "triton")),
    ):
        with FakeTensorMode() as mode:
            fake = operator(*[mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in flat])
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in operator(*flat)]


def test_one_compiled_function_for_few_rows_and_many():
    """What is kept differs with a size that the compiler does not know."""
    _kernels()
    torch._dynamo.reset()
    step = lambda *tensors: sum(t.square().sum() for t in mlp(*tensors, impl="triton"))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (66, 3):
        inputs = [t.requires_grad_() for t in _inputs(rows, 24, 40)]
        found, expected = (evaluate(run, inputs, [torch.ones(())]) for run in (compiled, step))
        assert_same_bits([*found[0], *found[1]], [*expected[0], *expected[1]])


# The persistent product's tiles are made up, for two bytes a number: a card has its own, see test_linear_gelu.py.
PERSISTENT = [(dtype, True) for dtype in (torch.bfloat16, torch.float16) if DEVICE == "cpu"]


@pytest.mark.parametrize(("dtype", "persistent"), [(dtype, False) for dtype in DTYPES] + PERSISTENT, ids=str)
def test_triton_stores_the_vectors_gradients_in_their_dtype(monkeypatch, dtype, persistent):
    """The float32 sums, rounded once."""
    kernel = _kernels()
    tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
    monkeypatch.setattr(kernel.linear_gelu, "config_for", lambda *_: tiles if persistent else None)
    dm, h, ln_weight, ln_bias, weight, _, proj, _ = (t.to(dtype) for t in _inputs(70, 24, 40))
    u, mean, rstd = torch.randn(70, 40, device=DEVICE).to(dtype), h.float().mean(1), h.float().std(1)
    kept = {"mean": mean, "rstd": rstd, "h": h, "u": u, "f": torch.randn_like(u)}
    kept |= {"ln_weight": ln_weight, "ln_bias": ln_bias, "fc_weight": weight, "proj_weight": proj}
    saved = [kept.get(name) for name in room.OP.backward_tensors[2:]]
    options = (1e-5, *Dropout().flat(), int(Gelu.TANH), dtype, False, [True] * len(NAMES), "triton")
    made = room.OP.write_backward((dm, None, *saved, *options))
    du, of_bias = kernel.product_gelu_backward(dm, proj, u, False)
    dn = torch.mm(du, weight.t())
    *_, of_ln, of_ln_bias = kernel.add_layernorm.backward(
        dn, None, h, ln_weight, mean, rstd, 0.0, None, 0, dtype, False
    )
    assert {of_bias.dtype, of_ln.dtype, of_ln_bias.dtype} == {torch.float32}
    found = [made["dfc_bias"], made["dln_weight"], made["dln_bias"]]
    assert_same_bits(found, [t.to(dtype) for t in (of_bias, of_ln, of_ln_bias)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("swapped", [False, True])
def test_a_layernorm_of_two_dtypes_has_gradients_of_their_own_accuracy(impl, swapped):
    tensors = dict(zip(NAMES, (t.bfloat16() for t in _inputs(33, 24, 40)), strict=True))
    fine = "ln_weight" if swapped else "ln_bias"
    tensors[fine] = torch.randn(24, device=DEVICE)
    leaves = {name: t.requires_grad_() for name, t in tensors.items()}
    truths = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    upstream = torch.randn(33, 24, device=DEVICE).bfloat16()
    names = ["ln_weight", "ln_bias"]
    found = torch.autograd.grad(mlp(*leaves.values(), impl=impl)[0], [leaves[n] for n in names], upstream)
    expected = torch.autograd.grad(mlp_reference(*truths.values())[0], [truths[n] for n in names], upstream.double())
    assert {n: g.dtype for n, g in zip(names, found, strict=True)} == {n: tensors[n].dtype for n in names}
    for actual, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), truth, rtol=2e-2, atol=2e-2 * float(truth.abs().max()))
    at = names.index(fine)
    assert not torch.equal(found[at], found[at].bfloat16().float())  # no sum that was rounded and widened again


@pytest.mark.parametrize("own", [False, True], ids=["vendor", "own"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_is_its_halves(use_policy, dtype, activation, own):
    """The same bits as the half and then linear, which keeps what is made again here."""
    use_policy(CpuPolicy("mkl", True, "a test", own))

    def halves(*t):
        y, h = layernorm_linear_gelu(*t[:HALF], activation=activation, impl="cpp")
        return linear(y, *t[HALF:]), h

    inputs = [t.cpu().to(dtype).requires_grad_() for t in _inputs(33, 96, 97)]
    upstream = [torch.randn(33, 96) for _ in range(2)]
    whole = evaluate(partial(mlp, activation=activation, impl="cpp"), inputs, upstream)
    parts = evaluate(halves, inputs, upstream)
    assert_same_bits([*whole[0], *whole[1]], [*parts[0], *parts[1]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_normalised_rows_again_are_the_same_bits(isa, dtype):
    for x, residual, weight, bias, options in ln_samples("cpu", dtype):
        arguments = (x, residual, weight, bias, 1e-5, *options["dropout"].flat(), dtype, True, "cpp")
        n, h, mean, rstd = LAYERNORM.forward_op(*arguments)
        h = x if residual is None else h
        assert_same_bits([normalized(h, weight, bias, mean, rstd, dtype)], [n])


def test_a_frozen_weight_costs_no_product(monkeypatch):
    """Nor is GELU or the normalised input made again, where nothing else reads them."""
    calls = []
    for stem in ("weight_gradient", "gelu"):
        function = getattr(room, stem)
        monkeypatch.setattr(room, stem, lambda *a, f=function, s=stem: calls.append(s) or f(*a))
    normalize = room.add_layernorm.normalized
    monkeypatch.setattr(room.add_layernorm, "normalized", lambda *a: calls.append("normalized") or normalize(*a))
    of_fc, of_proj = ["normalized", "weight_gradient"], ["gelu", "weight_gradient"]
    cases = {(): of_proj + of_fc, ("fc_weight",): of_proj, ("proj_weight",): of_fc, ("fc_weight", "proj_weight"): []}
    for frozen, expected in cases.items():
        calls.clear()
        inputs = [t.cpu().requires_grad_(name not in frozen) for name, t in zip(NAMES, _inputs(), strict=True)]
        mlp(*inputs, impl="cpp")[0].sum().backward()
        assert calls == expected, frozen


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_is_saved_when_no_gradient_is_wanted(impl):
    inputs = _inputs()
    for run, count in ((mlp, len(NAMES)), (layernorm_linear_gelu, HALF)):
        expected, h = run(*[t.clone().requires_grad_() for t in inputs[:count]], impl=impl)
        y, h_alone = run(*inputs[:count], impl=impl)
        assert_same_bits([y, h_alone], [expected.detach(), h.detach()])
        with torch.no_grad():
            y, _ = run(*[t.clone().requires_grad_() for t in inputs[:count]], impl=impl)
        assert y.grad_fn is None


def test_same_bits_whatever_the_threads(threads):
    """Of the passes here; how a vendor's product sums is its own affair."""
    product, dy, bias = torch.randn(257, 200), torch.randn(257, 200), torch.randn(200)
    runs = []
    for count in (2, 1, 2):
        threads(count)
        runs.append([*bias_gelu(product.clone(), bias, torch.float32, True, Gelu.ERF),
                     *bias_gelu_backward(dy, product, torch.float32, Gelu.ERF)])  # fmt: skip
    assert_same_bits(runs[0], runs[1])
    assert_same_bits(runs[0], runs[2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"fc_weight": torch.bfloat16}, "mlp: fc_weight is torch.bfloat16 and x torch.float32; they must match"),
        ({"proj_weight": torch.bfloat16}, "mlp: proj_weight is torch.bfloat16 and x torch.float32; they must match"),
        (
            {"proj_weight": None},
            "mlp: proj_weight is None and proj_bias is not; give both, the weight alone, or neither",
        ),
        (
            {"dropout": Dropout(0.1, torch.tensor([5], device=DEVICE)), "residual": None},
            "mlp: dropout's p is 0.1 and residual is None; it acts on what",
        ),
        ({"activation": "relu"}, "mlp: activation is 'relu'; choose gelu_new, gelu_pytorch_tanh, gelu"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_named(change, said):
    tensors, options = dict(zip(NAMES, _inputs(), strict=True)), {}
    for name, value in change.items():
        if name not in tensors:
            options[name] = value
        elif isinstance(value, tuple):
            tensors[name] = torch.randn(value, device=DEVICE)
        else:
            tensors[name] = None if value is None else tensors[name].to(value)
    with pytest.raises(ValueError, match=said) as error:
        mlp(*tensors.values(), **options)
    assert "\n" not in str(error.value)
