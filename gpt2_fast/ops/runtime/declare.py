"""An operation is declared once, as an `Op`: what is the same for all of them is made here from its declaration.

A room of `gpt2_fast/ops` says what goes in (`Input`: shape, dtype, what kernels read), which options there are, what
forward and backward write and what is kept between them, and gives a reference and two functions for each backend.
From that come the torch.library schema and its fake, the autograd.Function, the contract of the inputs (shapes,
dtypes, devices, strides), the choice of the implementation, and the tests that all operations share.

A backend's two functions, forward(a, out) and backward(a, out), see everything by name:

* `a`: inputs, options and sizes as declared; in backward what was kept, the gradients ("dy" for output y, None where
  nothing came), what is carried over, and `needs`: which inputs want a gradient, by name.
* `out`: what is to be written. A name is uninitialised memory of the declared shape and dtype when it is first read;
  a backend may set it instead. None stands for what is not made.

Three mistakes are impossible in an op's file: a tensor reaches a backend contiguous and in the dtype that `Input.read`
names, whatever its strides were; an empty call reaches none; a second derivative or a forward-mode tangent raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.autograd import by_name, function_of, functional_of, traced_of, underivable_of
from gpt2_fast.ops.runtime.contract import (
    CONTIGUOUS,
    FLOAT,
    SAME,
    STREAM,
    STRIDED,
    Input,
    check,
    check_options,
    reader,
    sizes_of,
)
from gpt2_fast.ops.runtime.kinds import Kind
from gpt2_fast.ops.runtime.library import register
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout
from gpt2_fast.ops.runtime.tracing import PLAIN, is_odd, refuse_tangents, under_a_tracer
from gpt2_fast.ops.runtime.values import Arguments, Outputs, Spec, described, outputs

SCHEMA = {float: "float", int: "SymInt", bool: "bool", str: "str", torch.dtype: "ScalarType", Tensor: "Tensor?"}
SCHEMA |= {float | None: "float?", torch.dtype | None: "ScalarType?"}
DROPOUT = {"dropout_p": float, "dropout_key": Tensor, "dropout_site": int}  # what a Dropout is in a schema
KNOWN = 2048  # kinds of calls that an operation remembers
TRACED = "traced"  # a call that goes through torch's dispatcher
OPS: dict[str, Op] = {}


class Backend(NamedTuple):
    """The two functions of an implementation; backward is None where there is no gradient."""

    forward: Callable[[Arguments, Outputs], None]
    backward: Callable[[Arguments, Outputs], None] | None = None


class Op:
    """One operation; a call takes its inputs, its options by name, and `impl`.

    Args:
        name: the stem of its files.
        inputs: the tensors; the first says device and dtype.
        reference: (*inputs, **options) -> what `returns` names: what is correct, under autograd.
        outputs: from `a`, shape and dtype of everything that forward writes, or None for what it does not.
        output_names: the keys of `outputs`.
        returns: which of them a call returns.
        backends: implementation -> Backend. "auto" stands for the kernels' own choice from call to call.
        on: device type -> the implementations there, best first, without the reference.
        options: name -> float, int, bool, str, torch.dtype or Dropout; float and torch.dtype may be ``| None``.
        check: (*inputs, **options) raises ValueError for what neither shapes nor dtypes say.
        limits: (*inputs, **options) -> why the kernels do not take what the reference does, or None. impl="auto" is the
            reference then, a named implementation raises ValueError.
        saved: what is kept for backward, name -> shape, as in `Input`. "h|x" keeps x under the name h where there is
            no h.
        gradients: from backward's `a`, shape and dtype of each gradient ("dx" of input x), or None.
        alias: an input whose gradient, where it is not made, is that of another: {"x": "residual"}.
        carry: name -> (type, function of `a`): what backward knows of forward besides.
        ahead: outputs of forward that are gradients already, in the order of the inputs that have one: forward sees
            in `a.needs` which are wanted. The first backward hands them on, scaled by `scaled`; a later one, for
            which they are gone, or one that is itself recorded, makes them by backward.
        scaled: (gradient, a, in_place) -> the gradient for the upstream gradients that are in `a`. in_place: it may
            be written over.

    The gradient of an input is rounded to its dtype. Backward is not called for inputs that want none.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: Sequence[Input],
        reference: Callable[..., Any],
        outputs: Callable[[Arguments], dict[str, Spec]],
        output_names: Sequence[str],
        returns: Sequence[str],
        backends: Mapping[str, Backend],
        on: Mapping[str, Sequence[str]],
        options: Mapping[str, Any] | None = None,
        check: Callable[..., None] | None = None,
        limits: Callable[..., str | None] | None = None,
        saved: Mapping[str, str] | None = None,
        gradients: Callable[[Arguments], dict[str, Spec]] | None = None,
        alias: Mapping[str, str] | None = None,
        carry: Mapping[str, tuple[Any, Callable[[Arguments], Any]]] | None = None,
        ahead: Sequence[str] = (),
        scaled: Callable[[Tensor, Arguments, bool], Tensor] | None = None,
    ):
        self.name, self.inputs, self.reference, self.backends = name, tuple(inputs), reference, backends
        self.outputs, self.output_names, self.returns = outputs, tuple(output_names), tuple(returns)
        self.gradients, self.alias, self.carry = gradients, dict(alias or {}), dict(carry or {})
        self.check, self.limits = check, limits
        self.ahead, self.scaled = tuple(ahead), scaled
        self.options, self.dropout = dict(options or {}), Dropout in (options or {}).values()
        flat: dict[str, Any] = {}
        for option, kind in self.options.items():
            flat |= DROPOUT if kind is Dropout else {option: kind}
        self.flat_options = flat
        self.tensor_options = [i for i, kind in enumerate(flat.values()) if kind is Tensor]
        self.differentiable = [i.name for i in self.inputs if i.dtype in (FLOAT, SAME, STREAM)]
        self.strided = {i.name for i in self.inputs if i.read == STRIDED}
        self.saved_names = [tuple(names.split("|")) for names in (saved or {})]
        self.input_names = [i.name for i in self.inputs]
        self._strided = [i.read == STRIDED for i in self.inputs]
        self._plain_options = [option for option, kind in self.options.items() if kind is not Dropout]
        self._wants_none = (False,) * len(self.inputs)
        self._known: dict[tuple, Kind | None] = {}  # None: the reference
        self._define_forward()
        if gradients is not None:
            self._define_backward(dict(zip((n[0] for n in self.saved_names), (saved or {}).values(), strict=True)))
            self._apply, self._traced, self._functional = function_of(self), traced_of(self), functional_of(self)
            why = f"its gradient is computed by a kernel and has no second derivative; {PLAIN}"
            self.underivable = underivable_of(f"{name}_backward", self.backward_op, len(self.differentiable), why)
        else:
            why = "its kernels have no gradient; use impl='reference' for one, or call it under torch.no_grad()"
            self.underivable = underivable_of(name, self.forward_op, len(self.output_names), why)
        dispatch.TABLE[name] = {device: (*names, "reference") for device, names in on.items()}
        OPS[name] = self

    def _define_forward(self) -> None:
        tensors = [f"Tensor{'?' if i.optional else ''} {i.name}" for i in self.inputs]
        options = [f"{SCHEMA[kind]} {name}" for name, kind in self.flat_options.items()]
        shapes = {i.name: i.shape for i in self.inputs}
        read = self.read_forward = reader({i.name: i.read for i in self.inputs})
        self.names = [*shapes, *self.flat_options]
        ask = "needs" if self.ahead else "save"  # what is wanted of forward beside its values
        names = [*self.names, ask, "impl"]
        bodies = self._bodies(names, shapes, read, self.outputs, self.output_names, "forward")
        self.forward_arguments, self.write_forward, self.run_forward, fake = bodies
        options.append(f"bool[] {ask}" if self.ahead else f"bool {ask}")
        schema = f"{self.name}({', '.join([*tensors, *options, 'str impl'])}) -> "
        self.forward_op = register(schema + _tensors(self.output_names), self.run_forward, fake)

    def _define_backward(self, saved: dict[str, str]) -> None:
        reads = {i.name: i.read for i in self.inputs}
        tensors = [*(f"d{name}" for name in self.returns), *saved]
        options = [f"{SCHEMA[kind]} {name}" for name, kind in self.flat_options.items()]
        options += [f"{SCHEMA[kind]} {name}" for name, (kind, _) in self.carry.items()]
        self.backward_tensors = tensors
        names = self.backward_names = [*tensors, *self.flat_options, *self.carry, "needs", "impl"]
        read = self.read_backward = reader({name: reads.get(name, CONTIGUOUS) for name in tensors})
        made = self.made = [f"d{name}" for name in self.differentiable]
        # Of each input: the gradient that backward makes, and the one that stands for it where it makes none.
        of = {i.name: f"d{i.name}" for i in self.inputs if i.name in self.differentiable}
        self.gradient_of = [(of.get(i.name), of.get(self.alias.get(i.name))) for i in self.inputs]
        bodies = self._bodies(names, saved, read, self.gradients, made, "backward")
        self.backward_arguments, self.write_backward, self.run_backward, fake = bodies
        arguments = [*(f"Tensor? {name}" for name in tensors), *options, "bool[] needs", "str impl"]
        schema = f"{self.name}_backward({', '.join(arguments)}) -> {_tensors(made)}"
        self.backward_op = register(schema, self.run_backward, fake)

    def _bodies(self, names, shapes, read, specs, made, which) -> tuple[Callable, Callable, Callable, Callable]:
        """What an operator makes of flat arguments: what a backend reads, everything written by name, a tensor for
        each name of `made` (an empty one for None), and its fake."""
        inputs, add_sizes, drops = [i.name for i in self.inputs], sizes_of(shapes), self.dropout
        takes_needs = "needs" in names

        def arguments(flat: Sequence[Any]) -> Arguments:
            values = dict(zip(names, flat))  # noqa: B905 - the callers' own lists
            if takes_needs:
                values["needs"] = dict(zip(inputs, values["needs"], strict=True))
            read(values)
            add_sizes(values)
            if drops:
                add_dropout(values)
            return Arguments(values)

        def write(flat: Sequence[Any]) -> dict[str, Tensor | None]:
            a = arguments(flat)
            out = outputs(flat[0], specs(a))
            getattr(self.backends[a.impl], which)(a, out)
            return out.named()

        def run(*flat):
            found, like = write(flat), flat[0]
            found = tuple([like.new_empty(0) if (t := found[name]) is None else t for name in made])
            return found if len(found) > 1 else found[0]

        def fake(*flat):
            of, like = specs(arguments(flat)), flat[0]
            found = [described(like, of[name]) for name in made]
            return tuple(found) if len(found) > 1 else found[0]

        return arguments, write, run, fake

    def rescale(self, ahead: Sequence[Tensor | None], flat: Sequence[Any], in_place: bool) -> dict[str, Tensor | None]:
        """The gradients that forward made `ahead`, for the upstream gradients among backward's arguments."""
        a = Arguments(dict(zip(self.backward_names, flat, strict=True)))
        found = [None if g is None else self.scaled(g, a, in_place) for g in ahead]
        return dict(zip(self.made, found, strict=True))

    def carry_values(self, named: dict[str, Any]) -> list[Any]:
        """What backward knows of forward besides what is kept."""
        a = Arguments(named)
        return [function(a) for _, function in self.carry.values()]

    def by_input(
        self, made: Mapping[str, Tensor | None], needs: Sequence[bool], dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """The gradient of each input that wants one, in its dtype, from what backward made."""
        found: list[Tensor | None] = []
        for (name, other), wanted, dtype in zip(self.gradient_of, needs, dtypes, strict=True):
            g = made[name] if wanted and name is not None else None
            if g is None and wanted and other is not None:
                g = made[other]
            found.append(g if g is None or g.dtype is dtype else g.to(dtype))
        return found

    def drops(self, flat: Sequence[Any]) -> bool:
        """Whether a call with these arguments drops elements."""
        return self.dropout and flat[len(self.inputs) + list(self.flat_options).index("dropout_p")] > 0.0

    def __call__(self, *tensors: Tensor | None, impl: str = "auto", **options: Any) -> Any:
        if under_a_tracer() or (kind := self._kind(tensors, impl, options)) is TRACED:
            return self._call_traced(tensors, impl, options)
        if kind is None:
            return self.reference(*tensors, **options)
        dropout = options["dropout"] if kind.drops else None
        if not _recorded(tensors):
            made = kind.forward(tensors, dropout, self._wants_none)
            found = tuple([made[name] for name in self.returns])
        elif self.gradients is None:
            return self._call_traced(tensors, impl, options)
        else:
            found = self._apply(kind, dropout, *tensors)
        return found if len(found) > 1 else found[0]

    def _call_traced(self, tensors: Sequence[Tensor | None], impl: str, options: dict[str, Any]) -> Any:
        """A call that goes through torch's dispatcher."""
        chosen = self._checked(tensors, impl, options)
        if chosen == "reference":
            return self.reference(*tensors, **options)
        refuse_tangents(self.name, tensors)
        if self.ahead and not torch.compiler.is_compiling() and torch._C._is_tracing():
            raise RuntimeError(f"{self.name}: torch.jit.trace cannot record what its kernels take; {PLAIN}")
        flat = (*tensors, *self._flat_options(options), chosen)
        transformed = torch._C._are_functorch_transforms_active()
        nothing = list(self._wants_none) if self.ahead else False
        if self.gradients is None and (transformed or _recorded(tensors)):
            outputs = by_name(self.output_names, self.underivable.apply(*flat[:-1], False, chosen))
        elif transformed:
            outputs = by_name(self.output_names, self._functional.apply(*flat))
        elif _recorded(tensors):
            found = self._traced.apply(*flat)
            return found if len(found) > 1 else found[0]
        else:
            outputs = by_name(self.output_names, self.forward_op(*flat[:-1], nothing, chosen))
        found = [outputs[name] for name in self.returns]
        return tuple(found) if len(found) > 1 else found[0]

    def _flat_options(self, options: dict[str, Any]) -> list[Any]:
        flat: list[Any] = []
        for name, kind in self.options.items():
            flat += options[name].flat() if kind is Dropout else (options[name],)
        return flat

    def _kind(self, tensors: Sequence[Tensor | None], impl: str, options: dict[str, Any]) -> Kind | str | None:
        """The kind of a call, TRACED, or None where the reference runs.

        The first call of a kind is held to the contract.
        """
        first = tensors[0]
        try:
            key: Any = [impl]
            for t, strided in zip(tensors, self._strided, strict=True):
                if t is None:
                    key.append(None)
                    continue
                key += (type(t), t.is_neg(), t._is_zerotensor(), t.shape, t.dtype, t.device, t.layout)
                key.append(t.stride() if strided else t.is_contiguous())
            for name in self._plain_options:
                value = options[name]
                key += (value, type(value))
            dropout = options["dropout"] if self.dropout else NO_DROPOUT
            if dropout is not NO_DROPOUT:
                key += (dropout.p, type(dropout.p), type(dropout.site))
            key = tuple(key)
            kind = self._known[key]
        except KeyError:
            return self._new_kind(key, tensors, impl, options)
        except (AttributeError, TypeError, ValueError, RuntimeError):
            self._checked(tensors, impl, options)
            if any(is_odd(t) for t in tensors if t is not None):
                return TRACED
            raise
        if dropout.p != 0.0 or dropout.key is not None:
            dropout.check(self.name, first.device)  # its key is another one each time
        return kind

    def _new_kind(self, key: tuple, tensors, impl: str, options: dict[str, Any]) -> Kind | str | None:
        chosen = self._checked(tensors, impl, options)
        if any(is_odd(t) for t in tensors if t is not None):
            return TRACED
        if len(self._known) >= KNOWN:
            self._known.clear()
        flat = (*tensors, *self._flat_options(options), chosen)
        kind = self._known[key] = None if chosen == "reference" else Kind(self, tensors, flat)
        return kind

    def reads_as_is(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether kernels get these inputs as they are, neither copied nor cast."""
        return all(
            t is None or i.read == STRIDED or (t.is_contiguous() and (i.read == CONTIGUOUS or t.dtype == i.read))
            for i, t in zip(self.inputs, tensors, strict=True)
        )

    def _checked(self, tensors: Sequence[Tensor | None], impl: str, options: dict[str, Any]) -> str:
        empty, first = check(self.name, self.inputs, tensors), tensors[0]
        check_options(self.name, self.options, options)
        if self.dropout:
            options["dropout"].check(self.name, first.device)
        if self.check is not None:
            self.check(*tensors, **options)
        chosen = dispatch.choose(self.name, impl, first.device, first.dtype)
        if chosen == "reference" or empty:
            return "reference"
        if self.limits is not None and (reason := self.limits(*tensors, **options)):
            if impl != "auto":
                raise ValueError(f"{self.name}: {reason}; use impl='reference'")
            return "reference"
        return impl if impl == "auto" and "auto" in self.backends else chosen


def add_dropout(values: dict[str, Any]) -> None:
    """Adds what kernels take of a dropout to its three flat values."""
    p, key, site = values["dropout_p"], values["dropout_key"], values["dropout_site"]
    dropout = values["dropout"] = Dropout(p, key, site)
    values["dropout_threshold"], values["dropout_scale"] = (dropout.threshold, dropout.scale) if p else (0, 1.0)


def forget() -> None:
    """Lets every operation choose anew: for a test that changes what can run in its process."""
    for op in OPS.values():
        op._known.clear()


def autocasts(x: Any) -> bool:
    """Whether `torch.autocast` is on for x; it leaves float64 alone. Of no tensor the contract says so later."""
    if not isinstance(x, Tensor) or (device := x.device.type) == "meta":
        return False
    return torch.is_autocast_enabled(device) and x.dtype != torch.float64


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What an operation on x computes in: autocast's dtype inside `torch.autocast`, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if autocasts(x) else getattr(x, "dtype", None)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """`tensors` in autocast's dtype inside `torch.autocast`, as it casts those of a product; otherwise as they are."""
    if not autocasts(tensors[0]):
        return tensors
    dtype = autocast_dtype(tensors[0])
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in dispatch.KERNEL_DTYPES else t for t in tensors)


def _recorded(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])  # noqa: C419 - faster


def _tensors(names: Sequence[str]) -> str:
    return "Tensor" if len(names) == 1 else f"({', '.join(f'Tensor {name}' for name in names)})"
