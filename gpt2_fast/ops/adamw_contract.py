"""What `adamw` takes: lists of tensors that fit together, share no memory, and are what a kernel can update."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2_fast.ops.runtime.contract import FLOATS, check_dense
from gpt2_fast.ops.runtime.dispatch import KERNEL_DTYPES, LOW_PRECISION

OP = "adamw"
HYPERPARAMETERS = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")  # the columns of `hyper`
STATE_DTYPES = (torch.float32, torch.float64)  # float64: the reference alone


class Lists(NamedTuple):
    """What `adamw` takes of its parameters, see there."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    masters: list[Tensor]
    steps: list[Tensor]
    groups: list[int]

    @classmethod
    def empty(cls) -> Lists:
        return cls(*([] for _ in cls._fields))

    def append(self, param, grad, exp_avg, exp_avg_sq, master, step, group) -> None:
        """Adds one parameter with its state; master: None where it needs none."""
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)
        if master is not None:
            self.masters.append(master)
        self.steps.append(step)
        self.groups.append(group)


def with_masters(params, masters, *others) -> Iterator[tuple]:
    """(param, master or None, *others) of each parameter."""
    masters = iter(masters)
    for p, *values in zip(params, *others, strict=True):
        yield p, next(masters) if p.dtype in LOW_PRECISION else None, *values


def _overlaps_itself(t: Tensor) -> bool:
    """Whether an element may lie upon another one, as in an expanded tensor or in windows of one memory."""
    reach = 0
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def refuse_overlap(params, grads, exp_avgs, exp_avg_sqs, masters, steps) -> None:
    """Raises ValueError where a tensor that is written shares memory with another, as a parameter given twice does, or
    with itself, as an expanded one does.
    """
    written = {"param": params, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "master": masters}
    spans = []
    for lists, writes in ((written, True), ({"grad": grads, "step": steps}, False)):
        for name, tensors in lists.items():
            for i, t in enumerate(tensors):
                if writes and not t.is_contiguous() and _overlaps_itself(t):
                    where = f"{tuple(t.shape)} with strides {tuple(t.stride())}"
                    raise ValueError(f"{OP}: {name} {i} is {where}: its elements lie upon each other; pass .clone()")
                if t.numel():  # of a strided tensor its first element alone: others' may lie between its own
                    nbytes = t.nbytes if t.is_contiguous() else t.itemsize
                    spans.append((t.data_ptr(), t.data_ptr() + nbytes, writes, name, i))
    spans.sort()
    end, last, end_written, last_written = 0, "", 0, ""
    for start, stop, writes, name, i in spans:
        if start < end_written or (writes and start < end):
            other = last_written if start < end_written else last
            raise ValueError(
                f"{OP}: {name} {i} shares memory with {other}; pass every parameter once, states of its own"
            )
        if stop > end:
            end, last = stop, f"{name} {i}"
        if writes and stop > end_written:
            end_written, last_written = stop, f"{name} {i}"


def unsupported(param: Tensor) -> str | None:
    """Why the kernels cannot update this parameter, None when they can; the reference updates any."""
    if param.dtype not in KERNEL_DTYPES:
        return f"its dtype is {param.dtype}; kernels take float32, bfloat16 and float16"
    if not param.is_contiguous():
        return f"it is not contiguous (strides {tuple(param.stride())})"
    return None


def check_numbers(hyper, numbers, max_norm) -> None:
    """Raises TypeError or ValueError, one line, unless these arguments of `adamw` are what it reads.

    numbers: name -> tensor of one number or None.
    """
    check_dense(OP, "hyper", hyper)
    for name, t in numbers.items():
        if t is not None:
            check_dense(OP, name, t)
    if not isinstance(max_norm, (float, int, type(None))):
        raise TypeError(f"{OP}: max_norm is a {type(max_norm).__name__}; it must be a number or None")
    if hyper.ndim != 2 or hyper.shape[1] != len(HYPERPARAMETERS) or hyper.dtype != torch.float64:
        raise ValueError(f"{OP}: hyper is {hyper.dtype} {tuple(hyper.shape)}; it must be float64 [groups, 6]")
    if max_norm is not None and not max_norm >= 0.0:
        raise ValueError(f"{OP}: max_norm is {max_norm}; it must be at least 0, or None")
    for name, t in numbers.items():
        dtypes = FLOATS if name == "norm" else (torch.float32,)  # which the kernels read where it lies
        if t is not None and (t.numel() != 1 or t.dtype not in dtypes or t.device != hyper.device):
            where, kind = f"{t.dtype} {tuple(t.shape)} on {t.device}", "floating" if name == "norm" else "float32"
            raise ValueError(f"{OP}: {name} is {where}; it must be one {kind} number on {hyper.device}")


def check(params, grads, exp_avgs, exp_avg_sqs, masters, steps, groups, hyper) -> None:
    """Raises TypeError or ValueError, one line that names the tensor, unless the lists of `adamw` fit together."""
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs, "steps": steps, "groups": groups}
    for name, values in lists.items():
        if len(values) != len(params):
            raise ValueError(f"{OP}: {len(values)} {name} for {len(params)} params; one each")
    tensors = {"param": params, "grad": grads, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs, "master": masters}
    for name, values in {**tensors, "step": steps}.items():
        for i, t in enumerate(values):
            check_dense(OP, f"{name} {i}", t)
    low = sum(p.dtype in LOW_PRECISION for p in params)
    if len(masters) != low:
        raise ValueError(f"{OP}: {len(masters)} masters for {low} bfloat16 and float16 params; one each, in order")
    each = with_masters(params, masters, grads, exp_avgs, exp_avg_sqs, steps, groups)
    for i, (p, master, g, m, v, step, group) in enumerate(each):
        if p.device != hyper.device or p.dtype not in FLOATS:
            raise ValueError(
                f"{OP}: param {i} is {p.dtype} on {p.device}; it must be floating, on {hyper.device} as hyper"
            )
        if g.shape != p.shape or g.dtype != p.dtype or g.device != p.device:
            raise ValueError(f"{OP}: grad {i} must be a dense {p.dtype} {tuple(p.shape)} on {p.device}, as its param")
        for name, t in (("exp_avg", m), ("exp_avg_sq", v), ("master", master)):
            if t is not None and (t.shape != p.shape or t.device != p.device or t.dtype not in STATE_DTYPES):
                found, wanted = f"{t.dtype} {tuple(t.shape)} on {t.device}", f"{tuple(p.shape)} on {p.device}"
                raise ValueError(
                    f"{OP}: {name} of param {i} is {found}; it must be torch.float32 {wanted}, as its param"
                )
        if m.dtype != v.dtype:
            raise ValueError(f"{OP}: exp_avg of param {i} is {m.dtype} and exp_avg_sq {v.dtype}; they must match")
        if step.numel() != 1 or step.dtype != torch.float32 or step.device != p.device:
            found = f"{step.dtype} {tuple(step.shape)} on {step.device}"
            raise ValueError(f"{OP}: step of param {i} is {found}; it must be one float32 on {p.device}")
        if not 0 <= group < hyper.shape[0]:
            raise ValueError(f"{OP}: param {i} is in group {group} and hyper has {hyper.shape[0]}")


def refuse_what_kernels_cannot(impl, params, masters, exp_avgs, exp_avg_sqs) -> None:
    """Raises ValueError where a parameter or its state is what only the reference updates."""
    for i, (p, master, m, v) in enumerate(with_masters(params, masters, exp_avgs, exp_avg_sqs)):
        reason = unsupported(p)
        for name, t in (("exp_avg", m), ("exp_avg_sq", v), ("master", master)):
            if t is not None and (t.dtype != torch.float32 or not t.is_contiguous()):
                reason = reason or f"its {name} is {t.dtype} with strides {tuple(t.stride())}, not contiguous float32"
        if reason is not None:
            raise ValueError(f"{OP}: impl={impl!r} cannot update param {i}: {reason}; use impl='reference'")


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless an option of AdamW is a number. YAML reads 1e-3 as a string."""
    if not hasattr(value, "__float__"):
        raise TypeError(f"AdamW: {name} is {value!r}, a {type(value).__name__}; pass a number")


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError or TypeError for hyperparameters of a param_group that AdamW does not take."""
    if isinstance(group["lr"], Tensor):
        raise ValueError("AdamW: lr is a tensor; pass a number, which a captured step follows too")
    for name in ("lr", "eps", "weight_decay"):
        check_number(name, group[name])
        if not group[name] >= 0.0:
            raise ValueError(f"AdamW: {name} is {group[name]}; it must be at least 0")
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise TypeError(f"AdamW: betas are {group['betas']!r}; pass two numbers") from None
    for beta in (beta1, beta2):
        check_number("one of betas", beta)
    if not (0.0 <= beta1 < 1.0 and 0.0 <= beta2 < 1.0):
        raise ValueError(f"AdamW: betas are {(beta1, beta2)}; each must be at least 0 and below 1")
    check_options(group)


def check_groups(groups: Sequence[dict[str, Any]]) -> None:
    for group in groups:
        check_group(group)


def hyper_rows(groups: Sequence[dict[str, Any]]) -> list[list[float]]:
    """The rows of `hyper`. Raises TypeError for what is not a number; `check_groups` looks at the range."""
    try:
        return [[*map(float, (g["lr"], *g["betas"], g["eps"], g["weight_decay"], g["maximize"]))] for g in groups]
    except (TypeError, ValueError):
        check_groups(groups)  # says which one
        raise


def check_one_device(groups: Sequence[dict[str, Any]]) -> None:
    """Raises ValueError for parameters on several."""
    devices = {p.device for group in groups for p in group["params"]}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"AdamW: parameters are on {names}; make one optimizer for each device")


def check_clip(clip_grad_norm: float | None) -> None:
    """Raises TypeError or ValueError unless AdamW takes it."""
    if clip_grad_norm is not None:
        check_number("clip_grad_norm", clip_grad_norm)
        if not clip_grad_norm > 0.0:
            raise ValueError(f"AdamW: clip_grad_norm is {clip_grad_norm}; it must be above 0, or None")


def check_cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Raises ValueError for a dtype without masters, and under DDP: its buckets stay those of the weights that it saw,
    and gradients of another dtype are not averaged over the ranks, without a word."""
    if dtype not in LOW_PRECISION:
        raise ValueError(f"AdamW: cast is to {dtype}; a master is kept beside bfloat16 and float16 weights")
    if any(isinstance(module, torch.nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "AdamW: the model is DistributedDataParallel's already, which would no longer average its gradients; call "
            "cast() on the model before DistributedDataParallel(model)"
        )


def check_options(group: dict[str, Any]) -> None:
    """Raises ValueError for what a param_group has and a step would not follow."""
    check_flags(group)
    for name in ("clip_grad_norm", "impl"):
        if name in group:
            if name == "clip_grad_norm" and inside_zero():
                raise ValueError(_IN_ZERO)
            raise ValueError(
                f"AdamW: a param group has its own {name}; it is of all parameters: pass AdamW(..., {name}=...)"
            )


_ZERO = "torch.distributed.optim.zero_redundancy_optimizer"
_IN_ZERO = (
    "AdamW: ZeroRedundancyOptimizer gives each rank some of the parameters, so a norm would be of those alone; leave "
    "out clip_grad_norm and grad_scale, and call torch.nn.utils.clip_grad_norm_(model.parameters(), ...) before step()"
)
_IN_FSDP1 = (
    "AdamW: a parameter is FullyShardedDataParallel's (FSDP1), of which a rank has its own part, so a norm would be of "
    "that part alone; use fully_shard (FSDP2), or leave out clip_grad_norm and grad_scale, and call "
    "scaler.unscale_(...) and model.clip_grad_norm_(...) before step()"
)


def inside_zero() -> bool:
    """Whether torch's ZeroRedundancyOptimizer is making this optimizer, of this rank's parameters alone.

    Nothing on these parameters, or on their groups, says so: only who calls.
    """
    zero, frame = sys.modules.get(_ZERO), sys._getframe(1)
    while zero is not None and frame is not None:
        if frame.f_globals is vars(zero):
            return True
        frame = frame.f_back
    return False


def check_whole(params: Sequence[Tensor], in_zero: bool) -> None:
    """Raises ValueError where a rank would take the norm of its own part of the gradients, and clip by that."""
    if in_zero:
        raise ValueError(_IN_ZERO)
    if any(getattr(p, "_fsdp_flattened", False) for p in params):
        raise ValueError(_IN_FSDP1)


def check_shape(key: str, i: int, value: Tensor, param: Tensor) -> None:
    """Raises ValueError, one line, for a state of parameter i that has not its shape."""
    if value.shape != param.shape:
        found, wanted = tuple(value.shape), tuple(param.shape)
        raise ValueError(f"AdamW: {key} of parameter {i} is {found} in the state; the parameter is {wanted}")


def check_state(state_dict: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Raises ValueError, one line, unless what `AdamW.load_state_dict` is given is an AdamW's state that it takes."""
    fix = "pass what state_dict() of this class or of torch.optim.AdamW gave"
    if not isinstance(state_dict, dict) or not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(f"AdamW: load_state_dict was given no optimizer's state; {fix}")
    for i, group in enumerate(state_dict["param_groups"]):
        if "betas" not in group:
            raise ValueError(f"AdamW: group {i} of the state has no betas, so it is another optimizer's; {fix}")
        check_group({**defaults, **group})
    for i, state in state_dict["state"].items():
        missing = [key for key in ("step", "exp_avg", "exp_avg_sq") if key not in state]
        if state and missing:
            raise ValueError(f"AdamW: the state of parameter {i} has {', '.join(state)} and no {missing[0]}; {fix}")


def check_flags(flags: dict[str, Any]) -> None:
    """Raises ValueError for what torch.optim.AdamW can and this one cannot."""
    if flags.get("amsgrad"):
        raise ValueError("AdamW: amsgrad is not implemented; use torch.optim.AdamW")
    if flags.get("differentiable"):
        raise ValueError(
            "AdamW: differentiable is not implemented, a step is no part of a graph; use torch.optim.AdamW"
        )
    if flags.get("foreach") and flags.get("fused"):
        raise ValueError("AdamW: foreach and fused are both True; pass one of them, as to torch.optim.AdamW")
