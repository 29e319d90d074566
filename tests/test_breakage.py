"""The suite notices: each kernel is broken on purpose, and the rule that guards it must object."""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import DEVICE
from generated import adamw as generated_adamw
from generated import decode_step as generated_decode
from generated import decode_tokens as generated_tokens
from generated import draw as generated_draw
from generated.judge import RIGHT, WRONG
from numerics import TINY, assert_as_exact, check_op, compare, runs_of
from rooms import ROOMS

from gpt2_fast.ops import add_layernorm as ln_room
from gpt2_fast.ops import attention as attention_room
from gpt2_fast.ops import linear_cross_entropy as loss_room
from gpt2_fast.ops import mlp as mlp_room
from gpt2_fast.ops.runtime import cpp
from gpt2_fast.ops.runtime.gelu import Gelu

OBJECTION = "error|finite|bits"


def _spoil(patch, op, impl, which, name):
    """Lets a backend's forward or backward leave zeros where it has written `name`; which names it has written."""
    original, written = op.backends[impl], []

    def spoiled(a, out):
        getattr(original, which)(a, out)
        if (t := getattr(out, name)) is not None:
            written.append(name)
            setattr(out, name, torch.zeros_like(t))

    patch.setitem(op.backends, impl, original._replace(**{which: spoiled}))
    return written


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("room", "impl"), [pytest.param(room, impl, id=f"{room.name}-{impl}") for room in ROOMS for impl in room.impls]
)
def test_whatever_a_kernel_leaves_out(monkeypatch, room, impl, dtype):
    """Every output, what is kept for backward and every gradient, one after another."""
    op, seen = room.op, set()
    samples = list(room.calls(DEVICE, dtype, impl))[:3]
    for arguments in samples[:1] if impl == "triton" else samples[1:]:
        names = [name for name, t in room.tensors(arguments).items() if t.is_floating_point()]
        double = {n: t.double() if n in names else t for n, t in arguments.items()}
        run, reference = room.of(arguments, names, impl), room.of(double, names, "reference")
        runs = runs_of(run, reference, [arguments[n] for n in names], op.gradients is not None)
        compare(*runs, dtype, "unbroken", room.row_slack)
        backward = [f"d{name}" for name in op.differentiable] if op.gradients else []
        # What is kept beside gradients made ahead is for a second backward.
        forward = [n for n in op.output_names if not op.ahead or n in (*op.returns, *op.ahead)]
        for which, name in [*(("forward", n) for n in forward), *(("backward", n) for n in backward)]:
            with monkeypatch.context() as patch:
                written = _spoil(patch, op, impl, which, name)
                broken = runs_of(run, None, [arguments[n] for n in names], op.gradients is not None, runs)
            if written:
                seen.add(name)
                with pytest.raises(AssertionError, match=OBJECTION):
                    compare(*broken, dtype, f"without {name}", room.row_slack)
    assert {*op.returns} <= seen
    assert op.ahead or {name for name in backward if name[1:] in names} - {f"d{n}" for n in op.alias} <= seen


@pytest.mark.parametrize("impl", ["cpp", "aten"])
def test_a_wrong_row_of_small_values_in_bfloat16(monkeypatch, impl):
    """The largest element of the whole tensor would hide it: the rule for that alone does not object."""
    room = next(room for room in ROOMS if room.name == "linear")
    x, weight = torch.randn(9, 32).bfloat16(), torch.randn(32, 20).bfloat16()
    x[4] *= 2.0**-7
    original = room.op.backends[impl]

    def forward(a, out):
        original.forward(a, out)
        out.y[4] = 0.0

    run = lambda x, weight: room.call(x, weight, impl=impl)
    check_op(run, lambda x, weight: x @ weight, [x, weight], torch.bfloat16)
    monkeypatch.setitem(room.op.backends, impl, original._replace(forward=forward))
    truth = x.double() @ weight.double()
    error, allowed = ((y.double() - truth).abs().max() for y in (run(x, weight), x @ weight))
    assert error <= 2 * allowed + TINY[torch.bfloat16] * truth.abs().max()
    with pytest.raises(AssertionError, match=r"error .* in row \(4,\)"):
        assert_as_exact(run(x, weight), x @ weight, truth, "y", torch.bfloat16)


def test_add_layernorm_with_a_slightly_wrong_mean(monkeypatch):
    inputs = [torch.randn(5, 96), torch.randn(5, 96), torch.randn(96), torch.randn(96)]
    run = lambda *t: ln_room.add_layernorm(*t, impl="cpp")
    check_op(run, ln_room.add_layernorm_reference, inputs, torch.float32)
    original = ln_room.OP.backends["cpp"]

    def forward(a, out):
        original.forward(a, out)
        out.y = out.y + 1e-4

    monkeypatch.setitem(ln_room.OP.backends, "cpp", original._replace(forward=forward))
    with pytest.raises(AssertionError, match="output 0: error"):
        check_op(run, ln_room.add_layernorm_reference, inputs, torch.float32)


def _step(dtype, **options):
    params = [{"shape": [33, 7], "dtype": dtype, "seed": i, "layout": "contiguous", "grad": "contiguous", "step": 3,
               "group": 0} for i in range(2)]  # fmt: skip
    common = {"op": "adamw", "params": params, "hyper": "contiguous", "max_norm": 0.5, "norm": None, "change": None}
    return common | {"valid": True} | options


@pytest.mark.parametrize("column", range(5), ids=["lr", "beta1", "beta2", "eps", "weight_decay"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", ["cpp", "triton"] if DEVICE == "cpu" else ["triton"])
def test_adamw_that_reads_a_hyperparameter_wrong(monkeypatch, impl, dtype, column):
    """By a hundredth; eps, of no weight beside the averages, by a factor."""
    description = _step(dtype, impl=impl)
    assert generated_adamw.judge(description).kind == RIGHT

    def wrong(hyper):
        hyper = hyper.clone()
        hyper[:, column] *= 1e7 if column == 3 else 0.99
        return hyper

    if impl == "cpp":
        update = cpp.adamw_update
        monkeypatch.setattr(cpp, "adamw_update", lambda *a, hyper, **k: update(*a, hyper=wrong(hyper), **k))
    else:
        from gpt2_fast.kernels import adamw as kernel

        step = kernel.step
        monkeypatch.setattr(kernel, "step", lambda table, chunks, hyper, *a: step(table, chunks, wrong(hyper), *a))
    outcome = generated_adamw.judge(description)
    assert outcome.kind == WRONG
    assert outcome.text.startswith("param" if column in (0, 3, 4) else ("exp_avg", "param")), outcome.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_that_does_not_clip(monkeypatch, dtype):
    update = cpp.adamw_update
    monkeypatch.setattr(cpp, "adamw_update", lambda *a, max_norm, **k: update(*a, max_norm=-1.0, **k))
    assert generated_adamw.judge(_step(dtype, impl="cpp")).kind == WRONG


BROKEN_STEPS = {
    "other tokens": lambda a: a | {"tokens": a["tokens"].flip(0)},
    "positions one on": lambda a: (
        a | ({"first": a["first"] + 1} if a["positions"] is None else {"positions": a["positions"] + 1})
    ),
    "logits of before": lambda a: a | {"logits": torch.empty_like(a["logits"])},
}


@pytest.mark.parametrize("broken", BROKEN_STEPS)
@pytest.mark.parametrize("weights", ["float32", "bfloat16", "int8"])
def test_decoding_that_is_broken(monkeypatch, weights, broken):
    description = {"op": "decode_step", "model": 1, "seed": 3, "weights": weights, "impl": "cpp", "B": 2, "prompt": 5,
                   "steps": 2, "room": 9, "starts": [0, 1], "layout": "contiguous", "change": None,
                   "valid": True}  # fmt: skip
    assert generated_decode.judge(description).kind == RIGHT
    step = cpp.decode_step

    def spoiled(**arguments):
        step(**BROKEN_STEPS[broken](arguments))
        if broken == "logits of before":
            arguments["logits"].zero_()

    monkeypatch.setattr(cpp, "decode_step", spoiled)
    assert generated_decode.judge(description).kind == WRONG


@pytest.mark.parametrize("spoiled", ["tokens", "highest"])
def test_drawing_that_is_broken(monkeypatch, spoiled):
    description = {"op": "draw", "B": 3, "V": 65, "dtype": "float32", "seed": 3, "scale": 0.1, "layout": "contiguous",
                   "temperature": 1.0, "top_k": 20, "top_p": None, "greedy": False, "impl": "cpp", "change": None,
                   "valid": True}  # fmt: skip
    assert generated_draw.judge(description).kind == RIGHT
    draw = cpp.draw

    def one_on(options, **arguments):
        draw(options, **arguments)
        arguments[spoiled].add_(1)

    monkeypatch.setattr(cpp, "draw", one_on)
    assert generated_draw.judge(description).kind == WRONG


BROKEN_RUNS = {
    "positions one on": lambda a: a | {"first": a["first"] + 1},
    "greedy": lambda a: a | {"uniforms": None},
    "the first uniform numbers for all": lambda a: a | {"uniforms": a["uniforms"][:1].expand(4, -1).contiguous()},
    "no end": lambda a: a | {"n_ends": 0},
    "one token less": lambda a: a | {"count": a["count"] - 1},
}


@pytest.mark.parametrize("broken", [*BROKEN_RUNS, "tokens", "highest", "logits", "made"])
def test_a_run_of_tokens_that_is_broken(monkeypatch, broken):
    description = {"op": "decode_tokens", "model": 1, "seed": 3, "weights": "float32", "impl": "cpp", "B": 2,
                   "prompt": 5, "count": 4, "room": 12, "starts": [0, 1], "layout": "contiguous", "greedy": False,
                   "temperature": 3.0, "top_k": None, "top_p": None, "ends": [], "nan at": None, "out": True,
                   "change": None, "valid": True}  # fmt: skip
    original = cpp.decode_tokens
    if broken == "no end":
        found = []
        monkeypatch.setattr(cpp, "decode_tokens", lambda *s, **a: (original(*s, **a), found.append(a["tokens"])))
        generated_tokens.judge(description)
        description["ends"] = [int(found[0][2, 0])]
        monkeypatch.undo()
    assert generated_tokens.judge(description).kind == RIGHT

    def spoiled(options, **arguments):
        original(options, **BROKEN_RUNS.get(broken, dict)(arguments))
        if broken not in BROKEN_RUNS:
            arguments[broken].sub_(1)

    monkeypatch.setattr(cpp, "decode_tokens", spoiled)
    assert generated_tokens.judge(description).kind == WRONG


def _attention(segments=None):
    qkv = torch.randn(2, 33, 3, 2, 16)
    run = lambda t: attention_room.attention(t, segments=segments, impl="cpp")
    return run, lambda t: attention_room.attention_reference(t, segments=segments), [qkv]


def test_attention_that_sees_the_future(monkeypatch):
    """A reference without the causal mask is what a kernel without it would give."""
    run, _, inputs = _attention()

    def uncausal(qkv):
        q, k, v = qkv.unbind(2)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)

    with pytest.raises(AssertionError, match="output 0: error"):
        check_op(run, uncausal, inputs, torch.float32)


def test_attention_that_drops_the_padding_mask():
    segments = torch.zeros(2, 33, dtype=torch.int32)
    segments[1, :9] = -1
    run, reference, inputs = _attention(segments)
    check_op(run, reference, inputs, torch.float32)
    blind, _, _ = _attention(None)
    with pytest.raises(AssertionError, match="output 0"):
        check_op(blind, reference, inputs, torch.float32)


def test_mlp_with_the_other_gelu():
    """The exact GELU differs from the tanh form by less than 1e-3, and is still noticed."""
    inputs = [torch.randn(5, 32), torch.randn(5, 32), torch.ones(32), torch.zeros(32)]
    inputs += [torch.randn(32, 128) * 0.2, torch.randn(128), torch.randn(128, 32) * 0.1, torch.randn(32)]
    exact_gelu = functools.partial(mlp_room.mlp_reference, kind=Gelu.ERF)
    for room, count in ((mlp_room.layernorm_linear_gelu, 6), (mlp_room.mlp, 8)):
        run = functools.partial(room, impl="cpp")
        check_op(run, mlp_room.mlp_reference, inputs[:count], torch.float32)
        with pytest.raises(AssertionError, match="output 0: error"):
            check_op(run, exact_gelu, inputs[:count], torch.float32)


def test_loss_that_scores_ignored_labels():
    x, weight, labels = torch.randn(7, 16), torch.randn(37, 16), torch.randint(0, 37, (7,))
    labels[2] = -100
    run = lambda x, w: loss_room.linear_cross_entropy(x, w, labels, impl="cpp")
    reference = lambda x, w: loss_room.linear_cross_entropy_reference(x, w, labels)
    check_op(run, reference, [x, weight], torch.float32)
    scored = labels.clamp(min=0)
    with pytest.raises(AssertionError, match="error"):
        check_op(run, lambda x, w: loss_room.linear_cross_entropy_reference(x, w, scored), [x, weight], torch.float32)
