"""Files that are whole or not there: atomic writes, and the cache folder."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def cache_dir() -> Path:
    """Where derived files are kept: $GPT2_FAST_CACHE, else gpt2_fast in the user's cache folder."""
    if os.environ.get("GPT2_FAST_CACHE"):
        return Path(os.environ["GPT2_FAST_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpt2_fast"


@contextmanager
def atomic_write(path: str | os.PathLike[str], advice: str = "choose a folder you can write") -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block wrote there takes its place when the block ends.

    After an error in the block, or a crash, `path` holds what it held before. Makes missing folders.
    Raises OSError, one line that ends in `advice`, where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # An error about another file, or one that is explained already (no errno), stays as it is.
        named = Path(error.filename) if isinstance(error.filename, (str, os.PathLike)) else path
        if error.errno is None or named not in (temporary, path, *path.parents):
            raise
        raise OSError(f"cannot write {path} ({error.strerror or error}); {advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()
