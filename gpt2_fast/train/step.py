"""The model and the optimizer of a run, and one step of it.

One step: grad_accum micro-batches, forward and backward, then clip and AdamW in one fused update. Nothing in it
waits for the device. The processes of a group share the micro-batches, see `gpt2_fast.parallel`.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gpt2_fast import checkpoint
from gpt2_fast.config import GPT2Config
from gpt2_fast.generate.vocabulary import vocabulary_of
from gpt2_fast.model import GPT2LMHeadModel
from gpt2_fast.ops.adamw import take_written
from gpt2_fast.ops.runtime import dispatch
from gpt2_fast.ops.runtime.dispatch import LOW_PRECISION
from gpt2_fast.ops.runtime.philox import micro_batch_keys
from gpt2_fast.optim import AdamW
from gpt2_fast.parallel import tree
from gpt2_fast.parallel.group import Group
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.loss_scale import LossScale
from gpt2_fast.train.memory import check_fits


def build_model(
    config: TrainConfig, device: torch.device, model_config: GPT2Config | None = None, group: Group | None = None
) -> GPT2LMHeadModel:
    """The model of a run on its device, in float32: `build_optimizer` casts it.

    Its weights are those of --init-from, else fresh ones. model_config: of a run that is resumed, whose weights
    are loaded later. --dropout, where it is given, replaces what the checkpoint's config says.
    """
    state = None
    if model_config is None and config.init_from is not None:
        loaded = checkpoint.load(config.init_from)
        model_config, state = loaded.config, loaded.state
        if config.dropout is not None:
            model_config = dataclasses.replace(model_config, **_dropout(config.dropout))
    if model_config is None:
        model_config = config.fresh_model(**_dropout(config.dropout or 0.0), **vocabulary_of(config.data))
    context = config.context or model_config.n_positions
    if context > model_config.n_positions:
        name = config.init_from or config.model
        raise ValueError(f"--context is {context} and {name} has {model_config.n_positions} positions; lower --context")
    group = group or Group()
    if device.type == "cuda" or group.local_rank == 0:  # the processes of a machine share its memory: one looks for all
        check_fits(config, model_config, device, world=group.world, sharing=group.local_world)
    group.barrier()
    torch.manual_seed(config.seed)
    with torch.device("cpu"):  # whatever the default device: the numbers of a seed are the CPU's
        model = GPT2LMHeadModel(model_config, impl=config.impl)
    if state is not None:
        model.load_state_dict(state)
    model.gradient_checkpointing_enable(config.recompute)
    return model.to(device)


def _dropout(p: float) -> dict[str, float]:
    return dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), p)


def build_optimizer(model: GPT2LMHeadModel, config: TrainConfig, group: Group | None = None) -> AdamW:
    """AdamW with weight decay on matrices and embeddings alone: not on biases and LayerNorms.

    Casts the model to the run's dtype, with its float32 weights as the optimizer's masters. Where a step has several
    micro-batches, they are added up, and shared out over the group, by `AdamW.shard`.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    clip = config.grad_clip or None
    betas, impl = (config.beta1, config.beta2), dispatch.of_model(config.impl, "adamw", parameters[0].device.type)
    optimizer = AdamW(groups, lr=config.lr, betas=betas, eps=1e-8, clip_grad_norm=clip, impl=impl)
    if config.dtype != "float32":
        optimizer.cast(model, getattr(torch, config.dtype))
    if config.grad_accum > 1:
        optimizer.shard(group or Group(), config.grad_accum)
    return optimizer


def restore(model: GPT2LMHeadModel, optimizer: AdamW, model_state: dict, optimizer_state: dict) -> None:
    """Brings a saved state into a model and its optimizer, in whichever dtype it was saved.

    A low-precision weight is its float32 master, rounded: the master is what training goes on from, but for what was
    written into the weight after its last step. What the state says of learning rates, betas and decay gives way to
    the optimizer's own. Raises ValueError for another model.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    numbers = [i for group in optimizer_state["param_groups"] for i in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if len(numbers) != len(params):
        raise ValueError(f"it has the averages of {len(numbers)} parameters, and its model has {len(params)}")
    weights, states = dict(model_state), {}
    for i, p in zip(numbers, params, strict=True):
        states[i] = dict(optimizer_state["state"].get(i, {}))
        name = names[id(p)]
        saved, master = weights.get(name), states[i].pop("master", None)
        wide = saved if master is None else master
        if wide is None or wide.shape != p.shape:
            found = "missing" if wide is None else f"{tuple(wide.shape)}"
            raise ValueError(f"its {name} is {found}; that of its config is {tuple(p.shape)}")
        if master is not None and saved is not None and saved.dtype in LOW_PRECISION and saved.shape == p.shape:
            take_written(wide := master.clone(), saved)
        weights[name] = wide
        if not states[i]:  # of a run that was stopped before its first step
            del states[i]
        elif p.dtype != torch.float32:
            states[i]["master"] = wide.float()
    if model.config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    model.load_state_dict(weights)
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict({"state": states, "param_groups": optimizer_state["param_groups"]})
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


class Step:
    """Forward, backward and update over fixed input buffers; replayed as CUDA graphs if asked to.

    The dropout keys are inputs like the tokens: a graph takes them from their buffer.

    Args:
        group: whose micro-batches `build_optimizer` has shared out; None: this process is alone.
    """

    def __init__(
        self,
        model: GPT2LMHeadModel,
        optimizer: AdamW,
        config: TrainConfig,
        context: int,
        group: Group | None = None,
    ):
        self.model, self.optimizer, self.config = model, optimizer, config
        self.group = group or Group()
        device = model.lm_head.weight.device
        self.micro_batches = micro_batches(config, self.group)
        shape = (len(self.micro_batches), config.batch_size, context)
        self.inputs = torch.zeros(shape, dtype=torch.int64, device=device)
        self.targets = torch.zeros_like(self.inputs)
        c = model.config
        drops = max(c.embd_pdrop, c.attn_pdrop, c.resid_pdrop) > 0
        self.keys = torch.zeros(shape[0], dtype=torch.int64, device=device) if drops else None
        self.losses = torch.zeros(shape[0], dtype=torch.float32, device=device)
        self.loss_scale = LossScale(device) if config.dtype == "float16" else None
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._runs = 0
        self._graphed = config.compile_graph
        if self._graphed and device.type != "cuda":
            raise ValueError("--compile-graph needs a CUDA device; drop it, or use --device cuda")

    def _micro_batches(self) -> None:
        n_items = self.targets.numel() * self.group.world
        shared = self.config.grad_accum > 1
        for i, (x, y) in enumerate(zip(self.inputs, self.targets, strict=True)):
            key = None if self.keys is None else self.keys[i : i + 1]
            loss = self.model(x, targets=y, num_items_in_batch=n_items, dropout_key=key).loss
            (loss if self.loss_scale is None else self.loss_scale.scaled(loss)).backward()
            self.losses[i].copy_(loss.detach())
            if shared:
                self.optimizer.accumulate()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name."""
        named = {name: p.detach() for name, p in self.model.named_parameters()}
        for name, p in self.model.named_parameters():
            named |= {f"{name}'s {key}": t for key, t in self.optimizer.state.get(p, {}).items()}
        return named if self.loss_scale is None else named | self.loss_scale.tensors()

    @property
    def _grad_scale(self) -> Tensor | None:
        return None if self.loss_scale is None else self.loss_scale.scale

    def _move_scale(self) -> None:
        if self.loss_scale is not None:
            self.loss_scale.update(self.optimizer.last_found_inf)

    def _compute(self) -> None:
        self._micro_batches()
        self.optimizer.step(grad_scale=self._grad_scale)
        self._move_scale()
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self) -> None:
        self.optimizer.update(self._grad_scale)
        self._move_scale()

    def _replay(self) -> None:
        """One graph for a process on its own. Otherwise one before the communication and one after it.

        With several processes this has not run on a GPU.
        """
        optimizer, alone = self.optimizer, self.group.world == 1
        if not self._graphs:
            for part in (self._compute,) if alone else (self._micro_batches, self._update):
                self._graphs.append(torch.cuda.CUDAGraph())
                with torch.cuda.graph(self._graphs[-1]):
                    part()
            if not alone:  # capturing has counted micro-batches, and computed nothing
                optimizer.forget_accumulated()
        optimizer.upload_hyperparameters()
        self._graphs[0].replay()
        if not alone:
            optimizer.reduce(self._grad_scale)
            self._graphs[1].replay()
            optimizer.gather()

    def __call__(self, inputs: Tensor, targets: Tensor, lr: float, step: int = 0) -> Tensor:
        """One optimizer step; the mean loss over all processes, still on the device.

        Args:
            inputs, targets: int64 [n, B, T], this process's micro-batches.
            lr: the learning rate.
            step: which step of the run this is, from 0 on: dropout depends on it.
        """
        self.inputs.copy_(inputs, non_blocking=True)
        self.targets.copy_(targets, non_blocking=True)
        if self.keys is not None:
            keys = micro_batch_keys(self.config.seed, step, self.micro_batches)
            self.keys.copy_(keys.pin_memory() if self.keys.is_cuda else keys, non_blocking=True)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._runs += 1
        if self._graphed and self._runs > 3:  # three eager steps first, so that lazy set-up is not captured
            self._replay()
        else:
            self._compute()
        return tree.total(self.group.gather(self.losses).clone())


def micro_batches(config: TrainConfig, group: Group) -> range:
    """Which of a step's micro-batches are this process's."""
    n = config.grad_accum // group.world
    return range(group.rank * n, (group.rank + 1) * n)
