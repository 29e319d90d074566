"""gpt2_fast.patch: a transformers GPT-2 on this package's operations gives transformers' values, gradients and text."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from numerics import assert_as_exact, assert_same_bits

transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface  # noqa: E402
from transformers.cache_utils import DynamicCache  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gpt2 import modeling_gpt2  # noqa: E402

import gpt2_fast  # noqa: E402
from gpt2_fast import cli  # noqa: E402
from gpt2_fast.hf_patch import attention, modules, swap  # noqa: E402
from gpt2_fast.ops.attention import attention_reference  # noqa: E402
from gpt2_fast.ops.runtime import philox  # noqa: E402
from gpt2_fast.report import doctor  # noqa: E402

B, T, V = 3, 11, 97
SIZES = {"vocab_size": V, "n_positions": 40, "n_embd": 48, "n_head": 3, "n_layer": 2, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "num_labels": 3}  # fmt: skip
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "classifier_dropout": 0.0,
              "summary_first_dropout": 0.0}  # fmt: skip
LEFT = torch.tensor([[0] * 4 + [1] * 7, [1] * 11, [0] + [1] * 10])
RIGHT = LEFT.flip(1)
MASKS = {"no mask": None, "left": LEFT, "right": RIGHT}
HEADS = ["GPT2LMHeadModel", "GPT2Model", "GPT2ForSequenceClassification", "GPT2ForTokenClassification",
         "GPT2ForQuestionAnswering", "GPT2DoubleHeadsModel"]  # fmt: skip
OUTPUTS = ("logits", "last_hidden_state", "start_logits", "end_logits", "mc_logits")


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """These models are too small for more: waiting for each other is all that threads would do."""
    threads(1)


def build(head="GPT2LMHeadModel", attention="sdpa", **options):
    config = transformers.GPT2Config(**{**SIZES, **NO_DROPOUT, **options}, attn_implementation=attention)
    model = getattr(transformers, head)(config)
    for parameter in model.parameters():  # zero biases would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pair(*args, **options):
    """(unpatched, patched) models of the same weights."""
    model = build(*args, **options)
    return copy.deepcopy(model), gpt2_fast.patch(model)


def ids(batch=B, time=T):
    return torch.randint(3, V, (batch, time))


def values_and_gradients(model, run):
    """{name: tensor} of what run(model) gives, and of the gradients of their random combination."""
    named = run(model)
    generator = torch.Generator().manual_seed(5)
    total = sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in named.values())
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return named | {f"d{n}": g for n, g in zip(parameters, gradients, strict=True) if g is not None}


def assert_exact(unpatched, patched, run, dtype=torch.float32):
    """Values and gradients of `patched` are as near to float64 as the unpatched model's."""
    truth = values_and_gradients(copy.deepcopy(unpatched).double(), run)
    eager, actual = values_and_gradients(unpatched, run), values_and_gradients(patched, run)
    assert truth.keys() == eager.keys() == actual.keys()
    for name in truth:
        assert actual[name].dtype == eager[name].dtype, name
        assert_as_exact(actual[name], eager[name], truth[name], name, dtype)


def visible(t, mask):
    """What a mask leaves defined; transformers and gpt2_fast differ at padding."""
    return t if mask is None or t.ndim < 2 or t.shape[:2] != mask.shape else t[mask.bool()]


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("head", HEADS)
def test_every_head(head, masked):
    tokens, mask, types = ids(), MASKS[masked], ids()

    def run(model):
        output = model(tokens, attention_mask=mask, token_type_ids=types)
        return {name: visible(output[name], mask) for name in OUTPUTS if output.get(name) is not None}

    unpatched, patched = pair(head)
    assert any(row.runs != "transformers" for row in swap.explain(patched))
    assert_exact(unpatched, patched, run)


@pytest.mark.parametrize(
    "options",
    [{}, {"tie_word_embeddings": False}, {"attention": "eager", "scale_attn_by_inverse_layer_idx": True},
     {"attention": "eager", "scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True},
     {"n_inner": 50, "activation_function": "gelu_pytorch_tanh"}, {"activation_function": "relu"}, {"n_head": 6}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("masked", ["no mask", "left"])
def test_the_loss_and_every_gradient(options, masked):
    tokens, mask = ids(), MASKS[masked]
    labels = tokens.clone()
    if mask is not None:  # the first token's label would be scored at padding
        labels[mask == 0] = -100
        labels[:, 1:][mask[:, :-1] == 0] = -100

    def run(model):
        if model.dtype == torch.float64:  # transformers' own loss is float32
            logits = model(tokens, attention_mask=mask).logits[:, :-1]
            return {"loss": F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}
        return {"loss": model(tokens, attention_mask=mask, labels=labels).loss}

    assert_exact(*pair(**options), run)


def test_what_the_loss_takes():
    unpatched, patched = pair()
    tokens, shifted = ids(), ids()
    for more in ({"num_items_in_batch": torch.tensor(50)}, {"num_items_in_batch": 17}, {"ignore_index": 5},
                 {"shift_labels": shifted}):  # fmt: skip
        options = {"labels": tokens, **more}
        expected, actual = unpatched(tokens, **options).loss, patched(tokens, **options).loss
        assert type(patched(tokens, **options)).__module__ == "gpt2_fast.hf_patch.outputs"
        torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


READS = [
    lambda o: o.logits, lambda o: o["logits"], lambda o: o[1], lambda o: o[:2][1], lambda o: o.to_tuple()[1],
    lambda o: dict(o)["logits"], lambda o: dict(o.items())["logits"], lambda o: o.get("logits"),
    lambda o: list(o.values())[1], lambda o: pickle.loads(pickle.dumps(o))[1],
    lambda o: (o.move_to_end("loss"), o[0], o.move_to_end("loss", last=False))[1],
    lambda o: (popped := copy.copy(o), popped.move_to_end("logits"), popped.popitem()[1])[2],
]  # fmt: skip


def test_logits_are_computed_when_asked_for():
    unpatched, patched = pair()
    calls, tokens = [], ids()
    product = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(torch.nn.functional, "linear", lambda *a: calls.append(1) or product(*a))
        output = patched(tokens, labels=tokens)
        assert output["loss"] is output.loss is output[0] is output.get("loss")
        output.loss.backward()
        assert not calls
        expected = unpatched(tokens, labels=tokens)
        calls.clear()
        for read in READS:
            with torch.no_grad():
                output = patched(tokens, labels=tokens)
                torch.testing.assert_close(read(output), expected.logits)
            assert list(output) == list(expected)
            assert output.logits is output.logits
        assert len(calls) == len(READS)
    for raw in (lambda o: vars(o)["logits"], lambda o: dict.__getitem__(o, "logits")):
        taken = raw(patched(tokens, labels=tokens))
        for use in (lambda t: t.argmax(-1), lambda t: t[:, -1], lambda t: t * 2, torch.argmax, lambda t: tokens == t):
            refused = pytest.raises((AttributeError, RuntimeError, TypeError), match="LogitsNotComputedYet|read output")
            with refused:
                use(taken)
    for write in (lambda weight: weight.detach().mul_(2), lambda weight: weight.data.mul_(2)):  # one is counted
        output = patched(tokens, labels=tokens)
        write(patched.lm_head.weight)
        with pytest.raises(RuntimeError, match="patched model: the head has changed since this output was computed"):
            output.logits  # noqa: B018
    with torch.no_grad():
        output = patched(tokens, labels=tokens, output_hidden_states=True)
        output.hidden_states[-1].mul_(2)
    with pytest.raises(RuntimeError, match="patched model: the hidden states have changed since"):
        output.logits  # noqa: B018


@pytest.mark.parametrize("masked", ["no mask", "left"])
@pytest.mark.parametrize(
    "options",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3}, {"cache_implementation": "static"},
     {"use_cache": False}, {"prompt_lookup_num_tokens": 2}, {"repetition_penalty": 1.3}],
    ids=str,
)  # fmt: skip
def test_generate(options, masked):
    unpatched, patched = pair()
    batch = 1 if "prompt_lookup_num_tokens" in options else B
    tokens, mask = ids(batch), None if MASKS[masked] is None else MASKS[masked][:batch]
    texts = []
    for model in (unpatched, patched):
        torch.manual_seed(3)
        texts.append(model.generate(tokens, attention_mask=mask, max_new_tokens=9, **options))
    assert texts[0].shape[1] > T
    assert torch.equal(*texts)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_makes_no_square_mask(attention, monkeypatch):
    unpatched, patched = pair(attention=attention)

    def square(**_):
        raise AssertionError("a [B, 1, T, T] mask")

    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, attention, square)
    tokens = ids()
    with pytest.raises(AssertionError, match="T, T"):
        unpatched(tokens, attention_mask=LEFT)
    for use_cache in (False, True):
        patched(tokens, attention_mask=LEFT, use_cache=use_cache, labels=tokens).loss.backward()
        patched.generate(tokens, attention_mask=LEFT, max_new_tokens=4, use_cache=use_cache)


def test_a_cache_by_hand():
    """Several tokens on top of a past, one with gradients, and a past whose rows have holes."""
    unpatched, patched = pair()
    tokens, holes = ids(), torch.ones(B, T, dtype=torch.long)
    holes[1, 3] = holes[2, 5] = 0
    for mask, grad in ((None, True), (LEFT, False), (holes, False), (holes, True)):
        outputs = []
        for model in (unpatched, patched):
            with torch.set_grad_enabled(grad):
                past = DynamicCache(config=model.config)
                first = model(tokens[:, :6], attention_mask=None if mask is None else mask[:, :6], past_key_values=past)
                second = model(tokens[:, 6:10], attention_mask=None if mask is None else mask[:, :10],
                               past_key_values=first.past_key_values)  # fmt: skip
                last = model(tokens[:, 10:], attention_mask=mask, past_key_values=second.past_key_values)
            outputs.append((second.logits, last.logits))
        for expected, actual in zip(*outputs, strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


def test_a_block_takes_its_cache_by_each_name_that_transformers_takes():
    """transformers 5.24 calls past_key_values cache, and still takes the old name."""
    (unpatched, patched), tokens = pair(), ids()
    names = {"cache"} & inspect.signature(modeling_gpt2.GPT2Block.forward).parameters.keys()
    with torch.no_grad():
        for name in {"past_key_values", *names}:
            outputs = []
            for model in (unpatched, patched):
                past, x = DynamicCache(config=model.config), model.transformer.wte(tokens)
                for part in (x[:, :6], x[:, 6:7]):
                    out = model.transformer.h[0](part, **{name: past})
                assert past.get_seq_length() == 7
                outputs.append(out[0] if isinstance(out, tuple) else out)
            torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-5, atol=2e-5)


def test_an_argument_that_a_block_does_not_know_goes_to_transformers(monkeypatch):
    """As past_key_values would under a new name: the result is transformers', not that of a call without it."""
    (unpatched, patched), tokens = pair(), ids()
    monkeypatch.setattr(modules, "STRANGE", {modules.CACHE})
    monkeypatch.setattr(attention, "attend", None)
    expected, actual = (m.generate(tokens, max_new_tokens=4, do_sample=False) for m in (unpatched, patched))
    assert torch.equal(actual, expected)


def test_documents_packed_into_a_row():
    """position_ids that start again, as transformers finds them; with a cache it does not, and neither do we."""
    unpatched, patched = pair()
    tokens, positions = ids(), torch.cat([torch.arange(5), torch.arange(6)])[None].expand(B, -1)
    for use_cache in (False, True):
        assert_exact(unpatched, patched, lambda m: {"l": m(tokens, position_ids=positions, use_cache=use_cache).logits})  # noqa: B023
    alone = patched(tokens[:, 5:]).logits
    together = patched(tokens, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[:, 5:], alone)


def test_calls_that_stay_with_transformers():
    unpatched, patched = pair(attention="eager")
    tokens = ids()
    square = torch.ones(T, T).tril().bool()[None, None].expand(B, 1, T, T).clone()
    square[:, :, 5:, 2] = False
    additive = torch.zeros(B, 1, T, T).masked_fill(~square, torch.finfo(torch.float32).min)
    calls = [{"output_hidden_states": True}, {"output_attentions": True}, {"inputs_embeds": torch.randn(B, T, 48)},
             {"attention_mask": additive}, {"return_dict": False}]  # fmt: skip
    if transformers.__version__.startswith("4"):
        calls.append({"head_mask": torch.tensor([[1.0, 0.0, 1.0], [0.5, 1.0, 1.0]])})
    for options in calls * 2:
        given = {} if "inputs_embeds" in options else {"input_ids": tokens}
        expected, actual = unpatched(**given, **options), patched(**given, **options)
        if isinstance(expected, tuple):
            torch.testing.assert_close(actual[0], expected[0])
            continue
        assert list(actual) == list(expected)
        for name in ("logits", "hidden_states", "attentions"):
            if expected.get(name) is not None:
                torch.testing.assert_close(actual[name], expected[name], rtol=2e-5, atol=2e-5)
    assert patched.config._attn_implementation == "eager"


def test_cross_attention_stays_with_transformers():
    unpatched, patched = pair(add_cross_attention=True)
    encoder, mask = torch.randn(B, 5, 48), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    tokens = ids()
    options = {"encoder_hidden_states": encoder, "encoder_attention_mask": mask, "attention_mask": LEFT}
    expected, actual = (model(tokens, **options).logits[LEFT.bool()] for model in (unpatched, patched))
    torch.testing.assert_close(actual, expected)
    rows = [row for row in swap.explain(patched) if row.part in ("block", "attention")]
    assert [row.why for row in rows] == ["the model has cross-attention"] * 2


class PhiloxDropout(torch.nn.Module):
    """The dropout of one site, in the place of a module of transformers'."""

    def __init__(self, p, keys, block, site):
        super().__init__()
        self.p, self.keys, self.block, self.site = p, keys, block, site

    def forward(self, x):
        return philox.Dropout(self.p, self.keys[self.block], self.site).rows(x)


def _reference_attention_of(query, key, value):
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
    return attention_reference(qkv)


def _reference_attention(module, query, key, value, attention_mask, **kwargs):
    qkv = torch.stack([x.transpose(1, 2) for x in (query, key, value)], dim=2)
    dropout = philox.Dropout(0.3, module.attn_dropout.keys[module.layer_idx + 1], 1)
    return attention_reference(qkv, dropout=dropout), None


def test_dropout_masks():
    """Philox masks from keys drawn in order: the embedding's, then one a block; values and gradients by hand."""
    unpatched, patched = pair(embd_pdrop=0.1, attn_pdrop=0.3, resid_pdrop=0.2)
    patched.train()
    AttentionInterface.register("reference_with_dropout", _reference_attention)
    body, tokens = unpatched.transformer, ids()
    torch.manual_seed(11)
    keys = [philox.new_key("cpu") for _ in range(3)]
    body.drop = PhiloxDropout(0.1, keys, 0, 0)
    for i, block in enumerate(body.h, start=1):
        block.attn.attn_dropout = PhiloxDropout(0.3, keys, i, 1)
        block.attn.resid_dropout, block.mlp.dropout = PhiloxDropout(0.2, keys, i, 2), PhiloxDropout(0.2, keys, i, 3)
    unpatched.config._attn_implementation = "reference_with_dropout"

    def run(model):
        torch.manual_seed(11)
        return {"logits": model(tokens, use_cache=False).logits}

    assert_exact(unpatched, patched, run)
    patched.eval()
    assert not torch.equal(run(patched)["logits"], run(patched.train())["logits"])


@pytest.mark.parametrize("use_cache", [True, False])
def test_attention_drops_in_its_own_mode_at_its_dropouts_rate(use_cache):
    """As transformers does: the mode of the nn.Dropout does not matter, nor its class."""
    _, patched = pair(attn_pdrop=0.5, use_cache=use_cache)
    tokens = ids(time=12)

    def varies():
        return not torch.equal(patched(tokens).logits, patched(tokens).logits)

    assert not varies()
    for block in patched.transformer.h:
        block.attn.attn_dropout.train()
    assert not varies()
    patched.train()
    for block in patched.transformer.h:
        block.attn.attn_dropout.eval()
    assert varies()
    for block in patched.transformer.h:
        block.attn.attn_dropout = torch.nn.AlphaDropout(0.0)
    assert not varies()
    patched.transformer.h[1].attn.attn_dropout.p = 0.5
    assert varies()


@pytest.mark.parametrize("path", ["drop", "h.1.attn.attn_dropout", "h.1.attn.resid_dropout", "h.1.mlp.dropout"])
@pytest.mark.parametrize("use_cache", [False, True])
def test_a_dropout_of_everything(path, use_cache):
    """torch's takes p = 1, and the operations do not: that part is transformers'."""
    models, tokens = pair(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0), ids()
    for model in models:
        model.transformer.get_submodule(path).p = 1.0
    logits = [model.train()(tokens, use_cache=use_cache).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    """Dropout included: a block computed again drops the same elements."""
    _, patched = pair(embd_pdrop=0.1, attn_pdrop=0.3, resid_pdrop=0.2)
    patched.train()
    tokens, results = ids(), []
    for checkpointing in (False, True):
        if checkpointing:
            patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(4)
        patched.zero_grad()
        loss = patched(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss, *(p.grad.clone() for p in patched.parameters())))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_autocast():
    unpatched, patched = pair(resid_pdrop=0.0)
    tokens = ids()

    def run(model):
        with torch.autocast("cpu", torch.bfloat16, enabled=model.dtype != torch.float64):
            output = model(tokens, labels=tokens)
            return {"logits": output.logits, "loss": output.loss.to(output.logits.dtype)}

    assert_exact(unpatched, patched, run, torch.bfloat16)


def test_bfloat16():
    unpatched, patched = pair()
    tokens = ids()
    unpatched, patched = unpatched.bfloat16(), patched.bfloat16()
    assert_exact(unpatched, patched, lambda model: {"logits": model(tokens).logits}, torch.bfloat16)


@pytest.mark.parametrize("options", [{"bias": False}, {"elementwise_affine": False}], ids=str)
def test_a_layernorm_without_parameters(options):
    """Of the patched model and of this package's own, with and without dropout after it."""
    unpatched, patched = pair(use_cache=False)
    own = gpt2_fast.GPT2LMHeadModel(unpatched.config).eval()
    own.load_state_dict(unpatched.state_dict())
    for model in (unpatched, patched, own):
        body = model.transformer
        body.h[0].ln_1, body.h[1].ln_2, body.ln_f = [torch.nn.LayerNorm(48, **options) for _ in range(3)]
    tokens = ids(time=12)
    expected = unpatched(tokens).logits
    for model in (patched, own):
        torch.testing.assert_close(model(tokens).logits, expected)
        model.transformer.h[1].mlp.train()
        assert model(tokens).logits.isfinite().all()
    dropout = patched.transformer.h[1].mlp.dropout
    dropout.p = 0.5
    assert not torch.equal(patched(tokens).logits, expected)
    own.transformer.ln_f = torch.nn.Identity()
    assert own(tokens).logits.shape == expected.shape
    assert len(own.generate(tokens, max_new_tokens=3, do_sample=False)[0]) == 15


@pytest.fixture
def calls_of_block(monkeypatch):
    """What is called of `block`, in order; its products are then this package's or MKL's, whatever the processor."""
    calls = []
    if not modules.takes(torch.zeros(1, 64, 48)):
        pytest.skip("no product here that C++ can call")
    original = modules.block_op
    monkeypatch.setattr(modules, "block_op", lambda *args, **options: calls.append(1) or original(*args, **options))
    return calls


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_as_one_operation(masked, dtype, calls_of_block, monkeypatch):
    """The bits of its operations in turn, dropout included; without a cache alone, and never under autocast."""
    _, patched = pair(embd_pdrop=0.1, attn_pdrop=0.3, resid_pdrop=0.2, n_layer=1)
    patched.to(dtype).train()
    tokens = ids(time=T + 1 + 22)
    mask = None if MASKS[masked] is None else F.pad(MASKS[masked], (0, 23), value=1)

    def run(model):
        torch.manual_seed(3)
        return {"logits": model(tokens, attention_mask=mask, use_cache=False).logits}

    whole = values_and_gradients(patched, run)
    assert calls_of_block == [1]
    patched(tokens)
    with torch.autocast("cpu"):
        run(patched)
    monkeypatch.setattr(modules, "takes", lambda h: False)
    for name, t in values_and_gradients(patched, run).items():
        # The stream's gradient is rounded once, not twice, before it reaches the embedding.
        if dtype == torch.float32 or name not in ("dtransformer.wte.weight", "dtransformer.wpe.weight"):
            assert_same_bits([whole[name]], [t], name)
    assert calls_of_block == [1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_hooks_and_replaced_modules_are_called(use_cache):
    """A module that somebody listens to, or has replaced, runs as a module; unpatched values stay."""
    unpatched, patched = pair(use_cache=use_cache)
    tokens = ids(time=12)  # rows enough for a layer to be one operation
    for path in ("ln_1", "attn", "attn.c_attn", "attn.c_proj", "attn.resid_dropout", "ln_2", "mlp", "mlp.c_fc",
                 "mlp.act", "mlp.c_proj", "mlp.dropout"):  # fmt: skip
        seen = []
        hook = patched.transformer.h[1].get_submodule(path).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        torch.testing.assert_close(patched(tokens).logits, unpatched(tokens).logits)
        assert seen == [1], path
        hook.remove()
    for path in ("wte", "wpe", "drop", "ln_f"):
        seen = []
        hook = patched.transformer.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))  # noqa: B023
        torch.testing.assert_close(patched(tokens).logits, unpatched(tokens).logits)
        assert seen == [1], path
        hook.remove()
    for model in (unpatched, patched):
        model.transformer.h[0].mlp.c_fc.forward = lambda x: torch.zeros(B, 12, 192)
        model.transformer.h[1].mlp.dropout = model.transformer.h[1].attn.resid_dropout = torch.nn.Tanh()
    torch.testing.assert_close(patched(tokens).logits, unpatched(tokens).logits)


def test_compile():
    unpatched, patched = pair(n_layer=1)
    tokens = ids()
    compiled = torch.compile(patched, backend="aot_eager", fullgraph=True)

    def run(model):
        called = compiled if model is patched else model
        return {"logits": called(tokens, attention_mask=RIGHT, use_cache=False).logits[RIGHT.bool()]}

    assert_exact(unpatched, patched, run)


def everything(model):
    """Every object that patch might leave something on."""
    return {name: (type(m), sorted(m.__dict__), len(m._forward_hooks)) for name, m in model.named_modules()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_unpatch(attention):
    unpatched = build(attention=attention)
    model = copy.deepcopy(unpatched)
    tokens, before, config = ids(), everything(model), dict(vars(model.config))
    keys, parameters = list(model.state_dict()), list(model.parameters())
    assert gpt2_fast.patch(gpt2_fast.patch(model)) is model
    assert list(model.state_dict()) == keys
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model, transformers.GPT2LMHeadModel)
    model(tokens, labels=tokens).loss.backward()
    captured = model.forward  # as accelerate wraps it
    assert gpt2_fast.unpatch(gpt2_fast.unpatch(model)) is model
    assert everything(model) == before
    assert vars(model.config) == config
    model.zero_grad()
    expected = unpatched(tokens, labels=tokens)
    for output in (model(tokens, labels=tokens), captured(tokens, labels=tokens)):
        assert_same_bits([output.loss, output.logits], [expected.loss, expected.logits])


def test_copies_and_files(tmp_path):
    unpatched, patched = pair()
    tokens = ids()
    expected = patched(tokens).logits
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert_same_bits([other(tokens).logits], [expected])
        assert type(other) is type(patched)
    patched.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["architectures"] == ["GPT2LMHeadModel"]
    assert "gpt2_fast" not in json.dumps(stored)
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert_same_bits([again(tokens).logits], [unpatched(tokens).logits])


def test_what_is_no_gpt2():
    with pytest.raises(TypeError, match="takes a transformers GPT-2 model, not str"):
        gpt2_fast.patch("gpt2")
    with pytest.raises(ValueError, match=r"torch.nn.modules.linear.Linear holds no transformers GPT2Model"):
        gpt2_fast.patch(torch.nn.Linear(2, 2))
    own = gpt2_fast.GPT2LMHeadModel(gpt2_fast.GPT2Config.from_preset("nano"))
    with pytest.raises(ValueError, match="gpt2_fast.model.GPT2LMHeadModel holds no transformers GPT2Model"):
        gpt2_fast.patch(own)
    model = build()
    model.transformer.h[1].to("meta")
    with pytest.raises(ValueError, match=r"wte.weight on cpu, transformer.h.1.ln_1.weight on meta\); move it to one"):
        gpt2_fast.patch(model)
    assert type(model) is transformers.GPT2LMHeadModel
    assert model.config._attn_implementation == "sdpa"


def test_explain():
    rows = {(row.module, row.part): (row.runs, row.why) for row in swap.explain(gpt2_fast.patch(build()))}
    assert all(runs != "transformers" for runs, _ in rows.values()), rows
    assert rows["(the model)", "head and loss"] == ("linear_cross_entropy", "")
    assert {runs for runs, _ in rows.values()} == {
        "embedding", "add_layernorm", "attention, attention_decode", "linear", "mlp",
        "linear_cross_entropy",
    }  # fmt: skip
    assert {row.why for row in swap.explain(build()) if row.runs == "transformers"} >= {"it is not patched"}
    model = gpt2_fast.patch(build(activation_function="relu", n_head=6))
    model.transformer.h[1].ln_1.register_forward_hook(lambda *_: None)
    model.loss_function = lambda *_, **__: None
    why = {row.module: row.why for row in swap.explain(model) if row.runs == "transformers"}
    assert why["transformer.h.0.attn"] == "head size 8 is outside 16 to 128, what the kernels take"
    assert why["transformer.h.0.mlp"].endswith("not the tanh GELU")
    assert why["transformer.h.1.ln_1"] == "has hooks"
    assert why["(the model)"] == "its loss_function is another"


def test_the_config_stays_transformers():
    """Its names are what users compare; another model made from it is transformers' own, attention and all."""
    unpatched, patched = pair(attention="eager")
    assert patched.config.to_dict() == unpatched.config.to_dict()
    for name in ("sdpa", "eager"):
        patched.set_attn_implementation(name)
        assert patched.config._attn_implementation == name
        assert modules.attention_taken(patched.transformer.h[0]) is None
    patched.config.output_attentions = True
    tokens = ids()
    weights = patched(tokens).attentions
    unpatched.config.output_attentions = True
    torch.testing.assert_close(weights, unpatched(tokens).attentions)
    other = transformers.AutoModelForCausalLM.from_config(patched.config)
    assert type(other) is transformers.GPT2LMHeadModel
    assert all(row.runs == "transformers" for row in swap.explain(other))


def test_somebody_elses_attention_runs_as_it_is():
    """Registered by name, before or after patching: it and its mask are called, and the text is theirs."""
    unpatched, patched = pair()
    seen = []

    def upside_down(module, query, key, value, attention_mask, **kwargs):
        seen.append(module.layer_idx)
        return -_reference_attention_of(query, key, value), None

    AttentionInterface.register("upside_down", upside_down)
    for model in (unpatched, patched):
        model.config._attn_implementation = "upside_down"
    tokens = ids()
    torch.testing.assert_close(patched(tokens).logits, unpatched(tokens).logits)
    assert seen == [0, 1] * 2
    assert modules.attention_taken(patched.transformer.h[0]) == "its implementation is 'upside_down'"


class Doubled(modeling_gpt2.GPT2Block):
    """A block of somebody's own: what theirs gives, twice."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


class Named(modeling_gpt2.GPT2Model):
    """A model of somebody's own, whose forward is transformers'."""

    def name(self):
        return "named"


class Scaled(transformers.GPT2LMHeadModel):
    """A head of somebody's own, with a model and a block of their own and a forward around transformers'."""

    def __init__(self, config):
        super().__init__(config)
        self.transformer = Named(config)
        self.transformer.h[1] = Doubled(config, layer_idx=1)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if output.loss is not None:
            output.loss = 3 * output.loss
        return output


@pytest.mark.parametrize("masked", ["no mask", "left"])
def test_a_subclass_keeps_its_forward(masked):
    """Their forward runs, `super().forward` is ours, and so is what they do not override."""
    unpatched = Scaled(transformers.GPT2Config(**{**SIZES, **NO_DROPOUT})).eval()
    patched, mask, tokens = gpt2_fast.patch(copy.deepcopy(unpatched)), MASKS[masked], ids()
    assert isinstance(patched, Scaled)
    assert patched.transformer.name() == "named"

    def run(model):
        output = model(tokens, attention_mask=mask, labels=tokens)
        return {"loss": output.loss.to(model.dtype), "logits": visible(output.logits, mask)}

    assert_exact(unpatched, patched, run)
    texts = [m.generate(tokens, attention_mask=mask, max_new_tokens=5) for m in (unpatched, patched)]
    assert torch.equal(*texts)
    rows = {(row.module, row.part): row for row in swap.explain(patched)}
    assert rows["transformer.ln_f", "LayerNorm"].why == "h.1: its forward is test_patch.Doubled.forward"
    assert rows["transformer.h.0.attn", "attention"].why.startswith("transformers makes its mask")
    assert rows["transformer.h.0.mlp", "ln_2, c_fc, GELU and c_proj as one"].runs == "mlp"
    assert rows["transformer.h.1", "block"].why == "its forward is test_patch.Doubled.forward"
    assert rows["(the model)", "head and loss"].why == "its forward is test_patch.Scaled.forward"
    for other in (copy.deepcopy(patched), pickle.loads(pickle.dumps(patched))):
        assert type(other) is type(patched)
        assert_same_bits([other(tokens).logits], [patched(tokens).logits])
    assert everything(gpt2_fast.unpatch(patched)) == everything(unpatched)


def test_a_subclass_without_a_forward_of_its_own():
    unpatched = Named(transformers.GPT2Config(**{**SIZES, **NO_DROPOUT})).eval()
    patched, tokens = gpt2_fast.patch(copy.deepcopy(unpatched)), ids()
    assert all(row.runs != "transformers" for row in swap.explain(patched))
    assert_exact(unpatched, patched, lambda model: {"h": model(tokens, attention_mask=RIGHT)[0][RIGHT.bool()]})


def test_a_class_that_takes_no_subclass():
    class Final(modeling_gpt2.GPT2Model):
        def __init_subclass__(cls, **_):
            raise TypeError("Final is final")

    model = Final(transformers.GPT2Config(**SIZES))
    with pytest.raises(TypeError, match=r"Final takes no subclass: Final is final"):
        gpt2_fast.patch(model)
    assert type(model.h[0]) is modeling_gpt2.GPT2Block


def test_doctor_explains(tmp_path, capsys):
    """Equal blocks in one line; a checkpoint's config is enough."""
    model = gpt2_fast.patch(build(n_layer=3))
    model.transformer.h[2].ln_1.register_forward_hook(lambda *_: None)
    lines = doctor.explain_patch(model).splitlines()
    assert f"{'transformer.h.0-2.attn':<30} {'attention':<26} attention (cpp), attention_decode (cpp)" in lines
    assert f"{'transformer.h.0-1.ln_1':<30} {'LayerNorm':<26} add_layernorm (cpp)" in lines
    assert f"{'transformer.h.2.ln_1':<30} {'LayerNorm':<26} transformers   (has hooks)" in lines
    build(activation_function="relu").config.save_pretrained(tmp_path)
    assert cli.main(["doctor", "--patch", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "transformer.h.0-1.mlp " in printed
    assert "not the tanh GELU" in printed
    (tmp_path / "config.json").write_text('{"model_type": "opt"}')
    assert cli.main(["doctor", "--patch", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"gpt2-fast: {tmp_path} is a model of type opt; gpt2_fast.patch takes gpt2\n"
