"""A vocabulary of characters, as nanoGPT's character models have it, and where its table lies.

nanoGPT's prepare.py writes the table beside train.bin as meta.pkl, a pickle, which is read here without running it.
This package keeps it beside a checkpoint as tokenizer.json, which transformers' AutoTokenizer loads too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from gpt2_fast.data.plain_pickle import read_plain_pickle
from gpt2_fast.data.shards import is_bin
from gpt2_fast.files import atomic_write

META, TOKENIZER = "meta.pkl", "tokenizer.json"


class CharacterTokenizer:
    """One id a character. `eot_token` is None: such a vocabulary has no end of text.

    Args:
        ids: character -> id, of any ids that are no two characters'.

    Raises ValueError for a malformed table.
    """

    eot_token = None

    def __init__(self, ids: Mapping[str, int]):
        if not ids or not all(type(c) is str and len(c) == 1 for c in ids):
            raise ValueError("it is no table of characters: a key is not one character")
        if not all(type(i) is int and 0 <= i < 1 << 20 for i in ids.values()) or len(set(ids.values())) < len(ids):
            raise ValueError("it is no table of characters: an id is not a whole number of its own")
        self.ids = dict(ids)
        self._characters = {i: c for c, i in ids.items()}
        self.n_vocab = max(self._characters) + 1

    @property
    def start_token(self) -> int:
        """From which a text without a prompt begins: the newline, as in nanoGPT's sample.py, or the first id."""
        return self.ids.get("\n", min(self._characters))

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of a text. Raises ValueError for a character that is not in the table."""
        for position, character in enumerate(text):
            if character not in self.ids:
                raise ValueError(
                    f"the model has no character {character!r} (position {position}); it knows "
                    f"{len(self.ids)}: {''.join(sorted(self.ids))!r:.120}"
                )
        return [self.ids[character] for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Raises ValueError for one that has no character."""
        return "".join(self._character(int(i)) for i in ids)

    def token_bytes(self, token: int) -> bytes:
        """UTF-8 of one id's character."""
        return self._character(token).encode("utf-8", "replace")

    def _character(self, token: int) -> str:
        if token not in self._characters:
            raise ValueError(f"token id {token} is no character of this vocabulary of {len(self.ids)}")
        return self._characters[token]

    def save_pretrained(self, folder: str | os.PathLike[str], model_max_length: int = 1024) -> None:
        """Write tokenizer.json and tokenizer_config.json, from which `read_characters` and AutoTokenizer load it.

        To transformers it is a WordLevel model of words of one character; one that is not in the table raises there.
        """
        every = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
        whole = {
            "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
            "pre_tokenizer": every, "post_processor": None, "decoder": {"type": "Fuse"},
            "model": {"type": "WordLevel", "vocab": self.ids, "unk_token": "<unk>"},
        }  # fmt: skip
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
        }
        for name, content in ((TOKENIZER, whole), ("tokenizer_config.json", settings)):
            with atomic_write(Path(folder) / name) as path:
                path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_characters(path: Path) -> CharacterTokenizer | None:
    """The table in a meta.pkl or a tokenizer.json; None for a tokenizer.json of another kind.

    Raises ValueError, one line that names the file, where it is damaged or holds more than a table.
    """
    if path.suffix == ".json":
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            if model["type"] != "WordLevel":
                return None
            table = model["vocab"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f"{path} is not a tokenizer of transformers; it may be truncated") from None
        except OSError as error:
            raise type(error)(f"cannot read {path} ({error.strerror})") from None
        return _named(path, table)
    meta = read_plain_pickle(path)
    table = meta.get("stoi") if isinstance(meta, dict) else None
    if not isinstance(table, dict):
        raise ValueError(f"{path} is no table of characters: it has no 'stoi'")
    tokenizer = _named(path, table)
    if meta.get("itos", back := {i: c for c, i in table.items()}) != back:
        raise ValueError(f"{path} is damaged: its 'itos' is not its 'stoi' the other way round")
    if meta.get("vocab_size", len(table)) != len(table):
        raise ValueError(f"{path} is damaged: its vocab_size is not the number of its characters, {len(table)}")
    return tokenizer


def _named(path: Path, table: Any) -> CharacterTokenizer:
    try:
        return CharacterTokenizer(table)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def beside_data(source: Any) -> Path | None:
    """The meta.pkl of token data (.bin files, a folder or a pattern of them), where there is one."""
    sources = [] if source is None else [source] if isinstance(source, (str, os.PathLike)) else list(source)
    for item in sources:
        path = Path(item).expanduser()
        holds_bins = path.is_dir() and any(map(is_bin, path.iterdir()))
        folder = path if holds_bins else path.parent if is_bin(path) else None
        if folder is not None and (folder / META).is_file():
            return folder / META
    return None
