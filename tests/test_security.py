"""Nothing that is loaded runs code: no pickle, no eval; code in the cache is this user's alone; SECURITY.md is true."""

from __future__ import annotations

import ast
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpt2_fast import files

ROOT = Path(__file__).parent.parent
ENVIRONMENT = ("os.environ", "environ")
NO_IDS = pytest.mark.skipif(not hasattr(os, "getuid"), reason="a system without user ids")


def sources(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """Every Python file and notebook below the folders, parsed."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix == ".py":
                yield name, ast.parse(path.read_text())
            elif path.suffix == ".ipynb":
                cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
                for i, cell in enumerate(cells):
                    lines = [line for line in "".join(cell["source"]).splitlines() if not line.startswith(("%", "!"))]
                    yield f"{name}, cell {i}", ast.parse("\n".join(lines))


def faults(name: str, tree: ast.AST) -> Iterator[str]:
    """Calls that could run what a file holds."""
    for node in ast.walk(tree):
        imported = [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
        if isinstance(node, ast.ImportFrom):
            imported = [f"{node.module}.{n}" for n in imported]
        for what in imported:
            if what in ("torch.load", "marshal", "dill", "cloudpickle", "joblib", "shelve"):
                yield f"{name}:{node.lineno} imports {what}"
            if what.startswith("pickle.") and what != "pickle.UnpicklingError":
                yield f"{name}:{node.lineno} imports {what}"
        if not isinstance(node, ast.Call):
            continue
        called, options = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
            yield f"{name}:{node.lineno} calls {called}"
        if called.split(".")[0] in ("pickle", "_pickle") and called.split(".")[-1] != "UnpicklingError":
            yield f"{name}:{node.lineno} calls {called}"
        if called == "torch.load" and options.get("weights_only") != "True":
            yield f"{name}:{node.lineno} calls torch.load without weights_only=True"
        if called in ("np.load", "numpy.load") and options.get("allow_pickle", "False") != "False":
            yield f"{name}:{node.lineno} calls {called} with allow_pickle"
        if called.startswith("yaml.") and "safe" not in called:
            yield f"{name}:{node.lineno} calls {called}"


def test_no_file_runs_code():
    seen = list(sources("gpt2_fast", "kernels", "benchmarks", "examples"))
    assert len(seen) > 100
    assert not [fault for name, tree in seen for fault in faults(name, tree)]


@pytest.mark.parametrize(
    "code",
    ["torch.load(p)", "torch.load(p, weights_only=False)", "from torch import load", "pickle.load(f)", "eval(x)",
     "exec(x)", "from pickle import loads", "np.load(p, allow_pickle=True)", "import dill",
     "pickle.Unpickler(f).load()"],
)  # fmt: skip
def test_what_would_is_seen(code):
    assert list(faults("a file", ast.parse(code)))


def variables(tree: ast.AST) -> Iterator[str]:
    """Environment variables that a file reads; what an f-string puts in is `<NAME>`."""

    def words(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(v.value if isinstance(v, ast.Constant) else "<NAME>" for v in node.values)
        assert isinstance(node, ast.Constant), f"line {node.lineno} reads a variable that the test cannot name"
        return node.value

    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in ENVIRONMENT:
            yield words(node.slice)
        elif isinstance(node, ast.Call):
            owner, _, called = ast.unparse(node.func).rpartition(".")
            if (owner in ENVIRONMENT and called in ("get", "pop", "setdefault")) or called == "getenv":
                yield words(node.args[0])


def test_every_environment_variable_is_in_security_md():
    text = (ROOT / "SECURITY.md").read_text()
    setup = ("setup.py", ast.parse((ROOT / "setup.py").read_text()))
    read = {variable: name for name, tree in [*sources("gpt2_fast", "kernels"), setup] for variable in variables(tree)}
    assert {"GPT2_FAST_CACHE", "GPT2_FAST_ISA", "CXX", "TRITON_<NAME>_PATH"} <= read.keys()
    missing = {variable: name for variable, name in read.items() if f"`{variable}" not in text}
    assert not missing, f"SECURITY.md does not say what {missing} choose"
    for path in (ROOT / "csrc").iterdir():
        assert "getenv" not in path.read_text(), f"{path.name} reads the environment: name it in SECURITY.md"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The file of code that was kept."""
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    previous = os.umask(0o002)  # of many systems, where a group has one user
    try:
        files.write_code("kernels.bin", b"machine code")
    finally:
        os.umask(previous)
    return tmp_path / "cache" / "code" / "kernels.bin"


def test_code_comes_back(kept):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert files.read_code("kernels.bin") == b"machine code"
        assert files.read_code("others.bin") is None
    assert kept.parent.stat().st_mode & 0o777 == 0o700 or os.name == "nt"
    files.write_code("kernels.bin", b"newer")
    assert files.read_code("kernels.bin") == b"newer"


def _link(path):
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _linked_folder(path):
    path.parent.rename(path.parent.with_name("elsewhere"))
    path.parent.symlink_to("elsewhere")


@NO_IDS
@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (lambda path: path.chmod(0o620), "it can be written by others"),
        (lambda path: path.chmod(0o602), "it can be written by others"),
        (lambda path: path.parent.chmod(0o770), "code can be written by others"),
        (lambda path: path.write_bytes(b"other code"), "its SHA-256 is another"),
        (lambda path: path.with_name("kernels.bin.sha256").write_bytes(b"\xff\n"), "its SHA-256 is not text"),
        (lambda path: path.with_name("kernels.bin.sha256").unlink(), "its SHA-256 is missing"),
        (_link, "symbolic links"),
        (_linked_folder, "code can be written by others"),
    ],
)
def test_code_that_another_may_have_written_is_compiled_again(kept, tamper, reason, monkeypatch):
    from gpt2_fast.ops.runtime import cuda

    tamper(kept)
    with pytest.warns(UserWarning, match="kernels.bin is not loaded, and compiled again") as caught:
        assert files.read_code("kernels.bin") is None
    (said,) = [str(w.message) for w in caught]
    assert said.endswith(reason) or reason in said
    assert "\n" not in said

    class Compiler:
        version = (13, 0)

        def __init__(self, path):
            pass

        def compile(self, folder, arch):
            return b"fresh"

    monkeypatch.setattr(cuda, "Nvrtc", Compiler)
    monkeypatch.setattr(cuda, "find_nvrtc", lambda: Path("libnvrtc.so"))
    monkeypatch.setattr(cuda, "read_code", lambda name: files.read_code("kernels.bin"))
    with pytest.warns(UserWarning, match="compiled again"):
        assert cuda.compiled(90) == b"fresh"


@NO_IDS
def test_another_users_code_is_neither_read_nor_written_over(kept, monkeypatch):
    monkeypatch.setattr(os, "getuid", lambda: kept.stat().st_uid + 1)
    with pytest.warns(UserWarning, match="can be written by others"):
        assert files.read_code("kernels.bin") is None
    with pytest.raises(PermissionError, match="not this user's"):
        files.write_code("kernels.bin", b"newer")
    assert kept.read_bytes() == b"machine code"


def test_a_checkpoints_code_is_not_run(tmp_path):
    from gpt2_fast import checkpoint

    class Runs:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"model": Runs()}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="cannot be read safely"):
        checkpoint.load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_code_is_private_whatever_the_users_mode(tmp_path, monkeypatch):
    """Where a user's files can be written by a group, compiled code still cannot, and so is loaded."""
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path))
    monkeypatch.setattr(files, "_UMASK", 0o002)
    files.write_code("kernel", b"code")
    assert (files.code_folder() / "kernel").stat().st_mode & 0o077 == 0
    assert files.read_code("kernel") == b"code"
