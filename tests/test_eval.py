"""`gpt2-fast eval`: every value against transformers' model on the same random checkpoint, every refusal one line."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import transformers

from gpt2_fast import GPT2Config, GPT2LMHeadModel, cli
from gpt2_fast.checkpoint.convert import convert
from gpt2_fast.data import jsonl
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.evaluate import losses, tasks

CONFIG = GPT2Config(n_positions=48, n_embd=16, n_layer=1, n_head=1)
IDS_CONFIG = GPT2Config(n_positions=48, n_embd=32, n_layer=2, n_head=2, vocab_size=211, bos_token_id=5, eos_token_id=5)
TEXT = "The quick brown fox — naïve, as ever — jumps over the lazy dog.\n\n" * 9 + "<|endoftext|>The end."

WIKIHOW = {
    "activity_label": "Home and Garden",
    "ctx_a": "[header] How to boil an egg [title] Fill a pot with water.",
    "ctx_b": "put the pot on the stove",
    "ctx": "[header] How to boil an egg [title] Fill a pot with water. put the pot on the stove",
    "endings": ["[substeps] Wait until  it boils.", "and throw it away, far away.", "egg [title] egg", "naïvely."],
    "label": 2,
}
LINES = [
    {**WIKIHOW, "label": i % 4, "ctx_b": f"{word} puts it there", "ctx": f"It is {word}. {word} puts it there"}
    for i, word in enumerate(["he", "she", "nobody", "everyone", "who", "tomorrow"])
] + [  # tokens a character and characters a word differ between these endings
    {"activity_label": "Roof", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he", "endings": endings, "label": "1"}
    for endings in (["is in it at a", "supercalifragilistic"], ["government international", "a!?;:"])
]  # fmt: skip
WORDS = ["The dog saw another dog", "He said hello to the\ncat and the dog", "no cat", "A b indistinguishable"]


def both(config, expected):
    """(ours, transformers'), float32, weights wide enough that predictions differ and `expected` is often one."""
    torch.manual_seed(3)
    ours = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.4)
        ours.transformer.ln_f.bias.copy_(ours.transformer.wte.weight[expected] * 3)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict())).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.fixture(scope="module")
def pair():
    """Models of GPT-2's vocabulary, which like to say " dog"."""
    return both(CONFIG, get_tokenizer().encode(" dog")[0])


@pytest.fixture(scope="module")
def small():
    """Models of few tokens, for ids."""
    return both(IDS_CONFIG, 9)


@pytest.fixture(scope="module")
def folder(pair, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pair[0].save_pretrained(path)
    return str(path)


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


@torch.no_grad()
def documented_perplexity(model, ids, max_length, stride):
    """huggingface.co/docs/transformers/perplexity, window by window; the first `limit` of them."""
    total, count, end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        before, end = end, min(begin + max_length, ids.shape[1])
        window = ids[:, begin:end]
        labels = window.clone()
        labels[:, : before - begin] = -100
        scored = (labels != -100).sum().item() - 1
        if scored:
            total += model(window, labels=labels).loss.item() * scored
            count += scored
        if end == ids.shape[1]:
            break
    return math.exp(total / count)


@torch.no_grad()
def reference_loglikelihood(model, context, continuation):
    """Log-probability of a continuation from whole logits, and whether it is greedy's."""
    ids = torch.tensor([context + continuation])[:, -model.config.n_positions - 1 :]
    logits = model(ids[:, :-1]).logits.log_softmax(-1)[0, -len(continuation) :]
    target = ids[0, -len(continuation) :]
    return logits.gather(1, target[:, None]).sum().item(), torch.equal(logits.argmax(-1), target)


@pytest.mark.parametrize(
    ("length", "context", "stride"),
    [(2, None, 24), (48, None, 24), (49, None, 48), (150, None, 48), (150, None, 24), (101, 20, 7), (100, 9, 2)],
)
def test_perplexity_is_the_documented_value(small, length, context, stride):
    ours, theirs = small
    ids = torch.randint(IDS_CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(length))
    expected = documented_perplexity(theirs, ids, context or IDS_CONFIG.n_positions, stride)
    for batch_size in (1, 4):
        found = losses.perplexity(ours, ids[0], stride=stride, context=context, batch_size=batch_size)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-5)
        assert found["loss"] == pytest.approx(math.log(expected), rel=1e-6)
    windows = len(range(0, length, stride)) if stride == 48 else 1
    assert found["tokens"] == length - windows


def test_perplexity_with_a_limit_is_that_of_the_beginning(small):
    ids = torch.randint(IDS_CONFIG.vocab_size, (200,))
    whole = losses.perplexity(small[0], ids[: 48 + 2 * 24], stride=24)
    assert losses.perplexity(small[0], ids, stride=24, limit=3) == whole


def test_model_keeps_its_mode(small):
    for mode in (True, False):
        small[0].train(mode)
        losses.perplexity(small[0], list(range(9)))
        assert small[0].training is mode
    assert all(p.grad is None for p in small[0].parameters())


def test_loglikelihoods_and_greedy_are_transformers(small):
    ours, theirs = small
    generator = torch.Generator().manual_seed(5)
    pairs = []
    for i, length in enumerate([1, 3, 20, 44, 47, 60]):
        context = torch.randint(IDS_CONFIG.vocab_size, (length,), generator=generator).tolist()
        greedy, count = list(context), 1 + i % 3
        for _ in range(count):
            with torch.no_grad():
                greedy.append(theirs(torch.tensor([greedy[-IDS_CONFIG.n_positions :]])).logits[0, -1].argmax().item())
        pairs.append((context, greedy[length:]))
        pairs.append((context, [*greedy[length:-1], 7]))
    pairs.append(([], [11, 12]))
    sums, matches = losses.loglikelihoods(ours, pairs, batch_size=3, greedy=True)
    expected = [reference_loglikelihood(theirs, context or [5], continuation) for context, continuation in pairs]
    torch.testing.assert_close(sums, torch.tensor([e[0] for e in expected], dtype=torch.float64), rtol=1e-5, atol=1e-4)
    assert matches.tolist() == [e[1] for e in expected]
    assert 3 < sum(matches.tolist()) < len(pairs) - 3
    assert losses.loglikelihoods(ours, pairs[:2])[1] is None


def test_greedy_by_chunks(small, monkeypatch):
    pairs = [([i], [i + 1, 9]) for i in range(5)]
    whole = losses.loglikelihoods(small[0], pairs, greedy=True)
    monkeypatch.setattr(losses, "chunk_rows", lambda *_: 3)
    assert torch.equal(losses.loglikelihoods(small[0], pairs, greedy=True)[1], whole[1])


def hellaswag_by_hand(model, convention):
    """The endings chosen by acc and by acc_norm, from whole logits, the text of each convention spelt out."""
    tokenizer, chosen = get_tokenizer(), []
    for line in LINES:
        context, endings = line["ctx"], line["endings"]
        if convention == "lm_eval":
            context = f"{line['activity_label']}: {line['ctx_a']} {line['ctx_b'][0].upper()}{line['ctx_b'][1:]}"
            context = context.replace("[header] ", "").replace(" [title]", ".")
            endings = [e.replace("[substeps]", "").replace("  ", " ").replace(" [title]", ".") for e in endings]
        rows = [tokenizer.encode(" " + ending) for ending in endings]
        sums = np.array([reference_loglikelihood(model, tokenizer.encode(context), row)[0] for row in rows])
        by_tokens, by_characters = ([len(x) for x in of] for of in (rows, endings))
        lengths = by_tokens if convention == "llmc" else by_characters
        chosen.append([int(np.argmax(s)) for s in (sums, sums / lengths)])
    return np.array(chosen)


@pytest.mark.parametrize("convention", ["llmc", "lm_eval"])
def test_hellaswag_chooses_as_the_convention_does(pair, tmp_path, convention):
    """With labels set to what transformers' model chooses, the accuracy is 1: every choice is the same."""
    ours, theirs = pair
    choices = hellaswag_by_hand(theirs, convention)
    assert (choices[:, 0] != choices[:, 1]).any()
    for i, measure in enumerate(("acc", "acc_norm")):
        lines = [{**line, "label": str(choice)} for line, choice in zip(LINES, choices[:, i], strict=True)]
        path = write_lines(tmp_path / f"{i}.jsonl", [*lines[:3], "\n", *lines[3:]])
        found = tasks.hellaswag(ours, path, batch_size=(1, 5)[i])
        assert found[f"{convention}_{measure}"] == 1.0
        assert found[f"{convention}_{('acc_norm', 'acc')[i]}"] == (choices[:, 0] == choices[:, 1]).mean()
        assert found["examples"] == len(LINES)


def test_hellaswag_text_is_cleaned_as_lm_eval_does():
    example = tasks._hellaswag_example(WIKIHOW, "line 1")
    assert example.cleaned == (
        "Home and Garden: How to boil an egg. Fill a pot with water. Put the pot on the stove",
        [" Wait until it boils.", "and throw it away, far away.", "egg. egg", "naïvely."],
    )


def test_hellaswag_without_the_parts_is_llmc_alone(pair, tmp_path):
    lines = [{key: line[key] for key in ("ctx", "endings", "label")} for line in LINES]
    found = tasks.hellaswag(pair[0], write_lines(tmp_path / "a.jsonl", lines))
    assert set(found) == {"llmc_acc", "llmc_acc_norm", "examples"}
    whole = tasks.hellaswag(pair[0], write_lines(tmp_path / "b.jsonl", LINES))
    assert found["llmc_acc"] == whole["llmc_acc"]
    record = {"task": "hellaswag", "file": "a.jsonl", "measures": found}
    assert "lm-eval's two need activity_label" in tasks.table([record])


def test_lambada(pair, tmp_path):
    ours, theirs = pair
    path = write_lines(tmp_path / "lambada.jsonl", [{"text": text} for text in WORDS])
    expected = []
    for text in WORDS:
        context, word = text[: text.rindex(" ")], text[text.rindex(" ") :]
        expected.append(reference_loglikelihood(theirs, *map(get_tokenizer().encode, (context, word))))
    found = tasks.lambada(ours, path, batch_size=3)
    assert found["acc"] == np.mean([hit for _, hit in expected]) == 0.5
    assert found["perplexity"] == pytest.approx(math.exp(-np.mean([value for value, _ in expected])), rel=1e-4)
    assert found["examples"] == len(WORDS)
    assert tasks.lambada(ours, path, limit=2)["acc"] == 1.0


@pytest.mark.parametrize("header", [False, True], ids=["nanoGPT", "llm.c"])
def test_shard_loss(pair, tmp_path, header):
    ours, theirs = pair
    ids = np.random.default_rng(0).integers(0, 50257, 100).astype("<u2")
    words = np.zeros(256, dtype="<i4")
    words[:3] = 20240520, 1, len(ids)
    (tmp_path / "val.bin").write_bytes((words.tobytes() if header else b"") + ids.tobytes())
    data = tasks.load_tokens(tmp_path / "val.bin", context=24)
    windows = torch.from_numpy(ids.astype(np.int64)[:97]).unfold(0, 25, 24)  # four windows of 24 and the next token
    with torch.no_grad():
        logits = theirs(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    found = losses.dataset_loss(ours, data, batch_size=3)
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    assert found["tokens"] == 96
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_text_is_tokenised_as_transformers_does(tmp_path, monkeypatch):
    get_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.setattr(tasks, "_TEXT_PIECE", 20)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)(TEXT).input_ids
    assert tasks.encode_text(get_tokenizer(), tmp_path / "text.txt").tolist() == theirs
    assert 50256 in theirs


def test_command(pair, folder, tmp_path, capsys):
    """Every task in one call; the table and the JSON say what the functions do."""
    (tmp_path / "text.txt").write_text(TEXT)
    hellaswag = write_lines(tmp_path / "h.jsonl", LINES)
    lambada = write_lines(tmp_path / "l.jsonl", [{"text": text} for text in WORDS])
    out = tmp_path / "out.json"
    arguments = ["--text", str(tmp_path / "text.txt"), "--hellaswag", str(hellaswag), "--lambada", str(lambada)]
    arguments += ["--stride", "16", "--limit", "5", "--device", "cpu", "--json", str(out)]
    assert cli.main(["eval", folder, *arguments]) == 0
    printed = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert written["model"] == folder
    assert written["dtype"] == "float32"
    ids = tasks.encode_text(get_tokenizer(), tmp_path / "text.txt")
    expected = {
        "text": losses.perplexity(pair[0], ids, stride=16, limit=5),
        "hellaswag": tasks.hellaswag(pair[0], hellaswag, limit=5),
        "lambada": tasks.lambada(pair[0], lambada, limit=5),
    }
    assert {record["task"]: record["measures"] for record in written["results"]} == expected
    assert f"{expected['lambada']['acc']:.4f} ± 0.2887" in printed  # sqrt(0.5 * 0.5 / 3)
    for words in ("context 48, stride 16", "llm.c: ending of the lowest loss a token", "5 examples"):
        assert words in printed


def test_other_checkpoints_and_dtypes(pair, folder, tmp_path, capsys):
    ids = np.arange(100, dtype="<u2")
    ids.tofile(tmp_path / "val.bin")
    for target in ("ckpt.pt", "model.bin"):
        convert(folder, tmp_path / target)
    losses = []
    for model in (folder, str(tmp_path / "model.bin")):
        for dtype in ("float32", "bfloat16"):
            out = str(tmp_path / "out.json")
            command = ["eval", model, "--shard", str(tmp_path / "val.bin"), "--dtype", dtype, "--device", "cpu"]
            command += ["--json", out]
            assert cli.main(command) == 0, capsys.readouterr().err
            losses.append(json.loads((tmp_path / "out.json").read_text())["results"][0]["measures"]["loss"])
    assert losses[0] == losses[2]
    assert losses[1] == losses[3] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert tasks.load_model(str(tmp_path / "ckpt.pt")).config.n_embd == CONFIG.n_embd


BAD = {
    "hellaswag": [
        ("{\n", "line 2 is not a JSON object"),
        ("[1]\n", "line 2 is not a JSON object"),
        ({"ctx": "a", "label": 0}, "line 2 has no 'endings'; it has 'ctx', 'label'"),
        ({"endings": ["a", "b"], "label": 0}, "line 2 has no 'ctx'"),
        ({"ctx": 3, "endings": ["a", "b"], "label": 0}, "line 2: 'ctx' is 3; it must be a string"),
        ({"ctx": "a", "endings": ["a", "b"], "label": ""}, "line 2 has no 'label'; HellaSwag's test split"),
        ({"ctx": "a", "endings": ["a", "b"], "label": 2}, "line 2: 'label' is 2; it must be 0 to 1"),
        ({"ctx": "a", "endings": ["a"], "label": 0}, "line 2: 'endings' must be two or more"),
    ],
    "lambada": [
        ({"txt": "a b"}, "line 2 has no 'text'; it has 'txt'"),
        ({"text": ["a b"]}, "line 2: 'text' is ['a b']; it must be a string"),
        ({"text": "word"}, "line 2: 'text' has no last word"),
        ({"text": "ends in a space "}, "line 2: 'text' has no last word"),
    ],
}


@pytest.mark.parametrize(("task", "line", "words"), [(task, *case) for task, cases in BAD.items() for case in cases])
def test_bad_line_is_named(pair, tmp_path, task, line, words):
    good = {"hellaswag": LINES[0], "lambada": {"text": "a b"}}[task]
    path = write_lines(tmp_path / "data.jsonl", [good, line])
    with pytest.raises(ValueError) as error:
        getattr(tasks, task)(pair[0], path)
    assert f"{path} {words}" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_ending_too_long_is_named(pair, tmp_path):
    lines = [LINES[-1], {**LINES[-1], "endings": ["short", "far too long" * 30]}]
    path = write_lines(tmp_path / "a.jsonl", lines)
    with pytest.raises(
        ValueError, match=r"a\.jsonl line 2: what is to be scored has \d+ tokens; this model takes 1 to 48"
    ):
        tasks.hellaswag(pair[0], path)


def test_jsonl_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl line 1 is not a JSON object \(not UTF-8\)"):
        list(jsonl.read(tmp_path / "latin.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"cannot read .*none\.jsonl \(No such file"):
        list(jsonl.read(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "eval needs a file: --text, --hellaswag, --lambada, --shard"),
        (["--text", "no.txt"], "no.txt does not exist"),
        (["--text", "latin.txt"], "latin.txt is not UTF-8 text (byte 3)"),
        (["--text", "short.txt"], "short.txt has 1 tokens; perplexity needs at least 2"),
        (["--text", "a.txt", "--stride", "49"], "stride is 49; it must be 2 to the context, 48"),
        (["--text", "a.txt", "--context", "49"], "context is 49; the model takes 2 to its n_positions, 48"),
        (["--text", "a.txt", "--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
        (["--text", "a.txt", "--limit", "0"], "--limit is 0; it must be at least 1"),
        (["--lambada", "empty.jsonl"], "empty.jsonl is empty"),
        (["--lambada", "empty.jsonl", "--context", "8"], "--context goes with --text or --shard"),
        (["--shard", "big.bin", "--stride", "8"], "--stride goes with --text"),
        (["--shard", "big.bin"], "token id 50257"),
    ],
)
def test_bad_input_is_one_line(folder, tmp_path, monkeypatch, capsys, options, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "short.txt").write_text("one")
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "empty.jsonl").write_text("\n")
    np.full(99, 50257, dtype="<u2").tofile(tmp_path / "big.bin")
    assert cli.main(["eval", folder, *options, "--json", "out.json"]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert error.count("\n") == 0
    assert not (tmp_path / "out.json").exists()


def test_a_perplexity_beyond_float64_is_infinite():
    assert losses.exp(800.0) == math.inf
    assert losses.exp(2.0) == math.exp(2.0)


def test_another_vocabulary_is_refused(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(n_positions=8, n_embd=16, n_layer=1, n_head=1, vocab_size=61))
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a b"}])
    with pytest.raises(ValueError, match="vocab_size 61 and GPT-2's tokenizer 50257"):
        tasks.lambada(model, path)
    with pytest.raises(ValueError, match="pair 1: what is to be scored has 9 tokens; this model takes 1 to 8"):
        losses.loglikelihoods(model, [([1], [2]), ([1], [2] * 9)])
