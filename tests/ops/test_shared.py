"""What all operations share, once for all of them: derived from their declarations and their samples."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from numerics import DTYPES, assert_as_exact, assert_same_bits, check_op, check_operators, evaluate
from rooms import DERIVED, ROOMS, Room
from torch import Tensor
from torch.autograd import forward_ad

from gpt2_fast.ops.attention import attention
from gpt2_fast.ops.linear_cross_entropy import linear_cross_entropy
from gpt2_fast.ops.runtime.contract import MAY_BE_EMPTY
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable
from gpt2_fast.ops.runtime.philox import Dropout

EACH = [pytest.param(room, impl, id=f"{room.name}-{impl}") for room in ROOMS for impl in room.impls]
of_each_room = pytest.mark.parametrize("room", ROOMS, ids=lambda room: room.name)
of_each_derived = pytest.mark.parametrize("room", DERIVED, ids=lambda room: room.name)


def _check(room: Room, arguments: dict, dtype: torch.dtype, impl: str) -> None:
    """Values and, where there are some, gradients against the reference on doubles."""
    names = [name for name, t in room.tensors(arguments).items() if t.is_floating_point()]
    double = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in arguments.items()}
    run, reference = room.of(arguments, names, impl), room.of(double, names, "reference")
    what = f"{impl} {dtype} {[tuple(arguments[name].shape) for name in names]}"
    check_op(run, reference, [arguments[n] for n in names], dtype, what, room.op.gradients is not None, room.row_slack)


def _upstream(room: Room, arguments: dict) -> list[Tensor]:
    with torch.no_grad():
        outputs = room.call(**arguments, impl="reference")
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in outputs]


def _bits(room: Room, arguments: dict, impl: str = "auto", wanted: list[str] | None = None, upstream=None):
    """Outputs and the gradients of `wanted`, all by default, of one call; strides are kept."""
    wanted = room.differentiable(arguments) if wanted is None else wanted
    leaves = [arguments[name].detach().requires_grad_() for name in wanted]
    outputs, gradients = evaluate(room.of(arguments, wanted, impl), leaves, upstream or _upstream(room, arguments))
    return [*outputs, *gradients]


def _loss(outputs) -> Tensor:
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return sum(o.float().square().sum() * (i + 1) for i, o in enumerate(outputs))


@pytest.fixture
def own_products(use_policy):
    """This package's products, of any size: the vendors' sum in an order of their own."""
    use_policy(replace(cpu_policy(), own=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("room", "impl"), EACH)
def test_values_and_gradients(room, impl, dtype):
    for arguments in room.calls(DEVICE, dtype, impl):
        _check(room, arguments, dtype, impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_each_room
def test_every_instruction_set(room, dtype, isa):
    for arguments in room.calls("cpu", dtype):
        _check(room, arguments, dtype, "cpp")


@of_each_room
def test_operators_keep_torchs_contract(room):
    """Schema, fake and what is written, of forward and backward: torch.library.opcheck."""
    samples = list(room.calls())[:3]
    for name in room.op.strided:  # whose gradient is laid out as they are
        samples.append(samples[1] | {name: LAYOUTS["transposed"](samples[1][name])})
    for arguments in samples:
        found = check_operators(lambda arguments=arguments: _bits(room, arguments, "cpp"))
        backward = [f"{room.name}_backward"] if room.op.gradients and not room.op.ahead else []
        assert found[:1] + found[-1:] == [room.name, *(backward or found[-1:])]


def _with_rows(room: Room, arguments: dict, n: int) -> dict:
    """The call with n instead of its first leading size, B or the first of "...": rows are taken round and round."""
    changed = dict(arguments)
    for spec in room.op.inputs:
        t = arguments.get(spec.name)
        if isinstance(t, Tensor) and spec.shape[:1] in ("B", ".") and t.ndim >= len(spec.sizes):
            changed[spec.name] = t[torch.arange(n) % t.shape[0]]
    return changed


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@of_each_room
def test_compiles_whole(room, dynamic):
    """One graph, the values and gradients of eager calls, and with dynamic shapes any number of rows."""
    torch._dynamo.reset()  # one function of this file is compiled for all of them
    sample = list(room.calls())[1 + dynamic]
    wanted, given = room.differentiable(sample), list(room.tensors(sample))
    one = [torch.ones(())]
    compiled = None
    for rows in (2, 3, 5) if dynamic else (3,):
        arguments = _with_rows(room, sample, rows)
        step = lambda *tensors: _loss(room.of(sample, given, "auto")(*tensors))
        compiled = compiled or torch.compile(step, fullgraph=True, dynamic=dynamic or None, backend="aot_eager")
        tensors = [arguments[n].clone().requires_grad_(n in wanted) for n in given]
        torch.testing.assert_close(evaluate(compiled, tensors, one), evaluate(step, tensors, one))


@of_each_room
def test_same_bits_on_any_number_of_threads(room, threads, own_products):
    for arguments in room.calls():
        runs = []
        for count in (2, 1, 2):
            threads(count)
            runs.append(_bits(room, arguments, "cpp"))
        assert_same_bits(runs[0], runs[1], "1 and 2 threads")
        assert_same_bits(runs[0], runs[2], "2 threads twice")


@pytest.mark.parametrize(("room", "impl"), EACH)
def test_same_bits_twice(room, impl):
    arguments = list(room.calls(DEVICE, impl=impl))[1]
    assert_same_bits(_bits(room, arguments, impl), _bits(room, arguments, impl))


def _strided(t: Tensor) -> Tensor:
    """Every other element of memory whose rest would be seen."""
    filler = torch.full_like(t, torch.nan if t.is_floating_point() else torch.iinfo(t.dtype).max)
    return torch.stack([t, filler], -1)[..., 0]


def _offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape)


LAYOUTS = {
    "strided": _strided,
    "offset": _offset,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.ndim > 1 else None,
    "expanded": lambda t: t[:1].expand_as(t) if t.ndim and t.shape[0] > 1 else None,
    "expanded along the last": lambda t: t[..., :1].expand_as(t) if t.ndim > 1 else None,
}


@of_each_derived
def test_a_view_that_is_negated_lazily(room, own_products):
    """torch notes the sign of such a view beside its memory: a kernel that read the memory would have another value."""
    for arguments in list(room.calls())[:4]:
        names, given = room.differentiable(arguments), room.tensors(arguments)
        for view in [n for n in given if given[n].is_floating_point()]:
            leaves = {n: given[n].clone().requires_grad_() for n in names}
            expected = torch.autograd.grad(
                _loss(room.of(arguments, names, "cpp")(*leaves.values())), [*leaves.values()]
            )
            negated = torch._neg_view(-given[view]).detach().requires_grad_()
            assert negated.is_neg()
            leaves[view] = negated
            found = torch.autograd.grad(_loss(room.of(arguments, names, "cpp")(*leaves.values())), [*leaves.values()])
            assert_same_bits([t.resolve_neg() for t in found], expected, view)


@of_each_derived
def test_zeros_that_have_no_memory(room, own_products):
    """torch makes such tensors for gradients that are known to be zero: a kernel would read address 0."""
    for arguments in list(room.calls())[:4]:
        names, given = room.differentiable(arguments), room.tensors(arguments)
        for name in [n for n in given if given[n].is_floating_point()]:
            found = []
            for zeros in (torch.zeros_like(given[name]), torch._efficientzerotensor(given[name].shape)):
                leaves = {n: given[n].clone().requires_grad_() for n in names}
                leaves[name] = zeros.requires_grad_()
                outputs = room.of(arguments, names, "cpp")(*leaves.values())
                found.append(torch.autograd.grad(_loss(outputs), [*leaves.values()]))
            assert_same_bits(found[1], found[0], name)


@of_each_derived
def test_what_is_kept_comes_back_in_its_shape(room, own_products):
    """Sizes are those of the forward pass: a shorter tensor would be read beyond its end."""
    shorter = lambda t: t[..., :1].clone() if t.ndim and t.shape[-1] > 1 else t
    seen = 0
    for arguments in list(room.calls())[:4]:
        names, given = room.differentiable(arguments), room.tensors(arguments)
        leaves = {n: given[n].clone().requires_grad_() for n in names}
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, shorter):  # noqa: B023
            outputs = room.of(arguments, names, "cpp")(*leaves.values())
        if all(shorter(t) is t for t in kept):
            continue
        seen += 1
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        upstream = None if first.ndim == 0 else torch.ones_like(first)
        with pytest.raises(RuntimeError, match="came back in another shape"):
            torch.autograd.grad(first, [*leaves.values()], upstream)
    assert seen


@pytest.mark.parametrize("layout", LAYOUTS)
@of_each_room
def test_strides_change_no_bit(room, layout, own_products):
    """Of every tensor in turn: as with a contiguous copy."""
    seen = 0
    for arguments in list(room.calls())[:4]:
        for name, t in room.tensors(arguments).items():
            view = LAYOUTS[layout](t)
            if view is not None:
                seen += 1
                found = _bits(room, arguments | {name: view})
                expected = _bits(room, arguments | {name: view.clone(memory_format=torch.contiguous_format)})
                assert_same_bits(found, expected, f"{name} {tuple(t.shape)}")
    assert seen


@of_each_derived
def test_strides_of_upstream_gradients_change_no_bit(room, own_products):
    for arguments in list(room.calls())[:4]:
        upstream = _upstream(room, arguments)
        for i, t in enumerate(upstream):
            for name, lay_out in LAYOUTS.items():
                if (view := lay_out(t)) is not None:
                    views, copies = list(upstream), list(upstream)
                    views[i], copies[i] = view, view.clone(memory_format=torch.contiguous_format)
                    found = _bits(room, arguments, upstream=views)
                    assert_same_bits(found, _bits(room, arguments, upstream=copies), name)


@of_each_derived
def test_an_output_that_is_not_used(room):
    """Its gradient is zero, whichever of the outputs it is."""
    for arguments in list(room.calls())[:3]:
        names = room.differentiable(arguments)
        leaves = [arguments[name].clone().requires_grad_() for name in names]
        outputs = room.of(arguments, names, "cpp")(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for i, output in enumerate(outputs):
            upstream = [torch.zeros_like(t) for t in _upstream(room, arguments)]
            upstream[i] = torch.ones_like(output)
            alone = torch.autograd.grad(output, leaves, upstream[i], retain_graph=True, allow_unused=True)
            beside = _bits(room, arguments, "cpp", upstream=upstream)[-len(names) :]
            alone = [torch.zeros_like(t) if g is None else g for g, t in zip(alone, beside, strict=True)]
            torch.testing.assert_close(alone, beside)


@pytest.mark.parametrize(("room", "impl"), [each for each in EACH if each.values[0].autocasts])
def test_autocast(room, impl):
    """As exact as the reference there, and gradients are of the dtypes of what they belong to."""
    for arguments in list(room.calls(DEVICE, impl=impl))[:2]:
        names, upstream = room.differentiable(arguments), _upstream(room, arguments)

        def run(which, dtype=None, arguments=arguments, names=names, upstream=upstream):
            given = {n: t.to(dtype) if dtype and n in names else t for n, t in arguments.items()}
            leaves = [given[n].detach().requires_grad_() for n in names]
            outputs, gradients = evaluate(room.of(given, names, which), leaves, upstream)
            return [*outputs, *gradients]

        truth = run("reference", torch.float64)
        with torch.autocast(DEVICE, torch.bfloat16):
            found, eager = run(impl), run("reference")
        for a, e, t in zip(found, eager, truth, strict=True):
            assert a.dtype == e.dtype
            dtype = torch.bfloat16 if names else a.dtype
            assert_as_exact(a, e, t, f"{room.name} {impl}", dtype, room.row_slack)


@pytest.mark.parametrize(("room", "impl"), EACH)
def test_no_rows(room, impl):
    """As the reference has it: an empty result, and gradients of zero."""
    for sample in list(room.calls(DEVICE, impl=impl))[:3]:
        arguments = _with_rows(room, sample, 0)
        found, expected = (_bits(room, arguments, which) for which in (impl, "reference"))
        torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
        assert not any(g.nan_to_num().any() for g in found[-len(room.differentiable(arguments)) :] if g.numel())


def _one_line(room: Room, error: BaseException) -> None:
    """A message is one line that names the operation and one of its inputs."""
    text = str(error)
    assert text.startswith(f"{room.name}: "), text
    assert "\n" not in text
    assert any(re.search(rf"\b{i.name}\b", text) for i in room.op.inputs), text


@of_each_room
def test_no_width_is_refused(room):
    sample = list(room.calls())[1]
    sizes = {name for i in room.op.inputs if i.name in room.tensors(sample) for name in i.sizes if not name.isdigit()}
    for size in sizes - MAY_BE_EMPTY:
        arguments = dict(sample)
        for i in room.op.inputs:
            if size in i.sizes and i.name in room.tensors(sample) and arguments[i.name].ndim >= len(i.sizes):
                t = arguments[i.name]
                arguments[i.name] = t.narrow(t.ndim - len(i.sizes) + i.sizes.index(size), 0, 0)
        with pytest.raises(ValueError, match=f"{size} of .* must be at least 1") as raised:
            room.call(**arguments)
        _one_line(room, raised.value)


@of_each_room
def test_float64(room):
    """By itself it is the reference's; a kernel asked for by name says that it has none."""
    arguments = list(room.calls())[1]
    double = {n: t.double() if n in room.tensors(arguments) and t.is_floating_point() else t
              for n, t in arguments.items()}  # fmt: skip
    assert_same_bits(_bits(room, double), _bits(room, double, "reference"))
    for impl in room.impls:
        with pytest.raises(ImplementationUnavailable, match=f"{room.name}: .*not torch.float64; use impl='reference'"):
            room.call(**double, impl=impl)


@of_each_room
def test_a_second_derivative_raises(room):
    """Of an operation without gradients the first one does."""
    for arguments in room.calls():
        names = room.differentiable(arguments) or [
            n for n, t in room.tensors(arguments).items() if t.dtype.is_floating_point
        ]
        leaves = [arguments[name].clone().requires_grad_() for name in names]
        loss = _loss(room.of(arguments, names, "cpp")(*leaves))
        if room.op.gradients:
            gradients = torch.autograd.grad(loss, leaves, create_graph=True)
            plain = torch.autograd.grad(_loss(room.of(arguments, names, "cpp")(*leaves)), leaves)
            assert_same_bits(gradients, plain, "create_graph")
            loss = _loss(gradients)
        with pytest.raises(RuntimeError, match=f"{room.name}: its (gradient|kernels) .*use impl='reference'"):
            loss.backward()


@of_each_room
def test_a_forward_derivative_raises(room):
    """A tangent would be lost without a word, of a tensor that wants no gradient above all; the reference has it."""
    for arguments in list(room.calls())[:2]:
        names = room.differentiable(arguments) or [
            n for n, t in room.tensors(arguments).items() if t.dtype.is_floating_point
        ]
        match = f"{room.name}: .* has a tangent.*use impl='reference'"
        for wants_gradient in (False, True):
            leaves = [arguments[name].clone().requires_grad_(wants_gradient) for name in names]
            with forward_ad.dual_level():
                room.of(arguments, names, "cpp")(*leaves)  # nothing is lost where nothing has a tangent
                leaves[-1] = forward_ad.make_dual(leaves[-1], torch.ones_like(leaves[-1]))
                with pytest.raises(RuntimeError, match=match):
                    room.of(arguments, names, "cpp")(*leaves)
                if room.op.gradients:
                    outputs = room.of(arguments, names, "reference")(*leaves)
                    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                    assert any(forward_ad.unpack_dual(o).tangent is not None for o in outputs)
        if room.op.gradients:  # forward over reverse: the upstream gradient's tangent
            leaves = [arguments[name].clone().requires_grad_() for name in names]
            outputs = room.of(arguments, names, "cpp")(*leaves)
            output = outputs[0] if isinstance(outputs, tuple) else outputs
            with forward_ad.dual_level():
                upstream = forward_ad.make_dual(torch.ones_like(output), torch.ones_like(output))
                with pytest.raises(RuntimeError, match=match):
                    torch.autograd.grad(output, leaves, upstream, allow_unused=True)


@of_each_derived
def test_transforms_of_torch_func(room):
    """grad is autograd's; vmap of it is a loop over samples."""
    for arguments in list(room.calls())[:4]:
        names = room.differentiable(arguments)
        value = lambda *t, arguments=arguments, names=names: _loss(room.of(arguments, names, "cpp")(*t))
        derivative = torch.func.grad(value, argnums=tuple(range(len(names))))
        batches = [torch.stack([arguments[name], arguments[name] * 0.5]) for name in names]
        expected = []
        for sample in zip(*batches, strict=True):
            leaves = [t.clone().requires_grad_() for t in sample]
            expected.append(torch.autograd.grad(value(*leaves), leaves))
            torch.testing.assert_close(derivative(*sample), expected[-1])
        by_sample = torch.func.vmap(derivative, randomness="same")(*batches)
        torch.testing.assert_close(by_sample, tuple(map(torch.stack, zip(*expected, strict=True))))


@of_each_derived
def test_several_gradients_at_once(room):
    """As is_grads_batched, jacobian(vectorize=True) and vmap over autograd.grad make them: those of a loop."""
    for arguments in list(room.calls())[:2]:
        names = room.differentiable(arguments)
        leaves = [arguments[name].clone().requires_grad_() for name in names]
        outputs = room.of(arguments, names, "cpp")(*leaves)
        output = outputs[0] if isinstance(outputs, tuple) else outputs
        several = torch.stack([torch.ones_like(output), torch.randn_like(output), torch.zeros_like(output)])

        def of(upstream, output=output, leaves=leaves, **options):
            return torch.autograd.grad(output, leaves, upstream, retain_graph=True, materialize_grads=True, **options)

        expected = tuple(map(torch.stack, zip(*map(of, several), strict=True)))
        torch.testing.assert_close(of(several, is_grads_batched=True), expected)
        torch.testing.assert_close(torch.func.vmap(of)(several), expected)


@of_each_derived
def test_each_gradient_alone(room, own_products):
    """Whichever inputs want one: the bits that they get beside all others."""
    for arguments in room.calls():
        names = room.differentiable(arguments)
        together = _bits(room, arguments)[-len(names) :]
        for name, expected in zip(names, together, strict=True):
            assert_same_bits(_bits(room, arguments, wanted=[name])[-1:], [expected], name)


WRONG = {
    "shape": lambda i, t: t[..., :-1] if i.leading else t[None, None],
    "dtype": lambda i, t: t.to(torch.complex64),
    "integers": lambda i, t: t.long() if t.is_floating_point() else t.bool(),
    "device": lambda i, t: t.to("meta"),
    "sparse": lambda i, t: t.to_sparse() if t.ndim and t.is_floating_point() else None,
    "a list": lambda i, t: t.tolist(),
    "nothing": lambda i, t: None,
}


@pytest.mark.parametrize("wrong", WRONG)
@of_each_room
def test_bad_input_is_named(room, wrong):
    for arguments in list(room.calls())[:3]:
        given = room.tensors(arguments)
        for i in room.op.inputs:
            if i.name not in given or (wrong == "nothing" and i.optional) or (wrong == "device" and len(given) == 1):
                continue
            bad = WRONG[wrong](i, given[i.name])
            if wrong == "shape" and len(given) == 1 and i.leading:  # of which no other input says a size
                bad = given[i.name].sum()
            if bad is None and wrong != "nothing":
                continue
            with pytest.raises((ValueError, TypeError)) as raised:
                room.call(**(arguments | {i.name: bad}))
            _one_line(room, raised.value)


def test_messages_say_what_was_expected():
    """By the example of one operation: the sizes that other inputs bind, the dtype, the device."""
    qkv, segments = torch.randn(2, 5, 3, 2, 16), torch.zeros(2, 5, dtype=torch.int32)
    for wrong, message in [
        (segments[:, :4], r"attention: segments is \(2, 4\); it must be \[B, T\] with B = 2, T = 5$"),
        (segments.long(), r"attention: segments is torch.int64; it must be torch.int32"),
        (segments.to("meta"), r"attention: segments is on meta and qkv on cpu; move them to one device"),
    ]:
        with pytest.raises(ValueError, match=message):
            attention(qkv, segments=wrong)
    with pytest.raises(ValueError, match=r"attention: qkv is \(2, 5, 2, 2, 16\); it must be \[B, T, 3, H, D\]$"):
        attention(torch.randn(2, 5, 2, 2, 16))
    with pytest.raises(ValueError, match=r"weight is \(1, 3\); it must be \[V, C\] with C = 4$"):
        linear_cross_entropy(torch.randn(2, 4), torch.randn(1, 3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"qkv is a NoneType; it must be a tensor \[B, T, 3, H, D\]"):
        attention(None)
    for dropout, message in [(Dropout(1.5), "dropout's p is 1.5"), (Dropout(0.1), "its key is None"),
                             (Dropout(0.1, torch.zeros(2, dtype=torch.int64)), "it must be one int64")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            attention(qkv, dropout=dropout)
    for dropout in (None, 0.1, Dropout("0.1"), Dropout(0.1, 5)):
        with pytest.raises(TypeError, match="attention: dropout"):
            attention(qkv, dropout=dropout)
    with pytest.raises(TypeError, match="attention: scale is 'auto', a str; it must be a float | None"):
        attention(qkv, scale="auto")


@of_each_room
def test_an_unknown_implementation_is_named(room):
    with pytest.raises(ValueError, match=f"{room.name}: no implementation 'blas' on cpu; choose auto, .*reference"):
        room.call(**next(room.calls()), impl="blas")
