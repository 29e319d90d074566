"""A block of GPT-2 as one call on a CPU: (m, h) -> (m, h), where the stream is h + dropout(m).

    h = h + dropout(m)      y = LayerNorm_1(h)      a = attention(y @ c_attn) @ attn_proj
    h = h + dropout(a)      n = LayerNorm_2(h)      m = gelu(n @ c_fc) @ mlp_proj

The kernels are those of `add_layernorm`, `linear`, `attention` and `mlp`, which have the formulas, and so are the bits;
but without h the two parts of m's gradient are added before they are rounded. What is saved is what those save. Between
the kernels there is C++ in place of Python: a small model's step is a fifth to a quarter shorter for it. On a GPU,
which works on while Python goes ahead, those four are called in turn.

Products are this package's own, or MKL's where `cpu_policy` says so; a CPU with another vendor's is better off with the
four operations: see `takes`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gpt2_fast.ops import add_layernorm, attention, linear, mlp
from gpt2_fast.ops.runtime import blas, buffers, cpp, dispatch, philox
from gpt2_fast.ops.runtime.contract import FLOAT, STRIDED, Input
from gpt2_fast.ops.runtime.cpu_policy import cpu_policy
from gpt2_fast.ops.runtime.declare import Backend, Op, autocasts
from gpt2_fast.ops.runtime.gelu import Gelu, kind_of
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout
from gpt2_fast.ops.runtime.products import WORKSPACE, is_transposed, takes_own

WEIGHTS = ("c_attn_weight", "attn_proj_weight", "c_fc_weight", "mlp_proj_weight")
HELD = 32 << 20  # bytes: scratch up to this stays with its thread, more is given back after each call


def block_reference(
    m: Tensor,
    h: Tensor | None,
    segments: Tensor | None,
    ln_1_weight: Tensor,
    ln_1_bias: Tensor,
    c_attn_weight: Tensor,
    c_attn_bias: Tensor | None,
    attn_proj_weight: Tensor,
    attn_proj_bias: Tensor | None,
    ln_2_weight: Tensor,
    ln_2_bias: Tensor,
    c_fc_weight: Tensor,
    c_fc_bias: Tensor,
    mlp_proj_weight: Tensor,
    mlp_proj_bias: Tensor | None,
    *,
    n_head: int,
    scale: float | None = None,
    ln_1_eps: float = 1e-5,
    ln_2_eps: float = 1e-5,
    kind: Gelu = Gelu.TANH,
    attn_pdrop: float = 0.0,
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """What is correct: see `block`. Any device and floating dtype, under autograd."""
    B, T, C = m.shape
    y, h = add_layernorm.add_layernorm_reference(
        m, h, ln_1_weight, ln_1_bias, eps=ln_1_eps, dropout=NO_DROPOUT if h is None else dropout
    )
    qkv = linear.linear_reference(y, c_attn_weight, c_attn_bias).view(B, T, 3, n_head, C // n_head)
    of_attention = dropout._replace(p=attn_pdrop, site=dropout.site + 1)
    out = attention.attention_reference(qkv, segments, scale=scale, dropout=of_attention)
    a = linear.linear_reference(out.reshape(B, T, C), attn_proj_weight, attn_proj_bias)
    return mlp.mlp_reference(
        a, h, ln_2_weight, ln_2_bias, c_fc_weight, c_fc_bias, mlp_proj_weight, mlp_proj_bias,
        eps=ln_2_eps, dropout=dropout._replace(site=dropout.site + 2), kind=kind,
    )  # fmt: skip


def _outputs(a):
    """kept and statistics: csrc/block.h says what lies where."""
    rows = (a.B, a.T, a.C)
    return {
        "m_out": (rows, a.m.dtype),
        "h_out": (rows, a.m.dtype),
        "h_mid": None if a.h is None else (rows, a.m.dtype),
        "kept": ((a.B * a.T * (5 * a.C + (a.F if a.save else 0)),), a.m.dtype),
        "statistics": ((a.B * a.T * (a.n_head + 4),), torch.float32),
    }


def _transposed(a) -> bool:
    """Whether the weights are views of nn.Linear's: all of them, or all are read as [in, out]. Backward is told."""
    return all(is_transposed(getattr(a, name)) for name in WEIGHTS)


def _gradients(a):
    """dm only where it is not dh itself, with dropout between them."""
    dtype, transposed = a.dm_out.dtype, a.transposed
    rows = ((a.B, a.T, a.C), dtype)
    sizes = {"c_attn_bias": 3 * a.C, "attn_proj_bias": a.C, "mlp_proj_bias": a.C}
    found = {"dm": rows if a.has_h and a.dropout.p > 0.0 else None, "dh": rows}
    for name in ("ln_1_weight", "ln_1_bias", "ln_2_weight", "ln_2_bias"):
        found[f"d{name}"] = ((a.C,), dtype)
    for name in WEIGHTS:
        found[f"d{name}"] = (getattr(a, name).shape, dtype, transposed) if a.needs[name] else None
    for name, size in sizes.items():
        found[f"d{name}"] = ((size,), dtype) if a.needs[name] else None
    return found | {"dc_fc_bias": ((a.F,), dtype)}


@functools.lru_cache(256)
def _scratch_bytes(isa: str, **sizes: int | torch.dtype) -> int:
    """What csrc/block.cpp needs beside what it reads and writes; isa: the instruction set in use, which decides too."""
    nbytes = torch.empty(1, dtype=torch.int64, device="cpu")
    cpp.block_scratch(sizes, bytes=nbytes)
    return int(nbytes)


def _sgemm(rows: int, dtype: torch.dtype) -> int:
    """The address of what multiplies; 0: this package's own products."""
    policy = cpu_policy()
    widened = policy.product_dtype(dtype) == torch.float32
    return blas.sgemm() if widened and policy.float32 == "mkl" and not takes_own(rows, dtype) else 0


def takes(m: Tensor) -> bool:
    """Whether a block of m [B, T, C] is best computed as one call: on a CPU whose products C++ can call."""
    if not m.is_cpu or m.ndim != 3 or autocasts(m) or dispatch.unavailable("cpp", "cpu", m.dtype) is not None:
        return False
    rows = m.shape[0] * m.shape[1]
    return takes_own(rows, m.dtype) or _sgemm(rows, m.dtype) != 0


def _laid_out(weight: Tensor, transposed: bool) -> Tensor:
    """The weight [in, out], contiguous or its transpose contiguous."""
    return weight.t().contiguous().t() if transposed else weight.contiguous()


def _run(kernel, a, out, dtype: torch.dtype, backward: bool, transposed: bool) -> None:
    own = {name: _laid_out(getattr(a, name), transposed) for name in WEIGHTS}
    sizes = {
        "B": a.B, "T": a.T, "C": a.C, "H": a.n_head, "F": a.F, "m_dtype": dtype,
        "product_dtype": cpu_policy().product_dtype(dtype), "sgemm": _sgemm(a.B * a.T, dtype),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    nbytes = _scratch_bytes(dispatch.extension().isa(), backward=backward, drops=a.dropout.p > 0.0, **sizes)
    scratch = WORKSPACE.take(nbytes) if nbytes <= HELD else buffers.empty(a.c_fc_weight, (nbytes,), torch.uint8)
    kernel(
        own, sizes, out, a, scratch=scratch, transposed=transposed, erf=a.kind,
        scale=(a.C // a.n_head) ** -0.5 if a.scale is None else a.scale,
        attn_threshold=philox.threshold(a.attn_pdrop), attn_scale=philox.scale(a.attn_pdrop),
    )  # fmt: skip


def _forward_cpp(a, out):
    _run(cpp.block_forward, a, out, a.m.dtype, False, _transposed(a))


def _backward_cpp(a, out):
    """In the dtype and the layouts of forward, whatever a hook unpacked, or a cast made of parameters since."""
    dtype = a.dm_out.dtype
    for name in ("h_mid", "h_out", "kept", "ln_1_weight", "ln_2_weight", "ln_2_bias", *WEIGHTS):
        if (t := getattr(a, name)).dtype is not dtype:
            setattr(a, name, t.to(dtype))
    _run(cpp.block_backward, a, out, dtype, True, a.transposed)


def _check(
    m, h, segments, ln_1_weight, ln_1_bias, c_attn_weight, *_, n_head, ln_1_eps, ln_2_eps, attn_pdrop, dropout, **__
):
    add_layernorm.check_eps("block", ln_1_eps=ln_1_eps, ln_2_eps=ln_2_eps)
    C, width = c_attn_weight.shape
    if n_head < 1 or C % n_head or width != 3 * C:
        raise ValueError(
            f"block: c_attn_weight is [{C}, {width}] and n_head {n_head}; it must be [C, 3 C], C by n_head"
        )
    if not 0.0 <= attn_pdrop < 1.0:
        raise ValueError(f"block: attn_pdrop is {attn_pdrop}; it must be at least 0 and below 1")
    if attn_pdrop > 0.0 and dropout.p == 0.0:
        raise ValueError("block: attn_pdrop is above 0 and dropout's p is 0; call attention with a dropout of its own")


OP = Op(
    "block",
    inputs=(
        Input("m", "B T C", FLOAT),
        Input("h", "B T C", optional=True),
        Input("segments", "B T", (torch.int32,), optional=True),
        Input("ln_1_weight", "C"),
        Input("ln_1_bias", "C"),
        Input("c_attn_weight", "C 3C", read=STRIDED),
        Input("c_attn_bias", "3C", optional=True),
        Input("attn_proj_weight", "C C", read=STRIDED),
        Input("attn_proj_bias", "C", optional=True),
        Input("ln_2_weight", "C"),
        Input("ln_2_bias", "C"),
        Input("c_fc_weight", "C F", read=STRIDED),
        Input("c_fc_bias", "F"),
        Input("mlp_proj_weight", "F C", read=STRIDED),
        Input("mlp_proj_bias", "C", optional=True),
    ),
    options={
        "n_head": int,
        "scale": float | None,
        "ln_1_eps": float,
        "ln_2_eps": float,
        "kind": int,
        "attn_pdrop": float,
        "dropout": Dropout,
    },
    check=_check,
    limits=lambda m, *_, n_head, **__: attention.head_refused(m.shape[-1] // n_head),
    reference=block_reference,
    outputs=_outputs,
    output_names=("m_out", "h_out", "h_mid", "kept", "statistics"),
    returns=("m_out", "h_out"),
    saved={"h_mid|m": "B T C", "h_out": "B T C", "kept": "K", "statistics": "S", "segments": "B T", "ln_1_weight": "C"}
    | {"c_attn_weight": "C 3C", "attn_proj_weight": "C C", "ln_2_weight": "C", "ln_2_bias": "C", "c_fc_weight": "C F"}
    | {"mlp_proj_weight": "F C"},
    carry={"has_h": (bool, lambda a: a.h is not None), "transposed": (bool, _transposed)},
    gradients=_gradients,
    alias={"m": "h"},
    backends={"cpp": Backend(_forward_cpp, _backward_cpp)},
    on={"cpu": ("cpp",)},
)


def block(
    m: Tensor,
    h: Tensor | None,
    segments: Tensor | None,
    ln_1_weight: Tensor,
    ln_1_bias: Tensor,
    c_attn_weight: Tensor,
    c_attn_bias: Tensor | None,
    attn_proj_weight: Tensor,
    attn_proj_bias: Tensor | None,
    ln_2_weight: Tensor,
    ln_2_bias: Tensor,
    c_fc_weight: Tensor,
    c_fc_bias: Tensor,
    mlp_proj_weight: Tensor,
    mlp_proj_bias: Tensor | None,
    *,
    n_head: int,
    scale: float | None = None,
    ln_1_eps: float = 1e-5,
    ln_2_eps: float = 1e-5,
    activation: str = "gelu_new",
    attn_pdrop: float = 0.0,
    dropout: Dropout = NO_DROPOUT,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One layer of GPT-2, differentiable in all but segments; everything is in m's dtype.

    Args:
        m: [B, T, C], what is added to the stream; or, with no h, the stream itself.
        h: [B, T, C] or None, the stream.
        segments: int32 [B, T], see `attention`, or None.
        ln_1_weight, ln_1_bias, ln_2_weight, ln_2_bias: [C], of the LayerNorms.
        c_attn_weight, attn_proj_weight, c_fc_weight, mlp_proj_weight: [C, 3 C], [C, C], [C, F] and [F, C], Conv1D's
            layout; nn.Linear's weight.t() does as well, and the gradients then have that layout too.
        c_attn_bias, attn_proj_bias, c_fc_bias, mlp_proj_bias: [3 C], [C], [F] and [C]; all but c_fc's may be None.
        n_head: heads of C / n_head channels, see `attention`.
        scale: > 0, of the scores; (C / n_head) ** -0.5 by default.
        ln_1_eps, ln_2_eps: added to the variances.
        activation: as in `mlp`.
        attn_pdrop: of the attention weights, at dropout's site + 1; above 0 only where dropout's p is.
        dropout: of m, where there is an h, at its site, and of what attention adds, at its site + 2.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        (m, h), each [B, T, C]: the layer's stream is h + dropout(m), at the site of the next layer.

    Raises:
        ValueError: shapes, dtypes, devices, n_head, scale, eps, dropout or an activation that do not fit; a call
            inside `torch.autocast`.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    attention.check_scale("block", scale)
    if autocasts(m):
        raise ValueError(
            f"block: m is {m.dtype} inside torch.autocast; it must be outside, or call the layer's operations"
        )
    tensors = (
        m, h, segments, ln_1_weight, ln_1_bias, c_attn_weight, c_attn_bias, attn_proj_weight, attn_proj_bias,
        ln_2_weight, ln_2_bias, c_fc_weight, c_fc_bias, mlp_proj_weight, mlp_proj_bias,
    )  # fmt: skip
    return OP(
        *tensors, n_head=n_head, scale=scale, ln_1_eps=ln_1_eps, ln_2_eps=ln_2_eps, kind=kind_of("block", activation),
        attn_pdrop=attn_pdrop, dropout=dropout, impl=impl,
    )  # fmt: skip


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (the tensors of `block`, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[0] * 4 + [1] * 9, [1] * 13])

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def matrix(rows: int, columns: int) -> Tensor:
        return normal(rows, columns) * rows**-0.5

    for B, T, n_head, C, width, p, has_stream, has_biases, options in [
        (1, 1, 1, 20, 28, 0.0, True, True, {"activation": "gelu"}),
        (2, 13, 2, 40, 52, 0.1, True, True, {"segments": attention.segments_from(mask), "attn_pdrop": 0.2}),
        (1, 33, 2, 64, 256, 0.1, False, False, {"scale": 0.3, "attn_pdrop": 0.2}),
        (3, 65, 3, 96, 100, 0.1, True, True, {}),
    ]:
        segments, biases = options.pop("segments", None), [None] * 3
        if has_biases:
            biases = [normal(n) * 0.3 for n in (3 * C, C, C)]
        layernorms = [(1.0 + 0.3 * normal(C), normal(C) * 0.3) for _ in range(2)]
        tensors = [
            normal(B, T, C), normal(B, T, C) if has_stream else None, *layernorms[0], matrix(C, 3 * C), biases[0],
            matrix(C, C), biases[1], *layernorms[1], matrix(C, width), normal(width), matrix(width, C), biases[2],
        ]  # fmt: skip
        tensors = [t if t is None else t.to(device, dtype) for t in tensors]
        tensors.insert(2, segments if segments is None else segments.to(device))
        key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if p else None
        yield (*tensors, {"n_head": n_head, "dropout": Dropout(p, key, 3)} | options)


def cost(B: int, T: int, n_head: int, n_embd: int, width: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call with a stream and biases, each way: those of its operations."""
    N, C = B * T, n_embd
    parts = [
        add_layernorm.cost(N, C, itemsize),
        linear.cost(N, C, 3 * C, itemsize),
        attention.cost(B, T, n_head, C // n_head, itemsize),
        linear.cost(N, C, C, itemsize),
        mlp.cost(N, C, width, itemsize),
    ]
    total = lambda way, unit: sum(part[way][unit] for part in parts)
    return {way: {unit: total(way, unit) for unit in ("bytes", "flops")} for way in ("forward", "backward")}
