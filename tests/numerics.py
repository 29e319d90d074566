"""How close is close enough: one rule and one table for the whole project.

Truth is the reference in float64 on the same (already rounded) inputs. An implementation passes when

    error(implementation) <= 2 * error(reference in the implementation's own dtype) + TINY[dtype] * scale

where error is the largest absolute difference from truth and scale is truth's largest magnitude: it may be
no worse than twice what plain PyTorch loses in that dtype. Values and every gradient are held to it.

In bfloat16 and float16 that rule alone would let a row of small values be wrong altogether, beside a large one. So each
row of such a tensor is held to a rule of its own, wider since what rounding does to a few numbers is a matter of luck:

    error(row) <= 4 * (error(row of the reference) + TINY[dtype] * scale(row)) + ROW_SLACK * the bound of the tensor
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# A few units in the last place, for outputs where plain PyTorch happens to round nothing at all.
TINY = {torch.float32: 2.0**-21, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-45}
ROW_SLACK = 2.0**-5  # for rows whose values are what is left of larger ones that cancel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_as_exact(
    actual: Tensor,
    eager: Tensor,
    truth: Tensor,
    what: str,
    dtype: torch.dtype | None = None,
    row_slack: float = ROW_SLACK,
) -> None:
    """Asserts the rule of this module for one tensor; `dtype` is what it was computed in, if not its own."""
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    actual, eager, truth = (t.detach().cpu().double() for t in (actual, eager, truth))
    assert torch.equal(actual.isfinite(), truth.isfinite()), f"{what}: not finite where the reference is"
    finite = truth.isfinite()
    if not finite.any():
        return
    actual, eager, truth = (t.where(finite, 0.0) for t in (actual, eager, truth))
    errors, allowed, scales = (actual - truth).abs(), (eager - truth).abs(), truth.abs()
    tiny = TINY[dtype or torch.float32]
    bound = 2 * allowed.max() + tiny * scales.max()
    assert errors.max() <= bound, f"{what}: error {errors.max():.3e}, eager's {allowed.max():.3e}, bound {bound:.3e}"
    if dtype in (torch.bfloat16, torch.float16) and truth.ndim > 1:
        errors, allowed, scales = (t.amax(-1) for t in (errors, allowed, scales))
        bounds = 4 * (allowed + tiny * scales) + row_slack * bound
        row = tuple(int(i) for i in torch.unravel_index((errors - bounds).argmax(), errors.shape))
        error, allowed, bound = errors[row], allowed[row], bounds[row]
        assert error <= bound, f"{what}: error {error:.3e} in row {row}, eager's {allowed:.3e}, bound {bound:.3e}"


def evaluate(run: Callable, inputs: Sequence, upstream: Sequence[Tensor] | None = None):
    """Outputs of run(*inputs) and the gradients of its floating inputs under random upstream gradients.

    Gradients are asked for exactly those inputs that require them.
    """
    outputs = run(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    if not leaves:
        return outputs, []
    used = [(o, u) for o, u in zip(outputs, upstream or [None] * len(outputs), strict=True) if o.requires_grad]
    gradients = torch.autograd.grad(
        [o for o, _ in used], leaves, [u.to(o.device, o.dtype) for o, u in used], allow_unused=True
    )
    return outputs, [torch.zeros_like(t) if g is None else g for g, t in zip(gradients, leaves, strict=True)]


def _leaves(inputs: Sequence, dtype: torch.dtype | None = None) -> list:
    """Fresh copies of the inputs, floating ones requiring gradients, in `dtype` where given. Strides survive."""
    fresh = []
    for t in inputs:
        if isinstance(t, Tensor) and t.is_floating_point():
            t = t.detach().to(dtype or t.dtype, copy=True).requires_grad_()
        fresh.append(t)
    return fresh


def runs_of(
    run: Callable, reference: Callable | None, inputs: Sequence, gradients: bool = True, before: Sequence | None = None
) -> tuple:
    """(outputs, gradients) of `run`, and of the reference in the inputs' dtypes and in float64; one upstream gradient.

    before: a result of this function, whose runs of the reference are taken.
    """
    leaves = _leaves if gradients else lambda inputs, dtype=None: [t.to(dtype or t.dtype) for t in inputs]
    if before is None:
        with torch.no_grad():
            shapes = reference(*inputs)
    else:
        shapes = before[1][0]
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in shapes]
    if before is None:
        true = evaluate(reference, leaves(inputs, torch.float64), upstream)
        before = (None, evaluate(reference, leaves(inputs), upstream), true)
    return (evaluate(run, leaves(inputs), upstream), *before[1:])


def compare(actual, eager, true, dtype: torch.dtype, what: str = "", row_slack: float = ROW_SLACK) -> None:
    """Holds values and all gradients of `runs_of` to the rule of this module."""
    for kind, *lists in zip(("output", "gradient"), actual, eager, true, strict=True):
        for i, (a, e, t) in enumerate(zip(*lists, strict=True)):
            assert a.dtype == e.dtype, f"{what} {kind} {i}: {a.dtype}, expected {e.dtype}"
            assert_as_exact(a, e, t, f"{what} {kind} {i}", dtype, row_slack)


def check_op(
    run: Callable,
    reference: Callable,
    inputs: Sequence,
    dtype: torch.dtype,
    what: str = "",
    gradients: bool = True,
    row_slack: float = ROW_SLACK,
) -> None:
    """Holds values and all gradients of `run` to the rule of this module against `reference`."""
    compare(*runs_of(run, reference, inputs, gradients), dtype, what, row_slack)


def assert_same_bits(a: Sequence[Tensor], b: Sequence[Tensor], what: str = "") -> None:
    """Asserts that two runs gave the same bits."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        assert x.dtype == y.dtype, f"{what} tensor {i}: {x.dtype} and {y.dtype}"
        x, y = (t.detach().reshape(-1).contiguous().view(torch.uint8) for t in (x, y))
        assert torch.equal(x, y), f"{what} tensor {i}: two runs differ in their bits"


class _Operators(TorchDispatchMode):
    """Notes the package's operators that are called within it, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace == "gpt2_fast":
            copies = [t.detach().clone() if isinstance(t, Tensor) else t for t in args]
            self.calls.append((operator, tuple(copies), dict(kwargs or {})))
        return operator(*args, **(kwargs or {}))


def check_operators(run: Callable[[], object]) -> list[str]:
    """Holds the operators that `run` calls to torch.library.opcheck; their names, in order."""
    with _Operators() as mode:
        run()
    for operator, args, kwargs in mode.calls:
        torch.library.opcheck(operator, args, kwargs)
    return [operator._schema.name.split("::")[1] for operator, _, _ in mode.calls]
