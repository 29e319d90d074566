"""`gpt2-fast doctor`: what it says of this machine, and the Triton kernels compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from gpt2_fast.cli import main
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.dispatch import TABLE, ImplementationUnavailable
from gpt2_fast.report.machine import version

ROW = re.compile(r"^(\S+).* (sm_\d+|gfx\w+) +(\d+) +(\d+) +(\d+)  (.*?)(?:  FAILED: .*)?$")
FAILURE = re.compile(r"^(.*\S) +(?:sm_\d+|gfx\w+) .*  FAILED: (.*)$", re.MULTILINE)
# The kernels are fitted to Triton 3.6 to 3.9, with which none spills. Another ptxas allots registers otherwise: it may
# keep up to four a thread in memory in a few configurations, and doctor says so.
SPILLED_ELSEWHERE = 0 if (3, 6) <= tuple(map(int, version("triton").split(".")[:2])) <= (3, 9) else 16


def test_names_what_runs_and_why(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert f"torch {torch.__version__}" in printed
    assert f"instruction set in use: {dispatch.extension().isa()}" in printed
    for op in TABLE:
        assert re.search(rf"^  {op} +(cpp|aten|triton|cuda)$", printed, re.MULTILINE), op


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [["doctor"], ["--version"]], ids=str)
def test_nobody_reads_what_is_printed(arguments, unbuffered):
    """As with `| head -1`: no message, and the status that other tools have then."""
    command, environment = (
        [sys.executable, "-m", "gpt2_fast", *arguments],
        os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--quick"], "--quick goes with --kernels"),
        (["--arch", "nonsense"], "--arch goes with --kernels"),
        (["--patch", "gpt2", "--quick"], "--quick goes with --kernels"),
        (["--patch", "gpt2", "--kernels"], "--patch and --kernels exclude each other"),
    ],
    ids=str,
)
def test_an_option_without_effect_is_refused(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_runs_folder_is_told_from_its_checkpoint(tmp_path, capsys):
    (tmp_path / "checkpoint-000002").mkdir()
    (tmp_path / "checkpoint-000002" / "config.json").write_text("{}")
    assert main(["doctor", "--patch", str(tmp_path)]) == 2
    assert f"{tmp_path}/checkpoint-000002 has one" in capsys.readouterr().err


def test_says_why_an_implementation_was_passed_over(monkeypatch, capsys):
    monkeypatch.setattr(dispatch, "_extension_missing", lambda: "the C++ extension is not built; run: pip install -e .")
    chosen, passed = dispatch.explain("attention", torch.device("cpu"), torch.float32)
    assert chosen == "reference"
    assert passed == [("cpp", "the C++ extension is not built; run: pip install -e .")]
    assert main(["doctor"]) == 0
    assert "not cpp: the C++ extension is not built; run: pip install -e ." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("requires", "fix"),
    [
        (["filelock", 'triton==3.7.1; sys_platform == "linux"'], "run: pip install triton==3.7.1"),
        (["filelock", 'pytest-triton>=1; extra == "x"'], "a CUDA build of torch brings the one that fits"),
        (None, "a CUDA build of torch brings the one that fits"),
    ],
)
def test_advises_no_other_triton_than_torchs_own(requires, fix, monkeypatch, capsys):
    """Another Triton beside a torch that requires one breaks torch.compile, and pip says so only afterwards."""
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(dispatch.importlib.metadata, "requires", lambda name: requires)
    dispatch.triton_missing.cache_clear()
    try:
        assert fix in dispatch.triton_missing()
        assert not re.search(r"install triton(?!==3\.7\.1)", dispatch.triton_missing())
        assert main(["doctor", "--kernels"]) == 1
        assert fix in capsys.readouterr().out
    finally:
        dispatch.triton_missing.cache_clear()


def test_a_named_implementation_never_falls_back(monkeypatch):
    monkeypatch.setattr(dispatch, "_extension_missing", lambda: "it is not built; run: pip install -e .")
    dispatch._choice.cache_clear()
    try:
        with pytest.raises(ImplementationUnavailable, match="impl='cpp' cannot run: it is not built; run"):
            dispatch.choose("attention", "cpp", torch.device("cpu"), torch.float32)
    finally:
        dispatch._choice.cache_clear()


def _compile_kernels(*arguments: str) -> list[tuple[str, ...]]:
    """Rows (name, target, registers, spilled, shared, instructions) of doctor --kernels.

    It must succeed, but for the spills that a Triton past 3.9 is allowed, and its exit status must say so.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "gpt2_fast.cli", "doctor", "--kernels", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    failures = FAILURE.findall(done.stdout)
    assert done.returncode == (1 if failures else 0), done.stdout + done.stderr
    for name, reason in failures:
        spill = re.fullmatch(r"spills (\d+) bytes a thread", reason)
        assert spill is not None, f"{name}: {reason}"
        assert int(spill[1]) <= SPILLED_ELSEWHERE, f"{name}: {reason}"
    return [match.groups() for match in map(ROW.match, done.stdout.splitlines()) if match]


@pytest.mark.timeout(600)
def test_kernels_compile_without_spills_and_on_tensor_cores():
    """One configuration of each kernel for one architecture; all of them: make test-kernels.

    test_golden_kernels.py holds the machine code for the others.
    """
    rows = _compile_kernels("--quick", "--arch", "80")
    assert {arch for _, arch, *_ in rows} == {"sm_80"}
    assert all(int(spilled) <= SPILLED_ELSEWHERE for _, _, _, spilled, _, _ in rows)
    names = {name for name, *_ in rows}
    assert {"adamw", "add_layernorm", "softmax_xent", "mlp", "attention.forward"} <= names
    for name, *_, mma in rows:
        if name in ("attention.forward", "attention.backward_dq", "attention.backward_dkdv") and mma != "none":
            assert "HMMA" in mma, f"{name}: {mma}"
    products = {"attention.forward", "attention.backward_dq", "attention.backward_dkdv", "mlp"}
    assert products <= {name for name, *_, mma in rows if "MMA" in mma}  # float32 products are exact: plain FMA


def test_a_kernel_that_spills_is_a_failure():
    from gpt2_fast.kernels import aot

    good = {
        "registers": 64,
        "spilled_bytes": 0,
        "shared_bytes": 1000,
        "shared_limit": 163 << 10,
        "mma": {},
        "loops": [],
    }
    assert aot.problems(good) == []
    assert aot.problems({**good, "spilled_bytes": 8}) == ["spills 8 bytes a thread"]
    assert "the limit is" in aot.problems({**good, "shared_bytes": 1 << 20})[0]
