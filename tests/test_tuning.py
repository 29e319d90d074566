"""The tables of configurations: what ships is well-formed, the nearest row is taken, and a bad file says so."""

from __future__ import annotations

import contextlib
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from golden import kernels as golden
from gpt2_fast.kernels import aot, attention_tiles, tuning

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))

from benchmarks import tune  # noqa: E402

OPS = sorted(path.stem for path in tuning.FOLDER.glob("*.json"))


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
            of_arch = [r for r in rows if (r["kernel"], r["arch"], r["itemsize"]) == (kernel, arch, 2)]
            (row,) = [r for r in of_arch if r["shape"] == shape]
            assert tuning.config("attention", kernel, arch, 2, **shape) == row["config"]
            assert attention_tiles.config(kernel, arch, 2, head_dim, True) == row["config"]


@pytest.mark.parametrize("op", OPS)
def test_every_row_is_what_its_own_selectors_get(op):
    """A row for some architecture, item size or dropout takes over nothing that has a row of its own."""
    for row in (row for row in tuning.rows(op) if "shape" in row):
        archs = (row["arch"],) if "arch" in row else aot.ARCHS
        itemsizes = (row["itemsize"],) if "itemsize" in row else (2, 4)
        asked = [(arch, itemsize) for arch in archs for itemsize in itemsizes]
        assert any(tuning._row(op, row["kernel"], *a, tuple(row["shape"].items())) is row for a in asked), row


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


def test_the_architectures_own_row_wins_a_tie_and_sm_80_stands_in(table):
    table([
        _row(16, shape={"d": 64}), _row(8, arch=90, shape={"d": 64}), _row(4, shape={"d": 32}), _row(2),
        _row(1, arch=90),
    ])  # fmt: skip
    assert tuning.config("toy", "k", 90, d=64)["BLOCK"] == 8
    assert tuning.config("toy", "k", 80, d=64)["BLOCK"] == 16
    assert tuning.config("toy", "k", 90, d=32)["BLOCK"] == 4  # a row that was tuned for d = 64 takes over nothing else
    table([_row(2), _row(1, arch=90)])
    assert tuning.config("toy", "k", 90, d=64)["BLOCK"] == 1
    assert tuning.config("toy", "k", 100, d=64)["BLOCK"] == 2
    table([_row(1, arch=80), _row(2, arch=90)])
    assert tuning.config("toy", "k", 120)["BLOCK"] == 1
    table([_row(1, arch=90), _row(2, arch=90, itemsize=4), _row(4, itemsize=2)])
    assert [tuning.config("toy", "k", 90, itemsize)["BLOCK"] for itemsize in (4, 2)] == [2, 1]


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
        ([{**_row(1), "candidates": [{"BLOCK": 16}]}], "row 0: a candidate has no num_warps"),
        ([{**_row(1), "candidates": [{"BLOCK": 3, "num_warps": 4}]}], "row 0: BLOCK is 3; it must be a power of two"),
        ([{**_row(1), "candidates": {"BLOCK": 2}}], "row 0: candidates is no list of configurations"),
        (
            [{"kernel": "k", "config": {"product": "cublas", "num_warps": 4}}],
            "row 0: product is 'cublas'; choose vendor",
        ),
        ([{"kernel": "k", "config": {"product": "persistent"}}], "row 0: config has no num_warps"),
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


def test_a_limit_on_registers_is_compiled_as_it_runs():
    """What a launch passes on must be in the specs that doctor compiles."""
    for op in OPS:
        for index, row in enumerate(tuning.rows(op)):
            if "maxnreg" in row["config"]:
                specs = importlib.import_module(f"gpt2_fast.kernels.{op}").aot_specs()
                read = [specs[i].maxnreg for i in tune.affected(op, index, row["arch"])]
                assert read, row
                assert set(read) == {row["config"]["maxnreg"]}, row


def _report(**given):
    clean = {"registers": 64, "spilled_bytes": 0, "shared_bytes": 1024, "problems": [], "mma": {"HGMMA"}}
    return {**clean, **given}


def test_candidates_begin_with_what_ships_and_change_one_thing_first():
    row = {"kernel": "forward", "config": {"BLOCK_M": 128, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1}}
    found = tune.candidates("attention", row)
    assert found[0] == row["config"]
    changes = [sum(c[k] != row["config"][k] for k in c) for c in found]
    assert changes == sorted(changes)
    assert {"BLOCK_M": 64, "BLOCK_N": 16, "num_warps": 8, "num_stages": 1} in found
    assert min(c["BLOCK_N"] for c in found) == 16  # tl.dot takes no less
    assert min(c["num_stages"] for c in found) == 1
    assert max(c["num_warps"] for c in found) == 16


def test_the_vendors_product_is_a_candidate_where_time_is_measured():
    """Once, as its tiles are not launched; machine code cannot tell it from the other, so there the choice stays."""
    tiles = {"BLOCK_M": 128, "num_warps": 8}
    for shipped in ("vendor", "persistent"):
        row = {"kernel": "forward", "config": {"product": shipped, **tiles}}
        timed = tune.candidates("linear_gelu", row, timed=True)
        assert timed[0] == row["config"]
        assert [c for c in timed if c["product"] == "vendor"] == [{"product": "vendor", **tiles}]
        assert {"product": "persistent", **tiles, "BLOCK_M": 64} in timed
        assert {c["product"] for c in tune.candidates("linear_gelu", row)} == {shipped}


def test_a_product_that_does_not_ship_is_not_tuned():
    table = tuning.rows("linear_gelu")
    for arch, expected in ((80, []), (90, [90, 90])):
        assert [table[i]["arch"] for _, i in tune._rows_to_tune(["linear_gelu"], arch, None)] == expected


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "arch", "expected"),
    [
        (32, 0, 4, 90, 64),  # the multiprocessor's own limit
        (255, 0, 8, 90, 8),  # 65536 // (8 * 8192) = 1 block
        (128, 0, 4, 80, 16),  # 4 blocks of 4 * 4096 registers
        (64, 50 << 10, 4, 80, 12),  # 164 KiB hold 3 blocks of 51
        (64, 226 << 10, 8, 90, 8),
        (16, 0, 1, 90, 32),  # no more than 32 blocks
    ],
)
def test_resident_warps_by_hand(registers, shared, warps, arch, expected):
    assert tune.resident_warps(_report(registers=registers, shared_bytes=shared), warps, arch) == expected


@pytest.mark.parametrize("version", ["3.6.0", "3.7.1", "3.9.0"])
def test_the_losss_candidates_leave_rows_in_the_l2_and_what_ships_does_not(version):
    """Rows under way on an H100 or H200, which have 132 multiprocessors and 50 MB of L2 (NVIDIA, "H100 Tensor Core GPU
    Architecture"), from the registers that tests/golden keeps."""
    lines = golden.read(golden.path(version))
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        arguments = ("linear_cross_entropy", "softmax_xent", 90, itemsize)
        shipped, candidates = tuning.config(*arguments), tuning.candidates(*arguments)
        for config in (shipped, *candidates):
            tile = "" if config is shipped else f" {config['BLOCK_V']} in {config['num_warps']} warps"
            line = lines[f"softmax_xent {dtype} gradient padded{tile}", "90"]
            assert line["spilled_bytes"] == "0"
            report = {name: int(line[name]) for name in ("registers", "shared_bytes")}
            blocks = tune.resident_warps(report, config["num_warps"], 90) // config["num_warps"]
            stays = blocks * 132 * 50257 * itemsize < 50e6
            assert stays == (config is not shipped), (dtype, config, blocks)


def test_ranking_puts_what_cannot_ship_last_and_tensor_cores_before_tiles():
    small, large = {"BLOCK_M": 64, "num_warps": 4}, {"BLOCK_M": 128, "num_warps": 4}
    rank = lambda config, report: tune.rank("attention", "forward", 90, config, report)
    clean = rank(small, _report())
    assert rank(large, _report()) < clean
    assert rank(large, _report(mma={"HMMA"})) > clean
    assert rank(large, _report(problems=["spills 8 bytes a thread"])) > rank(small, _report(mma=set()))
    assert rank(large, "CompilationError: no") > rank(small, _report(problems=["spills"]))
    assert rank(large, _report(registers=255)) < clean  # 8 warps are enough for a matrix kernel
    rows = lambda config, report: tune.rank("bias", "column_sum", 90, config, report)
    assert rows(large, _report(registers=255)) > rows(small, _report())


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """The shipped tables in a folder of their own, and compilations that every test makes up."""
    shutil.copytree(tuning.FOLDER, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    for cache in (tuning.rows, tuning._row):
        cache.cache_clear()

    class Serial(contextlib.nullcontext):
        def __init__(self, *_, **__):
            super().__init__(self)
            self.map = map

    monkeypatch.setattr(tune, "ProcessPoolExecutor", Serial)
    yield tmp_path
    monkeypatch.undo()
    for cache in (tuning.rows, tuning._row):
        cache.cache_clear()


def test_without_write_nothing_changes_and_with_it_the_best_row_of_that_architecture(copied, monkeypatch, capsys):
    """The winner here: two warps. A row for all architectures is joined by one for this one; the others stay."""
    report = lambda job: _report(registers=16 if job[3]["num_warps"] == 2 else 255)
    monkeypatch.setattr(tune, "compile_candidate", report)
    before = {path.name: path.read_text() for path in copied.glob("*.json")}
    options = ["--ops", "adamw", "--kernel", "norm", "--arch", "100"]
    assert tune.main(options) == 0
    printed = capsys.readouterr().out
    assert "adamw norm sm_100" in printed
    assert {path.name: path.read_text() for path in copied.glob("*.json")} == before
    shipped = tuning.config("adamw", "norm", 90)
    assert tune.main([*options, "--write"]) == 0
    assert tuning.config("adamw", "norm", 100)["num_warps"] == 2
    assert tuning.config("adamw", "norm", 90) == shipped
    (row,) = [r for r in tuning.rows("adamw") if r.get("arch") == 100]
    assert row["by"].startswith("ranked machine code, sm_100, triton ")
    assert {path.name for path in copied.glob("*.json") if path.read_text() != before[path.name]} == {"adamw.json"}


def test_a_row_of_one_architecture_is_replaced_in_place(copied, monkeypatch):
    shipped, other = (tuning.config("linear_cross_entropy", "softmax_xent", arch, 2)["BLOCK_V"] for arch in (90, 80))
    monkeypatch.setattr(
        tune, "compile_candidate", lambda job: _report(registers=16 if job[3]["BLOCK_V"] == 2 * shipped else 99)
    )
    count = len(tuning.rows("linear_cross_entropy"))
    assert tune.main(["--ops", "linear_cross_entropy", "--kernel", "softmax_xent", "--arch", "90", "--write"]) == 0
    assert len(tuning.rows("linear_cross_entropy")) == count
    assert tuning.config("linear_cross_entropy", "softmax_xent", 90, 2)["BLOCK_V"] == 2 * shipped
    assert tuning.config("linear_cross_entropy", "softmax_xent", 80, 2)["BLOCK_V"] == other


def test_a_rows_own_candidate_is_tried_and_what_it_replaces_stays_a_candidate(copied, monkeypatch):
    arguments = ("linear_cross_entropy", "softmax_xent", 90, 2)
    shipped, (first, *rest) = tuning.config(*arguments), tuning.candidates(*arguments)
    assert first not in tune.candidates(arguments[0], {"config": shipped})  # no neighbour: nothing else would try it
    monkeypatch.setattr(tune, "compile_candidate", lambda job: _report(registers=16 if job[3] == first else 255))
    assert (
        tune.main(
            [
                "--ops",
                "linear_cross_entropy",
                "--kernel",
                "softmax_xent",
                "--arch",
                "90",
                "--candidates",
                "2",
                "--write",
            ]
        )
        == 0
    )
    assert tuning.config(*arguments) == first
    assert tuning.candidates(*arguments) == [shipped, *rest]


def test_what_does_not_compile_is_never_written(copied, monkeypatch, capsys):
    monkeypatch.setattr(tune, "compile_candidate", lambda job: "CompilationError: no")
    before = tuning.path("adamw").read_text()
    assert tune.main(["--ops", "adamw", "--arch", "90", "--write"]) == 0
    assert tuning.path("adamw").read_text() == before
    assert "CompilationError: no" in capsys.readouterr().out


def test_an_unknown_kernel_is_named(copied):
    with pytest.raises(SystemExit, match="no kernel 'sideways' in adamw for sm_90"):
        tune.main(["--ops", "adamw", "--kernel", "sideways", "--arch", "90"])


def test_of_equals_what_ships_stays(copied, monkeypatch):
    monkeypatch.setattr(tune, "compile_candidate", lambda job: _report(registers=32 + 8 * (job[3]["num_warps"] == 4)))
    shipped = tuning.config("adamw", "total", 90)
    ((_, first, _), *_) = tune.by_machine_code("adamw", 2, 90, type("Pool", (), {"map": map}), limit=1)
    assert first == shipped
    smaller = {**shipped, "num_warps": 8}  # as many warps fit, as large a tile, fewer registers
    monkeypatch.setattr(tune, "candidates", lambda op, row: [smaller, shipped])
    ((_, first, _), *_) = tune.by_machine_code("adamw", 2, 90, type("Pool", (), {"map": map}), limit=2)
    assert first == shipped
