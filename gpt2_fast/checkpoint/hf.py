"""Hugging Face folders and hub repositories: config.json and model.safetensors, in and out.

All functions work on state dicts, names as in transformers' GPT2LMHeadModel, weights of linear layers
[in, out]. Every file is written whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gpt2_fast import hub_client
from gpt2_fast.checkpoint.state_dict import HEAD, canonical_state_dict, check_plausible
from gpt2_fast.checkpoint.torch_file import first_line, torch_load
from gpt2_fast.config import GPT2Config, read_object
from gpt2_fast.files import atomic_write

CONFIG, GENERATION, WEIGHTS = "config.json", "generation_config.json", "model.safetensors"
# In the order in which they are looked for; an index lists the files that hold the tensors.
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# What of generation_config.json is read, and what transformers' generate would do otherwise, with the value that asks
# for nothing besides None.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NOT_READ = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
    "repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0, "max_length": 20, "min_length": 0,
    "min_new_tokens": 0, "num_beams": 1, "no_repeat_ngram_size": 0, "num_return_sequences": 1, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "renormalize_logits": False, "guidance_scale": 1.0,
} | dict.fromkeys((
    "max_new_tokens", "max_time", "stop_strings", "penalty_alpha", "bad_words_ids", "force_words_ids", "constraints",
    "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id",
))  # fmt: skip


def save_pretrained(
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: GPT2Config,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained loads.

    A tied head is not stored, as transformers does. A generation_config.json that is there gets this config's ids,
    and loses all else. dtype: of the stored weights; None keeps each tensor's.
    Raises ValueError for tensors that do not fit the config, TypeError for DTensors, OSError where the folder cannot be
    written.
    """
    tensors = canonical_state_dict(state_dict, config)
    if config.tie_word_embeddings:
        del tensors[HEAD]
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    with atomic_write(Path(folder) / WEIGHTS) as path:
        write_safetensors(path, tensors, {"format": "pt"})
    with atomic_write(Path(folder) / CONFIG) as path:
        config.to_json(path)
    generation = Path(folder) / GENERATION
    if generation.is_file():  # of a model that was here before: its ids would count
        with atomic_write(generation) as path:
            path.write_text(json.dumps({name: config.to_dict()[name] for name in TOKEN_IDS}, indent=2) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """safetensors' save_file. What the disk refuses is an OSError here too, and no SafetensorError."""
    try:
        safetensors.torch.save_file(dict(tensors), path, metadata=dict(metadata))
    except safetensors.SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def load_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Config and state dict, on the CPU, of a GPT-2 in a local folder or on the Hugging Face hub.

    Reads model.safetensors, its shards, or pytorch_model.bin (as weights only: no code in it is run). The ids of
    generation_config.json, where it is there, take the place of config.json's, as in transformers; a warning names
    what else of it would change a text, which is not read.

    Args:
        name_or_folder: a folder, or a repository such as "gpt2" or "openai-community/gpt2-xl".
        revision, cache_dir, local_files_only: as huggingface_hub has them; HF_HUB_OFFLINE=1 is honoured.
        dtype: what the weights are turned into; None keeps each tensor's.

    Raises:
        FileNotFoundError, ValueError: one line, for what is missing, truncated or not a GPT-2.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        fetch = lambda name: folder / name if (folder / name).is_file() else None
    elif folder.exists():
        raise ValueError(f"{folder} is a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    elif re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name_or_folder)):
        fetch = _hub(str(name_or_folder), revision, cache_dir, local_files_only)
    else:
        raise FileNotFoundError(f"{folder} does not exist; give a checkpoint folder or a hub repository")
    config_path = fetch(CONFIG) or folder / CONFIG
    config = _with_token_ids(GPT2Config.from_json(config_path), fetch(GENERATION))
    source, tensors = _read_weights(fetch, str(name_or_folder), lambda paths: _check_size(config, config_path, paths))
    try:
        tensors = canonical_state_dict(tensors, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if dtype is not None:
        cast = {id(t): t.to(dtype) for t in tensors.values()}  # a tied head stays one tensor
        tensors = {name: cast[id(t)] for name, t in tensors.items()}
    return config, tensors


def _with_token_ids(config: GPT2Config, path: Path | None) -> GPT2Config:
    """The config with the ids of a generation_config.json."""
    if path is None:
        return config
    settings = read_object(path)
    ids = {name: settings[name] for name in TOKEN_IDS if name in settings}
    for name, value in ids.items():
        several = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(i) is int and i >= 0 for i in several):
            raise ValueError(f"{path}: {name} is {value!r:.60}; it must be a token id, or of ends a list of them")
    unread = {k: v for k, v in settings.items() if k in _NOT_READ and v is not None and v != _NOT_READ[k]}
    if unread:
        named = ", ".join(f"{name}={value!r:.40}" for name, value in unread.items())
        warnings.warn(f"{path} is read for token ids alone: pass {named} to generate", stacklevel=2)
    return dataclasses.replace(config, **ids)


def _check_size(config: GPT2Config, config_path: Path, files: Sequence[Path]) -> None:
    """Refuses a config of more parameters than the files can hold, before they are read: a number has two bytes."""
    try:
        check_plausible(config, sum(file.stat().st_size for file in files) // 2, f"{files[0].name} can hold")
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from None


def _read_weights(
    fetch: Callable[[str], Path | None], name: str, check: Callable[[Sequence[Path]], None]
) -> tuple[Path, dict[str, Tensor]]:
    """The file that was found first among WEIGHT_FILES, and its tensors or those of the shards it lists.

    check: is given the files that hold them, before they are read.
    """
    for file in WEIGHT_FILES:
        path = fetch(file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            check([path])
            return path, _read_tensors(path)
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{path} is not an index of shards; it may be truncated") from None
        if not shards:
            raise ValueError(f"{path} lists no shards; it may be damaged")
        shard_paths = []
        for shard in shards:
            # A name with folders in it could point anywhere on the disk.
            shard_path = fetch(shard) if isinstance(shard, str) and Path(shard).name == shard else None
            if shard_path is None:
                raise FileNotFoundError(f"{path} lists {shard!r}, which is not there")
            shard_paths.append(shard_path)
        check(shard_paths)
        return path, {name: t for shard_path in shard_paths for name, t in _read_tensors(shard_path).items()}
    raise FileNotFoundError(f"{name} has no weights; a GPT-2 checkpoint has {' or '.join(WEIGHT_FILES[::2])}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is not a whole safetensors file ({first_line(error)}); it may be truncated"
            ) from None
    tensors = torch_load(path)
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a state dict: it holds more than tensors by name")
    return dict(tensors)


def _hub(
    repo: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Callable[[str], Path | None]:
    """A function that gives the local path of a repository's file, or None where it has no such file."""
    import huggingface_hub

    local_files_only = local_files_only or not hub_client.reachable()

    def fetch(name: str) -> Path | None:
        options = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            with hub_client.explained(repr(repo), name, revision=revision):
                return Path(huggingface_hub.hf_hub_download(repo, name, **options))
        except (hub_client.NotReached, hub_client.Missing):
            if name == CONFIG:
                raise
            return None

    return fetch
