"""Files and numbers that are absurd or hostile: one line that names the user's file or option, and nothing built."""

from __future__ import annotations

import json
import zipfile

import pytest
import torch

from gpt2_fast import checkpoint, cli
from gpt2_fast.checkpoint import formats, hf, nanogpt, state_dict, torch_file
from gpt2_fast.config import GPT2Config
from gpt2_fast.data import load_data
from gpt2_fast.generate.sampling import Sampling, check_seed, sample
from gpt2_fast.model import GPT2LMHeadModel

CONFIG = GPT2Config(vocab_size=67, n_positions=16, n_embd=24, n_layer=2, n_head=3)


def state():
    torch.manual_seed(0)
    return GPT2LMHeadModel(CONFIG).state_dict()


@pytest.fixture
def folder(tmp_path):
    checkpoint.save_pretrained(tmp_path / "model", state(), CONFIG)
    return tmp_path / "model"


def refused(path, *words, load=checkpoint.load):
    with pytest.raises(ValueError, match=".") as caught:
        load(path)
    text = str(caught.value)
    for word in words:
        assert str(word) in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "vocab_size", "n_positions", "n_inner"])
@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_an_absurd_config_is_refused_before_the_weights_are_read(folder, weights, name, monkeypatch):
    if weights == "shards":
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "a.safetensors"}}))
    elif weights == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(state(), folder / weights)
    data = json.loads((folder / "config.json").read_text()) | {name: 3 * 10**9}
    if name == "n_embd":
        data["n_head"] = 10**8
    (folder / "config.json").write_text(json.dumps(data))
    monkeypatch.setattr(hf, "_read_tensors", lambda path: pytest.fail(f"{path} was read"))
    monkeypatch.setattr(state_dict, "expected_shapes", lambda config: pytest.fail("the tensors were named"))
    refused(folder, folder / "config.json", "the config asks for", "3000000000" if name != "n_inner" else "n_layer")


@pytest.mark.parametrize("name", ["n_layer", "block_size"])
def test_absurd_model_args_of_nanogpt_are_refused_before_zeros_are_made(tmp_path, name, monkeypatch):
    path = tmp_path / "ckpt.pt"
    nanogpt.write_nanogpt(path, state(), GPT2Config(**{**vars(CONFIG), "activation_function": "gelu"}))
    data = torch.load(path, weights_only=True)
    data["model_args"] |= {name: 3 * 10**9, "bias": False}
    torch.save(data, path)
    monkeypatch.setattr(nanogpt, "expected_shapes", lambda config: pytest.fail("the tensors were named"))
    refused(path, path, "the config asks for", "3000000000")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_real_numbers_are_named(folder, dtype):
    weights = state()
    weights["transformer.h.1.mlp.c_fc.weight"] = weights["transformer.h.1.mlp.c_fc.weight"].to(dtype)
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    refused(folder, folder / "pytorch_model.bin", "transformer.h.1.mlp.c_fc.weight is " + str(dtype)[6:])


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(4):
            archive.writestr(f"archive/data/{i}", bytes(20 << 20))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "ckpt.pt", "ckpt.npz"])
def test_a_zip_that_unpacks_to_far_more_is_not_unpacked(folder, name, monkeypatch):
    path = folder / name
    (folder / "model.safetensors").unlink()
    bomb(path)
    assert path.stat().st_size < 1 << 20
    monkeypatch.setattr(torch_file.torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    # What is damaged before the config is looked at: its size would not fit either.
    monkeypatch.setattr(hf, "check_plausible", lambda *_: None)
    refused(folder if name == "pytorch_model.bin" else path, path, "would unpack to 83,886,080")


def test_members_that_lie_upon_each_other_count_each(tmp_path):
    """An archive whose directory names the same bytes many times, stored as they are."""
    path = tmp_path / "ckpt.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", bytes(1 << 20))
        archive.filelist += archive.filelist * 9
    refused(path, path, "would unpack to 10,485,760")


def test_every_file_of_torch_save_is_let_through(tmp_path):
    for content in ({}, {"a": torch.zeros(3)}, {str(i): torch.zeros(1) for i in range(500)}, torch.zeros(10**6)):
        torch.save(content, tmp_path / "x.pt")
        torch_file._check_zip(tmp_path / "x.pt")


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "ckpt.pt", "model.bin"])
def test_a_truncated_file_is_named(folder, name, keep):
    path = folder / name
    if name == "model.bin":
        from gpt2_fast.checkpoint.llmc import write_llmc

        write_llmc(path, state(), CONFIG, dtype=torch.float32)
    elif name == "ckpt.pt":
        nanogpt.write_nanogpt(path, state(), GPT2Config(**{**vars(CONFIG), "activation_function": "gelu"}))
    elif name == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(state(), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    text = refused(folder if name in ("pytorch_model.bin", "model.safetensors") else path, folder)
    assert path.name in text


def test_a_token_that_does_not_fit_names_the_users_file(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "my.txt"
    path.write_text("some words of a text " * 200)
    for source in (path, tmp_path):
        text = refused(source, "outside the model's vocabulary of 100",
                       load=lambda data: load_data(data, context=8, vocab_size=100, progress=False))  # fmt: skip
        assert text.startswith(str(source) if source == path else str(tmp_path))
        assert "cache" not in text
    assert not formats.FORMATS.count("npz")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "inf"], "temperature is inf"),
        (["--top-k", "-1"], "--top-k is -1; it must be at least 1, or 0 for all"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--top-p", "-1"], "top_p is -1.0"),
        (["--top-p", "1.5"], "top_p is 1.5"),
        (["--top-p", "nan"], "top_p is nan"),
        (["--seed", str(2**64)], "seed is 18446744073709551616; it must be from -2^63 to 2^64 - 1"),
        (["--seed", str(-(2**63) - 1)], "seed is -9223372036854775809"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_numbers_before_the_model_is_read(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(GPT2LMHeadModel, "from_pretrained", lambda *_, **__: pytest.fail("the model was read"))
    assert cli.main(["generate", "a", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-45, 1e-30, 1e-3, 1.0, 1e30, 1e300])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, None), (1, None), (2**70, 1e-300), (2, 1e-46), (None, 1.0)], ids=str
)
def test_extreme_numbers_draw_a_token_that_may_be_drawn(temperature, top_k, top_p, dtype):
    Sampling(temperature, top_k, top_p)
    logits = torch.tensor([[1.0, 30.0, -40.0, 2.0], [50.0, -3.0, 8.0, 49.0]], dtype=dtype)
    for uniform in (None, torch.tensor([0.0, 1 - 2**-32], dtype=torch.float64)):
        drawn = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, uniform=uniform)
        assert drawn.min() >= 0
        assert drawn.max() < 4
        if temperature < 1e-2 or (temperature <= 1 and (top_k == 1 or (top_p or 1) < 0.1)):  # hotter, all are alike
            assert drawn.tolist() == [1, 0]


def test_seeds_that_torch_takes_are_taken():
    for seed in (None, -(2**63), -1, 0, 2**63, 2**64 - 1):
        check_seed(seed)
        torch.manual_seed(0 if seed is None else seed)
