"""draw: a token of each row of logits, at a given place in the cumulated probabilities of those that are kept.

    kept = the top_k largest logits and all as large as the last of them
    p    = softmax(kept / temperature)
    kept = of these, the most likely first, those before which p sums to less than top_p; at least one
    the token is the first, in the vocabulary's order, up to which the kept p sum to more than uniform * their sum

Without uniform numbers it is the most likely token, of equals the first. No gradient.

torch passes over the vocabulary once for each of these operations, sorts where one of a hundred tokens counts, and
finds the caches cold after a decode step. On a CPU this is one call into C++ that reads the logits one to three times.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.contract import check_dense

OP = "draw"
dispatch.TABLE[OP] = {"cuda": ("reference",), "cpu": ("cpp", "reference")}


def draw_reference(
    logits: Tensor,
    uniform: Tensor | None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """What is correct: see `draw`. Any device and floating dtype; sums of probabilities are float32 or wider."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    highest = logits.amax(-1)  # NaN, where one of them is
    if uniform is None:
        return logits.argmax(-1), highest.float()
    probabilities = kept(cooled(logits, temperature), top_k, top_p).softmax(-1)
    # In float64 uniform * total stays below total, so the first sum above it belongs to a token that can be drawn.
    cumulated = probabilities.double().cumsum(-1)
    token = torch.searchsorted(cumulated, (uniform * cumulated[:, -1]).unsqueeze(1), right=True).squeeze(1)
    return token, highest.float()


COLD = 0.01  # a temperature below which a logit over it may be infinite; in csrc/draw.cpp too


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature; near 0, where that is infinite, less their largest, which leaves the same probabilities."""
    if temperature >= COLD:
        return logits / temperature
    below = logits - logits.amax(-1, keepdim=True)
    return torch.where(below == 0, below, below / temperature)


def kept(logits: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    """Logits [B, V], -inf where top_k and then top_p leave a token out."""
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    if top_p is None or top_p >= 1.0:
        return logits
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= top_p
    beyond[:, 0] = False  # however small top_p is, one is kept
    return logits.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)


class Scratch:
    """Memory that a call needs, made at its first use and kept for the next: a token costs less than new pages."""

    def __init__(self) -> None:
        self.held: Tensor | None = None

    def of(self, rows: int, vocab_size: int) -> tuple[Tensor, int]:
        """float32 [threads, units], and how many threads share `rows`."""
        threads = min(rows, torch.get_num_threads())
        if self.held is None or self.held.shape[0] < threads or self.vocab_size != vocab_size:
            units = torch.empty(1, dtype=torch.int64, device="cpu")
            cpp.draw_scratch(V=vocab_size, units=units)
            self.held = torch.empty(threads, units.item(), dtype=torch.float32, device="cpu")
            self.vocab_size = vocab_size
        return self.held, threads


def options_of(
    vocab_size: int, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> dict[str, float]:
    """The options as the kernels take them: 0 and 1 where all tokens are kept."""
    top_k = 0 if top_k is None or top_k >= vocab_size else int(top_k)
    return {"temperature": temperature, "top_k": top_k, "top_p": 1.0 if top_p is None else top_p}


def _draw_cpp(logits, uniform, temperature, top_k, top_p, scratch: Scratch) -> tuple[Tensor, Tensor]:
    (B, V), logits = logits.shape, logits.detach().resolve_neg().contiguous()
    uniform = None if uniform is None else uniform.detach().resolve_neg().contiguous()
    memory, threads = scratch.of(B, V)
    tokens, highest = torch.empty(B, dtype=torch.int64, device="cpu"), torch.empty(B, dtype=torch.float32, device="cpu")
    cpp.draw(
        options_of(V, temperature, top_k, top_p), logits=logits, uniforms=uniform, B=B, V=V, tokens=tokens,
        highest=highest, scratch=memory, threads=threads,
    )  # fmt: skip
    return tokens, highest


def draw(
    logits: Tensor,
    uniform: Tensor | None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    scratch: Scratch | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Draws a token of each row.

    Args:
        logits: [B, V], a floating dtype, V >= 1; -inf is a token that cannot be drawn.
        uniform: float64 [B] in [0, 1), or None: the most likely token; the options are not looked at then.
        temperature: divides the logits; above 0.
        top_k: keeps the k most likely, at least 1; None keeps all.
        top_p: then keeps the fewest whose probabilities sum to at least p, above 0 (Holtzman et al., 2019,
            arXiv:1904.09751); None keeps all.
        scratch: see `Scratch`; None: memory of the call's own.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        Tokens int64 [B], and the largest logit of each row, float32 [B]: where it is no number the token means nothing.

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(logits, uniform, temperature, top_k, top_p)
    if impl == "auto" and logits.dtype != torch.float32:
        impl = "reference"
    if dispatch.choose(OP, impl, logits.device, logits.dtype) == "reference":
        with torch.no_grad():
            return draw_reference(logits, uniform, temperature, top_k, top_p)
    if logits.dtype != torch.float32:
        raise ValueError(f"{OP}: logits is {logits.dtype}, and the kernel takes float32; use impl='reference'")
    return _draw_cpp(logits, uniform, temperature, top_k, top_p, Scratch() if scratch is None else scratch)


def _validate(logits, uniform, temperature, top_k, top_p) -> None:
    check_dense(OP, "logits", logits)
    if logits.ndim != 2 or not logits.is_floating_point() or 0 in logits.shape:
        raise ValueError(
            f"{OP}: logits is {logits.dtype} {tuple(logits.shape)}; it must be [B, V], floating, neither 0"
        )
    if uniform is not None:
        check_uniforms(OP, "uniform", uniform, logits.shape[:1], logits.device)
        check_options(OP, temperature, top_k, top_p)


def check_uniforms(op: str, name: str, uniforms: Tensor, shape: Sequence[int], device: torch.device) -> None:
    """Raises ValueError for what is not float64 of this shape on this device, or on a CPU not in [0, 1)."""
    check_dense(op, name, uniforms)
    if uniforms.shape != tuple(shape) or uniforms.dtype != torch.float64 or uniforms.device != device:
        raise ValueError(
            f"{op}: {name} is {uniforms.dtype} {tuple(uniforms.shape)} on {uniforms.device}; it must be float64 "
            f"{list(shape)} on {device}"
        )
    if uniforms.is_cpu and not all(0.0 <= u < 1.0 for u in uniforms.flatten().tolist()):
        raise ValueError(f"{op}: {name} is {uniforms.tolist()!r:.200}; each must be at least 0 and below 1")


def check_options(op: str, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a value that `draw` does not take."""
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"{op}: temperature is {temperature}; it must be above 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: top_k is {top_k}; it must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"{op}: top_p is {top_p}; it must be above 0 and at most 1")


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (logits, uniform, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for B, V, scale, options in [
        (1, 1, 1.0, {}), (3, 5, 1.0, {"temperature": 0.5}), (2, 63, 3.0, {"top_k": 1}),
        (3, 130, 3.0, {"temperature": 1.7, "top_k": 129}), (4, 1025, 3.0, {"top_k": 20, "top_p": 0.7}),
        (5, 4097, 0.1, {"top_p": 0.95}), (2, 50257, 3.0, {"temperature": 0.8, "top_k": 50}),
        (3, 50257, 3.0, {"temperature": 0.8, "top_p": 0.9}), (2, 50257, 3.0, {}),
    ]:  # fmt: skip
        logits = torch.randn(B, V, generator=generator) * scale
        uniform = torch.rand(B, generator=generator, dtype=torch.float64)
        yield logits.to(device, dtype), uniform.to(device), options


def cost(n_rows: int, vocab_size: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call: the logits once, a token, a number and a largest logit a row; no products."""
    return {"forward": {"bytes": n_rows * (4 * vocab_size + 8 + 8 + 4), "flops": 0}}
