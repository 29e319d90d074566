"""out = dropout(wte[input_ids] + wpe[position] (+ wte[token_type_ids])): what enters GPT-2's first block, in one pass.

Backward, with g = dropout'(dout), over flat rows r:

    dwte[v] = sum of g[r] over the r whose token id (or token type id) is v        dwpe[p] likewise over positions

The ids are sorted (stable), so that each touched row of a table is one run of entries, summed in float32 in that
order and written once: no atomics, and the same bits every time (``csrc/embedding_body.h``). Saved for backward:
the ids. torch runs this as two or three gathers, one or two adds and dropout, and saves the dropout mask.

An id outside its table raises IndexError on the CPU, before anything is written. A GPU cannot raise without a
sync: there the row becomes NaN, the gradients leave that id out, and `check_ids` raises when it is next called.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2_fast.ops.runtime import cpp
from gpt2_fast.ops.runtime.contract import FLOAT, INDEX, Input
from gpt2_fast.ops.runtime.declare import Backend, Op
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout

CHUNK = 32  # sorted entries that one task sums
_INDICES = {1: "input_ids", 2: "position_ids", 3: "token_type_ids"}  # csrc/embedding_body.h, EmbeddingIndex

# State of the process: of each GPU the record of one id outside its table, int64 [5], see csrc/embedding_body.h. It
# needs no lock: an entry is made once, by setdefault, and stays; in a record the kernels' compare-and-swap lets the
# first fault in, and the others are not wanted.
FAULTS: dict[torch.device, Tensor] = {}
FAULT_WORDS = 5


def embedding_reference(
    input_ids: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """What is correct: see `embedding`. Any device and floating dtype, under autograd."""
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
    h = F.embedding(input_ids, wte) + F.embedding(position_ids, wpe)
    if token_type_ids is not None:
        h = h + F.embedding(token_type_ids, wte)
    return dropout.rows(h)


def _reference(wte, wpe, input_ids, position_ids, token_type_ids, *, dropout, dtype):
    if wte.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_ranges(_first_outside, wte, wpe, input_ids, position_ids, token_type_ids)
    options = {"position_ids": position_ids, "token_type_ids": token_type_ids, "dropout": dropout}
    return embedding_reference(input_ids, wte, wpe, **options).to(dtype or wte.dtype)


def _outside(name: str, value: int, bound: int, where: str) -> IndexError:
    held = "n_positions" if name == "position_ids" else "vocab_size"
    return IndexError(f"embedding: {name}{where} is {value}, outside 0 to {bound - 1} ({held} is {bound})")


def _first_outside_cpp(ids: Tensor, bound: int) -> int:
    first = torch.empty(1, dtype=torch.int64, device="cpu")
    cpp.embedding_first_outside(ids=ids, n=ids.numel(), limit=bound, result=first)
    return first.item()


def _first_outside(ids: Tensor, bound: int) -> int:
    outside = ((ids < 0) | (ids >= bound)).flatten()
    return int(outside.int().argmax()) if outside.any() else -1


def _check_ranges(first_outside, wte, wpe, input_ids, position_ids, token_type_ids) -> None:
    """Raises IndexError naming the first id, on the CPU, outside its table."""
    for name, ids, table in (
        ("input_ids", input_ids, wte), ("position_ids", position_ids, wpe), ("token_type_ids", token_type_ids, wte)
    ):  # fmt: skip
        if ids is not None and (i := first_outside(ids, table.shape[0])) >= 0:
            where = [int(k) for k in torch.unravel_index(torch.tensor(i, device="cpu"), ids.shape)]
            raise _outside(name, int(ids.flatten()[i]), table.shape[0], str(where))


def check_ids() -> None:
    """Raises IndexError if since the last call an embedding on a GPU met an id outside its table.

    Waits for each GPU that has run one, so call it where the host waits anyway: when a loss is read.
    """
    for device, fault in list(FAULTS.items()):
        found, index, value, bound, row = fault.tolist()
        if found:
            fault.zero_()
            raise _outside(_INDICES[index], value, bound, f", flat row {row} of B * T on {device},")


def _forward_arguments(a, fault: Tensor | None) -> dict:
    """What the forward kernel's parameters call otherwise than `a`."""
    rows = a.B * a.T
    return {
        "ids": a.input_ids, "positions": a.position_ids, "types": a.token_type_ids, "rows": rows, "vocab": a.V,
        "n_positions": a.P, "position_period": a.T if a.position_ids is None else rows, "fault": fault,
    }  # fmt: skip


def _forward_cpp(a, out):
    _check_ranges(_first_outside_cpp, a.wte, a.wpe, a.input_ids, a.position_ids, a.token_type_ids)
    cpp.embedding_forward(out, a, **_forward_arguments(a, None))


def _forward_cuda(a, out):
    from gpt2_fast.ops.runtime import cuda

    device = a.wte.device
    fault = FAULTS.get(device)
    if fault is None:
        fault = FAULTS.setdefault(device, torch.zeros(FAULT_WORDS, dtype=torch.int64, device=device))
    name = f"embedding_forward_{cuda.dtype_pair(a.wte, out.out)}{cuda.whole(a.wte, a.wpe, out.out)}"
    packed = cpp.pack("embedding_forward", out, a, **_forward_arguments(a, fault))
    cuda.launch(device, name, (-(-a.B * a.T // cuda.WARPS), 1, 1), (32, cuda.WARPS, 1), packed)


def _add_cpp(a, entries: dict) -> None:
    cpp.embedding_backward(entries, a)


def _add_cuda(a, entries: dict) -> None:
    from gpt2_fast.ops.runtime import cuda

    grad, dtable, partial = (entries[name] for name in ("grad", "dtable", "partial"))
    suffix = cuda.whole(grad, dtable, partial)
    grid = (-(-partial.shape[0] // cuda.WARPS), -(-grad.shape[-1] // 256), 1)
    packed = cpp.pack("embedding_backward", entries, a)
    for name in (f"embedding_reduce_{cuda.dtype_pair(grad, dtable)}", f"embedding_finish_{cuda.dtype_name(dtable)}"):
        cuda.launch(grad.device, name + suffix, grid, (32, cuda.WARPS, 1), packed)


def _add_rows(add, a, keys: Tensor | None, dtable: Tensor) -> None:
    """Adds the rows of dout to those of dtable [n, C] that keys [entries] name in turn; None: their positions."""
    rows, n_embd = a.B * a.T, a.dout.shape[-1]
    if keys is None:  # a chunk a position, unless the batch is too long for one
        order, entries, chunk = None, rows, a.B if a.B <= 2 * CHUNK else CHUNK
    else:
        (keys, order), entries, chunk = keys.sort(stable=True), keys.numel(), CHUNK
    partial = a.dout.new_empty(-(-entries // chunk), 2, n_embd, dtype=torch.float32)
    add(a, {
        "keys": keys, "order": order, "grad": a.dout, "partial": partial, "dtable": dtable, "entries": entries,
        "rows": rows, "C": n_embd, "table_rows": dtable.shape[0], "chunk": chunk,
    })  # fmt: skip


def _backward(add):
    def backward(a, out):
        if a.needs["wte"]:
            tokens = [t.flatten() for t in (a.input_ids, a.token_type_ids) if t is not None]
            _add_rows(add, a, tokens[0] if len(tokens) == 1 else torch.cat(tokens), out.dwte.zero_())
        if a.needs["wpe"]:
            positions = None if a.position_ids is None else a.position_ids.flatten()
            _add_rows(add, a, positions, out.dwpe.zero_())

    return backward


def _gradients(a):
    shapes, n_embd = {"wte": a.vocab_size, "wpe": a.n_positions}, a.dout.shape[-1]
    return {f"d{name}": ((n, n_embd), a.table_dtype) if a.needs[name] else None for name, n in shapes.items()}


def _check(wte, wpe, input_ids, position_ids, token_type_ids, *, dropout, dtype) -> None:
    T = input_ids.shape[1]
    if position_ids is None and wpe.shape[0] < T:
        raise ValueError(f"embedding: input_ids has {T} tokens a row; wpe has positions for {wpe.shape[0]}")
    if dtype is None or dtype == wte.dtype:
        return
    if torch.float32 not in (dtype, wte.dtype) or not dtype.is_floating_point:
        tables = f"dtype is {dtype} and the tables are {wte.dtype}"
        raise ValueError(f"embedding: {tables}; they must match, or one be float32 and the other a floating dtype")


OP = Op(
    "embedding",
    inputs=(
        Input("wte", "V C", FLOAT),
        Input("wpe", "P C"),
        Input("input_ids", "B T", INDEX, read=torch.int64),
        Input("position_ids", "B T", INDEX, optional=True, read=torch.int64),
        Input("token_type_ids", "B T", INDEX, optional=True, read=torch.int64),
    ),
    options={"dropout": Dropout, "dtype": torch.dtype | None},
    check=_check,
    reference=_reference,
    outputs=lambda a: {"out": ((a.B, a.T, a.C), a.dtype or a.wte.dtype)},
    output_names=("out",),
    returns=("out",),
    saved={"input_ids": "B T", "position_ids": "B T", "token_type_ids": "B T"},
    carry={
        "vocab_size": (int, lambda a: a.wte.shape[0]),
        "n_positions": (int, lambda a: a.wpe.shape[0]),
        "table_dtype": (torch.dtype, lambda a: a.wte.dtype),
    },
    gradients=_gradients,
    backends={"cpp": Backend(_forward_cpp, _backward(_add_cpp)), "cuda": Backend(_forward_cuda, _backward(_add_cuda))},
    on={"cpu": ("cpp",), "cuda": ("cuda",)},
)


def embedding(
    input_ids: Tensor,
    wte: Tensor,
    wpe: Tensor,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    dropout: Dropout = NO_DROPOUT,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Token, position and token type embeddings, added, with dropout.

    Args:
        input_ids: [B, T], int64 or int32.
        wte: [vocab_size, C].
        wpe: [n_positions, C], of wte's dtype.
        position_ids: [T], [1, T] or [B, T]; None is 0 .. T - 1.
        token_type_ids: [B, T], more rows of wte, as in transformers' GPT-2; or None.
        dropout: of the sum.
        dtype: of the result; None is the tables' own, also under autocast, as in torch.
        impl: see `gpt2_fast.ops.runtime.dispatch`.

    Returns:
        [B, T, C].

    Raises:
        IndexError: on the CPU, an id outside its table; on a GPU `check_ids` raises it.
        ValueError: shapes, dtypes, devices or dropout that do not fit, or T beyond n_positions.
        ImplementationUnavailable: the named `impl` cannot run here.
    """
    if isinstance(position_ids, Tensor) and isinstance(input_ids, Tensor) and input_ids.ndim == 2:
        B, T = input_ids.shape
        if tuple(position_ids.shape) in ((T,), (1, T)):
            position_ids = position_ids.expand(B, T)
    # float64 is no kernel's: what comes out of one is exact in it.
    made = None if dtype is torch.float64 and getattr(wte, "dtype", None) is torch.float32 else dtype
    h = OP(wte, wpe, input_ids, position_ids, token_type_ids, dropout=dropout, dtype=made, impl=impl)
    return h if dtype is None else h.to(dtype)


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
        key = torch.tensor([0x1234_5678_9ABC_DEF0], device=device) if dropout_p else None
        options = {"position_ids": position_ids, "dropout": Dropout(dropout_p, key, 2)}
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
