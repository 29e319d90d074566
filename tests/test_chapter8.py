"""examples/chapter8.ipynb: its cells run in order on a tiny checkpoint, and it is stored with pictures of a real run.

The cells are plain Python, so they are run with `exec`, the last expression of each evaluated as a notebook does.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import re
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from gpt2_fast import GPT2Config, GPT2LMHeadModel, config
from gpt2_fast.checkpoint import expected_shapes

NOTEBOOK = Path(__file__).parent.parent / "examples" / "chapter8.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
TINY = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2)


def code_cells():
    return [cell for cell in CELLS if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(names, what each cell ended in, the image drawn with pyplot) after all cells ran."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(2)
    GPT2LMHeadModel(TINY).save_pretrained(folder)
    names, values, drawn = {}, [], []
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context({"backend": "agg"}):
        patch.setenv("MODEL", str(folder))
        patch.setitem(config.PRESETS, "nano", {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 1})
        patch.setattr(plt, "show", lambda: drawn.extend(plt.gca().images))
        for cell in code_cells():
            body = ast.parse("".join(cell["source"])).body
            last = body.pop() if isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            values.append(last and eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        plt.close("all")
    return names, values, drawn


def test_it_is_the_model_of_the_environment(ran):
    names = ran[0]
    assert names["config"] == TINY
    assert [list(t.shape) for t in names["sd"].values()] == [list(s) for s in expected_shapes(TINY).values()]


def test_every_picture_is_drawn(ran):
    names, values, drawn = ran
    figures = [value for value in values if isinstance(value, Figure)]
    assert len(figures) == 5
    for figure in figures:  # what a notebook asks a value for
        assert plt.imread(io.BytesIO(figure._repr_png_())).std() > 0.02  # not one colour
    weight = GPT2LMHeadModel.from_pretrained(names["MODEL"]).state_dict()["transformer.h.1.attn.c_attn.weight"]
    assert np.array_equal(drawn[0].get_array(), weight[:300, :300])
    assert drawn[0].get_cmap().name == "gray"


def test_it_generates_and_learns(ran):
    names = ran[0]
    assert len(names["samples"]) == len(set(names["samples"])) == 5
    assert names["probabilities"].sum().item() == pytest.approx(1, abs=1e-4)
    losses = [record["loss"] for record in names["records"]]
    assert losses[0] == pytest.approx(np.log(50257), abs=0.3)
    assert losses[-1] < losses[0] - 3
    assert names["after"] < names["before"] * 0.9


def test_it_is_stored_as_it_ran():
    """In order, without errors or warnings, with six pictures, of the checkpoint that the notebook names."""
    assert [cell["execution_count"] for cell in code_cells()] == list(range(1, len(code_cells()) + 1))
    outputs = [output for cell in code_cells() for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "display_data", "execute_result"}
    text = "".join("".join(output["text"]) for output in outputs if output["output_type"] == "stream")
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 6
    for picture in pictures:
        assert plt.imread(io.BytesIO(base64.b64decode(picture))).std() > 0.02
    assert "the preset `nano`" in "".join(CELLS[0]["source"])
    nano = GPT2Config.from_preset("nano")
    for name, shape in expected_shapes(nano).items():
        assert re.search(rf"^{re.escape(name)} +{re.escape(str(list(shape)))}$", text, re.MULTILINE)
    assert float(re.search(r"loss (\S+) after 50 steps", text)[1]) < 0.2
    assert not re.search(r"/(home|root|tmp|work)/", NOTEBOOK.read_text())
