"""The number of processes changes no bit, and however one of them ends, all of them do."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import re
import signal
import subprocess
import sys
import time
import types

import parallel
import pytest
import torch
from numerics import assert_same_bits

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.checkpoint.run_folder import load_checkpoint
from gpt2_fast.cli import main
from gpt2_fast.ops import adamw_squares as room
from gpt2_fast.ops.runtime.dispatch import unavailable
from gpt2_fast.ops.runtime.philox import micro_batch_keys
from gpt2_fast.parallel import Group, Layout, group, tree
from gpt2_fast.parallel.group import Lost, check_world

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked and found by /proc")
STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and a checkpoint of which a step takes no time."""
    folder = tmp_path_factory.mktemp("parallel")
    (folder / "corpus.txt").write_text(parallel.TEXT)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32)).save_pretrained(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def launch(place, forks):
    """(world, *options of train, **what happens) -> the answer of `parallel.serve`."""

    def ask(world, *arguments, **happens):
        return forks(world, "training_ranks", "train", *arguments, cwd=place, **happens)

    return ask


def options(place, out, **more):
    given = {
        "init_from": place / "tiny", "dropout": 0.1, "data": place / "corpus.txt", "context": 16, "batch_size": 2,
        "grad_accum": 8, "steps": STEPS, "warmup": 2, "eval_every": 3, "eval_batches": 3, "save_every": 2, "out": out,
        **more,
    }  # fmt: skip
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", value)]


@pytest.fixture(scope="module")
def alone(place, launch):
    """dtype -> the digests of an uninterrupted run of one process."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        out = place / f"alone-{dtype}"
        assert launch(1, *options(place, out, dtype=dtype))["codes"] == [0]
        found[dtype] = parallel.digests(out)
    return found


def one_line(answer):
    """The only line that all processes have printed to stderr, beside the progress bar's."""
    lines = [line for text in answer["stderr"] for line in text.splitlines() if line.startswith("gpt2-fast:")]
    assert len(lines) == 1, answer["stderr"]
    assert not any("Traceback" in text for text in answer["stderr"]), answer["stderr"]
    return lines[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("world", [2, 4])
def test_the_number_of_processes_changes_no_bit(place, launch, alone, world, dtype):
    out = place / f"of-{world}-{dtype}"
    answer = launch(world, *options(place, out, dtype=dtype))
    assert answer["codes"] == [0] * world, answer["stderr"]
    assert parallel.digests(out) == alone[dtype]
    assert "validation loss before" in answer["stdout"][0]
    assert not any(answer["stdout"][1:] + answer["stderr"][1:])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_another_number_at_each_resume(place, launch, alone, dtype):
    """A signal to any one process ends all of them behind the same step, which is saved."""
    out, arguments = place / f"changing-{dtype}", options(place, place / f"changing-{dtype}", dtype=dtype)
    for step, (world, rank) in enumerate([(1, 0), (4, 3), (2, 0)], start=1):
        answer = launch(world, *arguments, do="SIGTERM", rank=rank, step=step)
        assert answer["codes"] == [130] * world, answer["stderr"]
        assert f"SIGTERM: stopped at step {step + 1} of {STEPS}" in answer["stdout"][0]
        arguments = ["--resume", out]
    assert launch(1, *arguments)["codes"] == [0]
    assert parallel.digests(out) == alone[dtype]


def test_a_killed_process_takes_all_with_it_and_the_run_goes_on(place, launch, alone):
    generator = random.Random(os.urandom(8))
    world, rank, step = 4, generator.randrange(4), generator.randrange(1, STEPS)
    out = place / "killed"
    answer = launch(world, *options(place, out), do="SIGKILL", rank=rank, step=step)
    assert answer["codes"].count(-signal.SIGKILL) == 1
    assert answer["codes"].count(2) == world - 1, answer
    assert answer["seconds"] < 10
    assert "lost another process" in one_line(answer)
    assert launch(2, "--resume", out)["codes"] == [0, 0]
    assert parallel.digests(out) == alone["float32"], (rank, step)


def threads_of(out):
    """As a run's checkpoint has it; a vendor's sums depend on it."""
    return load_checkpoint(out)[0].extra["environment"].get("number of threads", "1")


def test_torchrun_starts_a_killed_run_again(place, alone):
    """torchrun says OMP_NUM_THREADS=1 to several processes, as long as nobody has said another number."""
    out = place / "restarted"
    environment = parallel.environment(place / "cache")
    del environment["OMP_NUM_THREADS"]
    arguments = options(place, out, steps=STEPS)
    process = subprocess.Popen(
        parallel.command(2, "train", "--resume", "auto", *arguments, max_restarts=1), cwd=place,
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        parallel.wait_for_step(out, 2, process)
        os.kill(random.choice(parallel.ranks(process.pid, 2)), signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
    finally:
        for pid in [*parallel.ranks(process.pid, 0), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert parallel.digests(out) == alone["float32"]
    assert threads_of(out) == "1"


def test_without_torchrun_its_processes_end(place):
    """They would go on alone, and keep the folder from the run that is started in their place."""
    out = place / "orphaned"
    process = subprocess.Popen(
        parallel.command(2, "train", *options(place, out, steps=100_000, save_every=0)), cwd=place,
        env=parallel.environment(place / "cache"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = parallel.ranks(process.pid, 2)
    try:
        parallel.wait_for_step(out, 2, process)
        process.kill()
        _, errors = process.communicate(timeout=60)  # which the last of them closes
    finally:
        for pid in [*pids, process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert "torchrun has ended" in errors


@pytest.mark.parametrize(
    ("kept", "error", "said"),
    [
        ("True", "Connection reset by peer", "rank 1: torchrun has ended"),
        ("False", "Connection reset by peer", "rank 1 lost another process"),
        ("True", "wait timeout after 100ms: timed out", "rank 1 waited 3 minutes"),
    ],
)
def test_an_error_of_the_store_says_who_kept_it(monkeypatch, kept, error, said):
    def fail(*_):
        raise RuntimeError(error)

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    for rank in (0, 1):
        group = Group(rank, 2, rank, 2)
        group._minutes, group._store = 3.0, types.SimpleNamespace(check=fail, get=fail, set=fail)
        for call in (group.decide, group.in_turn):
            with pytest.raises(Lost, match=said.replace("rank 1", f"rank {rank}")):
                call(lambda: 0)


def test_an_error_of_one_process_is_one_line_and_ends_all(place, launch):
    answer = launch(4, *options(place, place / "error"), do="error", rank=1, step=2)
    assert answer["codes"] == [2] * 4
    assert one_line(answer) == "gpt2-fast: the disk of rank 1 is on fire"
    assert answer["seconds"] < 10


@pytest.mark.parametrize(("do", "rank"), [("hang", 1), ("hang writing", 0)])
def test_a_process_that_hangs_ends_by_the_limit(place, launch, do, rank):
    """Also the first one, in a disk that does not answer, when the others ask it at a validation."""
    begun = time.monotonic()
    answer = launch(2, *options(place, place / do, timeout_minutes=0.1), do=do, rank=rank, step=1)
    assert answer["codes"] == [None if r == rank else 2 for r in range(2)], answer["stderr"]
    assert f"rank {1 - rank} waited 0.1 minutes for another process" in one_line(answer)
    assert time.monotonic() - begun < 25


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        (4, {"grad_accum": 6}, "4 processes cannot share --grad-accum 6"),
        (3, {"grad_accum": 6}, "can be 1 or 2"),
        (2, {"grad_accum": 1}, "can be 1"),
        (2, {"init_from": "/nowhere"}, "/nowhere"),
        (2, {"dtype": "float8"}, "choose float32, bfloat16, float16"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(place, launch, world, more, message):
    out = place / "refused"
    answer = launch(world, *options(place, out, **more))
    assert answer["codes"] == [2] * world
    assert message in one_line(answer)
    assert not out.exists()


def test_a_second_run_is_refused_in_one_line(place, launch, alone):
    answer = launch(2, *options(place, place / "alone-float32"))
    assert answer["codes"] == [2, 2]
    assert "holds a run already; continue it with --resume" in one_line(answer)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'; it is a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "WORLD_SIZE is 2 and MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be_is_one_line(monkeypatch, given, message):
    monkeypatch.setattr(group, "_current", None)
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=re.escape(message)):
        group.join(0.1)


@pytest.mark.parametrize("given", [{"RANK": "3"}, {"RANK": "x"}, {"RANK": "2", "WORLD_SIZE": "2"}], ids=str)
def test_a_process_without_a_place_says_what_is_wrong(monkeypatch, capsys, given):
    """The others of several leave that to the first; such a one would be silent."""
    monkeypatch.setattr(group, "_current", None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--steps", "1", "--grad-accum", "2"]) == 2
    assert f"RANK is {given['RANK']!r}; it is a number from 0" in capsys.readouterr().err


def test_dry_run_is_of_one_process(place, launch):
    answer = launch(2, "--dry-run", *options(place, place / "dry"))
    assert answer["codes"] == [2, 2]


def test_a_step_is_verified_by_all_processes(place, launch, alone):
    out = place / "verified"
    answer = launch(2, *options(place, out, verify_every=2))
    assert answer["codes"] == [0, 0], answer["stderr"]
    assert parallel.digests(out) == alone["float32"]


def _node(leaves):
    """The tree as its definition says it."""
    if len(leaves) == 1:
        return leaves[0]
    left = tree.split(len(leaves))
    return f"({_node(leaves[:left])}+{_node(leaves[left:])})"


@pytest.mark.parametrize("n", range(1, 41))
def test_the_tree(n):
    """A stack, and blocks of W processes, add in the order that the definition says."""
    world = 1
    while n % world == 0:
        blocks = []
        for block in range(world):
            stack, highest = [], 0
            for i in range(n // world):
                done = tree.merges(i, n // world)
                highest = max(highest, len(stack) + (not done))  # a leaf that is added at once has no buffer
                stack.append(str(block * n // world + i))
                for _ in range(done):
                    right = stack.pop()
                    stack[-1] = f"({stack[-1]}+{right})"
            assert len(stack) == 1
            assert highest <= tree.depth(n // world)
            blocks += stack
        while len(blocks) > 1:
            blocks = [f"({a}+{b})" for a, b in zip(blocks[::2], blocks[1::2], strict=True)]
        assert blocks[0] == _node([str(i) for i in range(n)])
        world *= 2


@pytest.mark.parametrize("n", [1, 2, 3, 6, 8, 12, 20])
def test_total_adds_in_the_trees_order(n):
    values = torch.randn(n, 3, generator=torch.Generator().manual_seed(n))
    names = {str(i): values[i].clone() for i in range(n)}
    expected = eval(_node([f"v['{i}']" for i in range(n)]), {"v": names})
    assert torch.equal(tree.total(values.clone()), expected)


def test_keys_depend_on_seed_step_and_micro_batch():
    whole = micro_batch_keys(1337, 5, range(8))
    assert torch.equal(whole[2:5], micro_batch_keys(1337, 5, range(2, 5)))
    seen = {k for seed in (0, 1, -1, 2**64 - 2) for step in (0, 1, 2**32) for k in
            micro_batch_keys(seed, step, range(64)).tolist()}  # fmt: skip
    assert len(seen) == 4 * 3 * 64
    assert whole.dtype == torch.int64
    assert whole[0].item() == -1 or whole.abs().min() > 2**32


def test_a_key_is_all_that_dropout_depends_on():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_head=2, n_layer=2, n_positions=32, vocab_size=50, attn_pdrop=0.1))
    ids, keys = torch.randint(50, (2, 16)), micro_batch_keys(0, 0, range(2))
    losses = []
    for seed, key in ((0, keys[:1]), (1, keys[:1]), (0, keys[1:])):
        torch.manual_seed(seed)
        losses.append(model.train()(ids, labels=ids, dropout_key=key).loss)
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])
    with pytest.raises(ValueError, match="dropout's key is torch.int64"):
        model(ids, labels=ids, dropout_key=keys)


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])
def test_a_chunks_squares_are_the_same_wherever_it_lies(impl):
    if reason := unavailable(impl, "cpu", torch.float32):
        pytest.skip(reason)
    flat = torch.randn(5 * room.CHUNK, generator=torch.Generator().manual_seed(0))
    found = room.chunk_squares(flat, impl)
    torch.testing.assert_close(found, flat.view(5, -1).double().square().sum(1), rtol=1e-6, atol=0)
    assert torch.equal(room.chunk_squares(flat[2 * room.CHUNK :], impl), found[2:])
    assert torch.equal(room.chunk_squares(flat[3 * room.CHUNK : 4 * room.CHUNK], impl), found[3:4])


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_shards_cut_every_parameter_once(world):
    numels = [3, 8192, 0, 100_000, 1]
    layout = Layout(numels, world)
    assert layout.shard % room.CHUNK == 0
    assert layout.offsets == Layout(numels, 1).offsets
    assert layout.chunks == Layout(numels, 1).chunks
    found = [[] for _ in numels]
    for rank in range(world):
        for piece in layout.pieces(rank * layout.shard, (rank + 1) * layout.shard):
            assert layout.offsets[piece.index] + piece.start == rank * layout.shard + piece.at
            found[piece.index] += range(piece.start, piece.stop)
    assert found == [list(range(n)) for n in numels]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_of_one_is_the_step_that_adds_up_by_itself(dtype):
    """Of one micro-batch: all but the order of the norm is the same."""
    results = []
    for shared in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(20, 33), torch.nn.Tanh(), torch.nn.Linear(33, 5))
        optimizer = AdamW(model.parameters(), lr=1e-2)
        if dtype != torch.float32:
            optimizer.cast(model, dtype)
        if shared:
            optimizer.shard(Group(), 1)
        for i in range(5):
            x = torch.randn(16, 20, generator=torch.Generator().manual_seed(i)).to(dtype)
            model(x).square().mean().backward()
            if shared:
                optimizer.accumulate()
            optimizer.step()
            optimizer.zero_grad()
        saved = optimizer.state_dict()["state"]
        results.append(
            [p.detach() for p in model.parameters()] + [t for s in saved.values() for _, t in sorted(s.items())]
        )
    assert_same_bits(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("world", [1, 2])
def test_a_shard_begins_from_weights_that_were_written(world, dtype, monkeypatch):
    """Each process from its part of the parameters, which are whole: as a step that nobody shares."""
    generator = torch.Generator().manual_seed(0)
    wide = [torch.randn(n, generator=generator) for n in (70, 3000, 6000)]
    written = [torch.randn(t.shape, generator=generator).add(8.0).to(dtype) for t in wide]
    gradient = [torch.randn(t.shape, generator=generator) for t in wide]
    monkeypatch.setattr(Group, "same", lambda *_: None)

    def begun():
        model = torch.nn.ParameterList(t.clone() for t in wide)
        optimizer = AdamW(model.parameters(), lr=1e-2)
        return model if dtype == torch.float32 else optimizer.cast(model, dtype), optimizer

    def write(model):
        for p, t in zip(model, written, strict=True):
            p.data[::2] = t[::2]

    alone = []
    for t, w in zip(wide, written, strict=True):
        alone.append(torch.nn.Parameter(t.clone()))
        alone[-1].data[::2] = w[::2].float()
        alone[-1].grad = gradient[len(alone) - 1]
    AdamW(alone, lr=1e-2).step()
    for rank in range(world):
        model, optimizer = begun()
        optimizer.shard(Group(rank, world), world)
        shards = optimizer._shards
        write(model)
        flat = torch.zeros(shards.layout.length)
        for offset, g in zip(shards.layout.offsets, gradient, strict=True):
            flat[offset : offset + len(g)] = g
        shards._gradient = flat.view(world, -1)[rank]
        optimizer.update()
        for index, start, stop, _ in shards._pieces:
            expected = alone[index].detach()[start:stop]
            assert_same_bits([optimizer.state[model[index]].get("master", expected)], [expected])
            assert_same_bits([model[index].detach()[start:stop]], [expected.to(dtype)])


def test_the_whole_state_is_not_that_of_the_next_step():
    """A checkpoint is written beside the steps, which go on counting."""

    class First(Group):
        """Rank 0 of two, whose other is silent."""

        def same(self, value, message):
            pass

        def send_first(self, flat, rank):
            yield 0, flat

    optimizer = AdamW(torch.nn.Linear(3, 3).parameters())
    optimizer.shard(First(0, 2), 2)
    saved = optimizer.state_dict()["state"]
    for state in optimizer.state.values():
        for t in state.values():
            t.add_(1.0)
    assert not any(t.any() for state in saved.values() for t in state.values())


def test_what_shard_refuses_keeps_its_state():
    params = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    optimizer = AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="parameters are bfloat16, float32"):
        optimizer.shard(Group(), 2)
    assert_same_bits(*([t for s in d["state"].values() for t in s.values()] for d in (before, optimizer.state_dict())))
    params[0].device_mesh = "as a DTensor has"
    with pytest.raises(ValueError, match="is a DTensor, sharded already"):
        optimizer.shard(Group(), 2)


def test_one_process_of_torchrun_has_the_threads_of_several(place, alone):
    """torchrun says OMP_NUM_THREADS=1 to several processes (a test above) and nothing to one."""
    out = place / "one"
    environment = parallel.environment(place / "cache")
    del environment["OMP_NUM_THREADS"]
    command = parallel.command(1, "train", *options(place, out))
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert parallel.digests(out) == alone["float32"]
    assert threads_of(out) == "1"


def test_what_a_shared_step_refuses():
    model = torch.nn.Linear(3, 3)
    optimizer = AdamW(model.parameters())
    for call in ("accumulate", "forget_accumulated", "reduce", "update", "gather", "receive_state"):
        with pytest.raises(ValueError, match=rf"^AdamW: {call}\(\) is for after shard\(\)"):
            getattr(optimizer, call)()
    optimizer.shard(Group(), 2)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.accumulate()
    with pytest.raises(ValueError, match="1 of 2 micro-batches are added up"):
        optimizer.step()
    with pytest.raises(ValueError, match="has no gradient"):
        optimizer.accumulate()
    model.weight.sum().backward()  # not of the bias
    with pytest.raises(ValueError, match="has no gradient"):
        optimizer.accumulate()
    assert model.weight.grad is not None
    optimizer.zero_grad()
    for refused in (lambda: optimizer.shard(Group(), 2), lambda: optimizer.cast(model, torch.bfloat16)):
        with pytest.raises(ValueError, match="shared out already"):
            refused()
    bias = model.bias.data
    model.bias.data = bias.clone()  # as model.to and load_state_dict(assign=True) do
    model(torch.ones(1, 3)).sum().backward()
    optimizer.accumulate()
    with pytest.raises(ValueError, match="moved, cast or assigned after shard"):
        optimizer.step()
    model.bias.data = bias
    model(torch.ones(1, 3)).sum().backward()
    with pytest.raises(ValueError, match="a gradient that is not added up"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    del optimizer.param_groups[0]["params"][1]
    with pytest.raises(ValueError, match="other parameters than at shard"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"copy state_dict\(\) instead"):
        copy.deepcopy(optimizer)
    whole = torch.ones(9)
    for tied in ([whole, whole], [whole[:5], whole[3:]]):
        with pytest.raises(ValueError, match="shares memory with another"):
            AdamW([{"params": [torch.nn.Parameter(t)]} for t in tied]).shard(Group(), 2)
    mixed = [torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="parameters are bfloat16, float32"):
        AdamW(mixed).shard(Group(), 2)
    with pytest.raises(ValueError, match="can be 1, 2, 4 or 8"):
        check_world(3, 24)
