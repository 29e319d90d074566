"""`python -m benchmarks reading`: a token beside the reading of its weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent))

from benchmarks import reading
from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import packed_model


@pytest.fixture(scope="module")
def read():
    return reading.compile_reader()


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_every_line_is_read_once(read, threads):
    generator = torch.Generator().manual_seed(0)
    sizes = (64, 64 * 7, 64 * 8, 64 * 41 + 24)  # bytes; of the last, what is no whole line is left out
    matrices = [torch.randint(0, 256, (n,), dtype=torch.uint8, generator=generator) for n in sizes]
    words = [m[: len(m) // 64 * 64].view(torch.int32).long().sum().item() for m in matrices]
    assert read(matrices, threads) == sum(words) % 2**32


@pytest.mark.parametrize("weights", reading.WEIGHTS)
def test_what_is_read_is_every_weight_that_a_step_uses(weights):
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, vocab_size=160, n_positions=16, tie_word_embeddings=False)
    matrices = reading.matrices_of(packed_model(GPT2LMHeadModel(config).eval(), weights))
    numbers = 2 * 12 * 64**2 + 160 * 64
    assert (
        sum(m.nbytes for m in matrices) == numbers * {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5625}[weights]
    )
    assert len({m.data_ptr() for m in matrices}) == 9


def test_a_record_and_its_table(tmp_path, capsys):
    assert reading.main(["--model", "smoke", "--weights", "int8,int4", "--rounds", "70", "--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("*reading-smoke*.json")).read_text())
    assert [row["weights"] for row in record["rows"]] == ["int8", "int4"]
    for row in record["rows"]:
        assert len(row["token"]) == len(row["reading"]) == 70  # beyond what one cache of 64 positions holds
        assert min(*row["token"], *row["reading"]) > 0
    assert "share" in capsys.readouterr().out
    row = {"weights": "int8", "bytes": 2_000_000, "token": [0.004, 0.002], "reading": [0.001, 0.001]}
    assert reading.table([row]).split()[-6:] == ["int8", "2.0", "1.00", "3.00", "2.0", "38%"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--weights", "int8,int3"], "--weights has 'int3'; choose from float32, bfloat16, int8, int4"),
        (["--rounds", "0"], "--rounds, --threads and --held must be at least 1"),
        (["--held", "513"], "--held must be at most 512 for gpt2"),
    ],
)
def test_what_cannot_be_is_one_line(capsys, arguments, said):
    with pytest.raises(SystemExit):
        reading.main(arguments)
    assert said in capsys.readouterr().err


def test_no_compiler_is_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit, match="no-such-compiler does not compile the reading loop"):
        reading.compile_reader()
