"""Numbers that stand both in Python and in C++ and must be the same there: results or memory would differ."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from gpt2_fast.generate import sampling
from gpt2_fast.ops import add_layernorm, draw, packed_model
from gpt2_fast.ops.packed_weights import CODES
from gpt2_fast.ops.runtime import gelu, products
from gpt2_fast.ops.runtime.dispatch import DTYPE_CODES

CSRC = Path(__file__).parent.parent / "csrc"


def found(source: str, pattern: str) -> list[str]:
    """What the one group of a pattern matches in a source."""
    matches = re.findall(pattern, (CSRC / source).read_text())
    assert matches, f"csrc/{source} has no {pattern}"
    return matches


def constant(source: str, name: str) -> int:
    (value,) = found(source, rf"constexpr int(?:64_t)? {name} = (\d+);")
    return int(value)


def enumerators(source: str, name: str) -> dict[str, int]:
    (body,) = found(source, rf"enum {name} : int64_t {{(.*?)}};")
    return {key: int(value) for key, value in re.findall(r"(\w+) = (\d+)", body)}


@pytest.mark.skipif(not CSRC.is_dir(), reason="an installed package has no C++ sources beside it")
def test_python_and_cpp_have_the_same_numbers():
    assert add_layernorm.PARTIAL_CHUNKS == gelu.PARTIAL_CHUNKS == constant("block.cpp", "CHUNKS")
    assert constant("draw.cpp", "FEW") == sampling.FEW
    assert [float(limit) for limit in found("draw.cpp", r"temperature >= ([\d.]+)f")] == [draw.COLD]
    tiles = [int(rows) for row in found("decode_panels.h", r"ROW_TILES\[\] = {(.*?)}") for rows in row.split(",")]
    assert max(tiles) == packed_model.TILE_ROWS
    assert enumerators("linear.h", "Finish") == {
        "FINISH_STORE": products.STORE,
        "FINISH_ADD": products.ADD,
        "FINISH_TANH_GELU": products.GELU + gelu.Gelu.TANH,
        "FINISH_ERF_GELU": products.GELU + gelu.Gelu.ERF,
    }
    names = {"float32": "F32", "bfloat16": "BF16", "int8": "INT8", "int4": "INT4"}
    assert enumerators("decode_step.h", "DecodeWeights") == {f"DECODE_{names[w]}": code for w, code in CODES.items()}
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    assert enumerators("isa.h", "Dtype") == {kinds[dtype]: code for dtype, code in DTYPE_CODES.items()}
