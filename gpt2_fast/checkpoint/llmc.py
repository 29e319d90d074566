"""llm.c's .bin checkpoints, as a config and a state dict and back; see `write_llmc` for where a dtype is chosen."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2_fast.checkpoint.state_dict import (
    EMBEDDING,
    LINEAR,
    canonical_state_dict,
    check_expressible,
    expected_shapes,
    token_ids,
    transposed,
)
from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.files import atomic_write

# llm.c's header: 256 int32. Its padded versions alone are read: 1 and 2 differ in layout and are long replaced.
LLMC_MAGIC, LLMC_HEADER = 20240326, 256
LLMC_VERSIONS = {3: torch.float32, 5: torch.bfloat16}
LLMC_VOCAB_MULTIPLE = 128
_LLMC_FIELDS = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "padded vocab_size")
# The order in which llm.c stores the layers' tensors, each stacked over the layers.
_LLMC_LAYERS = (
    "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight", "attn.c_proj.bias",
    "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias",
)  # fmt: skip


def _llmc_order(config: GPT2Config) -> Iterator[str]:
    """The tensors' names in the order in which llm.c stores them."""
    yield from (EMBEDDING, "transformer.wpe.weight")
    for name in _LLMC_LAYERS:
        yield from (f"transformer.h.{i}.{name}" for i in range(config.n_layer))
    yield from ("transformer.ln_f.weight", "transformer.ln_f.bias")


def read_llmc(path: str | os.PathLike[str]) -> tuple[GPT2Config, dict[str, Tensor], list[str]]:
    """Config, state dict and notes for the user from an llm.c checkpoint: version 3 (float32) or 5 (bfloat16).

    The rows that pad the vocabulary are left out. llm.c trains without dropout, so the config has none.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated, foreign or mis-sized file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give an llm.c checkpoint")
    header = np.fromfile(path, dtype="<i4", count=LLMC_HEADER)
    if len(header) == 0 or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is not an llm.c checkpoint: it does not begin with {LLMC_MAGIC}")
    if len(header) < LLMC_HEADER:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes, less than its header of {4 * LLMC_HEADER}: truncated"
        )
    version, *sizes = (int(value) for value in header[1:8])
    if version not in LLMC_VERSIONS:
        raise ValueError(f"{path} is version {version} of llm.c's checkpoints; 3 (float32) and 5 (bfloat16) are read")
    dtype, fields = LLMC_VERSIONS[version], dict(zip(_LLMC_FIELDS, sizes, strict=True))
    padded = fields.pop("padded vocab_size")
    try:
        config = GPT2Config(**fields, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, **token_ids(sizes[1]))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if padded < config.vocab_size:
        raise ValueError(f"{path}: padded vocab_size is {padded}, less than vocab_size {config.vocab_size}")
    stored = num_params(config) + (padded - config.vocab_size) * config.n_embd
    expected = 4 * LLMC_HEADER + dtype.itemsize * stored
    if (size := path.stat().st_size) != expected:
        what = "truncated" if size < expected else "longer than its header says"
        raise ValueError(f"{path} has {size} bytes and its header asks for {expected}: {what}")
    data = torch.from_numpy(np.memmap(path, np.uint8, mode="c", offset=4 * LLMC_HEADER)).view(dtype)
    shapes = expected_shapes(config) | {EMBEDDING: (padded, config.n_embd)}
    state, start = {}, 0
    for name in _llmc_order(config):
        shape = shapes[name][::-1] if name.endswith(LINEAR) else shapes[name]
        state[name] = transposed(name, data[start : start + math.prod(shape)].view(shape))
        start += math.prod(shape)
    state[EMBEDDING] = state[EMBEDDING][: config.vocab_size]
    return config, canonical_state_dict(state, config), []


def write_llmc(
    path: str | os.PathLike[str], state_dict: Mapping[str, Tensor], config: GPT2Config, *, dtype: torch.dtype
) -> None:
    """Write an llm.c checkpoint, version 3 for dtype float32 and 5 for bfloat16, vocabulary padded with zero rows.

    Raises ValueError for a model that llm.c cannot compute, OSError where the file cannot be written.
    """
    check_expressible(config, "llm.c")
    if dtype not in LLMC_VERSIONS.values():
        raise ValueError(f"llm.c has no checkpoints in {str(dtype)[6:]}; choose float32 or bfloat16")
    version = next(version for version, stored in LLMC_VERSIONS.items() if stored == dtype)
    padded = -(-config.vocab_size // LLMC_VOCAB_MULTIPLE) * LLMC_VOCAB_MULTIPLE
    header = np.zeros(LLMC_HEADER, dtype="<i4")
    header[:8] = LLMC_MAGIC, version, *(getattr(config, name) for name in _LLMC_FIELDS[:-1]), padded
    state = canonical_state_dict(state_dict, config)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        for name in _llmc_order(config):
            tensor = transposed(name, state[name].detach().to("cpu", dtype)).contiguous()
            file.write(tensor.view(torch.uint8).numpy().data)
            if name == EMBEDDING:
                file.write(bytes((padded - config.vocab_size) * config.n_embd * dtype.itemsize))
