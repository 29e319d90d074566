"""Files of `torch.save`, read as weights only: no code in them is run, and an error is one line."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

ZIP_FACTOR = 2  # torch.save stores what it writes as it is: more than that, declared, is no file of its


def torch_load(path: Path, mmap: bool = False) -> Any:
    """mmap: tensors stay in the file until they are read."""
    _check_zip(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        # Its text advises to run the file's code; what matters in it is the name of what it would not load.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, more than tensors" if found else "it is truncated or another kind of file"
        raise ValueError(f"{path} cannot be read safely: {reason}") from None
    except Exception as error:  # on bytes that are no pickle, torch's reader fails in any way
        raise ValueError(f"{path} is not a whole PyTorch file ({first_line(error)}); it may be truncated") from None


def _check_zip(path: Path) -> None:
    """Refuses an archive that would unpack to far more than the file has, before anything is unpacked."""
    size = path.stat().st_size
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            declared = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError):
        return  # torch's own reader says what is wrong with it
    if declared > ZIP_FACTOR * size + (1 << 20):
        raise ValueError(
            f"{path} has {size:,} bytes and would unpack to {declared:,}, which no file of torch.save does; "
            "get it again from where it was made"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
