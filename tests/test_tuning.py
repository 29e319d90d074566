"""The tables of configurations: what ships is well-formed, the nearest row is taken, and a bad file says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from gpt2_fast.kernels import attention_tiles, tuning

OPS = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))
ROOT = Path(__file__).parent.parent


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(rows or text) makes them the table of the op "toy"."""

    def clear():
        tuning.rows.cache_clear()
        tuning._row.cache_clear()

    def make(content):
        text = content if isinstance(content, str) else json.dumps({"rows": content})
        (tmp_path / "toy.json").write_text(text)
        clear()

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    clear()
    yield make
    monkeypatch.undo()
    clear()


def _row(name: int, **selectors):
    return {"kernel": "k", **selectors, "config": {"BLOCK": name, "num_warps": 4}}


def test_what_ships_is_read_by_every_kernel_file():
    assert OPS
    for op in OPS:
        assert (ROOT / f"kernels/{op}.py").exists(), op
        assert all(row["by"] for row in tuning.rows(op))


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_attention_has_a_row_of_its_own_for_every_architecture_and_head_size(arch):
    """Nearest is for what nobody thought of, not for what ships: each of these rows is exact."""
    rows = tuning.rows("attention")
    for kernel in ("forward", "backward_dq", "backward_dkdv"):
        for head_dim in (32, 64, 128):
            shape = {"head_dim": head_dim, "dropout": True}
            (row,) = [r for r in rows if r["kernel"] == kernel and r["arch"] == arch and r["shape"] == shape]
            assert tuning.config("attention", kernel, arch, 2, **shape) == row["config"]
            assert attention_tiles.config(kernel, arch, 2, head_dim, True) == row["config"]


def test_the_nearest_shape_is_taken(table):
    table([_row(32, shape={"width": 32}), _row(512, shape={"width": 512}), _row(1, shape={"width": 1 << 20})])
    for width, expected in ((32, 32), (16, 32), (100, 32), (200, 512), (512, 512), (4096, 512)):
        assert tuning.config("toy", "k", 90, width=width)["BLOCK"] == expected, width


def test_a_flag_weighs_less_than_an_octave(table):
    table([_row(1, shape={"d": 64, "drop": False}), _row(2, shape={"d": 32, "drop": True})])
    assert tuning.config("toy", "k", 90, d=64, drop=True)["BLOCK"] == 1
    assert tuning.config("toy", "k", 90, d=32, drop=False)["BLOCK"] == 2
    table([_row(1, shape={"rows": "flat"}), _row(2, shape={"rows": "tall"})])
    assert tuning.config("toy", "k", 90, rows="tall")["BLOCK"] == 2


def test_rows_of_the_architecture_come_first_then_the_default_then_sm_80(table):
    table([_row(8, arch=90, itemsize=2), _row(4, shape={"d": 64}), _row(2), _row(1, arch=80)])
    assert tuning.config("toy", "k", 90, 2, d=64)["BLOCK"] == 8
    assert tuning.config("toy", "k", 90, 4, d=64)["BLOCK"] == 4
    assert tuning.config("toy", "k", 100, 2, d=16)["BLOCK"] == 4
    assert tuning.config("toy", "k", 80, 2, d=64)["BLOCK"] == 1
    table([_row(1, arch=80), _row(2, arch=90)])
    assert tuning.config("toy", "k", 120)["BLOCK"] == 1


def test_no_row_is_an_error_that_names_what_was_asked(table):
    table([_row(1, itemsize=2)])
    with pytest.raises(ValueError, match="no row for kernel 'k' and 4 bytes an element"):
        tuning.config("toy", "k", 90, 4)
    with pytest.raises(ValueError, match="no row for kernel 'other'"):
        tuning.config("toy", "other", 90, 2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no table of configurations"),
        ("[]", "is no table of configurations"),
        ('{"rows": []}', "has no rows"),
        ([_row(1), {"arch": 80}], "row 1: it names no kernel"),
        ([{"kernel": "k", "config": {"BLOCK": 16}}], "row 0: config has no num_warps"),
        ([_row(48)], "row 0: BLOCK is 48; it must be a power of two"),
        ([_row(0)], "row 0: BLOCK is 0; it must be a whole number above 0"),
        ([_row(True)], "row 0: BLOCK is True; it must be a whole number"),
        ([{**_row(1), "archs": [80]}], "row 0: 'archs' is not a key"),
        ([_row(1, shape={"d": 1}), _row(2, shape={"d": 1})], "row 1: it is there twice"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_it(table, content, said):
    table(content)
    with pytest.raises(ValueError, match="restore the file, or write it again: python -m benchmarks tune") as error:
        tuning.config("toy", "k", 90)
    assert said in str(error.value)
    assert "toy.json" in str(error.value)
    assert "\n" not in str(error.value)


def test_write_is_read_back_and_a_malformed_row_leaves_the_file(table):
    table([_row(1)])
    tuning.write("toy", [_row(2, arch=90), _row(4)])
    assert tuning.config("toy", "k", 90)["BLOCK"] == 2
    assert tuning.config("toy", "k", 80)["BLOCK"] == 4
    before = tuning.path("toy").read_text()
    with pytest.raises(ValueError, match="row 0: BLOCK is 3"):
        tuning.write("toy", [_row(3)])
    assert tuning.path("toy").read_text() == before


def test_a_trial_lasts_as_long_as_its_block(table):
    table([_row(1)])
    with tuning.trial("toy", 0, {"BLOCK": 64, "num_warps": 8}):
        assert tuning.config("toy", "k", 90)["BLOCK"] == 64
    assert tuning.config("toy", "k", 90)["BLOCK"] == 1
