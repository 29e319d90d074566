"""The golden files hold: see tests/golden/__init__.py for what they protect and how they are remade."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
from golden import losses, names, options


@pytest.fixture(scope="module")
def runs():
    """With two threads, where the file was made with one."""
    return losses.run(threads=2)


@pytest.mark.parametrize("isa", losses.ISAS)
def test_losses_and_weights(runs, isa):
    golden, wrong = losses.read(), []
    mine = [name for name in runs if name.endswith("/" + isa)]
    if not mine:
        pytest.skip(f"not compared with {losses.FILE.name}: this processor or build has no {isa}")
    for name in mine:
        problem, inexact = losses.compare(name, runs[name], golden)
        if inexact:
            warnings.warn(f"golden run {name}: compared within a tolerance, not to the bit: {inexact}", stacklevel=1)
        if problem:
            wrong.append(f"{name}: {problem}")
    assert not wrong, (
        "training gives other numbers than before:\n  " + "\n  ".join(wrong) + f"\n`{losses.COMMAND}` remakes "
        f"tests/golden/{losses.FILE.name}; the commit that changes it says why the numbers change"
    )


def _moved(run: dict, key: str, step: int, change) -> dict:
    run = copy.deepcopy(run)
    run[key][step] = change(float.fromhex(run[key][step])).hex()
    return run


@pytest.mark.parametrize("key", ["losses", "grad_norms"])
def test_one_bit_is_seen(key):
    golden = losses.read()
    for name, run in golden.items():
        assert losses.compare(name, run, golden) == (None, None)
        problem, _ = losses.compare(name, _moved(run, key, 7, lambda x: math.nextafter(x, 9.0)), golden)
        assert f"{key}[7]" in problem
        problem, _ = losses.compare(name, run | {"exp_avg": "another"}, golden)
        assert problem == "exp_avg differ"


def test_what_another_environment_gives_is_compared_within_a_tolerance():
    golden = losses.read()
    for name, run in golden.items():
        tolerance = losses.TOLERANCE[name.split("/")[1].split()[0]]["losses"]
        other = run | {"compiler": "99", "weights": "another"}
        for relative, accepted in ((0.5 * tolerance, True), (2 * tolerance, False), (math.nan, False)):
            moved = _moved(other, "losses", 3, lambda x, relative=relative: x * (1 + relative))
            problem, inexact = losses.compare(name, moved, golden)
            assert (problem is None) == accepted
            assert inexact == f"compiler 99, in the file {run['compiler']}"


def test_an_instruction_set_without_an_entry_is_compared_with_the_widest_that_has_one():
    golden = {name: run for name, run in losses.read().items() if not name.endswith(("/avx512bf16", "/amx"))}
    run = golden["tied/bfloat16 widened/avx2"]
    problem, inexact = losses.compare("tied/bfloat16 native/avx512bf16", run, golden)
    assert problem is None
    assert "has no entry" in inexact
    assert losses.nearest("tied/float32/avx512bf16", golden) in ("tied/float32/avx2", "tied/float32/avx512")


@pytest.mark.parametrize("name", names.read())
def test_public_name(name):
    names.resolve(name)


def test_what_is_documented_is_frozen():
    new = names.documented() - set(names.read())
    assert not new, f"`{names.COMMAND}` adds to tests/golden/{names.FILE.name}: {', '.join(sorted(new))}"


@pytest.mark.parametrize("name", ["gpt2_fast.nothing", "gpt2_fast.ops.linear.nothing", "gpt2_fast.nothing.at_all"])
def test_a_name_that_is_gone_is_seen(name):
    with pytest.raises((ImportError, AttributeError), match="nothing"):
        names.resolve(name)


def test_options_of_every_command():
    found, frozen = options.options(), options.read()
    changed = [
        f"{name}: {found.get(name, 'gone')}, in the file {frozen.get(name, 'not there')}"
        for name in dict.fromkeys([*frozen, *found])
        if found.get(name) != frozen.get(name)
    ]
    assert not changed, (
        "the command line is another one:\n  " + "\n  ".join(changed) + f"\n`{options.COMMAND}` remakes "
        f"tests/golden/{options.FILE.name}; the commit that changes it says why"
    )
