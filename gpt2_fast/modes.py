"""The modes of modules while a model is evaluated, whoever else uses them.

State of the process: `_HELD`, the mode of each module that `evaluating` holds.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from gpt2_fast.modules import is_plain_part


@dataclass
class _Held:
    """A module, the mode that it had itself, and which threads use it, one as often as it does."""

    module: nn.Module
    mode: bool
    users: list[int]

    def leave(self, user: int) -> None:
        self.users.remove(user)
        if not self.users:
            self.release()

    def release(self) -> None:
        if self.mode:  # of one that was not, somebody may have changed it meanwhile
            self.module.training = True
        del _HELD[id(self.module)]


_HELD: dict[int, _Held] = {}  # by id of the module
_LOCK = threading.Lock()


@contextlib.contextmanager
def evaluating(*models: nn.Module, cached: bool = False) -> Iterator[None]:
    """Within it the models are in eval mode; afterwards each of their modules is in the mode that it had itself.

    cached: whether all that runs within it has a cache. Parts of this package's model drop nothing then, in either
    mode, and keep theirs: another thread may train the model meanwhile. Otherwise it would train without dropout.

    Several threads may use a model, or models that share modules: a module gets its mode back from the last of them.
    Modes are set on each module, without `train()` and `eval()`: what a module makes of these calls besides, as one
    that merges an adapter does, could not be undone by the other call where its mode differs from the model's.
    """
    user = threading.get_ident()
    every = dict.fromkeys(module for model in models for module in model.modules())
    modules = [module for module in every if not (cached and is_plain_part(module))]
    with _LOCK:
        for module in modules:
            _HELD.setdefault(id(module), _Held(module, module.training, [])).users.append(user)
            if module.training:
                module.training = False
    try:
        yield
    finally:
        with _LOCK:
            for module in modules:
                _HELD[id(module)].leave(user)


def _forked() -> None:
    """In a child there is one thread, and the others never give back what they held."""
    global _LOCK
    _LOCK = threading.Lock()
    for held in list(_HELD.values()):
        held.users = [user for user in held.users if user == threading.get_ident()]
        if not held.users:
            held.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
