"""loss = cross_entropy(x @ weight^T, labels): GPT-2's head and loss, the logits never whole in memory.

    logits = x @ weight^T      lse = log(sum(exp(logits)))      loss_i = lse_i - logits_i[label_i]
    dlogits = (softmax(logits) - onehot(label)) * scale_i       dx = dlogits @ weight     dweight = dlogits^T @ x

Rows are taken a chunk at a time: the chunk's logits, the loss, dlogits in the same memory, then both gradient
products, so what lives is one chunk and dweight (after Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel,
arXiv:2410.10989). For "mean" and "sum" the gradients are therefore made in the forward pass, where scale_i is
known but for the upstream gradient, one number that multiplies them in backward. For "none" scale_i is the upstream
gradient itself: backward makes the chunks of logits again. dweight of several chunks is added up in float32.
The gradients of the forward pass are handed to autograd as they are: there is no second buffer of V * C numbers.

torch keeps logits, their log-softmax and its gradient whole: three times N * V numbers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.runtime import buffers, cpp
from gpt2_fast.ops.runtime.contract import FLOAT, SAME, Input
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.declare import Backend, Op, autocast
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.ops.runtime.library import register
from gpt2_fast.ops.runtime.products import add_product, product

REDUCTIONS = ("mean", "sum", "none")
PIECE = 1 << 22  # elements of a float16 gradient that are scaled at a time
ROW_ALIGNMENT = 64  # a row of logits on a GPU is so many elements long, or a multiple
# Bytes of one chunk of logits: enough rows to keep the products at full speed, since every chunk reads the weight
# twice and reads and writes its gradient.
CHUNK_BYTES = {"cpu": 104 << 20, "cuda": 512 << 20}
GPU_ROWS = 128  # a chunk's rows on a GPU are a multiple: whole tiles of cuBLAS's products


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    num_items: Tensor | float | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """What is correct: see `linear_cross_entropy`. Any device and floating dtype, under autograd."""
    if not torch._C._are_functorch_transforms_active():  # whose tensors have no one value
        _check_labels(labels.reshape(-1), ignore_index, weight.shape[0])
    logits = x.reshape(-1, x.shape[-1]) @ weight.t()
    if logits.dtype in LOW_PRECISION:
        logits = logits.float()
    if reduction == "mean" and num_items is not None:
        total = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction="sum")
        return total / num_items
    loss = F.cross_entropy(logits, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def _check_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Refuses a label outside [0, vocabulary) before anything is computed; on a GPU, at the next sync."""
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    where = f"is outside the vocabulary of {vocabulary} and is not ignore_index {ignore_index}"
    if labels.device.type != "cpu":
        torch._assert_async(~bad.any(), f"linear_cross_entropy: a label {where}")
    elif bad.any():
        i = int(bad.nonzero()[0])
        raise IndexError(f"linear_cross_entropy: label {int(labels[i])} at position {i} {where}")


def chunk_rows(device_type: str, vocabulary: int, itemsize: int, n_rows: int | None = None) -> int:
    """How many rows of logits are in memory at once: CHUNK_BYTES of them at most, and at least one.

    n_rows: how many there are. On a GPU they are then cut into equal chunks but for GPU_ROWS, as a short chunk at the
    end reads weight and gradient as the others do. On a CPU every chunk but the last has all the rows that it may.
    """
    most = max(1, CHUNK_BYTES[device_type] // (vocabulary * itemsize))
    if device_type == "cpu" or n_rows is None or n_rows <= most:
        return most
    step = GPU_ROWS if most >= GPU_ROWS else 1
    chunks = -(-n_rows // (most - most % step))
    return -(-n_rows // (chunks * step)) * step


def _aligned(weight: Tensor) -> Tensor:
    """weight [V, C]; on a GPU with rows of zeros up to a multiple of ROW_ALIGNMENT, so that rows of logits begin there.

    cuBLAS multiplies what does not begin at 16 bytes, as 50257 logits do not, at a seventh of its speed. The logits
    that are too many are 0, and their gradient, which nobody writes, stays 0 in the products.
    """
    missing = -weight.shape[0] % ROW_ALIGNMENT if weight.device.type != "cpu" else 0
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight


def _softmax_xent_cpp(logits, labels, losses, row_scale, ignore_index, write_grad):
    """losses of a chunk and, in place of its logits, dlogits."""
    n, V = logits.shape
    if V > 1 and logits.stride(1) != 1:
        raise ValueError(f"linear_cross_entropy: logits have strides {logits.stride()}; their rows must be contiguous")
    cpp.softmax_xent(
        logits=logits, stride=logits.stride(0), labels=labels, losses=losses,
        dlogits=logits if write_grad else None, row_scale=row_scale, scale_stride=int(row_scale.numel() > 1),
        n=n, V=V, ignore_index=ignore_index,
    )  # fmt: skip


def _softmax_xent_triton(logits, labels, losses, row_scale, ignore_index, write_grad):
    from gpt2_fast.kernels import linear_cross_entropy as kernel

    kernel.softmax_xent_(logits, labels, losses, ignore_index, row_scale, write_grad)


_SOFTMAX_XENT = {"cpp": _softmax_xent_cpp, "triton": _softmax_xent_triton}


def _by_chunks(a, row_scale, need_dx, need_dweight) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """losses [N] float32, and dx and dweight of sum(losses * row_scale), row_scale float32 [1] or [N]."""
    x, weight, labels, dtype = a.x.view(-1, a.C), a.weight, a.labels.view(-1), a.x.dtype
    if x.device.type == "cpu" and not (dtype == torch.bfloat16 and cpu_policy().native_bfloat16):
        x, weight = x.float(), weight.float()  # once, not once a chunk
    weight = _aligned(weight)
    rows = chunk_rows(x.device.type, a.V, x.element_size(), a.N)
    whole = rows >= a.N  # one chunk: nothing is sliced, and nothing copied
    losses = x.new_empty(a.N, dtype=torch.float32)
    dx = buffers.empty(x, x.shape, x.dtype) if need_dx and not whole else None
    dweight = None
    for start in range(0, a.N, rows):
        chunk = slice(start, min(start + rows, a.N))
        x_rows, labels_rows, losses_rows = (x, labels, losses) if whole else (x[chunk], labels[chunk], losses[chunk])
        logits = product(x_rows, weight.t(), by_lines=True)
        scale = row_scale if row_scale.numel() == 1 else row_scale[chunk]
        of_words = logits if logits.shape[1] == a.V else logits[:, : a.V]
        _SOFTMAX_XENT[a.impl](of_words, labels_rows, losses_rows, scale, a.ignore_index, need_dx or need_dweight)
        if need_dx:
            if whole:
                dx = product(logits, weight)
            else:
                dx[chunk] = product(logits, weight)
        if need_dweight and dweight is None:  # the first writes: nothing has to be zero; a single one rounds as well
            dweight = product(logits.t(), x_rows, out_dtype=dtype if whole else torch.float32)
        elif need_dweight:
            add_product(dweight, logits.t(), x_rows)
        del logits, of_words  # before the next chunk's are made
    if need_dweight:
        dweight = dweight.resize_(a.V, a.C).to(dtype)  # no view: who is handed it may add to it
    return losses, None if dx is None else dx.to(dtype).view(a.x.shape), dweight


def _scale(a) -> Tensor:
    """What the sum of the losses is multiplied by, float32 [1], without a host sync."""
    if a.reduction == "sum":
        return torch.ones(1, dtype=torch.float32, device=a.x.device)
    kept = (a.labels != a.ignore_index).sum(dtype=torch.float32) if a.num_items is None else a.num_items
    return 1.0 / kept.reshape(1)


def _gain(a, scale: Tensor) -> Tensor:
    """Power of two by which float16's gradients are kept larger until the upstream gradient is known, float32 [1].

    A mean over many rows would make them vanish below float16's smallest numbers, which the scaled loss of
    torch.amp.GradScaler is there to prevent. A row gets no more than undoes the mean, and all rows together 128: where
    num_items counts other micro-batches too, that is more.
    """
    share = 1.0 if a.num_items is None else scale * a.N  # of the mean, these rows together
    most = torch.minimum(1.0 / scale, 128.0 / share * torch.ones_like(scale))
    return torch.exp2(torch.log2(most.clamp(min=1.0)).floor())


def _outputs(a):
    """scale: of the rows, in gradients made ahead. gain: what they are larger by; float16 alone has it."""
    per_row, one = a.reduction == "none", ((1,), torch.float32)
    needs_x, needs_weight = a.needs["x"] and not per_row, a.needs["weight"] and not per_row
    return {
        "loss": (a.labels.shape if per_row else (), torch.float32),
        "scale": None if per_row else one,
        "gain": one if not per_row and a.x.dtype == torch.float16 else None,
        "dx_ahead": (a.x.shape, a.x.dtype) if needs_x else None,
        "dweight_ahead": (a.weight.shape, a.x.dtype) if needs_weight else None,
    }


def _gradients(a):
    return {
        "dx": (a.x.shape, a.x.dtype) if a.needs["x"] else None,
        "dweight": (a.weight.shape, a.x.dtype) if a.needs["weight"] else None,
    }


def _forward(a, out):
    _check_labels(a.labels.view(-1), a.ignore_index, a.V)
    if a.reduction == "none":
        losses, _, _ = _by_chunks(a, torch.ones(1, dtype=torch.float32, device=a.x.device), False, False)
        out.loss = losses.view(a.labels.shape)
        return
    scale = out.scale = _scale(a)
    if a.x.dtype == torch.float16:
        out.gain = _gain(a, scale)
        out.scale = scale * out.gain
    losses, out.dx_ahead, out.dweight_ahead = _by_chunks(a, out.scale, a.needs["x"], a.needs["weight"])
    # In float64, whose order of addition is lost in the last rounding.
    out.loss = (losses.sum(dtype=torch.float64) * scale[0]).float()


def _backward(a, out):
    row_scale = a.dloss.float().view(-1) if a.reduction == "none" else a.scale
    _, out.dx, out.dweight = _by_chunks(a, row_scale, a.needs["x"], a.needs["weight"])
    if a.reduction != "none":
        out.dx, out.dweight = (None if g is None else _scaled(g, a, True) for g in (out.dx, out.dweight))


def _scale_triton(gradient: Tensor, factor: Tensor) -> None:
    from gpt2_fast.kernels import linear_cross_entropy as kernel

    kernel.scale_(gradient, factor)


_scale_in_place = register(
    "linear_cross_entropy_scale_(Tensor(a!) gradient, Tensor factor) -> ()",
    _scale_triton,
    lambda gradient, factor: None,
)


def _scaled(gradient: Tensor, a, in_place: bool) -> Tensor:
    """In float32 for float16: GradScaler's first factor, 65536, is beyond it."""
    factor = a.dloss if a.gain is None else a.dloss / a.gain
    # The usual upstream gradient is 1. Asking a GPU for its value would wait for it: the kernel asks there.
    if in_place and a.impl == "triton":
        _scale_in_place(gradient, factor.float())
        return gradient
    if in_place and factor.device.type == "cpu" and float(factor) == 1.0:
        return gradient
    if gradient.dtype == torch.float16:  # a piece at a time: the whole in float32 would be twice its memory
        scaled = gradient if in_place else torch.empty_like(gradient)
        for piece, to in zip(gradient.view(-1).split(PIECE), scaled.view(-1).split(PIECE), strict=True):
            to.copy_(piece.float().mul_(factor))
        return scaled
    factor = factor.to(gradient.dtype)
    return gradient.mul_(factor) if in_place else gradient * factor


BOTH = Backend(_forward, _backward)  # they differ in _SOFTMAX_XENT alone

OP = Op(
    "linear_cross_entropy",
    inputs=(
        Input("x", "... C", FLOAT),
        Input("weight", "V C", SAME),
        Input("labels", "...", (torch.int64,)),
        Input("num_items", "", (torch.float32,), optional=True),
    ),
    options={"ignore_index": int, "reduction": str},
    reference=linear_cross_entropy_reference,
    outputs=_outputs,
    output_names=("loss", "scale", "gain", "dx_ahead", "dweight_ahead"),
    returns=("loss",),
    saved={"x": "... C", "weight": "V C", "labels": "...", "scale": "1", "gain": "1"},
    gradients=_gradients,
    ahead=("dx_ahead", "dweight_ahead"),
    scaled=_scaled,
    backends={"cpp": BOTH, "triton": BOTH},
    on={"cpu": ("cpp",), "cuda": ("triton",)},
)


def _one_number(num_items: float | Tensor | None, x: Tensor) -> Tensor | None:
    """num_items as the declaration has it: a float32 scalar, beside x if it was on the CPU."""
    device = getattr(x, "device", None)
    if num_items is None or (isinstance(num_items, Tensor) and num_items.is_complex()):
        return num_items
    if not isinstance(num_items, (float, int, Tensor)):
        raise TypeError(f"linear_cross_entropy: num_items is a {type(num_items).__name__}; it must be one number")
    if not isinstance(num_items, Tensor):
        return torch.full((), float(num_items), dtype=torch.float32, device=device)
    if num_items.numel() != 1 or num_items.layout is not torch.strided:
        raise ValueError(f"linear_cross_entropy: num_items is {tuple(num_items.shape)}; it must be one number")
    one = num_items.detach().to(torch.float32).reshape(())
    return one.to(device) if one.is_cpu else one


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
        float32 (float64 for float64 inputs), a scalar or, for "none", labels' shape with 0 in ignored rows.

    Raises:
        TypeError, ValueError: inputs, shapes, dtypes, devices or a reduction that do not fit.
        IndexError: a label outside the vocabulary (on a GPU: a device assertion, seen at the next sync).
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction is {reduction!r}; choose {', '.join(REDUCTIONS)}")
    if num_items is not None and reduction != "mean":
        raise ValueError(
            f"linear_cross_entropy: num_items is what reduction='mean' divides by; with {reduction!r} pass None"
        )
    x, weight = autocast(x, weight)
    num_items = _one_number(num_items, x)
    return OP(x, weight, labels, num_items, ignore_index=ignore_index, reduction=reduction, impl=impl)


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
