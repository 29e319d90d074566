"""README.md and docs/ hold: rows, Python, commands and links.

Every row of the table of docs/migrate.md runs, both sides where transformers is the left one. A row runs as it is
written, in a folder that has what it names: gpt2/, out/ckpt.pt, gpt2_124M.bin, data/*.bin, my.txt,
hellaswag_val.jsonl and lambada_test.jsonl, of a tiny model.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_eval
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

import gpt2_fast
from gpt2_fast import cli, config
from gpt2_fast.checkpoint import convert
from gpt2_fast.data import load_data, load_tokens
from gpt2_fast.data.tokenizer import get_tokenizer
from gpt2_fast.ops.packed_int4 import LEVELS, quantised

ROOT = Path(__file__).parent.parent
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))}
BITSANDBYTES = 'from_pretrained("gpt2", quantization_config=BitsAndBytesConfig(load_in_{}bit=True))'
SIZES = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]


def table() -> list[tuple[str, str]]:
    section = PAGES["docs/migrate.md"].split("\n## ")[0]
    cells = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [(row[0], row[1].rstrip("| ")) for row in cells[2:] if not row[0].startswith("**")]


def spans(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def run(code: str, **names):
    """The value of an expression, or of the name that a statement binds."""
    tree = ast.parse(code)
    if isinstance(tree.body[0], ast.Expr):
        return eval(code, names)
    exec(code, names)
    target = tree.body[0].targets[0].id if isinstance(tree.body[0], ast.Assign) else tree.body[0].names[0].name
    return names[target]


def command(text: str, *more: str) -> None:
    words = shlex.split(text)
    assert words[0] == "gpt2-fast"
    assert cli.main([*words[1:], *more]) == 0, text


def a_model(folder, **more):
    """transformers' model of wide random weights in a folder, the tokenizer beside it."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, **NO_DROPOUT, **more)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    get_tokenizer().save_pretrained(folder, model_max_length=SIZES["n_positions"])
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder, with the models in it: `hf`, and `erf`, nanoGPT's."""
    root = tmp_path_factory.mktemp("readme")
    torch.manual_seed(7)
    hf, erf = a_model(root / "gpt2"), a_model(root / "erf", activation_function="gelu")
    convert.convert(root / "erf", root / "out/ckpt.pt")
    convert.convert(root / "gpt2", root / "gpt2_124M.bin")
    (root / "data").mkdir()
    for name in ("train", "val"):
        np.random.default_rng(len(name)).integers(0, 50257, 400).astype("<u2").tofile(root / f"data/{name}.bin")
    (root / "my.txt").write_text("She sells sea shells — by the sea shore.\n" * 20)
    test_eval.write_lines(root / "hellaswag_val.jsonl", test_eval.LINES)
    test_eval.write_lines(root / "lambada_test.jsonl", [{"text": text} for text in test_eval.WORDS])
    return SimpleNamespace(root=root, hf=hf, erf=erf)


@pytest.fixture
def world(made, monkeypatch, capsys):
    monkeypatch.chdir(made.root)
    monkeypatch.setenv("GPT2_FAST_CACHE", str(made.root / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # both sides on one device: the CPU
    ours = gpt2_fast.GPT2LMHeadModel.from_pretrained("gpt2")
    ids = torch.randint(50257, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return SimpleNamespace(
        **vars(made), ours=ours, capsys=capsys,
        names={"input_ids": ids, "mask": mask, "labels": ids.masked_fill(mask == 0, -100)},
    )  # fmt: skip


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def same_state(ours, theirs):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def imports(world, left, right):
    assert run(*left) is transformers.GPT2LMHeadModel
    assert run(*right) is gpt2_fast.GPT2LMHeadModel


def loads(world, left, right):
    same_state(run(*left, GPT2LMHeadModel=gpt2_fast.GPT2LMHeadModel), run(*left, GPT2LMHeadModel=type(world.hf)))


def calls(world, left, right):
    close(run(*left, model=world.ours, **world.names), run(*left, model=world.hf, **world.names))


def takes_state(world, left, right):
    for other in (world.hf, copy.deepcopy(world.ours)):
        model = gpt2_fast.GPT2LMHeadModel(world.ours.config)
        run(*left, model=model, other=other)
        same_state(model, other)


def saves(world, left, right):
    run(*left, model=world.ours)
    same_state(transformers.GPT2LMHeadModel.from_pretrained("tuned"), world.hf)


def clips_and_steps(world, left, right):
    sides = []
    for lines, AdamW in ((left, torch.optim.AdamW), (right, gpt2_fast.AdamW)):
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 40)), torch.nn.Parameter(torch.eye(5))]
        for p in params:
            p.grad = p.detach() * 3 + 1
        for line in lines:
            run(line, params=params, AdamW=AdamW, clip_grad_norm_=clip_grad_norm_)
        sides.append(params)
    torch.testing.assert_close(*sides, rtol=1e-6, atol=1e-7)
    assert not torch.equal(sides[0][1], torch.eye(5))


def crosses_entropy(world, left, right):
    sides = []
    for (line,) in (left, right):
        torch.manual_seed(1)
        hidden, weight = torch.randn(7, 16, requires_grad=True), torch.randn(30, 16, requires_grad=True)
        loss = run(line, hidden=hidden, weight=weight, labels=torch.arange(7), cross_entropy=cross_entropy,
                   gpt2_fast=gpt2_fast)  # fmt: skip
        loss.backward()
        sides.append((loss, hidden.grad, weight.grad))
    close(*sides)


def generates(world, left, right):
    ours, theirs = (run(*left, model=m, **world.names) for m in (world.ours, world.hf))
    assert ours.tolist() == theirs.tolist()
    assert ours.shape[1] == 17


def trains_with_trainer(world, left, right):
    losses = []
    for lines in ([], right):
        model = transformers.GPT2LMHeadModel.from_pretrained("gpt2")
        arguments = transformers.TrainingArguments(
            "trainer", max_steps=3, per_device_train_batch_size=2, report_to=[], save_strategy="no", learning_rate=1e-2
        )
        dataset = [{"input_ids": row, "labels": row} for row in torch.arange(48).view(6, 8)]
        for line in lines:
            run(line, gpt2_fast=gpt2_fast, model=model)
        names = {"Trainer": transformers.Trainer, "model": model, "arguments": arguments, "dataset": dataset}
        losses.append(run(*left, **names).training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def printed(world, line, *more):
    world.capsys.readouterr()
    command(line, *more)
    return world.capsys.readouterr().out


def pipes(world, left, right):
    expected = run(*left, pipeline=transformers.pipeline)[0]["generated_text"]
    assert printed(world, *right) == expected + "\n"


def to_int8(matrix):
    """127 steps either side, a scale an output."""
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return (matrix / scale).round() * scale


def to_int4(matrix):
    """16 levels, a scale for 32 inputs."""
    codes, scales = quantised(matrix)
    return LEVELS.float()[codes.long()] * scales.float().repeat_interleave(32, 1)


def generates_rounded(rounding, world, left, right):
    """Greedy text is that of transformers' model, every matrix rounded."""
    rounded = copy.deepcopy(world.hf)
    for name, weight in rounded.named_parameters():
        if weight.ndim == 2 and "wpe" not in name:
            by_output = weight.data if "wte" in name else weight.data.t()  # Conv1D keeps [in, out]
            by_output.copy_(rounding(by_output))
    ids = torch.tensor([get_tokenizer().encode("Hello, I'm")])
    expected = rounded.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=50256)[0]
    assert printed(world, *right) == get_tokenizer().decode(expected) + "\n"


def evaluated(line):
    command(line, "--json", "results.json")
    return {r["task"]: r["measures"] for r in json.loads(Path("results.json").read_text())["results"]}


def measures_perplexity(world, left, right):
    ids = torch.tensor([get_tokenizer().encode(Path("my.txt").read_text())])
    expected = test_eval.documented_perplexity(world.hf, ids, 64, 32)
    assert evaluated(*right)["text"]["perplexity"] == pytest.approx(expected, rel=1e-4)


def measures_tasks(world, left, right):
    found, labels = evaluated(*right), [int(line["label"]) for line in test_eval.LINES]
    choices = test_eval.hellaswag_by_hand(world.hf, "lm_eval")
    assert found["hellaswag"]["lm_eval_acc"] == np.mean(choices[:, 0] == labels)
    assert found["hellaswag"]["lm_eval_acc_norm"] == np.mean(choices[:, 1] == labels)
    values = []
    for text in test_eval.WORDS:
        cut = text.rindex(" ")
        ids = map(get_tokenizer().encode, (text[:cut], text[cut:]))
        values.append(test_eval.reference_loglikelihood(world.hf, *ids)[0])
    assert found["lambada"]["perplexity"] == pytest.approx(np.exp(-np.mean(values)), rel=1e-3)


def is_nanogpt(world, left, right):
    names: dict = {}
    exec(right[0], names)
    checkpoint = torch.load("out/ckpt.pt")
    model = names["GPT"](names["GPTConfig"](**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    ids = world.names["input_ids"]
    logits, loss = model(ids[:, :-1], ids[:, 1:])
    theirs = world.erf(ids, labels=ids)
    close(loss, theirs.loss)
    close(logits.tensor, theirs.logits[:, :-1])


@torch.no_grad()
def window_loss(model, data):
    x, y = next(data.windows(batch_size=100))
    return cross_entropy(model(x).logits.flatten(0, 1), y.flatten()).item()


def trains(start):
    """Starts from those weights, by the validation loss before the first step, and leaves what transformers loads."""

    def check(world, left, right):
        out = f"run-{abs(hash(right[0]))}"
        small = ["--steps", "1", "--batch-size", "2", "--context", "16", "--eval-batches", "100", "--device", "cpu"]
        command(right[0], *small, "--out", out)
        records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        data = load_data(shlex.split(right[0])[shlex.split(right[0]).index("--data") + 1], context=16)[1]
        before, after = (record["val_loss"] for record in records if "val_loss" in record)
        assert before == pytest.approx(window_loss(getattr(world, start), data), rel=1e-4)
        tuned = transformers.GPT2LMHeadModel.from_pretrained(f"{out}/checkpoint").eval()
        assert after == pytest.approx(window_loss(tuned, data), rel=1e-4)
        assert after != before

    return check


def samples_nanogpt(world, left, right):
    command(right[0])
    ids = torch.tensor([get_tokenizer().encode("Hello, I'm")])
    expected = world.erf.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=50256)[0]
    assert printed(world, right[1], *GREEDY) == get_tokenizer().decode(expected) + "\n"


def exports(world, left, right):
    command(right[0])
    same_state(transformers.GPT2LMHeadModel.from_pretrained("exported"), world.hf)


def writes_llmc(world, left, right):
    command(right[0])
    same_state(SimpleNamespace(state_dict=lambda: convert.load("written.bin").state), world.hf)
    assert Path("written.bin").read_bytes()[:8] == np.array([20240326, 3], dtype="<i4").tobytes()


def measures_shard(world, left, right):
    data = load_tokens("data/val.bin", context=64)
    assert evaluated(*right)["shard"]["loss"] == pytest.approx(window_loss(world.hf, data), rel=1e-4)


CHECKS = {
    "from transformers import GPT2LMHeadModel": imports,
    'model = GPT2LMHeadModel.from_pretrained("gpt2")': loads,
    "loss = model(input_ids, labels=labels, attention_mask=mask).loss": calls,
    "logits = model(input_ids).logits": calls,
    "model.load_state_dict(other.state_dict())": takes_state,
    'model.save_pretrained("tuned")': saves,
    "clip_grad_norm_(params, 1.0)": clips_and_steps,
    "cross_entropy(hidden @ weight.t(), labels)": crosses_entropy,
    "ids = model.generate(input_ids, max_new_tokens=8, do_sample=False)": generates,
    "Trainer(model, arguments, train_dataset=dataset).train()": trains_with_trainer,
    'pipeline("text-generation", "gpt2")("Hello, I\'m", max_new_tokens=8, do_sample=False)': pipes,
    BITSANDBYTES.format(8): partial(generates_rounded, to_int8),
    BITSANDBYTES.format(4): partial(generates_rounded, to_int4),
    'the loop of its "Perplexity of fixed-length models"': measures_perplexity,
    "lm_eval --model hf --model_args pretrained=gpt2 --tasks hellaswag,lambada_openai": measures_tasks,
    "from model import GPT, GPTConfig": is_nanogpt,
    "python train.py config/finetune_shakespeare.py": trains("hf"),
    "python train.py --init_from=resume --out_dir=out": trains("erf"),
    'python sample.py --start="Hello, I\'m"': samples_nanogpt,
    './train_gpt2cu -e gpt2_124M.bin -i "data/train*.bin" -j "data/val*.bin"': trains("hf"),
    "python dev/eval/export_hf.py -i gpt2_124M.bin -o exported -d float32": exports,
    "python train_gpt2.py --write_tensors 1": writes_llmc,
    "train_gpt2cu": measures_shard,
}


@pytest.mark.parametrize(("left", "right"), table(), ids=[str(i) for i, _ in enumerate(table(), start=1)])
def test_row(world, left, right):
    key = (spans(left) or [left])[0]
    assert key in CHECKS, f"the row {left!r} of docs/migrate.md has no test"
    CHECKS[key](world, spans(left), spans(right))


def test_every_check_has_its_row():
    assert [(spans(left) or [left])[0] for left, _ in table()] == list(CHECKS)


def blocks(page: str, language: str) -> list[str]:
    fenced = PAGES[page].split("```")[1::2]
    return [block.split("\n", 1)[1] for block in fenced if block.split("\n", 1)[0] == language]


# What declares an op runs in a process of its own, where it is in nobody's table.
WITH_PYTHON = sorted(page for page in PAGES if blocks(page, "python") and page != "docs/add-an-op.md")


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python_blocks_run(page, made, monkeypatch):
    """In order, in one namespace; "gpt2" is tiny."""
    monkeypatch.chdir(made.root)
    monkeypatch.setenv("GPT2_FAST_CACHE", str(made.root / "cache"))
    monkeypatch.setitem(config.PRESETS, "gpt2", SIZES)
    names = {}
    for block in blocks(page, "python"):
        exec(block, names)
    assert "loss" not in names or names["loss"].isfinite()


def test_the_pages_that_show_how_have_python():
    shown = ("evaluate", "generate", "look-inside", "migrate", "patch", "scale", "train")
    assert ["README.md", *(f"docs/{page}.md" for page in shown)] == WITH_PYTHON


DECLARED = """
import sys, types, torch
room = types.ModuleType("softcap")
exec(sys.stdin.read(), vars(room))
from gpt2_fast.ops.runtime import cpp

def forward(out, a):
    assert a.x.is_contiguous() and a.N * a.C == a.x.numel()
    out.y.copy_(a.cap * torch.tanh(a.x / a.cap))

def backward(out, a):
    out.dx.copy_(a.dy * (1 - (a.y / a.cap) ** 2))

cpp.softcap_forward, cpp.softcap_backward = forward, backward
torch.library.opcheck(room.OP.forward_op, (torch.randn(2, 3), 1.0, True, "cpp"))
for x, options in room.samples():
    for x in (x, x[..., :1].expand_as(x)):
        found = []
        for impl in ("cpp", "reference"):
            t = x.clone().requires_grad_() if x.is_contiguous() else x.detach().requires_grad_()
            y = room.softcap(t, **options, impl=impl)
            (y * torch.arange(y.shape[-1])).sum().backward()
            found.append((y, t.grad))
        torch.testing.assert_close(*found)
try:
    room.softcap(x, cap=0.0)
except ValueError:
    print("declared")
"""


def test_the_op_of_add_an_op_is_declared_as_it_stands():
    """Its kernels' places are taken by PyTorch: what the page shows of C++ is not built here."""
    (code,) = blocks("docs/add-an-op.md", "python")
    done = subprocess.run([sys.executable, "-c", DECLARED], input=code, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "declared\n", done.stderr


def test_commands_parse():
    lines = [line for page in PAGES for block in blocks(page, "") for line in block.splitlines()]
    lines = [line for line in lines if line.startswith("gpt2-fast ")]
    assert len(lines) > 10
    for line in lines:
        cli.parser().parse_args(shlex.split(line, comments=True)[1:])


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 130


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.*)", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


DOCUMENTS = sorted({*PAGES, *(str(p.relative_to(ROOT)) for g in ("*.md", "benchmarks/*.md") for p in ROOT.glob(g))})


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{page} links to {target}"
