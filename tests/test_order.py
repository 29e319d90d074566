"""The order of an epoch: every window once, another order each epoch, the same wherever a run is taken up."""

import itertools
import json
import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from test_data import counting
from test_run import tiny, tiny_options  # noqa: F401
from test_train import corpus, metrics  # noqa: F401

from gpt2_fast.data import TokenDataset, load_data, order
from gpt2_fast.train import config, resume_run, start_run
from gpt2_fast.train.config import TrainConfig

SIZES = [1, 2, 3, 4, 5, 7, 15, 16, 17, 1000, *(2**k + d for k in (6, 7, 12, 13) for d in (-1, 0, 1))]


@pytest.mark.parametrize("size", SIZES)
def test_a_shuffle_is_a_bijection(size):
    for seed, epoch in ((0, 0), (1, 0), (0, 1), (-5, 3), (2**64 - 1, 10**6)):
        found = order.shuffled(np.arange(size), size, seed, epoch)
        assert found.dtype == np.int64
        assert sorted(found.tolist()) == list(range(size))


def by_hand(index, size, keys):
    """The network in whole numbers, as data/order.py describes it."""

    def philox2x32(left, right, key):
        for i in range(7):
            product = 0xD256D193 * left
            left, right = (product >> 32) ^ right ^ ((key + 0x9E3779B9 * i) % 2**32), product % 2**32
        return left

    bits = max((size - 1).bit_length(), 4)
    low = bits - bits // 2
    while True:
        left, right = index >> low, index % 2**low
        for i in range(0, 8, 2):
            left ^= philox2x32(right, i, keys[i]) % 2 ** (bits - low)
            right ^= philox2x32(left, i + 1, keys[i + 1]) % 2**low
        index = (left << low) + right
        if index < size:
            return index


def test_a_shuffle_is_fixed_for_good():
    """A run that is resumed on another NumPy, or another version of this package, goes on in the same epoch."""
    assert order.shuffled(np.arange(10), 10, 1337, 2).tolist() == [2, 6, 5, 9, 3, 4, 1, 8, 0, 7]
    # Below 16 windows the network is wider than they need.
    for size, seed, epoch in ((3, 5, 1), (7, 0, 4), (10, 1337, 2), (1000, 0, 0), (10**10, -1, 7), (2**62, 3, 1)):
        key, counter = (np.array(words, np.uint64) for words in ([seed % 2**64, epoch], [0, 0, 0, 2**64 - 1]))
        stream = np.random.Philox(key=key, counter=counter)
        keys = [int(word) >> 32 for word in stream.random_raw(8)]
        index = np.arange(size) if size < 16 else np.array([0, 1, 5, size - 1])
        assert order.shuffled(index, size, seed, epoch).tolist() == [by_hand(int(i), size, keys) for i in index]


def test_epochs_and_seeds_differ():
    shuffles = {(s, e): order.shuffled(np.arange(1000), 1000, s, e) for s in range(4) for e in range(4)}
    for a, b in itertools.combinations(shuffles, 2):
        # Two orders that know nothing of each other have one place in common, on average; more than 8 is 1 in 10^6.
        assert (shuffles[a] == shuffles[b]).sum() <= 8, (a, b)


@pytest.mark.parametrize("size", [2, 3, 4, 6, 7, 10, 16, 33])
def test_every_place_is_as_likely(size):
    """Chi-square of where each index lands, and of what follows what, over 1000 epochs."""
    epochs, found = 1000, []
    for epoch in range(epochs):
        found.append(order.shuffled(np.arange(size), size, 11, epoch))
    found = np.array(found)
    for place in (0, size // 2, size - 1):
        counts, expected = np.bincount(found[:, place], minlength=size), epochs / size
        # Its mean is size - 1 and its variance 2 (size - 1): 6 standard deviations and a bit for the tail.
        assert ((counts - expected) ** 2 / expected).sum() < (size - 1) + 6 * np.sqrt(2 * (size - 1)) + 8
    if size > 2:
        follows = np.bincount((found[:, 1] - found[:, 0]) % size, minlength=size)[1:]
        expected = epochs / (size - 1)
        assert ((follows - expected) ** 2 / expected).sum() < (size - 2) + 6 * np.sqrt(2 * (size - 2)) + 8


def test_every_order_of_three_comes():
    orders = [tuple(order.shuffled(np.arange(3), 3, 5, epoch).tolist()) for epoch in range(600)]
    counts = [orders.count(p) for p in itertools.permutations(range(3))]
    assert sum((count - 100) ** 2 / 100 for count in counts) < 5 + 6 * np.sqrt(10) + 8


def test_a_shuffle_of_ten_billion_keeps_no_list():
    size, index = 10**10, np.array([0, 1, 2, 12345, 10**10 - 1])
    tracemalloc.start()
    found = order.shuffled(index, size, 3, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert len(set(found.tolist())) == 5
    assert found.min() >= 0
    assert found.max() < size
    many = order.shuffled(np.arange(200_000), size, 3, 0)
    assert len(np.unique(many)) == len(many)
    assert abs(many.mean() / size - 0.5) < 6 / np.sqrt(12 * len(many))  # of a uniform number, 6 standard deviations
    assert abs(np.corrcoef(many[1:], many[:-1])[0, 1]) < 6 / np.sqrt(len(many))


def test_what_has_no_order_is_refused():
    for size, index in ((0, []), (2**62 + 1, [0]), (5, [5]), (5, [-1])):
        with pytest.raises(ValueError, match="order|outside"):
            order.shuffled(np.array(index, dtype=np.int64), size, 0, 0)


def taken(data, steps, **cut):
    """The starts of the windows of some steps, step by step, as `grad_accum` micro-batches give them."""
    return [
        [int(row[0]) for m in range(cut["grad_accum"]) for row in data.batch(s, m, order="epoch", **cut)[0]]
        for s in steps
    ]


SHARDED = ((1000, 0), (3, 2000), (403, 3000), (99, 5000))  # lengths and first tokens; the second is too short


def sharded(context=4):
    return TokenDataset(
        [counting(n, f"{i}.bin", s) for i, (n, s) in enumerate(SHARDED)], context=context, vocab_size=50257
    )


def test_every_window_once_an_epoch():
    data = sharded()
    everyone = sorted(x for n, s in SHARDED if n > 4 for x in range(s, s + n - 4, 4))
    assert data.n_windows == len(everyone) == 249 + 100 + 24
    x, y = data.batch(7, 1, batch_size=3, seed=2, order="epoch", grad_accum=2)
    assert torch.equal(y, x + 1)  # labels are the next tokens, and no window crosses shards
    assert x.shape == (3, 4)
    windows = [w for step in taken(data, range(373), batch_size=3, seed=2, grad_accum=2) for w in step]
    epochs = [windows[i : i + 373] for i in range(0, 6 * 373, 373)]
    assert all(sorted(epoch) == everyone for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 6


def test_a_step_does_not_depend_on_who_takes_it_or_when():
    data, steps = sharded(), range(200)
    whole = taken(data, steps, batch_size=12, seed=9, grad_accum=1)
    for batch_size, grad_accum in ((6, 2), (3, 4), (1, 12)):
        assert taken(data, steps, batch_size=batch_size, seed=9, grad_accum=grad_accum) == whole
    for first in (1, 31, 32, 199):  # 31.08 steps are an epoch
        assert taken(data, range(first, 200), batch_size=12, seed=9, grad_accum=1) == whole[first:]
    assert taken(data, steps, batch_size=12, seed=10, grad_accum=1) != whole


def test_data_smaller_than_a_batch():
    data = TokenDataset([counting(13)], context=4, vocab_size=50257)
    (step,) = taken(data, [5], batch_size=9, seed=0, grad_accum=1)
    assert sorted(step) == sorted([0, 4, 8] * 3)
    assert all(sorted(step[i : i + 3]) == [0, 4, 8] for i in (0, 3, 6))


@pytest.mark.parametrize("kind", ["text", "jsonl", "folder", "nanogpt", "llmc"])
def test_every_kind_of_data_has_epochs(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_FAST_CACHE", str(tmp_path / "cache"))
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "looked"]
    texts = [" ".join(words[(7 * i + j * j) % 8] for j in range(60)) for i in range(30)]
    folder = tmp_path / "data"
    folder.mkdir()
    if kind == "jsonl":
        (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    elif kind in ("nanogpt", "llmc"):
        for i in range(3):
            head = np.zeros(256, "<i4")
            head[:3] = 20240520, 1, 500
            body = np.random.default_rng(i).integers(0, 50257, 500).astype("<u2").tobytes()
            (folder / f"train_{i}.bin").write_bytes(body if kind == "nanogpt" else head.tobytes() + body)
    else:
        for i, text in enumerate(texts):
            (folder / f"{i}.txt").write_text(text)
    source = {"text": folder / "0.txt", "jsonl": folder / "a.jsonl"}.get(kind, folder)
    train, _ = load_data(source, context=8, progress=False)
    everyone = sorted(tuple(row.tolist()) for x, _ in train.windows(batch_size=64) for row in x)
    found = [train.batch(step, order="epoch", batch_size=1)[0][0].tolist() for step in range(train.n_windows)]
    assert sorted(map(tuple, found)) == everyone
    assert list(map(tuple, found)) != everyone or len(everyone) < 4


def test_another_order_is_refused():
    with pytest.raises(ValueError, match="order is 'sequential'; choose random or epoch"):
        sharded().batch(0, batch_size=1, order="sequential")
    with pytest.raises(ValueError, match="--order is 'sequential'; choose random or epoch"):
        TrainConfig(order="sequential")
    assert config.ORDERS == order.ORDERS


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_by_epochs_resumes_to_the_bit(corpus, tmp_path, capsys, tiny):  # noqa: F811
    whole, half = tmp_path / "whole", tmp_path / "half"
    start_run(tiny_options(tiny, corpus, whole, order="epoch")).train()
    start_run(tiny_options(tiny, corpus, half, order="epoch", save_every=3, keep=9)).train()
    shutil.rmtree(half / "checkpoint-000006")
    resume_run(str(half / "checkpoint-000003"), {}).train()
    assert metrics(half, "loss") == metrics(whole, "loss")
    assert "another order" not in capsys.readouterr().out
    start_run(tiny_options(tiny, corpus, tmp_path / "random", steps=1)).train()
    assert metrics(tmp_path / "random", "loss")[0] != metrics(whole, "loss")[0]


@pytest.mark.usefixtures("blank_pictures")
def test_a_run_that_leaves_its_epoch_says_so(corpus, tmp_path, capsys, tiny):  # noqa: F811
    out = tmp_path / "run"
    start_run(tiny_options(tiny, corpus, out, order="epoch", steps=1, grad_accum=2)).train()
    for changes, said in (
        ({}, False),
        ({"batch_size": 4, "grad_accum": 1}, False),  # the same sequences, cut into other micro-batches
        ({"batch_size": 3}, True),
        ({"seed": 1}, True),
        ({"context": 8}, True),
        ({"order": "random"}, True),
    ):
        capsys.readouterr()
        resume_run(str(out), {"steps": 2, **changes}).home.lock.release()
        assert ("goes on with another order of its data" in capsys.readouterr().out) == said, changes
