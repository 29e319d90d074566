"""State of plain values and tensors as JSON beside named tensors, and back, exactly.

What JSON has no form for is an object with one key: {"tensor": name}, {"tuple": [...]}, {"dict": [[key, value], ...]}.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor

_PLAIN = (int, float, bool, str, type(None))


def check_whole(name: str, tensor: Tensor) -> None:
    """Raises TypeError, one line, for a DTensor: a file of one process would have this rank's part, or nothing."""
    if hasattr(tensor, "device_mesh"):
        raise TypeError(
            f"{name} is a DTensor, of which a rank has a part; pass its full_tensor(), or save by "
            "torch.distributed.checkpoint"
        )


def pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """`value` for json.dumps; its tensors go into `tensors`, named by `where` they are.

    Raises TypeError, which says where, for anything but tensors, numbers, strings, None, lists, tuples and dicts, and
    for a DTensor.
    """
    if isinstance(value, Tensor):
        check_whole(where, value)
        tensors[where] = value
        return {"tensor": where}
    if type(value) is list:
        return [pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [pack(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]}
    if type(value) in (dict, OrderedDict):
        for key in value:
            if type(key) not in _PLAIN:
                raise TypeError(f"a key of {where} is a {type(key).__name__}; it must be a plain value")
        return {"dict": [[key, pack(item, f"{where}.{key}", tensors)] for key, item in value.items()]}
    if type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}; a training state holds tensors and plain values only")
    return value


def unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `pack` was given."""
    if isinstance(value, list):
        return [unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "tuple":
        return tuple(unpack(item, tensors) for item in content)
    return {key: unpack(item, tensors) for key, item in content}


def of_their_own(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(contiguous tensors on the CPU, each memory once; name -> the name under which the same tensor is kept)."""
    kept: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    known: dict[tuple, str] = {}
    for name, t in tensors.items():
        t = t.detach()
        key = (t.device, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and (first := known.setdefault(key, name)) != name:
            same[name] = first
            continue
        kept[name] = t.to("cpu").contiguous()
    # Views of one memory that are not the same tensor: each but the first its own copy, as safetensors wants it.
    seen: set[int] = set()
    for name, t in kept.items():
        at = t.untyped_storage().data_ptr()
        if at in seen:
            kept[name] = t.clone(memory_format=torch.contiguous_format)
        seen.add(at)
    return kept, same
