"""The tree is laid out as CONTRIBUTING.md says: one stem in every folder, imports one way."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SLOW_FILES

import gpt2_fast
from gpt2_fast import moved
from gpt2_fast.ops import rooms
from gpt2_fast.ops.runtime.dispatch import TABLE, names

rooms()  # each fills its row of TABLE

ROOT = Path(__file__).parent.parent
ROOM = {"attention_decode": "attention"}  # two kernels that share one room
SOURCE = {"triton": "kernels/{}.py", "cpp": "csrc/{}.cpp", "cuda": "csrc/{}.cu"}

# From the leaves up: a room imports from those on lines above its own, and a package from itself.
LAYERS = [
    {"config", "files", "hub_client", "lazy", "modules", "seen", "sources", "uncompiled"},
    {"kernels"},
    {"ops"},
    {"checkpoint", "compat", "data", "hf_patch", "modes", "outputs", "parallel"},
    {"generate", "hf", "optim_state", "report"},
    {"layers"},
    {"model", "optim"},
    {"nanogpt", "evaluate"},
    {"train"},
    {"recipes"},
    {"cli", "moved"},
    {"__main__", "__init__"},
]
LAYER = {room: layer for layer, rooms in enumerate(LAYERS) for room in rooms}


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


def _modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, the kernels by the name that they are installed under."""
    modules = {}
    for folder, package in ((ROOT / "gpt2_fast", "gpt2_fast"), (ROOT / "kernels", "gpt2_fast.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            modules[".".join([package, *(parts[:-1] if parts[-1] == "__init__" else parts)])] = path
    return modules


MODULES = _modules()


def _room(module: str) -> str:
    """The package below gpt2_fast that a module is in, or the module itself where it lies in no package."""
    return (module.split(".") + ["__init__"])[1]


def _nodes(path: Path, types: bool) -> Iterator[ast.AST]:
    """What a file consists of; without types, all but what only a type checker reads."""
    waiting: list[ast.AST] = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        yield node
        if types or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            waiting += ast.iter_child_nodes(node)


def _named(path: Path, module: str, types: bool) -> set[str]:
    """The dotted names that a file imports anywhere in it: absolute, relative, in functions, by import_module."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in _nodes(path, types):
        if isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            # Of an f-string what stands in front of its first value.
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            found |= {name.value.rstrip(".")} if isinstance(name, ast.Constant) else set()
    return {name for name in found if name.split(".")[0] == "gpt2_fast" and name != "gpt2_fast._C"}


def _imports(module: str, types: bool = True) -> set[str]:
    """The modules of this package that one imports: a name in a module counts as that module.

    types: whether imports for a type checker count, which never run.
    """
    found = set()
    for name in _named(MODULES[module], module, types):
        while name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    if MODULES[module].name == "__init__.py" and module != "gpt2_fast":  # what a package exports is behind its name
        found |= {other for other in MODULES if other.rpartition(".")[0] == module}
    return found - {module}


ARROWS = {module: _imports(module) for module in MODULES}


def test_every_module_has_a_room():
    assert len(MODULES) > 50
    homeless = [module for module in MODULES if _room(module) not in LAYER]
    assert not homeless, f"{homeless[0]} is in none of LAYERS: put it into a package, or give it a line there"
    assert LAYER.keys() == {_room(module) for module in MODULES}, "LAYERS has a room that is not there"


def test_imports_run_one_way():
    for module, imported in ARROWS.items():
        for target in imported:
            own = _room(module) == _room(target)
            assert own or LAYER[_room(target)] < LAYER[_room(module)], f"{module} imports {target}, which is not below"


def test_no_module_is_in_a_circle():
    """Of imports that run. Two modules of one package may know each other's types."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(_imports(module, types=False)):
                visit(target, (*path, module))
            done.add(module)

    for module in ARROWS:
        visit(module, ())


def test_implementations_never_import_each_other():
    """Kernels know neither the rooms nor the table; their tables of configurations are written as all files are."""
    for module in MODULES:
        if _room(module) == "kernels":
            assert {_room(target) for target in ARROWS[module]} <= {"kernels", "files"}, module


# Values of a module's variables that fill up as the process runs.
STATE = r"(\w+\.)*(Weak\w+|dict|list|set|defaultdict|local|Lock)\(.*\)|\{\}|\[\]"


def _state(path: Path) -> list[str]:
    """Names in a module that outlive a call: caches, dictionaries keyed by objects, containers that start empty."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            if any(re.search(r"\b(lru_)?cache\b", ast.unparse(decorator)) for decorator in node.decorator_list):
                found.append(node.name)
            found += [name for inner in ast.walk(node) if isinstance(inner, ast.Global) for name in inner.names]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and re.fullmatch(STATE, ast.unparse(node.value or node)):
            found.append(ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target))
    return found


TOP = (
    ".ci .github .gitignore CHANGELOG.md CONTRIBUTING.md LICENSE MANIFEST.in Makefile README.md SECURITY.md benchmarks"
    " constraints.txt csrc docs examples gpt2_fast kernels mkdocs.yml pyproject.toml release setup.py tests"
)


def test_nothing_strange_is_committed():
    """A run's folder, left here by a test or by hand, is soon committed with the rest."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("git does not say what is committed: a source distribution, or another user's checkout")
    assert {name.partition("/")[0] for name in done.stdout.split("\0") if name} <= set(TOP.split())


def test_state_of_the_process_is_named():
    """What outlives a call stands in the docstring of its package, or of a module that is in none."""
    for module, path in MODULES.items():
        room = _room(module)
        text = MODULES.get(f"gpt2_fast.{room}", path).read_text()
        for name in _state(path):
            named = re.search(rf"^State of the process:.*?\b{name}\b", text, re.M | re.S)
            assert named, f"{module}.{name} outlives a call: name it in 'State of the process' of {room}/__init__.py"


def _tables() -> dict[str, tuple[str, ...]]:
    """Package -> the names of the modules and packages in it."""
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    return {p: tuple(m.rpartition(".")[2] for m in MODULES if m.rpartition(".")[0] == p) for p in packages}


@pytest.mark.parametrize("package", sorted(_tables()))
def test_a_package_says_what_is_in_it(package):
    """It is installed; its docstring has a line a module; what it exports is there, and hides no module of it."""
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'"{package}"' in pyproject[pyproject.index("packages = [") :].split("]")[0]
    if package == "gpt2_fast":  # CONTRIBUTING.md has the table of it
        return
    modules, text = _tables()[package], MODULES[package].read_text()
    for name in modules:
        assert re.search(rf"^{name}  +\S", text, re.M), f"the docstring of {package} has no line for {name}"
    exported = importlib.import_module(package)
    names = getattr(exported, "__all__", ())
    assert not set(names) & set(modules)
    for name in names:
        assert getattr(exported, name) is not None
        assert name in dir(exported)


@pytest.mark.parametrize("old", moved.MOVED)
def test_a_moved_module_is_found_by_its_old_name(old):
    new = importlib.import_module(f"gpt2_fast.{moved.MOVED[old]}")
    assert importlib.import_module(f"gpt2_fast.{old}") is new is getattr(gpt2_fast, old)
    assert new.__name__ == new.__spec__.name == f"gpt2_fast.{moved.MOVED[old]}"


def test_the_old_names_are_found_in_a_new_process():
    """Before any module has been imported by its new name, and by each kind of statement."""
    code = """
import gpt2_fast.tokenizer
from gpt2_fast import inspect_plots, plots
from gpt2_fast.sampling import Sampling
from gpt2_fast.data import tokenizer
assert gpt2_fast.tokenizer is tokenizer and plots.loss_figure and inspect_plots.MATRICES and Sampling.__module__
assert gpt2_fast.doctor.explain_patch
try:
    import gpt2_fast.nothing
except ModuleNotFoundError as error:
    assert error.name == "gpt2_fast.nothing"
assert not hasattr(gpt2_fast, "nothing") and not hasattr(gpt2_fast.data, "nothing")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_slow_file_is_there():
    missing = [name for name in SLOW_FILES if not (ROOT / f"tests/test_{name}.py").exists()]
    assert not missing, (
        f"SLOW_FILES of tests/conftest.py names {missing[0]}, and there is no tests/test_{missing[0]}.py"
    )


def test_files_stay_readable():
    """A file past 450 lines asks for a better cut."""
    sources = [p for folder in ("gpt2_fast", "kernels", "csrc", "benchmarks") for p in (ROOT / folder).rglob("*")]
    for path in sources:
        if path.suffix in (".py", ".cpp", ".h", ".cu"):
            count = len(path.read_text().splitlines())
            assert count <= 450, f"{path.relative_to(ROOT)} has {count} lines"


def test_cpp_is_as_wide_as_python_and_has_no_banners():
    """ruff reads Python alone: 120 characters, and no comment that draws a line across the file."""
    for path in sorted((ROOT / "csrc").iterdir()):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"csrc/{path.name}:{number}"
            assert len(line) <= 120, f"{where} has {len(line)} characters; 120 are as many as Python has"
            assert not re.search(r"(//|/\*) *[-=*#~]{3}", line), f"{where} is a banner: {line.strip()}"
