"""Files that are whole or not there: atomic writes, and the cache folder."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# A file's ordinary mode is 0o666 without these bits. Asking sets them, so it is done once, while one thread runs.
_UMASK = os.umask(0o022)
os.umask(_UMASK)


def cache_dir() -> Path:
    """Where derived files are kept: $GPT2_FAST_CACHE, else gpt2_fast in the user's cache folder."""
    if os.environ.get("GPT2_FAST_CACHE"):
        return Path(os.environ["GPT2_FAST_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gpt2_fast"


def temporary_name(path: Path) -> Path:
    """A name beside `path` that no other writer has; `remove_temporary` knows it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


@contextmanager
def atomic_write(path: str | os.PathLike[str], advice: str = "choose a folder you can write") -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block wrote there takes its place when the block ends.

    After an error in the block, or a crash, `path` holds what it held before. Makes missing folders.
    Raises OSError, one line that ends in `advice`, where the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        settle(temporary)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        # An error about another file, or one that is explained already (no errno), stays as it is.
        named = Path(error.filename) if isinstance(error.filename, (str, os.PathLike)) else path
        if error.errno is None or named not in (temporary, path, *path.parents):
            raise
        raise OSError(f"cannot write {path} ({error.strerror or error}); {advice}") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(path: str | os.PathLike[str], advice: str = "choose a folder you can write") -> Iterator[Path]:
    """Yields a temporary folder beside `path`, which must not exist; it takes that name when the block ends.

    After an error in the block nothing is left, and after a crash no more than the temporary folder.
    Raises OSError as `atomic_write` does.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            settle(file)
        sync_folder(temporary)
        os.rename(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(f"cannot write {path} ({error.strerror or error}); {advice}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def settle(path: Path) -> None:
    """Brings a file to the disk, with the mode that an ordinary new file of this user has."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    os.chmod(path, 0o666 & ~_UMASK)


def sync_folder(path: Path) -> None:
    """Brings the names in a folder to the disk, where the system can do that for a folder."""
    if os.name == "nt":
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_temporary(folder: Path, name: str = "*") -> None:
    """Removes what writers of `name` left in `folder` when they were killed. None of them may be at work."""
    for path in folder.glob(f".{name}.{'[0-9a-f]' * 8}.tmp"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
