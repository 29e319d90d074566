"""What users do to a model from outside: hooks, pruning, ties, wrappers that walk its output, second derivatives."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import prune
from torch.utils import _pytree as pytree

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel
from gpt2_fast.ops.runtime import dispatch

SIZES = {"n_layer": 2, "n_embd": 48, "n_head": 3, "vocab_size": 61, "n_positions": 16}


@pytest.fixture
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SIZES, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(61, (2, 9))


def _as_reference(model: GPT2LMHeadModel, ids: torch.Tensor) -> None:
    """The model's logits are those of the plain PyTorch reference with the same modules."""
    logits = model(ids).logits
    model.transformer.impl = "reference"
    torch.testing.assert_close(logits, model(ids).logits, rtol=1e-4, atol=1e-5)
    model.transformer.impl = "auto"


@pytest.mark.parametrize(
    "name",
    ["wte", "wpe", "h.0.ln_1", "h.0.attn", "h.0.attn.c_attn", "h.1.attn.c_proj", "h.1.ln_2", "h.1.mlp", "h.0.mlp.c_fc",
     "h.0.mlp.c_proj", "h.1", "ln_f"],
)  # fmt: skip
def test_a_forward_hook_runs_and_its_result_counts(model, ids, name):
    before = model(ids).logits
    module = model.transformer.get_submodule(name)

    def double(_, __, output):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2

    handle = module.register_forward_hook(double)
    doubled = model(ids).logits
    assert not torch.allclose(doubled, before, atol=1e-4)
    handle.remove()
    torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["c_fc", "c_proj"])
def test_a_pruned_layer_multiplies_by_the_pruned_weight(model, ids, name):
    before = model(ids).logits
    prune.l1_unstructured(getattr(model.transformer.h[0].mlp, name), "weight", amount=0.5)
    assert not torch.allclose(model(ids).logits, before, atol=1e-5)
    _as_reference(model, ids)
    model(ids, labels=ids).loss.backward()
    assert getattr(model.transformer.h[0].mlp, name).weight_orig.grad.abs().sum() > 0


def test_a_layer_that_was_swapped_in_is_called(model, ids):
    class Adapter(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.scale = inner, nn.Parameter(torch.tensor(3.0))

        def forward(self, x):
            return self.inner(x) * self.scale

    before = model(ids).logits
    model.transformer.h[1].attn.c_proj = Adapter(model.transformer.h[1].attn.c_proj)
    model.transformer.h[0].mlp.c_fc = Adapter(model.transformer.h[0].mlp.c_fc)
    assert not torch.allclose(model(ids).logits, before, atol=1e-5)
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.scale.grad != 0


def test_a_quantised_head_is_called(model, ids):
    before = model.eval()(ids).logits
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    output = quantised(ids, labels=ids)
    expected = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert not torch.equal(output.logits, before)
    torch.testing.assert_close(output.logits, before, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_that_is_loaded_stays_tied(model, ids, tmp_path, assign):
    expected = model(ids, labels=ids).loss
    other = GPT2LMHeadModel(model.config)
    other.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=assign)
    assert other.lm_head.weight is other.transformer.wte.weight
    torch.testing.assert_close(other(ids, labels=ids).loss, expected, rtol=0, atol=0)
    untied = {name: t + 1.0 for name, t in model.state_dict().items()}
    untied["lm_head.weight"] += 1.0
    before = [(p, p.clone()) for p in other.parameters()]
    # A wrapper's load_state_dict never calls the model's own.
    for module, prefix in ((other, ""), (nn.ModuleDict({"inner": other}), "inner.")):
        with pytest.raises(ValueError, match=f"^{prefix}lm_head.weight and .* differ and config.tie_word_embeddings"):
            module.load_state_dict({prefix + name: t for name, t in untied.items()}, assign=assign)
        assert other.lm_head.weight is other.transformer.wte.weight
        for p, (same, value) in zip(other.parameters(), before, strict=True):
            assert p is same
            assert torch.equal(p, value)
    other.lm_head.weight = nn.Parameter(untied["lm_head.weight"])
    with pytest.raises(ValueError, match="call tie_weights"):
        other.save_pretrained(tmp_path)
    other.tie_weights()
    other.save_pretrained(tmp_path)
    torch.testing.assert_close(
        GPT2LMHeadModel.from_pretrained(tmp_path)(ids, labels=ids).loss, expected, rtol=0, atol=0
    )


def test_a_tied_head_that_is_another_parameter_is_not_trained(model, ids):
    """Its values are used as ever; copies and what stands in for parameters pass."""
    params, labels = {name: p.detach() for name, p in model.named_parameters()}, {"labels": ids}
    torch.func.functional_call(model, params, (ids,), labels)
    params["lm_head.weight"] = params["transformer.wte.weight"] * 2
    torch.func.functional_call(model, params, (ids,), labels, tie_weights=False)
    loss = copy.deepcopy(model)(ids, labels=ids).loss
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="^lm_head.weight and transformer.wte.weight are tied and now two") as raised:
        model(ids, labels=ids)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith(", or make the model with tie_word_embeddings=False")
    with torch.no_grad():
        torch.testing.assert_close(model(ids, labels=ids).loss, loss, rtol=0, atol=0)
    model.tie_weights()
    torch.testing.assert_close(model(ids, labels=ids).loss, loss, rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", ["lm_head.weight", "transformer.wte.weight"])
def test_one_of_the_tied_two_loads_both(model, assign, name):
    """With strict the other is named as missing, as torch has it; the model stays tied then too."""
    for strict in (False, True):
        value = torch.randn(61, 48)
        if strict:
            with pytest.raises(RuntimeError, match="Missing key") as raised:
                model.load_state_dict({name: value}, assign=assign)
            other = {"lm_head.weight", "transformer.wte.weight"} - {name}
            assert str(raised.value).count(f'"{other.pop()}"') == 1
        else:
            missing = model.load_state_dict({name: value}, strict=False, assign=assign).missing_keys
            assert name not in missing
            assert len(missing) == len(model.state_dict()) - 1
        assert model.lm_head.weight is model.transformer.wte.weight
        assert torch.equal(model.transformer.wte.weight, value)


def test_the_nans_of_a_model_that_diverged_are_no_difference(model):
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.nan
    state = {name: t.clone() for name, t in model.state_dict().items()}
    GPT2LMHeadModel(model.config).load_state_dict(state)


def test_logits_after_a_step_are_refused(model, ids):
    optimizer = AdamW(model.parameters(), lr=1e-2)
    kept, late = model(ids, labels=ids), model(ids, labels=ids)
    before = kept.logits.clone()
    (kept.loss + late.loss).backward()
    optimizer.step()
    torch.testing.assert_close(kept.logits, before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"read \.logits before the step"):
        _ = late.logits


def _step_through_data(model) -> None:
    """As optimizers and averages of weights write that go past autograd: no version counter moves."""
    for p in model.parameters():
        p.data.add_(p.grad, alpha=-1e-2)


@pytest.mark.parametrize(
    ("vocab_size", "n_embd", "compiled"),
    [(61, 48, True), (61, 48, False), (48, 60, False), (97, 1, False), (1000, 300, False)],
)
def test_logits_after_a_write_that_no_version_counts_are_refused(vocab_size, n_embd, compiled, ids):
    sizes = {"vocab_size": vocab_size, "n_embd": n_embd, "n_head": math.gcd(3, n_embd)}
    model = GPT2LMHeadModel(GPT2Config(**SIZES | sizes))
    called = torch.compile(model, backend="eager") if compiled else model
    head = model.lm_head.weight
    with torch.no_grad():
        head[0] = torch.nan  # which is no difference
    ids = ids % 48
    late = called(ids, labels=ids)
    late.loss.backward()
    head.grad.nan_to_num_(0).add_(1)
    _step_through_data(model)
    with pytest.raises(RuntimeError, match=r"read \.logits before the step"):
        _ = late.logits
    late, before = called(ids, labels=ids), head.detach().clone()
    head.data[-1] = 3.0  # the row of a new token
    with pytest.raises(RuntimeError, match="the head has changed"):
        _ = late.logits
    head.data.copy_(before)  # an average of weights was there and is gone again
    assert late.logits.shape == (2, 9, vocab_size)


def test_logits_within_the_call_are_computed_without_a_look(model, ids, monkeypatch):
    """At the head: it would make every call wait for a GPU, and end make_fx, which sees each operator."""
    expected = model(ids).logits
    monkeypatch.setattr(torch, "equal", None)
    assert (model(ids).logits == expected).all()
    torch.testing.assert_close(make_fx(lambda ids: model(ids).logits)(ids)(ids), expected)


def test_an_optimizer_step_after_a_compiled_model_is_seen(model, ids):
    late = torch.compile(model, backend="eager")(ids, labels=ids)
    late.loss.backward()
    AdamW(model.parameters(), lr=1e-2).step()
    with pytest.raises(RuntimeError, match=r"read \.logits before the step"):
        _ = late.logits


def test_logits_of_changed_hidden_states_are_refused(model, ids):
    """Also of an output that a walker rebuilt after the change. Logits that were read before it stay."""
    with torch.no_grad():
        kept, late = model(ids, labels=ids), model(ids, labels=ids)
        before = kept.logits.clone()
        for output in (kept, late):
            output.last_hidden_state.mul_(2)
    torch.testing.assert_close(kept.logits, before, rtol=0, atol=0)
    for output in (late, pytree.tree_map(lambda leaf: leaf, late)):
        with pytest.raises(RuntimeError, match="^logits: the hidden states have changed since"):
            _ = output.logits
    named = pytree.tree_map_only(torch.Tensor, lambda leaf: tuple(leaf.shape), late)
    assert named.last_hidden_state == tuple(late.last_hidden_state.shape)


@pytest.mark.parametrize("copied", [lambda o: pickle.loads(pickle.dumps(o)), copy.deepcopy], ids=["pickle", "deepcopy"])
def test_a_copied_output_has_its_logits(model, ids, copied):
    with torch.no_grad():
        output = model(ids, labels=ids)
    other = copied(output)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    torch.testing.assert_close(other.logits, output.logits, rtol=0, atol=0)
    assert other.loss == output.loss
    assert other.head is None


@pytest.mark.filterwarnings("ignore")  # torch's: of the trace, and that torch.jit goes
def test_a_trace(model, ids):
    """For other tokens and lengths. A loss is not in it: its operation is told what wants a gradient."""
    model.requires_grad_(False)
    traced = torch.jit.trace(lambda ids: model(ids).logits, (ids,), check_trace=False)
    for others in ((ids + 7) % 61, ids[:1, :5]):
        torch.testing.assert_close(traced(others), model(others).logits)
    with pytest.raises(RuntimeError, match="linear_cross_entropy: torch.jit.trace cannot record .* impl='reference'"):
        torch.jit.trace(lambda ids: model(ids, labels=ids).loss, (ids,), check_trace=False)


@pytest.mark.parametrize("n_head", [12, 48])
def test_heads_smaller_than_the_kernels_take(n_head, ids):
    """Attention alone is the reference, and no layer is one operation; who asks for a kernel gets an error."""
    model = GPT2LMHeadModel(GPT2Config(**SIZES | {"n_head": n_head}, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0))
    found = []
    for impl in ("auto", "reference"):
        model.transformer.impl = impl
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters()])
        found[-1] += [model(ids).logits.detach(), model.generate(ids, max_new_tokens=5, do_sample=False)]
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)
    model.transformer.impl = "auto"
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(model.transformer.ops, "attention", None)  # no layer went past it
        with pytest.raises(TypeError, match="NoneType"):
            model(ids)
    model.transformer.impl = "cpp"
    with pytest.raises(ValueError, match=f"^attention: head size {48 // n_head} is outside 16 to 128"):
        model(ids)


def test_a_second_derivative_raises(model, ids):
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, parameters, create_graph=True)
    fix = r"use impl='reference', or gpt2_fast\.unpatch\(model\)"
    with pytest.raises(RuntimeError, match=f"has no second derivative; {fix}"):
        sum(g.square().sum() for g in gradients).backward()
    bias = model.transformer.ln_f.bias.detach()
    loss = lambda bias: torch.func.functional_call(model, {"transformer.ln_f.bias": bias}, (ids,), {"labels": ids}).loss
    with pytest.raises(RuntimeError, match=f"has a tangent, and its kernels have no forward-mode derivative; {fix}"):
        torch.func.hessian(loss)(bias)
    model.transformer.impl = "reference"
    gradients = torch.autograd.grad(model(ids, labels=ids).loss, parameters, create_graph=True)
    sum(g.square().sum() for g in gradients).backward()
    assert torch.func.hessian(loss)(bias).abs().sum() > 0
    assert sum(p.grad.square().sum() for p in parameters) > 0


def test_the_output_is_known_to_torchs_walkers(model, ids):
    output = model(ids, labels=ids)
    leaves, spec = pytree.tree_flatten(output)
    assert any(t is output.loss for t in leaves)
    assert any(t is output.last_hidden_state for t in leaves)
    rebuilt = pytree.tree_unflatten(leaves, spec)
    torch.testing.assert_close(rebuilt.logits, output.logits, rtol=0, atol=0)


def test_the_model_exports(model, ids):
    with torch.no_grad():
        exported = torch.export.export(model.eval(), (ids,))
        torch.testing.assert_close(exported.module()(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)


def test_an_impl_that_runs_nowhere_here_raises(model, ids):
    with pytest.raises(dispatch.ImplementationUnavailable, match="impl='cpp' runs nothing on a cuda device"):
        dispatch.of_model("cpp", "linear", "cuda")
    with pytest.raises(ValueError, match="choose one of auto, reference, cpp, triton"):
        GPT2LMHeadModel(model.config, impl="aten")


def test_a_state_without_numbers_is_loaded(model):
    """Of fake tensors nobody can say whether head and embedding differ."""
    shapes = {name: t.shape for name, t in model.state_dict().items()}
    with FakeTensorMode():
        fake = GPT2LMHeadModel(model.config)
        state = {name: torch.empty(shape) for name, shape in shapes.items()}
        assert not fake.load_state_dict(state).missing_keys
