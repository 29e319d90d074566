"""AdamW as a torch.optim.Optimizer over the fused step of ops/adamw.py.

It differs from torch.optim.AdamW in three ways. The gradient norm is taken and clipped inside the step
(`clip_grad_norm`), without touching the gradients. A bfloat16 or float16 parameter has float32 averages and a
float32 master, in its state as "master": `cast` keeps the weight that was there before it was rounded. And nothing is
read back to the host: step counts live on the parameters' device, as do the hyperparameters, copied there when they
change, so a step can be captured in a CUDA graph. State dicts go both ways between the two classes.

Weights may be written between steps in any way, through `.data` too: `load_state_dict`, clamping, a pruning mask. Each
element that is not its master's rounding then, bit for bit, is what the next step begins from.

DTensor parameters (`fully_shard`) are updated shard by shard, with the norm of the gradients of all ranks: see
parallel/dtensor.py.

A float16 loss is scaled: torch.amp.GradScaler leaves its scale, and what it found in the gradients, with the optimizer,
or `step` is given a scale and finds the same in their norm. A step that has to be left out is, and the host waits for
nothing.

After `shard` several processes share a step: each adds up the gradients of its micro-batches, updates its part of the
parameters and holds the state of that part alone. Their number changes no bit, see `gpt2_fast.parallel`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from gpt2_fast.ops import adamw as room
from gpt2_fast.ops import adamw_contract as contract
from gpt2_fast.ops.adamw_kept import Kept
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.optim_state import complete, dtensors, is_dtensor, master_of, take
from gpt2_fast.parallel.group import Group, check_world
from gpt2_fast.parallel.shards import Shards, check_shareable
from gpt2_fast.uncompiled import Optimizer


class AdamW(Optimizer):
    """AdamW with decoupled weight decay, global-norm clipping and mixed-precision masters in one pass.

    Args:
        params: parameters or groups of them, all on one device; a group may set lr, betas, eps, weight_decay and
            maximize of its own, and these may be changed later.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW; lr is a number.
        clip_grad_norm: the 2-norm of all gradients together beyond which they are scaled down to it, as
            torch.nn.utils.clip_grad_norm_ does; None: no norm is taken; inf: it is taken, and nothing scaled. Refused
            in `step` under FSDP1 and ZeroRedundancyOptimizer, where a rank has a part of the gradients.
        impl: see `gpt2_fast.ops.runtime.dispatch`.
        foreach, fused, capturable: accepted as by torch.optim.AdamW, and without effect: a step is always fused, and
            can always be captured.
        amsgrad, differentiable: False.

    Attributes:
        last_grad_norm: the norm of the last step's gradients before clipping, a float32 scalar on the device; None
            before the first step and without clip_grad_norm. Of a scaled loss, it is divided by the scale.
        last_found_inf: whether the last step, of a scaled loss, was left out for a gradient that is not finite: 1 or 0,
            a float32 scalar on the device; None where no loss was scaled.

    Raises:
        ValueError: hyperparameters out of range, parameters on several devices, sparse gradients, amsgrad,
            differentiable, foreach and fused together, clip_grad_norm or impl in a group.
        TypeError: hyperparameters that are no numbers.
        ImplementationUnavailable: the named `impl` cannot run here.
    """

    _step_supports_amp_scaling = True  # a GradScaler leaves scale and found_inf to `step`, and waits for nothing

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        clip_grad_norm: float | None = None,
        impl: str = "auto",
        amsgrad: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        contract.check_flags({"amsgrad": amsgrad, "differentiable": differentiable, "foreach": foreach, "fused": fused})
        contract.check_clip(clip_grad_norm)
        self.clip_grad_norm, self.impl = clip_grad_norm, impl
        self.last_grad_norm: Tensor | None = None
        self.last_found_inf: Tensor | None = None
        self._hyper: Tensor | None = None
        self._uploaded: list[list[float]] | None = None
        self._warned = False
        self._shards: Shards | None = None
        self._in_zero = contract.inside_zero()
        self._kept: dict[str, Kept] = {}  # by implementation
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle takes along, beside torch's own; a copy uploads its hyperparameters by itself."""
        if self._shards is not None:
            raise ValueError("AdamW: the parameters are shared out already; copy state_dict() instead of the optimizer")
        own = ("clip_grad_norm", "impl", "last_grad_norm", "last_found_inf", "_warned", "_shards", "_in_zero")
        fresh = {"_hyper": None, "_uploaded": None, "_kept": {}}
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}, **fresh}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._shards is not None:
            raise ValueError("AdamW: the parameters are shared out already; add groups before shard()")
        if isinstance(param_group, dict):  # else torch says so
            contract.check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        contract.check_one_device(self.param_groups)

    def upload_hyperparameters(self) -> None:
        """Brings the param_groups' numbers to the device if they changed, without waiting for it.

        `step` does it too, except while a CUDA graph is captured: call this before each replay.
        """
        rows = contract.hyper_rows(self.param_groups)
        if rows == self._uploaded:
            return
        contract.check_groups(self.param_groups)
        device = self.param_groups[0]["params"][0].device
        host = torch.tensor(rows, dtype=torch.float64, device="cpu", pin_memory=device.type == "cuda")
        if self._hyper is None or self._hyper.shape != host.shape or self._hyper.device != device:
            self._hyper = torch.empty_like(host, device=device, pin_memory=False)
        self._hyper.copy_(host, non_blocking=True)
        self._uploaded = rows

    @torch.no_grad()
    def cast(self, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        """`model.to(dtype)`, whose float32 weights stay in this optimizer, as the masters of the rounded ones.

        A master that is made from a rounded weight begins on it, and in bfloat16 an update of 3e-5 is a quarter of the
        distance from one weight of 0.02 to the next: in the first steps little of what is learnt shows. Masters with
        all their bits lie anywhere between two rounded weights, which on average follow them at once.

        Args:
            model: what has this optimizer's parameters; its other parameters and its buffers are cast as well.
            dtype: bfloat16 or float16.

        Returns:
            model.

        Raises:
            ValueError: another dtype, a parameter of this optimizer that model has not, or a model that is
                DistributedDataParallel's. Nothing is cast then.
        """
        if self._shards is not None:
            raise ValueError("AdamW: the parameters are shared out already; cast before shard()")
        contract.check_cast(model, dtype)
        params = [p for group in self.param_groups for p in group["params"]]
        known = set(map(id, model.parameters()))
        if missing := [tuple(p.shape) for p in params if id(p) not in known]:
            raise ValueError(f"AdamW: a parameter {missing[0]} is not one of the model's; pass its model")
        wide = [master_of(p, self.state.get(p, {})) for p in params]
        model.to(dtype)
        for p, master in zip(params, wide, strict=True):
            p.copy_(master)  # what was rounded before is rounded twice by `to`, which is no rounding of its master
            self.state[p]["master"] = master
            complete(self.state[p], p)
        return model

    def _implementation(self, p: Tensor) -> str:
        """Which implementation updates `p`: the chosen one, or the reference where that cannot."""
        reason = contract.unsupported(p)
        if reason is None:
            return dispatch.choose(room.OP, self.impl, p.device, p.dtype)
        if self.impl not in ("auto", "reference"):
            raise ValueError(f"AdamW: impl={self.impl!r} cannot update a parameter {tuple(p.shape)}: {reason}")
        if not self._warned and self.impl == "auto":
            self._warned = True
            warnings.warn(
                f"AdamW: the reference updates the parameter {tuple(p.shape)}, one operation at a time: {reason}",
                stacklevel=3,
            )
        return "reference"

    def _collect(self) -> dict[str, contract.Lists]:
        """By implementation, the lists that `adamw` takes, of the parameters that have a gradient."""
        collected: dict[str, contract.Lists] = {}
        implementations: dict[tuple, str] = {}  # of parameters that look alike
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if (grad := p.grad) is None:
                    continue
                if grad.is_sparse:
                    raise ValueError("AdamW: a gradient is sparse; make its Embedding with sparse=False")
                state = complete(self.state[p], p)
                tensors = (p, grad, state["exp_avg"], state["exp_avg_sq"], state.get("master"))
                if is_dtensor(p):
                    tensors = dtensors().local(*tensors)
                param = tensors[0]
                looks = (param.dtype, param.device, param.is_contiguous())
                implementation = implementations.get(looks)
                if implementation is None:
                    implementation = implementations[looks] = self._implementation(param)
                lists = collected.get(implementation)
                if lists is None:
                    lists = collected[implementation] = contract.Lists.empty()
                lists.append(*tensors, state["step"], index)
        return collected

    def _norm(self, collected: dict[str, contract.Lists]) -> Tensor | None:
        """The norm of the gradients where `adamw` cannot take it: it sees those of one implementation and one rank."""
        params = [p for group in self.param_groups for p in group["params"]]
        contract.check_whole(params, self._in_zero)
        if any(map(is_dtensor, params)):
            return dtensors().grad_norm(params)
        if len(collected) > 1:
            return room.grad_norm_reference([g for lists in collected.values() for g in lists.grads])
        return None

    @torch.no_grad()
    def shard(self, group: Group, micro_batches: int) -> None:
        """Shares every step out over the processes of a group; a group of one adds up in the same order.

        The parameters become views of one buffer, and this process keeps 1 / group.world of the state. From then on a
        step is: for each of this process's micro_batches / group.world micro-batches, in order, forward, backward and
        `accumulate`; then `step`. Process r has the micro-batches from r micro_batches / group.world on. What is
        added is the gradients as they are, so each loss is divided by what is scored in the whole step.

        `state_dict` and `load_state_dict` are then calls that every process makes. The first process gets, and gives,
        the whole state, which does not depend on how many there are; what the others get has no state in it.

        Args:
            group: as `gpt2_fast.parallel.join` gives it.
            micro_batches: of a step, on all processes together.

        Raises:
            ValueError: processes that are no power of two or do not divide micro_batches, parameters of several
                dtypes, not contiguous or DTensors, or processes that hold other weights than the first.
        """
        if self._shards is not None:
            raise ValueError("AdamW: the parameters are shared out already; make another optimizer")
        check_world(group.world, micro_batches)
        params = [p for g in self.param_groups for p in g["params"]]
        if any(map(is_dtensor, params)):
            raise ValueError("AdamW: a parameter is a DTensor, sharded already; call step() without shard()")
        check_shareable(params)  # before any state is taken
        rows = [i for i, g in enumerate(self.param_groups) for _ in g["params"]]
        self._shards = Shards(params, rows, [self.state.pop(p, {}) for p in params], group, micro_batches)
        self._hold_shards()

    def _hold_shards(self) -> None:
        params = (p for g in self.param_groups for p in g["params"])
        for p, state in zip(params, self._shards.states, strict=True):
            self.state[p] = state

    def _shared(self, call: str) -> Shards:
        if self._shards is None:
            raise ValueError(f"AdamW: {call}() is for after shard(); without it, gradients add up in backward")
        return self._shards

    @torch.no_grad()
    def accumulate(self) -> None:
        """Adds the gradients of one micro-batch to the step's sum and clears them; after `shard`."""
        self._shared("accumulate").accumulate()

    def forget_accumulated(self) -> None:
        """The next `accumulate` begins a step."""
        self._shared("forget_accumulated").gradients.forget()

    # The three parts of a step after `shard`. In the first and the last, processes send: only `update` can be captured.

    @torch.no_grad()
    def reduce(self, grad_scale: Tensor | None = None) -> None:
        """Sums over the processes, and the norm. grad_scale: as of `step`."""
        shards, clips = self._shared("reduce"), self.clip_grad_norm is not None
        shards.reduce(clips or grad_scale is not None, self.impl, grad_scale)
        self.last_grad_norm = shards.norm.clone() if clips else None

    @torch.no_grad()
    def update(self, grad_scale: Tensor | None = None) -> None:
        """AdamW of this process's part. grad_scale: as of `step`."""
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.upload_hyperparameters()
        shards, max_norm = self._shared("update"), self._max_norm(grad_scale)
        self.last_found_inf = shards.update(self._hyper, max_norm, self.impl, grad_scale)

    @torch.no_grad()
    def gather(self) -> None:
        """The weights of the other processes' parts."""
        self._shared("gather").gather()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, grad_scale: Tensor | None = None) -> Any:
        """One step with the gradients that are there; parameters without one are left alone.

        Args:
            closure: evaluates the model again and returns the loss, which is then returned; not after `shard`.
            grad_scale: what the loss was multiplied by before backward, one float32 on the parameters' device. The step
                divides by it, and is left out where a gradient is not finite (`last_found_inf`). A GradScaler gives
                its own.

        After `shard`, it takes the gradients that were accumulated, of all processes; ValueError unless they are whole.

        Raises:
            ValueError, TypeError: what the constructor refuses, set on a group since, and tensors that do not fit or
                share memory. Nothing has changed then, no weight, no average and no count of steps.
        """
        for param_group in self.param_groups:
            contract.check_options(param_group)
        if self._shards is not None:
            if closure is not None:
                raise ValueError("AdamW: a closure takes no part in a shared step; call accumulate() and step()")
            if hasattr(self, "found_inf"):
                raise ValueError(
                    "AdamW: a GradScaler sees no gradients after shard(); call step(grad_scale=...) instead"
                )
            if not torch.compiler.is_compiling():
                self._shards.check_held([p for g in self.param_groups for p in g["params"]])
            self._shards.gradients.check_whole()
            self.reduce(grad_scale)
            self.update(grad_scale)
            self.gather()
            return None
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = self._scaling(grad_scale)
        collected = self._collect()
        self.last_found_inf = None
        if not collected:
            return loss
        if not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            self.upload_hyperparameters()
        scaling, max_norm = {"grad_scale": grad_scale, "found_inf": found_inf}, self._max_norm(grad_scale)
        norm = None if max_norm is None else self._norm(collected)  # or refuses, before anything has changed
        if norm is not None and grad_scale is not None:
            norm = norm / grad_scale
        calls = room.checked(collected, self._hyper, self._kept, max_norm=max_norm, norm=norm, **scaling)
        steps = [step for lists in collected.values() for step in lists.steps]
        torch._foreach_add_(steps, 1.0)
        for call in calls:
            taken = call()
        self.last_grad_norm = None if self.clip_grad_norm is None else taken
        self.last_found_inf = room.left_out(taken, **scaling)
        if self.last_found_inf is not None:
            torch._foreach_sub_(steps, self.last_found_inf)
        return loss

    def _scaling(self, grad_scale: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """What the gradients are divided by, and whether the step is to be left out, if that is known already."""
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None and found_inf is not None:
            raise ValueError(
                "AdamW: step() is given a grad_scale within GradScaler.step(), which gives its own; drop one"
            )
        params = (p for group in self.param_groups for p in group["params"])
        if found_inf is not None and any(map(is_dtensor, params)):
            # It may be of this rank's gradients alone. The norm is of all ranks', and they have to decide alike.
            scale, found_inf = found_inf.new_ones(()) if scale is None else scale, None
        return (scale, found_inf) if grad_scale is None else (grad_scale, None)

    def _max_norm(self, grad_scale: Tensor | None) -> float | None:
        """A scaled step takes the norm in any case, to see whether it is finite."""
        return math.inf if self.clip_grad_norm is None and grad_scale is not None else self.clip_grad_norm

    @torch.no_grad()
    def receive_state(self) -> None:
        """After `shard`, in every process but the first: what the first process's `load_state_dict` sends."""
        self._shared("receive_state").load([{} for group in self.param_groups for _ in group["params"]])

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's, with each parameter's whole state. After `shard`: see there."""
        packed = super().state_dict()
        if self._shards is not None:
            whole = self._shards.whole()
            numbers = (i for g in packed["param_groups"] for i in g["params"])
            packed["state"] = {} if whole is None else dict(zip(numbers, whole, strict=True))
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the state of this class or of torch.optim.AdamW.

        A low-precision parameter's averages stay float32; a master that is not in the state is made from the
        parameter as it is now, so load the model first. At the next step a weight that is not its master's rounding
        wins over the master, whichever was loaded first.

        Raises ValueError for another optimizer's state, hyperparameters out of range and shapes that do not fit.
        """
        contract.check_state(state_dict, self.defaults)
        whole = self._shards is None
        super().load_state_dict(state_dict if whole else {**state_dict, "state": {}})
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._uploaded = None
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        if not whole:
            self._shards.load([state_dict["state"].get(i, {}) for i in saved])
            self._hold_shards()  # the base class has emptied it
            return
        # The base class casts state to the parameter's dtype: what is wider is taken again from the source.
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, params, strict=True):
            if source := state_dict["state"].get(i):  # {} of a parameter without a step, whose state was only looked at
                take(self.state[p], source, p, i)
