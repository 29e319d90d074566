"""GPT2Config: the published sizes, transformers' config.json both ways, and clear refusals."""

import json

import pytest

from gpt2_fast.config import PRESETS, GPT2Config, num_params

PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "distilgpt2": 81_912_576,
}


def assert_one_line(error, words):
    message = str(error)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert num_params(GPT2Config.from_preset(name)) == PUBLISHED[name]


@pytest.mark.parametrize("changes", [{}, {"n_inner": 100}, {"tie_word_embeddings": False}])
def test_parameter_count_equals_transformers(changes):
    transformers = pytest.importorskip("transformers")
    config = GPT2Config(vocab_size=97, n_positions=33, n_embd=24, n_layer=3, n_head=2, **changes)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config.to_dict()))
    assert num_params(config) == model.num_parameters()


def test_defaults_are_those_of_transformers():
    theirs = pytest.importorskip("transformers").GPT2Config().to_dict()
    ours = GPT2Config().to_dict()
    del ours["architectures"]
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "gelu"])
def test_transformers_writes_and_we_read(tmp_path, activation):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2Config(
        n_embd=96, n_head=3, n_layer=2, n_positions=64, vocab_size=77, eos_token_id=[5, 6], bos_token_id=4,
        resid_pdrop=0.0, scale_attn_by_inverse_layer_idx=True, activation_function=activation,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = GPT2Config.from_json(tmp_path / "config.json")
    for name, value in ours.to_dict().items():
        if name != "architectures":
            assert value == getattr(theirs, name), name
    assert hash(ours) == hash(GPT2Config.from_dict(ours.to_dict()))


def test_we_write_and_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = GPT2Config(n_embd=96, n_head=3, n_layer=2, n_inner=50, vocab_size=77, attn_pdrop=0.25, pad_token_id=3)
    ours.to_json(tmp_path / "config.json")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is transformers.GPT2Config
    for name, value in ours.to_dict().items():
        assert value == getattr(theirs, name), name
    assert GPT2Config.from_json(tmp_path / "config.json") == ours


def test_aliases_and_keys_of_no_consequence():
    config = GPT2Config.from_dict({"hidden_size": 48, "num_attention_heads": 4, "n_ctx": 1024, "dtype": "float32"})
    assert (config.n_embd, config.n_head, config.head_dim, config.n_inner_) == (48, 4, 12, 192)


def test_presets_take_overrides():
    config = GPT2Config.from_preset("nano", n_layer=1, resid_pdrop=0.0)
    assert (config.n_layer, config.resid_pdrop, config.vocab_size) == (1, 0.0, 50257)
    assert num_params(GPT2Config.from_preset("nano")) < 10_000_000
    assert set(PUBLISHED) < set(PRESETS)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_embd": 100, "n_head": 3}, ["n_embd is 100", "n_head = 3"]),
        ({"n_embd": 768, "n_head": 4}, ["192", "at least 6 heads"]),
        ({"activation_function": "relu"}, ["activation_function is 'relu'", "gelu_new, gelu_pytorch_tanh, gelu"]),
        ({"attn_pdrop": 1.0}, ["attn_pdrop is 1.0"]),
        ({"embd_pdrop": -0.1}, ["embd_pdrop is -0.1"]),
        ({"resid_pdrop": float("nan")}, ["resid_pdrop is nan"]),
        ({"n_layer": 0}, ["n_layer is 0"]),
        ({"n_inner": -4}, ["n_inner is -4"]),
        ({"vocab_size": 10.5}, ["vocab_size is 10.5"]),
        ({"n_positions": True}, ["n_positions is True"]),
        ({"layer_norm_epsilon": 0.0}, ["layer_norm_epsilon is 0.0"]),
        ({"initializer_range": None}, ["initializer_range is None"]),
    ],
)
def test_bad_value_is_named_in_one_line(changes, words):
    with pytest.raises(ValueError) as error:
        GPT2Config(**changes)
    assert_one_line(error.value, words)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"model_type": "llama"}, ["'llama'", "gpt2"]),
        ({"add_cross_attention": True}, ["cross-attention"]),
        ({"is_causal": False}, ["is_causal is False", "gpt2_fast.hf"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
        ({"n_embd": 10, "n_head": 3}, ["n_embd is 10"]),
        ([1], ["list"]),
    ],
)
def test_foreign_config_file_is_refused(tmp_path, data, words):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError) as error:
        GPT2Config.from_json(path)
    assert_one_line(error.value, [*words, str(path)])


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        GPT2Config.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"n_embd": 76')
    with pytest.raises(ValueError, match="not valid JSON"):
        GPT2Config.from_json(tmp_path / "config.json")


def test_a_folder_of_checkpoints_names_one_that_is_there(tmp_path):
    for name in ("checkpoint", "checkpoint-000002", "samples"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint", "checkpoint-000002"):
        (tmp_path / name / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError) as error:
        GPT2Config.from_json(tmp_path / "config.json")
    assert_one_line(error.value, [f"; {tmp_path / 'checkpoint'} has one"])


def test_unknown_preset_and_field():
    with pytest.raises(ValueError, match="unknown model 'gpt3'; the presets are nano, "):
        GPT2Config.from_preset("gpt3")
    with pytest.raises(ValueError, match="n_heads is no field"):
        GPT2Config.from_preset("gpt2", n_heads=3)
