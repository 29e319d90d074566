"""draw: tokens at a place in the cumulated probabilities, by C++ and by torch, against the definition in float64."""

from __future__ import annotations

import pytest
import torch

from gpt2_fast.ops.draw import Scratch, cost, draw, kept, samples

SLACK = 1e-6  # of cumulated probabilities and of top_p, where float32 logits and exp may decide otherwise


def _assert_drawn(logits, uniform, token, temperature=1.0, top_k=None, top_p=None) -> None:
    """That `token` of one row [V] is the one that the definition has, within SLACK."""
    p = torch.softmax(logits.double() / temperature, 0)
    if top_k is not None and top_k < len(p):
        p = torch.where(logits >= logits.topk(top_k).values[-1], p, 0.0)
        p /= p.sum()
    if top_p is not None:
        ordered, order = p.sort(descending=True, stable=True)
        n = int((ordered.cumsum(0) - ordered < top_p).sum())
        p = torch.zeros_like(p).scatter(0, order[:n], ordered[:n] / ordered[:n].sum())
    cumulated = p.cumsum(0)
    assert p[token] > 0, f"token {token} is not kept"
    assert cumulated[token] - p[token] - SLACK <= uniform <= cumulated[token] + SLACK


def test_every_instruction_set(isa):
    for logits, uniform, options in samples():
        tokens, highest = draw(logits, uniform, **options, impl="cpp")
        assert torch.equal(highest, logits.amax(-1))
        for row, at, token in zip(logits, uniform, tokens.tolist(), strict=True):
            _assert_drawn(row, at, token, **options)


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("options", [{}, {"top_k": 40}, {"top_p": 0.8}, {"top_k": 30, "top_p": 0.6}], ids=str)
def test_every_place(impl, options):
    """From the beginning of the first token that is kept to the end of the last; some are equal, some impossible."""
    logits = torch.randn(1, 6000)
    logits[0, 5::50] = logits[0, 3]
    logits[0, :3] = logits[0, -70:] = -torch.inf
    uniform = torch.linspace(0, 1 - 2**-32, 400, dtype=torch.float64)
    tokens, _ = draw(logits.expand(len(uniform), -1), uniform, temperature=0.9, **options, impl=impl)
    for at, token in zip(uniform, tokens.tolist(), strict=True):
        _assert_drawn(logits[0], at, token, temperature=0.9, **options)
    assert len(set(tokens.tolist())) > 5


def test_the_last_place_is_a_token_that_can_be_drawn():
    """Sums of the same numbers in another order differ in the last bit, which is all that is left there."""
    logits = torch.randn(300, 400)
    logits[:, 0] = logits[:, 200:] = -torch.inf
    tokens, _ = draw(logits, torch.full((300,), 1 - 2**-53, dtype=torch.float64), impl="cpp")
    assert logits.gather(1, tokens.unsqueeze(1)).isfinite().all()


@pytest.mark.parametrize(("B", "V"), [(1, 1), (2, 15), (3, 64), (2, 65), (5, 50257)])
def test_the_most_likely(isa, B, V):
    logits = torch.randn(B, V)
    logits[-1, V // 2 :] = logits.amax() + 1  # several: the first
    tokens, highest = draw(logits, None, impl="cpp")
    assert torch.equal(tokens, torch.stack([(row == row.amax()).nonzero()[0, 0] for row in logits]))
    assert torch.equal(highest, logits.amax(-1))


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize("drawn", [False, True])
def test_what_is_no_number_is_said(isa, impl, drawn):
    uniform = torch.full((4,), 0.5, dtype=torch.float64) if drawn else None
    logits = torch.randn(4, 301)
    logits[0, 300], logits[1, 17], logits[2] = torch.nan, torch.inf, -torch.inf
    highest = draw(logits, uniform, top_k=3, impl=impl)[1]
    assert [str(x) for x in highest[:3].tolist()] == ["nan", "inf", "-inf"]
    assert highest[3] == logits[3].amax()


@pytest.mark.parametrize("temperature", [1e-50, 1e-42, 1e-4, 0.011, 1e6])
def test_temperatures_at_both_ends(temperature):
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf, 2.999]]).expand(3, -1)
    uniform = torch.tensor([0.01, 0.49, 0.99], dtype=torch.float64)
    expected = {0.011: [1, 2, 4], 1e6: [0, 1, 4]}.get(temperature, [1, 1, 2])
    for impl in ("cpp", "reference"):
        assert draw(logits, uniform, temperature=temperature, impl=impl)[0].tolist() == expected


def test_the_kept_are_those_of_the_definition():
    """More than the first few, ties at the last, one alone; a flat row needs nearly all tokens for its top_p."""
    flat = torch.randn(3, 5000) * 0.01
    tied = torch.zeros(3, 700)
    for logits, options in [(flat, {"top_p": 0.99}), (tied, {"top_k": 9}), (tied, {"top_k": 700, "top_p": 1e-9})]:
        last = torch.full((3,), 1 - 2**-32, dtype=torch.float64)
        of_kept = kept(logits, options.get("top_k"), options.get("top_p"))
        expected = [int(row.isfinite().nonzero()[-1]) for row in of_kept]
        assert draw(logits, last, **options, impl="cpp")[0].tolist() == expected


def test_strides_and_any_number_of_threads(threads):
    logits, uniform = torch.randn(50257, 8).t() * 3, torch.rand(8, dtype=torch.float64)
    found = []
    for n in (1, 2, 5):
        threads(n)
        found.append(draw(logits, uniform, top_p=0.9, impl="cpp")[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[0], draw(logits.contiguous(), uniform, top_p=0.9, impl="cpp")[0])
    alone = [draw(logits[b : b + 1], uniform[b : b + 1], top_p=0.9, impl="cpp")[0] for b in range(8)]
    assert torch.equal(torch.cat(alone), found[0])


@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_views_of_both_inputs(impl):
    """Every second uniform number, and logits that torch has not negated yet."""
    logits, uniform = torch.randn(4, 300) * 2, torch.rand(4, dtype=torch.float64)
    negated = torch.complex(torch.zeros(4, 300), -logits).conj().imag
    assert negated.is_neg()
    expected = draw(logits, uniform, impl=impl)
    spread = torch.stack((uniform, 1 - uniform), 1)[:, 0]
    for given in (logits, negated, torch._neg_view(-logits)):
        for actual, wanted in zip(draw(given, spread, impl=impl), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_memory_is_kept_and_grows(threads):
    threads(3)
    scratch = Scratch()
    draw(torch.randn(1, 500), None, scratch=scratch)
    held = scratch.held
    draw(torch.randn(1, 500), None, scratch=scratch)
    assert scratch.held is held
    for rows, V in [(4, 500), (2, 900)]:
        logits = torch.randn(rows, V)
        assert torch.equal(draw(logits, None, scratch=scratch)[0], logits.argmax(-1))


def test_other_dtypes_go_by_torch():
    logits, uniform = torch.randn(2, 99, dtype=torch.bfloat16), torch.rand(2, dtype=torch.float64)
    for row, at, token in zip(logits, uniform, draw(logits, uniform)[0].tolist(), strict=True):
        cumulated = torch.softmax(row.float(), 0).cumsum(0)
        before = cumulated[token] - torch.softmax(row.float(), 0)[token]
        assert before - 0.02 <= at <= cumulated[token] + 0.02
    with pytest.raises(
        ValueError, match="logits is torch.bfloat16, and the kernel takes float32; use impl='reference'"
    ):
        draw(logits, uniform, impl="cpp")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(3)}, r"logits is torch.float32 \(3,\); it must be \[B, V\]"),
        ({"logits": torch.zeros(2, 0)}, "neither 0"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int64)}, "floating"),
        ({"uniform": torch.zeros(2)}, r"uniform is torch.float32 \(2,\) on cpu; it must be float64 \[2\] on cpu"),
        ({"uniform": torch.zeros(3, dtype=torch.float64)}, r"it must be float64 \[2\]"),
        (
            {"uniform": torch.tensor([0.5, 1.0]).double()},
            r"uniform is \[0.5, 1.0\]; each must be at least 0 and below 1",
        ),
        ({"uniform": torch.tensor([-1e-9, 0.0]).double()}, "below 1"),
        ({"uniform": torch.tensor([0.0, torch.nan]).double()}, "below 1"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be above 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_input(change, message):
    given = {"logits": torch.zeros(2, 3), "uniform": torch.zeros(2, dtype=torch.float64)} | change
    with pytest.raises(ValueError, match=f"^draw: .*{message}"):
        draw(**given)


def test_cost_counts_what_is_read_and_written():
    for logits, uniform, _ in samples():
        tokens, highest = draw(logits, uniform)
        tensors = (logits, uniform, tokens, highest)
        assert cost(*logits.shape)["forward"]["bytes"] == sum(t.nbytes for t in tensors)
