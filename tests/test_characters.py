"""Vocabularies of characters: nanoGPT's meta.pkl read without running it, and the tokenizer of a model."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from gpt2_fast.cli import main
from gpt2_fast.data.characters import CharacterTokenizer, beside_data, read_characters
from gpt2_fast.data.plain_pickle import read_plain_pickle
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.generate import tokenizer_of
from gpt2_fast.nanogpt import GPT, GPTConfig

TEXT = "\n to be, or not to be: that is the question 42.\n" * 200
IDS = {c: i for i, c in enumerate(sorted(set(TEXT)))}


def meta(folder: Path, ids=IDS, **more) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"vocab_size": len(ids), "itos": {i: c for c, i in ids.items()}, "stoi": ids, **more}
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump(content, file)
    return folder / "meta.pkl"


@pytest.fixture
def nanogpt(tmp_path) -> Path:
    """A folder of nanoGPT: data/tiny with its shards and meta.pkl, and out/ckpt.pt of a character model."""
    data, out = tmp_path / "data" / "tiny", tmp_path / "out"
    meta(data)
    ids = np.array([IDS[c] for c in TEXT], dtype=np.uint16)
    ids[:8000].tofile(data / "train.bin")
    ids[8000:].tofile(data / "val.bin")
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "bias": False, "vocab_size": len(IDS)}
    torch.manual_seed(0)
    out.mkdir()
    state = GPT(GPTConfig(**sizes, dropout=0.0)).state_dict()
    settings = {"model": state, "model_args": sizes, "iter_num": 0, "best_val_loss": 1.0, "config": {"dataset": "tiny"}}
    torch.save(settings, out / "ckpt.pt")
    return tmp_path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_come_back_of_every_protocol(tmp_path, protocol):
    again = [1, -5, 10**30, 2.5, None, True, False, "é🙂", "x" * 300]
    value = {"a": again, "b": (1,), "c": ((), (1, 2), (1, 2, 3), (1, 2, 3, 4)), 7: {}, "same": again, "list": []}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(value, protocol))
    assert read_plain_pickle(tmp_path / "a.pkl") == value


def test_a_deep_pickle_is_read_in_one_pass(tmp_path):
    """Each mark was once looked for from the bottom of the stack: this file took hours."""
    depth = 200_000
    (tmp_path / "a.pkl").write_bytes(b"(" * depth + b"t" * depth + b".")
    value, found = read_plain_pickle(tmp_path / "a.pkl"), 1
    while value:
        (value,), found = value, found + 1
    assert found == depth


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_code_of_a_pickle_runs(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps({"stoi": IDS, "x": Runs(str(tmp_path / "ran"))}, protocol))
    with pytest.raises(ValueError, match=r"meta.pkl cannot be read safely: it holds .*GLOBAL"):
        read_characters(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a whole pickle"),
        (pickle.dumps({"stoi": IDS})[:-20], "is not a whole pickle"),
        (pickle.dumps([1]), "it has no 'stoi'"),
        (pickle.dumps({"stoi": {"ab": 0}}), "a key is not one character"),
        (pickle.dumps({"stoi": {"a": 0, "b": 0}}), "an id is not a whole number of its own"),
        (pickle.dumps({"stoi": {"a": 0.5}}), "an id is not a whole number"),
        (pickle.dumps({"stoi": IDS, "itos": {0: "a"}}), "its 'itos' is not its 'stoi'"),
        (pickle.dumps({"stoi": IDS, "vocab_size": 3}), "its vocab_size is not the number of its characters"),
        (b"\x80\x04" + b"]" * 5000 + b".", "is not a whole pickle"),
    ],
    ids=range(9),
)
def test_a_bad_table_is_one_line(tmp_path, content, words):
    (tmp_path / "meta.pkl").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_characters(tmp_path / "meta.pkl")
    assert words in str(error.value)
    assert str(tmp_path / "meta.pkl") in str(error.value)
    assert "\n" not in str(error.value)


def test_transformers_reads_the_same_tokenizer(tmp_path):
    tokenizer = CharacterTokenizer(IDS)
    tokenizer.save_pretrained(tmp_path, 64)
    assert read_characters(tmp_path / "tokenizer.json").ids == IDS
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "to be\n  or not: 42.\n"
    ids = tokenizer.encode(text)
    assert theirs(text).input_ids == ids
    assert theirs.decode(ids) == tokenizer.decode(ids) == text
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.start_token == IDS["\n"]
    with pytest.raises(ValueError, match=r"no character 'Q' \(position 3\)"):
        tokenizer.encode("to Q")


def test_the_tokenizer_of_a_model(nanogpt, tmp_path):
    """By what lies beside its weights or its data, by the name of its data, else by its size; two must not differ."""
    n, checkpoint, data = len(IDS), nanogpt / "out" / "ckpt.pt", nanogpt / "data" / "tiny"
    assert tokenizer_of(n, checkpoint).ids == IDS  # data/tiny, beside out/
    for source in (data, data / "train.bin", str(data / "*.bin")):
        assert tokenizer_of(n, data=str(source)).ids == IDS
    (data / "input.txt").write_text("text")
    assert beside_data(data / "input.txt") is None  # of text, which is not those ids
    assert tokenizer_of(n) is None
    assert tokenizer_of(50304) is get_tokenizer()
    with pytest.raises(ValueError, match=f"has {n} characters and the model {n - 1} tokens"):
        tokenizer_of(n - 1, data=data)
    meta(tmp_path / "out", {c: i for i, c in enumerate(reversed(IDS))})
    with pytest.raises(ValueError, match="are other tables of characters"):
        tokenizer_of(n, checkpoint, data)
    get_tokenizer().save_pretrained(tmp_path / "theirs")
    assert tokenizer_of(50257, tmp_path / "theirs") is get_tokenizer()
    vocabulary = json.loads((tmp_path / "theirs" / "vocab.json").read_text())
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (tmp_path / "theirs" / "vocab.json").write_text(json.dumps(vocabulary))
    assert tokenizer_of(50257, tmp_path / "theirs") is None  # another one of the same size


TINY = ["--context", "16", "--batch-size", "2", "--steps", "2", "--eval-batches", "1"]


def test_a_character_model_is_trained_sampled_and_read(nanogpt, tmp_path, capsys):
    """The run ends well, its sample is of its characters, and generate, convert and transformers know them."""
    out, checkpoint = tmp_path / "run", str(nanogpt / "out" / "ckpt.pt")
    command = ["train", "--init-from", checkpoint, "--data", str(nanogpt / "data" / "tiny"), "--out", str(out), *TINY]
    assert main(command) == 0
    sample = capsys.readouterr().out.split("sample:\n")[1].rsplit("\n\n", 1)[0]
    assert sample
    assert set(sample) <= set(TEXT)
    assert not (out / "checkpoint" / "vocab.json").exists()
    assert read_characters(out / "checkpoint" / "tokenizer.json").ids == IDS
    assert transformers.AutoTokenizer.from_pretrained(out / "checkpoint").decode([IDS["q"]]) == "q"
    assert main(["train", "--resume", str(out), "--steps", "3"]) == 0
    assert read_characters(out / "checkpoint" / "tokenizer.json").ids == IDS
    assert main(["convert", checkpoint, str(tmp_path / "converted")]) == 0
    texts = []
    for model in (checkpoint, tmp_path / "converted"):
        capsys.readouterr()
        greedy = ["--max-new-tokens", "9", "--temperature", "0", "--device", "cpu"]
        assert main(["generate", "to be", "--model", str(model), *greedy]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) == len("to be") + 9 + 1
    assert main(["generate", "Q", "--model", checkpoint]) == 2
    assert "no character 'Q'" in capsys.readouterr().err


def test_a_model_of_no_known_tokenizer_samples_ids(nanogpt, tmp_path, capsys):
    out, data = tmp_path / "run", nanogpt / "data" / "tiny"
    (data / "meta.pkl").unlink()
    command = ["train", "--init-from", str(nanogpt / "out" / "ckpt.pt"), "--data", str(data), "--out", str(out), *TINY]
    assert main(command) == 0
    words = capsys.readouterr().out.split("tokens is known) ")[1].split("\n")[0].split()
    assert all(int(word) < len(IDS) for word in words)
    assert len(words) == 60
    names = {path.name for path in (out / "checkpoint").iterdir()}
    assert names == {"config.json", "model.safetensors", "training.safetensors"}
    assert main(["generate", "a", "--model", str(out / "checkpoint")]) == 2
    assert "no tokenizer that is known here" in capsys.readouterr().err


def test_a_fresh_model_takes_the_size_of_the_table(nanogpt, tmp_path):
    out = tmp_path / "run"
    sizes = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32"]
    assert main(["train", "--data", str(nanogpt / "data" / "tiny"), "--out", str(out), *sizes, *TINY]) == 0
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert config["vocab_size"] == len(IDS)
    assert config["eos_token_id"] is None
    assert read_characters(out / "checkpoint" / "tokenizer.json").ids == IDS
