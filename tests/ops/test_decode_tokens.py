"""decode_tokens: the bits of steps and draws in turn, where a run of tokens ends, and what is refused."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from numerics import assert_same_bits
from torch import Tensor

from gpt2_fast import GPT2Config, GPT2LMHeadModel
from gpt2_fast.generate.decoders import parameters_of
from gpt2_fast.ops.decode_tokens import cost, decode_tokens, samples
from gpt2_fast.ops.draw import Scratch, draw
from gpt2_fast.ops.packed_model import PackedCache, PackedModel

WEIGHTS = ["float32", "bfloat16", "int8", "int4"]
IMPLS = ["cpp", "reference"]
SMALL = {"n_layer": 1, "n_embd": 64, "n_head": 2, "vocab_size": 301}


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Where a test does not say so: models this small gain nothing from more."""
    threads(1)


def _packed(weights="float32", impl="cpp", edit=None, **sizes) -> PackedModel:
    """Weights large enough for the tokens to differ; `edit` changes the model before it is packed."""
    torch.manual_seed(3)
    model = GPT2LMHeadModel(GPT2Config(n_positions=64, initializer_range=0.2, **(sizes or SMALL)), impl="reference")
    if edit is not None:
        with torch.no_grad():
            edit(model)
    return PackedModel(parameters_of(model), weights, impl=impl)


class _Run(NamedTuple):
    tokens: Tensor
    highest: Tensor
    length: int
    out: Tensor
    cache: PackedCache


def _filled(packed: PackedModel, B: int, starts=None, prompt=None) -> tuple[Tensor, PackedCache]:
    """The newest token of each row, and a cache of what comes before them."""
    if prompt is None:
        prompt = torch.randint(packed.config.vocab_size, (B, 6), generator=torch.Generator().manual_seed(1))
    cache = PackedCache(packed, B, 64, starts)
    packed.prefill(prompt[:, :-1], cache)
    return prompt[:, -1], cache


def _in_turn(packed: PackedModel, token: Tensor, cache: PackedCache, count: int, uniforms=None, ends=(), **options):
    """The definition: a step, a draw, and so on."""
    found = []
    for i in range(count):
        out = packed.step(token, cache)
        token, high = draw(out, None if uniforms is None else uniforms[i], **options, impl=packed.impl)
        found.append((token, high))
        if not high.isfinite().all() or any(t in ends for t in token.tolist()):
            break
    return _Run(*map(torch.stack, zip(*found, strict=True)), cache.length, out, cache)


def _at_once(packed: PackedModel, token: Tensor, cache: PackedCache, count: int, **options) -> _Run:
    out = torch.full((cache.batch_size, packed.config.vocab_size), torch.nan)
    return _Run(*decode_tokens(packed, token, cache, count, out=out, **options), cache.length, out, cache)


def _assert_same(packed: PackedModel, actual: _Run, expected: _Run, what: str) -> None:
    """And that a further step goes on from the same keys and values."""
    assert actual.tokens.dtype == torch.int64
    assert torch.equal(actual.tokens, expected.tokens), what
    assert actual.length == expected.length, what
    assert_same_bits([actual.highest, actual.out], [expected.highest, expected.out], what)
    further = [packed.step(run.tokens[-1], run.cache) for run in (actual, expected)]
    assert_same_bits(further[:1], further[1:], f"{what}, a further step")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_instruction_set(decode_isa, weights):
    for sizes, prompt, starts, options in samples():
        if weights == "int4" and sizes["n_embd"] % 32:
            continue
        packed, B = _packed(weights, **sizes), len(prompt)
        for count in (1, 5):
            for given in ({}, {"uniforms": torch.rand(count, B, dtype=torch.float64), **options}):
                runs = (
                    run(packed, *_filled(packed, B, starts, prompt), count, **given) for run in (_at_once, _in_turn)
                )
                _assert_same(packed, *runs, f"{weights} {sizes} {given}")


@pytest.mark.parametrize("weights", WEIGHTS)
def test_the_reference_is_the_definition(weights):
    packed, uniforms = _packed(weights, impl="reference"), torch.rand(4, 3, dtype=torch.float64)
    for given in ({}, *({"uniforms": uniforms, **options} for *_, options in list(samples())[:3])):
        runs = (run(packed, *_filled(packed, 3), 4, **given) for run in (_at_once, _in_turn))
        _assert_same(packed, *runs, f"{weights} {given}")


def test_tokens_follow_one_another():
    """Otherwise the comparisons above would compare one token with itself."""
    packed = _packed()
    given = {"uniforms": torch.rand(6, 3, dtype=torch.float64), "temperature": 2.0}
    run = _at_once(packed, *_filled(packed, 3), 6, **given)
    assert run.tokens.shape == run.highest.shape == (6, 3)
    assert len(run.tokens.unique()) > 12
    assert len(_at_once(packed, *_filled(packed, 3), 6).tokens.unique()) > 6


def test_any_number_of_threads(threads):
    packed, uniforms, found = _packed(), torch.rand(5, 4, dtype=torch.float64), []
    for n in (1, 2, 5):
        threads(n)
        found.append(_at_once(packed, *_filled(packed, 4), 5, uniforms=uniforms, top_p=0.9))
    for run in found[1:]:
        _assert_same(packed, run, found[0]._replace(cache=_rest(packed, uniforms)), "threads")


def _rest(packed: PackedModel, uniforms: Tensor) -> PackedCache:
    """The cache after all of `uniforms`, anew: a further step changes the one it is given."""
    return _in_turn(packed, *_filled(packed, uniforms.shape[1]), len(uniforms), uniforms, top_p=0.9).cache


def test_memory_is_kept():
    packed, scratch = _packed(), Scratch()
    first = decode_tokens(packed, *_filled(packed, 2), 3, scratch=scratch)
    held = scratch.held
    assert held is not None
    again = decode_tokens(packed, *_filled(packed, 2), 3, scratch=scratch)
    assert scratch.held is held
    assert torch.equal(first[0], again[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("row", [0, 2])
def test_a_run_stops_after_an_end_in_any_row(impl, row):
    packed = _packed(impl=impl)
    given = {"uniforms": torch.rand(6, 3, dtype=torch.float64), "temperature": 2.0}
    free = _at_once(packed, *_filled(packed, 3), 6, **given)
    other = next(t for t in range(301) if t not in free.tokens)
    for at in (0, 3, 5):
        end = int(free.tokens[at, row])
        assert end not in free.tokens[:at]
        token, cache = _filled(packed, 3)
        tokens, highest = decode_tokens(packed, token, cache, 6, ends={other, end}, **given)
        assert torch.equal(tokens, free.tokens[: at + 1])
        assert torch.equal(highest, free.highest[: at + 1])
        assert cache.length == 5 + at + 1
        expected = _in_turn(packed, *_filled(packed, 3), 6, ends=(end,), **given)
        _assert_same(packed, _at_once(packed, *_filled(packed, 3), 6, ends=(end,), **given), expected, f"after {at}")
    for ends in ([other], [-1, 301, 10**9]):
        assert torch.equal(_at_once(packed, *_filled(packed, 3), 6, ends=ends, **given).tokens, free.tokens)


def _nan_in_a_position(model):
    model.transformer.wpe.weight[7] = torch.nan


def _infinite(sign):
    def edit(model):
        model.lm_head.weight[:, 0] = 10.0 * sign
        model.transformer.ln_f.bias[0] = 3e38

    return edit


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_run_stops_at_a_logit_that_is_nan(decode_isa, weights, drawn):
    """Position 7 alone is NaN, which a row comes to at the first token, at a later one or never, as `starts` has it."""
    _assert_stops_at_nan(_packed(weights, "cpp", _nan_in_a_position), drawn)


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
def test_the_reference_stops_at_a_logit_that_is_nan(drawn):
    _assert_stops_at_nan(_packed("float32", "reference", _nan_in_a_position), drawn)


def _assert_stops_at_nan(packed: PackedModel, drawn: bool) -> None:
    prompt = torch.arange(24).view(3, 8)
    given = {"uniforms": torch.rand(4, 3, dtype=torch.float64), "top_k": 9} if drawn else {}
    for starts, made, sick in [((0, 2, 5), 1, [0]), ((5, 2, 2), 3, [1, 2]), ((4, 4, 3), 4, [2]), ((5, 6, 6), 4, [])]:
        filled = _filled(packed, 3, torch.tensor(starts, dtype=torch.int32), prompt)
        tokens, highest = decode_tokens(packed, *filled, 4, **given)
        assert tokens.shape == highest.shape == (made, 3)
        assert filled[1].length == 7 + made
        assert highest[:-1].isfinite().all()
        assert [row for row in range(3) if highest[-1, row].isnan()] == sick
        assert ((tokens[:-1] >= 0) & (tokens[:-1] < 301)).all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "drawn"])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_run_stops_at_logits_that_are_infinite(impl, sign, drawn):
    packed = _packed("float32", impl, _infinite(sign), **SMALL, tie_word_embeddings=False)
    token, cache = _filled(packed, 2)
    uniforms = torch.rand(4, 2, dtype=torch.float64) if drawn else None
    tokens, highest = decode_tokens(packed, token, cache, 4, uniforms=uniforms)
    assert tokens.shape == (1, 2)
    assert highest.tolist() == [[sign * float("inf")] * 2]
    assert cache.length == 6


@pytest.mark.parametrize("impl", IMPLS)
def test_views_of_both_inputs(impl):
    packed, uniforms = _packed(impl=impl), torch.rand(5, 3, dtype=torch.float64)
    token, cache = _filled(packed, 3)
    expected = decode_tokens(packed, token.clone(), cache, 5, uniforms=uniforms)
    spread = torch.stack((token, 300 - token), 1)[:, 0]
    views = [
        uniforms.t().contiguous().t(),
        torch.stack((uniforms, 1 - uniforms), -1)[..., 0],
        torch._neg_view(-uniforms),
    ]
    assert spread.stride() == (2,)
    assert views[2].is_neg()
    for view in views:
        actual = decode_tokens(packed, spread, _filled(packed, 3)[1], 5, uniforms=view)
        assert_same_bits(actual, expected, "views")
    # A uniform number of all, which has no memory of its own for each.
    half = torch.full((1, 1), 0.5, dtype=torch.float64)
    runs = [
        decode_tokens(packed, token, _filled(packed, 3)[1], 5, uniforms=u)
        for u in (half.expand(5, 3), half + 0 * uniforms)
    ]
    assert_same_bits(*runs, "expanded")


@pytest.mark.parametrize("impl", IMPLS)
def test_what_the_caller_holds(impl):
    """tokens and uniforms are as they were; `out` is written to, and autograd knows."""
    packed, uniforms = _packed(impl=impl), torch.rand(3, 2, dtype=torch.float64)
    token, cache = _filled(packed, 2)
    held, before = torch.zeros(2, 301), [t.clone() for t in (token, uniforms)]
    weight = torch.ones(2, 301, requires_grad=True)
    kept = (weight * held).sum()
    tokens, _ = decode_tokens(packed, token, cache, 3, uniforms=uniforms, out=held)
    assert held.any()
    assert not tokens.requires_grad
    assert_same_bits([token, uniforms], before, "inputs")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": 0}, "count is 0; it must be a whole number, at least 1"),
        ({"count": -3}, "count is -3; it must be a whole number"),
        ({"count": 2.0}, "count is 2.0; it must be a whole number"),
        ({"count": None}, "count is None; it must be a whole number"),
        ({"ends": [1.5]}, "ends has 1.5; each must be a whole number"),
        ({"tokens": [1, 2]}, "tokens is a list; it must be a tensor"),
        ({"tokens": torch.zeros(2, 1, dtype=torch.int64)}, r"tokens is \(2, 1\); it must be one token a row, \[B\]"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens is torch.int64 \(3,\) on cpu; it must be .*2 rows"),
        ({"tokens": torch.zeros(2, dtype=torch.int32)}, r"tokens is torch.int32 \(2,\) on cpu; it must be int64"),
        ({"tokens": torch.zeros(2, dtype=torch.int64, device="meta")}, "tokens is .* on meta; it must be int64 on the"),
        ({"tokens": torch.tensor([4, 301])}, "token 301 is outside the vocabulary of 301"),
        ({"tokens": torch.tensor([-1, 4])}, "token -1 is outside the vocabulary of 301"),
        ({"count": 60}, "the cache is for 64 positions and 65 are needed; make it longer"),
        ({"uniforms": torch.zeros(2, 3, dtype=torch.float64)}, r"uniforms is .* \(2, 3\) .* float64 \[3, 2\] on cpu"),
        ({"uniforms": torch.zeros(2, dtype=torch.float64)}, r"uniforms is .* \(2,\) .* float64 \[3, 2\] on cpu"),
        ({"uniforms": torch.zeros(3, 2)}, r"uniforms is torch.float32 \(3, 2\) on cpu; it must be float64"),
        ({"uniforms": torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.5, 1.0]]).double()}, "uniforms is .*below 1"),
        ({"uniforms": torch.full((3, 2), -1e-9).double()}, "uniforms is .*each must be at least 0"),
        ({"uniforms": torch.full((3, 2), torch.nan).double()}, "uniforms is .*each must be at least 0"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"out": torch.zeros(2, 300)}, r"out is torch.float32 \(2, 300\) on cpu; it must be float32 \(2, 301\)"),
        ({"out": torch.zeros(1, 301)}, r"out is torch.float32 \(1, 301\) on cpu; it must be float32 \(2, 301\)"),
        ({"out": torch.zeros(2, 301, dtype=torch.float64)}, "out is torch.float64"),
        ({"out": torch.zeros(2, 301, requires_grad=True)}, "out is .* without a gradient"),
        ({"out": [0.5]}, "out is a list; it must be a tensor"),
        ({"out": torch.zeros(2, 301, device="meta")}, "out is .* on meta; it must be .* on the CPU"),
        ({"out": torch._neg_view(torch.zeros(2, 301))}, "out is .* no view that is negated"),
        ({"out": torch.zeros(2, 301).to_sparse()}, "out is torch.sparse_coo; it must be dense"),
        ({"cache": None}, "the cache was made for another PackedModel"),
    ],
)  # fmt: skip
def test_bad_input(impl, change, message):
    """Refused before anything is computed: the cache is as it was."""
    packed = _packed(impl=impl)
    tokens, cache = _filled(packed, 2)
    given = {"tokens": tokens, "cache": cache, "count": 3, "uniforms": torch.zeros(3, 2, dtype=torch.float64)} | change
    if given["cache"] is None:
        cache = given["cache"] = _filled(_packed(impl=impl), 2)[1]
    before = [t.clone() for t in (cache.keys, cache.values)]
    with pytest.raises((ValueError, IndexError, TypeError)) as error:
        decode_tokens(packed, **given)
    assert re.match(f"decode_tokens: .*{message}", str(error.value)), error.value
    assert "\n" not in str(error.value)
    assert cache.length == 5
    assert_same_bits([cache.keys, cache.values], before, "keys and values")


def test_options_are_not_looked_at_without_uniform_numbers():
    packed = _packed()
    wrong = {"temperature": 0.0, "top_k": 0, "top_p": 7.0}
    runs = [decode_tokens(packed, *_filled(packed, 2), 3, **options) for options in ({}, wrong)]
    assert_same_bits(*runs, "greedy")


def test_a_cache_is_filled_to_its_last_position():
    packed = _packed()
    token, cache = _filled(packed, 2)
    tokens, _ = decode_tokens(packed, token, cache, 59)
    assert cache.length == 64
    with pytest.raises(ValueError, match="decode_tokens: the cache is for 64 positions and 65 are needed"):
        decode_tokens(packed, tokens[-1], cache, 1)


def test_cost_counts_what_is_read_and_written():
    """Of a token: every matrix, the keys and values held, and what a draw reads and writes."""
    packed = _packed(**{**SMALL, "vocab_size": 320})
    found = cost(packed, 3, 10)["forward"]
    parameters = 320 * 64 + 64 * (3 * 64 + 64 + 8 * 64) + (3 * 64 + 64 + 4 * 64 + 64)  # biases of the products too
    keys_and_values = 3 * 10 * 2 * 64 * 4
    tokens, highest = decode_tokens(packed, *_filled(packed, 3), 1)
    drawn = torch.zeros(3, 320).nbytes + torch.zeros(1, 3, dtype=torch.float64).nbytes + tokens.nbytes + highest.nbytes
    assert found["bytes"] == 4 * parameters + keys_and_values + drawn
    assert found["flops"] == 2 * 3 * (64 * (3 * 64 + 64 + 8 * 64) + 320 * 64 + 2 * 64 * 10)
