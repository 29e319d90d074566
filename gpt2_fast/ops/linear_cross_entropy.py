"""loss = cross_entropy(x @ weight^T, labels): GPT-2's head and loss, the logits never whole in memory.

    logits = x @ weight^T      lse = log(sum(exp(logits)))      loss_i = lse_i - logits_i[label_i]
    dlogits = (softmax(logits) - onehot(label)) * scale_i       dx = dlogits @ weight     dweight = dlogits^T @ x

Rows are taken a chunk at a time: the chunk's logits, the loss, dlogits in the same memory, then both gradient
products, so what lives is one chunk and dweight (after Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel,
arXiv:2410.10989). For "mean" and "sum" the gradients are therefore made in the forward pass, where scale_i is
known but for the upstream gradient, one number that multiplies them in backward. For "none" scale_i is the upstream
gradient itself: backward makes the chunks of logits again. dweight of several chunks is added up in float32.

torch keeps logits, their log-softmax and its gradient whole: three times N * V numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.linear import add_product, product
from gpt2_fast.ops.runtime import buffers, dispatch
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP = "linear_cross_entropy"
REDUCTIONS = ("mean", "sum", "none")
ROW_ALIGNMENT = 64  # a row of logits on a GPU is so many elements long, or a multiple
# Bytes of one chunk of logits: enough rows to keep the products at full speed, since every chunk reads the weight
# twice and reads and writes its gradient.
CHUNK_BYTES = {"cpu": 104 << 20, "cuda": 512 << 20}


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
) -> Tensor:
    """What is correct: see `linear_cross_entropy`. Any device and floating dtype, under autograd."""
    logits = x.reshape(-1, x.shape[-1]) @ weight.t()
    if logits.dtype in dispatch.LOW_PRECISION:
        logits = logits.float()
    if reduction == "mean" and num_items is not None:
        return F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="sum") / num_items
    loss = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


# losses [N] float32; dx and dweight of sum(losses * row_scale), row_scale float32 [1] or [N], empty if not needed.
define(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor row_scale, int ignore_index, bool need_dx,"
    " bool need_dweight, str impl) -> (Tensor losses, Tensor dx, Tensor dweight)"
)


@torch.library.register_fake("gpt2_fast::linear_cross_entropy")
def _(x, weight, labels, row_scale, ignore_index, need_dx, need_dweight, impl):
    losses = x.new_empty(x.shape[0], dtype=torch.float32)
    dx = x.new_empty(x.shape if need_dx else 0)
    return losses, dx, weight.new_empty(weight.shape if need_dweight else 0)


def _softmax_xent_cpp(logits, labels, losses, row_scale, ignore_index, write_grad):
    """losses of a chunk and, in place of its logits, dlogits."""
    lse = torch.empty_like(losses)
    dispatch.extension().softmax_xent(
        address(logits), address(labels), address(losses), address(lse), address(logits if write_grad else None),
        address(row_scale), 0 if row_scale.numel() == 1 else 1, *logits.shape, ignore_index, DTYPE_CODES[logits.dtype],
    )  # fmt: skip


def _softmax_xent_triton(logits, labels, losses, row_scale, ignore_index, write_grad):
    from gpt2_fast.kernels import linear_cross_entropy as kernel

    kernel.softmax_xent_(logits, labels, losses, ignore_index, row_scale, write_grad)


_SOFTMAX_XENT = {"cpp": _softmax_xent_cpp, "triton": _softmax_xent_triton}


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Refuses a label outside [0, vocabulary) before anything is computed; on a GPU, at the next sync."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if labels.device.type != "cpu":
        message = f"{OP}: a label is outside the vocabulary of {vocabulary} and is not ignore_index {ignore_index}"
        torch._assert_async(~bad.any(), message)
    elif bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(
            f"{OP}: label {int(labels[i])} at position {i} is outside the vocabulary of {vocabulary}"
            f" and is not ignore_index {ignore_index}"
        )


def chunk_rows(device_type: str, vocabulary: int, itemsize: int) -> int:
    """How many rows of logits are in memory at once: CHUNK_BYTES of them, and at least one."""
    return max(1, CHUNK_BYTES[device_type] // (vocabulary * itemsize))


def _aligned(weight: Tensor) -> Tensor:
    """weight [V, C]; on a GPU with rows of zeros up to a multiple of ROW_ALIGNMENT, so that rows of logits begin there.

    cuBLAS multiplies what does not begin at 16 bytes, as 50257 logits do not, at a seventh of its speed. The logits
    that are too many are 0, and their gradient, which nobody writes, stays 0 in the products.
    """
    missing = -weight.shape[0] % ROW_ALIGNMENT if weight.device.type != "cpu" else 0
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


@torch.library.impl("gpt2_fast::linear_cross_entropy", ("CPU", "CUDA"))
def _(x, weight, labels, row_scale, ignore_index, need_dx, need_dweight, impl):
    _check_labels(labels, ignore_index, weight.shape[0])
    dtype = x.dtype
    if x.device.type == "cpu" and not (dtype == torch.bfloat16 and cpu_policy().native_bfloat16):
        x, weight = x.float(), weight.float()  # once, not once a chunk
    x, weight, labels, row_scale = (t.contiguous() for t in (x, weight, labels, row_scale))
    n_rows, vocabulary = x.shape[0], weight.shape[0]
    weight = _aligned(weight)
    rows = chunk_rows(x.device.type, vocabulary, x.element_size())
    losses = x.new_empty(n_rows, dtype=torch.float32)
    dx = buffers.empty(x, x.shape, x.dtype) if need_dx else x.new_empty(0)
    dweight = torch.zeros_like(weight) if need_dweight and not n_rows else weight.new_empty(0)
    for start in range(0, n_rows, rows):
        chunk = slice(start, min(start + rows, n_rows))
        logits = product(x[chunk], weight.t())
        scale = row_scale if row_scale.numel() == 1 else row_scale[chunk]
        of_words = logits[:, :vocabulary]
        _SOFTMAX_XENT[impl](of_words, labels[chunk], losses[chunk], scale, ignore_index, need_dx or need_dweight)
        if need_dx:
            dx[chunk] = product(logits, weight)
        if (
            need_dweight and start == 0
        ):  # the first writes, so nothing has to be zero before; a single one rounds as well
            dweight = product(logits.t(), x[chunk], out_dtype=dtype if rows >= n_rows else torch.float32)
        elif need_dweight:
            add_product(dweight, logits.t(), x[chunk])
        del logits  # before the next chunk's are made
    if need_dweight:
        dweight.resize_(vocabulary, x.shape[1])  # no view: who is handed it may add to it
    return losses, dx.to(dtype), dweight.to(dtype)


def _total(losses: Tensor, scale: Tensor) -> Tensor:
    """sum(losses) * scale, a float32 scalar. In float64, whose order of addition is lost in the last rounding."""
    return (losses.sum(dtype=torch.float64) * scale[0]).float()


def _denominator(labels: Tensor, ignore_index: int, num_items: int | Tensor | None) -> Tensor:
    """What "mean" divides by, float32 [1] on labels' device, without a host sync."""
    if num_items is None:
        return (labels != ignore_index).sum(dtype=torch.float32).reshape(1)
    if isinstance(num_items, Tensor):
        return num_items.detach().to(labels.device, torch.float32).reshape(1)
    return torch.full((1,), float(num_items), device=labels.device)


def _gain(scale: Tensor) -> Tensor:
    """Power of two by which float16's gradients are kept larger until the upstream gradient is known, float32 [1].

    A mean over many rows would make them vanish below float16's smallest numbers, which the scaled loss of
    torch.amp.GradScaler is there to prevent. At most 128, and no more than undoes the mean.
    """
    return torch.exp2(torch.log2((1.0 / scale).clamp(1.0, 128.0)).floor())


def _times(gradient: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    """In float32 for float16: GradScaler's first factor, 65536, is beyond it."""
    if gradient.dtype == torch.float16:
        return (gradient.float() * factor).to(gradient.dtype)
    factor = factor.to(gradient.dtype)
    return gradient.mul_(factor) if in_place else gradient * factor


class _Reduced(torch.autograd.Function):
    """sum(losses) * scale, for "mean" and "sum"."""

    @staticmethod
    def forward(ctx, x, weight, labels, scale, ignore_index, impl):
        ctx.gain, total_scale = None, scale
        if x.dtype == torch.float16:
            ctx.gain = _gain(scale)
            scale = scale * ctx.gain
        losses, dx, dweight = torch.ops.gpt2_fast.linear_cross_entropy(
            x, weight, labels, scale, ignore_index, *ctx.needs_input_grad[:2], impl
        )
        ctx.options = (ignore_index, impl)
        # The gradients are handed over, not copied: saved tensors would still be referenced when autograd decides
        # whether it may keep dweight as weight.grad. A second backward makes them again.
        ctx.traced = torch.compiler.is_compiling()
        ctx.save_for_backward(x, weight, labels, scale, *((dx, dweight) if ctx.traced else ()))
        ctx.gradients = None if ctx.traced else (dx, dweight)
        return _total(losses, total_scale)

    @staticmethod
    def backward(ctx, dloss):
        if ctx.traced:
            gradients = ctx.saved_tensors[4:]
        elif ctx.gradients is not None:
            gradients, ctx.gradients = ctx.gradients, None
        else:
            x, weight, labels, scale = ctx.saved_tensors
            ignore_index, impl = ctx.options
            gradients = torch.ops.gpt2_fast.linear_cross_entropy(
                x, weight, labels, scale, ignore_index, *ctx.needs_input_grad[:2], impl
            )[1:]
        factor = dloss if ctx.gain is None else dloss / ctx.gain
        # The usual upstream gradient is 1; asking a GPU for its value would wait for it.
        scaled = ctx.traced or dloss.device.type != "cpu" or float(factor) != 1.0
        dx, dweight = (
            (_times(g, factor, in_place=not ctx.traced) if scaled else g) if needed else None  # no second V x C numbers
            for g, needed in zip(gradients, ctx.needs_input_grad, strict=False)
        )
        return dx, dweight, *(None,) * 4


class _PerRow(torch.autograd.Function):
    """losses, for "none"."""

    @staticmethod
    def forward(ctx, x, weight, labels, ignore_index, impl):
        ctx.save_for_backward(x, weight, labels)
        ctx.options = (ignore_index, impl)
        one = torch.ones(1, device=x.device)
        return torch.ops.gpt2_fast.linear_cross_entropy(x, weight, labels, one, ignore_index, False, False, impl)[0]

    @staticmethod
    def backward(ctx, dlosses):
        x, weight, labels = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        gradients = torch.ops.gpt2_fast.linear_cross_entropy(
            x, weight, labels, dlosses.float(), ctx.options[0], *need, ctx.options[1]
        )[1:]
        return *(g if needed else None for g, needed in zip(gradients, need, strict=True)), *(None,) * 3


def _validate(x, weight, labels, reduction, num_items):
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"{OP}: x ends in {x.shape[-1]} and weight is {tuple(weight.shape)}; it must be [V, C]")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"{OP}: labels are {tuple(labels.shape)} and x {tuple(x.shape)}; a label for every row")
    if labels.dtype != torch.int64:
        raise ValueError(f"{OP}: labels are {labels.dtype}; they must be int64")
    for name, t in (("weight", weight), ("labels", labels)):
        if t.device != x.device:
            raise ValueError(f"{OP}: {name} is on {t.device} and x on {x.device}; move them to one device")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{OP}: reduction is {reduction!r}; choose {', '.join(REDUCTIONS)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"{OP}: num_items is the denominator of reduction='mean', not of {reduction!r}")
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"{OP}: num_items is {tuple(num_items.shape)}; it must be one number")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits x @ weight^T, which are never whole in memory.

    Args:
        x: [..., C].
        weight: [V, C], in x's dtype (both are cast to autocast's inside `torch.autocast`).
        labels: [...] int64, in [0, V) or ignore_index. Nothing is shifted here.
        ignore_index: rows with this label have no loss and no gradient.
        reduction: "mean" over the rows that are not ignored (nan when there is none, as in F.cross_entropy),
            "sum", or "none".
        num_items: what "mean" divides by instead, a number or a tensor of one: the rows of all micro-batches,
            under gradient accumulation.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        float32, a scalar or, for "none", labels' shape with 0 in ignored rows.

    Raises:
        ValueError: shapes, dtypes, devices or a reduction that do not fit.
        IndexError: a label outside the vocabulary (on a GPU: a device assertion, seen at the next sync).
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(x, weight, labels, reduction, num_items)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.dtype != x.dtype:
        raise ValueError(f"{OP}: weight is {weight.dtype} and x {x.dtype}; they must match")
    name = dispatch.choose(OP, impl, x.device, x.dtype)
    if name == "reference":
        _check_labels(labels.reshape(-1), ignore_index, weight.shape[0])
        return linear_cross_entropy_reference(
            x, weight, labels, ignore_index=ignore_index, reduction=reduction, num_items=num_items
        )
    x_NC, labels_N = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    if reduction == "mean":
        scale = 1.0 / _denominator(labels_N, ignore_index, num_items)
    else:
        scale = torch.ones(1, device=x.device)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        losses = torch.ops.gpt2_fast.linear_cross_entropy(
            x_NC, weight, labels_N, scale, ignore_index, False, False, name
        )[0]
        return losses.view(labels.shape) if reduction == "none" else _total(losses, scale)
    if reduction == "none":
        return _PerRow.apply(x_NC, weight, labels_N, ignore_index, name).view(labels.shape)
    return _Reduced.apply(x_NC, weight, labels_N, scale, ignore_index, name)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (x, weight, labels, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for shape, vocabulary, options in [
        ((1, 20), 7, {"reduction": "mean"}),
        ((3, 1, 96), 130, {"reduction": "sum"}),
        ((3, 5, 20), 77, {"reduction": "none"}),
        ((9, 20), 50, {"reduction": "mean", "num_items": 50}),
        ((65, 96), 517, {"reduction": "mean"}),
    ]:
        x = torch.randn(shape, generator=generator)
        weight = torch.randn(vocabulary, shape[-1], generator=generator) * 0.2
        labels = torch.randint(vocabulary, shape[:-1], generator=generator)
        if labels.numel() > 3:
            labels.view(-1)[[0, 3]] = -100
        yield x.to(device, dtype), weight.to(device, dtype), labels.to(device), options


def cost(n_rows: int, n_embd: int, vocabulary: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of the loss alone ("forward") and of what its two gradients add ("backward").

    Every input and output is counted once; a chunk of logits is no output, though it passes through memory where no
    cache holds it. The FLOPs are those of the products.
    """
    operands = itemsize * (n_rows * n_embd + vocabulary * n_embd)
    flops = 2 * n_rows * n_embd * vocabulary
    return {
        "forward": {"bytes": operands + 8 * n_rows + 4, "flops": flops},
        "backward": {"bytes": operands, "flops": 2 * flops},
    }
