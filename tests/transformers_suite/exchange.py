"""A plugin of pytest: `--gpt2-fast patched` and `classes` put this package under the models that tests make.

It stands alone in a folder on PYTHONPATH: the checkout's tests are the package `tests` there.
"""

import ast
import functools
import importlib
import importlib.util
import sys
import types
import unittest
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--gpt2-fast", choices=["plain", "patched", "classes"], default="plain")
    parser.addoption("--helpers", help="a testing_utils.py, in the place of the installed one")
    parser.addoption("--checkout", help="whose tests may import names that the installed transformers lacks")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    if path := config.getoption("--helpers"):
        _load("transformers.testing_utils", path)
    if folder := config.getoption("--checkout"):
        _fill(Path(folder))
    {"plain": lambda: None, "patched": _patch, "classes": _replace}[config.getoption("--gpt2-fast")]()


def _load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _lacking(name):
    """What stands for a name of another release: the test that uses it is skipped, the others run."""
    reason = f"the installed transformers has no {name}"
    if name.startswith(("require_", "slow", "run_")):
        return unittest.skip(reason)
    if name.startswith("is_"):  # is_numba_available
        return lambda *args, **kwargs: False

    class Lacking:
        def __new__(cls, *args, **kwargs):
            raise unittest.SkipTest(reason)

    return Lacking


def _fill(folder):
    """Gives transformers' modules the names that the checkout's tests import, where it is of another release."""
    files = [*folder.glob("tests/*.py"), *folder.glob("tests/generation/*.py"), *folder.glob("tests/utils/*.py")]
    files += [*folder.glob("tests/pipelines/*.py"), *folder.glob("utils/test_module/*.py")]
    files += folder.glob("src/transformers/__init__.py")
    for model in ("gpt2", "encoder_decoder", "bart", "bert", "bert_generation", "prophetnet", "roberta"):
        files += folder.glob(f"tests/models/{model}/test_modeling_*.py")
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and _package(node, file):
                module = _module(_package(node, file))
                for name in (alias.name for alias in node.names):
                    if name != "*" and not _has(module, name):
                        old = getattr(module, name.replace("PreTrained", "Pretrained"), None)
                        vars(module)[name] = _lacking(name) if old is None else old


def _package(node, file):
    """The module of transformers' or its hub's that an import is of; "" for others."""
    name = node.module or ""
    if node.level == 1 and file.match("src/transformers/__init__.py"):  # pipelines' tests import the checkout's own
        return f"transformers.{name}"
    return name if not node.level and name.partition(".")[0] in ("transformers", "huggingface_hub") else ""


def _has(module, name):
    try:
        if hasattr(module, name):
            return True
        return hasattr(module, "__path__") and importlib.util.find_spec(f"{module.__name__}.{name}") is not None
    except Exception:  # a name that needs a package which is not installed: the tests that use it know
        return True


def _module(name):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        parent, _, last = name.rpartition(".")
        module = sys.modules[name] = types.ModuleType(name)
        module.__path__ = []
        setattr(_module(parent), last, module)
        return module
    except Exception:
        return types.ModuleType(name)


def _patch():
    """Every model is patched when it is made, as by a user who calls `gpt2_fast.patch` in the next line."""
    import gpt2_fast
    from gpt2_fast.hf_patch.classes import PATCHED

    def patched(make):
        @functools.wraps(make)
        def __init__(self, *args, **kwargs):
            make(self, *args, **kwargs)
            if type(self) in PATCHED:
                gpt2_fast.patch(self)

        return __init__

    for cls in PATCHED:
        if hasattr(cls, "from_pretrained"):
            cls.__init__ = patched(cls.__init__)


def _replace():
    """`from transformers import GPT2LMHeadModel`, and every Auto class, give those of gpt2_fast.hf."""
    import transformers

    from gpt2_fast import hf

    for name in hf.__all__:
        if name.startswith("GPT2") and hasattr(transformers, name):
            setattr(transformers, name, getattr(hf, name))
    hf.register()
