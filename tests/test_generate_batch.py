"""model.generate against transformers' generate on the same random weights: token for token, argument by argument."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
import transformers
from conftest import DEVICE
from test_model import pair, tokens

from gpt2_fast.data.tokenizer import get_tokenizer

EOS, PAD = 63, 7


@pytest.fixture(scope="module")
def models():
    """transformers' model and ours, with ids of end and padding that the vocabulary has; nobody trains them."""
    torch.manual_seed(0)
    theirs, ours = pair(eos_token_id=EOS, pad_token_id=PAD)
    return theirs.eval(), ours.eval()


def both(models, *args, **options):
    """What each gives, after the same torch.manual_seed; transformers' is int64 [B, T + new]."""
    results = []
    for model in models:
        torch.manual_seed(3)
        results.append(model.generate(*args, **options))
    return results


def padded(lengths, width=11):
    """Left-padded prompts and their mask; what lies under the padding is not PAD alone."""
    ids, mask = tokens(len(lengths), width), torch.ones(len(lengths), width, dtype=torch.int64, device=DEVICE)
    for row, length in enumerate(lengths):
        mask[row, : width - length] = 0
    return ids, mask


OPTIONS = [
    {},
    {"max_new_tokens": 30, "eos_token_id": None},
    {"max_length": 19},
    {"max_new_tokens": 25, "repetition_penalty": 1.3},
    {"max_new_tokens": 25, "eos_token_id": [EOS, 122]},
    {"max_new_tokens": 25, "pad_token_id": 3},
    {"max_new_tokens": 12, "do_sample": True},
    {"max_new_tokens": 12, "do_sample": True, "temperature": 0.7, "top_k": 5},
    {"max_new_tokens": 12, "do_sample": True, "top_k": 0, "top_p": 0.8, "num_return_sequences": 3},
    {"max_new_tokens": 12, "do_sample": False, "num_beams": 1, "use_cache": True, "top_k": 3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "defaults")
def test_tokens_are_transformers(models, options):
    """Greedy and sampled alike; rows that end are padded; left padding is neither seen nor counted."""
    ids, mask = padded((11, 4, 1))
    expected, got = both(models, ids, attention_mask=mask, **options)
    assert got.dtype == torch.int64
    assert got.tolist() == expected.tolist()


def test_options_change_what_comes(models):
    """Otherwise the comparison above would compare one thing with itself."""
    ids, mask = padded((11, 4, 1))
    texts = [str(models[1].generate(ids, mask, **options).tolist()) for options in OPTIONS[:-1]]
    assert len(set(texts)) == len(texts)


def test_rows_end_and_are_padded(models):
    ids = tokens(4, 6)
    free = models[1].generate(ids, max_new_tokens=12, eos_token_id=None)[:, 6:]
    end = free[0, 3].item()
    got = models[1].generate(ids, max_new_tokens=12, eos_token_id=end, pad_token_id=PAD)[:, 6:]
    for row, unstopped in zip(got.tolist(), free.tolist(), strict=True):
        kept = unstopped[: unstopped.index(end) + 1] if end in unstopped else unstopped
        assert row == kept + [PAD] * (got.shape[1] - len(kept))
    assert PAD in got[0].tolist()


def test_padding_without_a_mask_is_found(models):
    ids, mask = padded((11, 4))
    ids[mask == 0] = PAD
    ids[(mask == 1) & (ids == PAD)] = PAD + 1
    expected, got = both(models, ids, max_new_tokens=10)
    assert got.tolist() == expected.tolist() == models[1].generate(ids, mask, max_new_tokens=10).tolist()


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "seed": 3}, {"do_sample": True, "top_p": 0.9}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["whole", "token"])
def test_logits_that_are_no_numbers_raise(options, value, where):
    """One line that names the row, where an id outside the vocabulary came, or token 0."""
    _, ours = pair()
    ours.eval()
    with torch.no_grad():
        if where == "token":
            ours.transformer.wte.weight[5] = value
        else:
            ours.transformer.ln_f.bias.fill_(value)
    ids = tokens(2, 6) % 3 + 50
    for weights in (None, "int8") if DEVICE == "cpu" and where == "token" and value != value else (None,):
        with pytest.raises(FloatingPointError, match=r"^the logits of row 0 are (NaN|infinite) and no token"):
            ours.generate(ids, max_new_tokens=3, weights=weights, **options)
    ids[1] = 5  # the other row is sound
    with torch.no_grad():
        ours.transformer.wte.weight[5], ours.transformer.ln_f.bias[:] = 0.0, 0.0
    ours.generate(ids, max_new_tokens=3, **options)


@pytest.mark.parametrize("given", [True, False], ids=["mask", "pad_token_id"])
def test_padding_is_not_penalised(models, given):
    """Padding is what the row would say first; transformers before 5 penalised it."""
    options = {"max_new_tokens": 8, "repetition_penalty": 50.0, "eos_token_id": None}
    row = tokens(1, 4) % 3 + 100
    said = models[1].generate(row, **options)[0, 4:].tolist()
    assert said[0] not in row
    ids = torch.cat((tokens(1, 9), torch.nn.functional.pad(row, (5, 0), value=said[0])))
    ids[0] = torch.arange(40, 49)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options |= {"attention_mask": mask} if given else {"pad_token_id": said[0]}
    expected, got = both(models, ids, **options)
    assert got[1, 9:].tolist() == said
    if "padding_lengths" in inspect.getsource(transformers.GenerationMixin._get_logits_processor):
        assert got.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"input_ids": [[1, 2]]}, "input_ids is a list; it must be an int64 tensor"),
        ({"attention_mask": [[1, 1, 1]]}, "attention_mask is a list; it must be a tensor"),
        ({"seed": 1.5, "do_sample": True}, "seed is 1.5; it must be a whole number"),
        ({"max_new_tokens": 2.0}, "max_new_tokens is 2.0; it must be a whole number"),
        ({"top_k": 2.5, "do_sample": True}, "top_k is 2.5; it must be a whole number"),
        ({"repetition_penalty": "1"}, "repetition_penalty is '1'; it must be a number"),
    ],
)
def test_wrong_types_are_one_line(models, options, words):
    with pytest.raises(ValueError, match=words) as error:
        models[1].generate(**{"input_ids": tokens(1, 3), **options})
    assert "\n" not in str(error.value)


def test_stop_strings_are_transformers(tmp_path):
    """On GPT-2's own vocabulary; also a string that begins in the prompt, and characters of several tokens."""
    tokenizer = get_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    theirs_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs, ours = pair(vocab_size=50257, n_layer=1, n_embd=32, n_head=2)
    ids = torch.tensor([tokenizer.encode(text)[:3] for text in ("A 🙂!", "One, two,")], device=DEVICE)
    free = ours.generate(ids, max_new_tokens=8, eos_token_id=None)
    rows = [tokenizer.decode(row) for row in free[:, ids.shape[1] :].tolist()]
    prompt = tokenizer.decode(ids[0])
    for stops in (rows[0][3:6], [rows[1][2:9], "nowhere"], [(prompt + rows[0])[len(prompt) - 2 : len(prompt) + 2]]):
        options = {
            "max_new_tokens": 8,
            "stop_strings": stops,
            "pad_token_id": 0,
            "attention_mask": torch.ones_like(ids),
        }
        expected = theirs.eval().generate(ids, tokenizer=theirs_tokenizer, **options)
        for given in (tokenizer, theirs_tokenizer):
            assert ours.generate(ids, tokenizer=given, **options).tolist() == expected.tolist(), stops
        assert (expected[:, 3:] == 0).any(), "no row ended early"


class Streamer:
    def __init__(self):
        self.seen = []

    def put(self, value):
        self.seen.append(value.tolist())

    def end(self):
        self.seen.append("end")


def test_streamer_hears_what_transformers_says(models, capsys):
    ids = tokens(2, 6)
    free = models[1].generate(ids, max_new_tokens=9, eos_token_id=None)
    heard = []
    for model in models:
        heard.append(Streamer())
        model.generate(ids, max_new_tokens=9, eos_token_id=free[0, 8].item(), streamer=heard[-1])
    assert heard[1].seen == heard[0].seen
    assert heard[1].seen[0] == ids.tolist()
    assert heard[1].seen[-1] == "end"


def test_seed_belongs_to_a_row(models):
    """A row's tokens depend neither on the other rows nor on streaming, nor on how many tokens may come."""
    ids, options = tokens(1, 6), {"do_sample": True, "seed": 11, "eos_token_id": None}
    three = models[1].generate(ids, max_new_tokens=12, num_return_sequences=3, **options)
    one = models[1].generate(ids, max_new_tokens=12, streamer=Streamer(), **options)
    assert one[0].tolist() == three[0].tolist()
    assert three[0].tolist() != three[1].tolist()
    assert models[1].generate(ids, max_new_tokens=5, **options)[0].tolist() == three[0, :11].tolist()
    options["seed"] = 12
    assert models[1].generate(ids, max_new_tokens=12, **options)[0].tolist() != one[0].tolist()


def test_generator_is_used(models):
    ids, options = tokens(1, 6), {"do_sample": True, "max_new_tokens": 12}
    make = lambda seed: torch.Generator(DEVICE).manual_seed(seed)
    first = models[1].generate(ids, generator=make(5), **options).tolist()
    assert models[1].generate(ids, generator=make(5), **options).tolist() == first
    assert models[1].generate(ids, generator=make(6), **options).tolist() != first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, r"num_beams=4\); gpt2_fast.hf.GPT2LMHeadModel, transformers' own class, does"),
        ({"logits_processor": []}, r"does not do generate\(logits_processor="),
        ({"return_dict_in_generate": True}, r"does not do generate\(return_dict_in_generate=True"),
        ({"num_return_sequences": 2}, "num_return_sequences is 2 and do_sample False"),
        ({"max_length": 6}, "max_length is 6 and the prompt has 6 tokens"),
        ({"max_new_tokens": 60}, "need 66 positions and the model has 64"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0"),
        ({"do_sample": True, "top_p": 1.5}, "top_p is 1.5"),
        ({"stop_strings": "a"}, "pass tokenizer="),
        ({"seed": 1, "generator": torch.Generator(), "do_sample": True}, "seed and generator are both given"),
        ({"context": "ring"}, "context is 'ring'"),
        ({"weights": "int3"}, "int3"),
        ({"attention_mask": torch.tensor([[1] * 5 + [0]])}, "padding after a token; pad on the left"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask is \(1, 5\) and input_ids \(1, 6\)"),
        ({"attention_mask": torch.zeros(1, 6)}, "padding after a token"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_refusals_are_one_line(models, options, message):
    with pytest.raises(ValueError, match=message) as error:
        models[1].generate(tokens(1, 6), **options)
    assert "\n" not in str(error.value)


def test_more_refusals(models):
    with pytest.raises(TypeError, match="no argument 'max_new_token'"):
        models[1].generate(tokens(1, 6), max_new_token=3)
    with pytest.raises(ValueError, match="input_ids is torch.float32"):
        models[1].generate(tokens(1, 6).float())
    with pytest.raises(ValueError, match="input_ids is torch.int64"):
        models[1].generate(tokens(6))
    with pytest.raises(ValueError, match="padding after a token"):
        models[1].generate(torch.tensor([[1, PAD, 3]], device=DEVICE))


def test_mode_is_left_as_it_was(models):
    theirs, ours = pair(resid_pdrop=0.5)
    ids = tokens(1, 6)
    ours.train()
    expected = theirs.eval().generate(ids, max_new_tokens=8, pad_token_id=0)
    assert ours.generate(ids, max_new_tokens=8, pad_token_id=0).tolist() == expected.tolist()
    assert ours.training


def test_what_asks_for_nothing_is_any_number(models):
    ids = tokens(1, 4)
    expected = models[1].generate(ids, max_new_tokens=2)
    given = {"num_beams": np.int64(1), "no_repeat_ngram_size": 0.0, "use_cache": True, "typical_p": np.float64(1)}
    assert torch.equal(models[1].generate(ids, max_new_tokens=2, **given), expected)
