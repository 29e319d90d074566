"""Text as token shards: text files, and the "text" field of every line of a .jsonl.

It is tokenised once into a cached file of llm.c's format, <|endoftext|> after each document.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gpt2_fast.data import jsonl
from gpt2_fast.data.shards import Shard, read_bin, write_bin
from gpt2_fast.data.tokenizer import get_tokenizer, split_text
from gpt2_fast.files import cache_dir

CACHE_VERSION = 3  # raise it when the same text is to give other tokens
BLOCK = 1 << 20  # bytes read at a time
PIECE = 1 << 16  # characters tokenised at a time
# Files of a folder that must be text: where one is not, it is refused, and not left out.
TEXT_SUFFIXES = frozenset((
    ".txt", ".text", ".md", ".rst", ".tex", ".jsonl", ".json", ".csv", ".tsv", ".html", ".htm", ".xml", ".yaml", ".yml",
    ".toml", ".ini", ".cfg", ".log", ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts",
    ".go", ".rs", ".rb", ".sh", ".sql",
))  # fmt: skip


def text_files(folder: Path, suffix: str = "") -> list[Path]:
    """Files below a folder that are text, without hidden ones: those whose suffix says so, or the first 4 KB."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        found += [Path(parent, name) for name in sorted(files) if name[0] != "." and name.endswith(suffix)]
    return [path for path in found if path.is_file() and (suffix or _names_text(path) or _is_text(path))]


def is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == ".jsonl"


def _names_text(path: Path) -> bool:
    return path.suffix.lower() in TEXT_SUFFIXES


def _is_text(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4096)
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(start) - 3:  # more than a character that the 4 KB cut in two
            return False
    return b"\0" not in start


def by_hash(root: Path, files: Iterable[Path]) -> list[tuple[str, Path]]:
    """(name, path) of documents in an order that is fixed and mixes neighbours."""
    names = [(path.relative_to(root).as_posix(), path) for path in files]
    return sorted(names, key=lambda item: hashlib.sha256(item[0].encode("utf-8", "surrogateescape")).digest())


def tokenised(documents: Sequence[tuple[str, Path]], progress: bool) -> Shard:
    """The tokens of text files, each followed by <|endoftext|>, from the cache where it has exactly these.

    Raises ValueError, one line that names the file, for what is not text: see `read_text`.
    """
    key = hashlib.sha256(f"{CACHE_VERSION}\n".encode())
    size = 0
    for name, path in documents:
        stat = path.stat()
        size += stat.st_size
        # Who replaces a file may keep its size and time of change, but neither inode nor ctime.
        which = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)
        key.update(repr((name, str(path.resolve()), *which)).encode("utf-8", "replace"))
    cached = cache_dir() / "tokens" / f"{key.hexdigest()[:32]}.bin"
    named = documents[0][1] if len(documents) == 1 else Path(os.path.commonpath([path for _, path in documents]))
    try:
        return read_bin(cached)._replace(source=named)  # the user's, which is what an error is to name
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
    return read_bin(cached)._replace(source=named)


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
    if is_jsonl(path):
        for where, record in jsonl.read(path):
            if text := jsonl.field(record, "text", str, where):
                yield from split_text(text, PIECE)
                yield ""
        return
    held, any_text = "", False
    for block in read_text(path):
        *pieces, held = split_text(held + block, PIECE)
        any_text = True
        yield from pieces
    if held:
        yield held
    if any_text:
        yield ""


def read_text(path: str | os.PathLike[str]) -> Iterator[str]:
    """A UTF-8 file in blocks, none of them empty; a byte order mark, as editors on Windows write it, is no part of it.

    Raises ValueError, one line with the file and the first byte that is not text: in another encoding, or NUL, which
    UTF-16 and binary files have. OSError, one line, where it cannot be read.
    """
    decoder, begin, read = codecs.getincrementaldecoder("utf-8")(), 0, 0  # bytes of the file: decoded, read
    try:
        with open(path, "rb") as file:
            while data := file.read(BLOCK):
                read += len(data)
                if begin == 0 and data.startswith(codecs.BOM_UTF8):
                    data, begin = data[len(codecs.BOM_UTF8) :], len(codecs.BOM_UTF8)
                text = decoder.decode(data)
                if "\0" in text:
                    where = begin + len(text[: text.index("\0")].encode())
                    raise ValueError(f"{path} is not text (byte {where} is NUL); convert it to UTF-8, or leave it out")
                begin = read - len(decoder.getstate()[0])
                if text:
                    yield text
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        where = begin + error.start
        raise ValueError(f"{path} is not UTF-8 text (byte {where}); convert it, or leave it out") from None
    except OSError as error:
        raise type(error)(f"cannot read {path} ({error.strerror or error})") from None
