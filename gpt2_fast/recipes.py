"""Training runs that are written down: `gpt2-fast recipe`.

A recipe is the options of a run, where its data comes from, and what to expect of it, with the source of each figure.
`write` makes a folder of it, with the commands that run it; `plan` says what it takes on this machine.
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt2_fast.config import GPT2Config, num_params
from gpt2_fast.data import hub
from gpt2_fast.files import atomic_write
from gpt2_fast.train.config import TrainConfig

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Recipe:
    """A run.

    data: a data set of `data.hub`; None: Python's own source text. sequences: of a step, on all processes. most: the
    largest micro-batch, in sequences.
    """

    name: str
    title: str
    model: str
    data: str | None
    sequences: int
    context: int
    options: dict[str, Any]
    expected: tuple[str, ...]
    most: int = 64

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.sequences * self.context


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="gpt2-124m",
            title="GPT-2 124M from scratch on 10 billion tokens of FineWeb",
            model="gpt2",
            data="fineweb10B",
            sequences=512,
            context=1024,
            # Brown et al. 2020 (arXiv:2005.14165), table 2.1 and appendix B, as llm.c has them for this model.
            options={
                "order": "epoch", "steps": 19_073, "lr": 6e-4, "min_lr": 0.0, "warmup": 700, "weight_decay": 0.1,
                "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0, "dropout": 0.0, "dtype": "bfloat16", "eval_every": 250,
                "save_every": 1000,
            },
            expected=(
                "validation loss 3.28 after 10 billion tokens: llm.c's discussion 481 (3.29), the target that "
                "modded-nanogpt takes from it (3.28)",
                "HellaSwag 29.5% to 31.1% (normalised, by the harness), as OpenAI's own 124M, trained on WebText",
            ),
        ),
        Recipe(
            name="nano",
            title="a small GPT-2 on Python's own source text, with all parts of a long run",
            model="nano",
            data=None,
            sequences=16,
            context=128,
            options={
                "order": "epoch", "steps": 500, "lr": 1e-3, "min_lr": 1e-4, "warmup": 50, "dropout": 0.0,
                "eval_every": 100, "save_every": 250,
            },
            expected=("docs/reproduce.md has its curve beside that of transformers on the same batches",),
            most=4,
        ),
    )
}  # fmt: skip
VALIDATION_TOKENS = 10 << 20  # of FineWeb's validation shard, as llm.c and modded-nanogpt read of it
MICRO_BATCHES = (64, 32, 16, 8, 4, 2, 1)  # sequences


def get(name: str) -> Recipe:
    """Raises ValueError for an unknown name."""
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; choose {', '.join(RECIPES)}")
    return RECIPES[name]


def config_of(recipe: Recipe, folder: Path, batch_size: int, **more: Any) -> TrainConfig:
    """The options of the run in `folder`, with micro-batches of batch_size sequences."""
    given = {
        "model": recipe.model, "context": recipe.context, "batch_size": batch_size,
        "grad_accum": recipe.sequences // batch_size, "out": str(folder / "run"),
        "eval_batches": max(1, VALIDATION_TOKENS // (batch_size * recipe.context)) if recipe.data else 20,
        **({"data": str(folder / "data")} if recipe.data else {}), **recipe.options,
    }  # fmt: skip
    return TrainConfig(**{**given, **more})


def micro_batch(recipe: Recipe, device: torch.device, processes: int = 1, dtype: str | None = None) -> int:
    """The largest micro-batch that fits the device and divides a step over the processes.

    Raises ValueError where none does.
    """
    from gpt2_fast.train.memory import check_fits, free_bytes

    if processes < 1 or processes & (processes - 1) or processes > recipe.sequences:
        raise ValueError(f"--processes is {processes}; it must be a power of two up to {recipe.sequences}")
    model, free = GPT2Config.from_preset(recipe.model), free_bytes(device)
    most = min(recipe.most, recipe.sequences // processes)
    sizes = [n for n in MICRO_BATCHES if n <= most and recipe.sequences % n == 0]
    more = {} if dtype is None else {"dtype": dtype}
    refused: ValueError | None = None
    for size in sizes:
        try:
            config = config_of(recipe, Path("."), size, **more)
            check_fits(config, model, device, free, world=processes, sharing=1)
            return size
        except ValueError as error:
            refused = error
    raise refused


def write(recipe: Recipe, folder: str | os.PathLike[str], config: TrainConfig, processes: int = 1) -> list[Path]:
    """config.yaml and README.md of a recipe, in its folder. Returns their paths.

    Raises FileExistsError where the folder has other options already: a run may have begun with them.
    """
    folder = Path(folder)
    files = {"config.yaml": _yaml(recipe, config), "README.md": _readme(recipe, folder, config, processes)}
    for name, text in files.items():
        path = folder / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise FileExistsError(f"{path} is there and says something else; choose another --out, or move it away")
    for name, text in files.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def _yaml(recipe: Recipe, config: TrainConfig) -> str:
    """The options that are not the defaults, for `gpt2-fast train --config`."""
    import yaml

    defaults = TrainConfig()
    changed = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != getattr(defaults, field.name)
    }
    return f"# {recipe.title}: gpt2-fast recipe {recipe.name}\n" + yaml.safe_dump(changed, sort_keys=False)


def commands(recipe: Recipe, folder: Path, processes: int = 1) -> Iterator[tuple[str, str]]:
    """What runs a recipe: (why, command), as a shell takes it."""
    q = lambda path: shlex.quote(str(path))
    if recipe.data:
        yield "The data, from the Hugging Face hub", f"gpt2-fast fetch {recipe.data} {q(folder / 'data')}"
        yield "HellaSwag's questions", f"gpt2-fast fetch hellaswag {q(folder)}"
    start = "gpt2-fast" if processes == 1 else f"torchrun --standalone --nproc-per-node {processes} -m gpt2_fast"
    yield (
        "Train; the same command goes on after an interruption",
        (f"{start} train --config {q(folder / 'config.yaml')} --resume auto"),
    )
    checkpoint = folder / "run" / "checkpoint"
    if recipe.data:
        yield (
            "Evaluate",
            (
                f"gpt2-fast eval {q(checkpoint)} --shard {q(folder / 'data' / hub.SHARDS[recipe.data].val)} "
                f"--hellaswag {q(folder / 'hellaswag_val.jsonl')} --json {q(folder / 'results.json')}"
            ),
        )
    yield "Write", f"gpt2-fast generate --model {q(checkpoint)}"


def _readme(recipe: Recipe, folder: Path, config: TrainConfig, processes: int) -> str:
    lines = [f"# {recipe.title}", ""]
    lines += [
        f"{recipe.tokens:,} tokens a step, {recipe.tokens * config.steps:,} in {config.steps:,} steps. A step has "
        f"{config.grad_accum} micro-batches of {config.batch_size} sequences of {config.context} tokens, on all "
        "processes together: their number changes no bit.",
        "",
    ]
    for why, command in commands(recipe, folder, processes):
        lines += [f"{why}:", "", f"    {command}", ""]
    lines += ["Expected:", "", *(f"- {line}" for line in recipe.expected), ""]
    return "\n".join(lines)


def plan(recipe: Recipe, config: TrainConfig, device: torch.device, processes: int = 1) -> Iterator[str]:
    """What `--dry-run` prints: parameters, tokens, memory by arithmetic, hours by measuring two micro-batches."""
    from gpt2_fast.train.dry_run import measure, plan_lines
    from gpt2_fast.train.memory import free_bytes

    model = GPT2Config.from_preset(recipe.model)
    yield f"{recipe.name}: {recipe.title}"
    yield from plan_lines(config, model, device, free_bytes(device), processes)
    yield ""
    yield f"Time, measured on {device}: two micro-batches and their update, {num_params(model):,} parameters"
    seconds = measure(dataclasses.replace(config, grad_accum=2, compile_graph=False), device)
    step = sum(seconds) / len(seconds) * config.grad_accum / 2
    hours = step * config.steps / 3600
    rows = [
        ("tokens a second", f"{recipe.tokens / step:,.0f}"),
        ("hours of the run, on one such device", f"{hours:,.1f}"),
    ]
    if processes > 1:
        rows.append((f"hours on {processes}, divided evenly", f"{hours / processes:,.1f}"))
    for name, value in rows:
        yield f"  {name:<48}{value:>12}"
    yield "An update is counted with every second micro-batch, so the run is a little faster. Nothing was written."
