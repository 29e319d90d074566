"""Data sets that a recipe needs, from the Hugging Face hub: token shards, and HellaSwag's validation set.

Files come by huggingface_hub, which goes on where a download was broken off and honours HF_HUB_OFFLINE, HF_ENDPOINT and
HF_TOKEN. A shard counts as there when it is whole and has llm.c's header: without one, any bytes would be tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_fast import hub_client
from gpt2_fast.data.shards import MAGIC, read_bin
from gpt2_fast.files import atomic_write


class Shards(NamedTuple):
    """A data set of llm.c .bin shards on the hub. train: a format of the shard's number, from 1 to count."""

    repo: str
    val: str
    train: str
    count: int


# 10 billion tokens of Penedo et al. 2024 (arXiv:2406.17557) in GPT-2's vocabulary, 100 million a shard.
SHARDS = {
    "fineweb10B": Shards("kjj0/fineweb10B-gpt2", "fineweb_val_000000.bin", "fineweb_train_{:06d}.bin", 103),
    "fineweb-edu10B": Shards("kjj0/finewebedu10B-gpt2", "finewebedu_val_000000.bin", "finewebedu_train_{:06d}.bin", 99),
}
HELLASWAG = "Rowan/hellaswag"  # Zellers et al. 2019, arXiv:1905.07830
NAMES = (*SHARDS, "hellaswag")


def fetch(
    name: str, folder: str | os.PathLike[str], shards: int | None = None, say: Callable[[str], Any] = print
) -> list[Path]:
    """Brings a data set into a folder; what is there already stays. Returns its files.

    Args:
        name: one of NAMES.
        folder: made where it is missing.
        shards: so many of the training shards, from the first on; None: all.
        say: called with a line for each file.

    Raises:
        ValueError: another name, a number of shards that there is not, a file that is not whole.
        FileNotFoundError: the hub was not reached, or has no such file.
        OSError: the folder cannot be written.
    """
    if name not in NAMES:
        raise ValueError(f"no data set {name!r}; choose {', '.join(NAMES)}")
    folder = Path(folder).expanduser()
    if name == "hellaswag":
        if shards is not None:
            raise ValueError("hellaswag is one file; drop --shards")
        return [_hellaswag(folder, say)]
    source = SHARDS[name]
    if shards is not None and not 1 <= shards <= source.count:
        raise ValueError(f"--shards is {shards}; {name} has 1 to {source.count}")
    names = [source.val, *(source.train.format(i) for i in range(1, (shards or source.count) + 1))]
    return [_shard(source.repo, file, folder, f"{i} of {len(names)}", say) for i, file in enumerate(names, start=1)]


def _shard(repo: str, name: str, folder: Path, place: str, say: Callable[[str], Any]) -> Path:
    path = folder / name
    if path.exists():
        try:
            tokens = _count(path)
            say(f"{path}: there already, {tokens:,} tokens ({place})")
            return path
        except ValueError as error:
            say(f"{error}; it is fetched again")
            path.unlink()
    _download(repo, name, folder)
    try:
        tokens = _count(path)
    except ValueError:
        path.unlink()
        raise
    say(f"{path}: {tokens:,} tokens ({place})")
    return path


def _count(path: Path) -> int:
    """Tokens of an llm.c shard. Raises ValueError for what is not whole, or none: the answer of a proxy, perhaps."""
    with open(path, "rb") as file:
        if int.from_bytes(file.read(4), "little") != MAGIC:
            raise ValueError(f"{path} has no llm.c header; what was fetched is no token shard")
    return len(read_bin(path).tokens)


def _download(repo: str, name: str, folder: Path) -> Path:
    import huggingface_hub

    with hub_client.explained(f"the data set {repo}", name, "here"):
        options = {"repo_type": "dataset", "local_dir": folder, "local_files_only": not hub_client.reachable()}
        return Path(huggingface_hub.hf_hub_download(repo, name, **options))


def _hellaswag(folder: Path, say: Callable[[str], Any]) -> Path:
    """hellaswag_val.jsonl, as `gpt2_fast.evaluate.hellaswag` reads it, from the hub's Parquet file."""
    path = folder / "hellaswag_val.jsonl"
    if path.exists():
        say(f"{path}: there already")
        return path
    try:
        from pyarrow import parquet
    except ImportError:
        raise ValueError("HellaSwag is a Parquet file on the hub; run: pip install pyarrow") from None
    import huggingface_hub

    with hub_client.explained(f"the data set {HELLASWAG}", "list of files", "here"):
        if not hub_client.reachable():
            raise huggingface_hub.errors.OfflineModeIsEnabled
        names = huggingface_hub.list_repo_files(HELLASWAG, repo_type="dataset")
    found = [name for name in names if name.endswith(".parquet") and "validation" in name]
    if not found:
        raise FileNotFoundError(f"the data set {HELLASWAG} has no validation set in Parquet")
    records = [r for name in found for r in parquet.read_table(_download(HELLASWAG, name, folder)).to_pylist()]
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")
    say(f"{path}: {len(records):,} questions")
    return path
