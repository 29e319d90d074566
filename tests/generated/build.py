"""Tensors from descriptions of plain values: {"shape", "dtype", "layout", "seed"} and what is in them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

FLOATS = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = (
    "contiguous", "offset", "every other", "every other row", "transposed", "permuted", "expanded", "expanded last",
    "overlapping", "of one number",
)  # fmt: skip


def _filler(values: Tensor, shape: list[int]) -> Tensor:
    """Memory around a view that would be seen in any sum."""
    if values.dtype.is_floating_point:
        return torch.full(shape, torch.nan, dtype=values.dtype)
    return torch.full(shape, torch.iinfo(values.dtype).max, dtype=values.dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """A view of this layout with `values`' shape and, where no element lies upon another, with its values."""
    shape, n = list(values.shape), values.numel()
    if not shape or not n:
        return values
    if layout == "offset":
        return torch.cat([_filler(values, [3]), values.reshape(-1), _filler(values, [5])])[3 : 3 + n].view(shape)
    if layout == "every other":
        return torch.stack([values, _filler(values, shape)], -1)[..., 0]
    if layout == "every other row":
        return torch.stack([_filler(values, shape), values], 1)[:, 1]
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "permuted":
        order = list(range(len(shape)))[::-1]
        return values.permute(order).contiguous().permute(order)
    if layout == "expanded":
        return values[:1].expand(shape)
    if layout == "expanded last":
        return values[..., :1].expand(shape)
    if layout == "overlapping":  # a window that moves on by one element from row to row
        return values.reshape(-1).as_strided(shape, [1] * len(shape)) if n >= sum(shape) else values
    if layout == "of one number":
        return values.reshape(-1)[:1].as_strided(shape, [0] * len(shape))
    return values


def tensor(description: dict[str, Any] | None) -> Any:
    """The described tensor; None for None.

    "scale" and "center" are of normal numbers; "low" and "high" of integers; "at" puts a value at an index.
    """
    if description is None:
        return None
    generator = torch.Generator().manual_seed(description["seed"])
    shape, dtype = description["shape"], getattr(torch, description["dtype"])
    if dtype.is_floating_point:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values = (values * description.get("scale", 1.0) + description.get("center", 0.0)).to(dtype)
    else:
        low, high = description["low"], max(description["high"], description["low"] + 1)
        values = torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(dtype)
    if "at" in description and values.numel():
        index, value = description["at"]
        values.view(-1)[index % values.numel()] = value
    return laid_out(values, description["layout"])


def changed(t: Tensor, how: str) -> Any:
    """What a caller might pass by mistake for a tensor."""
    if how == "longer":
        return torch.cat([t, t[..., :1]], -1) if t.ndim and t.shape[-1] else t.new_zeros([*t.shape, 2])
    if how == "shorter":
        return t[..., :-1] if t.ndim else t.new_zeros(0)
    if how == "without a row":
        return t[:-1] if t.ndim else t.new_zeros(0)
    if how == "one more dimension":
        return t.unsqueeze(0)
    if how == "flat":
        return t.reshape(-1)
    if how == "one number":
        return t.reshape(-1)[0] if t.numel() else t.new_zeros(())
    if how == "empty":
        return t.new_zeros([0] * t.ndim)
    if how == "None":
        return None
    if how == "list":
        return t.tolist() if t.numel() < 1000 else []
    if how == "sparse":
        return t.contiguous().to_sparse() if t.ndim else t.new_zeros(2).to_sparse()
    if how == "meta":
        return t.to("meta")
    if how == "number":
        return math.pi
    return t.to(getattr(torch, how))


CHANGES = (
    "longer", "shorter", "without a row", "one more dimension", "flat", "one number", "empty", "None", "list", "sparse",
    "meta", "number", "float64", "bfloat16", "int64", "int32", "bool", "complex64", "uint8", "int16", "float8_e4m3fn",
)  # fmt: skip
