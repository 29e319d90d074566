"""Checkpoints: Hugging Face folders in and out, and the state from which a training run resumes to the bit.

All functions work on state dicts, names as in transformers' GPT2LMHeadModel, weights of linear layers
[in, out]. Every file is written whole or not at all.
"""

from __future__ import annotations

import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from gpt2_fast.config import GPT2Config
from gpt2_fast.files import atomic_write

CONFIG, WEIGHTS, TRAINING = "config.json", "model.safetensors", "training.pt"
# In the order in which they are looked for; an index lists the files that hold the tensors.
WEIGHT_FILES = (WEIGHTS, f"{WEIGHTS}.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"
# Causal masks that older transformers stored beside the weights.
_MASK = re.compile(r"\.attn\.(masked_)?bias$")

_FORMAT = "gpt2_fast training state 1"
_PLAIN = (int, float, bool, str, type(None))


def expected_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a GPT2LMHeadModel, the head included even where it is tied."""
    C, F = config.n_embd, config.n_inner_
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (config.vocab_size, C),
        "transformer.wpe.weight": (config.n_positions, C),
    }
    for i in range(config.n_layer):
        layers = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
        layers |= {"ln_2": (C,), "mlp.c_fc": (C, F), "mlp.c_proj": (F, C)}
        for name, shape in layers.items():
            shapes[f"transformer.h.{i}.{name}.weight"] = shape
            shapes[f"transformer.h.{i}.{name}.bias"] = shape[-1:]
    shapes["transformer.ln_f.weight"] = shapes["transformer.ln_f.bias"] = (C,)
    shapes[HEAD] = (config.vocab_size, C)
    return shapes


def canonical_state_dict(state_dict: Mapping[str, Tensor], config: GPT2Config) -> dict[str, Tensor]:
    """The state dict of a GPT2LMHeadModel from that of any GPT-2: as `load_state_dict(strict=True)` takes it.

    Adds the prefix "transformer." where the names lack it, leaves stored masks out, and where the config ties
    the head, gives lm_head.weight the tensor of the embedding. Raises ValueError, one line that names the
    tensors, where some are missing, not GPT-2's, or of a shape that does not fit the config.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        if not _MASK.search(name):
            tensors[name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"] = tensor
    if config.tie_word_embeddings and EMBEDDING in tensors:
        head = tensors.setdefault(HEAD, tensors[EMBEDDING])
        if head is not tensors[EMBEDDING] and not torch.equal(head, tensors[EMBEDDING]):
            raise ValueError(f"{HEAD} differs from {EMBEDDING}; set tie_word_embeddings to false in the config")
        tensors[HEAD] = tensors[EMBEDDING]
    shapes = expected_shapes(config)
    if missing := shapes.keys() - tensors.keys():
        raise ValueError(f"the weights miss {_some(missing)}, which the config asks for")
    if extra := tensors.keys() - shapes.keys():
        raise ValueError(f"the weights have {_some(extra)}, which a GPT-2 language model of this config has not")
    wrong = [name for name, shape in shapes.items() if tuple(tensors[name].shape) != shape]
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{name} has shape {list(tensors[name].shape)}, the config asks for {list(shapes[name])}"
            + (f" ({len(wrong)} tensors differ)" if len(wrong) > 1 else "")
        )
    return {name: tensors[name] for name in shapes}


def save_pretrained(
    folder: str | os.PathLike[str],
    state_dict: Mapping[str, Tensor],
    config: GPT2Config,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json and model.safetensors, which transformers' GPT2LMHeadModel.from_pretrained loads.

    A tied head is not stored, as transformers does. dtype: of the stored weights; None keeps each tensor's.
    Raises ValueError for tensors that do not fit the config, OSError where the folder cannot be written.
    """
    tensors = canonical_state_dict(state_dict, config)
    if config.tie_word_embeddings:
        del tensors[HEAD]
    tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in tensors.items()}
    with atomic_write(Path(folder) / WEIGHTS) as path:
        safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    with atomic_write(Path(folder) / CONFIG) as path:
        config.to_json(path)


def load_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[GPT2Config, dict[str, Tensor]]:
    """Config and state dict, on the CPU, of a GPT-2 in a local folder or on the Hugging Face hub.

    name_or_folder: a folder, or a repository such as "gpt2" or "openai-community/gpt2-xl".
    revision, cache_dir, local_files_only: as huggingface_hub has them; HF_HUB_OFFLINE=1 is honoured.
    dtype: what the weights are turned into; None keeps each tensor's.

    Reads model.safetensors, its shards, or pytorch_model.bin (as weights only: no code in it is run).
    Raises FileNotFoundError or ValueError, one line, for what is missing, truncated or not a GPT-2.
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
    config = GPT2Config.from_json(fetch(CONFIG) or folder / CONFIG)
    source, tensors = _read_weights(fetch, str(name_or_folder))
    try:
        tensors = canonical_state_dict(tensors, config)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    if dtype is not None:
        cast = {id(t): t.to(dtype) for t in tensors.values()}  # a tied head stays one tensor
        tensors = {name: cast[id(t)] for name, t in tensors.items()}
    return config, tensors


def _read_weights(fetch: Callable[[str], Path | None], name: str) -> tuple[Path, dict[str, Tensor]]:
    """The file that was found first among WEIGHT_FILES, and its tensors or those of the shards it lists."""
    for file in WEIGHT_FILES:
        path = fetch(file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return path, _read_tensors(path)
        try:
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"{path} is not an index of shards; it may be truncated") from None
        tensors: dict[str, Tensor] = {}
        for shard in shards:
            # A name with folders in it could point anywhere on the disk.
            shard_path = fetch(shard) if isinstance(shard, str) and Path(shard).name == shard else None
            if shard_path is None:
                raise FileNotFoundError(f"{path} lists {shard!r}, which is not there")
            tensors |= _read_tensors(shard_path)
        return path, tensors
    raise FileNotFoundError(f"{name} has no weights; a GPT-2 checkpoint has {' or '.join(WEIGHT_FILES[::2])}")


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, ValueError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({_line(error)}); it may be truncated") from None
    tensors = torch_load(path)
    if not isinstance(tensors, Mapping) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise ValueError(f"{path} is not a state dict: it holds more than tensors by name")
    return dict(tensors)


def _hub(
    repo: str, revision: str | None, cache_dir: str | os.PathLike[str] | None, local_files_only: bool
) -> Callable[[str], Path | None]:
    """A function that gives the local path of a repository's file, or None where it has no such file."""
    import huggingface_hub
    from huggingface_hub import errors

    def fetch(name: str) -> Path | None:
        try:
            return Path(
                huggingface_hub.hf_hub_download(
                    repo, name, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
                )
            )
        except errors.LocalEntryNotFoundError:
            if name != CONFIG:
                return None
            raise FileNotFoundError(
                f"{repo!r} is neither a folder here nor in the Hugging Face cache, and the hub was not reached; "
                "check the name, the network and HF_HUB_OFFLINE"
            ) from None
        except errors.EntryNotFoundError:
            if name != CONFIG:
                return None
            raise FileNotFoundError(f"{repo!r} on the Hugging Face hub has no {CONFIG}") from None
        except errors.GatedRepoError:
            raise FileNotFoundError(f"{repo!r} is gated: ask for access on the hub, then run: hf auth login") from None
        except errors.RepositoryNotFoundError:
            raise FileNotFoundError(
                f"{repo!r} is neither a folder here nor a repository on the Hugging Face hub; "
                "for a private one: hf auth login"
            ) from None
        except errors.RevisionNotFoundError:
            raise FileNotFoundError(f"{repo!r} on the Hugging Face hub has no revision {revision!r}") from None
        except (errors.HfHubHTTPError, errors.HFValidationError) as error:
            raise ValueError(f"{repo!r} could not be read from the Hugging Face hub: {_line(error)}") from None

    return fetch


@dataclass(frozen=True)
class TrainingState:
    """What a run resumes from. model and optimizer go into `load_state_dict`, rng into `restore_rng`."""

    step: int  # optimizer steps done
    config: GPT2Config
    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    rng: dict[str, Any]
    extra: dict[str, Any]


def capture_rng() -> dict[str, Any]:
    """The state of torch's random generators, of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(rng: Mapping[str, Any]) -> None:
    """Put back what `capture_rng` gave; states of CUDA devices that are not here are passed over."""
    torch.set_rng_state(rng["cpu"])
    for device, state in enumerate(rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)


def save_training_state(
    folder: str | os.PathLike[str],
    *,
    step: int,
    config: GPT2Config,
    model_state: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
    rng: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write folder/training.pt, all in one file so that its parts are of one step. Returns its path.

    rng: as from `capture_rng`; None captures it now. extra: whatever else the loop needs, of tensors, numbers,
    strings, None, lists, tuples and dicts, as everything here: the file loads with no code run.
    Raises TypeError, naming where, for anything else, and OSError where the folder cannot be written.
    """
    state = {
        "format": _FORMAT,
        "step": step,
        "config": config.to_dict(),
        "model": dict(model_state),
        "optimizer": dict(optimizer_state),
        "rng": dict(capture_rng() if rng is None else rng),
        "extra": dict(extra or {}),
    }
    _check_plain(state, "state")
    target = Path(folder) / TRAINING
    with atomic_write(target) as path, open(path, "wb") as file:
        torch.save(state, file)
    return target


def load_training_state(path: str | os.PathLike[str], *, config: GPT2Config | None = None) -> TrainingState:
    """Read training.pt, or the folder that holds it; tensors come on the CPU. Nothing is restored yet.

    config: of the model that is to go on; ValueError names the first field in which the file's differs.
    Raises FileNotFoundError or ValueError, one line, for a missing, truncated or foreign file.
    """
    path = Path(path).expanduser()
    path = path / TRAINING if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; there is no run to resume")
    state = torch_load(path)
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise ValueError(f"{path} is not a training state of this version of gpt2_fast")
    saved = GPT2Config.from_dict(state["config"])
    if config is not None and saved != config:
        name = next(name for name in vars(saved) if getattr(saved, name) != getattr(config, name))
        raise ValueError(
            f"{path} is of another model: {name} is {getattr(saved, name)!r} there and {getattr(config, name)!r} here; "
            "resume with the settings it was started with"
        )
    return TrainingState(state["step"], saved, state["model"], state["optimizer"], state["rng"], state["extra"])


def torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text advises to run the file's code; what matters in it is the name of what it would not load.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, more than tensors" if found else "it is truncated or another kind of file"
        raise ValueError(f"{path} cannot be read safely: {reason}") from None
    except Exception as error:  # on bytes that are no pickle, torch's reader fails in any way
        raise ValueError(f"{path} is not a whole PyTorch file ({_line(error)}); it may be truncated") from None


def _check_plain(value: Any, where: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            _check_plain(item, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(f"{where} is a {type(value).__name__}; a training state holds tensors and plain values only")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
