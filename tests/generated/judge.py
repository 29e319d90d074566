"""Makes a described call and says what came of it: RIGHT, REFUSED, UNCLEAR or WRONG."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from numerics import TINY, evaluate
from torch import Tensor

from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout

from . import build
from .describe import BY_NAME, Description

RIGHT, REFUSED, UNCLEAR, WRONG = "right", "refused", "unclear", "wrong"
REFUSALS = (ValueError, TypeError, IndexError, ImplementationUnavailable)
# Beside the rule of tests/numerics.py: what a few numbers lose is a matter of luck, what a fault changes is larger.
LUCK = 16


class Outcome(NamedTuple):
    kind: str
    text: str = ""


def refused(op: str, inputs: Sequence[str], error: Exception, valid: bool) -> Outcome:
    """REFUSED where the call was not valid and the message is one line that names the operation and an input."""
    text = f"{type(error).__name__}: {error}"
    if valid:
        return Outcome(UNCLEAR, f"a valid call was refused: {text}")
    if not isinstance(error, REFUSALS) or isinstance(error, UnicodeError):
        return Outcome(UNCLEAR, text)
    named = str(error).startswith(f"{op}: ") and any(re.search(rf"\b{name}\b", str(error)) for name in inputs)
    return Outcome(REFUSED if named and "\n" not in str(error) else UNCLEAR, text)


def differs(actual: Tensor, eager: Tensor, truth: Tensor, dtype: torch.dtype, floor: float = 0.0) -> str | None:
    """How `actual` is wrong, by the rule of tests/numerics.py and LUCK; None where it is right."""
    if actual.shape != truth.shape or actual.dtype != eager.dtype:
        return f"{actual.dtype} {tuple(actual.shape)}, expected {eager.dtype} {tuple(truth.shape)}"
    tiny = max(TINY[dtype], TINY[actual.dtype])
    actual, eager, truth = (t.detach().double() for t in (actual, eager, truth))
    finite = truth.isfinite() & eager.isfinite()
    if not torch.equal(actual.isfinite() | ~finite, torch.ones_like(finite)):
        return "not finite where the reference is"
    if (actual.isfinite() & ~truth.isfinite()).any():
        return "finite where the reference is not"
    actual, eager, truth = (t.where(finite, 0.0) for t in (actual, eager, truth))
    if not actual.numel():
        return None
    error, allowed = (actual - truth).abs().max(), (eager - truth).abs().max()
    bound = LUCK * (allowed + tiny * truth.abs().max() + floor)
    return None if error <= bound else f"error {error:.3e}, eager's {allowed:.3e}, bound {bound:.3e}"


def _dropout(options: dict | None) -> Any:
    if options is None:
        return NO_DROPOUT
    key = options["key"]
    if key == "float":
        key = torch.zeros(1)
    elif key == "two":
        key = torch.zeros(2, dtype=torch.int64)
    elif key == "meta":
        key = torch.zeros(1, dtype=torch.int64, device="meta")
    elif key is not None:
        key = torch.tensor([key])
    return Dropout(options["p"], key, options["site"])


def _arguments(description: Description) -> dict[str, Any]:
    arguments: dict[str, Any] = {name: build.tensor(t) for name, t in description["tensors"].items()}
    for name, value in description["options"].items():
        arguments[name] = _dropout(value) if name == "dropout" else value
    if isinstance(arguments.get("dtype"), str):
        arguments["dtype"] = getattr(torch, arguments["dtype"])
    if description["change"]:
        name, how = description["change"]
        arguments[name] = build.changed(arguments[name], how)
    return arguments


def _gradients_of(arguments: dict[str, Any], names: Sequence[str]) -> list[str]:
    leaves = {name: arguments[name] for name in names}
    return [n for n, t in leaves.items() if isinstance(t, Tensor) and t.is_floating_point() and not t.is_sparse]


def _rstd(x: Tensor, residual: Tensor | None, eps: float) -> float:
    """The largest factor of a LayerNorm of their sum, at least 1."""
    h = x.double() if residual is None else x.double() + residual.double()
    return max(1.0, float((h.var(-1, correction=0) + eps).rsqrt().max())) if h.numel() else 1.0


def _floor(arguments: dict[str, Any], upstream: list[Tensor], dtype: torch.dtype) -> float:
    """What may be left of larger numbers where the truth is 0: a part of LUCK times it.

    Of a head's gradient its rows, where all of them are one. Of a LayerNorm what is left of nearly equal numbers, times
    a large rstd. Of attention's dQ and dK, where a query sees one key or as good as one, dP - delta, and delta is made
    from the rounded output. Of a layer, whose bits are those of its operations (tests/ops/test_block.py), the same.
    """
    tiny, largest = TINY[torch.float32], max((float(t.abs().max()) for t in upstream if t.numel()), default=0.0)
    if "ignore_index" in arguments:
        return tiny * float(arguments["weight"].abs().max()) / LUCK
    if "qkv" in arguments and arguments["qkv"].numel():
        size, D = float(arguments["qkv"].abs().max()), arguments["qkv"].shape[-1]
        return TINY[dtype] * largest * size**2 * (arguments["scale"] or D**-0.5) * max(D / 8, 1.0) / LUCK
    if "c_attn_weight" in arguments:  # attention's, as far as the layer's products magnify it
        matrices = [t for t in arguments.values() if isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point()]
        gains = [max(1.0, float(t.abs().max()) * t.shape[0] ** 0.5) for t in matrices]
        norms = [max(1.0, float(arguments[f"ln_{i}_weight"].abs().max())) for i in (1, 2)]
        gain = math.prod(gains) * gains[0] * math.prod(norms) ** 2
        return TINY[dtype] * largest * gain * _rstd(arguments["m"], arguments["h"], arguments["ln_1_eps"]) / LUCK
    if not isinstance(arguments.get("eps"), float) or not arguments["eps"] > 0.0:
        return 0.0
    # Dropout may leave the residual alone.
    rows = [arguments["x"].double(), 0.0 if arguments["residual"] is None else arguments["residual"].double()]
    streams = [h for h in (rows[0] + rows[1], rows[1]) if isinstance(h, Tensor) and h.numel()]
    rstd = max((float((h.var(-1, correction=0) + arguments["eps"]).rsqrt().max()) for h in streams), default=1.0)
    parameters = [float(t.abs().max()) for t in arguments.values() if isinstance(t, Tensor) and t.numel()]
    return tiny * rstd * max(1.0, *parameters) ** 3


def judge(description: Description) -> Outcome:
    """What comes of a described call of a declared operation."""
    room, arguments = BY_NAME[description["op"]], _arguments(description)
    inputs = [*description["tensors"], *description["options"], "impl", "implementation"]
    names = _gradients_of(arguments, description["grad"])
    first = arguments[room.op.inputs[0].name]
    autocast = description["autocast"]
    inside = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()

    def run(impl: str, dtype: torch.dtype | None = None, upstream=None):
        given = {
            n: t.to(dtype) if dtype and isinstance(t, Tensor) and t.is_floating_point() and not t.is_sparse else t
            for n, t in arguments.items()
        }
        if dtype and "dtype" in given:
            given["dtype"] = None
        leaves = [given[name].detach().requires_grad_() for name in names]
        return evaluate(room.of(given, names, impl), leaves, upstream)

    def outputs_alone():
        with torch.no_grad():
            found = room.call(**arguments, impl="reference")
        return found if isinstance(found, tuple) else (found,)

    try:
        try:
            with inside:
                shapes = outputs_alone()
        except Exception as error:
            with inside:
                run_alone = room.of(arguments, [], description["impl"])
                try:
                    run_alone()
                except Exception as own:
                    return refused(room.name, inputs, own, description["valid"])
            return Outcome(WRONG, f"{description['impl']} runs what the reference refuses: {error}")
        if any(o.device.type == "meta" for o in shapes):
            return Outcome(RIGHT, "meta")
        upstream = [build.tensor({"shape": list(o.shape), "dtype": "float64", **description["upstream"]}).to(o.dtype)
                    for o in shapes]  # fmt: skip
        with inside:
            try:
                actual = run(description["impl"], upstream=upstream)
            except Exception as error:
                return refused(room.name, inputs, error, description["valid"])
            eager = run("reference", upstream=upstream)
        truth = run("reference", torch.float64, upstream)
    except Exception as error:
        return Outcome(UNCLEAR, f"{type(error).__name__}: {error}")
    dtype = torch.bfloat16 if autocast and first.dtype is not torch.float64 else first.dtype
    if room.name == "embedding":
        dtype = first.dtype
    floor = _floor(arguments, upstream, dtype) if description["change"] is None else 0.0
    found = [[*outputs, *gradients] for outputs, gradients in (actual, eager, truth)]
    labels = [*(f"output {i}" for i in range(len(shapes))), *(f"gradient of {name}" for name in names)]
    for label, a, e, t in zip(labels, *found, strict=True):
        if problem := differs(a, e, t, dtype, floor):
            return Outcome(WRONG, f"{label}: {problem}")
    return Outcome(RIGHT)
