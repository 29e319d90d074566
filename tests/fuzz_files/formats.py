"""A sound file of each format, how it is damaged, and how it is read."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt2_fast import checkpoint
from gpt2_fast.checkpoint import run_folder
from gpt2_fast.config import GPT2Config
from gpt2_fast.data import CharacterTokenizer, characters, jsonl, load_tokens, tokenizer, write_bin
from gpt2_fast.report.figures import read_metrics
from gpt2_fast.train import folder as run_options
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.log import MetricsLog

from . import mutate

CONFIG = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)


@dataclass(frozen=True)
class Format:
    """make: writes sound files into a folder. file: the one that is damaged. read: what the folder means.

    checked: whether it has a checksum, so that no changed bit may be taken.
    """

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], Any]
    damage: Callable[[bytes, random.Random], bytes] = mutate.damage
    checked: bool = False


def _state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = checkpoint.expected_shapes(CONFIG).items()
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def _optimizer() -> dict[str, Any]:
    averages = {"step": torch.tensor(3.0), "exp_avg": torch.ones(5), "exp_avg_sq": torch.arange(4.0)}
    return {"state": {0: averages}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.95), "params": [0]}]}


def _hf(folder: Path) -> None:
    checkpoint.save_pretrained(folder, _state(), CONFIG)


def _shards(folder: Path) -> None:
    import safetensors.torch

    _hf(folder)
    whole = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(whole)
    whole.unlink()
    names = list(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, part in parts.items():
        safetensors.torch.save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: f for f, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bin(folder: Path) -> None:
    _hf(folder)
    (folder / "model.safetensors").unlink()
    torch.save(_state(), folder / "pytorch_model.bin")


def _training(folder: Path) -> None:
    checkpoint.save_training_state(
        folder, step=3, config=CONFIG, model_state=_state(), optimizer_state=_optimizer(), extra={"seen": [1, (2,)]}
    )


def _earlier(folder: Path) -> None:
    state = {"format": "gpt2_fast training state 1", "step": 3, "config": CONFIG.to_dict(), "model": _state(),
             "optimizer": _optimizer(), "rng": checkpoint.capture_rng(), "extra": {}}  # fmt: skip
    torch.save(state, folder / "training.pt")


def _run(folder: Path) -> None:
    run_folder.save_checkpoint(folder, step=3, config=CONFIG, model_state=_state(), optimizer_state=_optimizer())


def _read_run(folder: Path) -> Any:
    state, _ = run_folder.load_checkpoint(folder)
    return dataclasses.asdict(state)


def _nanogpt(folder: Path) -> None:
    checkpoint.write_nanogpt(folder / "ckpt.pt", _state(), dataclasses.replace(CONFIG, activation_function="gelu"))


def _loaded(path: Path) -> Any:
    loaded = checkpoint.load(path)
    return loaded.config.to_dict(), loaded.state


def _tokens(folder: Path) -> Any:
    data = load_tokens(folder / "tokens.bin", context=4, vocab_size=5000)
    return [x for pair in data.windows(batch_size=4) for x in pair]


def _ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 5000, 300).astype("<u2")


def _lines(folder: Path) -> None:
    records = [{"step": i, "loss": 3.0 - i / 10, "lr": 1e-3, "tokens_per_second": 10.5} for i in range(1, 6)]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in (*records, {"step": 5, "val_loss": 2.0}))
    )


def _texts(folder: Path) -> None:
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": f"line {i}", "id": i}) + "\n" for i in range(4)))


def _read_texts(folder: Path) -> Any:
    return [jsonl.field(record, "text", str, where) for where, record in jsonl.read(folder / "data.jsonl")]


def _vocabulary(folder: Path) -> None:
    """tiktoken's cache, in which the two files are looked for first."""
    for name in tokenizer.FILES:
        content = tokenizer._from_package(name)
        assert content is not None
        (folder / Path(name)).write_bytes(content)


def _read_vocabulary(folder: Path) -> Any:
    import hashlib

    for name in tokenizer.FILES:
        link = folder / hashlib.sha1((tokenizer.URL + name).encode()).hexdigest()
        if not link.exists():
            os.link(folder / name, link)
    os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    return tokenizer._encoding_files()


def _options(folder: Path) -> None:
    run_options.record_options(folder, TrainConfig())


def _earlier_options(folder: Path) -> None:
    (folder / "run.json").write_text(json.dumps(dataclasses.asdict(TrainConfig()), indent=2))


def _characters(folder: Path) -> None:
    ids = {c: i for i, c in enumerate("\n abcde")}
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump({"stoi": ids, "itos": {i: c for c, i in ids.items()}, "vocab_size": len(ids)}, file)
    CharacterTokenizer(ids).save_pretrained(folder)


def _read_characters(name: str) -> Callable[[Path], object]:
    return lambda folder: getattr(characters.read_characters(folder / name), "ids", None)


def _checked_run(file: str) -> Format:
    damages = {"config.json": mutate.damage_json, "model.safetensors": mutate.damage_safetensors,
               "training.safetensors": mutate.damage_safetensors}  # fmt: skip
    return Format(_run, f"checkpoint-000003/{file}", _read_run, damages[file], checked=True)


_safetensors, _zip, _json = mutate.damage_safetensors, mutate.damage_zip, mutate.damage_json
FORMATS: dict[str, Format] = {
    "config.json": Format(lambda f: CONFIG.to_json(f / "config.json"), "config.json",
                          lambda f: GPT2Config.from_json(f / "config.json").to_dict(), _json),
    "folder's config.json": Format(_hf, "config.json", _loaded, _json),
    "model.safetensors": Format(_hf, "model.safetensors", _loaded, _safetensors),
    "index of shards": Format(_shards, "model.safetensors.index.json", _loaded, _json),
    "shard": Format(_shards, "model-2.safetensors", _loaded, _safetensors),
    "pytorch_model.bin": Format(_bin, "pytorch_model.bin", _loaded, _zip),
    "training.safetensors": Format(_training, "training.safetensors",
                                   lambda f: dataclasses.asdict(checkpoint.load_training_state(f)), _safetensors, True),
    "run's training.safetensors": _checked_run("training.safetensors"),
    "run's model.safetensors": _checked_run("model.safetensors"),
    "run's config.json": _checked_run("config.json"),
    "training.pt": Format(_earlier, "training.pt",
                          lambda f: dataclasses.asdict(checkpoint.load_training_state(f)), _zip),
    "nanoGPT's ckpt.pt": Format(_nanogpt, "ckpt.pt", lambda f: _loaded(f / "ckpt.pt"), _zip),
    "llm.c's model": Format(
        lambda f: checkpoint.write_llmc(f / "m.bin", _state(), CONFIG, dtype=torch.float32), "m.bin",
        lambda f: _loaded(f / "m.bin")),
    "llm.c's tokens": Format(lambda f: write_bin(f / "tokens.bin", [_ids()]), "tokens.bin", _tokens),
    "nanoGPT's tokens": Format(lambda f: _ids().tofile(f / "tokens.bin"), "tokens.bin", _tokens),
    "jsonl text": Format(_texts, "data.jsonl", _read_texts, mutate.damage_jsonl),
    "metrics.jsonl, drawn": Format(_lines, "metrics.jsonl", lambda f: read_metrics(f / "metrics.jsonl"),
                                   mutate.damage_jsonl),
    "metrics.jsonl, resumed": Format(_lines, "metrics.jsonl", lambda f: MetricsLog(f / "metrics.jsonl").read(),
                                     mutate.damage_jsonl),
    "config.yaml": Format(_options, "config.yaml", run_options.recorded_options),
    "run.json": Format(_earlier_options, "run.json", run_options.recorded_options, _json),
    "meta.pkl": Format(_characters, "meta.pkl", _read_characters("meta.pkl")),
    "tokenizer.json": Format(_characters, "tokenizer.json", _read_characters("tokenizer.json"), _json),
    "vocab.bpe": Format(_vocabulary, "vocab.bpe", _read_vocabulary, checked=True),
}  # fmt: skip


def prepare(name: str, folder: Path) -> None:
    """Makes the sound files of a format in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    FORMATS[name].make(folder)
