"""Token data: text, jsonl, nanoGPT's and llm.c's .bin shards and the default corpus, memory-mapped, in batches.

A .bin file holds uint16 token ids, bare (nanoGPT) or behind llm.c's header of 256 int32: magic 20240520,
version 1, count. Text, and the "text" field of every line of a .jsonl, is tokenised once into a cached file of
llm.c's format, <|endoftext|> after each document.

A batch is a function of (seed, step, micro_step) alone, so a run that resumes needs no state from here.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from gpt2_fast.data import jsonl
from gpt2_fast.data.tokenizer import get_tokenizer, split_text
from gpt2_fast.files import atomic_write, cache_dir

MAGIC = 20240520
HEADER_BYTES = 1024
CACHE_VERSION = 2  # raise it when the same text is to give other tokens

# What else is called .bin, by its first four bytes. None of them can begin a file of GPT-2 ids but the zip.
FOREIGN = {
    20240326: "an llm.c model checkpoint",
    20240801: "llm.c tokens of another vocabulary (32 bits each)",
    20240328: "an llm.c tokenizer",
    int.from_bytes(b"PK\x03\x04", "little"): "a zip archive, such as a PyTorch checkpoint",
}

BLOCK = 1 << 20  # characters read at a time
PIECE = 1 << 16  # characters tokenised at a time
CHECKED_AT_ONCE = 1 << 20  # tokens of a shard that are checked when it is opened; batches check the rest

Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


class Shard(NamedTuple):
    """Part of a token file: its path, and uint16 ids mapped from it."""

    path: Path
    tokens: np.ndarray


class TokenDataset:
    """Token shards from which windows of context + 1 tokens are cut, none across two shards.

    Raises ValueError where no shard has context + 1 tokens, or a token id is not below vocab_size.
    """

    def __init__(self, shards: Sequence[Shard], *, context: int, vocab_size: int, name: str = "data"):
        if context < 1:
            raise ValueError(f"context is {context}; give a whole number of at least 1")
        self.name, self.context, self.vocab_size = name, context, vocab_size
        self.shards = [shard for shard in shards if len(shard.tokens) > context]
        if not self.shards:
            longest = max((len(shard.tokens) for shard in shards), default=0)
            raise ValueError(
                f"{name} has {longest:,} tokens in a row; a context of {context} needs {context + 1:,}: "
                "give more data or a shorter context"
            )
        for shard in self.shards:
            self._check_ids(shard, 0, shard.tokens[:CHECKED_AT_ONCE])
        self._starts = np.cumsum([len(shard.tokens) - context for shard in self.shards])
        self._windows = np.cumsum([(len(shard.tokens) - 1) // context for shard in self.shards])

    def __len__(self) -> int:
        """Tokens in all."""
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def n_windows(self) -> int:
        """How many windows `windows` has when nothing limits it."""
        return int(self._windows[-1])

    def batch(
        self, step: int, micro_step: int = 0, *, batch_size: int, seed: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Random windows for one micro-step of training: (input_ids, labels), each int64 [B, T], contiguous.

        labels are already the next tokens: labels[b, t] follows input_ids[b, t] in the data. Every start is
        equally likely, drawn by Philox from (seed, step, micro_step) only. With several processes, give each
        its own micro_step.
        """
        key = np.array([seed % 2**64, step], dtype=np.uint64)
        counter = np.array([0, 0, 0, micro_step], dtype=np.uint64)
        # Raw words and a remainder: NumPy may change how it draws from a range, never Philox itself.
        words = np.random.Philox(key=key, counter=counter).random_raw(batch_size)
        picks = (words % np.uint64(self._starts[-1])).astype(np.int64)
        return self._gather(self._locate(pick, self._starts) for pick in picks)

    def windows(self, *, batch_size: int, limit: int | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Fixed windows that do not overlap, for validation: batches as those of `batch`, the last may be smaller.

        limit: at most so many windows, evenly spaced over the data; the same ones every time.
        """
        count = self.n_windows if limit is None else min(limit, self.n_windows)
        picks = [i * self.n_windows // count for i in range(count)]
        for start in range(0, count, batch_size):
            places = (self._locate(pick, self._windows) for pick in picks[start : start + batch_size])
            yield self._gather((shard, window * self.context) for shard, window in places)

    def _locate(self, pick: int, ends: np.ndarray) -> tuple[int, int]:
        shard = int(np.searchsorted(ends, pick, side="right"))
        return shard, int(pick) - (int(ends[shard - 1]) if shard else 0)

    def _gather(self, places: Iterable[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = []
        for index, start in places:
            shard = self.shards[index]
            rows.append(shard.tokens[start : start + self.context + 1])
            self._check_ids(shard, start, rows[-1])
        tokens = torch.from_numpy(np.stack(rows).astype(np.int64))  # [B, T + 1]
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _check_ids(self, shard: Shard, start: int, tokens: np.ndarray) -> None:
        if tokens.max() >= self.vocab_size:
            position = int(np.argmax(tokens >= self.vocab_size))
            raise ValueError(
                f"{shard.path} has token id {tokens[position]} at position {start + position:,} of this part, "
                f"outside the model's vocabulary of {self.vocab_size}; is it data of another tokenizer?"
            )


def load_data(
    source: Source = None,
    *,
    context: int,
    vocab_size: int = 50257,
    val_fraction: float = 0.05,
    progress: bool = True,
) -> tuple[TokenDataset, TokenDataset]:
    """Open data as (train, validation).

    source: a text file, a .jsonl (its "text" fields, a document each), a folder of either, a nanoGPT or llm.c
      .bin file, a folder or glob pattern of those, a list of any of these, or None: the source text of the running
      Python's standard library.
    context: T, the longest window asked for later.
    vocab_size: of the model; every id must be below it.
    val_fraction: share that becomes validation where no file is named for it. A .bin or .jsonl is named for it
      when "val" is a word of its name (val.bin, fineweb_val_000000.bin); otherwise it is the end of the tokens.
      Those with the word "test" are left out.
      Text files of a folder are ordered by a hash of their names, so that the end is a fair sample.
    progress: whether a terminal shows a bar while text is tokenised.

    Raises FileNotFoundError or ValueError, one line, for what is missing, empty, too short or not token data,
    and OSError where the tokenised text cannot be cached ($GPT2_FAST_CACHE chooses the folder).
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


def write_bin(path: str | os.PathLike[str], parts: Iterable[np.ndarray]) -> int:
    """Write token ids (uint16 arrays) as one llm.c .bin shard, atomically. Returns how many."""
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    advice = "set GPT2_FAST_CACHE to a folder you can write"
    with atomic_write(path, advice) as temporary, open(temporary, "wb") as file:
        file.write(header.tobytes())
        count = 0
        for part in parts:
            file.write(part.astype("<u2", copy=False).tobytes())
            count += len(part)
        # llm.c's count is an int32; where it cannot hold it, the file's size says it.
        header[:3] = MAGIC, 1, min(count, 2**31 - 1)
        file.seek(0)
        file.write(header.tobytes())
    return count


def read_bin(path: str | os.PathLike[str]) -> Shard:
    """Map a nanoGPT or llm.c .bin file. Raises ValueError, one line, where it is not whole or not token data."""
    path = Path(path)
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty")
    if size % 2:
        raise ValueError(f"{path} has {size:,} bytes, an odd number; 16-bit tokens need an even one")
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    header = np.frombuffer(header[: len(header) // 4 * 4], dtype="<i4")
    magic = int(header[0]) if len(header) else 0
    if magic in FOREIGN:
        raise ValueError(f"{path} is {FOREIGN[magic]}, not token data")
    if magic != MAGIC:
        return Shard(path, np.memmap(path, dtype="<u2", mode="r"))
    if len(header) < HEADER_BYTES // 4:
        raise ValueError(f"{path} has {size:,} bytes; llm.c's header alone has {HEADER_BYTES:,}: it is truncated")
    version, count, held = int(header[1]), int(header[2]), (size - HEADER_BYTES) // 2
    if version != 1:
        raise ValueError(f"{path} is an llm.c shard of version {version}; GPT-2's tokens have version 1")
    if count != min(held, 2**31 - 1):
        raise ValueError(f"{path} holds {held:,} tokens where its header says {count:,}; it is truncated")
    if count == 0:
        raise ValueError(f"{path} is empty: its header says 0 tokens")
    return Shard(path, np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))


def _open(source: Source, progress: bool) -> tuple[str, list[Shard]]:
    """The name to show for a source, and its shards; all text of it becomes one shard, its jsonl one a part."""
    if source is None:
        return f"Python {sys.version_info.major}.{sys.version_info.minor} standard library", [
            _tokenised(_standard_library(), progress)
        ]
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    shards: list[Shard] = []
    documents: list[tuple[str, Path]] = []
    for path in [path for item in sources for path in _expand(item)]:
        if path.is_dir():
            bins = sorted(path.glob("*.bin"))
            shards += [read_bin(file) for file in bins]
            documents += [] if bins else _by_hash(path, _text_files(path))
        elif path.suffix == ".bin":
            shards.append(read_bin(path))
        else:
            documents.append((path.name, path))
    groups: dict[str, list[tuple[str, Path]]] = {}
    for name, path in documents:
        groups.setdefault(_part(path) if path.suffix == ".jsonl" else "text", []).append((name, path))
    for part, group in groups.items():
        shard = _tokenised(group, progress)
        shards.append(shard if part == "text" else shard._replace(path=group[0][1]))
    name = ", ".join(str(item) for item in sources)
    if not shards:
        raise ValueError(f"{name or 'the list of data'} holds no .bin, .jsonl or text file")
    return name, shards


def _expand(item: str | os.PathLike[str]) -> list[Path]:
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
        path, tokens = train.pop()
        keep = max(len(tokens) - wanted, 0)
        val.insert(0, Shard(path, tokens[keep:]))
        wanted -= len(tokens) - keep
        if keep:
            train.append(Shard(path, tokens[:keep]))
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
    files = [path for path in _text_files(root, ".py") if not skipped & set(path.relative_to(root).parts)]
    if not files:
        raise ValueError(f"{root} has no Python source text to train on; give text or .bin files as data")
    return _by_hash(root, files)


def _text_files(folder: Path, suffix: str = "") -> list[Path]:
    """Files below a folder that are text (UTF-8 as far as the first 4 KB tell), without hidden ones."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        found += [Path(parent, name) for name in sorted(files) if name[0] != "." and name.endswith(suffix)]
    return [path for path in found if path.is_file() and (suffix or _is_text(path))]


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # more than a character that the 4 KB cut in two
            return False
    return b"\0" not in start


def _by_hash(root: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name, path) of documents in an order that is fixed and mixes neighbours."""
    names = [(path.relative_to(root).as_posix(), path) for path in files]
    return sorted(names, key=lambda item: hashlib.sha256(item[0].encode("utf-8", "surrogateescape")).digest())


def _tokenised(documents: Sequence[tuple[str, Path]], progress: bool) -> Shard:
    """The tokens of text files, each followed by <|endoftext|>, from the cache where it has exactly these."""
    key = hashlib.sha256(f"{CACHE_VERSION}\n".encode())
    size = 0
    for name, path in documents:
        stat = path.stat()
        size += stat.st_size
        key.update(repr((name, str(path.resolve()), stat.st_size, stat.st_mtime_ns)).encode("utf-8", "replace"))
    cached = cache_dir() / "tokens" / f"{key.hexdigest()[:32]}.bin"
    try:
        return read_bin(cached)
    except (OSError, ValueError):  # not there, or not whole: made again
        pass
    if size == 0:
        raise ValueError(f"{documents[0][1]} is empty" if len(documents) == 1 else "all text files are empty")
    bar = tqdm(
        total=size, unit="B", unit_scale=True, desc="tokenising", leave=False, disable=None if progress else True
    )
    with bar:
        count = write_bin(cached, _tokenise(documents, bar))
    if not count:
        cached.unlink()
        raise ValueError(f"{documents[0][1]} has no text" if len(documents) == 1 else "all documents are empty")
    return read_bin(cached)


def _tokenise(documents: Sequence[tuple[str, Path]], bar: tqdm) -> Iterator[np.ndarray]:
    """Token arrays in order; the pieces of a few blocks at a time are encoded by as many threads as torch uses."""
    tokenizer = get_tokenizer()
    eot = np.array([tokenizer.eot_token], dtype=np.uint16)
    pieces = (piece for _, path in documents for piece in _pieces(path))
    workers = torch.get_num_threads()
    with ThreadPoolExecutor(workers) as pool:
        while group := list(islice(pieces, 16 * workers)):
            for text, tokens in zip(group, pool.map(_encode, group), strict=True):
                bar.update(len(text.encode("utf-8", "replace")))
                yield tokens if text else eot


def _encode(text: str) -> np.ndarray:
    return get_tokenizer().encode_to_numpy(text)


def _pieces(path: Path) -> Iterator[str]:
    """A file in pieces that tokenise as its documents do whole, "" at the end of each; nothing for empty ones."""
    if path.suffix == ".jsonl":
        for where, record in jsonl.read(path):
            if text := jsonl.field(record, "text", str, where):
                yield from split_text(text, PIECE)
                yield ""
        return
    try:
        with open(path, encoding="utf-8", errors="replace", newline="") as file:
            held, any_text = "", False
            while block := file.read(BLOCK):
                *pieces, held = split_text(held + block, PIECE)
                any_text = True
                yield from pieces
            if held:
                yield held
            if any_text:
                yield ""
    except OSError as error:
        raise OSError(f"cannot read {path} ({error.strerror or error})") from None
