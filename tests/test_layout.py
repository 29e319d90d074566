"""The tree is laid out as CONTRIBUTING.md says: one stem in every folder, imports one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from gpt2_fast.ops.runtime.dispatch import TABLE, names

ROOT = Path(__file__).parent.parent
ROOM = {"attention_decode": "attention"}  # two kernels that share one room
SOURCE = {"triton": "kernels/{}.py", "cpp": "csrc/{}.cpp", "cuda": "csrc/{}.cu"}

# From the leaves up: a module imports from layers below its own, or from its own where that is marked True.
LAYERS = [
    ({"files", "cards", "config", "train_config", "sources", "patch_outputs", "jsonl"}, False),
    ({"kernels"}, True),
    ({"ops"}, True),
    ({"tokenizer", "checkpoint", "patch_attention"}, False),
    ({"model", "data", "optim", "formats", "plots", "patch_modules", "sampling", "text_stream"}, False),
    ({"kv_cache"}, False),
    ({"decoder"}, False),
    ({"decoding"}, False),
    ({"generate", "generate_batch", "convert", "inspect", "inspect_plots", "evaluate", "patching", "nanogpt"}, False),
    ({"train", "doctor", "eval_tasks"}, False),
    ({"cli"}, False),
]

LAZY = {("model", "generate_batch")}  # a method that is imported when it is called


@pytest.mark.parametrize("op", TABLE)
def test_one_stem_in_every_folder(op):
    room = ROOM.get(op, op)
    assert (ROOT / f"gpt2_fast/ops/{room}.py").exists()
    assert (ROOT / f"tests/ops/test_{room}.py").exists()
    for impl in names(op) & SOURCE.keys():
        assert (ROOT / SOURCE[impl].format(op)).exists(), f"{op}: {impl} has no {SOURCE[impl].format(op)}"
    text = (ROOT / f"gpt2_fast/ops/{room}.py").read_text()
    for needed in (f"def {op}_reference", f"def {op}(", "def samples", "def cost"):
        assert needed in text, f"gpt2_fast/ops/{room}.py has no {needed}"


def _layer(module: str) -> int:
    return next(i for i, (members, _) in enumerate(LAYERS) if module in members)


def _imports(path: Path) -> set[str]:
    """The gpt2_fast modules, or packages of it, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in dotted if name.startswith("gpt2_fast.")}
    return found - {"_C"}


def test_imports_run_one_way():
    files = [p for p in (ROOT / "gpt2_fast").rglob("*.py") if p.name != "__init__.py"]
    files += list((ROOT / "kernels").glob("*.py"))
    assert len(files) > 20
    for path in files:
        module = "kernels" if path.parent.name == "kernels" else "ops" if "ops" in path.parts else path.stem
        layer = _layer(module)
        for imported in _imports(path):
            own = imported == module and LAYERS[layer][1]
            assert own or _layer(imported) < layer or (module, imported) in LAZY, (
                f"{path.relative_to(ROOT)} imports {imported}, which is not below it"
            )


def test_implementations_never_import_each_other():
    """Kernels know neither the rooms nor the table."""
    for path in (ROOT / "kernels").glob("*.py"):
        assert _imports(path) <= {"kernels"}, path.name


def test_files_stay_readable():
    """A file past 450 lines asks for a better cut."""
    sources = [p for folder in ("gpt2_fast", "kernels", "csrc", "benchmarks") for p in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            count = len(path.read_text().splitlines())
            assert count <= 450, f"{path.relative_to(ROOT)} has {count} lines"
