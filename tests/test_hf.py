"""gpt2_fast.hf: transformers' classes, patched when made; values, files, Auto classes, Trainer, pipeline, PEFT."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from numerics import assert_same_bits

transformers = pytest.importorskip("transformers")

from test_patch import HEADS, MASKS, NO_DROPOUT, OUTPUTS, SIZES, assert_exact, build, ids, visible  # noqa: E402
from test_patch_ecosystem import tokenizer, train  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402

import gpt2_fast  # noqa: E402
from gpt2_fast import hf  # noqa: E402
from gpt2_fast.hf_patch import swap  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def pair(head="GPT2LMHeadModel", **options):
    """(transformers' own, gpt2_fast.hf's) models of the same weights."""
    theirs = build(head, **options)
    ours = getattr(hf, head)(copy.deepcopy(theirs.config)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("head", HEADS)
def test_every_class(head, tmp_path):
    """Values and gradients, files both ways, copies, and nothing that is left to transformers."""
    theirs, ours = pair(head)
    assert isinstance(ours, getattr(transformers, head))
    assert all(row.runs != "transformers" for row in swap.explain(ours))
    tokens = ids()

    def run(model):
        output = model(tokens, attention_mask=MASKS["left"])
        return {name: visible(output[name], MASKS["left"]) for name in OUTPUTS if output.get(name) is not None}

    assert_exact(theirs, ours, run)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [head]
    again = getattr(transformers, head).from_pretrained(tmp_path).eval()
    assert type(again.h[0] if head == "GPT2Model" else again.transformer.h[0]) is modeling_gpt2.GPT2Block
    assert_same_bits(run(again).values(), run(theirs).values())
    loaded = getattr(hf, head).from_pretrained(tmp_path).eval()
    for other in (loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(other) is type(ours)
        assert all(row.runs != "transformers" for row in swap.explain(other))
        assert_same_bits(run(other).values(), run(ours).values())
    assert type(gpt2_fast.unpatch(ours)) is getattr(transformers, head)


def test_every_name_that_transformers_has():
    """The import line of a script is all that changes."""
    for name in dir(transformers):
        if name.startswith("GPT2"):
            assert hasattr(hf, name), name
            assert (getattr(hf, name) is getattr(transformers, name)) == (name not in hf.__all__)
    assert {name for name in dir(modeling_gpt2) if name.startswith("GPT2For")} <= set(hf.__all__)
    assert inspect.signature(hf.GPT2Model.forward) == inspect.signature(transformers.GPT2Model.forward)
    with pytest.raises(AttributeError, match="module 'gpt2_fast.hf' has no attribute 'GPT2ForNothing'"):
        hf.GPT2ForNothing  # noqa: B018


def test_patch_gives_these_classes():
    model = gpt2_fast.patch(build())
    assert type(model) is hf.GPT2LMHeadModel
    other = type(model)(model.config)
    assert all(row.runs != "transformers" for row in swap.explain(other))


AUTO = {"AutoModel": "GPT2Model", "AutoModelForCausalLM": "GPT2LMHeadModel",
        "AutoModelForSequenceClassification": "GPT2ForSequenceClassification",
        "AutoModelForTokenClassification": "GPT2ForTokenClassification",
        "AutoModelForQuestionAnswering": "GPT2ForQuestionAnswering"}  # fmt: skip


def test_register(tmp_path):
    build().save_pretrained(tmp_path)
    config = transformers.GPT2Config(**SIZES)
    try:
        hf.register()
        hf.register()
        for auto, head in AUTO.items():
            assert type(getattr(transformers, auto).from_config(config)) is getattr(hf, head), auto
        assert type(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)) is hf.GPT2LMHeadModel
        generate = transformers.pipeline("text-generation", model=str(tmp_path), tokenizer=tokenizer(), device="cpu")
        assert type(generate.model) is hf.GPT2LMHeadModel
    finally:
        hf.unregister()
    for auto, head in AUTO.items():
        assert type(getattr(transformers, auto).from_config(config)) is getattr(transformers, head), auto


class Mine(hf.GPT2LMHeadModel):
    """A head of somebody's own, made from one of these."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = torch.nn.Parameter(torch.ones(config.vocab_size))

    def forward(self, input_ids=None, **kwargs):
        output = super().forward(input_ids=input_ids, **kwargs)
        output.logits = output.logits + self.bias
        return output


def test_a_class_of_somebodys_own(tmp_path):
    model, tokens = Mine(transformers.GPT2Config(**{**SIZES, **NO_DROPOUT})).eval(), ids()
    assert gpt2_fast.patch(model) is model
    plain = transformers.GPT2LMHeadModel(model.config).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits + 1)
    why = {row.module: row.why for row in swap.explain(model) if row.runs == "transformers"}
    assert why == {"(the model)": "its forward is test_hf.Mine.forward"}
    model.save_pretrained(tmp_path)
    assert torch.equal(Mine.from_pretrained(tmp_path).eval()(tokens).logits, model(tokens).logits)
    with pytest.raises(ValueError, match="test_hf.Mine is made from a class of gpt2_fast.hf and has no other"):
        gpt2_fast.unpatch(model)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    theirs, ours = pair()
    losses, evaluation, _ = train(theirs, tmp_path / "theirs")
    our_losses, our_evaluation, _ = train(ours, tmp_path / "ours")
    assert len(losses) == 4
    assert our_losses == pytest.approx(losses, rel=2e-5)
    assert our_evaluation == pytest.approx(evaluation, rel=2e-5)


def test_generate_pipeline_and_lora():
    theirs, ours = pair()
    tokens = ids()
    assert torch.equal(*(m.generate(tokens, attention_mask=MASKS["left"], max_new_tokens=5) for m in (theirs, ours)))
    texts = [
        transformers.pipeline("text-generation", model=m, tokenizer=tokenizer(), device="cpu")(
            ["w5 w6", "w7"], max_new_tokens=4, do_sample=False, batch_size=2
        )
        for m in (theirs, ours)
    ]
    assert texts[0] == texts[1]
    peft = pytest.importorskip("peft")
    gradients = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert gradients[0][0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=5e-5, atol=5e-6)


def test_without_transformers():
    code = "import sys; sys.modules['transformers'] = None\nimport gpt2_fast.hf"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1].startswith("ImportError: gpt2_fast.hf needs transformers; run: pip install tr")


@pytest.mark.parametrize("where", [torch.no_grad, torch.inference_mode])
def test_logits_read_without_gradients_still_have_them(where):
    """A metric that is taken first must not take the gradient from the loss that is made of the same logits."""
    tokens, gradients = ids(), []
    for model in pair():
        output = model(tokens, labels=tokens)
        with where():
            assert output.logits.requires_grad
        output.logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_logits_are_of_the_weights_of_their_call():
    """Those given for that call alone, those of before the head was replaced; moved ones are refused."""
    tokens, found = ids(), []
    for model in pair():
        given = {name: p.detach() * 1.5 for name, p in model.named_parameters()}
        given["lm_head.weight"] = given["transformer.wte.weight"]
        functional = torch.func.functional_call(model, given, (tokens,), {"labels": tokens})
        replaced = model(tokens, labels=tokens)
        before = model.lm_head.weight
        model.lm_head.weight = torch.nn.Parameter(before.detach() * 2)
        found.append((functional.logits.detach(), replaced.logits.detach()))
        model.lm_head.weight = before
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    output = model(tokens, labels=tokens)
    model.lm_head.weight.data = before.detach() * 2
    with pytest.raises(RuntimeError, match="the head has changed since this output was computed"):
        output.logits  # noqa: B018


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "kind", [modeling_gpt2.GPT2MLP, modeling_gpt2.GPT2Attention, modeling_gpt2.GPT2Block, torch.nn.LayerNorm], ids=str
)
def test_a_class_that_somebody_changed_runs_as_it_was_changed(kind, wrapped, monkeypatch):
    """As programs do that put kernels of their own into transformers or torch."""
    theirs, ours = pair()
    tokens, plain = ids(), kind.forward

    def doubled(self, *args, **kwargs):
        found = plain(self, *args, **kwargs)
        return (found[0] * 2, *found[1:]) if isinstance(found, tuple) else found * 2

    with torch.no_grad():
        before = ours(tokens).logits
        monkeypatch.setattr(kind, "forward", functools.wraps(plain)(doubled) if wrapped else doubled)
        found, expected = ours(tokens).logits, theirs(tokens).logits
        assert not torch.allclose(found, before, rtol=1e-3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert any(row.runs == "transformers" for row in swap.explain(ours))


def test_attention_that_says_it_is_not_causal_is_not():
    (theirs, ours), tokens = pair(), ids()
    with torch.no_grad():
        causal = theirs(tokens).logits
        for model in (theirs, ours):
            model.transformer.h[0].attn.is_causal = False
        found = ours(tokens).logits
        torch.testing.assert_close(found, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
        if not transformers.__version__.startswith("4."):  # which makes a causal mask all the same
            assert not torch.allclose(found, causal, rtol=1e-3)


def test_hooks_of_all_modules_hear_every_call():
    heard, tokens = [], ids()
    for model in pair():
        calls = []
        handle = torch.nn.modules.module.register_module_forward_hook(lambda m, *_, calls=calls: calls.append(type(m)))
        with handle, torch.no_grad():
            model(tokens)
        heard.append([cls.__mro__[1] if cls in hf.ORIGINAL else cls for cls in calls])
    leaves = [[cls for cls in calls if cls.__module__ != modeling_gpt2.__name__ and "gpt2_fast" not in cls.__module__]
              for calls in heard]  # fmt: skip
    assert leaves[0] == leaves[1]
    assert len(leaves[0]) > 10


class Locked(modeling_gpt2.GPT2LMHeadModel):
    """Of somebody who keeps what cannot be copied."""

    def __init__(self, config):
        super().__init__(config)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_class_that_says_how_it_is_copied_is_copied_so():
    model = gpt2_fast.patch(Locked(build("GPT2LMHeadModel").config).eval())
    copied, tokens = copy.deepcopy(model), ids()
    assert copied.lock is not model.lock
    with torch.no_grad():
        assert_same_bits([copied(tokens).logits], [model(tokens).logits], "a copy")
