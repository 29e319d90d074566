"""The names that people import: what documentation imports or refers to by a dotted path, and `gpt2_fast.__all__`.

They protect everybody's programs while modules move: a name that was written down once goes on working, whether or not
the documentation still has it. So `python -m tests.golden names` adds to `public_names.txt` what the documentation has
come to name, and never removes a line; a line is removed by hand, in a commit that says why.
"""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

FILE = Path(__file__).with_name("public_names.txt")
COMMAND = "python -m tests.golden names"
ROOT = Path(__file__).parent.parent.parent
PACKAGE = "gpt2_fast"


def documents() -> list[Path]:
    """README, notes, docs/ and notebooks."""
    return sorted(
        p for pattern in ("*.md", "benchmarks/*.md", "docs/**/*.md", "examples/*") for p in ROOT.glob(pattern)
    )


def _in_text(text: str) -> set[str]:
    text = re.sub(r"^:::.*", "", text, flags=re.M)  # where a docstring lies, which may move: no name to import by
    names = set(re.findall(rf"\b{PACKAGE}(?:\.[A-Za-z_]\w*)+", text))
    for module, imported in re.findall(rf"from ({PACKAGE}[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.strip().split(' as ')[0]}" for name in imported.split(",") if name.strip()}
    return names


def _in_code(code: str) -> set[str]:
    """Attributes of what is imported, too: `inspect.summary` after `from gpt2_fast import inspect`."""
    bound, names = {}, set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            names.add(f"{bound[node.value.id]}.{node.attr}")
    return names | set(bound.values())


def _notebook(path: Path) -> tuple[str, str]:
    """(all text, its code without magics)."""
    cells = json.loads(path.read_text())["cells"]
    code = "".join(
        line for cell in cells if cell["cell_type"] == "code" for line in [*cell["source"], "\n"] if line[0] not in "%!"
    )
    return "\n".join("".join(cell["source"]) for cell in cells), code


def documented() -> set[str]:
    """What the documentation names today, and `__all__`."""
    import gpt2_fast

    names = {f"{PACKAGE}.{name}" for name in gpt2_fast.__all__}
    for path in documents():
        if path.suffix == ".ipynb":
            text, code = _notebook(path)
            names |= _in_text(text) | _in_code(code)
        elif path.suffix in (".md", ".py"):
            names |= _in_text(path.read_text())
    return names


def read() -> list[str]:
    return FILE.read_text().split()


def remake() -> str:
    """Adds what is new; says what."""
    frozen = set(read()) if FILE.exists() else set()
    new = documented() - frozen
    for name in sorted(new):
        resolve(name)
    FILE.write_text("".join(f"{name}\n" for name in sorted(frozen | new)))
    return f"{FILE.name}: added {', '.join(sorted(new)) or 'nothing'}; kept {len(frozen)}"


def resolve(name: str) -> object:
    """The module or the attribute that a dotted name is. Raises ImportError or AttributeError where there is none."""
    module, _, rest = name.partition(".")
    value = importlib.import_module(module)
    for part in rest.split("."):
        module = f"{module}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = importlib.import_module(module)
            except ModuleNotFoundError as error:
                raise ImportError(f"{name}: there is no {module} ({error})") from None
    return value
