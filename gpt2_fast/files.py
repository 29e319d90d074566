"""Files that are whole or not there: atomic writes, and the cache folder. Code kept there is this user's alone."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
import warnings
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
def atomic_write(
    path: str | os.PathLike[str], advice: str = "choose a folder you can write", mode: int = 0o666 & ~_UMASK
) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what the block wrote there takes its place when the block ends.

    After an error in the block, or a crash, `path` holds what it held before. Makes missing folders. mode: of the file.
    Raises OSError, one line that ends in `advice`, where the file cannot be written.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        settle(temporary, mode)
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


def settle(path: Path, mode: int = 0o666 & ~_UMASK) -> None:
    """Brings a file to the disk, with the mode that an ordinary new file of this user has, or another."""
    with open(path, "r+b" if os.name == "nt" else "rb") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
    os.chmod(path, mode)


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


def code_folder() -> Path:
    """Where compiled code is kept, beside what else is cached: a folder that only this user may write."""
    return cache_dir() / "code"


def read_code(name: str) -> bytes | None:
    """What `write_code` kept under this name; None where there is none, or where another could have written it.

    Code that is loaded runs with all that this user may do. So it is read only where file and folder are owned by this
    user, nobody else may write them, and the SHA-256 beside it fits. What is not so is passed over with a warning.
    """
    path = code_folder() / name
    try:
        reason = _others_may_write(os.lstat(path.parent)) and f"{path.parent} can be written by others"
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            if reason or _others_may_write(os.fstat(file.fileno())):
                reason = reason or "it can be written by others"
            else:
                content = file.read()
                if _digest_path(path).read_text().strip() == hashlib.sha256(content).hexdigest():
                    return content
                reason = "its SHA-256 is another"
    except FileNotFoundError as error:
        if error.filename != str(_digest_path(path)):
            return None
        reason = "its SHA-256 is missing"
    except (OSError, UnicodeDecodeError) as error:  # a link, among others
        reason = getattr(error, "strerror", None) or "its SHA-256 is not text"
    warnings.warn(f"{path} is not loaded, and compiled again: {reason}", stacklevel=3)
    return None


def write_code(name: str, content: bytes) -> None:
    """Keeps code for `read_code`. Raises OSError where that cannot be, or where the folder is another user's."""
    folder = code_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if _is_anothers(os.lstat(folder)):
        raise PermissionError(f"{folder} is not this user's")
    folder.chmod(0o700)
    path = folder / name
    for target, data in ((path, content), (_digest_path(path), f"{hashlib.sha256(content).hexdigest()}\n".encode())):
        private = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with atomic_write(target, mode=0o600) as temporary, open(os.open(temporary, private, 0o600), "wb") as file:
            file.write(data)


def _digest_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _is_anothers(status: os.stat_result) -> bool:
    """Also of a link, whose target may be anybody's. A system without user ids has other ways, which are its own."""
    return stat.S_ISLNK(status.st_mode) or (hasattr(os, "getuid") and status.st_uid != os.getuid())


def _others_may_write(status: os.stat_result) -> bool:
    return _is_anothers(status) or (hasattr(os, "getuid") and bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)))
