"""What people run transformers' GPT-2 with, on a patched model: Trainer, pipeline, PEFT, lm-evaluation-harness."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

transformers = pytest.importorskip("transformers")

from test_patch import B, T, V, build, everything, ids, pair  # noqa: E402

import gpt2_fast  # noqa: E402
from gpt2_fast.hf_patch import swap  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Rows(torch.utils.data.Dataset):
    """Texts of unequal lengths, padded on the right; the labels leave the padding out."""

    def __init__(self, n: int):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, V, (n, T), generator=generator)
        self.lengths = torch.randint(3, T + 1, (n,), generator=generator)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        mask = (torch.arange(T) < self.lengths[i]).long()
        return {"input_ids": self.ids[i], "attention_mask": mask, "labels": self.ids[i].masked_fill(mask == 0, -100)}


def train(model, folder, **options):
    """(losses of the steps, evaluation's metrics and predictions) of transformers' Trainer."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4, seed=1,
        learning_rate=1e-3, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=Rows(24), eval_dataset=Rows(4))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"], torch.tensor(trainer.predict(Rows(4)).predictions)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_trainer(tmp_path, monkeypatch, options):
    """Gradient accumulation over micro-batches of unequal numbers of labels; the loss of a step, and evaluation's."""
    pytest.importorskip("accelerate")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # transformers 4 leaves the last Trainer's there
    unpatched, patched = pair()
    patched_losses, patched_eval, patched_logits = train(patched, tmp_path / "patched", **options)
    losses, evaluation, logits = train(unpatched, tmp_path / "unpatched", **options)
    rounding = 2e-2 if options.get("bf16") else 2e-5
    assert len(losses) == 4
    assert losses == pytest.approx(patched_losses, rel=rounding)
    assert evaluation == pytest.approx(patched_eval, rel=rounding)
    real = torch.stack([row["attention_mask"] for row in Rows(4)]).bool()
    torch.testing.assert_close(patched_logits[real], logits[real], rtol=rounding, atol=5 * rounding)


def tokenizer():
    """One token a word, w0 .. w96."""
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w3"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2",
                                                unk_token="w3", padding_side="left")  # fmt: skip


def test_pipeline():
    unpatched, patched = pair()
    prompts = ["w5 w6 w7", "w8 w9 w10 w11 w12 w13", "w14"]
    texts = []
    for model in (unpatched, patched):
        generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer(), device="cpu")
        texts.append(generate(prompts, max_new_tokens=6, do_sample=False, batch_size=3))
    assert texts[0] == texts[1]
    assert len(texts[0][0][0]["generated_text"].split()) > 3


@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "c_fc", "c_proj"]], ids=str)
@pytest.mark.parametrize("first", ["patch", "peft"])
def test_peft_lora(targets, first):
    """The same loss and adapter gradients, whichever came first; merging; and unpatch under the adapters."""
    peft = pytest.importorskip("peft")
    base, tokens = build(), ids()
    models = []
    for patches in (False, True):
        torch.manual_seed(2)
        model = copy.deepcopy(base)
        if patches and first == "patch":
            gpt2_fast.patch(model)
        config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if patches and first == "peft":
            assert gpt2_fast.patch(model) is model
        models.append(model.eval())
    results = []
    for model in models:
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert len(results[0]) == 1 + 2 * 2 * (1 if targets == ["c_attn"] else 4)
    for expected, actual in zip(*results, strict=True):
        assert actual.abs().max() > 0
        torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-6)
    why = {row.module: row.why for row in swap.explain(models[1]) if row.runs == "transformers"}
    assert "is peft.tuners.lora" in why["base_model.model.transformer.h.0.attn.c_attn"]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()
    merged = [model.merge_and_unload()(tokens).logits for model in map(copy.deepcopy, models)]
    torch.testing.assert_close(merged[1], merged[0], rtol=5e-5, atol=5e-5)
    assert everything(gpt2_fast.unpatch(models[1])) == everything(models[0])
    assert torch.equal(models[1](tokens).logits, models[0](tokens).logits)


def test_lora_with_gradient_checkpointing():
    """Frozen embeddings, whose output only a hook makes require a gradient: reentrant checkpointing needs it."""
    peft = pytest.importorskip("peft")
    results, base, tokens = [], build(), ids()
    for patches in (False, True):
        torch.manual_seed(2)
        config = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
        model = copy.deepcopy(base)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model = peft.get_peft_model(gpt2_fast.patch(model) if patches else model, config).train()
        model.enable_input_require_grads()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(tokens, labels=tokens).loss.backward()
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-6)


def test_weights_that_accelerate_keeps_elsewhere():
    """cpu_offload: between two calls every parameter is on the meta device, where no position can be counted."""
    accelerate = pytest.importorskip("accelerate")
    tokens, mask, results = ids(), torch.ones(B, T, dtype=torch.long), []
    mask[0, :3] = 0
    for model in pair():
        accelerate.cpu_offload(model, execution_device="cpu")
        with torch.no_grad():
            output = model(tokens, attention_mask=mask)
            cached = model(tokens[:, :1], past_key_values=output.past_key_values)
            results.append((output.logits[mask.bool()], model(tokens, labels=tokens).loss, cached.logits[1:]))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


def test_tensors_without_numbers_and_export():
    """A mask that is a FakeTensor cannot be looked at, "meta" has no autocast; an export takes other sizes."""
    unpatched, patched = pair()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.zeros(B, T, dtype=torch.long)
        assert patched(fake, attention_mask=torch.ones_like(fake)).logits.shape == (B, T, V)
    on_meta = copy.deepcopy(patched).to("meta")
    on_meta.tie_weights()
    on_meta.config.pad_token_id = None  # transformers looks for it
    output = on_meta(ids().to("meta"), labels=ids().to("meta"))
    assert (output.loss.device.type, output.logits.shape) == ("meta", (B, T, V))
    tokens, longer = ids(), ids(B + 1, T + 2)
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("time", min=2, max=T + 4)}
    for model in (unpatched, patched):
        model.config.use_cache = False
    shapes = {"input_ids": sizes, "attention_mask": sizes}
    with torch.no_grad():
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        graph = torch.export.export(patched, (), given, dynamic_shapes=shapes, strict=False).module()
        mask = torch.ones_like(longer)
        mask[0, :3] = 0
        expected = unpatched(longer, attention_mask=mask).logits[mask.bool()]
        actual = graph(input_ids=longer, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=5e-5, atol=5e-5)


def test_two_parameters_on_purpose():
    """A new head is refused while the config ties it, and trained once it does not, as the error says."""
    unpatched, patched = pair()
    head, tokens, results = torch.nn.Linear(unpatched.config.n_embd, V, bias=False), ids(), []
    for model in (unpatched, patched):
        model.set_output_embeddings(copy.deepcopy(head))
    with pytest.raises(ValueError, match="or set model.config.tie_word_embeddings = False$"):
        patched(tokens, labels=tokens)
    patched.config.tie_word_embeddings = False
    for model in (unpatched, patched):
        model(tokens, labels=tokens).loss.backward()
        results.append((model.lm_head.weight.grad, model.transformer.wte.weight.grad))
    torch.testing.assert_close(results[1], results[0], rtol=5e-5, atol=5e-6)


def test_lm_evaluation_harness():
    """Log-likelihoods, with the greedy flag, and greedy continuations of HFLM."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    texts = [("w5 w6 w7", " w8 w9"), ("w10", " w11 w12 w13"), ("w5 w20 w21 w22", " w23"), ("", " w5 w6")]
    until = {"until": ["w2"], "max_gen_toks": 5, "do_sample": False}
    results = []
    for model in pair():
        harness = HFLM(pretrained=model, tokenizer=tokenizer(), batch_size=B, max_length=20)
        scored = [Instance("loglikelihood", {}, text, i) for i, text in enumerate(texts)]
        free = [Instance("generate_until", {}, (text, until), i) for i, (text, _) in enumerate(texts[:3])]
        rolling = [Instance("loglikelihood_rolling", {}, ("w5 w6 w7 w8",), 0)]
        results.append((harness.loglikelihood(scored), harness.generate_until(free),
                        harness.loglikelihood_rolling(rolling)))  # fmt: skip
    (expected, texts_expected, rolled), (actual, texts_actual, rolled_actual) = results
    assert texts_actual == texts_expected
    assert rolled_actual == pytest.approx(rolled, rel=1e-5)
    for (p, greedy), (q, greedy_actual) in zip(expected, actual, strict=True):
        assert q == pytest.approx(p, rel=1e-5)
        assert greedy_actual == greedy
