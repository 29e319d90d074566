"""The calls that transformers' users make of a GPT-2, made of gpt2_fast.GPT2LMHeadModel: as there, or one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_patch_ecosystem import train  # noqa: E402

import gpt2_fast  # noqa: E402
from gpt2_fast import GPT2LMHeadModel  # noqa: E402

SIZES = {"vocab_size": 97, "n_positions": 40, "n_embd": 48, "n_head": 3, "n_layer": 2, "bos_token_id": 1,
         "eos_token_id": 2, "pad_token_id": 0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
IDS = torch.randint(3, 97, (2, 7), generator=torch.Generator().manual_seed(1))
HF = r"gpt2_fast\.hf\.GPT2LMHeadModel"


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES, resid_pdrop=0.0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return folder


def load(cls, folder, **options):
    return cls.from_pretrained(folder, **options).eval()


def _checkpointed(model, call):
    call(model.train())
    loss = model.eval()(IDS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), model.transformer.wpe.weight.grad]


def _disable(model):
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    return model


# What works: a call of either model, and what it gives is compared.
WORKS = {
    "labels": lambda m: m(IDS, labels=IDS).loss,
    "logits": lambda m: m(input_ids=IDS).logits,
    "attention_mask": lambda m: m(IDS, attention_mask=torch.ones_like(IDS)).logits,
    "position_ids, token_type_ids": lambda m: m(IDS, position_ids=torch.arange(7)[None] + 1, token_type_ids=IDS).logits,
    "tuple": lambda m: m(IDS, labels=IDS)[:2],
    "num_items_in_batch": lambda m: m(IDS, labels=IDS, num_items_in_batch=5).loss,
    "return_dict": lambda m: m(IDS, return_dict=True).logits,
    "use_cache=False": lambda m: m(IDS, use_cache=False).logits,
    "output_hidden_states=False": lambda m: m(IDS, output_hidden_states=False, output_attentions=None).logits,
    "logits_to_keep": lambda m: m(IDS, logits_to_keep=2).logits,
    "device, dtype": lambda m: (str(m.device), str(m.dtype)),
    "get_input_embeddings": lambda m: m.get_input_embeddings()(IDS),
    "get_output_embeddings": lambda m: m.get_output_embeddings().weight,
    "base_model": lambda m: [m.base_model is m.transformer],
    "constants": lambda m: (m.base_model_prefix, m.main_input_name, m.can_generate(), m.is_gradient_checkpointing),
    "is_gradient_checkpointing": lambda m: (m.gradient_checkpointing_enable(), m.is_gradient_checkpointing),
    "config": lambda m: [getattr(m.config, name) for name in (
        "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers", "model_type",
        "is_encoder_decoder")],
    "num_parameters": lambda m: (m.num_parameters(), m.num_parameters(only_trainable=True)),
    "state_dict": lambda m: list(m.state_dict()),
    "gradient_checkpointing_enable": lambda m: _checkpointed(m, lambda m: m.gradient_checkpointing_enable()),
    "gradient_checkpointing_disable": lambda m: _checkpointed(m, _disable),
    "generate": lambda m: m.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None),
    "generate(use_cache=False)": lambda m: m.generate(
        IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False),
    "generate(inputs=)": lambda m: m.generate(inputs=IDS, max_new_tokens=4, do_sample=False, eos_token_id=None),
}  # fmt: skip

# What from_pretrained takes.
LOADS = {
    "torch_dtype": {"torch_dtype": torch.bfloat16}, "dtype": {"dtype": "float64"}, "auto": {"torch_dtype": "auto"},
    "device_map": {"device_map": "cpu"}, "device_map of one": {"device_map": {"": "cpu"}},
}  # fmt: skip

# What does not, and which words its one line has besides the class that does.
REFUSED = {
    "return_dict=False": (lambda m: m(IDS, return_dict=False), r"forward\(return_dict=False\)"),
    "use_cache=True": (lambda m: m(IDS, use_cache=True), r"forward\(use_cache=True\)"),
    "inputs_embeds": (lambda m: m(IDS, inputs_embeds=torch.ones(2, 7, 48)), r"forward\(inputs_embeds=a tensor\)"),
    "inputs_embeds alone": (lambda m: m(inputs_embeds=torch.ones(2, 7, 48)), r"forward\(inputs_embeds=a tensor\)"),
    "generate(inputs_embeds=)": (lambda m: m.generate(inputs_embeds=torch.ones(2, 7, 48)), "inputs_embeds=a tensor"),
    "output_hidden_states": (lambda m: m(IDS, output_hidden_states=True), r"forward\(output_hidden_states=True\)"),
    "output_attentions": (lambda m: m(IDS, output_attentions=True), r"forward\(output_attentions=True\)"),
    "past_key_values": (lambda m: m(IDS, past_key_values=object()), r"forward\(past_key_values="),
    "logits_to_keep beside labels": (lambda m: m(IDS, labels=IDS, logits_to_keep=1), "beside labels"),
    "resize_token_embeddings": (lambda m: m.resize_token_embeddings(99), r"resize_token_embeddings\(\)"),
    "generate(min_new_tokens=)": (lambda m: m.generate(IDS, min_new_tokens=2), "min_new_tokens=2"),
    "generate(logits_processor=)": (lambda m: m.generate(IDS, logits_processor=[1]), "logits_processor="),
    "generate(generation_config=)": (lambda m: m.generate(IDS, generation_config=transformers.GenerationConfig(
        max_new_tokens=4, top_k=3)), "generation_config=GenerationConfig"),
    "generate(num_beams=)": (lambda m: m.generate(IDS, num_beams=2), "num_beams=2"),
}  # fmt: skip


@pytest.mark.parametrize("call", WORKS)
def test_as_in_transformers(folder, call):
    expected, actual = (WORKS[call](load(cls, folder)) for cls in (transformers.GPT2LMHeadModel, GPT2LMHeadModel))
    if isinstance(expected, torch.Tensor) or isinstance(next(iter(expected), None), torch.Tensor):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)
    else:
        assert actual == expected


@pytest.mark.parametrize("options", LOADS)
def test_loading_as_in_transformers(folder, options):
    expected, actual = (load(c, folder, **LOADS[options]) for c in (transformers.GPT2LMHeadModel, GPT2LMHeadModel))
    assert (actual.dtype, actual.device) == (expected.dtype, expected.device)
    assert torch.equal(actual.transformer.wpe.weight, expected.transformer.wpe.weight)


def test_ids_that_are_missing_are_named(folder):
    with pytest.raises(ValueError, match="^input_ids is missing; pass token ids"):
        load(GPT2LMHeadModel, folder)(labels=IDS)


@pytest.mark.parametrize("call", REFUSED)
def test_one_line_names_the_class_that_does_it(folder, call):
    run, words = REFUSED[call]
    with pytest.raises((ValueError, NotImplementedError), match=f"(?s){words}.*{HF}") as error:
        run(load(GPT2LMHeadModel, folder))
    assert "\n" not in str(error.value)


def test_a_config_of_transformers(folder):
    config = transformers.GPT2Config(**SIZES, resid_pdrop=0.25, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config)
    assert model.config == gpt2_fast.GPT2Config(**SIZES, resid_pdrop=0.25, tie_word_embeddings=False)
    assert model.lm_head.weight is not model.transformer.wte.weight
    with pytest.raises(TypeError, match="config is dict; it must be a GPT2Config"):
        GPT2LMHeadModel(SIZES)


def test_several_devices_and_unknown_names(folder):
    with pytest.raises(ValueError, match=rf"from_pretrained\(device_map='auto'\); {HF}"):
        GPT2LMHeadModel.from_pretrained(folder, device_map="auto")
    with pytest.raises(ValueError, match="dtype is torch.float32 and torch_dtype torch.bfloat16; pass one"):
        GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, torch_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="dtype is 'bf16'; weights are float32"):
        GPT2LMHeadModel.from_pretrained(folder, torch_dtype="bf16")
    for call in (lambda: GPT2LMHeadModel.from_pretrained(folder, dtyp=1), lambda: GPT2LMHeadModel(
        gpt2_fast.GPT2Config(**SIZES))(IDS, label=IDS)):  # fmt: skip
        with pytest.raises(TypeError, match="has no argument '(dtyp|label)'"):
            call()


def test_trainer(folder, tmp_path):
    """transformers 5 sets the model's config, and the line says which class it takes; 4 trains this one as its own."""
    pytest.importorskip("accelerate")
    if transformers.__version__.startswith("4"):
        losses = [train(load(cls, folder), tmp_path)[0] for cls in (transformers.GPT2LMHeadModel, GPT2LMHeadModel)]
        assert losses[1] == pytest.approx(losses[0], rel=2e-5)
        return
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(dataclasses.FrozenInstanceError, match=rf"Trainer does, takes {HF}"):
        transformers.Trainer(model=load(GPT2LMHeadModel, folder), args=arguments)
