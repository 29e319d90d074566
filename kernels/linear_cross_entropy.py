"""Softmax cross-entropy of a chunk of logits, its gradient written over them; gradients times the upstream one.

    lse = log(sum(exp(logits))),   loss = lse - logits[label],   dlogits = (softmax - onehot) * row_scale

One program a row and two passes over it: the first keeps a running maximum and a running sum of exponentials
(Milakov, Gimelshein 2018, arXiv:1805.02867), the second writes the gradient where the logits were, so that a
chunk of logits is all the memory there is. A row of 50257 starts at an odd element: tiles begin at the last
16-byte boundary before it, and all but the first and last are read whole.

The second pass finds its row in the L2 where all rows under way fit there, and reads it from memory where they do not.
How many are under way is what the configuration says: a tile of many warps leaves room for few blocks on a
multiprocessor. sm_90's "candidates" are such tiles (configs/linear_cross_entropy.json); what ships was timed.
"""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from . import tuning
from .aot import ARCHS, INTERPRETER, TRITON_DTYPE, AotSpec, config_arch, forms_for, make_spec
from .interpreter import cast
from .launch import launch

# Tiles under way, without which a row waits for each of its tiles: the pipeliner leaves loops without products alone
# unless it is told.
STAGES = tl.constexpr(3)
INTERPRETER_CONFIG = {"BLOCK_V": 64, "num_warps": 4}  # small, so that a test's row crosses tiles


@triton.jit
def softmax_xent_kernel(
    logits_ptr,  # [n, V], rows row_stride apart; dlogits when WRITE_GRAD
    labels_ptr,  # int64 [n]
    losses_ptr,  # float32 [n]
    row_scale_ptr,  # float32 [1] or [n]
    row_stride,
    V,
    ignore_index,
    ROW_SCALE: tl.constexpr,  # whether row_scale has n elements
    WRITE_GRAD: tl.constexpr,
    ALIGN: tl.constexpr,  # elements in 16 bytes
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    kept = label != ignore_index
    valid = kept & (label >= 0) & (label < V)
    start = row * row_stride
    target = tl.load(logits_ptr + start + label, mask=valid, other=0.0).to(tl.float32)
    base = start // ALIGN * ALIGN
    lead = (start - base).to(tl.int32)
    tiles = logits_ptr + base
    cols = tl.arange(0, BLOCK_V)
    end = lead + V

    # Element i of the row is at tile position lead + i. The first tile and what is left past the last whole
    # one are masked; the tiles between them are not, or their loads would not be vectors.
    x = tl.load(tiles + cols, mask=(cols >= lead) & (cols < end), other=float("-inf")).to(tl.float32)
    top = tl.max(x, axis=0)
    sums = tl.exp(x - tl.where(top == float("-inf"), 0.0, top))
    whole = end // BLOCK_V * BLOCK_V
    for at in tl.range(BLOCK_V, whole, BLOCK_V, num_stages=STAGES):
        x = tl.load(tiles + at + cols).to(tl.float32)
        top, sums = _add_tile(x, top, sums)
    if whole > 0 and whole < end:
        x = tl.load(tiles + whole + cols, mask=whole + cols < end, other=float("-inf")).to(tl.float32)
        top, sums = _add_tile(x, top, sums)
    total = tl.sum(sums, axis=0)
    inverse = 1.0 / total

    # A label outside [0, V) has no loss: NaN says so, and its gradient is 0 so that nothing else is lost.
    loss = tl.where(valid, tl.log(total) - (target - top), float("nan"))
    tl.store(losses_ptr + row, tl.where(kept, loss, 0.0))
    if WRITE_GRAD:
        scale = tl.load(row_scale_ptr + (row if ROW_SCALE else 0))
        at_label = (lead + label).to(tl.int32)
        first = (cols >= lead) & (cols < end)
        x = tl.load(tiles + cols, mask=first, other=0.0).to(tl.float32)
        grad = _gradient(x, cols, top, inverse, at_label, scale, valid)
        tl.store(tiles + cols, cast(grad, logits_ptr.dtype.element_ty), mask=first)
        for at in tl.range(BLOCK_V, whole, BLOCK_V, num_stages=STAGES):
            x = tl.load(tiles + at + cols).to(tl.float32)
            grad = _gradient(x, at + cols, top, inverse, at_label, scale, valid)
            tl.store(tiles + at + cols, cast(grad, logits_ptr.dtype.element_ty))
        if whole > 0 and whole < end:
            last = whole + cols < end
            x = tl.load(tiles + whole + cols, mask=last, other=0.0).to(tl.float32)
            grad = _gradient(x, whole + cols, top, inverse, at_label, scale, valid)
            tl.store(tiles + whole + cols, cast(grad, logits_ptr.dtype.element_ty), mask=last)


@triton.jit
def _add_tile(x, top, sums):
    """Maximum so far and, by lane, the sum of exp(logit - maximum), with the tile x added."""
    higher = tl.maximum(top, tl.max(x, axis=0))
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, sums * tl.exp(top - shift) + tl.exp(x - shift)


@triton.jit
def _gradient(x, at, top, inverse, at_label, scale, valid):
    # not exp(x - lse): lse carries the rounding of top, which may be large
    grad = (tl.exp(x - top) * inverse - tl.where(at == at_label, 1.0, 0.0)) * scale
    return tl.where(valid, grad, 0.0)


@triton.jit
def scale_kernel(
    gradient_ptr,  # [numel]
    factor_ptr,  # float32 [1]
    numel,
    BLOCK: tl.constexpr,
):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        for start in tl.range(first, numel, tl.num_programs(0) * BLOCK):
            at = start + tl.arange(0, BLOCK)
            scaled = tl.load(gradient_ptr + at, mask=at < numel, other=0.0).to(tl.float32) * factor
            tl.store(gradient_ptr + at, cast(scaled, gradient_ptr.dtype.element_ty), mask=at < numel)


def softmax_xent_(
    logits: torch.Tensor,
    labels: torch.Tensor,
    losses: torch.Tensor,
    ignore_index: int,
    row_scale: torch.Tensor,
    write_grad: bool,
) -> None:
    """logits [n, V] (unit stride in V) -> losses float32 [n]; with write_grad, dlogits over the logits.

    labels int64 [n]; row_scale float32 [1] or [n]. A row labelled ignore_index has loss 0 and gradient 0. A
    label outside [0, V) gives its row loss NaN and gradient 0; no memory outside the row is touched.
    """
    rows, vocabulary = logits.shape
    if rows == 0:
        return
    if logits.stride(1) != 1:
        raise ValueError("logits must have unit stride over the vocabulary")
    launch(
        softmax_xent_kernel,
        (rows,),
        logits,
        labels,
        losses,
        row_scale,
        logits.stride(0),
        vocabulary,
        ignore_index,
        ROW_SCALE=row_scale.numel() > 1,
        WRITE_GRAD=write_grad,
        ALIGN=16 // logits.element_size(),
        strided=("logits_ptr",),
        **_config(config_arch(logits.device), logits.element_size()),
    )


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """gradient, contiguous, *= factor, float32 [1], in float32; where factor is 1, as it is, without a pass.

    The host need not know the number, so it does not wait for the device.
    """
    if gradient.numel() == 0:
        return
    config = dict(tuning.config("linear_cross_entropy", "scale", config_arch(gradient.device)))
    programs = min(config.pop("programs"), triton.cdiv(gradient.numel(), config["BLOCK"]))
    launch(scale_kernel, (programs,), gradient, factor, gradient.numel(), **config)


def _config(arch: int, itemsize: int) -> dict[str, int]:
    return (
        INTERPRETER_CONFIG
        if arch == INTERPRETER
        else tuning.config("linear_cross_entropy", "softmax_xent", arch, itemsize)
    )


def aot_specs() -> list[AotSpec]:
    """Every dtype, an odd row stride (50257) and an aligned one, with and without the gradient; candidates with it."""
    specs, flags = [], (False, True)
    for arch in ARCHS:
        for dtype, padded in itertools.product(forms_for(arch, TRITON_DTYPE.values()), flags):
            size = 4 if dtype == "fp32" else 2
            specs += [_spec(dtype, size, write_grad, padded, arch, _config(arch, size)) for write_grad in flags]
            for config in tuning.candidates("linear_cross_entropy", "softmax_xent", arch, size):
                tile = f" {config['BLOCK_V']} in {config['num_warps']} warps"
                specs.append(_spec(dtype, size, True, padded, arch, config, tile))
        config = tuning.config("linear_cross_entropy", "scale", arch)
        for dtype in forms_for(arch, TRITON_DTYPE.values()):
            types = {"gradient_ptr": f"*{dtype}", "factor_ptr": "*fp32", "numel": "i32"}
            specs.append(make_spec(scale_kernel, f"scale_gradient {dtype}", types, {}, config, (arch,)))
    return specs


def _spec(
    dtype: str, size: int, write_grad: bool, padded: bool, arch: int, config: dict[str, int], tile: str = ""
) -> AotSpec:
    types = {"logits_ptr": f"*{dtype}", "labels_ptr": "*i64"}
    types |= dict.fromkeys(("losses_ptr", "row_scale_ptr"), "*fp32")
    types |= dict.fromkeys(("row_stride", "V", "ignore_index"), "i32")
    flags = {"ROW_SCALE": False, "WRITE_GRAD": write_grad, "ALIGN": 16 // size}
    sizes = ("V", "ignore_index") if padded else ("V", "ignore_index", "row_stride")
    name = f"softmax_xent {dtype}{' gradient' * write_grad}{' padded' * padded}{tile}"
    return make_spec(softmax_xent_kernel, name, types, flags, config, (arch,), unaligned=sizes)
