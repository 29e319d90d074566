"""buffers: large blocks of one region, which come back when their last tensor is gone."""

from __future__ import annotations

import functools
import gc
import random
import threading

import pytest
import torch

from gpt2_fast.ops.linear import linear
from gpt2_fast.ops.runtime import buffers, memory
from gpt2_fast.ops.runtime.buffers import PAGE, Region

F32 = torch.float32


def _free(region: Region) -> list[tuple[int, int]]:
    gc.collect()
    region.collect()
    return region.holes


def test_a_block_is_used_again_by_its_size():
    region = Region(64 * PAGE)
    first, second = (region.take((4, PAGE // 4), F32) for _ in range(2))
    address = first.data_ptr()
    del first
    assert region.take((PAGE, 4), torch.uint8).data_ptr() == address
    assert second.shape == (4, PAGE // 4)


def test_holes_beside_each_other_are_one():
    region = Region(16 * PAGE)
    blocks = [region.take((4 * PAGE,), torch.uint8) for _ in range(4)]
    assert region.take((1,), torch.uint8) is None
    for i in (0, 2, 1):
        blocks[i] = None
    assert _free(region) == [(0, 12 * PAGE)]
    whole = region.take((12 * PAGE,), torch.uint8)
    assert whole.numel() == 12 * PAGE
    del whole, blocks
    assert _free(region) == [(0, 16 * PAGE)]


def test_smallest_hole_first():
    region = Region(16 * PAGE)
    blocks = [region.take((n * PAGE,), torch.uint8) for n in (4, 1, 2, 1)]
    start = blocks[0].data_ptr()
    blocks[0] = blocks[2] = None
    assert region.take((2 * PAGE,), torch.uint8).data_ptr() == start + 5 * PAGE


def test_no_two_tensors_overlap():
    """Random sizes and lives: each tensor still holds what was written into it, whatever came and went."""
    region, live, draw = Region(300 * PAGE), [], random.Random(0)
    for i in range(2000):
        if live and draw.random() < 0.5:
            value, tensor = live.pop(draw.randrange(len(live)))
            assert bool((tensor == value).all())
        tensor = region.take((draw.randrange(1, 12 * PAGE),), torch.uint8)
        if tensor is not None:
            live.append((i % 251, tensor.fill_(i % 251)))
    del live, tensor
    assert _free(region) == [(0, 300 * PAGE)]


def test_views_and_graphs_keep_a_block():
    region = Region(16 * PAGE)
    block = region.take((4 * PAGE,), torch.uint8)
    part = block[5:9]
    del block
    assert _free(region) != [(0, 16 * PAGE)]
    del part
    assert _free(region) == [(0, 16 * PAGE)]


@pytest.fixture
def retained(monkeypatch):
    monkeypatch.setattr(memory, "retained", True)
    monkeypatch.setattr(buffers, "_region", functools.cache(lambda: Region(64 << 20)))


def test_results_are_ordinary_tensors(retained):
    """No views, saved for backward, made under inference_mode and then used in training."""
    x, weight = torch.randn(600, 512), torch.randn(512, 600, requires_grad=True)
    assert not buffers.empty(x, (600, 600), F32)._is_view()
    (linear(x, weight, impl="cpp") * 2.0).square().sum().backward()
    eager = weight.detach().clone().requires_grad_()
    (x @ eager * 2.0).square().sum().backward()
    torch.testing.assert_close(weight.grad, eager.grad, rtol=1e-4, atol=1e-2)
    with torch.inference_mode():
        z = linear(x, weight, impl="cpp")
    (z * weight.sum()).sum().backward()


def test_only_large_blocks_of_a_retaining_process(retained, monkeypatch):
    like = torch.empty(0)
    assert buffers.empty(like, (1 << 18,), F32).isnan().all()  # poisoned, as torch.empty is in these tests
    assert buffers._region().holes[0] != (0, 64 << 20)
    buffers.empty(like, (1 << 17,), F32)
    assert _free(buffers._region()) == [(0, 64 << 20)]
    monkeypatch.setattr(memory, "retained", False)
    kept = buffers.empty(like, (1 << 20,), F32)
    assert _free(buffers._region()) == [(0, 64 << 20)]
    assert kept.shape == (1 << 20,)


def test_full_region_leaves_it_to_malloc(retained):
    kept = [buffers.empty(torch.empty(0), (1 << 22,), F32) for _ in range(5)]
    assert len({t.data_ptr() for t in kept}) == 5


def test_what_interrupts_take_in_its_own_thread(monkeypatch):
    """A signal handler or a finaliser there takes nothing of the region, waits for no lock, and may fork."""
    region, inside = Region(16 * PAGE), []
    carve = region._carve

    def interrupted(nbytes: int) -> tuple[int, int] | None:
        inside.append(region.take((PAGE,), torch.uint8))
        with region.lock:  # as around a fork
            return carve(nbytes)

    monkeypatch.setattr(region, "_carve", interrupted)
    thread = threading.Thread(target=lambda: inside.append(region.take((PAGE,), torch.uint8)), daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert inside[0] is None
    assert inside[1].shape == (PAGE,)


def test_a_child_leaves_a_region_that_another_thread_may_be_changing(retained):
    """One that was made after the forking thread had looked for it, so that its lock was not taken."""
    region, kept = buffers._region(), buffers.empty(torch.empty(0), (1 << 20,), F32)
    buffers._forked(child=False)
    assert buffers._region() is region
    buffers._forked(child=True)
    assert buffers._region() is not region
    kept.fill_(1)  # its memory stays
