"""Decoders give the model's own logits; a context slides; packed weights follow the model."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from test_model import pair, tokens

from gpt2_fast.generate import decoders, generate
from gpt2_fast.generate.decoders import GraphDecoder, ModelDecoder, PackedDecoder, make_decoder, packed_model
from gpt2_fast.ops.packed_model import PackedModel
from gpt2_fast.optim import AdamW


def pair_on_cpu(**options):
    """Packed weights are a CPU's, also where there is a GPU."""
    return [model.cpu() for model in pair(**options)]


def logits_of(decoder, ids, starts, prompt):
    """Logits [B, n, V] of the last prompt token and of each that is fed after it."""
    found = [decoder.prefill(ids[:, :prompt].contiguous(), starts).clone()]
    found += [decoder.step(ids[:, i].contiguous()).clone() for i in range(prompt, ids.shape[1])]
    return torch.stack(found, 1)


def make(kind, model, n_positions):
    if kind == "packed":
        return PackedDecoder(packed_model(model, "float32"), 3, n_positions)
    return {"model": ModelDecoder, "graph": GraphDecoder}[kind](model, 3, n_positions)


@pytest.mark.parametrize("kind", ["model", "graph", "packed"])
def test_decoders_give_the_models_logits(kind):
    """Against one forward pass with the attention mask; twice, since a second prefill forgets the first."""
    device = "cpu" if kind == "packed" else DEVICE
    model = pair()[1].to(device)
    made = make(kind, model.eval(), 15)
    for seed, pads in ((0, (0, 3, 6)), (1, (5, 0, 0))):
        ids, starts = tokens(3, 14, seed=seed).to(device), torch.tensor(pads, dtype=torch.int32, device=device)
        mask = torch.arange(14, device=device) >= starts.unsqueeze(1)
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            whole = model(ids, attention_mask=mask, position_ids=positions).logits[:, 6:]
            got = logits_of(made, ids, starts, 7)
        torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)
        assert made.length == 14


def test_static_step_touches_the_host_for_nothing():
    """The step that a CUDA graph records: fixed buffers, and everything that moves is on the device."""
    _, model = pair()
    made = GraphDecoder(model.eval(), 2, 12)
    ids = tokens(2, 9)
    with torch.no_grad():
        made.prefill(ids[:, :5].contiguous(), torch.zeros(2, dtype=torch.int32, device=DEVICE))
        buffers = [made.tokens, made.logits, made.cache.index, made.cache.lengths, made.cache.keys]
        before = [b.data_ptr() for b in buffers]
        for i in range(5, 9):
            assert made.step(ids[:, i].contiguous()).data_ptr() == made.logits.data_ptr()
    assert [b.data_ptr() for b in buffers] == before
    assert made.cache.index.tolist() == [9]
    assert made.cache.lengths.tolist() == [9, 9]
    if DEVICE == "cuda":
        assert made.graph is not None


def test_a_failed_capture_goes_on_eagerly(monkeypatch):
    """Where the capture raises, a warning names the reason and the tokens are right all the same."""
    _, model = pair()
    ids = tokens(2, 9)
    starts = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    made, plain = GraphDecoder(model.eval(), 2, 12), ModelDecoder(model, 2, 12)
    made._to_capture = True

    class Stream(torch.cuda.Stream):
        def __new__(cls, **existing):
            if existing:  # torch wraps a stream that is there, for torch.cuda.current_stream
                return super().__new__(cls, **existing)
            made._step()
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    with torch.no_grad(), pytest.warns(RuntimeWarning, match="without a CUDA graph: operation not permitted$"):
        got = logits_of(made, ids, starts, 5)
    with torch.no_grad():
        torch.testing.assert_close(got, logits_of(plain, ids, starts, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_context_slides(training):
    """Where n_positions are used up, the newest half of them is the whole context, its positions from 0."""
    _, model = pair(n_positions=16)
    model.train(training)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (14, 2)]  # padding is still in the window that slides first
    got = generate(model, prompts, 30, temperature=0, context="slide")
    sequences, kept_from = [list(p) for p in prompts], [14 - len(p) for p in prompts]
    model.eval()
    held, first = 14, 0  # positions of the padded batch: how many were fed, and where the context begins
    for _ in range(30):
        if held - first > 16:
            first = held - 8
        for sequence, pad in zip(sequences, kept_from, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([sequence[max(0, first - pad) :]], device=DEVICE)).logits
            sequence.append(logits[0, -1].argmax().item())
        held += 1
    assert got == [s[len(p) :] for s, p in zip(sequences, prompts, strict=True)]


def test_a_long_prompt_slides_in_at_once():
    _, model = pair(n_positions=16)
    prompt = tokens(1, 40)[0].tolist()
    got = generate(model, [prompt], 5, temperature=0, context="slide")
    assert got == generate(model, [prompt[-8:]], 5, temperature=0)
    with pytest.raises(ValueError, match="let the context slide"):
        generate(model, [prompt], 5)


def test_packed_weights_follow_the_model(monkeypatch):
    """One packing while nothing changes; another after an optimizer step, a load, or a write through .data."""
    _, model = pair_on_cpu()
    model.eval()
    ids = tokens(2, 8).cpu()
    first = packed_model(model, "float32")
    assert packed_model(model, "float32") is first
    optimizer = AdamW(model.parameters(), lr=1e-2)

    def train():
        model(ids, labels=ids).loss.backward()
        optimizer.step()

    state = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    state["lm_head.weight"] = state["transformer.wte.weight"]
    writes = (train, lambda: model.load_state_dict(state), lambda: model.transformer.h[1].mlp.c_fc.weight.data.neg_())
    for write in writes:
        write()
        with torch.no_grad():
            expected = model(ids).logits[:, -1]
            made = PackedDecoder(packed_model(model, "float32"), 2, 8)
            torch.testing.assert_close(
                made.prefill(ids, torch.zeros(2, dtype=torch.int32)), expected, rtol=1e-4, atol=1e-4
            )
    del made
    old = weakref.ref(packed_model(model, "float32"))
    alive = []

    def pack(*args):
        gc.collect()
        alive.append(old())
        return PackedModel(*args)

    monkeypatch.setattr(decoders, "PackedModel", pack)
    assert packed_model(model, "int8").weights == "int8"
    assert alive == [None], "two packings of one model are in memory"


def _swap(weight):
    weight[[3, 5]] = weight[[5, 3]].clone()


EDITS = {
    "row": lambda weight: weight[5].neg_(),
    "last row": lambda weight: weight[-1].neg_(),
    "column": lambda weight: weight[:, 5].fill_(300.0),
    "last column": lambda weight: weight[:, -1].fill_(300.0),
    "rows swapped": _swap,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_write_through_data_is_seen(dtype):
    """It moves no version counter: of a row or a column of a matrix, and of one number of a vector."""
    _, model = pair_on_cpu()
    model = model.to(dtype).eval()
    packed = packed_model(model, "float32")
    for name, parameter in model.named_parameters():
        edits = EDITS if parameter.ndim == 2 else {"a number": lambda vector: vector[3:4].add_(1.0)}
        for kind, edit in edits.items():
            edit(parameter.data)
            packed, before = packed_model(model, "float32"), packed
            assert packed is not before, (name, kind)
    next(model.parameters()).data[3] = torch.nan
    assert packed_model(model, "float32") is packed_model(model, "float32")


def _held_as_a_buffer(model):
    layer = model.transformer.h[0].mlp.c_fc
    weight = layer.weight.detach().clone()
    del layer.weight
    layer.register_buffer("weight", weight)


def _sharing(part):
    def share(source):
        return lambda model: setattr(model.transformer.h[2], part, getattr(model.transformer.h[source], part))

    return share(0), share(1)


def _layernorms_of_another_eps(model):
    model.config = replace(model.config, layer_norm_epsilon=0.5)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 0.5


def _transposed(model):
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data = weight.data.t()


def _transposed_in_place(model):
    weight = model.transformer.h[0].attn.c_proj.weight
    weight.data.copy_(weight.data.t().clone())


def _nothing(model):
    pass


CHANGES = {
    "a buffer": (_held_as_a_buffer, lambda model: model.transformer.h[0].mlp.c_fc.weight.mul_(-3.0)),
    "through .data of a buffer": (_held_as_a_buffer, lambda model: model.transformer.h[0].mlp.c_fc.weight.data.neg_()),
    "another shared mlp": _sharing("mlp"),
    "another shared attention": _sharing("attn"),
    "another eps": (_nothing, _layernorms_of_another_eps),
    "other strides": (_nothing, _transposed),
    "transposed in place": (_nothing, _transposed_in_place),
    "a bias less": (_nothing, lambda model: model.transformer.h[1].ln_2.register_parameter("bias", None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_packed_is_what_is_compared(change):
    """Tensors that are no parameters or lie in two layers, how a matrix is read, and numbers of the config."""
    model, (prepare, edit) = pair_on_cpu(spread=0.3)[1].eval(), CHANGES[change]
    ids, starts = tokens(1, 9).cpu(), torch.zeros(1, dtype=torch.int32)
    prepare(model)
    logits = lambda: PackedDecoder(packed_model(model, "float32"), 1, 9).prefill(ids, starts).clone()
    before, packed = logits(), packed_model(model, "float32")
    assert packed_model(model, "float32") is packed
    edit(model)
    after = logits()
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, model(ids).logits[:, -1], rtol=1e-3, atol=1e-3)


def test_threads_pack_a_model_once(monkeypatch):
    """Eight that use it first at one time get one packing."""
    _, model = pair_on_cpu()
    made, start = [], threading.Barrier(8)

    def pack(*args):
        made.append(PackedModel(*args))
        time.sleep(0.05)  # long enough for the others to arrive
        return made[-1]

    def use(found):
        start.wait()
        found.append(packed_model(model, "float32"))

    monkeypatch.setattr(decoders, "PackedModel", pack)
    found = []
    users = [threading.Thread(target=use, args=(found,)) for _ in range(8)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(made) == 1
    assert all(packed is made[0] for packed in found)
    assert len(found) == 8


def test_who_is_packed(monkeypatch):
    """An eval model in float32 or bfloat16 where C++ runs; by name anywhere; a model in training never by itself."""
    _, model = pair_on_cpu()
    kinds = lambda m, weights=None: type(make_decoder(m, 1, 8, weights)).__name__
    assert kinds(model.train()) == "ModelDecoder"
    assert kinds(model, "int8") == "PackedDecoder"
    assert kinds(pair_on_cpu(impl="reference")[1].eval()) == "ModelDecoder"
    monkeypatch.setattr(decoders.dispatch, "choose", lambda *args: "cpp")
    assert kinds(model.eval()) == "PackedDecoder"
    assert make_decoder(model.bfloat16(), 1, 8).packed.weights == "bfloat16"
    monkeypatch.setattr(decoders.dispatch, "choose", lambda *args: "reference")
    assert kinds(model) == "ModelDecoder"


def _hooked(module):
    module.register_forward_hook(lambda module, inputs, output: output * 2)


def _overridden(module):
    forward = module.forward
    module.forward = lambda x: forward(x) * 2


class _Doubled(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *inputs):
        return self.module(*inputs) * 2


def _swapped(name):
    def swap(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _Doubled(model.get_submodule(name)))

    return swap


@pytest.mark.parametrize("change", [_hooked, _overridden, _swapped], ids=["hook", "forward", "swap"])
@pytest.mark.parametrize(
    "name",
    ["transformer.wte", "transformer.h.1.attn.c_proj", "transformer.h.0.mlp.c_fc", "transformer.h.1.ln_2", "lm_head"],
)
def test_a_module_that_packed_weights_do_not_stand_for_is_called(name, change):
    """Packed before or not. Weights asked for by name are refused in one line that says where."""
    model = pair_on_cpu()[1].eval()
    ids, starts = tokens(1, 5), torch.zeros(1, dtype=torch.int32)
    before = logits_of(make_decoder(model, 1, 8), ids, starts, 3)
    if change is _swapped:
        weight = model.transformer.wte.weight  # whose device is asked for
        _swapped(name)(model)
        model.transformer.wte.weight = weight
    else:
        change(model.get_submodule(name))
    found = logits_of(make_decoder(model, 1, 8), ids, starts, 3)
    torch.testing.assert_close(found, model(ids).logits[:, 2:].float(), rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 1e-2
    with pytest.raises(ValueError, match=rf"^{name} (has|is) .*, which packed weights would leave out; [^\n]*$"):
        make_decoder(model, 1, 8, "int8")


def test_hooks_that_generation_would_not_call_are_refused():
    model = pair_on_cpu()[1].eval()
    with model.register_forward_hook(lambda *args: None), pytest.raises(ValueError, match="the model has hooks"):
        generate(model, [[1, 2]], 2)
    assert generate(model, [[1, 2]], 2)


@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8", "int4"])
def test_generation_with_packed_weights(weights):
    """Greedy text of the packed model; float32 is the model's own to the token, left padding included."""
    _, model = pair_on_cpu()
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (1, 5, 11)]
    got = generate(model, prompts, 12, temperature=0, weights=weights)
    assert got == [generate(model, [p], 12, temperature=0, weights=weights)[0] for p in prompts]
    if weights == "float32":
        assert got == generate(model.train(), prompts, 12, temperature=0)
