"""Conversion between folders, nanoGPT's ckpt.pt and llm.c's .bin: the same bits in every direction, clear refusals.

The two formats are written here a second time, from their own definitions, so that a mistake shared by reader and
writer is seen.
"""

import dataclasses
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from gpt2_fast import GPT2Config, GPT2LMHeadModel, checkpoint, cli
from gpt2_fast.checkpoint import EMBEDDING, HEAD, convert, expected_shapes, llmc, nanogpt

CONFIG = GPT2Config(
    vocab_size=130, n_positions=16, n_embd=24, n_layer=3, n_head=3, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
NAMES = {"hf": "folder", "nanogpt": "ckpt.pt", "llmc": "model.bin"}
LAYERS = [  # llm.c's names of a layer's tensors, in its order
    ("ln1", "ln_1"), ("qkv", "attn.c_attn"), ("attproj", "attn.c_proj"),
    ("ln2", "ln_2"), ("fc", "mlp.c_fc"), ("fcproj", "mlp.c_proj"),
]  # fmt: skip


def random_state(config=CONFIG, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    state = {n: torch.randn(s, generator=generator).to(dtype) for n, s in expected_shapes(config).items()}
    if config.tie_word_embeddings:
        state[HEAD] = state[EMBEDDING]
    return state


def assert_same_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor, theirs[name]), name


def write_source(folder, kind, state, config=CONFIG):
    path = folder / NAMES[kind]
    if kind == "hf":
        checkpoint.save_pretrained(path, state, config)
    elif kind == "nanogpt":
        nanogpt.write_nanogpt(path, state, config)
    else:
        llmc.write_llmc(path, state, config, dtype=state[EMBEDDING].dtype)
    return path


def nanogpt_file(path, state, config=CONFIG, prefix="", bias=True, **changes):
    """A checkpoint as nanoGPT's train.py leaves it, optimizer state and mask buffers included."""
    model = {}
    for name, tensor in state.items():
        if bias or not name.endswith(".bias"):
            is_linear = ".c_" in name and tensor.ndim == 2
            model[prefix + name] = tensor.T.contiguous() if is_linear else tensor.clone()
    model[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, config.n_positions, config.n_positions)
    arguments = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd, "dropout": 0.2}
    arguments |= {"block_size": config.n_positions, "bias": bias, "vocab_size": config.vocab_size} | changes
    data = {"model": model, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-3}]}}
    data |= {"model_args": arguments, "iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {"dataset": "x"}}
    torch.save(data, path)
    return path


def llmc_bytes(state, version, config=CONFIG):
    """A checkpoint as llm.c writes it: header, then tensor by tensor, each stacked over the layers."""
    rows = -(-config.vocab_size // 128) * 128
    header = [20240326, version, config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd]
    out = [np.array([*header, rows] + [0] * 248, dtype=np.int32).tobytes()]

    def put(tensor):
        out.append(tensor.contiguous().view(torch.int16 if version == 5 else torch.int32).numpy().tobytes())

    wte = torch.zeros(rows, config.n_embd, dtype=state[EMBEDDING].dtype)
    wte[: config.vocab_size] = state[EMBEDDING]
    put(wte)
    put(state["transformer.wpe.weight"])
    for short, name in LAYERS:
        weights = torch.stack([state[f"transformer.h.{i}.{name}.weight"] for i in range(config.n_layer)])
        put(weights if short.startswith("ln") else weights.transpose(1, 2))
        put(torch.stack([state[f"transformer.h.{i}.{name}.bias"] for i in range(config.n_layer)]))
    put(state["transformer.ln_f.weight"])
    put(state["transformer.ln_f.bias"])
    return b"".join(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("start", "over"), list(itertools.product(NAMES, NAMES)))
def test_there_and_back_in_every_direction(tmp_path, start, over, dtype):
    state = random_state(dtype=dtype)
    source = write_source(tmp_path, start, state)
    written = convert.convert(source, tmp_path / "over" / NAMES[over])
    assert written.format == over
    assert_same_bits(convert.load(tmp_path / "over" / NAMES[over]).state, state)
    returned = convert.convert(tmp_path / "over" / NAMES[over], tmp_path / "back" / NAMES[start])
    back = convert.load(tmp_path / "back" / NAMES[start])
    assert back.format == start
    # nanoGPT computes GELU by erf, llm.c by tanh; a folder keeps what its config says.
    by_erf = start == "nanogpt" or (start == "hf" and over == "nanogpt")
    assert back.config == dataclasses.replace(CONFIG, activation_function="gelu" if by_erf else "gelu_new")
    assert back.config == returned.config
    assert_same_bits(back.state, state)
    if start == "llmc":
        assert (tmp_path / "back/model.bin").read_bytes() == source.read_bytes()
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize(("version", "dtype"), [(3, torch.float32), (5, torch.bfloat16)])
def test_llmc_layout(tmp_path, version, dtype):
    """Byte for byte what llm.c writes, and read back from it."""
    state, path = random_state(dtype=dtype), tmp_path / "model.bin"
    llmc.write_llmc(path, state, CONFIG, dtype=dtype)
    assert path.read_bytes() == llmc_bytes(state, version)
    config, again, _ = llmc.read_llmc(path)
    assert config == CONFIG
    assert_same_bits(again, state)
    assert again[HEAD] is again[EMBEDDING]


def test_llmc_vocabulary_of_gpt2(tmp_path):
    config = GPT2Config(n_positions=8, n_embd=8, n_layer=1, n_head=1)
    state = random_state(config)
    llmc.write_llmc(tmp_path / "model.bin", state, config, dtype=torch.float32)
    header = np.fromfile(tmp_path / "model.bin", dtype=np.int32, count=256)
    assert header[:9].tolist() == [20240326, 3, 8, 50257, 1, 1, 8, 50304, 0]
    again, tensors, _ = llmc.read_llmc(tmp_path / "model.bin")
    assert again == dataclasses.replace(config, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    assert_same_bits(tensors, state)


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_nanogpt_checkpoint(tmp_path, prefix):
    state = random_state()
    config, again, notes = nanogpt.read_nanogpt(nanogpt_file(tmp_path / "ckpt.pt", state, prefix=prefix))
    assert_same_bits(again, state)
    dropout = {"embd_pdrop": 0.2, "attn_pdrop": 0.2, "resid_pdrop": 0.2}
    assert config == dataclasses.replace(CONFIG, activation_function="gelu", **dropout)
    assert notes == []


def test_nanogpt_without_biases_gets_zeros(tmp_path):
    state = random_state()
    _, again, notes = nanogpt.read_nanogpt(nanogpt_file(tmp_path / "ckpt.pt", state, bias=False))
    zeros = {n: torch.zeros_like(t) if n.endswith(".bias") else t for n, t in state.items()}
    assert_same_bits(again, zeros)
    assert len(notes) == 1
    assert "zeros stand in" in notes[0]


@pytest.mark.parametrize(
    ("activation", "to", "note"),
    [
        ("gelu_new", "nanogpt", "nanoGPT computes GELU by erf and this model by tanh"),
        ("gelu_pytorch_tanh", "nanogpt", "nanoGPT computes GELU by erf and this model by tanh"),
        ("gelu", "nanogpt", None),
        ("gelu", "llmc", "llm.c computes GELU by tanh and this model by erf"),
        ("gelu_new", "llmc", None),
        ("gelu", "hf", None),
    ],
)
def test_gelu_that_a_format_does_not_compute_is_noted(tmp_path, activation, to, note):
    config = dataclasses.replace(CONFIG, activation_function=activation)
    source = write_source(tmp_path, "hf", random_state(), config)
    written = convert.convert(source, tmp_path / "to" / NAMES[to])
    said = [n for n in written.notes if "GELU" in n]
    assert [n.split(":")[0] for n in said] == ([] if note is None else [note])
    assert_same_bits(convert.load(tmp_path / "to" / NAMES[to]).state, random_state())


def test_nanogpt_keeps_a_padded_vocabulary(tmp_path):
    config = dataclasses.replace(CONFIG, vocab_size=50304, n_embd=8, n_head=1, n_layer=1)
    state = random_state(config)
    again, tensors, _ = nanogpt.read_nanogpt(nanogpt_file(tmp_path / "ckpt.pt", state, config))
    assert (again.vocab_size, again.eos_token_id, again.bos_token_id) == (50304, 50256, 50256)
    assert_same_bits(tensors, state)


def test_what_nanogpt_loads(tmp_path):
    """The keys and shapes of nanoGPT's own module, so that its strict load_state_dict takes them."""
    state = random_state()
    nanogpt.write_nanogpt(tmp_path / "ckpt.pt", state, CONFIG)
    data = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert data["model_args"] == {
        "n_layer": 3, "n_head": 3, "n_embd": 24, "block_size": 16, "vocab_size": 130, "bias": True, "dropout": 0.0
    }  # fmt: skip
    model = data["model"]
    assert model.keys() == expected_shapes(CONFIG).keys()
    assert model[HEAD].data_ptr() == model[EMBEDDING].data_ptr()


def test_nanogpt_weights_compute_the_same(tmp_path):
    """nanoGPT's forward in float64, written out with [out, in] weights, gives our logits."""
    state, F = random_state(dtype=torch.float64), torch.nn.functional
    nanogpt.write_nanogpt(tmp_path / "ckpt.pt", {n: t * 0.1 for n, t in state.items()}, CONFIG)
    w = torch.load(tmp_path / "ckpt.pt", weights_only=True)["model"]
    ids = torch.randint(CONFIG.vocab_size, (2, 7))

    def layer(x, name, kind):
        weight, bias = w[f"transformer.{name}.weight"], w[f"transformer.{name}.bias"]
        return F.linear(x, weight, bias) if kind == "linear" else F.layer_norm(x, x.shape[-1:], weight, bias, 1e-5)

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:7]
    for i in range(CONFIG.n_layer):
        qkv = layer(layer(x, f"h.{i}.ln_1", "norm"), f"h.{i}.attn.c_attn", "linear").view(2, 7, 3, 3, 8)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4), is_causal=True).transpose(1, 2).flatten(2)
        x = x + layer(y, f"h.{i}.attn.c_proj", "linear")
        u = F.gelu(layer(layer(x, f"h.{i}.ln_2", "norm"), f"h.{i}.mlp.c_fc", "linear"))
        x = x + layer(u, f"h.{i}.mlp.c_proj", "linear")
    logits = F.linear(layer(x, "ln_f", "norm"), w[HEAD])
    convert.convert(tmp_path / "ckpt.pt", tmp_path / "folder")
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "folder", impl="reference")
    torch.testing.assert_close(ours(ids).logits, logits, rtol=1e-10, atol=1e-10)


def test_rounding_is_asked_for_and_said(tmp_path):
    state = random_state()
    source = write_source(tmp_path, "hf", state)
    exact = convert.convert(source, tmp_path / "exact.bin")
    assert not any("rounded" in note for note in exact.notes)
    for name in ("rounded.bin", "rounded.pt", "rounded"):
        written = convert.convert(source, tmp_path / name, dtype=torch.bfloat16)
        assert any("were rounded to bfloat16" in note for note in written.notes)
        assert_same_bits(convert.load(tmp_path / name).state, {n: t.bfloat16() for n, t in state.items()})
    widened = convert.convert(tmp_path / "rounded.bin", tmp_path / "wide.bin", dtype=torch.float32)
    assert not any("rounded" in note for note in widened.notes)
    assert_same_bits(widened.state, {n: t.bfloat16().float() for n, t in state.items()})


def test_llmc_takes_other_dtypes_only_where_that_is_exact(tmp_path):
    half = random_state(dtype=torch.float16)
    convert.convert(write_source(tmp_path, "hf", half), tmp_path / "half.bin")
    assert_same_bits(convert.load(tmp_path / "half.bin").state, {n: t.float() for n, t in half.items()})
    mixed = random_state(dtype=torch.bfloat16)
    mixed["transformer.ln_f.bias"] = random_state()["transformer.ln_f.bias"]
    convert.convert(write_source(tmp_path, "hf", mixed), tmp_path / "mixed.bin")
    assert_same_bits(convert.load(tmp_path / "mixed.bin").state, {n: t.float() for n, t in mixed.items()})
    source = write_source(tmp_path, "hf", random_state(dtype=torch.float64))
    with pytest.raises(ValueError, match="holds float64, which llm.c cannot store; --dtype float32 rounds it"):
        convert.convert(source, tmp_path / "wide.bin")
    assert not (tmp_path / "wide.bin").exists()
    assert any("rounded to float32" in n for n in convert.convert(source, tmp_path / "w", dtype=torch.float32).notes)


@pytest.mark.parametrize("kind", ["nanogpt", "llmc"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_inner": 50}, "has no n_inner = 50; only 96"),
        ({"layer_norm_epsilon": 1e-6}, "has no layer_norm_epsilon = 1e-06"),
        ({"tie_word_embeddings": False}, "has no tie_word_embeddings = False"),
        ({"scale_attn_weights": False}, "has no scale_attn_weights = False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "has no scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_models_that_a_format_cannot_express(tmp_path, kind, change, words):
    config = dataclasses.replace(CONFIG, **change)
    source = write_source(tmp_path, "hf", random_state(config), config)
    with pytest.raises(ValueError, match=words):
        convert.convert(source, tmp_path / NAMES[kind])
    assert sorted(os.listdir(tmp_path)) == ["folder"]


def test_nanogpt_has_one_dropout(tmp_path):
    config = dataclasses.replace(CONFIG, attn_pdrop=0.3)
    with pytest.raises(ValueError, match="nanoGPT has one dropout"):
        nanogpt.write_nanogpt(tmp_path / "ckpt.pt", random_state(), config)


def _header(data, index, value):
    return data[: 4 * index] + int(value).to_bytes(4, "little") + data[4 * index + 4 :]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d[:-1], "its header asks for .*: truncated"),
        (lambda d: d[:500], "less than its header of 1024: truncated"),
        (lambda d: d + b"\0\0", "longer than its header says"),
        (lambda d: b"", "does not begin with 20240326"),
        (lambda d: b"abc", "does not begin with 20240326"),
        (lambda d: _header(d, 0, 7), "does not begin with 20240326"),
        (lambda d: _header(d, 0, 20240520), "is a shard of llm.c's tokens"),
        (lambda d: _header(d, 1, 1), "is version 1 of llm.c's checkpoints"),
        (lambda d: _header(d, 4, 2), "longer than its header says"),
        (lambda d: _header(d, 4, 2**31 - 1), "truncated"),
        (lambda d: _header(d, 5, 5), "n_embd is 24, which n_head = 5 does not divide"),
        (lambda d: _header(d, 6, 0), "n_embd is 0"),
        (lambda d: _header(d, 7, 5), "padded vocab_size is 5, less than vocab_size 130"),
    ],
)
def test_damaged_llmc_files(tmp_path, damage, words):
    path = tmp_path / "model.bin"
    path.write_bytes(damage(llmc_bytes(random_state(), 3)))
    with pytest.raises(ValueError, match=words) as error:
        convert.convert(path, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("evil",))


def test_damaged_nanogpt_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, state = tmp_path / "ckpt.pt", random_state()

    def refused(words):
        with pytest.raises(ValueError, match=words) as error:
            convert.convert(path, tmp_path / "out")
        assert "\n" not in str(error.value)
        assert str(path) in str(error.value)
        assert not (tmp_path / "out").exists()

    whole = nanogpt_file(path, state).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("not a whole PyTorch file|cannot be read safely")
    path.write_bytes(b"")
    refused("ckpt.pt")
    torch.save(state, path)
    refused("it has no 'model' and 'model_args'")
    torch.save([1], path)
    refused("it has no 'model' and 'model_args'")
    torch.save({"model": {"a": 1}, "model_args": {}}, path)
    refused("holds more than tensors by name")
    torch.save({"model": state, "model_args": Evil()}, path)
    refused("cannot be read safely")
    assert not (tmp_path / "evil").exists()
    torch.save({"model": state, "model_args": {"n_layer": 3}}, path)
    refused("model_args has no n_head")
    nanogpt_file(path, state, use_rmsnorm=True)
    refused("model_args has use_rmsnorm = True")
    nanogpt_file(path, state, n_layer=2)
    refused("the weights have transformer.h.2")
    nanogpt_file(path, state, n_layer=4)
    refused("the weights miss transformer.h.3")
    nanogpt_file(path, state, vocab_size=131)
    refused(r"wte.weight has shape \[130, 24\], the config asks for \[131, 24\]")
    nanogpt_file(path, state, vocab_size="many")
    refused("vocab_size is 'many'")


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    state = random_state()
    (tmp_path / "model.bin").write_bytes(b"before")
    state["transformer.ln_f.bias"] = state["transformer.ln_f.bias"].to("meta")  # the last tensor cannot be written
    with pytest.raises(NotImplementedError):
        llmc.write_llmc(tmp_path / "model.bin", state, CONFIG, dtype=torch.float32)
    assert (tmp_path / "model.bin").read_bytes() == b"before"

    def fails_half_way(data, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    (tmp_path / "ckpt.pt").write_bytes(b"before")
    monkeypatch.setattr(torch, "save", fails_half_way)
    with pytest.raises(OSError, match="No space left"):
        nanogpt.write_nanogpt(tmp_path / "ckpt.pt", random_state(), CONFIG)
    assert (tmp_path / "ckpt.pt").read_bytes() == b"before"
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "model.bin"]


def test_names_and_formats(tmp_path):
    source = write_source(tmp_path, "hf", random_state())
    assert [convert.target_format(n) for n in ("a/b", "a.pt", "a.pth", "b.bin", "gpt2-v1.5")] == [
        "hf", "nanogpt", "nanogpt", "llmc", "hf"
    ]  # fmt: skip
    convert.convert(source, tmp_path / "odd.name", to="llmc")
    assert convert.source_format(tmp_path / "odd.name") == "llmc"
    refusals = [
        (source, tmp_path / "x.safetensors", {}, "names a .safetensors file"),
        (source, tmp_path / "x", {"to": "gguf"}, "to is 'gguf'; choose one of hf, nanogpt, llmc"),
        (source, tmp_path / "x", {"dtype": torch.int8}, "choose float32 or bfloat16"),
        (source, source, {"to": "llmc"}, "is a folder; a llmc checkpoint is one file"),
        (source, tmp_path / "odd.name", {"to": "hf"}, "is a file; a Hugging Face checkpoint is a folder"),
        (source / "config.json", tmp_path / "x", {}, "is not a checkpoint in a known format"),
    ]
    for origin, target, options, words in refusals:
        with pytest.raises(ValueError, match=words):
            convert.convert(origin, target, **options)
    run = tmp_path / "checkpoint-000003"
    run.mkdir()
    (run / "training.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="checkpoint-000003 is a checkpoint of a run, which could not go on from it"):
        convert.convert(source, run)
    assert [file.name for file in run.iterdir()] == ["training.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"nothing.bin does not exist"):
        convert.convert(tmp_path / "nothing.bin", tmp_path / "x")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert.convert(tmp_path / "nothing", tmp_path / "x")


def test_command(tmp_path, capsys):
    source, state = write_source(tmp_path, "hf", random_state()), random_state()
    assert cli.main(["convert", str(source), str(tmp_path / "m.bin"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert "llmc, bfloat16, 25,224 parameters" in out
    assert "rounded to bfloat16" in out
    assert_same_bits(convert.load(tmp_path / "m.bin").state, {n: t.bfloat16() for n, t in state.items()})
    assert cli.main(["convert", str(source), str(tmp_path / "m"), "--to", "nanogpt"]) == 0
    assert convert.load(tmp_path / "m").format == "nanogpt"
    assert capsys.readouterr().out.count("note: nanoGPT computes GELU by erf and this model by tanh") == 1
    assert cli.main(["convert", str(tmp_path / "none.pt"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpt2-fast: ")
    assert error.count("\n") == 1


def test_importing_the_formats_is_light():
    """Conversion needs neither the kernels nor transformers."""
    code = "import sys, gpt2_fast.convert; assert not {'triton', 'transformers', 'gpt2_fast._C'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
