"""generate where several tokens are one call of C++: the tokens that it makes where it makes them one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_model import pair, tokens

from gpt2_fast.generate import generate
from gpt2_fast.generate.loop import AT_ONCE
from gpt2_fast.generate.sampling import Sampler
from gpt2_fast.ops.runtime import cpp

GREEDY = {"temperature": 0}
SEEDED = {"temperature": 1.5, "seed": 7}
OPTIONS = [GREEDY, SEEDED, {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "seed": 3}, {**GREEDY, "weights": "int8"}]
PROMPTS = [[1, 2, 3, 4, 5], [6, 7]]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """Models this small gain nothing from more."""
    threads(1)


class _Streamer:
    def put(self, token):
        pass

    def end(self):
        pass


def _model(**options):
    """On a CPU, also where there is a GPU; in training mode it is not packed."""
    return pair(spread=0.3, **options)[1].cpu().eval()


@pytest.fixture
def counted(monkeypatch):
    """How many tokens of a row each call of C++ was asked for."""
    counts, original = [], cpp.decode_tokens

    def noted(*sources, count, **own):
        counts.append(count)
        return original(*sources, count=count, **own)

    monkeypatch.setattr(cpp, "decode_tokens", noted)
    return counts


def _three_ways(monkeypatch, make):
    """What `make(on_token)` gives at once, with a listener, and by logits that are drawn from one by one."""
    at_once, listened = make(None), make(lambda token: None)
    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draws", lambda *_: None)
        return at_once, listened, make(None)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("n", [1, 2, AT_ONCE, AT_ONCE + 1, 2 * AT_ONCE + 5])
def test_the_same_tokens(monkeypatch, options, n):
    model = _model()
    found = _three_ways(monkeypatch, lambda listen: generate(model, PROMPTS, n, on_token=listen, **options))
    assert found[0] == found[1] == found[2]
    assert [len(row) for row in found[0]] == [n, n]
    assert n < AT_ONCE or len(set(map(tuple, found[0]))) == 2


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("row", [0, 1])
def test_one_row_ends_inside_a_run(monkeypatch, options, row):
    """It stays as it is, and the other goes on with the tokens that it would have had."""
    model = _model()
    free = generate(model, PROMPTS, 29, **options)
    other = free[1 - row]
    own = [i for i, t in enumerate(free[row]) if t not in other and t not in free[row][:i]]
    at = next(i for i in own if i % AT_ONCE)  # the first token comes of the prompt, then each eighth ends a run
    seen = []
    options = {**options, "eos_token_id": [free[row][at], 256]}
    assert 256 not in other

    def make(listen):
        seen.append([])
        return generate(model, PROMPTS, 29, on_token=listen and (lambda t: seen[-1].append(t.tolist())), **options)

    at_once, listened, by_logits = _three_ways(monkeypatch, make)
    expected = [None, None]
    expected[row], expected[1 - row] = free[row][:at], other
    assert at_once == listened == by_logits == expected
    assert [t[row] for t in seen[1][at:]] == [free[row][at]] * (29 - at)


def test_both_rows_end_and_nothing_more_is_made(counted):
    model = _model()
    free = generate(model, PROMPTS, 20, **SEEDED)
    counted.clear()
    ends = [free[0][4], free[1][11]]
    cut = [next(i for i, t in enumerate(row) if t in ends) for row in free]
    assert generate(model, PROMPTS, 20, eos_token_id=ends, **SEEDED) == [r[:n] for r, n in zip(free, cut, strict=True)]
    # The first comes of the prompts; a run up to the first end; then one by one up to the last.
    runs = -(-min(cut) // AT_ONCE)
    assert counted == [AT_ONCE] * runs + [1] * (max(cut) - min(cut))


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_context_slides(monkeypatch, counted, options):
    """A run ends with the context, whose newest half is then the prompt."""
    model = _model(n_positions=16)
    found = _three_ways(
        monkeypatch, lambda listen: generate(model, PROMPTS, 45, on_token=listen, context="slide", **options)
    )
    assert found[0] == found[1] == found[2]
    # 5 positions of 16 are the prompt's: 8 and 3 tokens; then 8 of 16 are held, a token is made of them, 8 more follow.
    assert counted[:6] == [8, 3, 8, 8, 8, 5]
    assert sum(counted[:6]) == 45 - 5
    assert counted[6:] == [1] * 40


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "seed": 5}], ids=["greedy", "seeded"])
def test_model_generate_fills_what_has_ended(monkeypatch, options):
    model, ids = _model(), tokens(3, 6).cpu()
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    free = model.generate(ids, mask, max_new_tokens=21, eos_token_id=None, **options)[:, 6:].tolist()
    end = next(t for i, t in enumerate(free[1]) if i in (3, 4, 5, 6) and t not in free[1][:i])
    options |= {"max_new_tokens": 21, "eos_token_id": end, "pad_token_id": 250}

    make = lambda listen: model.generate(ids, mask, streamer=listen and _Streamer(), **options)
    at_once, listened, by_logits = (found[:, 6:].tolist() for found in _three_ways(monkeypatch, make))
    assert at_once == listened == by_logits
    for row, whole in zip(at_once, free, strict=True):
        kept = whole[: whole.index(end) + 1] if end in whole else whole
        assert row == kept[: len(row)] + [250] * (len(row) - len(kept))
    assert 250 in at_once[1]


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("row", [0, 1])
def test_logits_that_are_no_numbers_raise(options, row):
    """A position that only the longer prompt's row comes to, inside a run."""
    model = _model()
    prompts = PROMPTS if row == 0 else PROMPTS[::-1]
    with torch.no_grad():
        model.transformer.wpe.weight[10] = torch.nan
    generate(model, prompts, 6, **options)  # its last token is of position 9
    for n in (7, 20):
        with pytest.raises(FloatingPointError, match=f"^the logits of row {row} are NaN and no token can be chosen"):
            generate(model, prompts, n, **options)


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_one_call_for_eight_tokens(counted, options):
    model = _model()
    generate(model, PROMPTS, 45, **options)
    assert counted == [8, 8, 8, 8, 8, 4]
    counted.clear()
    generate(model, PROMPTS, 45, on_token=lambda token: None, **options)
    assert counted == [1] * 44


def test_what_torch_draws_is_drawn_one_by_one(counted):
    """Its generator gives the numbers of one token at a time, and a penalty counts what was said."""
    model = _model()
    generate(model, PROMPTS, 12, temperature=0.9)
    generate(model, PROMPTS, 12, repetition_penalty=1.2, **GREEDY)
    assert counted == []


def test_memory_is_kept_from_call_to_call(monkeypatch):
    model, original, held = _model(), cpp.decode_tokens, []

    def noted(*sources, scratch, logits, **own):
        held.append((scratch, logits))  # alive, so that no other can take its place
        return original(*sources, scratch=scratch, logits=logits, **own)

    monkeypatch.setattr(cpp, "decode_tokens", noted)
    generate(model, PROMPTS, 25, **GREEDY)
    assert len(held) == 3
    assert all(scratch is held[0][0] and logits is held[0][1] for scratch, logits in held)


@pytest.mark.parametrize(
    "kind", [int, np.int64, torch.tensor, lambda t: [t], lambda t: torch.tensor([t]), lambda t: {t, 1}]
)
def test_an_end_of_any_kind_of_whole_number(kind):
    """A number of torch's was no token's equal, and nothing ended there."""
    model = _model()
    free = generate(model, [PROMPTS[0]], 12, temperature=0)[0]
    end = next(t for t in free[2:] if t != 1 and t not in free[:2])
    assert generate(model, [PROMPTS[0]], 12, temperature=0, eos_token_id=kind(end)) == [free[: free.index(end)]]


@pytest.mark.parametrize("end", [1.5, "</s>", [3, None]])
def test_an_end_that_is_no_token_is_one_line(end):
    with pytest.raises(ValueError, match="eos_token_id is .*; it must be a token id, several, or None"):
        generate(_model(), [PROMPTS[0]], 2, eos_token_id=end)
