"""out = dropout(wte[input_ids] + wpe[position] (+ wte[token_type_ids])): what enters GPT-2's first block, in one pass.

Backward, with g = dropout'(grad), over flat rows r:

    dwte[v] = sum of g[r] over the r whose token id (or token type id) is v        dwpe[p] likewise over positions

The ids are sorted (stable), so that each touched row of a table is one run of entries, summed in float32 in that
order and written once: no atomics, and the same bits every time (``csrc/embedding_body.h``). Saved for backward:
the ids. torch runs this as two or three gathers, one or two adds and dropout, and saves the dropout mask.

A head tied to wte gives it a second gradient [V, C]. With `return_table` wte comes out again beside h, for the head
to use, so that its gradient comes in through this backward, which adds the token rows to it where it lies.

An id outside its table raises IndexError on the CPU, before anything is written. A GPU cannot raise without a
sync: there the row becomes NaN, the gradients leave that id out, and `check_ids` raises when it is next called.
"""

from __future__ import annotations

import struct

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.ownership import holders, sole_holders
from gpt2_fast.ops.runtime import dispatch, philox
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES, address
from gpt2_fast.ops.runtime.library import define

OP = "embedding"
CHUNK = 32  # sorted entries that one task sums
_INDICES = {1: "input_ids", 2: "position_ids", 3: "token_type_ids"}  # csrc/embedding_body.h, EmbeddingIndex
_FORWARD_STRUCT, _BACKWARD_STRUCT = struct.Struct("=13qd2q"), struct.Struct("=14qdq")


def embedding_reference(
    input_ids: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
) -> Tensor:
    """What is correct: see `embedding`. Any device and floating dtype, under autograd."""
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
    h = F.embedding(input_ids, wte) + F.embedding(position_ids, wpe)
    if token_type_ids is not None:
        h = h + F.embedding(token_type_ids, wte)
    return philox.dropout_rows(h.flatten(0, 1), dropout_p, rng, site).view(h.shape)


define(
    "embedding(Tensor input_ids, Tensor wte, Tensor wpe, Tensor? position_ids, Tensor? token_type_ids,"
    " float dropout_p, Tensor? rng, int site, ScalarType dtype, str impl) -> Tensor"
)
define(
    "embedding_backward(Tensor grad, Tensor input_ids, Tensor? position_ids, Tensor? token_type_ids,"
    " SymInt vocab_size, SymInt n_positions, float dropout_p, Tensor? rng, int site, ScalarType dtype,"
    " bool wte_needed, bool wpe_needed, str impl) -> (Tensor dwte, Tensor dwpe)"
)
# dwte += the gradient of wte.
define(
    "embedding_backward_into(Tensor(a!) dwte, Tensor grad, Tensor input_ids, Tensor? token_type_ids,"
    " float dropout_p, Tensor? rng, int site, str impl) -> ()"
)


@torch.library.register_fake("gpt2_fast::embedding")
def _(input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, site, dtype, impl):
    return wte.new_empty((*input_ids.shape, wte.shape[1]), dtype=dtype)


@torch.library.register_fake("gpt2_fast::embedding_backward")
def _(grad, input_ids, position_ids, token_type_ids, vocab_size, n_positions, dropout_p, rng, site, dtype,
      wte_needed, wpe_needed, impl):  # fmt: skip
    n_embd = grad.shape[-1]
    dwte = grad.new_empty((vocab_size, n_embd) if wte_needed else (0,), dtype=dtype)
    return dwte, grad.new_empty((n_positions, n_embd) if wpe_needed else (0,), dtype=dtype)


@torch.library.register_fake("gpt2_fast::embedding_backward_into")
def _(dwte, grad, input_ids, token_type_ids, dropout_p, rng, site, impl):
    return None


def _outside(name: str, value: int, bound: int, where: str) -> IndexError:
    held = "n_positions" if name == "position_ids" else "vocab_size"
    return IndexError(f"{OP}: {name}{where} is {value}, outside 0 to {bound - 1} ({held} is {bound})")


def _first_outside_cpp(ids: Tensor, bound: int) -> int:
    first = torch.empty(1, dtype=torch.int64)
    dispatch.extension().embedding_first_outside(address(ids), ids.numel(), bound, address(first))
    return first.item()


def _first_outside(ids: Tensor, bound: int) -> int:
    outside = ((ids < 0) | (ids >= bound)).flatten()
    return int(outside.int().argmax()) if outside.any() else -1


def _check_ranges(first_outside, input_ids, wte, wpe, position_ids, token_type_ids) -> None:
    """Raises IndexError naming the first id (on the CPU, contiguous) outside its table."""
    for name, ids, table in (
        ("input_ids", input_ids, wte), ("position_ids", position_ids, wpe), ("token_type_ids", token_type_ids, wte)
    ):  # fmt: skip
        if ids is not None and (i := first_outside(ids, table.shape[0])) >= 0:
            where = [int(k) for k in torch.unravel_index(torch.tensor(i), ids.shape)]
            raise _outside(name, int(ids.flatten()[i]), table.shape[0], str(where))


_faults: dict[torch.device, Tensor] = {}


def _fault(device: torch.device) -> Tensor:
    """The record of one id outside its table on `device`: int64 [5], see csrc/embedding_body.h."""
    if device not in _faults:
        _faults[device] = torch.zeros(5, dtype=torch.int64, device=device)
    return _faults[device]


def check_ids() -> None:
    """Raises IndexError if since the last call an embedding on a GPU met an id outside its table.

    Waits for each GPU that has run one, so call it where the host waits anyway: when a loss is read.
    """
    for device, fault in _faults.items():
        found, index, value, bound, row = fault.tolist()
        if found:
            fault.zero_()
            raise _outside(_INDICES[index], value, bound, f", flat row {row} of B * T on {device},")


def _forward_arguments(input_ids, wte, wpe, position_ids, token_type_ids, out, dropout_p, rng, site, fault):
    """The fields of struct EmbeddingForward."""
    rows, period = input_ids.numel(), input_ids.shape[1] if position_ids is None else position_ids.numel()
    return (
        address(input_ids), address(position_ids), address(token_type_ids), address(wte), address(wpe), address(out),
        rows, wte.shape[1], wte.shape[0], wpe.shape[0], period, *philox.arguments(dropout_p, rng, site), address(fault),
    )  # fmt: skip


def _forward_cpp(input_ids, wte, wpe, position_ids, token_type_ids, out, *dropout):
    _check_ranges(_first_outside_cpp, input_ids, wte, wpe, position_ids, token_type_ids)
    arguments = _forward_arguments(input_ids, wte, wpe, position_ids, token_type_ids, out, *dropout, None)
    dispatch.extension().embedding_forward(*arguments, DTYPE_CODES[wte.dtype], DTYPE_CODES[out.dtype])


def _forward_cuda(input_ids, wte, wpe, position_ids, token_type_ids, out, *dropout):
    from gpt2_fast.ops.runtime import cuda

    fault = _fault(out.device)
    arguments = _forward_arguments(input_ids, wte, wpe, position_ids, token_type_ids, out, *dropout, fault)
    name = f"embedding_forward_{cuda.dtype_pair(wte, out)}{cuda.whole(wte, wpe, out)}"
    groups = -(-input_ids.numel() // cuda.WARPS)
    cuda.launch(out.device, name, (groups, 1, 1), (32, cuda.WARPS, 1), _FORWARD_STRUCT.pack(*arguments))


def _backward_arguments(keys, order, grad, partial, dtable, chunk, dropout_p, rng, site):
    """The fields of struct EmbeddingBackward; keys None is every position of every row, t-major."""
    B, T, n_embd = grad.shape
    entries = B * T if keys is None else keys.numel()
    return (
        address(keys), address(order), address(grad), address(partial), address(dtable),
        entries, B * T, B, T, n_embd, dtable.shape[0], chunk, *philox.arguments(dropout_p, rng, site),
    )  # fmt: skip


def _backward_cpp(grad, dtable, arguments):
    dispatch.extension().embedding_backward(*arguments, DTYPE_CODES[grad.dtype], DTYPE_CODES[dtable.dtype])


def _backward_cuda(grad, dtable, arguments, partial):
    from gpt2_fast.ops.runtime import cuda

    suffix = cuda.whole(grad, dtable, partial)
    grid = (-(-partial.shape[0] // cuda.WARPS), -(-grad.shape[-1] // 256), 1)
    packed = _BACKWARD_STRUCT.pack(*arguments)
    for name in (f"embedding_reduce_{cuda.dtype_pair(grad, dtable)}", f"embedding_finish_{cuda.dtype_name(dtable)}"):
        cuda.launch(grad.device, name + suffix, grid, (32, cuda.WARPS, 1), packed)


def _add_table_gradient(impl, grad, keys, dtable, dropout):
    """Adds a table's gradient to dtable [n, C]; keys [entries] are its row for each of grad's rows, or None."""
    B, T, n_embd = grad.shape
    if grad.numel() == 0:
        return
    if keys is None:  # a chunk a position, unless the batch is too long for one
        order, entries, chunk = None, B * T, B if B <= 2 * CHUNK else CHUNK
    else:
        (keys, order), entries, chunk = keys.sort(stable=True), keys.numel(), CHUNK
    partial = grad.new_empty(-(-entries // chunk), 2, n_embd, dtype=torch.float32)
    arguments = _backward_arguments(keys, order, grad, partial, dtable, chunk, *dropout)
    if impl == "cpp":
        _backward_cpp(grad, dtable, arguments)
    else:
        _backward_cuda(grad, dtable, arguments, partial)


def _ids(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.to(torch.int64).contiguous()


def _token_keys(input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor:
    tokens = _ids(input_ids).flatten()
    return tokens if token_type_ids is None else torch.cat([tokens, _ids(token_type_ids).flatten()])


@torch.library.impl("gpt2_fast::embedding", ("CPU", "CUDA"))
def _(input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, site, dtype, impl):
    input_ids, position_ids, token_type_ids = _ids(input_ids), _ids(position_ids), _ids(token_type_ids)
    run = {"cpp": _forward_cpp, "cuda": _forward_cuda}[impl]
    out = wte.new_empty((*input_ids.shape, wte.shape[1]), dtype=dtype)
    if out.numel():
        run(input_ids, wte.contiguous(), wpe.contiguous(), position_ids, token_type_ids, out, dropout_p, rng, site)
    return out


@torch.library.impl("gpt2_fast::embedding_backward", ("CPU", "CUDA"))
def _(grad, input_ids, position_ids, token_type_ids, vocab_size, n_positions, dropout_p, rng, site, dtype,
      wte_needed, wpe_needed, impl):  # fmt: skip
    grad, dropout = grad.contiguous(), (dropout_p, rng, site)
    dwte, dwpe = grad.new_empty(0, dtype=dtype), grad.new_empty(0, dtype=dtype)
    if wte_needed:
        dwte = grad.new_zeros(vocab_size, grad.shape[-1], dtype=dtype)
        _add_table_gradient(impl, grad, _token_keys(input_ids, token_type_ids), dwte, dropout)
    if wpe_needed:
        positions = None if position_ids is None else _ids(position_ids).expand(input_ids.shape).flatten()
        dwpe = grad.new_zeros(n_positions, grad.shape[-1], dtype=dtype)
        _add_table_gradient(impl, grad, positions, dwpe, dropout)
    return dwte, dwpe


@torch.library.impl("gpt2_fast::embedding_backward_into", ("CPU", "CUDA"))
def _(dwte, grad, input_ids, token_type_ids, dropout_p, rng, site, impl):
    if not dwte.is_contiguous():
        raise ValueError(f"{OP}: dwte has strides {dwte.stride()}; it must be contiguous")
    _add_table_gradient(impl, grad.contiguous(), _token_keys(input_ids, token_type_ids), dwte, (dropout_p, rng, site))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, site, dtype, impl, return_table=False
    ):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input_ids, position_ids, token_type_ids, rng)
        ctx.options = (wte.shape[0], wpe.shape[0], wte.dtype, dropout_p, site, impl)
        h = torch.ops.gpt2_fast.embedding(
            input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, site, dtype, impl
        )
        return (h, wte.detach()) if return_table else h

    @staticmethod
    def backward(ctx, grad, dtable=None):
        if grad is None:  # h is not used
            return None, dtable, *(None,) * 9
        input_ids, position_ids, token_type_ids, rng = ctx.saved_tensors
        vocab_size, n_positions, dtype, dropout_p, site, impl = ctx.options
        wte_needed, wpe_needed = ctx.needs_input_grad[1:3]
        # In place where the values are no one else's: not a user's, a hook's, another function's.
        in_place = (
            dtable is not None and wte_needed and type(dtable) is Tensor and dtable.layout is torch.strided
            and dtable.is_contiguous() and dtable.dtype == dtype
            and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
            and all(n <= sole for n, sole in zip(holders(dtable), sole_holders(), strict=True))
        )  # fmt: skip
        dwte, dwpe = torch.ops.gpt2_fast.embedding_backward(
            grad, input_ids, position_ids, token_type_ids, vocab_size, n_positions, dropout_p, rng, site, dtype,
            wte_needed and not in_place, wpe_needed, impl,
        )  # fmt: skip
        if in_place:
            torch.ops.gpt2_fast.embedding_backward_into(
                dtable, grad, input_ids, token_type_ids, dropout_p, rng, site, impl
            )
            dwte = dtable
        elif dtable is not None and wte_needed:
            dwte = dwte + dtable if torch.is_grad_enabled() else dwte.add_(dtable)
        return None, dwte if wte_needed else None, dwpe if wpe_needed else None, *(None,) * 8


def _validate(input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, dtype):
    if wte.ndim != 2 or wpe.ndim != 2 or wte.shape[1] != wpe.shape[1] or wte.dtype != wpe.dtype:
        raise ValueError(f"{OP}: wte is {wte.dtype} {tuple(wte.shape)} and wpe {wpe.dtype} {tuple(wpe.shape)}; they "
                         "must be [vocab_size, n_embd] and [n_positions, n_embd] of one dtype")  # fmt: skip
    if input_ids.ndim != 2:
        raise ValueError(f"{OP}: input_ids is {tuple(input_ids.shape)}; it must be [B, T]")
    B, T = input_ids.shape
    for name, t in (("input_ids", input_ids), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if t is not None and t.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"{OP}: {name} is {t.dtype}; it must be int64 or int32")
    for name, t in (("wte", wte), ("wpe", wpe), ("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if t is not None and t.device != input_ids.device:
            raise ValueError(f"{OP}: {name} is on {t.device} and input_ids on {input_ids.device}; "
                             "move them to one device")  # fmt: skip
    if position_ids is None and wpe.shape[0] < T:
        raise ValueError(f"{OP}: input_ids has {T} tokens a row; wpe has positions for {wpe.shape[0]}")
    if position_ids is not None and tuple(position_ids.shape) not in ((T,), (1, T), (B, T)):
        raise ValueError(f"{OP}: position_ids is {tuple(position_ids.shape)}; "
                         f"it must be ({T},), (1, {T}) or ({B}, {T})")  # fmt: skip
    if token_type_ids is not None and token_type_ids.shape != input_ids.shape:
        raise ValueError(f"{OP}: token_type_ids is {tuple(token_type_ids.shape)}; it must be ({B}, {T})")
    if dtype != wte.dtype and torch.float32 not in (dtype, wte.dtype):
        raise ValueError(f"{OP}: dtype is {dtype} and the tables are {wte.dtype}; they must match, or one be float32")
    philox.check(OP, dropout_p, rng, input_ids.device)


def embedding(
    input_ids: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    site: int = 0,
    dtype: torch.dtype | None = None,
    return_table: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Token, position and token type embeddings, added, with dropout.

    Args:
        input_ids: [B, T], int64 or int32.
        wte: [vocab_size, C].
        wpe: [n_positions, C], of wte's dtype.
        position_ids: [T], [1, T] or [B, T]; None is 0 .. T - 1.
        token_type_ids: [B, T], more rows of wte, as in transformers' GPT-2; or None.
        dropout_p: probability of zeroing an element of the sum; 0 in eval mode.
        rng: int64 [1] key of this forward pass (`philox.new_key`), needed when dropout_p > 0.
        site: which dropout of the model this is; each site draws its own mask from the key.
        dtype: of the result; None is the tables' own, also under autocast, as in torch.
        return_table: also return wte, for a head tied to it: used there in wte's place, the head's gradient is
            what the token rows are added to, instead of a second [vocab_size, C] one. Same values either way.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, T, C]; with `return_table`, (that, wte).

    Raises:
        IndexError: on the CPU, an id outside its table; on a GPU `check_ids` raises it.
        ValueError: shapes, dtypes, devices or dropout_p that do not fit, or T beyond n_positions.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    dtype = dtype or wte.dtype
    _validate(input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, dtype)
    name = dispatch.choose(OP, impl, wte.device, wte.dtype)
    if name == "reference":
        if wte.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_ranges(_first_outside, input_ids, wte, wpe, position_ids, token_type_ids)
        h = embedding_reference(
            input_ids, wte, wpe, position_ids=position_ids, token_type_ids=token_type_ids,
            dropout_p=dropout_p, rng=rng, site=site,
        )  # fmt: skip
        return (h.to(dtype), wte) if return_table else h.to(dtype)
    # Compiled, autograd itself adds the two gradients; a frozen wte must not look as if it needed one.
    through = return_table and wte.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if through:
        sole_holders()
    result = _Embedding.apply(
        input_ids, wte, wpe, position_ids, token_type_ids, dropout_p, rng, site, dtype, name, through
    )  # fmt: skip
    return (result, wte) if return_table and not through else result


def samples(device: str = "cpu", dtype: torch.dtype = torch.float32):
    """Inputs (input_ids, wte, wpe, options) that tests and benchmarks read, smallest first."""
    generator = torch.Generator().manual_seed(0)
    for B, T, vocab_size, n_embd, positions, types, dropout_p in [
        (1, 1, 5, 20, None, False, 0.0), (2, 31, 47, 96, None, True, 0.1), (3, 63, 4, 36, "row", False, 0.0),
        (70, 3, 11, 20, None, False, 0.1), (2, 33, 60, 264, "batch", True, 0.0),
    ]:  # fmt: skip
        n_positions = 2 * T
        wte, wpe = (torch.randn(n, n_embd, generator=generator) for n in (vocab_size, n_positions))
        input_ids, token_type_ids = (torch.randint(vocab_size, (B, T), generator=generator) for _ in range(2))
        shape = {None: None, "row": (T,), "batch": (B, T)}[positions]
        position_ids = None if shape is None else torch.randint(n_positions, shape, generator=generator).to(device)
        rng = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        options = {"position_ids": position_ids, "dropout_p": dropout_p, "rng": rng, "site": 2}
        options["token_type_ids"] = token_type_ids.to(device) if types else None
        yield input_ids.to(device), wte.to(device, dtype), wpe.to(device, dtype), options


def cost(n_rows: int, T: int, n_embd: int, vocab_size: int, itemsize: int) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one call each way, without token types and for a wpe of T positions: every input and output
    once, and of wte in the forward pass the rows that are gathered."""
    ids, rows, positions, table = 8 * n_rows, *(itemsize * n_embd * n for n in (n_rows, T, vocab_size))
    return {
        "forward": {"bytes": ids + 2 * rows + positions, "flops": n_rows * n_embd},
        "backward": {"bytes": ids + rows + positions + table, "flops": 2 * n_rows * n_embd},
    }
