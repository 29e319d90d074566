"""The one place where a Triton kernel is launched.

Triton launches on the current device whatever its arguments are, compiles with its own default options, reads a strided
tensor as if it were contiguous, and names neither kernel nor configuration when it fails. `launch` deals with all four.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .aot import LAUNCH_OPTIONS

GRID_LIMIT = (2**31 - 1, 65535, 65535)  # CUDA C++ Programming Guide, "Technical Specifications"


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, strided: tuple[str, ...] = (), **keywords: Any) -> None:
    """Launches kernel[grid](*arguments, **keywords) on its tensors' device and that device's current stream.

    Args:
        kernel: a `@triton.jit` function.
        grid: programs along each of up to three axes.
        arguments, keywords: the kernel's arguments, in its order or by name, then num_warps, num_stages and the like.
        strided: names of the tensors that the kernel reads by strides of their own; all others must be contiguous.

    Raises:
        ValueError: a tensor that is not contiguous or is on another device than the first, or a grid too large.
        RuntimeError: Triton or the driver refused; one line with kernel, configuration and reason, the error chained.
    """
    index = None
    for name, value in (*zip(kernel.arg_names, arguments, strict=False), *keywords.items()):
        if described := isinstance(value, TensorDescriptor):  # which has strides of its own
            value = value.base
        if not isinstance(value, torch.Tensor):
            continue
        if not described and not value.is_contiguous() and name not in strided:
            raise ValueError(
                f"{kernel_name(kernel)}: {name} must be contiguous, and has shape {tuple(value.shape)} and strides "
                f"{value.stride()}; call .contiguous()"
            )
        device = value.get_device()  # -1 is the CPU
        index = device if index is None else index
        if device != index:
            raise ValueError(f"{kernel_name(kernel)}: {name} is on {value.device}; its other tensors are not")
    if any(programs > limit for programs, limit in zip(grid, GRID_LIMIT, strict=False)):
        raise ValueError(f"{kernel_name(kernel)}: a grid of {grid} is above {GRID_LIMIT}, the largest there is")
    try:
        if index is None or index < 0 or index == torch.cuda.current_device():
            kernel[grid](*arguments, **keywords, **LAUNCH_OPTIONS)
        else:
            with torch.cuda.device(index):
                kernel[grid](*arguments, **keywords, **LAUNCH_OPTIONS)
    except Exception as error:
        raise RuntimeError(_failure(kernel, grid, keywords, error)) from error


def kernel_name(kernel: Any) -> str:
    """A kernel's file and name, as in "attention.forward_kernel"."""
    return f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"


def _failure(kernel: Any, grid: tuple[int, ...], keywords: dict[str, Any], error: Exception) -> str:
    tensors = (torch.Tensor, TensorDescriptor)
    given = (f"{name}={value}" for name, value in keywords.items() if not isinstance(value, tensors))
    reason = next(iter(str(error).strip().splitlines()), "")
    return f"{kernel_name(kernel)}[{grid}]({', '.join(given)}): {type(error).__name__}: {reason}"
