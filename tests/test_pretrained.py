"""from_pretrained and save_pretrained: transformers' models in and out, bit for bit, initialised once."""

import dataclasses

import pytest
import torch

from gpt2_fast import GPT2Config, GPT2LMHeadModel, checkpoint

# The published shapes made small: layers cut to two, widths to heads of 16; gpt2-xl keeps its odd number of heads.
SMALL = {"vocab_size": 97, "n_positions": 32, "n_layer": 2, "bos_token_id": None, "eos_token_id": None}
SHAPES = {
    "gpt2": GPT2Config(**SMALL, n_head=12, n_embd=192),
    "gpt2-medium": GPT2Config(**SMALL, n_head=16, n_embd=256),
    "gpt2-large": GPT2Config(**SMALL, n_head=20, n_embd=320),
    "gpt2-xl": GPT2Config(**SMALL, n_head=25, n_embd=400),
}
CONFIG = SHAPES["gpt2-xl"]


def transformers_model(config, dtype=torch.float32):
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict()))
    for parameter in model.parameters():  # zero biases would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_there_and_back_through_transformers(tmp_path, name, tied):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(SHAPES[name], tie_word_embeddings=tied)
    theirs = transformers_model(config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    assert ours.config == config
    assert_same_bits(ours.state_dict(), theirs.state_dict())
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_bits(ours.state_dict(), again.state_dict())
    ids = torch.randint(config.vocab_size, (2, 9))
    assert torch.equal(again.eval()(ids).logits, theirs(ids).logits)
    exact = GPT2LMHeadModel.from_pretrained(tmp_path / "ours", dtype=torch.float64, impl="reference")
    torch.testing.assert_close(exact(ids).logits, theirs.double()(ids).logits, rtol=1e-9, atol=1e-9)


def test_the_loaded_model_is_whole(tmp_path):
    """Eval mode, a head that is the embedding, parameters that train and are aligned, nothing left on meta."""
    transformers_model(CONFIG).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path, impl="reference")
    assert not any(module.training for module in model.modules())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.transformer.impl == "reference"
    assert not list(model.buffers())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad, name
        assert parameter.device.type == "cpu", name
        assert parameter.data_ptr() % 64 == 0, name
    before = model.transformer.wte.weight.clone()
    model.train()
    ids = torch.randint(CONFIG.vocab_size, (1, 5))
    model(ids, labels=ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.transformer.wte.weight, before)
    assert torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_an_untied_head_stays_untied(tmp_path):
    transformers_model(dataclasses.replace(CONFIG, tie_word_embeddings=False)).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert not torch.equal(model.lm_head.weight, model.transformer.wte.weight)


def test_weights_are_not_initialised_first(tmp_path, monkeypatch):
    """No random number is drawn and no weight but the stored one is allocated."""
    transformers_model(CONFIG).save_pretrained(tmp_path)
    drawn = []
    normal_ = torch.nn.init.normal_

    def record(tensor, mean=0.0, std=1.0, generator=None):
        drawn.append(tensor.device.type)
        return normal_(tensor, mean, std, generator)

    monkeypatch.setattr(torch.nn.init, "normal_", record)
    before = torch.get_rng_state()
    GPT2LMHeadModel.from_pretrained(tmp_path)
    assert set(drawn) <= {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_on_the_way_in_and_out(tmp_path, dtype):
    theirs = transformers_model(CONFIG)
    theirs.save_pretrained(tmp_path / "theirs")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs", dtype=dtype, device="cpu")
    assert_same_bits(model.state_dict(), {n: t.to(dtype) for n, t in theirs.state_dict().items()})
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path / "ours", dtype=torch.bfloat16)
    stored = checkpoint.load_pretrained(tmp_path / "ours")[1]
    assert_same_bits(stored, {n: t.to(dtype).bfloat16() for n, t in theirs.state_dict().items()})
    assert next(GPT2LMHeadModel.from_pretrained(tmp_path / "ours").parameters()).dtype == torch.bfloat16


def test_token_ids_of_generation_config(tmp_path):
    """They end a text as in transformers, and stay through our folder, also where an older one's lie in it."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers_model(dataclasses.replace(CONFIG, eos_token_id=96))
    ids = torch.randint(90, (1, 4))
    free = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    theirs.generation_config.eos_token_id = [96, int(free[0, 8])]
    theirs.generation_config.pad_token_id, theirs.generation_config.bos_token_id = 3, 4
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "theirs")
    wanted = theirs.generate(ids, max_new_tokens=12, do_sample=False)
    assert wanted.shape[1] < free.shape[1]
    ours.save_pretrained(tmp_path / "ours")
    (tmp_path / "over").mkdir()
    (tmp_path / "over" / "generation_config.json").write_text('{"eos_token_id": 7}')
    ours.save_pretrained(tmp_path / "over")
    for folder in ("theirs", "ours", "over"):
        model = GPT2LMHeadModel.from_pretrained(tmp_path / folder)
        assert (model.config.bos_token_id, model.config.eos_token_id[0], model.config.pad_token_id) == (4, 96, 3)
        for again in (model, transformers.GPT2LMHeadModel.from_pretrained(tmp_path / folder).eval()):
            assert torch.equal(again.generate(ids, max_new_tokens=12, do_sample=False), wanted), folder


def test_settings_that_generate_does_not_read_are_named(tmp_path):
    GPT2LMHeadModel(CONFIG).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text('{"eos_token_id": 7, "temperature": 0.5, "repetition_penalty": 1.0, "top_k": null, "x": 1}')
    with pytest.warns(UserWarning, match=r"is read for token ids alone: pass temperature=0.5 to generate$"):
        assert GPT2LMHeadModel.from_pretrained(tmp_path).config.eos_token_id == 7
    for content, words in (("{", "not valid JSON"), ("[1]", "holds a list"), ('{"eos_token_id": "a"}', "token id")):
        path.write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            GPT2LMHeadModel.from_pretrained(tmp_path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_the_model_does_not_depend_on_its_file(tmp_path):
    """Weights saved over the folder they came from: in-place training must never write into a mapped file."""
    transformers_model(CONFIG).save_pretrained(tmp_path)
    model = GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stored = checkpoint.load_pretrained(tmp_path)[1]
    assert not torch.equal(stored["transformer.wte.weight"], state["transformer.wte.weight"])
    model.save_pretrained(tmp_path)
    assert_same_bits(GPT2LMHeadModel.from_pretrained(tmp_path).state_dict(), state)


def test_refusals_are_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a folder here nor in the Hugging Face cache") as error:
        GPT2LMHeadModel.from_pretrained("no-such/model", cache_dir=tmp_path, local_files_only=True)
    assert "\n" not in str(error.value)
    transformers_model(CONFIG).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"dtype is torch.int8; weights are float32"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "model", dtype=torch.int8)
    with pytest.raises(ValueError, match="impl is 'fast'; choose one of"):
        GPT2LMHeadModel.from_pretrained(tmp_path / "model", impl="fast")
    (tmp_path / "model/model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(
        ValueError, match=r"model.safetensors can hold at most 10; one of the two is of another model, or damaged"
    ):
        GPT2LMHeadModel.from_pretrained(tmp_path / "model")


def test_a_diverged_model_is_saved(tmp_path):
    """NaN differs from itself; a tied head is not compared with the embedding that it is."""
    model = GPT2LMHeadModel(CONFIG)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = float("nan")
    model.save_pretrained(tmp_path)
    weight = checkpoint.load_pretrained(tmp_path)[1]["lm_head.weight"]
    assert weight.isnan().nonzero().tolist() == [[3, 5]]
