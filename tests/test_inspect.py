"""What inspect says and draws: counts against the model, attention against transformers, images against tensors."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import transformers
from matplotlib.figure import Figure

from gpt2_fast import checkpoint, cli
from gpt2_fast.config import PRESETS, GPT2Config, num_params
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.report import inspect, model_figures
from gpt2_fast.report.figures import smoothed
from gpt2_fast.report.measures import weight_measures

TINY = {"n_positions": 24, "n_embd": 32, "n_layer": 3, "n_head": 2}
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def tiny(**overrides):
    """Config and random weights, biases and LayerNorms too, of a small model."""
    config = GPT2Config(**{**TINY, "vocab_size": 61, **overrides})
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    return config, model.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny checkpoint of GPT-2's vocabulary."""
    torch.manual_seed(1)
    config, weights = tiny(vocab_size=50257)
    path = tmp_path_factory.mktemp("model")
    checkpoint.save_pretrained(path, weights, config)
    return path


def test_counts_of_gpt2():
    config = GPT2Config.from_preset("gpt2")
    assert inspect.parameter_counts(config) == {
        "token embedding": 38_597_376,
        "position embedding": 786_432,
        "attention": 12 * (768 * 2304 + 2304 + 768 * 768 + 768),
        "MLP": 12 * (2 * 768 * 3072 + 3072 + 768),
        "LayerNorm": 25 * 2 * 768,
        "head": 0,
    }
    assert sum(inspect.parameter_counts(config).values()) == 124_439_808


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_sum_to_the_parameters(preset):
    config = GPT2Config.from_preset(preset)
    assert sum(inspect.parameter_counts(config).values()) == num_params(config)


def test_counts_are_the_models_own():
    for tied in (True, False):
        config, weights = tiny(tie_word_embeddings=tied, n_inner=40)
        of = lambda *parts, weights=weights: sum(t.numel() for n, t in weights.items() if any(p in n for p in parts))
        counts = inspect.parameter_counts(config)
        assert counts["attention"] == of(".attn.")
        assert counts["MLP"] == of(".mlp.")
        assert counts["LayerNorm"] == of(".ln_")
        assert counts["token embedding"] == of("wte")
        assert counts["position embedding"] == of("wpe")
        assert counts["head"] == (0 if tied else of("lm_head"))


def test_memory_is_what_training_allocates():
    """Against a model, its gradients and the optimizer's own state."""
    from gpt2_fast.optim import AdamW

    config, _ = tiny()
    for dtype in ("float32", "bfloat16"):
        model = GPT2LMHeadModel(config).to(getattr(torch, dtype))
        optimizer = AdamW(model.parameters())
        ids = torch.tensor([IDS])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        states = [s for p in model.parameters() for s in optimizer.state[p].items() if s[0] != "step"]
        size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
        assert inspect.training_memory(config)[dtype] == {
            "weights": size(model.parameters()),
            "gradients": size(p.grad for p in model.parameters()),
            "AdamW averages": size(t for name, t in states if name != "master"),
            "master weights": size(t for name, t in states if name == "master"),
        }


def test_inference_memory_and_flops():
    from gpt2_fast.generate import KVCache

    config, _ = tiny()
    model = GPT2LMHeadModel(config)
    cache = KVCache(model, 1, config.n_positions)
    assert inspect.inference_memory(config)["float32"] == {
        "weights": 4 * model.num_parameters(),
        "KV cache": 4 * (cache.keys.numel() + cache.values.numel()),
    }
    flops = inspect.flops_per_token(GPT2Config.from_preset("gpt2"))
    lct = 12 * 768 * 1024
    assert flops == {
        "forward": 2 * 124_439_808 + 2 * lct,
        "training": 6 * 124_439_808 + 6 * lct,
        "training (PaLM)": 6 * (124_439_808 - 1024 * 768) + 12 * lct,
    }
    # llm.c's figure for its padded vocabulary of 50304
    assert inspect.flops_per_token(GPT2Config(vocab_size=50304))["training"] == 803_478_528
    assert inspect.flops_per_token(config, 5)["forward"] == 2 * model.num_parameters() + 2 * 3 * 32 * 5


@pytest.mark.parametrize(
    "options",
    [{}, {"scale_attn_by_inverse_layer_idx": True}, {"scale_attn_weights": False}, {"activation_function": "gelu"}],
)
def test_attention_is_transformers(options):
    config, weights = tiny(**options)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**TINY, vocab_size=61, attn_implementation="eager", **options)
    ).eval()
    theirs.load_state_dict(weights)
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS]), output_attentions=True).attentions
    for layer in range(3):
        pattern = inspect.attention_pattern(config, weights, IDS, layer)
        torch.testing.assert_close(pattern, expected[layer][0], rtol=1e-4, atol=1e-6)
    assert (expected[2][0][:, -1] - 1 / len(IDS)).abs().max() > 0.02, "even attention would prove little"


def test_attention_refuses_in_one_line():
    config, weights = tiny()
    for ids, layer, message in [
        (IDS, 3, "layers 0 to 2"),
        ([], 0, "has 0 tokens"),
        ([1] * 25, 0, "has 25 tokens; this model takes 1 to 24"),
        ([61], 0, r"outside the model's 0\.\.60"),
    ]:
        with pytest.raises(ValueError, match=message):
            inspect.attention_pattern(config, weights, ids, layer)


def test_labels():
    tokenizer = get_tokenizer()
    text = "a b\n🙂"
    labels = inspect.token_labels(tokenizer, tokenizer.encode(text))
    assert labels[:3] == ["a", "␣b", "⏎"]
    assert "".join(labels[3:]) == "".join(f"\\x{byte:02x}" for byte in "🙂".encode()) or labels[3:] == ["🙂"]


def test_weight_picture_is_the_tensor():
    weight = torch.randn(310, 400)
    figure = model_figures.weight_figure(weight, "transformer.h.1.attn.c_attn.weight")
    assert isinstance(figure, Figure)
    corner, whole, spectrum, histogram = figure.axes[:4]
    (image,) = corner.images
    assert np.array_equal(image.get_array(), weight[:300, :300].numpy())
    assert image.get_cmap().name == "RdBu_r"
    assert image.colorbar.ax in figure.axes[4:]
    limit = np.quantile(weight[:300, :300].abs().numpy(), 0.995)
    assert image.norm.vmax == pytest.approx(limit)
    assert image.norm.vmin == -image.norm.vmax
    blocks = whole.images[0].get_array()  # at most 256 a side: pairs of rows and columns
    assert blocks.shape == (155, 200)
    expected = weight.double().reshape(155, 2, 200, 2).square().mean((1, 3)).sqrt()
    assert np.allclose(blocks, expected.numpy(), rtol=1e-12)
    singular = torch.linalg.svdvals(weight.double()).numpy()
    assert np.allclose(spectrum.lines[0].get_ydata(), singular, rtol=1e-6)
    assert len(histogram.lines) == 1
    head, summary = figure.get_suptitle().split("\n")
    assert head == "transformer.h.1.attn.c_attn.weight"
    assert summary == weight_measures(weight).line()
    uneven = model_figures.weight_figure(torch.ones(513, 3), "a").axes[1].images[0].get_array()
    assert uneven.shape == (171, 3)
    assert np.all(uneven == 1)
    every = model_figures.weight_figure(weight.bfloat16(), "a", size=None).axes[0].images[0]
    assert np.array_equal(every.get_array(), weight.bfloat16().float().numpy())
    vector = torch.randn(50)
    line = model_figures.weight_figure(vector, "a").axes[0].lines[1]
    assert np.array_equal(line.get_ydata(), vector.numpy())


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (12, 12)])
def test_measures_are_those_of_the_weight(shape):
    weight = torch.randn(shape) * 3 + 1
    found, wide = weight_measures(weight), weight.double()
    assert found.shape == shape
    assert found.mean == pytest.approx(wide.mean().item())
    assert found.std == pytest.approx(wide.std(correction=0).item())
    assert found.frobenius == pytest.approx(torch.linalg.matrix_norm(wide).item())
    assert found.spectral == pytest.approx(torch.linalg.matrix_norm(wide, 2).item())
    assert np.allclose(found.singular_values, torch.linalg.svdvals(wide).numpy(), rtol=1e-6)
    assert weight_measures(torch.eye(9) * 2).line() == (
        "9 × 9, mean 0.222, std 0.629, Frobenius norm 6, spectral norm 2, stable rank 9.0"
    )
    assert weight_measures(torch.zeros(3, 4)).line().endswith("spectral norm 0, stable rank 0.0")
    with pytest.raises(ValueError, match="not finite"):
        weight_measures(torch.tensor([[1.0, float("nan")]]))


def test_attention_picture_is_the_pattern(tmp_path, recwarn):
    pattern = torch.rand(5, 5).tril()
    pattern /= pattern.sum(-1, keepdim=True)
    labels = ["a", "$5", "$6", "日", "_x^"]
    figure = model_figures.attention_figure(pattern, labels, "Attention, layer 0, head 0")
    axes = figure.axes[0]
    data = axes.images[0].get_array()
    assert np.array_equal(data.filled(0), pattern.numpy())
    assert np.array_equal(data.mask, np.triu(np.ones((5, 5), bool), 1))
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [t.get_text() for t in ticks] == ["a", "$5", "$6", "U+65E5", "_x^"]
    figure.savefig(tmp_path / "a.png")  # dollars are no mathematics, and every glyph is there
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    with pytest.raises(ValueError, match="there are 2 labels"):
        model_figures.attention_figure(pattern, ["a", "b"])


def test_positions_picture_is_the_embedding():
    wpe = torch.randn(20, 12)
    figure = model_figures.positions_figure(wpe, (0, 7, 11))
    curves, whole, alike = figure.axes[:3]
    assert [line.get_ydata().tolist() for line in curves.lines[::2]] == [wpe[:, c].tolist() for c in (0, 7, 11)]
    for line, c in zip(curves.lines[1::2], (0, 7, 11), strict=True):
        assert np.array_equal(line.get_ydata(), smoothed(np.arange(20.0), wpe[:, c].double().numpy())[1])
    assert np.array_equal(whole.images[0].get_array(), wpe.t().numpy())
    cosine = torch.nn.functional.cosine_similarity
    expected = [cosine(wpe[: 20 - d].double(), wpe[d:].double()).mean().item() for d in range(15)]
    assert np.allclose(alike.lines[1].get_ydata(), expected)
    assert [line.get_label() for line in model_figures.positions_figure(torch.randn(4, 300)).axes[0].lines[1::2]] == [
        "channel 150", "channel 200", "channel 250",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="0 to 11"):
        model_figures.positions_figure(wpe, (12,))


def test_histograms_hold_the_weights():
    config, weights = tiny()
    figure = model_figures.histograms_figure(weights, config.n_layer, bins=21)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(model_figures.MATRICES)
    for axes, matrix in zip(figure.axes, model_figures.MATRICES, strict=True):
        values = [weights[f"transformer.h.{i}.{matrix}.weight"] for i in range(3)]
        reach = axes.get_xlim()[1]
        peaks = []
        for i, line in enumerate(axes.lines):
            heights = i - np.nan_to_num(line.get_ydata(), nan=i)
            expected = torch.histc(values[i].flatten(), 21, -reach, reach).double()
            expected = expected / values[i].numel()
            assert np.allclose(heights / heights.sum(), (expected / expected.sum()).numpy(), atol=2e-3)
            peaks.append(heights.max())
        assert max(peaks) == pytest.approx(1.6)
        assert [t.get_text() for t in axes.texts] == [f"σ {v.std(correction=0):.3f}" for v in values]


def run(capsys, *arguments):
    status = cli.main(["inspect", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_the_table(folder, capsys):
    status, out, err = run(capsys, "gpt2")
    assert (status, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["transformer.h.1.attn.c_attn.weight", "[768,", "2304]"] in rows
    assert ["lm_head.weight", "[50257,", "768]", "=", "transformer.wte.weight"] in rows
    assert sum(row[0].startswith(("transformer.", "lm_head")) for row in rows if row) == 149
    assert ["total", "124,439,808"] in rows
    assert ["training", "803.3", "6N", "+", "6LCT,", "as", "llm.c"] in rows
    assert ["bfloat16", "248.9", "248.9", "995.5", "497.8", "1,991.0"] in rows
    status, out, _ = run(capsys, folder)
    assert status == 0
    assert ["transformer.h.2.mlp.c_fc.weight", "[32,", "128]", "float32"] in [line.split() for line in out.splitlines()]


def test_command_draws(folder, capsys, tmp_path):
    figures = lambda: getattr(sys.modules.get("matplotlib._pylab_helpers"), "Gcf", None)
    before = len(figures().figs) if figures() else 0
    for i, arguments in enumerate(
        (
            ("--weights", "transformer.h.1.attn.c_attn.weight"),
            ("--attention", "some text", "--layer", 2, "--head", 1),
            ("--positions",),
            ("--histograms",),
        )
    ):
        out = tmp_path / f"{i}.png"
        status, printed, err = run(capsys, folder, *arguments, "--out", out)
        assert (status, err) == (0, "")
        *summary, path = printed.splitlines()
        assert path == str(out)
        if "--weights" in arguments:
            weight = checkpoint.load_pretrained(folder)[1][arguments[1]]
            assert summary == [f"{arguments[1]}: {weight_measures(weight).line()}"]
        else:
            assert summary == []
        assert out.read_bytes().startswith(b"\x89PNG")
    assert (len(figures().figs) if figures() else 0) == before


def test_command_refuses_in_one_line(folder, capsys, tmp_path):
    out = ("--out", tmp_path / "a.png")
    for arguments, message in [
        ((folder, "--weights", "h.1", *out), "no tensor 'h.1'"),
        ((folder, "--attention", "a", "--layer", 3, *out), "layers 0 to 2"),
        ((folder, "--attention", "a", "--head", 2, *out), "heads 0 to 1"),
        ((folder, "--attention", "", *out), "has 0 tokens"),
        (("nano", "--positions", *out), "nano is a preset without published weights"),
        ((tmp_path / "no" / "such" / "one",), "does not exist"),
        (("gpt2", *out), "--out goes with a picture: --weights, --attention, --positions, --histograms"),
        (("gpt2", "--layer", 0), "--layer goes with --attention"),
        ((folder, "--positions", "--head", -4, *out), "--head goes with --attention"),
    ]:
        status, printed, err = run(capsys, *arguments)
        assert not printed
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "a.png").exists()
