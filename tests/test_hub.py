"""The folder for Hugging Face `kernels` (release/hub.py): it loads, beside the package, and its values are right.

`make test-hub` installs the package `kernels`, which loads the folder; `make test` imports the folder in the same way.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from types import FunctionType

import pytest
import torch
from numerics import check_op

from release import hub


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub")
    hub.build(path)
    return path


@pytest.fixture(scope="module")
def kernel(folder):
    """Imported by its file and under a name of its own, as kernels/importer.py has it."""
    path = folder / "build" / "torch-cpu" / "__init__.py"
    spec = importlib.util.spec_from_file_location("_gpt2_fast_in_a_test", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    for name in [n for n in sys.modules if n.split(".")[0] == spec.name]:
        del sys.modules[name]


def _calls(kernel):
    """Each operation with its reference and inputs."""
    drawn = torch.Generator().manual_seed(1)
    randn = lambda *shape: torch.randn(*shape, generator=drawn)
    dropout = kernel.Dropout(0.25, torch.tensor([35]), 1)
    labels = torch.randint(11, (6,), generator=drawn)
    return {
        "add_layernorm": (
            lambda x, r, w, b, impl: kernel.add_layernorm(x, r, w, b, dropout=dropout, impl=impl),
            lambda x, r, w, b: kernel.add_layernorm_reference(x, r, w, b, dropout=dropout),
            (randn(3, 5, 48), randn(3, 5, 48), randn(48), randn(48)),
        ),
        "attention": (kernel.attention, kernel.attention_reference, (randn(1, 17, 3, 2, 16),)),
        "linear_cross_entropy": (
            lambda x, w, impl: kernel.linear_cross_entropy(x, w, labels, impl=impl),
            lambda x, w: kernel.linear_cross_entropy_reference(x, w, labels),
            (randn(6, 16), randn(11, 16)),
        ),
    }


@pytest.mark.parametrize("op", hub.OPS)
def test_values_and_gradients_by_triton(op, kernel):
    run, reference, inputs = _calls(kernel)[op]
    check_op(lambda *a: run(*a, impl="triton"), reference, inputs, torch.float32)


def test_its_operators_are_its_own(kernel):
    """Two versions in one process, or one beside the installed package, would define the same operators twice."""
    from gpt2_fast.ops import add_layernorm as installed

    namespace = sys.modules[f"{kernel.__name__}.ops.runtime.library"].NAMESPACE
    assert re.fullmatch(r"gpt2_fast_[0-9a-f]{12}", namespace)
    assert installed.add_layernorm is not kernel.add_layernorm
    assert hasattr(getattr(torch.ops, namespace), "add_layernorm")
    loaded = [module for name, module in sys.modules.items() if name.startswith(kernel.__name__)]
    defined = [value for module in loaded for value in vars(module).values() if isinstance(value, type | FunctionType)]
    outside = {value for value in defined if value.__module__.startswith("gpt2_fast")}
    assert len(loaded) > 20
    assert not outside, f"{outside} use the installed package"


def test_variants_differ_in_their_metadata_alone(folder):
    contents = {}
    for variant in hub.VARIANTS:
        root = folder / "build" / variant
        contents[variant] = {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        assert b'"id"' in contents[variant].pop(root.joinpath("metadata.json").relative_to(root))
    assert contents["torch-cuda"] == contents["torch-cpu"]


LOAD = """
import sys
from pathlib import Path
import torch
from kernels import LocalLayerRepository, Mode, get_local_kernel
from kernels import kernelize, use_kernel_forward_from_hub, use_kernel_mapping
folder = Path(sys.argv[1])
kernel = get_local_kernel(folder, backend="cpu")
assert Path(kernel.__file__).is_relative_to(folder / "build" / "torch-cpu"), kernel.__file__
assert "gpt2_fast" not in sys.modules
x, r, w, b = torch.randn(4, 48), torch.randn(4, 48), torch.randn(48), torch.randn(48)
found = kernel.add_layernorm(x, r, w, b, impl="triton")
torch.testing.assert_close(found[0], torch.nn.functional.layer_norm(x + r, (48,), w, b))
qkv = torch.randn(1, 17, 3, 2, 16)
q, k, v = qkv.permute(2, 0, 3, 1, 4)
wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
torch.testing.assert_close(kernel.attention(qkv, impl="triton"), wanted.transpose(1, 2))
labels, head = torch.randint(11, (4,)), torch.randn(11, 48)
wanted = torch.nn.functional.cross_entropy(x @ head.T, labels)
torch.testing.assert_close(kernel.linear_cross_entropy(x, head, labels, impl="triton"), wanted)
norm = use_kernel_forward_from_hub("LayerNorm")(torch.nn.LayerNorm)(48)
before = norm(x)
repository = LocalLayerRepository(folder, layer_name="LayerNorm")
with use_kernel_mapping({"LayerNorm": {"cpu": repository}}):
    norm = kernelize(norm, mode=Mode.TRAINING, device="cpu")
assert norm.forward.__func__ is kernel.layers.LayerNorm.forward, norm.forward
torch.testing.assert_close(norm(x), before)
print("loaded", kernel.__name__)
"""


@pytest.mark.install
def test_the_package_kernels_loads_it(folder, tmp_path):
    """make test-hub: in Triton's interpreter, without the package gpt2_fast."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", LOAD, str(folder)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=250)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"loaded _gpt2_fast_cpu_[0-9a-f]{12}", done.stdout.strip())
