"""Checkpoints: transformers' folders both ways bit for bit, exact resume, and clear refusals."""

import dataclasses
import json
import os
import resource
import shutil

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gpt2_fast import GPT2LMHeadModel
from gpt2_fast.checkpoint import (
    canonical_state_dict,
    capture_rng,
    expected_shapes,
    load_pretrained,
    load_training_state,
    restore_rng,
    save_pretrained,
    save_training_state,
)
from gpt2_fast.config import GPT2Config

CONFIG = GPT2Config(vocab_size=67, n_positions=16, n_embd=24, n_layer=2, n_head=3)


def random_state(config=CONFIG, seed=0):
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(shape, generator=generator) for n, shape in expected_shapes(config).items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def hf_model(config=CONFIG, cls="GPT2LMHeadModel"):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = getattr(transformers, cls)(transformers.GPT2Config(**config.to_dict()))
    for parameter in model.parameters():  # zero biases would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


def assert_one_line(error, *words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message, message


@pytest.fixture
def folder(tmp_path):
    save_pretrained(tmp_path / "model", random_state(), CONFIG)
    return tmp_path / "model"


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_loads_our_folder(tmp_path, tied):
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(CONFIG, tie_word_embeddings=tied, n_inner=50)
    model = hf_model(config)
    save_pretrained(tmp_path, model.state_dict(), config)
    again, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(16)[None] * 4
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert ("lm_head.weight" in file.keys()) == (not tied)  # noqa: SIM118 (not a dict)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [True, False])
def test_we_load_transformers_folder(tmp_path, tied, shard_size):
    model = hf_model(dataclasses.replace(CONFIG, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    config, state = load_pretrained(tmp_path)
    assert config == dataclasses.replace(CONFIG, tie_word_embeddings=tied)
    assert_equal(state, model.state_dict())
    assert (state["lm_head.weight"] is state["transformer.wte.weight"]) == tied
    model.load_state_dict(state, strict=True)


def test_names_and_masks_of_the_published_files(tmp_path):
    """The hub's gpt2 was saved from GPT2Model: no prefix, no head, causal masks beside the weights."""
    model = hf_model(cls="GPT2Model")
    state = dict(model.state_dict())
    for i in range(CONFIG.n_layer):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    assert "wte.weight" in state
    CONFIG.to_json(tmp_path / "config.json")
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    _, loaded = load_pretrained(tmp_path)
    assert loaded.keys() == expected_shapes(CONFIG).keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded[f"transformer.{name}"], tensor)


@pytest.mark.parametrize("sharded", [False, True])
def test_pytorch_model_bin(tmp_path, sharded):
    CONFIG.to_json(tmp_path / "config.json")
    state = random_state()
    if sharded:
        names = list(state)
        for i in range(2):
            torch.save({n: state[n] for n in names[i::2]}, tmp_path / f"pytorch_model-{i}.bin")
        index = {"weight_map": {n: f"pytorch_model-{i % 2}.bin" for i, n in enumerate(names)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    assert_equal(load_pretrained(tmp_path)[1], state)


def test_code_in_a_bin_is_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    CONFIG.to_json(tmp_path / "config.json")
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert_one_line(error, "pytorch_model.bin", "cannot be read safely")
    assert not (tmp_path / "ran").exists()


def test_dtypes(tmp_path):
    state = random_state()
    save_pretrained(tmp_path, state, CONFIG, dtype=torch.bfloat16)
    _, stored = load_pretrained(tmp_path)
    assert_equal(stored, {name: tensor.bfloat16() for name, tensor in state.items()})
    _, cast = load_pretrained(tmp_path, dtype=torch.float64)
    assert_equal(cast, {name: tensor.bfloat16().double() for name, tensor in state.items()})
    assert cast["lm_head.weight"] is cast["transformer.wte.weight"]


def test_views_of_one_flat_buffer_are_saved(tmp_path):
    state = random_state()
    flat = torch.cat([tensor.flatten() for name, tensor in state.items() if name != "lm_head.weight"])
    views, start = {}, 0
    for name, shape in expected_shapes(CONFIG).items():
        if name != "lm_head.weight":
            size = int(np.prod(shape))
            views[name] = flat[start : start + size].view(shape)
            start += size
    save_pretrained(tmp_path, views, CONFIG)
    assert_equal(load_pretrained(tmp_path)[1], state)


def test_interrupted_save_leaves_the_old_checkpoint(folder, monkeypatch):
    before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(folder, random_state(seed=9), CONFIG)
    assert {name: (folder / name).read_bytes() for name in os.listdir(folder)} == before


def without(name):
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("transformer.h.1.mlp.c_fc.bias"), ["miss transformer.h.1.mlp.c_fc.bias"]),
        (without("transformer.wte.weight"), ["miss transformer.wte.weight"]),
        (lambda s: s.update({"score.weight": torch.ones(2)}), ["have transformer.score.weight"]),
        (
            lambda s: s.update({f"transformer.h.{i}.ln_1.bias": torch.ones(24) for i in range(2, 7)}),
            ["h.3.ln_1.bias, transformer.h.4.ln_1.bias and 2 more,"],
        ),
        (lambda s: s.update({"transformer.wpe.weight": torch.ones(8, 24)}), ["[8, 24]", "[16, 24]"]),
        (lambda s: s.update({"lm_head.weight": torch.ones(67, 24)}), ["lm_head.weight differs", "tie_word"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, change, words):
    state = random_state()
    change(state)
    with pytest.raises(ValueError) as error:
        save_pretrained(folder, state, CONFIG)
    assert_one_line(error, *words)
    safetensors.torch.save_file({n: t.clone() for n, t in state.items()}, folder / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert_one_line(error, folder / "model.safetensors", *words)


def test_equal_head_and_embedding_become_one_tensor():
    state = random_state()
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    tied = canonical_state_dict(state, CONFIG)
    assert tied["lm_head.weight"] is tied["transformer.wte.weight"]


def test_untied_head_must_be_there():
    state = random_state()
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"miss lm_head\.weight"):
        canonical_state_dict(state, dataclasses.replace(CONFIG, tie_word_embeddings=False))


def test_missing_and_broken_folders(tmp_path, folder):
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(tmp_path / "nothing")
    assert_one_line(error, tmp_path / "nothing", "does not exist")
    with pytest.raises(ValueError) as error:
        load_pretrained(folder / "model.safetensors")
    assert_one_line(error, "is a file; give the folder")
    weights = folder / "model.safetensors"
    for content in (weights.read_bytes()[:-100], weights.read_bytes()[:20], b""):
        weights.write_bytes(content)
        with pytest.raises(ValueError) as error:
            load_pretrained(folder)
        assert_one_line(error, weights, "truncated")
    weights.unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(folder)
    assert_one_line(error, folder, "has no weights", "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError) as error:
        load_pretrained(folder)
    assert_one_line(error, "config.json", "'bert'")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained(folder)
    assert_one_line(error, "config.json does not exist")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"weight_map": {"wte.weight": "model-1.safetensors"}}, ["lists 'model-1.safetensors'"]),
        ({"weight_map": {"wte.weight": "../model/model.old"}}, ["lists '../model/model.old'"]),
        ({"weights": 3}, ["not an index"]),
    ],
)
def test_bad_index(folder, index, words):
    (folder / "model.safetensors").rename(folder / "model.old")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_pretrained(folder)
    assert_one_line(error, "model.safetensors.index.json", *words)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK\x03\x04 no zip"])
def test_broken_bin(tmp_path, content):
    CONFIG.to_json(tmp_path / "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_pretrained(tmp_path)
    assert_one_line(error, "pytorch_model.bin", "truncated")


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    for save in (
        lambda: save_pretrained(tmp_path / "file", random_state(), CONFIG),
        lambda: save_training_state(tmp_path / "file" / "x", **training()),
    ):
        with pytest.raises(OSError, match="cannot write") as error:
            save()
        assert_one_line(error, tmp_path / "file", "choose a folder you can write")


def test_what_the_disk_refuses_is_one_line_and_leaves_nothing(tmp_path):
    """safetensors has an error of its own for it, which would end a run with a traceback."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(OSError) as error:
            save_pretrained(tmp_path, random_state(), CONFIG)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_one_line(error, "cannot write", tmp_path / "model.safetensors", "File too large")
    assert os.listdir(tmp_path) == []


def test_hub_names_ask_the_hub(folder, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    asked = []

    def download(repo, name, *, revision, cache_dir, local_files_only):
        asked.append((repo, name, revision, cache_dir, local_files_only))
        if not (folder / name).exists():
            raise EntryNotFoundError(name)
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    torch.save(random_state(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    _, state = load_pretrained("someone/gpt2", revision="v1", cache_dir="c", local_files_only=True)
    assert_equal(state, random_state())
    names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
    ]
    assert asked == [("someone/gpt2", name, "v1", "c", True) for name in names]


def test_the_hubs_cache_is_read_offline(folder, tmp_path):
    """The real client, on a cache folder laid out as it lays it out."""
    cached = tmp_path / "hub" / "models--someone--tiny"
    (cached / "refs").mkdir(parents=True)
    commit = "0123456789" * 4
    (cached / "refs" / "main").write_text(commit)
    shutil.copytree(folder, cached / "snapshots" / commit)
    _, state = load_pretrained("someone/tiny", cache_dir=tmp_path / "hub", local_files_only=True)
    assert_equal(state, random_state())
    with pytest.raises(FileNotFoundError) as error:
        load_pretrained("someone/else", cache_dir=tmp_path / "hub", local_files_only=True)
    assert_one_line(error, "'someone/else' is neither a folder here nor in the Hugging Face cache")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("RepositoryNotFoundError", "nor a repository"),
        ("RevisionNotFoundError", "no revision 'v1'"),
        ("GatedRepoError", "is gated"),
        ("HfHubHTTPError", "could not be read"),
        ("RemoteEntryNotFoundError", "has no config.json"),
        ("HFValidationError", "could not be read"),
    ],
)
def test_hub_errors_are_one_line(monkeypatch, name, words):
    import huggingface_hub
    from huggingface_hub import errors

    if name == "RemoteEntryNotFoundError" and not hasattr(errors, name):
        name = "EntryNotFoundError"  # what the hub's own was called before huggingface_hub 1.0
    kind = getattr(errors, name)
    error = kind.__new__(kind)
    error.args = ("first line\n\nsecond",)
    monkeypatch.setattr(kind, "__str__", lambda self: self.args[0])

    def download(*args, **kwargs):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises((ValueError, FileNotFoundError)) as raised:
        load_pretrained("no-such-model", revision="v1")
    assert_one_line(raised, "'no-such-model'", words)


def training(**changes):
    state = {
        "step": 12,
        "config": CONFIG,
        "model_state": random_state(),
        "optimizer_state": {"state": {0: {"step": torch.tensor(12.0), "exp_avg": torch.ones(3)}}, "param_groups": []},
    }
    return state | changes


def test_training_resumes_to_the_bit(tmp_path):
    def start():
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def go_on(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        return model.state_dict()

    model, optimizer = start()
    go_on(model, optimizer, 3)
    states = {"model_state": model.state_dict(), "optimizer_state": optimizer.state_dict()}
    path = save_training_state(tmp_path, step=3, config=CONFIG, extra={"best": 1.5, "seen": [1, (2, None)]}, **states)
    assert os.listdir(tmp_path) == ["training.safetensors"]
    straight = go_on(model, optimizer, 3)

    torch.manual_seed(123)
    model, optimizer = start()
    state = load_training_state(path, config=CONFIG)
    assert (state.step, state.config, state.extra) == (3, CONFIG, {"best": 1.5, "seen": [1, (2, None)]})
    model.load_state_dict(state.model)
    optimizer.load_state_dict(state.optimizer)
    restore_rng(state.rng)
    assert_equal(go_on(model, optimizer, 3), straight)


def test_captured_rng_is_what_is_saved(tmp_path):
    rng = capture_rng()
    first = torch.rand(3)
    save_training_state(tmp_path, **training(rng=rng))
    restore_rng(load_training_state(tmp_path).rng)
    assert torch.equal(torch.rand(3), first)


def test_tied_tensors_stay_tied(tmp_path):
    save_training_state(tmp_path, **training())
    model = load_training_state(tmp_path).model
    assert model["lm_head.weight"].data_ptr() == model["transformer.wte.weight"].data_ptr()
    assert_equal(model, random_state())


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"optimizer_state": {"lr": np.float64(1)}}, r"optimizer.lr is a float64"),
        ({"extra": {"a": [1, {2}]}}, r"extra.a.1 is a set"),
    ],
)
def test_what_would_not_load_is_not_saved(tmp_path, changes, where):
    with pytest.raises(TypeError, match=where):
        save_training_state(tmp_path, **training(**changes))
    assert os.listdir(tmp_path) == []


def test_other_broken_and_missing_training_states(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_training_state(tmp_path)
    assert_one_line(error, tmp_path / "training.safetensors", "no run to resume")
    path = save_training_state(tmp_path, **training())
    with pytest.raises(ValueError) as error:
        load_training_state(path, config=dataclasses.replace(CONFIG, n_layer=5))
    assert_one_line(error, path, "n_layer is 2 there and 5 here")
    content = path.read_bytes()
    for part in (content[:-200], content[:1000], b""):
        path.write_bytes(part)
        with pytest.raises(ValueError) as error:
            load_training_state(path)
        assert_one_line(error, path, "damaged" if len(part) > 1000 else "truncated")
    path.unlink()
    torch.save({"model": {}, "iter_num": 3}, tmp_path / "training.pt")
    with pytest.raises(ValueError) as error:
        load_training_state(tmp_path)
    assert_one_line(error, tmp_path / "training.pt", "not a training state")


def test_no_bit_of_a_training_state_can_change(tmp_path):
    """In its header, its metadata, its digest or a tensor: it is refused."""
    path = save_training_state(tmp_path, **training())
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    header = int.from_bytes(content[:8], "little") + 8
    digest = content.index(b'"sha256":"') + 10
    places = [0, 3, 7, 8, 20, digest, digest + 63, header - 1, header, len(content) - 1]
    places += generator.integers(0, header, 100).tolist() + generator.integers(header, len(content), 100).tolist()
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << generator.integers(8)
        path.write_bytes(changed)
        with pytest.raises(ValueError) as error:
            load_training_state(path)
        assert_one_line(error, path, "")
    path.write_bytes(content + b"\0")
    with pytest.raises(ValueError, match="damaged"):
        load_training_state(path)
    path.write_bytes(content)
    assert load_training_state(path).step == training()["step"]


def test_a_training_pt_of_an_earlier_version_is_read(tmp_path):
    given = training()
    torch.save(
        {"format": "gpt2_fast training state 1", "step": 7, "config": CONFIG.to_dict(), "model": given["model_state"],
         "optimizer": given["optimizer_state"], "rng": capture_rng(), "extra": {"a": 1}}, tmp_path / "training.pt",
    )  # fmt: skip
    state = load_training_state(tmp_path, config=CONFIG)
    assert (state.step, state.extra) == (7, {"a": 1})
    assert_equal(state.model, given["model_state"])
    for part in ("step", "config", "model", "optimizer", "rng", "extra"):
        content = torch.load(tmp_path / "training.pt", weights_only=True)
        broken = tmp_path / part / "training.pt"
        broken.parent.mkdir()
        torch.save({k: v for k, v in content.items() if k != part}, broken)
        with pytest.raises(ValueError) as error:
            load_training_state(broken)
        assert_one_line(error, broken, part)


def test_interrupted_training_state_leaves_the_old_one(tmp_path, monkeypatch):
    path = save_training_state(tmp_path, **training())
    before = path.read_bytes()

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_training_state(tmp_path, **training(step=13))
    assert os.listdir(tmp_path) == ["training.safetensors"]
    assert path.read_bytes() == before


def test_views_in_a_training_state(tmp_path):
    """A part of a larger memory alone, and two parts of one memory."""
    flat, other = torch.arange(40.0), torch.arange(7.0)
    views = {"rows": flat[8:20].view(3, 4), "columns": flat.view(10, 4)[:, 1:3], "end": flat[16:], "alone": other[2:5]}
    save_training_state(tmp_path, step=1, config=CONFIG, model_state={}, optimizer_state={}, extra=views)
    found = load_training_state(tmp_path).extra
    assert found.keys() == views.keys()
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_dtensors_are_refused_by_name(tmp_path):
    """A file of one process would have a rank's part, if anything."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=3, vocab_size=61, n_positions=16))
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(
            TypeError, match="^transformer.wte.weight is a DTensor.*full_tensor.*distributed.checkpoint$"
        ):
            model.save_pretrained(tmp_path)
        states = {"model_state": model.state_dict(), "optimizer_state": {}}
        with pytest.raises(TypeError, match="^model.transformer.wte.weight is a DTensor"):
            save_training_state(tmp_path, step=1, config=model.config, **states)
        assert not list(tmp_path.iterdir())
        whole = {name: t.full_tensor() for name, t in model.state_dict().items()}
        save_pretrained(tmp_path, whole, model.config)
        loaded = GPT2LMHeadModel.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(t, loaded[name]) for name, t in whole.items())
    finally:
        dist.destroy_process_group()
