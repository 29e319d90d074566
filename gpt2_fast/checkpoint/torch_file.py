"""Files of `torch.save`, read as weights only: no code in them is run, and an error is one line."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import torch


def torch_load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text advises to run the file's code; what matters in it is the name of what it would not load.
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds {found[1]}, more than tensors" if found else "it is truncated or another kind of file"
        raise ValueError(f"{path} cannot be read safely: {reason}") from None
    except Exception as error:  # on bytes that are no pickle, torch's reader fails in any way
        raise ValueError(f"{path} is not a whole PyTorch file ({first_line(error)}); it may be truncated") from None


def first_line(error: BaseException) -> str:
    """The first line of an error's text."""
    return (str(error) or type(error).__name__).strip().splitlines()[0].rstrip(".")
