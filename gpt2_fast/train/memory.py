"""What a training run takes of a machine's memory, by arithmetic, before any of it is touched.

N = B T tokens a micro-batch, L layers, C n_embd, F n_inner, H heads, V vocabulary, P parameters; s bytes a number of
the run's dtype. What an op keeps for backward is its `saved` declaration:

    a layer     (11 C with F = 4 C) s a token: ln_1's y, qkv, attention's out, both h, u; on a GPU f and, of more than
                64 tokens, ln_2's n as well: 16 C. And 4 (4 + H) bytes of statistics: mean and rstd of two LayerNorms,
                lse of every head
    --recompute 2 C s a token and layer, what goes into a block; one block at a time is whole

Several micro-batches are added up in float32, 4 P bytes a partial sum: `parallel.tree.depth` of them, and at least two
where W processes share a step. Of averages and masters each of W processes has 1 / W.

A step is largest at one of four moments: in the head, which has a chunk of logits, its gradients and every
activation; at the top and at the bottom of backward, where activations have turned into gradients; or at its end, where
the two gradients of a tied table are added. tests/test_train_memory.py holds this to what a process takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpt2_fast.config import PRESETS, GPT2Config, num_params
from gpt2_fast.train.config import SIZES, TrainConfig

if TYPE_CHECKING:
    import torch

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
# What the libraries keep for themselves: packed operands of products, code that is loaded at first use. On a GPU also
# cuBLAS's workspace and what the allocator cannot fill.
LIBRARIES = {"cpu": 40 << 20, "cuda": 512 << 20}
# Holes of a CPU's region, measured: what a layer keeps lies in part of the hole of an N F tensor that was there before,
# and the next layer needs another. The part of L such tensors, without and with --recompute. A GPU's are in LIBRARIES.
HOLES = {"cpu": (0.6, 1.0), "cuda": (0.0, 0.0)}


@dataclass(frozen=True)
class Memory:
    """Bytes of a run. Its parts are not all there at once: `step` is what a step takes at its largest moment.

    sample: what the sample at the end takes beside that on a CPU, where a model is packed to generate.
    """

    weights: int
    gradients: int
    averages: int
    masters: int
    sums: int
    activations: int
    logits: int
    moment: str
    step: int
    sample: int

    @property
    def peak(self) -> int:
        return self.step + self.sample

    def rows(self) -> Iterator[tuple[str, int]]:
        """What each part is called, and its bytes."""
        yield "weights", self.weights
        yield "gradients", self.gradients
        yield "AdamW averages", self.averages
        if self.masters:
            yield "AdamW masters", self.masters
        if self.sums:
            yield "float32 sums of micro-batches", self.sums
        yield "activations kept for backward", self.activations
        yield "a chunk of logits", self.logits
        yield f"a step at its largest, {self.moment}", self.step
        if self.sample:
            yield "packed weights, to sample", self.sample
        yield "peak", self.peak


def layer_bytes(config: GPT2Config, itemsize: int, device_type: str) -> int:
    """What one layer keeps of a token for backward."""
    kept = 7 * config.n_embd + config.n_inner_
    if device_type == "cuda":
        kept += config.n_embd + config.n_inner_  # n and f
    return itemsize * kept + 4 * (4 + config.n_head)


def predict(
    config: GPT2Config,
    *,
    batch_size: int,
    context: int,
    dtype: str = "float32",
    recompute: bool = False,
    grad_accum: int = 1,
    device_type: str = "cpu",
    world: int = 1,
) -> Memory:
    """Of steps on the fused ops; --impl reference, which has whole logits and scores, takes more.

    grad_accum: micro-batches of a step, which `world` processes share: this is what each of them takes.
    """
    from gpt2_fast.ops.linear_cross_entropy import chunk_rows
    from gpt2_fast.parallel.tree import depth

    s, wide = ITEMSIZE[dtype], _product_itemsize(dtype, device_type)
    N, L, C, F, V = batch_size * context, config.n_layer, config.n_embd, config.n_inner_, config.vocab_size
    parameters, row, table = num_params(config), N * C, V * C
    weights, averages, masters = s * parameters, 8 * parameters // world, (4 * parameters // world if s < 4 else 0)
    sums_kept = max(depth(grad_accum // world), min(world, 2)) if grad_accum > 1 else 0
    partial = 4 * parameters * sums_kept
    whole, rows = N * layer_bytes(config, s, device_type), min(N, chunk_rows(device_type, V, wide, N))
    activations = L * 2 * s * row if recompute else L * whole
    logits = rows * V * wide
    block = whole if recompute else 0
    layer_gradients = s * (parameters - table * (1 if config.tie_word_embeddings else 2)) // L

    # The gradient of the head's table is summed in float32 where there are several chunks.
    head = logits + 4 * s * row + table * (4 if rows < N else s)
    head += (wide - s and wide * (table + 2 * row)) + (s * table if device_type == "cuda" and V % 64 else 0)
    inner = (s + wide) * N * F + 3 * s * row  # df and du, beside dm, dh and dx
    # Autograd adds a tied table's two gradients into a third. On a CPU it finds no hole among the activations, and
    # malloc keeps the hole of the step before beside it.
    sums = (2 * s * table if device_type == "cpu" else s * table) if config.tie_word_embeddings else 0
    moments = {
        "in the head": activations + head + (s * table + sums if device_type == "cpu" else 0),
        "at the top of backward": activations + block + inner + s * table + layer_gradients + sums,
        "at the bottom of backward": whole + inner + s * parameters + sums,
        "at the end of backward": 3 * s * row + s * parameters + sums,
    }
    moment = max(moments, key=moments.__getitem__)
    holes = int(HOLES[device_type][recompute] * s * L * N * F)
    step = weights + averages + masters + partial + moments[moment] + holes + LIBRARIES[device_type] + 32 * N
    sample = s * parameters + (4 + s) * table if device_type == "cpu" else 0
    return Memory(weights, weights, averages, masters, partial, activations, logits, moment, step, sample)


def _product_itemsize(dtype: str, device_type: str) -> int:
    """Bytes of a number where matrices of it are multiplied: 4 where a CPU widens bfloat16, as it does float16."""
    if dtype == "float32" or device_type != "cpu":
        return ITEMSIZE[dtype]
    from gpt2_fast.ops.runtime.cpu_policy import cpu_policy

    return 2 if dtype == "bfloat16" and cpu_policy().native_bfloat16 else 4


def predict_run(config: TrainConfig, model_config: GPT2Config, device_type: str, world: int = 1) -> Memory:
    """`predict` with the options of a run."""
    return predict(
        model_config, batch_size=config.batch_size, context=config.context or model_config.n_positions,
        dtype=config.dtype, recompute=config.recompute, grad_accum=config.grad_accum, device_type=device_type,
        world=world,
    )  # fmt: skip


def free_bytes(device: torch.device) -> int | None:
    """What is free of a device's memory; None where nobody says."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[0]
    from gpt2_fast.report.available import available_bytes

    return available_bytes()


def check_fits(
    config: TrainConfig,
    model_config: GPT2Config,
    device: torch.device,
    free: int | None = None,
    world: int = 1,
    sharing: int = 1,
) -> None:
    """Raises ValueError, one line with what to change, where a run does not fit; call it before the model is built.

    free: bytes instead of what the device has now.
    world: processes that share a step. sharing: those of them on this machine, which share a CPU's memory.
    """
    free = free_bytes(device) if free is None else free
    if free is not None and device.type == "cpu":
        free //= sharing
    needed = predict_run(config, model_config, device.type, world).peak
    if free is None or needed <= free:
        return
    context = config.context or model_config.n_positions
    name = config.init_from or config.model
    where = "this machine" if device.type == "cpu" else str(device)
    where += " for each process" if sharing > 1 and device.type == "cpu" else ""
    advice = _advice(config, model_config, device.type, free, world)
    raise ValueError(
        f"training {name} in {config.dtype} with --batch-size {config.batch_size} and --context {context} takes "
        f"{gigabytes(needed)} and {where} has {gigabytes(free)} free; {advice}"
    )


def _advice(config: TrainConfig, model_config: GPT2Config, device_type: str, free: int, world: int = 1) -> str:
    """The first changes that make a run fit, or that none does."""

    def fits(**changes) -> bool:
        return predict_run(dataclasses.replace(config, **changes), model_config, device_type, world).peak <= free

    context = config.context or model_config.n_positions
    recomputes = {} if config.recompute or config.compile_graph else {"recompute": True}
    narrows = {} if ITEMSIZE[config.dtype] == 2 else {"dtype": "bfloat16"}
    alone = [{"batch_size": largest}] if (largest := _largest(config.batch_size, lambda n: fits(batch_size=n))) else []
    alone += [change for change in (recomputes, narrows) if change and fits(**change)]
    if alone:
        return f"use {' or '.join(map(_flags, alone))}"
    saving = recomputes | narrows
    if largest := _largest(config.batch_size + 1, lambda n: fits(batch_size=n, **saving)):
        return f"use {_flags({'batch_size': largest, **saving})}"
    saving |= {"batch_size": 1}
    if shorter := _largest(context, lambda n: fits(context=n, **saving)):
        return f"use {_flags({'context': shorter, **saving})}"
    least = predict_run(dataclasses.replace(config, context=1, **saving), model_config, device_type, world).peak
    sized = any(getattr(config, name) is not None for name in SIZES)
    smaller = "" if config.init_from or sized else _smaller_presets(config, device_type, free, world)
    smaller = "a smaller --n-layer or --n-embd" if sized else smaller
    return f"no option brings it below {gigabytes(least)}: use {smaller or 'a smaller model'}, or more memory"


def _smaller_presets(config: TrainConfig, device_type: str, free: int, world: int = 1) -> str:
    """The largest preset that fits with these options, --recompute and a batch of 1, as options; "" for none."""
    for name in reversed(PRESETS):
        preset = GPT2Config.from_preset(name)
        least = {"batch_size": 1, "recompute": not config.compile_graph}
        least["context"] = config.context and min(config.context, preset.n_positions)
        if predict_run(dataclasses.replace(config, **least), preset, device_type, world).peak <= free:
            return f"--model {name}"
    return ""


def _largest(below: int, fits) -> int:
    """The largest n from 1 to below - 1 that fits, where all that are smaller than one that fits do too; 0 for none."""
    low, high = 0, below - 1
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _flags(changes: dict) -> str:
    """Fields of TrainConfig as options of the command line."""
    return " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in changes.items()
    )


def gigabytes(n: int) -> str:
    return f"{n / 1e9:,.1f} GB" if n >= 1e9 else f"{n / 1e6:,.0f} MB"
