"""What a source of data names, opened for training or evaluation, and the corpus that is there without one.

A source is text, jsonl, nanoGPT's or llm.c's .bin shards, a folder, pattern or list of these, or nothing.
"""

from __future__ import annotations

import glob
import os
import re
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from gpt2_fast.data.batches import TokenDataset
from gpt2_fast.data.shards import Shard, is_bin, read_bin
from gpt2_fast.data.text import by_hash, is_jsonl, text_files, tokenised

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def load_data(
    source: Source = None,
    *,
    context: int,
    vocab_size: int = 50257,
    val_fraction: float = 0.05,
    progress: bool = True,
) -> tuple[TokenDataset, TokenDataset]:
    """Open data as (train, validation).

    Args:
        source: a text file, a .jsonl (its "text" fields, a document each), a folder of either, a nanoGPT or llm.c
            .bin file, a folder or glob pattern of those, a list of any of these, or None: the source text of the
            running Python's standard library.
        context: T, the longest window asked for later.
        vocab_size: of the model; every id must be below it.
        val_fraction: share that becomes validation where no file is named for it. A .bin or .jsonl is named for it
            when "val" is a word of its name (val.bin, fineweb_val_000000.bin); otherwise it is the end of the
            tokens. Those with the word "test" are left out. Text files of a folder are ordered by a hash of their
            names, so that the end is a fair sample. Text is UTF-8; of a folder, files whose suffix does not name
            text and whose first 4 KB are none are left out.
        progress: whether a terminal shows a bar while text is tokenised.

    Raises:
        FileNotFoundError, ValueError: one line, for what is missing, empty, too short, not text or not token data.
        OSError: the tokenised text cannot be cached ($GPT2_FAST_CACHE chooses the folder).
    """
    if not 0.0 < val_fraction < 1.0:
        raise ValueError(f"val_fraction is {val_fraction}; give a share between 0 and 1")
    name, shards = _open(source, progress)
    parts: dict[str, list[Shard]] = {"train": [], "val": [], "test": []}
    for shard in shards:
        parts[_part(shard.path)].append(shard)
    train, val = parts["train"], parts["val"]
    if not train:
        train, val = val or parts["test"], []
    if not val:
        train, val = _cut(name, train, val_fraction, context)
    options = {"context": context, "vocab_size": vocab_size}
    return (
        TokenDataset(train, name=f"{name} (training)", **options),
        TokenDataset(val, name=f"{name} (validation)", **options),
    )


def load_tokens(source: Source, *, context: int, vocab_size: int = 50257, progress: bool = True) -> TokenDataset:
    """Open data whole, with no split: for evaluation. Arguments and errors are those of `load_data`."""
    name, shards = _open(source, progress)
    return TokenDataset(shards, name=name, context=context, vocab_size=vocab_size)


def _open(source: Source, progress: bool) -> tuple[str, list[Shard]]:
    """The name to show for a source, and its shards; all text of it becomes one shard, its jsonl one a part."""
    if source is None:
        return f"Python {sys.version_info.major}.{sys.version_info.minor} standard library", [
            tokenised(_standard_library(), progress)
        ]
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    shards: list[Shard] = []
    documents: list[tuple[str, Path]] = []
    for path in [path for item in sources for path in expand(item)]:
        if path.is_dir():
            bins = sorted(file for file in path.iterdir() if is_bin(file))
            shards += [read_bin(file) for file in bins]
            documents += [] if bins else by_hash(path, text_files(path))
        elif path.exists() and not path.is_file():
            raise ValueError(f"{path} is a pipe or device, and data is read more than once; write it to a file first")
        elif is_bin(path):
            shards.append(read_bin(path))
        else:
            documents.append((path.name, path))
    groups: dict[str, list[tuple[str, Path]]] = {}
    for name, path in documents:
        groups.setdefault(_part(path) if is_jsonl(path) else "text", []).append((name, path))
    for part, group in groups.items():
        shard = tokenised(group, progress)
        shards.append(shard if part == "text" else shard._replace(path=group[0][1]))
    name = ", ".join(str(item) for item in sources)
    if not shards:
        raise ValueError(f"{name or 'the list of data'} holds no .bin, .jsonl or text file")
    return name, shards


def expand(item: str | os.PathLike[str]) -> list[Path]:
    """The files and folders that a name stands for: itself, or what a pattern matches.

    Raises FileNotFoundError, or ValueError for an empty name.
    """
    if not os.fspath(item):  # Path("") is the current folder, with all that lies in it
        raise ValueError("data is '', no name; give a text file, a .bin file or a folder of either, . for this one")
    path = Path(item).expanduser()
    if path.exists():
        return [path]
    matches = [Path(match) for match in sorted(glob.glob(str(path)))]
    if not matches:
        raise FileNotFoundError(f"{item} does not exist; give a text file, a .bin file or a folder of either")
    return matches


def _part(path: Path) -> str:
    words = set(re.split(r"[^a-z]+", path.stem.lower()))
    if words & {"val", "valid", "validation"}:
        return "val"
    return "test" if "test" in words else "train"


def _cut(name: str, shards: list[Shard], fraction: float, context: int) -> tuple[list[Shard], list[Shard]]:
    """Cut the last `fraction` of all tokens, and at least one window, off as validation."""
    total = sum(len(shard.tokens) for shard in shards)
    wanted = max(int(total * fraction), context + 1)
    val: list[Shard] = []
    train = list(shards)
    while wanted > 0 and train:
        shard = train.pop()
        tokens = shard.tokens
        keep = max(len(tokens) - wanted, 0)
        val.insert(0, shard._replace(tokens=tokens[keep:]))
        wanted -= len(tokens) - keep
        if keep:
            train.append(shard._replace(tokens=tokens[:keep]))
    if total < 2 * (context + 1):
        raise ValueError(
            f"{name} has {total:,} tokens; training and validation with a context of {context} need "
            f"{2 * (context + 1):,}: give more data or a shorter context"
        )
    return train, val


def _standard_library() -> list[tuple[str, Path]]:
    """The documents of the default corpus: the .py files of the standard library, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = [path for path in text_files(root, ".py") if not skipped & set(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root} has no Python source text to train on; give text or .bin files as data")
    return by_hash(root, files)
