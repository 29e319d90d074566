"""What every test runs under: poisoned memory, no Hugging Face hub, Triton in its interpreter where there is no GPU."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
import sanitize
import torch

# Before triton is imported anywhere: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))
if os.environ.get(sanitize.EXTENSION):
    sys.meta_path.insert(0, sanitize.Finder(os.environ[sanitize.EXTENSION]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# What `make test-fast` leaves out: test files that run whole commands, compilers or other processes, and elsewhere the
# tests whose names have one of these parts.
SLOW_FILES = [
    "benchmarks", "benchmarks_compare", "benchmarks_generate", "benchmarks_scale", "build", "chapter8", "colab",
    "compat", "disassembly", "distributed_loops", "docs", "doctor", "faults", "first_hour", "fuzz_files", "generated",
    "golden", "golden_kernels", "hf", "hub", "install", "loss_scale", "memory", "nanogpt",
    "no_extension", "op_benchmarks", "parallel", "patch_ecosystem", "pretrained", "recipes", "run", "threads", "train",
]  # fmt: skip
SLOW_NAMES = re.compile(
    "compile|cuda_kernels_on_the_cpu|every_instruction_set|importing_the_formats|in_a_new_process|operator_contract"
    "|own_product|product_with_gelu|strides_change_no_bit|torchs_contract|triton"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW_FILES or SLOW_NAMES.search(item.name):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty returns NaN, so that a kernel that leaves an element unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    """(world, program, *arguments, cwd=) -> what became of ranks that need not import everything: parallel.Forks."""
    import parallel

    forks = parallel.Forks(tmp_path_factory.mktemp("forks"))
    yield forks
    forks.close()


@pytest.fixture
def blank_pictures(monkeypatch):
    """An empty picture is written where a run's curves would be: drawing is a third of so short a run."""
    from gpt2_fast.report import figures

    monkeypatch.setattr(figures, "loss_figure", lambda records, title="": figures.Picture(figsize=(1, 1)))


@pytest.fixture
def small_nano(monkeypatch):
    """The nano preset, a quarter as wide: its commands, files and bits, in a quarter of the time."""
    from gpt2_fast.config import PRESETS

    monkeypatch.setitem(PRESETS, "nano", {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 256})


@pytest.fixture
def threads():
    """Sets torch's thread count and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _with_isa(name: str):
    from gpt2_fast.ops.runtime import dispatch

    extension, before = dispatch.extension(), dispatch.extension().isa()
    try:
        extension.set_isa(name)
    except ValueError:
        pytest.skip(f"this processor or build has no {name}")
    yield name
    extension.set_isa(before)


@pytest.fixture(params=["baseline", "avx2", "avx512", "avx512bf16", "amx"])
def isa(request):
    """Each instruction set that this build and processor have, in turn, but those of `decode_isa` alone."""
    yield from _with_isa(request.param)


@pytest.fixture(params=["baseline", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512bf16", "amx"])
def decode_isa(request):
    """Each instruction set that decode_step is built for and this build and processor have, in turn."""
    yield from _with_isa(request.param)


@pytest.fixture
def use_policy(monkeypatch):
    """Lets the products run as on another processor: a function of a CpuPolicy. The own product then takes any size."""
    from gpt2_fast.ops import block, linear_cross_entropy, mlp
    from gpt2_fast.ops.runtime import products

    def use(policy):
        for room in (block, mlp, products, linear_cross_entropy):
            monkeypatch.setattr(room, "cpu_policy", lambda: policy)
        monkeypatch.setattr(products, "MIN_ROWS", 1)

    return use
