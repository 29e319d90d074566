"""The Triton kernels' machine code is what tests/golden/ keeps: registers, spills, shared memory, instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from golden import kernels as golden  # noqa: E402
from gpt2_fast.kernels import aot, shipped  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(golden.FOLDER.glob("kernels-*.csv"))


def _python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Python without the interpreter of Triton, under which nothing is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, **options)


@pytest.mark.timeout(300)
def test_the_sample_compiles_to_the_kept_machine_code():
    """The whole set takes minutes: make test-kernels."""
    done = _python(str(ROOT / "tests/golden/kernels.py"), "--sample")
    if done.returncode == 2:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(golden.sample(triton.__version__))} configurations" in done.stdout


def test_the_pinned_triton_has_a_file():
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned[1] not in golden.HELD, "the pinned Triton's file holds every architecture"
    assert golden.path(pinned[1]) in FILES, f"make it: python tests/golden/kernels.py --write, with Triton {pinned[1]}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_has_every_shipped_configuration_and_no_other(file):
    rows = golden.read(file)
    jobs = golden.jobs(file.stem.removeprefix("kernels-"))
    assert rows.keys() == {(shipped.spec(job).name, str(job.arch)) for job in jobs}
    assert all(re.fullmatch("[0-9a-f]{64}", row["sha256"]) and int(row["registers"]) > 0 for row in rows.values())


def test_the_sample_has_every_kernel_file_and_every_architecture():
    jobs = golden.sample("any other than those of HELD")
    assert {job.stem for job in jobs} == set(shipped.stems())
    assert {job.arch for job in jobs} == set(aot.ARCHS)


def test_what_differs_is_named():
    row = {
        "name": "k bf16", "arch": "90", "registers": "64", "spilled_bytes": "0", "shared_bytes": "1024",
        "mma": "HGMMA:8", "waits": "2", "sha256": "a",
    }  # fmt: skip
    kept, key = {("k bf16", "90"): row}, ("k bf16", "90")
    assert golden.differences(kept, kept, whole=True) == []
    (found,) = golden.differences(kept, {key: {**row, "sha256": "b", "registers": "72", "mma": ""}}, whole=True)
    assert found == "k bf16 sm_90: registers 64 -> 72, mma HGMMA:8 -> none"
    (found,) = golden.differences(kept, {key: {**row, "sha256": "b"}}, whole=True)
    assert found == "k bf16 sm_90: other instructions, all else equal"
    assert golden.differences(kept, {}, whole=False) == []
    assert golden.differences(kept, {}, whole=True) == ["k bf16 sm_90: in the file, but no longer shipped"]
    assert golden.differences({}, kept, whole=True) == ["k bf16 sm_90: not in the file"]


KERNEL = """
import triton
import triton.language as tl

@triton.jit
def {name}(x_ptr, N, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < N)
    tl.store(x_ptr + at, x * {factor} + 1.0, mask=at < N)
"""
HASHES = """
import sys
from gpt2_fast.kernels import aot
sys.path.insert(0, sys.argv[1])
import one, moved, renamed, other
kernels = (one.double, moved.double, renamed.twice, other.double)
for arch in (80, 90, "gfx942"):
    specs = (aot.make_spec(kernel, "k", {"x_ptr": "*fp32", "N": "i32"}, {"BLOCK": 256}, {}) for kernel in kernels)
    print(*(aot.code_hash(aot.compile_spec(spec, arch).binary) for spec in specs))
"""


def test_a_kernel_that_moves_keeps_its_hash_and_one_that_changes_does_not(tmp_path):
    (tmp_path / "one.py").write_text(KERNEL.format(name="double", factor=2.0))
    (tmp_path / "moved.py").write_text("\n" * 10 + KERNEL.format(name="double", factor=2.0))
    (tmp_path / "renamed.py").write_text(KERNEL.format(name="twice", factor=2.0))
    (tmp_path / "other.py").write_text(KERNEL.format(name="double", factor=3.0))
    done = _python("-c", HASHES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for one, moved, renamed, other in lines:
        assert one == moved == renamed != other


def test_what_is_no_cubin_has_no_hash():
    with pytest.raises(ValueError, match="no 64-bit ELF header"):
        aot.code_hash(b"PTX, say")
    header = bytearray(b"\x7fELF\x02" + bytes(59))
    with pytest.raises(ValueError, match="holds no code"):
        aot.code_hash(bytes(header))
