"""Causal self-attention on the packed projection qkv [B, T, 3, H, D], and one query against a KV cache.

    S = scale Q K^T    P = softmax(S over visible keys)    O = dropout(P) V    lse = log sum exp S

Query i sees key j iff j <= i, j is no padding and both lie in one document. `segments` says so, int32 [B, T]: a
value >= 0 is a token of that document; a value < 0 is padding, which as a query belongs to document ~value and
as a key is invisible. A query that sees nothing has output 0 and no gradient. transformers' attention_mask hides
keys in the same way and leaves the rows of padding queries undefined.

Backward, with delta = rowsum(dO * O) (Dao, FlashAttention-2, 2023, arXiv:2307.08691):

    dV = dropout(P)^T dO    dP = dropout'(dO V^T)    dS = P (dP - delta)    dQ = scale dS K    dK = scale dS^T Q

Saved for backward: qkv, O, and lse [B, H, T] in float32; P and its dropout mask are computed again, tile by tile.
Heads are read in place and dqkv is written packed: none of the usual transposes and copies.

Precision: float32 holds an lse of 1e6 to within 0.03 only, and P is wrong by as much. So on a CPU backward computes any
lse beyond 2840 again, and scores of any finite size are right. The Triton kernels do not: their gradients degrade with
scores above 1e5 or so, and overflow from 1e9 on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import cpp, dispatch
from gpt2_fast.ops.runtime.contract import FLOAT, Input
from gpt2_fast.ops.runtime.declare import Backend, Op, autocast
from gpt2_fast.ops.runtime.memory import round_up
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout, keep_tiles

HEAD_MIN, HEAD_MAX = 16, 128


def visible_keys(T: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [T, T], or [B, 1, T, T] with segments."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments is None:
        return causal
    document = torch.where(segments < 0, ~segments, segments)
    return causal & (document[:, None, :, None] == segments[:, None, None, :])


def keep_mask(B: int, T: int, H: int, dropout: Dropout) -> Tensor:
    """The dropout mask, bool [B, H, T, T]: coordinates z = b H + h, row = query, column = key."""
    return keep_tiles(dropout.key, dropout.site, B * H, T, dropout.p).view(B, H, T, T)


def attention_reference(
    qkv: Tensor,
    segments: Tensor | None = None,
    *,
    scale: float | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """What is correct: see `attention`. Any device and floating dtype, under autograd."""
    B, T, _, H, D = qkv.shape
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
    hidden = ~visible_keys(T, segments, qkv.device)
    scores = (q @ k.transpose(2, 3)) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    # Masked once more: a query that sees nothing would otherwise weigh all keys alike.
    probabilities = scores.softmax(-1).masked_fill(hidden, 0.0)
    if dropout.p > 0.0:
        probabilities = (probabilities * dropout.scale).masked_fill(~keep_mask(B, T, H, dropout), 0.0)
    return (probabilities @ v).transpose(1, 2)


def attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, starts: Tensor, lengths: Tensor, *, scale: float | None = None
) -> Tensor:
    """What is correct: see `attention_decode`. Any device and floating dtype."""
    j = torch.arange(k_cache.shape[2], device=q.device)
    hidden = ~((j >= starts.view(-1, 1, 1)) & (j < lengths.view(-1, 1, 1)))  # (B, 1, S)
    with torch.autocast(q.device.type, enabled=False):  # what is cached has its dtype
        scores = (k_cache @ q.unsqueeze(-1)).squeeze(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
        probabilities = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
        return (probabilities.unsqueeze(2) @ v_cache).squeeze(2)


def segments_from(attention_mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """The int32 `segments` [B, T] of a transformers attention_mask [B, T] (1 token, 0 padding on either side)
    and/or document ids [B, T] (whole numbers from 0 to 2^31 - 1; without them a row is one document).

    Raises ValueError when both are None, the shapes are not the same [B, T], or document ids are no such numbers. Their
    values are looked at without waiting: on a GPU, and where they are traced, what is wrong is an assertion's error.
    """
    given = [t for t in (attention_mask, document_ids) if t is not None]
    if not given:
        raise ValueError("segments_from: attention_mask and document_ids are both None; pass one, or no segments")
    shapes = [tuple(t.shape) for t in given]
    if len(shapes[0]) != 2 or shapes[0] != shapes[-1]:  # no set of them: symbolic sizes have no hash
        raise ValueError(f"segments_from: shapes {shapes}; attention_mask and document_ids must be [B, T]")
    if document_ids is None:
        return attention_mask.ne(0).to(torch.int32) - 1
    _check_documents(document_ids)
    documents = document_ids.to(torch.int32)
    return documents if attention_mask is None else torch.where(attention_mask != 0, documents, ~documents)


def _check_documents(ids: Tensor) -> None:
    """int32 would take numbers that are 2^32 apart for one, and a number below 0 says padding."""
    if ids.is_floating_point() or ids.is_complex():
        raise ValueError(f"document_ids is {ids.dtype}; documents are whole numbers: pass int64")
    if ids.dtype in (torch.bool, torch.uint8) or torch._C._are_functorch_transforms_active():
        return
    inside = ids >= 0
    if ids.dtype.itemsize > 4:
        inside = inside & (ids <= 2**31 - 1)
    if ids.is_cpu and not torch.compiler.is_compiling():
        if not inside.all():
            row, column = (~inside).nonzero()[0].tolist()
            raise ValueError(
                f"document_ids[{row}, {column}] is {int(ids[row, column])}; number the documents of a row from 0 on"
            )
    else:
        torch._assert_async(inside.all(), "document_ids has a number that is not in 0 to 2^31 - 1")


def _scale(a) -> float:
    return a.D**-0.5 if a.scale is None else a.scale


def _groups(keys: int) -> int:
    return -(-keys // dispatch.extension().ATTENTION_KEY_GROUP)


def _forward_cpp(a, out):
    cpp.attention_forward(out, a, scale=_scale(a))


def _backward_cpp(a, out):
    partial, groups, heads = None, _groups(a.T), a.B * a.H
    if groups > 1 and heads < 2 * torch.get_num_threads():
        # Too few heads to keep the threads busy: the keys of a head are shared out, each leaving its own part of dq.
        partial = a.lse.new_empty(a.B, a.H, groups, a.T, round_up(a.D, 16))
    cpp.attention_backward(out, a, scale=_scale(a), partial=partial)


def _forward_triton(a, out):
    from gpt2_fast.kernels import attention as kernel

    out.out, out.lse = kernel.forward(a.qkv, _scale(a), a.segments, *a.dropout)


def _backward_triton(a, out):
    from gpt2_fast.kernels import attention as kernel

    out.dqkv = kernel.backward(a.dout, a.qkv, a.out, a.lse, _scale(a), a.segments, *a.dropout)


def _decode_cpp(a, out):
    partial = a.q.new_empty(a.B, a.H, _groups(a.S), round_up(a.D, 16) + 16, dtype=torch.float32)
    cpp.attention_decode(out, a, scale=_scale(a), partial=partial)


def _decode_triton(a, out):
    from gpt2_fast.kernels import attention_decode as kernel

    out.out = kernel.decode(a.q, a.k_cache, a.v_cache, a.starts, a.lengths, _scale(a))


def head_refused(head_dim: int) -> str | None:
    """Why no kernel takes heads of this size; None where they do."""
    if HEAD_MIN <= head_dim <= HEAD_MAX:
        return None
    return f"head size {head_dim} is outside {HEAD_MIN} to {HEAD_MAX}, what the kernels take"


def check_scale(op: str, scale: float | None) -> None:
    """Raises ValueError for a factor of the scores that is no positive number."""
    if isinstance(scale, (float, int)) and not 0.0 < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale}; it must be positive and finite, or None for D ** -0.5")


OP = Op(
    "attention",
    inputs=(Input("qkv", "B T 3 H D", FLOAT), Input("segments", "B T", (torch.int32,), optional=True)),
    options={"scale": float | None, "dropout": Dropout},
    limits=lambda qkv, segments, **_: head_refused(qkv.shape[-1]),
    reference=attention_reference,
    outputs=lambda a: {"out": ((a.B, a.T, a.H, a.D), a.qkv.dtype), "lse": ((a.B, a.H, a.T), torch.float32)},
    output_names=("out", "lse"),
    returns=("out",),
    saved={"qkv": "B T 3 H D", "segments": "B T", "out": "B T H D", "lse": "B H T"},
    gradients=lambda a: {"dqkv": (a.qkv.shape, a.qkv.dtype)},
    backends={"cpp": Backend(_forward_cpp, _backward_cpp), "triton": Backend(_forward_triton, _backward_triton)},
    on={"cpu": ("cpp",), "cuda": ("triton",)},
)

DECODE = Op(
    "attention_decode",
    inputs=(
        Input("q", "B H D", FLOAT),
        Input("k_cache", "B H S D"),
        Input("v_cache", "B H S D"),
        Input("starts", "B", (torch.int32,)),
        Input("lengths", "B", (torch.int32,)),
    ),
    options={"scale": float | None},
    limits=lambda q, *_, **__: head_refused(q.shape[-1]),
    reference=attention_decode_reference,
    outputs=lambda a: {"out": (a.q.shape, a.q.dtype)},
    output_names=("out",),
    returns=("out",),
    backends={"cpp": Backend(_decode_cpp), "triton": Backend(_decode_triton)},
    on={"cpu": ("cpp",), "cuda": ("triton",)},
)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    segments: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    impl: str = "auto",
) -> Tensor:
    """Causal self-attention of packed queries, keys and values, differentiable in qkv.

    Args:
        qkv: [B, T, 3, H, D]; kernels take D from 16 to 128, and for others "auto" is the reference. Inside
            `torch.autocast` it is cast to autocast's dtype.
        scale: > 0, of the scores; D ** -0.5 by default.
        segments: int32 [B, T] padding and documents (`segments_from`), or None: all one document.
        dropout: of the weights.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, T, H, D] in qkv's dtype; 0 where a query sees nothing.

    Raises:
        ValueError: shapes, dtypes, devices, scale or dropout that do not fit; a head size that the named `impl` does
            not take.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    check_scale("attention", scale)
    (qkv,) = autocast(qkv)
    return OP(qkv, segments, scale=scale, dropout=dropout, impl=impl)


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    starts: Tensor,
    lengths: Tensor,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """One query a head against cached keys and values. No gradient.

    Args:
        q: [B, H, D]; D as in `attention`.
        k_cache, v_cache: [B, H, S, D] in q's dtype.
        starts, lengths: int32 [B]; sequence b sees the keys starts[b] <= j < lengths[b] of the S there are: what
            points outside of the cache is not read.
        scale: > 0, of the scores; D ** -0.5 by default.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, H, D] in q's dtype; 0 where a sequence sees nothing.

    Raises:
        ValueError: shapes, dtypes, devices or scale that do not fit; a head size that the named `impl` does not take.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    check_scale("attention_decode", scale)
    return DECODE(q, k_cache, v_cache, starts, lengths, scale=scale, impl=impl)


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (qkv, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    masks = {
        "left": torch.tensor([[0] * 5 + [1] * 12, [1] * 17]),
        "right": torch.tensor([[1] * 40 + [0] * 23, [1] * 63]),
        "documents": torch.tensor([[0] * 30 + [4] * 70 + [5] * 29]),
    }
    for shape, options in [
        ((2, 1, 3, 2, 16), {}),
        ((2, 17, 3, 2, 20), {"segments": segments_from(masks["left"]), "dropout": 0.2}),
        ((2, 63, 3, 1, 64), {"segments": segments_from(masks["right"]), "scale": 0.3}),
        ((1, 129, 3, 2, 80), {"segments": segments_from(document_ids=masks["documents"])}),
        ((1, 129, 3, 1, 128), {"dropout": 0.1}),
    ]:
        qkv = torch.randn(shape, generator=generator).to(device, dtype)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        if "dropout" in options:
            key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device)
            options["dropout"] = Dropout(options["dropout"], key, 4)
        yield qkv, options


def decode_samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (q, k_cache, v_cache, options) of `attention_decode`, smallest first; one of three sees nothing."""
    generator = torch.Generator().manual_seed(0)
    for B, H, S, D, scale in [(1, 2, 1, 16, None), (3, 1, 7, 20, 0.3), (3, 2, 131, 64, None)]:
        shapes = ((B, H, D), (B, H, S, D), (B, H, S, D))
        tensors = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
        starts, lengths = torch.tensor([0, S // 3, S][:B]), torch.tensor([S, max(S - 1, 1), S][:B])
        bounds = {"starts": starts.to(device, torch.int32), "lengths": lengths.to(device, torch.int32)}
        yield (*tensors, bounds | {"scale": scale})


def cost(B: int, T: int, H: int, D: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call each way: every input and output once, lse in float32, and of the products (two
    forward, five backward) the visible pairs of query and key alone."""
    size, lse, pairs = B * T * H * D * itemsize, 4 * B * H * T, B * H * T * (T + 1) // 2
    return {
        "forward": {"bytes": 4 * size + lse, "flops": 4 * D * pairs},
        "backward": {"bytes": 8 * size + lse, "flops": 10 * D * pairs},
    }


def decode_cost(B: int, H: int, keys: int, D: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one `attention_decode` whose sequences see `keys` keys each."""
    return {
        "forward": {"bytes": itemsize * B * H * D * (2 * keys + 2) + 8 * B, "flops": 4 * B * H * keys * D},
    }
