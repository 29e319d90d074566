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
"""

from __future__ import annotations

import torch
from torch import Tensor

from gpt2_fast.ops.runtime import buffers, dispatch, philox
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP, DECODE = "attention", "attention_decode"
HEAD_MIN, HEAD_MAX = 16, 128
KEY_GROUP = 256  # keys of one backward task and of one split in decoding, as in csrc


def visible_keys(T: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each query sees: bool [T, T], or [B, 1, T, T] with segments."""
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    if segments is None:
        return causal
    document = torch.where(segments < 0, ~segments, segments)
    return causal & (document[:, None, :, None] == segments[:, None, None, :])


def keep_mask(B: int, T: int, H: int, dropout_p: float, rng: Tensor, site: int) -> Tensor:
    """The dropout mask, bool [B, H, T, T]: coordinates z = b H + h, row = query, column = key."""
    return philox.keep_tiles(rng, site, B * H, T, dropout_p).view(B, H, T, T)


def attention_reference(
    qkv: Tensor,
    *,
    scale: float | None = None,
    segments: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """What is correct: see `attention`. Any device and floating dtype, under autograd."""
    B, T, _, H, D = qkv.shape
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))  # (B, H, T, D)
    hidden = ~visible_keys(T, segments, qkv.device)
    scores = (q @ k.transpose(2, 3)) * (D**-0.5 if scale is None else scale)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    # Masked once more: a query that sees nothing would otherwise weigh all keys alike.
    probabilities = scores.softmax(-1).masked_fill(hidden, 0.0)
    if dropout_p > 0.0:
        keep = keep_mask(B, T, H, dropout_p, rng, site)
        probabilities = (probabilities * philox.scale(dropout_p)).masked_fill(~keep, 0.0)
    return (probabilities @ v).transpose(1, 2)


def attention_decode_reference(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, starts: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """What is correct: see `attention_decode`. Any device and floating dtype."""
    j = torch.arange(k_cache.shape[2], device=q.device)
    hidden = ~((j >= starts.view(-1, 1, 1)) & (j < lengths.view(-1, 1, 1)))  # (B, 1, S)
    scores = (k_cache @ q.unsqueeze(-1)).squeeze(-1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    probabilities = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1).masked_fill(hidden, 0.0)
    return (probabilities.unsqueeze(2) @ v_cache).squeeze(2)


def segments_from(attention_mask: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
    """The int32 `segments` [B, T] of a transformers attention_mask [B, T] (1 token, 0 padding on either side)
    and/or document ids [B, T] (integers >= 0; without them a row is one document).

    Raises ValueError when both are None or the shapes are not the same [B, T].
    """
    given = [t for t in (attention_mask, document_ids) if t is not None]
    if not given:
        raise ValueError("segments_from: attention_mask and document_ids are both None; pass one, or no segments")
    shapes = [tuple(t.shape) for t in given]
    if len(shapes[0]) != 2 or len(set(shapes)) != 1:
        raise ValueError(f"segments_from: shapes {shapes}; attention_mask and document_ids must be [B, T]")
    if document_ids is None:
        return attention_mask.ne(0).to(torch.int32) - 1
    documents = document_ids.to(torch.int32)
    return documents if attention_mask is None else torch.where(attention_mask != 0, documents, ~documents)


define(
    "attention(Tensor qkv, Tensor? segments, float scale, float dropout_p, Tensor? rng, int site, str impl)"
    " -> (Tensor out, Tensor lse)"
)
define(
    "attention_backward(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor? segments, float scale,"
    " float dropout_p, Tensor? rng, int site, str impl) -> Tensor"
)
define(
    "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor starts, Tensor lengths, float scale, str impl)"
    " -> Tensor"
)


@torch.library.register_fake("gpt2_fast::attention")
def _empty_forward(qkv, segments, scale, dropout_p, rng, site, impl):
    B, T, _, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


@torch.library.register_fake("gpt2_fast::attention_backward")
def _(dout, qkv, out, lse, segments, scale, dropout_p, rng, site, impl):
    return qkv.new_empty(qkv.shape)


@torch.library.register_fake("gpt2_fast::attention_decode")
def _(q, k_cache, v_cache, starts, lengths, scale, impl):
    return q.new_empty(q.shape)


def _forward_cpp(qkv, scale, segments, dropout_p, rng, site):
    B, T, _, H, D = qkv.shape
    out, lse = buffers.empty(qkv, (B, T, H, D), qkv.dtype), qkv.new_empty(B, H, T, dtype=torch.float32)
    dispatch.extension().attention_forward(
        address(qkv), address(out), address(lse), address(segments), B, T, H, D, scale, DTYPE_CODES[qkv.dtype],
        *philox.arguments(dropout_p, rng, site),
    )  # fmt: skip
    return out, lse


def _backward_cpp(dout, qkv, out, lse, scale, segments, dropout_p, rng, site):
    B, T, _, H, D = qkv.shape
    dqkv, partial = buffers.empty(qkv, qkv.shape, qkv.dtype), None
    groups = -(-T // KEY_GROUP)
    heads = B * H
    if groups > 1 and heads < 2 * torch.get_num_threads():
        # Too few heads to keep the threads busy: the keys of a head are shared out, each leaving its own part of dq.
        partial = lse.new_empty(B, H, groups, T, -(-D // 16) * 16)
    dispatch.extension().attention_backward(
        address(dout), address(qkv), address(out), address(lse), address(segments), address(dqkv), address(partial),
        B, T, H, D, scale, DTYPE_CODES[qkv.dtype], *philox.arguments(dropout_p, rng, site),
    )  # fmt: skip
    return dqkv


def _decode_cpp(q, k_cache, v_cache, starts, lengths, scale):
    B, H, S, D = k_cache.shape
    out = torch.empty_like(q)
    partial = q.new_empty(B, H, -(-S // KEY_GROUP), -(-D // 16) * 16 + 16, dtype=torch.float32)
    dispatch.extension().attention_decode(
        address(q), address(k_cache), address(v_cache), address(out), address(starts), address(lengths),
        address(partial), B, H, S, D, scale, DTYPE_CODES[q.dtype],
    )  # fmt: skip
    return out


def _kernels(impl: str):
    """The forward, backward and decode launchers of `impl`."""
    if impl == "cpp":
        return _forward_cpp, _backward_cpp, _decode_cpp
    from gpt2_fast.kernels import attention, attention_decode

    return attention.forward, attention.backward, attention_decode.decode


@torch.library.impl("gpt2_fast::attention", ("CPU", "CUDA"))
def _(qkv, segments, scale, dropout_p, rng, site, impl):
    segments = None if segments is None else segments.contiguous()
    return _kernels(impl)[0](qkv.contiguous(), scale, segments, dropout_p, rng, site)


@torch.library.impl("gpt2_fast::attention_backward", ("CPU", "CUDA"))
def _(dout, qkv, out, lse, segments, scale, dropout_p, rng, site, impl):
    segments = None if segments is None else segments.contiguous()
    tensors = (t.contiguous() for t in (dout, qkv, out, lse))
    return _kernels(impl)[1](*tensors, scale, segments, dropout_p, rng, site)


@torch.library.impl("gpt2_fast::attention_decode", ("CPU", "CUDA"))
def _(q, k_cache, v_cache, starts, lengths, scale, impl):
    tensors = (t.contiguous() for t in (q, k_cache, v_cache, starts, lengths))
    return _kernels(impl)[2](*tensors, scale)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, segments, scale, dropout_p, rng, site, impl):
        qkv = qkv.contiguous()
        out, lse = torch.ops.gpt2_fast.attention(qkv, segments, scale, dropout_p, rng, site, impl)
        ctx.save_for_backward(qkv, out, lse, segments, rng)
        ctx.options = (scale, dropout_p, site, impl)
        return out

    @staticmethod
    def backward(ctx, dout):
        qkv, out, lse, segments, rng = ctx.saved_tensors
        scale, dropout_p, site, impl = ctx.options
        dqkv = torch.ops.gpt2_fast.attention_backward(dout, qkv, out, lse, segments, scale, dropout_p, rng, site, impl)
        return dqkv, *(None,) * 6


def _check_scale(op: str, scale: float | None, head_dim: int) -> float:
    if scale is not None and not scale > 0.0:
        raise ValueError(f"{op}: scale is {scale}; it must be positive")
    return head_dim**-0.5 if scale is None else scale


def _check_head(op: str, head_dim: int) -> None:
    if not HEAD_MIN <= head_dim <= HEAD_MAX:
        raise ValueError(
            f"{op}: head size {head_dim} is outside {HEAD_MIN} to {HEAD_MAX}, what the kernels take; "
            "use impl='reference'"
        )


def _validate(qkv, segments, dropout_p, rng):
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{OP}: qkv is {tuple(qkv.shape)}; it must be [B, T, 3, H, D]")
    if not qkv.is_floating_point():
        raise ValueError(f"{OP}: qkv is {qkv.dtype}; it must be a floating dtype")
    if qkv.shape[1] == 0:
        raise ValueError(f"{OP}: qkv is {tuple(qkv.shape)}; a sequence has at least one token")
    if segments is not None:
        if segments.shape != qkv.shape[:2] or segments.dtype != torch.int32:
            raise ValueError(
                f"{OP}: segments is {segments.dtype} {tuple(segments.shape)}; it must be int32 "
                f"{tuple(qkv.shape[:2])}, see segments_from"
            )
        if segments.device != qkv.device:
            raise ValueError(f"{OP}: segments is on {segments.device} and qkv on {qkv.device}; use one device")
    philox.check(OP, dropout_p, rng, qkv.device)


def attention(
    qkv: Tensor,
    *,
    scale: float | None = None,
    segments: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    impl: str = "auto",
) -> Tensor:
    """Causal self-attention of packed queries, keys and values, differentiable in qkv.

    Args:
        qkv: [B, T, 3, H, D], T >= 1; D from 16 to 128. Inside `torch.autocast` it is cast to autocast's dtype.
        scale: > 0, of the scores; D ** -0.5 by default.
        segments: int32 [B, T] padding and documents (`segments_from`), or None: all one document.
        dropout_p: probability of dropping a weight; 0 in eval mode.
        rng: int64 [1] key of this forward pass (`philox.new_key`), needed when dropout_p > 0.
        site: which dropout of the model this is.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, T, H, D] in qkv's dtype; 0 where a query sees nothing.

    Raises:
        ValueError: shapes, dtypes, devices, scale or dropout_p that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate(qkv, segments, dropout_p, rng)
    scale = _check_scale(OP, scale, qkv.shape[-1])
    if torch.is_autocast_enabled(qkv.device.type):
        qkv = qkv.to(torch.get_autocast_dtype(qkv.device.type))
    name = dispatch.choose(OP, impl, qkv.device, qkv.dtype)
    if name == "reference":
        return attention_reference(
            qkv, scale=scale, segments=segments, dropout_p=dropout_p, rng=rng, site=site
        )  # fmt: skip
    _check_head(OP, qkv.shape[-1])
    return _Attention.apply(qkv, segments, scale, dropout_p, rng, site, name)


def _validate_decode(q, k_cache, v_cache, starts, lengths):
    if q.dim() != 3 or k_cache.dim() != 4:
        raise ValueError(
            f"{DECODE}: q is {tuple(q.shape)} and k_cache {tuple(k_cache.shape)}; "
            "they must be [B, H, D] and [B, H, S, D]"
        )
    B, H, S, D = k_cache.shape
    if q.shape != (B, H, D) or v_cache.shape != k_cache.shape or S == 0:
        raise ValueError(
            f"{DECODE}: q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)} and v_cache {tuple(v_cache.shape)} "
            "do not fit; they must be [B, H, D] and twice [B, H, S, D]"
        )
    for name, t in (("k_cache", k_cache), ("v_cache", v_cache)):
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"{DECODE}: {name} is {t.dtype} on {t.device} and q {q.dtype} on {q.device}")
    for name, t in (("starts", starts), ("lengths", lengths)):
        if t.shape != (B,) or t.dtype != torch.int32 or t.device != q.device:
            raise ValueError(
                f"{DECODE}: {name} is {t.dtype} {tuple(t.shape)} on {t.device}; it must be int32 ({B},) on {q.device}"
            )


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
        q: [B, H, D].
        k_cache, v_cache: [B, H, S, D] in q's dtype.
        starts, lengths: int32 [B]; sequence b sees the keys starts[b] <= j < lengths[b] <= S.
        scale: > 0, of the scores; D ** -0.5 by default.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, H, D] in q's dtype; 0 where a sequence sees nothing.

    Raises:
        ValueError: shapes, dtypes, devices or scale that do not fit.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    _validate_decode(q, k_cache, v_cache, starts, lengths)
    scale = _check_scale(DECODE, scale, q.shape[-1])
    name = dispatch.choose(DECODE, impl, q.device, q.dtype)
    if name == "reference":
        return attention_decode_reference(q, k_cache, v_cache, starts=starts, lengths=lengths, scale=scale)
    _check_head(DECODE, q.shape[-1])
    return torch.ops.gpt2_fast.attention_decode(q, k_cache, v_cache, starts, lengths, scale, name)


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
        ((2, 17, 3, 2, 20), {"segments": segments_from(masks["left"]), "dropout_p": 0.2}),
        ((2, 63, 3, 1, 64), {"segments": segments_from(masks["right"]), "scale": 0.3}),
        ((1, 129, 3, 2, 80), {"segments": segments_from(document_ids=masks["documents"])}),
        ((1, 129, 3, 1, 128), {"dropout_p": 0.1}),
    ]:
        qkv = torch.randn(shape, generator=generator).to(device, dtype)
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
        if "dropout_p" in options:
            options |= {"rng": torch.tensor([0x1234_5678_9ABC_DEF0], device=device), "site": 4}
        yield qkv, options


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
