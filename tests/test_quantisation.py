"""The benchmark of what packed weights cost in perplexity."""

import importlib.util
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import quantisation
from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    config = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=32, initializer_range=0.3)
    GPT2LMHeadModel(config).save_pretrained(path)
    return path


def test_perplexities_are_the_models_own(folder, tmp_path, capsys):
    (text := tmp_path / "text.txt").write_text(TEXT)
    out = tmp_path / "out.json"
    options = ["--text", str(text), "--context", "16", "--windows", "3", "--json", str(out)]
    assert quantisation.main([str(folder), *options]) == 0
    out_text = capsys.readouterr().out
    assert "45 tokens scored, 3 windows of 16" in out_text
    assert ("not measured: q4_0: gguf is not installed" in out_text) == (importlib.util.find_spec("gguf") is None)
    measured = json.loads(out.read_text())

    windows = quantisation.cut_windows(TEXT, 16, 3)
    model = GPT2LMHeadModel.from_pretrained(folder, impl="reference", dtype=torch.float64)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert math.log(measured["float32"]) == pytest.approx(loss, rel=1e-5)
    for weights in ("bfloat16", "int8", "int4"):
        assert measured[weights] != measured["float32"]
        assert math.log(measured[weights]) == pytest.approx(loss, rel=0.05)
    assert abs(measured["divergence"]["float32"]) < 1e-9
    for weights in ("bfloat16", "int8", "int4"):
        rounded = PackedModel(parameters_of(model), weights, impl="reference", dtype=torch.float64)
        exact = PackedModel(parameters_of(model), "float32", impl="reference", dtype=torch.float64)
        logits = [p.prefill(windows[:, :1], PackedCache(p, 3, 16)) for p in (rounded, exact)]
        found = (logits[1].softmax(-1) * (logits[1].log_softmax(-1) - logits[0].log_softmax(-1))).sum(-1).mean().item()
        once = quantisation.cost(rounded, exact, windows[:, :2]).divergence
        assert once == pytest.approx(found, rel=1e-9)
        assert once > 0
    assert measured["divergence"]["int8"] < 0.1 * measured["divergence"]["int4"]


def test_a_peers_format_rounds_the_matrices_alone(folder, monkeypatch):
    seen = []

    def rounded(matrix, kind):
        seen.append((kind, matrix.shape))
        return matrix + 1

    monkeypatch.setitem(sys.modules, "benchmarks.peers.gguf_file", SimpleNamespace(rounded=rounded))
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32)
    before = {name: p.clone() for name, p in model.named_parameters()}
    other = dict(quantisation.rounded_as_gguf(model, "q4_0").named_parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])
        matrix = p.ndim == 2 and "wpe" not in name
        assert torch.equal(other[name], p + 1 if matrix else p), name
    assert ("q4_0", (50257, 64)) in seen
    assert ("q4_0", (192, 64)) in seen, "blocks run along the inputs of an output"


def test_text_too_short_is_one_line(folder, tmp_path, capsys):
    (text := tmp_path / "text.txt").write_text("short")
    with pytest.raises(SystemExit) as ended:
        quantisation.main([str(folder), "--text", str(text)])
    assert ended.value.code == 1
    assert "--text has 1 tokens and a window 128" in capsys.readouterr().err
