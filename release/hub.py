"""python -m release.hub [FOLDER]: LayerNorm, attention and loss as a Hugging Face `kernels` repository, in Triton.

`kernels` imports build/<variant>/__init__.py under a name of its own, beside other versions of the same kernel. So the
folder has the three operations' files and all that they import, as they stand in the package, but each import of
gpt2_fast as a relative one, and the operators in a namespace of this version's own. A variant is a kind of device: on a
GPU the Triton kernels run, on a CPU the reference (and Triton's interpreter, for tests).
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"torch-cuda": "cuda", "torch-cpu": "cpu"}
OPS = ("add_layernorm", "attention", "linear_cross_entropy")
NOTE = "a Hugging Face kernel is of Triton alone; pip install gpt2_fast has the C++ kernels"
INIT = '''"""GPT-2's LayerNorm (with dropout and residual), causal attention and head with cross-entropy, in Triton.

`impl="auto"` takes the Triton kernels on a GPU and the reference in plain PyTorch elsewhere.
"""

from . import layers
from .ops.add_layernorm import add_layernorm, add_layernorm_reference
from .ops.attention import attention, attention_reference, segments_from
from .ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from .ops.runtime.philox import NO_DROPOUT, Dropout, new_key

__all__ = [
    "NO_DROPOUT",
    "Dropout",
    "add_layernorm",
    "add_layernorm_reference",
    "attention",
    "attention_reference",
    "layers",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "new_key",
    "segments_from",
]
'''
LAYERS = '''"""What `kernels.kernelize` puts in place of a module's forward."""

from torch import Tensor, nn

from .ops.add_layernorm import add_layernorm


class LayerNorm(nn.Module):
    """For torch.nn.LayerNorm over the last dimension, with weight and bias."""

    has_backward = True
    can_torch_compile = True

    def forward(self, input: Tensor) -> Tensor:
        return add_layernorm(input, None, self.weight, self.bias, eps=self.eps)[0]
'''


def where(module: str) -> Path | None:
    """The file of a module of the package; None where the name is none."""
    parts = module.split(".")[1:]
    base = ROOT.joinpath(*parts) if parts[:1] == ["kernels"] else ROOT.joinpath("gpt2_fast", *parts)
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def imports(module: str) -> Iterator[str]:
    """The package's modules that one of them imports, at its top or in a function."""
    path = where(module)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
        base = ".".join([*above, *([node.module] if node.module else [])])
        if base.split(".")[0] == "gpt2_fast":
            yield from (name for name in (base, *(f"{base}.{alias.name}" for alias in node.names)) if where(name))


def closure() -> set[str]:
    """All modules that the three operations need, and the packages that these lie in; not gpt2_fast's own __init__."""
    found: set[str] = set()
    waiting = {f"gpt2_fast.ops.{op}" for op in OPS}
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= {name for name in (*imports(module), module.rpartition(".")[0]) if name != "gpt2_fast"} - found
    return found


def relative(module: str) -> str:
    """A module's text with its imports of gpt2_fast made relative."""
    path = where(module)
    dots = "." * (len(module.split(".")) - (path.name != "__init__.py"))
    text = re.sub(r"^( *from )gpt2_fast(?:\.([\w.]+))?(?= import )", lambda m: f"{m[1]}{dots}{m[2] or ''}",
                  path.read_text(), flags=re.MULTILINE)  # fmt: skip
    left = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Import) for a in n.names if "gpt2_fast" in a.name]
    if left:
        raise ValueError(f"{path}, line {left[0].lineno}: write it as `from gpt2_fast... import`, for release.hub")
    return text


def files() -> dict[str, str]:
    """Path in a variant's folder -> text: the same for every variant."""
    found = {"__init__.py": INIT, "layers.py": LAYERS, "no_extension.txt": NOTE + "\n"}
    for module in sorted(closure()):
        path = where(module)
        parts = module.split(".")[1:]
        name = [*parts, "__init__.py"] if path.name == "__init__.py" else [*parts[:-1], f"{parts[-1]}.py"]
        found["/".join(name)] = relative(module)
    for op in (*OPS, "attention_decode", "bias"):
        found[f"kernels/configs/{op}.json"] = (ROOT / "kernels" / "configs" / f"{op}.json").read_text()
    library = found["ops/runtime/library.py"]
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]
    named = library.replace('NAMESPACE = "gpt2_fast"', f'NAMESPACE = "gpt2_fast_{digest}"')
    if named == library:
        raise ValueError("ops/runtime/library.py names its namespace in another way")
    return found | {"ops/runtime/library.py": named}


def build(folder: Path) -> None:
    """Writes the repository's build/<variant> folders, in place of what was there."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    contents = files()
    digest = re.search(r"gpt2_fast_(\w+)", contents["ops/runtime/library.py"])[1]
    for variant, backend in VARIANTS.items():
        metadata = {"name": "gpt2-fast", "id": f"_gpt2_fast_{backend}_{digest}", "version": 1, "license": "MIT",
                    "python-depends": [], "backend": {"type": backend}}  # fmt: skip
        for name, text in {**contents, "metadata.json": json.dumps(metadata, indent=2) + "\n"}.items():
            path = folder / "build" / variant / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    shutil.copy(ROOT / "LICENSE", folder / "LICENSE")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"
    build(target)
    print(f"{target}: {', '.join(VARIANTS)}, {len(closure())} modules")
