"""examples/colab_t4.ipynb: its ten cells run in order in an empty folder, on this machine's device.

The Python of a cell is run with `exec`, a line that begins with "!" by the shell with what is in braces filled in, as
IPython does. What %pip names is what is under test, and installed already.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from gpt2_fast.cli import main
from gpt2_fast.config import PRESETS

NOTEBOOK = Path(__file__).parent.parent / "examples" / "colab_t4.ipynb"
CELLS = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def shell(line: str, names: dict, folder: Path) -> str:
    """What a line prints. The command runs here: a process of its own for each would be most of the time."""
    filled = re.sub(r"\{([^{}]+)\}", lambda found: str(eval(found[1], names)), line)
    if filled.startswith("gpt2-fast "):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(shlex.split(filled)[1:]) == 0
        return out.getvalue()
    done = subprocess.run(filled, shell=True, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(folder, names, what each cell printed or ended in) after all cells ran, on a nano preset a quarter as wide."""
    folder, names, results = tmp_path_factory.mktemp("colab"), {}, []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setitem(PRESETS, "nano", {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256})
        for cell in CELLS:
            lines = "".join(cell["source"]).splitlines()
            body = ast.parse("\n".join(line for line in lines if line[:1] not in ("!", "%"))).body
            last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            result = last and eval(compile(ast.Expression(last.value), "cell", "eval"), names)
            for line in lines:  # behind the Python of its cell, in all of these
                if line[:1] in ("!", "%"):
                    result = shell(line[1:], names, folder) if line[0] == "!" else line
            results.append(result)
    return folder, names, results


def test_ten_cells_train_and_write(ran):
    folder, names, results = ran
    assert len(CELLS) == 10
    assert results[0].split()[3:] == ["gpt2_fast", "transformers"]
    assert "impl='auto'" in results[1]
    (figure,) = (value for value in results if isinstance(value, Figure))
    assert figure._repr_png_()
    assert results[5].startswith("def ")
    steps = [
        r["step"] for r in map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines()) if "loss" in r
    ]
    assert steps == list(range(1, names["steps"] * 3 // 2 + 1))
    assert (folder / "run.tar.gz").stat().st_size > 1 << 20


def test_the_loop_learns_and_transformers_agrees(ran):
    _, names, _ = ran
    assert (
        names["optimizer"].state[names["optimizer"].param_groups[0]["params"][0]]["step"].item() == names["steps"] // 4
    )
    logits = [model(names["inputs"]).logits for model in (names["theirs"], names["model"])]
    assert (logits[0] - logits[1]).abs().max() < 1e-4


def test_it_is_stored_without_outputs():
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS)
