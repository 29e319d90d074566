"""What an operation takes: shapes, dtypes and devices of its inputs, its options, and what its kernels may read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT = "a floating dtype"
SAME = "same dtype"  # as the first input
STREAM = "stream dtype"  # the first input's dtype, or float32 beside a lower precision
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what FLOAT is: no 8 bits, no complex numbers
INDEX = (torch.int64, torch.int32)

CONTIGUOUS, STRIDED = "contiguous", "strided"
MAY_BE_EMPTY = {"B", "..."}  # a batch may have no rows; everything else has a size


@dataclass(frozen=True)
class Input:
    """One tensor of an operation.

    Args:
        name: of the argument.
        shape: names of its sizes, as in "B T 3 H D"; "..." stands for any leading sizes, N for their product. Sizes
            of one name are equal in all inputs; B and the leading ones may be 0.
        dtype: FLOAT, SAME, STREAM, or a tuple of dtypes.
        optional: whether it may be None.
        read: how a kernel gets it: CONTIGUOUS, STRIDED (as it is) or a dtype, in which it is then contiguous.
    """

    name: str
    shape: str
    dtype: Any = SAME
    optional: bool = False
    read: Any = CONTIGUOUS
    sizes: tuple[str, ...] = field(init=False)
    leading: bool = field(init=False)

    def __post_init__(self):
        names = tuple(self.shape.split())
        object.__setattr__(self, "leading", names[:1] == ("...",))
        object.__setattr__(self, "sizes", names[1:] if self.leading else names)

    def takes(self, dtype: torch.dtype, first: torch.dtype) -> bool:
        """Whether it may be of `dtype` where the first input is of `first`."""
        kind = self.dtype
        if kind is SAME or kind is STREAM:
            return dtype is first or (kind is STREAM and dtype is torch.float32)
        return dtype in (FLOATS if kind is FLOAT else kind)

    @property
    def pattern(self) -> str:
        return f"[{', '.join(self.shape.split())}]"


def _wanted_dtype(spec: Input, first: Tensor, name: str) -> str:
    """name: of `first`."""
    # Parts of a model that FSDP2 casts to different dtypes are where two meet that nobody converted.
    same = f"{first.dtype} as {name} is (under FSDP2: one param_dtype for all modules, and no other output_dtype)"
    words = {FLOAT: FLOAT, SAME: same, STREAM: f"{first.dtype} or torch.float32"}
    return words[spec.dtype] if isinstance(spec.dtype, str) else " or ".join(map(str, spec.dtype))


def _refuse_shape(op: str, spec: Input, t: Tensor, inputs: Sequence[Input], tensors: Sequence[Tensor | None]) -> None:
    """Names the sizes that the inputs before this one have bound."""
    bound: dict[str, Any] = {}
    for before, tensor in zip(inputs[: inputs.index(spec)], tensors, strict=False):
        if tensor is not None:
            split = tensor.ndim - len(before.sizes)
            own = dict(zip(before.sizes, tensor.shape[split:], strict=True))
            bound = own | ({"...": tuple(tensor.shape[:split])} if before.leading else {}) | bound
    sizes = [f"{name} = {bound[name]}" for name in spec.shape.split() if name in bound and not name.isdigit()]
    known = f" with {', '.join(dict.fromkeys(sizes))}" if sizes else ""
    raise ValueError(f"{op}: {spec.name} is {tuple(t.shape)}; it must be {spec.pattern}{known}")


def check(op: str, inputs: Sequence[Input], tensors: Sequence[Tensor | None]) -> bool:
    """Raises TypeError or ValueError, one line that names the input, unless `tensors` are as `inputs` say.

    Returns whether one of them has no element.
    """
    first, bound, empty = tensors[0], {}, False
    if not isinstance(first, Tensor):
        raise TypeError(f"{op}: {inputs[0].name} is a {type(first).__name__}; it must be a tensor {inputs[0].pattern}")
    device, dtype = first.device, first.dtype
    for spec, t in zip(inputs, tensors, strict=True):
        if t is None and spec.optional:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {spec.name} is a {type(t).__name__}; it must be a tensor {spec.pattern}")
        shape, sizes = t.shape, spec.sizes
        if spec.leading:
            split = len(shape) - len(sizes)
            if split < 0 or bound.setdefault("...", shape[:split]) != shape[:split]:
                _refuse_shape(op, spec, t, inputs, tensors)
            shape = shape[split:]
        if len(shape) != len(sizes):
            _refuse_shape(op, spec, t, inputs, tensors)
        for name, size in zip(sizes, shape, strict=True):
            if (int(name) if name.isdigit() else bound.setdefault(name, size)) != size:
                _refuse_shape(op, spec, t, inputs, tensors)
            if size == 0:
                if name not in MAY_BE_EMPTY:
                    where = f"{spec.name} is {tuple(t.shape)}"
                    raise ValueError(f"{op}: {where}; {name} of {spec.pattern} must be at least 1")
                empty = True
        if t.device != device:
            where = f"{spec.name} is on {t.device} and {inputs[0].name} on {device}"
            raise ValueError(f"{op}: {where}; move them to one device")
        if not spec.takes(t.dtype, dtype):
            raise ValueError(f"{op}: {spec.name} is {t.dtype}; it must be {_wanted_dtype(spec, first, inputs[0].name)}")
        if t.layout is not torch.strided:
            raise ValueError(f"{op}: {spec.name} is {t.layout}; it must be dense: call .to_dense()")
    return empty or 0 in bound.get("...", ())


def check_dense(op: str, name: str, value: Any) -> None:
    """Raises TypeError or ValueError, one line that names the input, unless `value` is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a {type(value).__name__}; it must be a tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{op}: {name} is {value.layout}; it must be dense: call .to_dense()")


# What a caller may pass for an option of each kind.
OPTIONS = {
    float: (float, int),
    float | None: (float, int, type(None)),
    int: (int, torch.SymInt),
    torch.dtype | None: (torch.dtype, type(None)),
}


def check_options(op: str, kinds: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises TypeError, one line that names the option, unless each of `values` is of its kind in `kinds`."""
    for name, kind in kinds.items():
        value = values[name]
        if not isinstance(value, OPTIONS.get(kind, kind)):
            wanted = getattr(kind, "__name__", str(kind))
            raise TypeError(f"{op}: {name} is {value!r}, a {type(value).__name__}; it must be a {wanted}")


def sizes_of(shapes: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    """A function that adds to a dict of tensors the sizes that `shapes` name, {tensor: "... C"}."""
    where: dict[str, list[tuple[str, int | None]]] = {}
    for tensor, shape in shapes.items():
        names = shape.split()
        for i, name in enumerate(names):
            size = ("N", None) if name == "..." else (name, i - len(names))
            if not name.isdigit():
                where.setdefault(size[0], []).append((tensor, size[1]))

    def add(values: dict[str, Any]) -> None:
        for name, places in where.items():
            for tensor, index in places:
                t = values[tensor]
                if t is not None:
                    values[name] = t.numel() // t.shape[-1] if index is None else t.shape[index]
                    break

    return add


def reader(reads: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A function that makes the tensors of a dict what `reads` says of each: see `Input.read`."""
    dtypes = {name: how for name, how in reads.items() if isinstance(how, torch.dtype)}
    contiguous = [name for name, how in reads.items() if how != STRIDED]

    def read(values: dict[str, Any]) -> None:
        for name, dtype in dtypes.items():
            t = values[name]
            if t is not None and t.dtype != dtype:
                values[name] = t.to(dtype)
        for name in contiguous:
            t = values[name]
            if t is not None and not t.is_contiguous():
                values[name] = t.contiguous()

    return read
