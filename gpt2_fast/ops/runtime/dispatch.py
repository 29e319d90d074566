"""Which implementation of an operation runs, and why.

TABLE is the whole policy: for each operation and device type, the implementations in order of preference, as the
operation's own file declares them.
``impl="auto"`` takes the first that can run; naming one that cannot run raises, naming what is missing.

=========  ==========================================================================================
cpp        the C++ extension's kernels (``csrc/<op>.cpp``), on the CPU
aten       PyTorch's own products, the library chosen by ``ops/runtime/cpu_policy.py``
cuda       ``csrc/embedding.cu``, built by nvcc or, at first use, by NVRTC; on NVIDIA's cards alone
triton     ``kernels/<op>.py``, on a card of ``kernels/cards.py``, or on the CPU in Triton's interpreter
reference  plain PyTorch under autograd: what is correct, on every device and in float64
=========  ==========================================================================================
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings

import torch

from gpt2_fast import sources
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.uncompiled import assume_constant_result

# Operation -> device type -> implementations, best first. Each operation's file fills its row when it is imported, most
# by `declare.Op`.
TABLE: dict[str, dict[str, tuple[str, ...]]] = {}

# Triton is in no row of a CPU: its interpreter is a test instrument, so it runs there only when asked for by name.
ON_REQUEST = {"cpu": ("triton",)}

LOW_PRECISION = (torch.bfloat16, torch.float16)
KERNEL_DTYPES = (torch.float32, *LOW_PRECISION)
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # csrc/isa.h
OTHER_CODES = {torch.float64: 3, torch.int64: 4, torch.int32: 5, torch.int8: 6, torch.uint8: 7}  # csrc/bindings.cpp


AGAIN = "install gpt2_fast again with: pip install --force-reinstall --no-deps --no-cache-dir"
OF_MODELS = ("auto", "reference", "cpp", "triton")  # what a model takes as its impl


class ImplementationUnavailable(RuntimeError):
    """An implementation was asked for by name and cannot run here."""


def names(op: str) -> set[str]:
    """Every implementation of `op`, on any device."""
    return {name for row in TABLE[op].values() for name in row}


def implementations(op: str, device_type: str) -> tuple[str, ...]:
    """The names ``impl=`` accepts for `op` on this device type, best first."""
    on_request = tuple(name for name in ON_REQUEST.get(device_type, ()) if name in names(op))
    return TABLE[op].get(device_type, ("reference",)) + on_request


def checked(impl: str) -> str:
    """A model's `impl`; raises ValueError for another name."""
    if impl not in OF_MODELS:
        raise ValueError(f"impl is {impl!r}; choose one of {', '.join(OF_MODELS)}")
    return impl


@assume_constant_result
def of_model(impl: str, op: str, device_type: str) -> str:
    """What a model's `impl` is for one of its operations.

    "reference" is for all of them. "cpp" and "triton" are for those that have it, and the others choose for themselves
    (a product on a GPU is cuBLAS's either way).

    Raises ImplementationUnavailable where no operation has it on this kind of device.
    """
    if impl in ("auto", "reference"):
        return impl
    if not any(impl in implementations(name, device_type) for name in TABLE):
        raise ImplementationUnavailable(f"impl={impl!r} runs nothing on a {device_type} device; use impl='auto'")
    return impl if impl in implementations(op, device_type) else "auto"


def unavailable(impl: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str | None:
    """Why `impl` cannot run on this device and dtype, with the fix; None when it can.

    index: of the device; None is the current one.
    """
    if impl == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"{impl} kernels take float32, bfloat16 and float16, not {dtype}; use impl='reference'"
    if impl == "aten":
        return None
    if impl == "cpp":
        return _extension_missing()
    if impl == "cuda":
        return _cuda_missing() or card_refusal(index) or _extension_missing()
    if missing := triton_missing():
        return missing
    if device_type == "cuda":
        return card_refusal(index, dtype)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return "triton needs a CUDA device (TRITON_INTERPRET=1 runs its interpreter on the CPU, for tests)"


@functools.cache
def card_refusal(index: int | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Why no kernel runs on a GPU, in `dtype` where it is given, with the fix; None where they do, or without a GPU."""
    if not torch.cuda.is_available():
        return None
    from gpt2_fast.kernels import cards

    return cards.refusal(torch.cuda.current_device() if index is None else index, dtype)


@functools.cache
def _warn_of_card(reason: str) -> None:
    """Once for each reason: one line."""
    warnings.warn(f"gpt2_fast: {reason}; that is what runs now", RuntimeWarning, stacklevel=2)


def _slower(op: str, impl: str, dtype: torch.dtype) -> str | None:
    """Why an implementation that could run is not the first choice on this processor; None when it is."""
    if (op, impl) == ("linear", "cpp") and not cpu_policy().takes_own(dtype, extension().isa()):
        return f"{cpu_policy().float32}'s products are faster on this processor, or ours are not measured there"
    return None


def choose(op: str, impl: str, device: torch.device, dtype: torch.dtype) -> str:
    """The implementation of `op` that runs for tensors on `device` of `dtype`.

    Args:
        op: a key of TABLE.
        impl: "auto", or the name of one implementation, which then runs or raises.

    Raises:
        ValueError: `impl` is no implementation of `op` on this device.
        ImplementationUnavailable: `impl` was named and cannot run; the message says what is missing.
    """
    return _constant_choice(op, impl, device.type, dtype, device.index)


@assume_constant_result
def _constant_choice(op: str, impl: str, device_type: str, dtype: torch.dtype, index: int | None) -> str:
    """torch.compile takes the answer as a constant: how it is found would break its graph."""
    return _choice(op, impl, device_type, dtype, index)


@functools.cache
def _choice(op: str, impl: str, device_type: str, dtype: torch.dtype, index: int | None = None) -> str:
    accepted = implementations(op, device_type)
    if impl == "auto":
        chosen, passed = explain(op, torch.device(device_type, index), dtype)
        reasons = dict(passed).values()
        if any(reason == _extension_missing() for reason in reasons):
            _warn_without_extension()
        if device_type == "cuda" and (reason := card_refusal(index, dtype)) and reason in reasons:
            _warn_of_card(reason)
        return chosen
    if impl not in accepted:
        raise ValueError(f"{op}: no implementation {impl!r} on {device_type}; choose auto, {', '.join(accepted)}")
    reason = unavailable(impl, device_type, dtype, index)
    if reason is not None:
        raise ImplementationUnavailable(f"{op}: impl={impl!r} cannot run: {reason}")
    return impl


def explain(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, list[tuple[str, str]]]:
    """What ``impl="auto"`` chooses, and for each implementation before it why it was passed over."""
    passed = []
    for name in TABLE[op].get(device.type, ("reference",)):
        reason = unavailable(name, device.type, dtype, device.index) or _slower(op, name, dtype)
        if reason is None:
            return name, passed
        passed.append((name, reason))
    raise AssertionError("the reference always runs")


@functools.cache
def extension():
    """The C++ extension module ``gpt2_fast._C``; ImportError when it was not built, or does not load.

    torch is imported first (above), so that both share one OpenMP runtime.
    """
    _C = importlib.import_module(f"{sources.__package__}._C")
    sources.warn_if_stale(_C)
    _C.set_dtype_codes({**DTYPE_CODES, **OTHER_CODES})
    isa = os.environ.get("GPT2_FAST_ISA")
    if isa:
        _C.set_isa(isa)
    return _C


@functools.cache
def _extension_missing() -> str | None:
    try:
        extension()
    except ModuleNotFoundError as error:
        if why := sources.why_no_extension(sys.modules[sources.__package__].__path__):
            return f"this was installed without the C++ extension: {why}; then {AGAIN}"
        return f"the C++ extension is not built ({error}); run: pip install -e ."
    except ImportError as error:
        if "libgomp" in str(error):
            return f"the C++ extension finds no OpenMP, and this torch brings none ({error}); install libgomp1"
        return f"the C++ extension does not load ({error}); {AGAIN}"
    return None


@functools.cache
def _warn_without_extension() -> None:
    """Once a process: nobody should take the reference's speed for the package's."""
    reason = _extension_missing()
    warnings.warn(f"plain PyTorch runs in place of the C++ kernels: {reason}", RuntimeWarning, stacklevel=2)


@functools.cache
def triton_missing() -> str | None:
    """Why there is no Triton, with the fix; None when there is one.

    torch's CUDA wheels require one version of it, so no other one is ever advised; its CPU builds require none.
    """
    if importlib.util.find_spec("triton") is not None:
        return None
    try:
        requirements = importlib.metadata.requires("torch") or []
    except importlib.metadata.PackageNotFoundError:  # torch built from source, without metadata
        requirements = []
    required = next((found[1] for r in requirements if (found := re.match(r"triton *== *([^ ;,)]+)", r))), None)
    if required:
        return f"triton is not installed; torch {torch.__version__} requires it, run: pip install triton=={required}"
    return (
        f"triton is not installed, and torch {torch.__version__} does not require it; a CUDA build of torch brings the "
        "one that fits (for the tests and gpt2-fast doctor --kernels without one: pip install '.[test]')"
    )


@functools.cache
def _cuda_missing() -> str | None:
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU"
    if torch.version.hip is not None:
        return f"cuda kernels are for NVIDIA's cards, and this torch is built for ROCm {torch.version.hip}"
    return None


def address(tensor: torch.Tensor | None) -> int:
    """The raw address that a C++ kernel takes; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
