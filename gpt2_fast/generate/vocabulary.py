"""Which tokenizer a model has: a table of characters beside it, GPT-2's where its vocabulary has room, or none."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gpt2_fast.checkpoint.nanogpt import nanogpt_dataset
from gpt2_fast.data.characters import META, TOKENIZER, CharacterTokenizer, beside_data, read_characters
from gpt2_fast.data.tokenizer import Tokenizer, get_tokenizer

GPT2_TOKENS = 50257


def tokenizer_of(
    vocab_size: int, checkpoint: str | os.PathLike[str] | None = None, data: Any = None
) -> Tokenizer | CharacterTokenizer | None:
    """The tokenizer of a model of `vocab_size` tokens; None where none is known.

    Args:
        checkpoint: where its weights come from: a folder, nanoGPT's ckpt.pt, a hub name.
        data: what it is trained on, as `load_data` takes it.

    Raises ValueError, one line, for a table that does not fit the model, and for two that differ.
    """
    known: dict[Path, CharacterTokenizer] = {}
    for path in _tables(checkpoint, data):
        if (table := read_characters(path)) is not None:
            known[path] = table
    for path, table in known.items():
        first = next(iter(known))
        if table.ids != known[first].ids:
            raise ValueError(f"{first} and {path} are other tables of characters; the data is not of this model")
        if table.n_vocab > vocab_size:
            raise ValueError(
                f"{path} has {table.n_vocab} characters and the model {vocab_size} tokens; it is another's"
            )
    if known:
        return next(iter(known.values()))
    return get_tokenizer() if vocab_size >= GPT2_TOKENS and not _is_anothers(checkpoint) else None


def vocabulary_of(data: Any) -> dict[str, Any]:
    """The fields of a fresh model's config that its data decides: the size of nanoGPT's table beside .bin files."""
    path = beside_data(data)
    table = None if path is None else read_characters(path)
    return {} if table is None else {"vocab_size": table.n_vocab, "bos_token_id": None, "eos_token_id": None}


def _is_anothers(checkpoint: str | os.PathLike[str] | None) -> bool:
    """Whether a folder holds the vocabulary of a tokenizer that is not GPT-2's."""
    folder = None if checkpoint is None else Path(checkpoint).expanduser()
    for name, find in (("vocab.json", lambda data: data), (TOKENIZER, lambda data: data["model"]["vocab"])):
        if folder is not None and (folder / name).is_file():
            try:
                return find(json.loads((folder / name).read_text(encoding="utf-8"))) != get_tokenizer().vocabulary
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{folder / name} is not a tokenizer of transformers; it may be truncated") from None
    return False


def _tables(checkpoint: str | os.PathLike[str] | None, data: Any) -> list[Path]:
    """The files that may hold a table, as far as they are there."""
    found = [beside_data(data)]
    if checkpoint is not None:
        path = Path(checkpoint).expanduser()
        if path.is_dir():
            found += [path / TOKENIZER, path / META]
        elif path.is_file():
            found.append(path.parent / META)
            dataset = nanogpt_dataset(path)
            if dataset is not None:  # where nanoGPT's sample.py looks: data/ of its folder, which has out/ beside it
                found += [root / "data" / dataset / META for root in (Path(), path.resolve().parent.parent)]
    return list(dict.fromkeys(path.resolve() for path in found if path is not None and path.is_file()))
