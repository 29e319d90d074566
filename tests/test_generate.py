"""Generation against transformers' greedy text, the cache against the whole forward pass, and sampling."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import DEVICE
from test_model import pair, tokens

from gpt2_fast import checkpoint, cli
from gpt2_fast.config import GPT2Config
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.generate import KVCache, TextStream, complete, generate, sample, sampling
from gpt2_fast.generate.decoders import make_decoder
from gpt2_fast.generate.sampling import Sampler, Sampling, row_uniforms
from gpt2_fast.generate.text import StopStrings
from gpt2_fast.model import GPT2LMHeadModel


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


def _drop_a_layer(model):
    model.transformer.h = model.transformer.h[1:]


def _add_a_layer(model):
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))


def _use_a_layer_twice(model):
    model.transformer.h[2] = model.transformer.h[0]


def _use_another_layer_twice(model):
    model.transformer.h = torch.nn.ModuleList([model.transformer.h[i] for i in (0, 1, 1)])


def _narrow_an_mlp(model):
    mlp = model.transformer.h[1].mlp
    mlp.c_fc.weight = torch.nn.Parameter(mlp.c_fc.weight.detach()[:, :100].contiguous())
    mlp.c_fc.bias = torch.nn.Parameter(mlp.c_fc.bias.detach()[:100])
    mlp.c_proj.weight = torch.nn.Parameter(mlp.c_proj.weight.detach()[:100].contiguous())


def _widen_the_vocabulary(model):
    grown = torch.cat([model.transformer.wte.weight.detach(), 5 * torch.ones(1, 64, device=DEVICE)])
    model.lm_head.weight = model.transformer.wte.weight = torch.nn.Parameter(grown)


def _split_into_fewer_heads(model):
    for block in model.transformer.h:
        block.attn.n_head, block.attn.head_dim = 2, 32


def _change_a_scale(model):
    model.transformer.h[1].attn.scale = 1.5


def _change_an_eps(model):
    model.transformer.h[1].ln_2.eps = 0.7


def _change_an_activation(model):
    model.transformer.h[0].mlp.activation = "gelu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["packed", "the model"])
@pytest.mark.parametrize(
    "change", [_drop_a_layer, _add_a_layer, _use_a_layer_twice, _narrow_an_mlp, _widen_the_vocabulary,
               _split_into_fewer_heads, _change_a_scale, _change_an_eps, _change_an_activation],
)  # fmt: skip
def test_a_changed_model_generates_what_its_forward_pass_says(change, dtype):
    """Before it changed, the model has generated, so what was kept of it is no longer true."""
    torch.manual_seed(5)
    model = GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=71, n_positions=32)).to(DEVICE, dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.eval()
    prompt = tokens(1, 6, vocab_size=71)
    edits = [lambda model: None, change]
    if change is _use_a_layer_twice:
        edits.append(_use_another_layer_twice)
    for edit in edits:
        edit(model)
        ids = prompt
        with torch.no_grad():
            logits = model(ids).logits[:, -1].float()
            for _ in range(8):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        starts = torch.zeros(1, dtype=torch.int32, device=DEVICE)
        torch.testing.assert_close(make_decoder(model, 1, 32).prefill(prompt, starts), logits, rtol=1e-4, atol=1e-3)
        assert generate(model, prompt.tolist(), 8, temperature=0)[0] == ids[0, 6:].tolist()


def test_what_a_cache_cannot_hold_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=4, n_embd=64, vocab_size=71, n_positions=32)).eval()
    model.transformer.h[1].attn.n_head, model.transformer.h[1].attn.head_dim = 2, 32
    with pytest.raises(ValueError, match=r"the layers have \[\(2, 32\), \(4, 16\)\] heads and head sizes"):
        generate(model, [[1, 2]], 3)
    with pytest.raises(ValueError, match=r"h.1.attn has n_head 2 and the config 4, which packed weights would leave"):
        generate(model, [[1, 2]], 3, weights="int8")


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


def test_repetition_penalty_is_transformers():
    theirs, ours = pair()
    prompt = tokens(1, 7)
    expected = (
        theirs.eval()
        .generate(
            prompt, max_new_tokens=30, do_sample=False, pad_token_id=0, eos_token_id=None, repetition_penalty=1.3
        )[0, 7:]
        .tolist()
    )
    greedy = {"temperature": 0, "repetition_penalty": 1.3}
    assert generate(ours, prompt.tolist(), 30, **greedy)[0] == expected
    assert expected != generate(ours, prompt.tolist(), 30, temperature=0)[0]
    # In a batch, the other prompt's tokens and the padding are not penalised.
    assert generate(ours, [prompt[0].tolist(), [0] * 12], 30, **greedy)[0] == expected


def test_what_a_listener_does_to_a_token_changes_no_text():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=32)).eval()
    expected = generate(model, [[1, 2], [3, 4]], 8, temperature=0.9, seed=1)

    def spoil(token):
        token.fill_(7)

    assert generate(model, [[1, 2], [3, 4]], 8, temperature=0.9, seed=1, on_token=spoil) == expected


def test_each_row_ends_on_its_own_and_stays_as_it_is():
    _, model = pair()
    prompts = [[1, 2, 3], [4, 5]]
    free = generate(model, prompts, 12, temperature=0)
    stop_after, seen = {0: 3, 1: 6}, []

    def on_token(newest):
        seen.append(newest.tolist())
        return torch.tensor([len(seen) >= stop_after[row] for row in range(2)])

    assert generate(model, prompts, 12, temperature=0, on_token=on_token) == [free[0][:3], free[1][:6]]
    assert seen == [[free[0][min(step, 2)], free[1][step]] for step in range(6)]


def test_several_ids_end_a_row():
    _, model = pair()
    free = generate(model, [[1, 2, 3]], 10, temperature=0)[0]
    cut = min(free.index(free[3]), free.index(free[6]))
    assert generate(model, [[1, 2, 3]], 10, temperature=0, eos_token_id=(free[6], free[3]))[0] == free[:cut]


def stream(text, stop=()):
    """What a TextStream gives, piece by piece, for the tokens of a text."""
    tokenizer = get_tokenizer()
    out = TextStream(tokenizer, stop)
    pieces = [out.push(i) for i in tokenizer.encode(text)]
    return [*pieces, out.close()], out


def test_stream_holds_back_unfinished_characters():
    text = "naïve 🙂 日本語 🧑‍🚀."
    pieces, out = stream(text)
    assert len(get_tokenizer().encode("🙂")) > 1, "one token a character would prove nothing"
    assert "".join(pieces) == out.text == text
    assert "\ufffd" not in "".join(pieces)
    out = TextStream(get_tokenizer())
    broken = get_tokenizer().encode("🙂")[:-1]
    assert [out.push(i) for i in broken] == [""] * len(broken)
    assert out.close() == "\ufffd"


def test_stream_ends_in_front_of_a_stop_string():
    pieces, out = stream("one two\n\nthree four", ["two\n\nthree", "four"])
    assert out.stopped
    assert "".join(pieces) == out.text == "one "
    # What only began like a stop string is text after all.
    pieces, out = stream("one two\n\nfive", ["two\n\nthree"])
    assert "".join(pieces) == out.text == "one two\n\nfive"
    assert not out.stopped
    assert stream("one two", ["two three"])[1].text == "one two"
    with pytest.raises(ValueError, match="a stop string is empty"):
        TextStream(get_tokenizer(), [""])


def test_stop_strings_end_with_the_newest_token():
    """Not where the string was there before; and a character that takes several tokens counts when it is whole."""
    encode = get_tokenizer().encode
    stops = StopStrings(get_tokenizer(), ["cat sat", "🙂"])
    assert stops.ends(encode("The cat sat"))
    assert not stops.ends(encode("The cat sat on"))
    assert not stops.ends(encode("The cat"))
    ids = encode("x🙂")
    assert [stops.ends(ids[:n]) for n in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]


def test_penalty_counts_tokens_and_not_padding():
    prompts = torch.tensor([[0, 0, 5], [1, 2, 2]])
    said = lambda seen: [row.nonzero().flatten().tolist() for row in seen]
    start = lambda counted: Sampler.start(Sampling(repetition_penalty=2.0), prompts, 6, 4, counted=counted)
    assert said(start(None).seen) == [[0, 5], [1, 2]]
    sampler = start(torch.tensor([[False, False, True], [True, True, True]]))
    assert said(sampler.seen) == [[5], [1, 2]]
    sampler.observe(torch.tensor([4, 1]))
    assert said(sampler.seen) == [[4, 5], [1, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random model of GPT-2's vocabulary, saved as a checkpoint."""
    torch.manual_seed(3)
    config = GPT2Config(n_layer=1, n_head=1, n_embd=16, n_positions=40, initializer_range=0.5)
    path = tmp_path_factory.mktemp("model")
    checkpoint.save_pretrained(path, GPT2LMHeadModel(config).state_dict(), config)
    return path


def run(capsys, *arguments):
    status = cli.main(["generate", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_command_prints_what_generate_gives(folder, capsys):
    config, weights = checkpoint.load_pretrained(folder)
    model, tokenizer = GPT2LMHeadModel(config), get_tokenizer()
    model.load_state_dict(weights)
    model.to(DEVICE)
    ids = tokenizer.encode("Hello, I'm a language model,")
    options = {"top_k": 40, "temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 42}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    base = ("Hello, I'm a language model,", "--model", folder, "--max-new-tokens", 8, *flags)
    for n in (1, 3):
        rows = generate(model, [ids] * n, 8, eos_token_id=tokenizer.eot_token, **options)
        texts = ["Hello, I'm a language model," + tokenizer.decode(row) for row in rows]
        status, out, err = run(capsys, *base, "--num-samples", n)
        assert (status, err) == (0, "")
        parts = texts if n == 1 else [f"--- {i} of {n} ---\n{text}" for i, text in enumerate(texts, start=1)]
        assert out == "\n".join(parts) + "\n"
    assert complete(model, tokenizer, "", 3, temperature=0) == [
        tokenizer.decode(generate(model, [[tokenizer.eot_token]], 3, temperature=0)[0])
    ]


def test_command_slides_and_packs(folder, capsys):
    """--slide goes past n_positions, --weights rounds on a CPU; both print what `complete` gives."""
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder, device=DEVICE), get_tokenizer()
    base = ("A", "--model", folder, "--temperature", 0, "--max-new-tokens")
    (text,) = complete(model, tokenizer, "A", 60, temperature=0, context="slide")
    assert run(capsys, *base, 60, "--slide")[:2] == (0, f"A{text}\n")
    if DEVICE == "cpu":
        (text,) = complete(model, tokenizer, "A", 35, temperature=0, weights="int8")
        assert run(capsys, *base, 35, "--weights", "int8")[:2] == (0, f"A{text}\n")
        assert [text] != complete(model, tokenizer, "A", 35, temperature=0), "nothing was rounded"


def test_first_sample_is_the_same_in_any_number(folder):
    model, tokenizer = GPT2LMHeadModel.from_pretrained(folder, device=DEVICE), get_tokenizer()
    one = complete(model, tokenizer, "A", 9, seed=4, write=lambda piece: None)
    three = complete(model, tokenizer, "A", 12, seed=4, num_samples=3)
    assert three[0].startswith(one[0])
    assert len(set(three)) == 3


def test_command_stops_at_a_string(folder, capsys):
    greedy = ("A", "--model", folder, "--temperature", 0, "--max-new-tokens", 12)
    whole = run(capsys, *greedy)[1]
    stop = whole[8:11]
    assert run(capsys, *greedy, "--stop", stop)[1] == whole[: whole.index(stop, 1)] + "\n"


def test_command_refuses_in_one_line(folder, capsys, tmp_path):
    for arguments, message in [
        (("word " * 38, "--model", folder), "need 69 positions and the model has 40"),
        (("a", "--model", folder, "--num-samples", 0), "num_samples is 0"),
        (("a", "--model", "nano"), "nano is a preset without published weights"),
        (("a", "--model", folder, "--repetition-penalty", 0), "repetition_penalty is 0"),
        (("a", "--model", tmp_path / "no" / "such" / "one"), "does not exist"),
        (("a", "--model", folder, "--impl", "cuda9"), "impl is 'cuda9'"),
    ]:
        status, out, err = run(capsys, *arguments, "--max-new-tokens", 30)
        assert status == 2
        assert message in err
        assert err.count("\n") == 1
        assert out == ""


def test_a_vocabulary_that_is_not_gpt2s_is_refused():
    _, model = pair()
    with pytest.raises(ValueError, match="vocab_size 257"):
        complete(model, get_tokenizer(), "a", 3)


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


@pytest.mark.parametrize("top_k", [None, 40, 900])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 0.999])
def test_the_nucleus_is_its_definition(top_k, top_p):
    """In float64, token by token, whether or not the most likely few are enough to tell."""
    V, generator = 1000, torch.Generator().manual_seed(0)
    spread = torch.tensor([[12.0], [3.0], [1.0], [0.01], [0.0], [3.0]])  # from one likely token to all alike
    logits = torch.randn(6, V, generator=generator) * spread
    logits[5, 30:] = -torch.inf
    logits[1] = logits[1].round()  # many are as likely as one another
    kept = sampling._kept(logits, top_k, top_p)
    for row, got in zip(logits, kept, strict=True):
        assert torch.equal(sampling._kept(row.unsqueeze(0), top_k, top_p)[0], got)  # whatever the others are
        k = V if top_k is None else top_k
        exact = torch.where(row >= row.sort(descending=True).values[k - 1], row, -torch.inf).double().softmax(-1)
        mine = exact.unsqueeze(1)
        before = torch.where(exact > mine, exact, 0).sum(1)  # of what is likelier
        alike = torch.where(exact == mine, exact, 0).sum(1)  # of those alike some are kept, in any order
        finite = got > -torch.inf
        assert torch.equal(got[finite], row[finite])
        assert not finite[(before > top_p + 1e-5) | (exact == 0)].any()
        assert finite[(before + alike < top_p - 1e-5) & (exact > 0)].all()
        assert exact[finite].sum() > min(top_p, 1) - 1e-5
        least = exact[finite].min()
        assert exact[finite].sum() - least < top_p + 1e-5 or finite.sum() == 1  # no token too many


def test_seeded_draws_are_uniform_and_land_where_they_should():
    """Each row has its own numbers; a number u takes the first token whose cumulated probability passes u."""
    uniform = row_uniforms(42, 50, 40, "cpu")
    assert uniform.shape == (50, 40)
    assert uniform.unique().numel() == 2000
    assert abs(uniform.mean() - 0.5) < 0.02
    assert abs(uniform.var() - 1 / 12) < 0.005
    assert torch.equal(row_uniforms(42, 3, 2, "cpu"), uniform[:3, :2])
    assert not torch.equal(row_uniforms(43, 3, 2, "cpu"), uniform[:3, :2])
    logits = torch.tensor([[0.1, 0.2, 0.0, 0.7]]).log().expand(5, 4)
    got = sample(logits, uniform=torch.tensor([0.0, 0.0999, 0.2999, 0.3001, 1 - 2.0**-32], dtype=torch.float64))
    assert got.tolist() == [0, 0, 1, 3, 3]
    assert sample(logits[:1], top_k=1, uniform=torch.zeros(1, dtype=torch.float64)).tolist() == [3]


def test_bad_input_is_one_line():
    _, model = pair()
    with pytest.raises(ValueError, match="need 65 positions and the model has 64"):
        generate(model, [[1] * 60], 5)
    with pytest.raises(ValueError, match="a prompt is empty"):
        generate(model, [[]], 5)
    with pytest.raises(ValueError, match="top_p is 0"):
        generate(model, [[1]], 5, top_p=0)
    with pytest.raises(ValueError, match="temperature is -1"):
        generate(model, [[1]], 5, temperature=-1)
