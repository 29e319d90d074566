"""The MLP's persistent products, by Triton's interpreter: values, gradients, and what is left to the vendor's."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch
from conftest import DEVICE
from numerics import assert_same_bits, check_op

pytest.importorskip("triton")

from gpt2_fast.kernels import cards, linear_gelu, tuning
from gpt2_fast.kernels import mlp as kernels
from gpt2_fast.kernels.aot import config_arch

from gpt2_fast.ops.mlp import mlp, mlp_reference
from gpt2_fast.ops.runtime.gelu import kind_of
from gpt2_fast.ops.runtime.philox import NO_DROPOUT, Dropout

ROWS, C, F = 70, 24, 88  # above kernels.FEW_ROWS, and multiples of no tile
TILES = {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3}
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture
def launched(monkeypatch):
    """The kernels launched, while the table chooses the persistent products for every architecture and dtype."""
    names, launch = [], linear_gelu._launch
    noted = lambda kernel, *arguments, **keywords: (
        names.append(kernel.fn.__name__),
        launch(kernel, *arguments, **keywords),
    )
    monkeypatch.setattr(linear_gelu, "_launch", noted)
    with contextlib.ExitStack() as stack:
        for index, row in enumerate(tuning.rows("linear_gelu")):
            tiles = TILES if DEVICE == "cpu" else row["config"]
            if "num_warps" in tiles:
                stack.enter_context(tuning.trial("linear_gelu", index, {**tiles, "product": "persistent"}))
        if "num_warps" not in tuning.config("linear_gelu", "forward", config_arch(torch.device(DEVICE)), 2):
            pytest.skip("this card has no tensor memory accelerator, and no tiles")
        yield names


def _inputs(dtype, rows=ROWS, n_embd=C, width=F):
    shapes = [(rows, n_embd), (rows, n_embd), (n_embd,), (n_embd,), (n_embd, width), (width,), (width, n_embd)]
    tensors = [torch.randn(shape, device=DEVICE) for shape in [*shapes, (n_embd,)]]
    return [(t * t.shape[0] ** -0.5 if i in (4, 6) else t).to(dtype) for i, t in enumerate(tensors)]


def _check(inputs, dtype, activation="gelu_new", dropout=NO_DROPOUT):
    reference = partial(mlp_reference, kind=kind_of("test", activation), dropout=dropout)
    check_op(partial(mlp, impl="triton", activation=activation, dropout=dropout), reference, inputs, dtype)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_values_and_gradients(launched, dtype, activation):
    dropout = Dropout(0.2, torch.tensor([9], device=DEVICE), 3) if activation == "gelu" else NO_DROPOUT
    _check(_inputs(dtype), dtype, activation, dropout)
    assert set(launched) == {"forward_kernel", "backward_kernel"}


def test_matrices_that_are_columns_of_wider_ones(launched):
    """Their rows are contiguous, and lie further apart than they are long."""
    x, _, _, _, weight, bias, proj, _ = _inputs(torch.bfloat16)
    within = lambda t: torch.nn.functional.pad(t, (8, 8), value=torch.nan)[:, 8:-8]
    config = linear_gelu.config_for("forward", within(x), within(weight))
    u, y = linear_gelu.forward(x, weight, bias, False, config)
    assert_same_bits(linear_gelu.forward(within(x), within(weight), bias, False, config), (u, y))
    config = linear_gelu.config_for("backward", within(x), within(proj), u)
    found = linear_gelu.backward(within(x), within(proj), u, False, config)
    assert_same_bits(found, linear_gelu.backward(x, proj, u, False, config))


def _transposed(t):
    return t.t().contiguous().t()


@pytest.mark.parametrize(
    ("inputs", "dtype"),
    [
        (lambda d: _inputs(d, width=84), torch.bfloat16),  # rows of u are 168 bytes
        (lambda d: _inputs(d, n_embd=20), torch.bfloat16),  # rows of x are 40 bytes
        (_inputs, torch.float32),
        (lambda d: [_transposed(t) if i in (4, 6) else t for i, t in enumerate(_inputs(d))], torch.float16),
    ],
    ids=["width", "n_embd", "float32", "transposed weights"],
)
def test_what_tma_does_not_take_is_the_vendors(launched, inputs, dtype):
    _check(inputs(dtype), dtype)
    assert not launched


def test_where_a_matrix_must_begin_and_its_rows_lie(launched):
    x, _, _, _, weight, _, proj, _ = _inputs(torch.bfloat16)
    u = torch.zeros(ROWS, F, dtype=torch.bfloat16, device=DEVICE)
    off = lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)  # 2 bytes off a multiple of 16
    again = lambda t: t[:1].expand_as(t)
    wider = lambda t: torch.nn.functional.pad(t, (0, 4))[:, :-4]  # rows are a multiple of 8 bytes apart
    for change in (off, again, wider, torch.Tensor.float):
        for i in range(2):
            given = [change(t) if i == j else t for j, t in enumerate((x, weight))]
            assert linear_gelu.config_for("forward", *given) is None
        for i in range(3):
            dm, w, of = [change(t) if i == j else t for j, t in enumerate((x, proj, u))]
            assert linear_gelu.config_for("backward", dm, w, of) is None
    assert linear_gelu.config_for("forward", x, weight[:, :-4]) is None  # rows of the result are 168 bytes
    assert linear_gelu.config_for("forward", x, weight)
    assert linear_gelu.config_for("backward", x, proj, u)


def test_sums_are_of_every_row_once(launched):
    """The bias's gradient from tiles of rows, the last of them not whole; all of them by every program there is."""
    dm, weight = _inputs(torch.bfloat16)[0], _inputs(torch.bfloat16)[6]
    u = torch.randn(ROWS, F, device=DEVICE).bfloat16()
    config = linear_gelu.config_for("backward", dm, weight, u)
    du, dbias = linear_gelu.backward(dm, weight, u, False, config)
    expected, of_rows = kernels.gelu_backward((dm.float() @ weight.float().t()).bfloat16(), u, False)
    torch.testing.assert_close(du.float(), expected.float(), rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dbias, of_rows, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dbias, du.float().sum(0), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_the_vendors_product_is_what_ships_until_a_gpu_has_timed_the_other(kernel):
    """Tiles are there for the cards that have TMA, and for no other."""
    timed = [row.get("arch") for row in tuning.rows("linear_gelu") if row["by"].startswith("do_bench")]
    for arch in cards.ARCHS:
        found = tuning.config("linear_gelu", kernel, arch, 2)
        assert found["product"] == "vendor" or arch in timed
        assert ("num_warps" in found) == (arch in (90, 100, 120)), arch
        assert tuning.config("linear_gelu", kernel, arch, 4) == {"product": "vendor"}
