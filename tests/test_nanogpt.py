"""gpt2_fast.nanogpt against a GPT written out here as nanoGPT defines it: the same seed, losses, text and files."""

from __future__ import annotations

import copy
import math
import operator
import pickle

import numpy as np
import pytest
import torch
from conftest import DEVICE
from numerics import assert_as_exact
from torch import nn
from torch.nn import functional as F

from gpt2_fast import AdamW, GPT2Config, GPT2LMHeadModel, nanogpt
from gpt2_fast.checkpoint import convert
from gpt2_fast.nanogpt import GPT, GPTConfig, LazyLogits
from gpt2_fast.outputs import CausalLMOutput
from gpt2_fast.report import machine

SMALL = {"block_size": 32, "vocab_size": 65, "n_layer": 3, "n_head": 3, "n_embd": 48}


class Norm(nn.Module):
    def __init__(self, n, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n)) if bias else None

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.c_attn = nn.Linear(c.n_embd, 3 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        q, k, v = self.c_attn(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c_fc = nn.Linear(c.n_embd, 4 * c.n_embd, bias=c.bias)
        self.c_proj = nn.Linear(4 * c.n_embd, c.n_embd, bias=c.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.ln_1, self.attn = Norm(c.n_embd, c.bias), Attention(c)
        self.ln_2, self.mlp = Norm(c.n_embd, c.bias), MLP(c)

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Reference(nn.Module):
    """Modules in nanoGPT's order, for the random numbers their construction draws, then its initialisation."""

    def __init__(self, c):
        super().__init__()
        self.config = c
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(c.vocab_size, c.n_embd), "wpe": nn.Embedding(c.block_size, c.n_embd),
            "h": nn.ModuleList(Block(c) for _ in range(c.n_layer)), "ln_f": Norm(c.n_embd, c.bias),
        })  # fmt: skip
        self.lm_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight
        self.apply(self.initialise)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * c.n_layer))

    def initialise(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, 0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None):
        t = self.transformer
        x = t.wte(idx) + t.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in t.h:
            x = block(x)
        logits = self.lm_head(t.ln_f(x))
        if targets is None:
            return logits[:, [-1]], None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx, n, temperature, top_k):
        for _ in range(n):
            logits = self(idx[:, -self.config.block_size :])[0][:, -1] / temperature
            kth = logits.topk(top_k).values[:, [-1]]
            probabilities = logits.masked_fill(logits < kth, -math.inf).softmax(-1)
            idx = torch.cat((idx, torch.multinomial(probabilities, 1)), 1)
        return idx


def pair(bias=True, noise=0.0, **changes):
    """The reference and ours, made from one seed; noise: added to both, so that no bias stays 0."""
    config, models = GPTConfig(**{**SMALL, "bias": bias, **changes}), []
    for make in (Reference, GPT):
        torch.manual_seed(11)
        models.append(make(copy.copy(config)).to(DEVICE))
    with torch.no_grad():
        for p in models[0].parameters():
            p.add_(torch.randn_like(p), alpha=noise)
    if noise:
        models[1].load_state_dict(models[0].state_dict())
    return models


def tokens(*shape, seed=0):
    return torch.randint(65, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("bias", [True, False])
def test_a_seed_makes_the_same_model_and_leaves_the_same_randomness(bias):
    config = GPTConfig(**SMALL, bias=bias)
    made = []
    for make in (Reference, GPT):
        torch.manual_seed(5)
        made.append((make(config), torch.rand(4)))
    (theirs, their_draws), (ours, our_draws) = made
    assert torch.equal(our_draws, their_draws)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    assert ours.get_num_params(non_embedding=False) == sum(p.numel() for p in theirs.parameters())
    assert ours.get_num_params() == ours.get_num_params(non_embedding=False) - 32 * 48


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_logits_loss_and_gradients(bias, impl, dtype):
    theirs, ours = (model.to(dtype) for model in pair(bias, noise=0.1))
    ours.transformer.impl = impl
    truth = copy.deepcopy(theirs).double()
    idx, targets = tokens(2, 21), tokens(2, 21, seed=1)
    targets[0, :3] = -1
    results = [model(idx, targets) for model in (ours, theirs, truth)]
    for _, loss in results:
        loss.backward(retain_graph=True)
    assert_as_exact(*(loss for _, loss in results), "loss", dtype)
    assert_as_exact(results[0][0].tensor, results[1][0], results[2][0], "logits", dtype)
    assert_as_exact(*(model(idx)[0] for model in (ours, theirs, truth)), "last logits", dtype)
    for (name, p), q, r in zip(ours.named_parameters(), theirs.parameters(), truth.parameters(), strict=True):
        assert p.grad.is_contiguous(), name
        assert_as_exact(p.grad, q.grad, r.grad, f"gradient of {name}", dtype)


def train(model, optimizer, steps, start=0):
    """As train.py does it with float16, one step after another; the losses."""
    scaler, losses = torch.amp.GradScaler(DEVICE, init_scale=1024.0), []
    for i in range(start, start + steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (i + 1)
        _, loss = model(tokens(4, 32, seed=2 * i), tokens(4, 32, seed=2 * i + 1))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return losses


def their_optimizer(model):
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))


def our_optimizer(model):
    return model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), DEVICE)


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_resumes_in_both_directions(bias, tmp_path):
    """Five steps, a ckpt.pt as train.py writes it from a compiled model, and five more by the other program."""
    theirs, ours = pair(bias)
    optimizers = their_optimizer(theirs), our_optimizer(ours)
    assert isinstance(optimizers[1], AdamW)
    assert [[p.shape for p in g["params"]] for g in optimizers[1].param_groups] == [
        [p.shape for p in g["params"]] for g in optimizers[0].param_groups
    ]
    losses = [train(m, o, 5) for m, o in zip((theirs, ours), optimizers, strict=True)]
    torch.testing.assert_close(*(torch.tensor(values) for values in losses), rtol=1e-5, atol=0)
    for i, (model, optimizer) in enumerate(zip((theirs, ours), optimizers, strict=True)):
        state = {f"_orig_mod.{name}": tensor for name, tensor in model.state_dict().items()}
        state["_orig_mod.transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32)  # the mask that old checkpoints hold
        torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / f"{i}.pt")
    expected = train(theirs, optimizers[0], 5, start=5)
    for source in (0, 1):
        theirs, ours = pair(bias)
        saved = torch.load(tmp_path / f"{source}.pt", weights_only=True)
        before = list(saved["model"])
        ours.load_state_dict(saved["model"])
        assert list(saved["model"]) == before
        stripped = {n.removeprefix("_orig_mod."): t for n, t in saved["model"].items() if not n.endswith(".attn.bias")}
        theirs.load_state_dict(stripped)
        for model, optimizer in ((ours, our_optimizer(ours)), (theirs, their_optimizer(theirs))):
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
            torch.testing.assert_close(train(model, optimizer, 5, start=5), expected, rtol=1e-5, atol=0)


def test_a_checkpoint_of_another_model_is_refused():
    ours, state = pair()[1], pair(n_layer=4)[1].state_dict()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*transformer\.h\.3\.ln_1\.weight"):
        ours.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"Missing key.*transformer\.ln_f\.bias"):
        ours.load_state_dict(pair(bias=False)[1].state_dict())


@pytest.mark.parametrize("length", [3, 30, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_generates_the_same_text_and_draws_the_same_numbers(bias, length):
    """Within block_size, across its end, and from a prompt beyond it."""
    theirs, ours = (model.eval() for model in pair(bias, noise=0.05))
    drawn = []
    for model in (theirs, ours):
        torch.manual_seed(3)
        drawn.append((model.generate(tokens(2, length), 9, temperature=0.8, top_k=20), torch.rand(3)))
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])


def test_generates_in_autocast_and_under_dropout():
    """The cache is of autocast's dtype; in training mode every token sees a new mask, as without a cache."""
    ours = pair(noise=0.05)[1].eval()
    with torch.autocast(DEVICE, torch.bfloat16):
        greedy = ours.generate(tokens(1, 3), 20, temperature=0)
        steps = [ours(greedy[:, :n])[0].argmax(-1).item() for n in range(3, 23)]
    assert sum(a == b for a, b in zip(greedy[0, 3:].tolist(), steps, strict=True)) >= 18  # bfloat16 ties may flip
    drops = pair(noise=0.05, dropout=0.5)[1].train()
    assert len({tuple(drops.generate(tokens(1, 3), 6, temperature=0)[0].tolist()) for _ in range(6)}) > 1


def test_crop_block_size():
    theirs, ours = pair(noise=0.1)
    expected = theirs(tokens(2, 16))[0]
    ours.crop_block_size(16)
    assert ours.config.block_size == 16
    assert ours.state_dict()["transformer.wpe.weight"].shape == (16, 48)
    assert [p is ours.transformer.wpe.weight for p in ours.parameters()].count(True) == 1
    torch.testing.assert_close(ours(tokens(2, 16))[0], expected, rtol=1e-5, atol=1e-5)
    assert ours.generate(tokens(1, 3), 20).shape == (1, 23)
    with pytest.raises(ValueError, match="17 positions and the model n_positions 16"):
        ours(tokens(1, 17))
    with pytest.raises(ValueError, match="block_size is 17 and the model has 16; it can only shrink"):
        ours.crop_block_size(17)


@pytest.mark.parametrize("assign", [False, True])
def test_a_head_that_is_not_the_embedding_is_refused(assign):
    model = GPT(GPTConfig(block_size=16, vocab_size=65, n_layer=1, n_head=3, n_embd=48))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = {name: t + 1.0 for name, t in before.items()}
    state["lm_head.weight"] += 1.0
    with pytest.raises(ValueError, match="^lm_head.weight and transformer.wte.weight differ and nanoGPT ties them"):
        model.load_state_dict(state, assign=assign)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_from_pretrained_is_what_convert_writes(tmp_path):
    config = GPT2Config(n_positions=32, vocab_size=65, n_layer=2, n_head=3, n_embd=48, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "folder")
    ours = GPT.from_pretrained(str(tmp_path / "folder"), {"dropout": 0.25}).to(DEVICE)
    assert ours.training
    assert ours.config == GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=3, n_embd=48, dropout=0.25)
    assert ours.lm_head.weight is ours.transformer.wte.weight
    convert.convert(tmp_path / "folder", tmp_path / "ckpt.pt")
    written = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    state = ours.state_dict()
    assert state.keys() == written["model"].keys()
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in written["model"].items())
    by_erf = GPT2LMHeadModel.from_pretrained(tmp_path / "folder").to(DEVICE)
    by_erf.load_state_dict(convert.load(tmp_path / "ckpt.pt").state)
    for block in by_erf.transformer.h:
        block.activation = "gelu"
    torch.testing.assert_close(ours.eval()(tokens(1, 9))[0], by_erf(tokens(1, 9)).logits[:, -1:], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="override_args has 'n_layer'; only dropout can be overridden"):
        GPT.from_pretrained(str(tmp_path / "folder"), {"n_layer": 3})
    with pytest.raises(FileNotFoundError):
        GPT.from_pretrained(str(tmp_path / "nothing"))
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=3, n_embd=48, vocab_size=9, n_inner=50, bos_token_id=None,
                               eos_token_id=None)).save_pretrained(tmp_path / "wide")  # fmt: skip
    with pytest.raises(ValueError, match="nanoGPT has no n_inner = 50"):
        GPT.from_pretrained(str(tmp_path / "wide"))


def test_logits_beside_a_loss_wait_until_they_are_used(monkeypatch):
    ours = pair(noise=0.1)[1]
    idx, targets = tokens(2, 7), tokens(2, 7, seed=1)
    with torch.no_grad():
        expected = ours.lm_head(ours.transformer(idx))
    logits, loss = ours(idx, targets)
    assert isinstance(logits, LazyLogits)
    assert logits._output.computed_logits is None
    torch.testing.assert_close(F.cross_entropy(logits.view(-1, 65), targets.view(-1)), loss, rtol=1e-5, atol=0)
    assert logits._output.computed_logits is not None
    assert (logits.shape, logits.dtype, len(logits)) == ((2, 7, 65), torch.float32, 2)
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(logits[:, -1] / 2 - 1, expected[:, -1] / 2 - 1, **close)
    torch.testing.assert_close(torch.softmax(logits, -1), expected.softmax(-1), **close)
    torch.testing.assert_close(torch.cat([logits, logits]), torch.cat([expected, expected]), **close)
    torch.testing.assert_close(1 - logits * 2, 1 - expected * 2, **close)
    assert (logits.argmax(-1) == expected.argmax(-1)).all()
    assert (logits == logits.tensor).all()
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        logits.nothing  # noqa: B018
    copied = pickle.loads(pickle.dumps(ours(idx, targets)[0].detach()))
    torch.testing.assert_close(copied, expected, **close)


def _result(function, *arguments):
    """What it gives, with the arguments as it leaves them; or the kind of error."""
    try:
        return [function(*arguments), *arguments]
    except Exception as error:
        return [type(error)]


IN_PLACE = [operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.imod,
            operator.ipow, operator.iand, operator.ilshift]  # fmt: skip
BINARY = [operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.add, operator.sub,
          operator.mul, operator.truediv, operator.floordiv, operator.mod, operator.pow, operator.matmul, operator.and_,
          operator.or_, operator.xor, operator.lshift, operator.rshift, operator.contains]  # fmt: skip
UNARY = [bool, int, float, complex, abs, operator.neg, operator.pos, operator.invert, operator.index, len, round,
         lambda x: torch.stack(list(x)), reversed, repr, str, "{:.3f}".format, np.asarray]  # fmt: skip


@pytest.mark.filterwarnings("ignore:__array_wrap__", "ignore:invalid value")  # torch's, and of a negative number's root
def test_every_operator_takes_lazy_logits_for_their_tensor():
    """With a number, a tensor, an array and itself on either side; of one element, where it becomes a number.

    A tensor alone is asked whether it contains one: it knows no other class.
    """
    output = lambda tensor: CausalLMOutput(None, tensor, None, tensor)
    for shape in ((2, 3, 3), (1, 1, 1), (0, 1, 3)):
        generator = torch.Generator().manual_seed(0)
        tensor, other = (torch.randn(shape, generator=generator) for _ in range(2))
        others = (0.0, 2, other, float(tensor.flatten()[0]) if tensor.numel() else 1.0, other.numpy(), "text")
        calls = [(function, lambda x: (x,)) for function in UNARY]
        calls += [(function, lambda x: (x, x)) for function in BINARY]
        for value in others:
            calls += [(function, lambda x, value=value: (x, value)) for function in BINARY + IN_PLACE]
            calls += [(function, lambda x, value=value: (value, x)) for function in BINARY[:-1]]
        for function, arguments in calls:
            plain, lazy = tensor.clone(), LazyLogits(output(tensor.clone()))
            expected, found = _result(function, *arguments(plain)), _result(function, *arguments(lazy))
            taken = [t.tensor if isinstance(t, LazyLogits) else t for t in found]
            name = getattr(function, "__name__", function)
            assert [type(t) for t in taken] == [type(t) for t in expected], (name, shape, arguments(plain)[-1])
            for t, value in zip(taken, expected, strict=True):
                arrays = isinstance(value, (torch.Tensor, np.ndarray))
                assert np.array_equal(t, value, equal_nan=True) if arrays else t == value, (name, shape)
            assert {lazy: 1}[lazy] == 1


@pytest.mark.parametrize("bias", [True, False])
def test_compiles_whole(bias):
    theirs, ours = pair(bias, n_layer=1)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    losses = train(theirs, their_optimizer(theirs), 2), train(compiled, our_optimizer(ours), 2)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    assert next(iter(compiled.state_dict())) == "_orig_mod.transformer.wte.weight"
    assert compiled.generate(tokens(1, 3), 2).shape == (1, 5)


def test_estimate_mfu(monkeypatch):
    ours = pair()[1]
    monkeypatch.setattr(machine, "peak", lambda device: 1e9)
    flops_a_token = 6 * (ours.get_num_params(False) - 32 * 48) + 12 * 3 * 48 * 32
    assert ours.estimate_mfu(fwdbwd_per_iter=5, dt=0.25) == pytest.approx(flops_a_token * 32 * 5 / 0.25 / 1e9)
    names = {"NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H100 PCIe": 756.4, "NVIDIA A10G": 70,
             "NVIDIA GH200 480GB": 989.4, "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA H200": 989.4}  # fmt: skip
    assert {name: machine.card_peak(name, "bfloat16") / 1e12 for name in names} == names
    assert machine.card_peak("Some Other Card", "bfloat16") is None
    monkeypatch.undo()
    machine.measured_peak.cache_clear()
    peak = machine.peak(torch.device("cpu"))
    assert 1e8 < peak < 1e14
    assert machine.peak(torch.device("cpu")) == peak


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="n_embd is 48, which n_head = 5 does not divide"):
        GPT(GPTConfig(**{**SMALL, "n_head": 5}))
    with pytest.raises(ValueError, match="vocab_size is None"):
        GPT(GPTConfig(**{**SMALL, "vocab_size": None}))
    ours = pair()[1]
    with pytest.raises(ValueError, match="33 positions and the model n_positions 32"):
        ours(tokens(1, 33))
    with pytest.raises(IndexError, match="label 65 at position 2"):  # a GPU says it later: test_linear_cross_entropy
        ours.cpu()(tokens(1, 4).cpu(), torch.tensor([[0, 1, 65, 2]]))


def test_defaults_are_nanogpts():
    assert nanogpt.GPTConfig() == GPTConfig(1024, 50304, 12, 12, 768, 0.0, True)


def test_lazy_logits_divided_in_a_training_loop():
    """They are a view that autograd does not let anybody write: the result is a new tensor, as of an operator."""
    torch.manual_seed(0)
    model, ids = GPT(GPTConfig(**SMALL)), torch.randint(65, (2, 8))
    logits, loss = model(ids, ids)
    expected = model(ids, ids)[0].tensor / 0.8
    logits /= 0.8
    torch.testing.assert_close(logits, expected)
    (logits.sum() + loss).backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_lazy_logits_are_kept_as_their_tensor():
    model, ids = GPT(GPTConfig(**SMALL)), torch.randint(65, (2, 8))
    with torch.no_grad():
        logits = model(ids, ids)[0]
        assert np.array_equal(np.array(logits, copy=True), logits.tensor.numpy())
        for kept in (pickle.loads(pickle.dumps(logits)), copy.copy(logits), copy.deepcopy(logits)):
            assert torch.equal(torch.as_tensor(kept), logits.tensor)


@pytest.mark.parametrize("absent", [None, "lm_head.weight", "transformer.wte.weight"])
def test_an_assigned_state_stays_tied(absent):
    torch.manual_seed(1)
    model, other = GPT(GPTConfig(**SMALL)), GPT(GPTConfig(**SMALL))
    state = {name: t.clone() for name, t in other.state_dict().items() if name != absent}
    found = model.load_state_dict(state, strict=False, assign=True)
    assert found.missing_keys == ([absent] if absent else [])
    assert model.lm_head.weight is model.transformer.wte.weight
    ids = torch.randint(65, (2, 8))
    assert torch.equal(model(ids, ids)[1], other(ids, ids)[1])
