"""Generation against transformers' greedy text, the cache against the whole forward pass, and sampling."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_model import pair, tokens

from gpt2_fast.generate import KVCache, generate, sample


def test_greedy_equals_transformers():
    theirs, ours = pair()
    prompt = tokens(1, 7)
    expected = theirs.eval().generate(
        prompt, max_new_tokens=40, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=True
    )
    assert generate(ours, prompt.tolist(), 40, temperature=0)[0] == expected[0, 7:].tolist()


def test_batch_of_unequal_prompts_gives_what_each_gives_alone():
    _, model = pair()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 5, 11)]
    together = generate(model, prompts, 20, temperature=0)
    assert together == [generate(model, [p], 20, temperature=0)[0] for p in prompts]


def test_decoding_is_the_whole_forward_pass():
    """Logits of every decoded position equal those of one forward pass over the sequence."""
    _, model = pair()
    model.eval()
    ids = tokens(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        cache = KVCache(model, 2, 12)
        for start, stop in [(0, 5), *((i, i + 1) for i in range(5, 12))]:
            first = cache.advance(stop - start)
            positions = torch.arange(first, stop, device=DEVICE)
            hidden = model.transformer(ids[:, start:stop], position_ids=positions, cache=cache)
            torch.testing.assert_close(hidden @ model.lm_head.weight.t(), whole[:, start:stop], rtol=1e-4, atol=1e-4)


def test_seeded_to_the_bit_and_streams():
    _, model = pair()
    model.train()
    seen = []
    first = generate(model, [[1, 2, 3]], 15, temperature=0.9, top_k=50, top_p=0.9, seed=42, on_token=seen.append)
    assert first == generate(model, [[1, 2, 3]], 15, temperature=0.9, top_k=50, top_p=0.9, seed=42)
    assert first != generate(model, [[1, 2, 3]], 15, temperature=0.9, top_k=50, top_p=0.9, seed=43)
    assert [t.item() for t in seen] == first[0]
    assert model.training


def test_stops_at_end_of_text():
    _, model = pair()
    greedy = generate(model, [[1, 2, 3]], 10, temperature=0)[0]
    cut = greedy.index(greedy[4])
    assert generate(model, [[1, 2, 3]], 10, temperature=0, eos_token_id=greedy[4])[0] == greedy[:cut]


def test_sampling_keeps_what_it_should():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).expand(4000, 5)
    generator = torch.Generator().manual_seed(0)
    assert set(sample(logits, top_k=2, generator=generator).tolist()) == {0, 1}
    # softmax is .636 .234 .086 .032 .012: the first two sum to .870
    assert set(sample(logits, top_p=0.8, generator=generator).tolist()) == {0, 1}
    assert set(sample(logits, top_p=0.88, generator=generator).tolist()) == {0, 1, 2}
    assert set(sample(logits, temperature=0).tolist()) == {0}
    share = (sample(logits, temperature=2.0, generator=generator) == 0).float().mean().item()
    assert abs(share - torch.softmax(logits[0] / 2, 0)[0].item()) < 0.03


def test_bad_input_is_one_line():
    _, model = pair()
    with pytest.raises(ValueError, match="needs 65 positions and the model has 64"):
        generate(model, [[1] * 60], 5)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[]], 5)
    with pytest.raises(ValueError, match="top_p is 0"):
        generate(model, [[1]], 5, top_p=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        generate(model, [[1]], 5, temperature=-1)
