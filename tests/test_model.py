"""The model against transformers' GPT-2 with the same weights: values, gradients, steps, and what surrounds them."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import transformers
from conftest import DEVICE
from numerics import assert_as_exact, assert_same_bits

from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops import bound
from gpt2_fast.ops.embedding import check_ids
from gpt2_fast.ops.runtime.dispatch import ImplementationUnavailable
from gpt2_fast.ops.runtime.philox import NO_DROPOUT as NOTHING_DROPPED
from gpt2_fast.optim import AdamW

SMALL = {"vocab_size": 257, "n_positions": 64, "n_embd": 96, "n_layer": 3, "n_head": 3}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
B, T = 3, 37


def pair(impl="auto", dtype=torch.float32, spread=0.1, **overrides):
    """transformers' model and ours with the same random weights, biases and LayerNorms too."""
    fields = {**SMALL, **NO_DROPOUT, **overrides}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields, attn_implementation="eager"))
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(torch.randn_like(p), alpha=spread)
    ours = GPT2LMHeadModel(GPT2Config(**fields), impl=impl)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(DEVICE, dtype).train(), ours.to(DEVICE, dtype).train()


def tokens(*shape, vocab_size=257, seed=0):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed), device="cpu").to(DEVICE)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def compare(theirs, ours, truth, call, *, rows=None, dtype=torch.float32):
    """Holds our logits, loss and every gradient to the error rule, truth being transformers in float64."""
    outputs = [call(model) for model in (ours, theirs, truth)]
    for output in outputs:
        output.loss.backward()
    logits = [o.logits if rows is None else o.logits[rows] for o in outputs]
    assert_as_exact(*logits, "logits", dtype)
    assert_as_exact(*(o.loss for o in outputs), "loss", dtype)
    ours_g, theirs_g, truth_g = (gradients(model) for model in (ours, theirs, truth))
    assert ours_g.keys() == truth_g.keys()
    for name in truth_g:
        assert_as_exact(ours_g[name], theirs_g[name], truth_g[name], f"gradient of {name}", dtype)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_loss_and_gradients(impl, dtype, threads):
    threads(2)  # torch's sums of bfloat16 depend on it, by as much as the rule allows
    theirs, ours = pair(impl, dtype)
    truth = copy.deepcopy(theirs).double()
    ids = tokens(B, T)
    compare(theirs, ours, truth, lambda m: m(ids, labels=ids), dtype=dtype)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(
    ("site", "part"),
    [(0, "transformer"), (1, "h.0.attn"), (2, "h.0.attn"), (3, "h.0.mlp"), (4, "h.1.attn"), (5, "h.1.attn"),
     (6, "h.1.mlp")],
)  # fmt: skip
def test_a_part_in_training_drops_what_is_its_own(site, part, whole):
    """The mode of the module that transformers keeps the dropout in decides; the others are in eval mode."""
    _, ours = pair(n_layer=2, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)
    ours.transformer.ops.whole_layers = whole
    ours.eval()
    module = ours.transformer if part == "transformer" else ours.transformer.get_submodule(part)
    module.training = True
    with torch.no_grad():
        left = site + 1 if site % 3 == 1 else site
        for i, block in enumerate(ours.transformer.h):  # nothing but what this site drops is left of the model
            for n, projection in ((2, block.attn.c_proj), (3, block.mlp.c_proj)):
                if 3 * i + n != left:
                    projection.weight.zero_()
                    projection.bias.zero_()
        ids = tokens(B, T)
        dropped = [ours(ids, dropout_key=torch.tensor([key], device=DEVICE)).logits for key in (1, 2)]
        assert not torch.equal(*dropped)
        module.training = False
        for other in ours.modules():
            other.training = other is not ours.transformer and other is not module
        if site:
            kept = [ours(ids, dropout_key=torch.tensor([key], device=DEVICE)).logits for key in (1, 2)]
            assert torch.equal(*kept)


def test_every_dropout_has_a_site_of_its_own(monkeypatch):
    """A layer that stands in the model twice, or was copied, draws two masks."""
    _, ours = pair(n_layer=2, embd_pdrop=0.1, attn_pdrop=0.2, resid_pdrop=0.3)
    transformer, sites = ours.transformer.train(), []
    transformer.ops.whole_layers = False
    run = transformer.ops.run

    def noting(op, *tensors, **options):
        sites.extend(d.site for d in [options.get("dropout", NOTHING_DROPPED)] if d.p > 0)
        return run(op, *tensors, **options)

    for name in ("embedding", "add_layernorm", "attention", "mlp"):
        monkeypatch.setattr(transformer.ops, name, functools.partial(noting, getattr(bound, name)))
    transformer.h.append(transformer.h[0])
    transformer.h.append(copy.deepcopy(transformer.h[1]))
    ours(tokens(B, T))
    assert sites == list(range(13))


def test_triton_step_matches():
    """The whole model through the Triton kernels: natively on a GPU, in the interpreter without one."""
    theirs, ours = pair("triton", n_layer=1, n_embd=32, n_head=2, vocab_size=61)
    truth = copy.deepcopy(theirs).double()
    ids = tokens(1, 19, vocab_size=61)
    compare(theirs, ours, truth, lambda m: m(ids, labels=ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side):
    """With an attention mask and -100 at the padding, as people train; positions as transformers counts them."""
    theirs, ours = pair()
    truth = copy.deepcopy(theirs).double()
    ids, mask = tokens(B, T), torch.ones(B, T, dtype=torch.int64, device=DEVICE)
    for row, n in enumerate((0, 5, 20)):
        mask[row, slice(0, n) if side == "left" else slice(T - n, T)] = 0
    labels = ids.masked_fill(mask == 0, -100)
    if side == "left":  # the first token after padding is predicted from padding, which is not defined
        labels[torch.arange(B), mask.argmax(1)] = -100
    call = lambda m: m(ids, attention_mask=mask, labels=labels)
    compare(theirs, ours, truth, call, rows=mask.bool())


def test_position_and_token_type_ids():
    theirs, ours = pair()
    truth = copy.deepcopy(theirs).double()
    ids, positions, types = tokens(B, T), tokens(B, T, vocab_size=64, seed=1), tokens(B, T, vocab_size=2, seed=2)
    compare(theirs, ours, truth, lambda m: m(ids, position_ids=positions, token_type_ids=types, labels=ids))


@pytest.mark.parametrize(
    "options",
    [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}, {"tie_word_embeddings": False},
     {"n_inner": 100}, {"activation_function": "gelu"}, {"activation_function": "gelu_pytorch_tanh"}],
    ids=str,
)  # fmt: skip
def test_configuration_options(options):
    # Scores that are not scaled would be so large that softmax picks single keys, and errors are chance.
    spread = 0.04 if options.get("scale_attn_weights") is False else 0.1
    theirs, ours = pair(**options, spread=spread)
    truth = copy.deepcopy(theirs).double()
    ids = tokens(B, T)
    compare(theirs, ours, truth, lambda m: m(ids, labels=ids))


def test_documents_see_only_themselves():
    """Two documents in one row give what each gives alone."""
    _, ours = pair()
    ids = tokens(1, 20)
    documents = torch.tensor([[0] * 8 + [1] * 12], device=DEVICE)
    positions = torch.cat([torch.arange(8), torch.arange(12)]).unsqueeze(0).to(DEVICE)
    together = ours(ids, document_ids=documents, position_ids=positions).logits
    alone = torch.cat([ours(ids[:, :8]).logits, ours(ids[:, 8:]).logits], 1)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_twenty_steps_track_transformers():
    theirs, ours = pair()
    ids = [tokens(2, 32, seed=i) for i in range(20)]
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1}
    losses = []
    for model, optimizer in ((theirs, torch.optim.AdamW), (ours, AdamW)):
        opt = optimizer(model.parameters(), **options)
        losses.append([])
        for x in ids:
            loss = model(x, labels=x).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=2e-5, atol=0)
    for name, p in ours.state_dict().items():
        if name.endswith(
            "c_attn.bias"
        ):  # softmax ignores the keys' bias: its gradient is rounding, which Adam enlarges
            p[96:192] = theirs.state_dict()[name][96:192]
        torch.testing.assert_close(
            p, theirs.state_dict()[name], rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_same_seed_same_bits():
    """Two steps with dropout, from one seed, twice."""
    ids = tokens(B, T)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        model = GPT2LMHeadModel(GPT2Config(**SMALL)).to(DEVICE).train()
        opt = AdamW(model.parameters(), lr=1e-3, clip_grad_norm=1.0)
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            opt.step()
            opt.zero_grad()
        runs.append([p.detach() for p in model.parameters()])
    assert_same_bits(*runs)


def test_dropout_matches_the_reference_and_follows_the_seed():
    """Same key, same masks: all implementations give the same loss with dropout on, and eval mode has none."""
    config = GPT2Config(**{**SMALL, "attn_pdrop": 0.2, "resid_pdrop": 0.2, "embd_pdrop": 0.2})
    ids, losses = tokens(2, 32), {}
    for impl in ("auto", "reference"):
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config, impl=impl).to(DEVICE).train()
        torch.manual_seed(11)
        first = model(ids, labels=ids).loss
        second = model(ids, labels=ids).loss
        torch.manual_seed(11)
        again = model(ids, labels=ids).loss
        assert first == again
        assert first != second
        losses[impl] = [first.item(), second.item(), model.eval()(ids, labels=ids).loss.item()]
    torch.testing.assert_close(torch.tensor(losses["auto"]), torch.tensor(losses["reference"]), rtol=1e-5, atol=0)
    assert abs(losses["auto"][0] - losses["auto"][2]) > 1e-4


@pytest.mark.parametrize("pdrop", [0.0, 0.1])
def test_recompute_changes_nothing(pdrop):
    config = GPT2Config(**{**SMALL, "attn_pdrop": pdrop, "resid_pdrop": pdrop, "embd_pdrop": pdrop})
    model, ids, runs = GPT2LMHeadModel(config).to(DEVICE).train(), tokens(2, 32), []
    for enabled in (False, True):
        model.gradient_checkpointing_enable(enabled)
        model.zero_grad()
        torch.manual_seed(7)
        model(ids, labels=ids).loss.backward()
        runs.append([p.grad.clone() for p in model.parameters()])
    assert_same_bits(*runs)


def test_gradient_accumulation_is_the_whole_batch():
    """num_items_in_batch over micro-batches of unequal label counts gives the gradient of the batch at once."""
    _, model = pair()
    ids = tokens(4, T)
    labels = ids.clone()
    labels[0, 5:] = -100
    model(ids, labels=labels).loss.backward()
    whole = gradients(model)
    whole = {k: v.clone() for k, v in whole.items()}
    model.zero_grad()
    n_items = (labels[:, 1:] != -100).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        model(ids[rows], labels=labels[rows], num_items_in_batch=n_items).loss.backward()
    for name, g in gradients(model).items():
        torch.testing.assert_close(g, whole[name], rtol=1e-4, atol=1e-6)


def test_output_unpacks_as_transformers_does():
    _, model = pair()
    ids = tokens(1, 8)
    output = model(ids, labels=ids)
    loss, logits = output
    assert loss is output[0] is output["loss"]
    assert logits is output.logits is output[1]
    assert model(ids).loss is None
    assert torch.equal(model(ids)[0], model(ids).logits)
    assert torch.equal(model(ids, targets=torch.roll(ids, -1, 1)).logits, logits)


def test_targets_are_labels_shifted():
    _, model = pair()
    ids = tokens(2, 16)
    targets = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], 1)
    assert model(ids, targets=targets).loss == model(ids, labels=ids).loss


def test_autocast_matches_transformers_autocast():
    theirs, ours = pair()
    truth = copy.deepcopy(theirs).double()
    ids = tokens(B, T)
    with torch.autocast(DEVICE, torch.bfloat16):
        mine, other = ours(ids, labels=ids), theirs(ids, labels=ids)
    assert mine.logits.dtype == other.logits.dtype == torch.bfloat16  # asked for outside the block
    assert_as_exact(mine.logits, other.logits, truth(ids).logits, "logits", torch.bfloat16)
    mine.loss.backward()
    other.loss.backward()
    exact = truth(ids, labels=ids)
    exact.loss.backward()
    assert_as_exact(mine.loss, other.loss, exact.loss, "loss", torch.bfloat16)
    for name, g in gradients(ours).items():
        assert g.dtype == torch.float32
        assert_as_exact(g, gradients(theirs)[name], gradients(truth)[name], f"gradient of {name}", torch.bfloat16)


def test_compiles_whole():
    _, model = pair(n_layer=1)
    ids = tokens(2, 16)
    eager = model(ids, labels=ids).loss
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(compiled, eager)
    compiled.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_sizes_and_initialisation():
    with torch.device("meta"):
        assert GPT2LMHeadModel(GPT2Config()).num_parameters() == num_params(GPT2Config()) == 124_439_808
    model = GPT2LMHeadModel(GPT2Config(**{**SMALL, "n_layer": 8}))
    assert abs(model.transformer.h[0].mlp.c_proj.weight.std().item() - 0.02 / 4) < 3e-4
    assert abs(model.transformer.h[0].attn.c_attn.weight.std().item() - 0.02) < 1e-3
    assert model.transformer.h[0].mlp.c_fc.bias.abs().max() == 0
    assert torch.equal(model.transformer.ln_f.weight, torch.ones(96))


def test_loss_at_initialisation():
    """A fresh model knows nothing: its loss is ln V, and a little more for the spread of its logits."""
    config = GPT2Config.from_preset("nano", vocab_size=5003)
    model = GPT2LMHeadModel(config).to(DEVICE).eval()
    ids = tokens(2, 64, vocab_size=5003)
    assert 0 < model(ids, labels=ids).loss.item() - torch.tensor(5003.0).log().item() < 0.1


def test_bad_input_is_one_line():
    _, model = pair()
    with pytest.raises(ValueError, match="65 positions and the model n_positions 64; shorten"):
        model(tokens(1, 65))
    outside = torch.full((1, 4), 257, device=DEVICE)
    if DEVICE == "cuda":
        model(outside)  # the host does not wait for a GPU to look at the ids: it asks when it does wait
    with pytest.raises(IndexError, match=r"257.*vocab_size is 257"):
        check_ids() if DEVICE == "cuda" else model(outside)
    with pytest.raises(ValueError, match=r"input_ids is torch.float32 \(1, 4\)"):
        model(torch.zeros(1, 4, device=DEVICE))
    with pytest.raises(ValueError, match=r"labels is \(1, 3\) and input_ids \(1, 4\)"):
        model(tokens(1, 4), labels=tokens(1, 3))
    with pytest.raises(ValueError, match="pass one"):
        model(tokens(1, 4), labels=tokens(1, 4), targets=tokens(1, 4))
    with pytest.raises(ValueError, match="impl is 'trition'"):
        GPT2LMHeadModel(GPT2Config(**SMALL), impl="trition")
    with pytest.raises(ValueError, match="n_head"):
        GPT2Config(n_embd=100, n_head=3)
    with pytest.raises(ImplementationUnavailable, match="float64"):
        GPT2LMHeadModel(GPT2Config(**SMALL), impl="cpp").double()(tokens(1, 4).cpu())


@pytest.mark.skipif(DEVICE != "cpu", reason="what the C++ operations keep")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_layer_keeps_for_backward(dtype):
    """ln_1's y, qkv, attention's out, both h and u: 11 C numbers a token; and its float32 statistics."""

    def kept(n_layer):
        config = GPT2Config(n_layer=n_layer, n_head=2, n_embd=64, vocab_size=64, n_positions=16)
        model = GPT2LMHeadModel(config).to(dtype).eval()
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved = {}

        def pack(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in parameters:
                saved[storage.data_ptr()] = storage.nbytes()
            return t

        ids = torch.zeros(3, 16, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            output = model(ids, labels=ids)
        assert output.loss.requires_grad
        return sum(saved.values())

    tokens, statistics = 3 * 16, 4 * (2 + 2 + 2)  # mean and rstd of ln_1 and ln_2, lse of two heads
    assert kept(3) - kept(2) == tokens * (11 * 64 * dtype.itemsize + statistics)
