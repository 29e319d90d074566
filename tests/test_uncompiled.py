"""gpt2_fast/uncompiled.py does what torch's own names do, and a command that compiles nothing imports no compiler."""

from __future__ import annotations

import subprocess
import sys

import torch

from gpt2_fast import uncompiled

COMMANDS = """
import sys
from gpt2_fast.cli import main
sizes = "--n-layer 1 --n-head 1 --n-embd 16 --context 8 --batch-size 2 --grad-accum 2 --steps 2 --save-every 1"
options = f"{sizes} --eval-every 1 --data text.txt --out out --device cpu".split()
assert main(["train", *options]) == 0
assert main(["generate", "--model", "out/checkpoint", "--max-new-tokens", "2"]) == 0
print(*sorted({name.split(".")[0] for name in sys.modules} & {"sympy", "pandas", "transformers", "triton"}))
print("torch._dynamo" in sys.modules)
"""


def test_a_constant_is_marked_as_torch_marks_it():
    assert (
        uncompiled.assume_constant_result(lambda: 1).__dict__
        == torch.compiler.assume_constant_result(lambda: 1).__dict__
    )


def test_the_optimizer_is_torchs_without_its_decorator():
    decorator = torch._disable_dynamo(lambda: None).__code__
    names = {name for name, f in vars(torch.optim.Optimizer).items() if getattr(f, "__code__", None) is decorator}
    own = {name for name, f in vars(uncompiled.Optimizer).items() if callable(f)}
    assert own == names
    for name in names:
        assert getattr(uncompiled.Optimizer, name) is getattr(torch.optim.Optimizer, name).__wrapped__


def test_commands_import_no_compiler(tmp_path):
    (tmp_path / "text.txt").write_text("What is not compiled starts sooner.\n" * 40)
    done = subprocess.run([sys.executable, "-c", COMMANDS], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == ["", "False"]
