"""A recipe from its first command to its last, and its curve beside that of transformers on the same batches.

`gpt2-fast recipe`, `train`, `eval` and `generate` run as a user would run them. Then transformers' GPT2LMHeadModel is
trained by a plain loop with torch.optim.AdamW: the same initial weights, batches, schedule and clipping, in eager
float32. What differs is the arithmetic of two programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import measure
from gpt2_fast import recipes
from gpt2_fast.data import TokenDataset, load_data
from gpt2_fast.train.config import TrainConfig
from gpt2_fast.train.step import build_model

RECIPE = "nano"
Curves = dict[str, dict[int, float]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, help="instead of the recipe's: the whole of it, scaled down further")
    parser.add_argument("--double", type=int, default=0, metavar="N",
                        help="also train transformers' model in float64 for the first N steps")  # fmt: skip
    parser.add_argument("--folder", default="reproduce", help="of all runs; those that ended there are not made again")
    parser.add_argument("--out", default=str(measure.RESULTS), help="folder for the JSON and the chart")
    arguments = parser.parse_args(argv)
    folder, recipe = Path(arguments.folder), recipes.get(RECIPE)
    config = recipes.config_of(recipe, folder, recipe.most, **_steps(arguments.steps))
    if not 0 <= arguments.double <= config.steps:
        parser.error(f"--double is {arguments.double}; the run has {config.steps} steps")
    seconds = {"gpt2_fast": run_recipe(folder, arguments.steps)}
    theirs, seconds["transformers"] = ended(folder, config, "float32", config.steps)
    curves = {"gpt2_fast": read_curves(folder / "run" / "metrics.jsonl"), "transformers": curves_of(theirs)}
    record = {
        "command": measure.command_line("reproduce", argv), "machine": measure.machine("cpu", "transformers"),
        "recipe": RECIPE, "steps": config.steps, "tokens": recipe.tokens * config.steps, "seconds": seconds,
        "farthest": farthest(curves), "curves": curves,
    }  # fmt: skip
    if arguments.double:
        truth = curves_of(ended(folder, config, "float64", arguments.double)[0])
        record["float64"] = {"steps": arguments.double, "loss": truth["loss"], "farthest": from_truth(curves, truth)}
    path = measure.record_path(arguments.out, record["machine"]["device"], "reproduce", RECIPE, config.steps)
    measure.save_record(path, record)
    measure.save_figure(chart(curves), path.with_suffix(".png"))
    for line in (text(record), f"{path}", f"{path.with_suffix('.png')}"):
        print(line)
    return 0


def _steps(steps: int | None) -> dict[str, int]:
    """Options that make a recipe shorter, with two validations on the way."""
    if steps is None:
        return {}
    return {"steps": steps, "eval_every": max(1, steps // 3), "eval_batches": 2, "warmup": min(10, steps)}


def run_recipe(folder: Path, steps: int | None) -> float | None:
    """The commands of the recipe's README, one after the other. Returns the seconds of its training.

    None where some of it had been trained before: a run that was stopped goes on, one that ended says so.
    """
    say, fresh = [sys.executable, "-m", "gpt2_fast"], not (folder / "run").exists()
    subprocess.run([*say, "recipe", RECIPE, "--device", "cpu", "--out", folder], check=True)
    shorter = [s for name, value in _steps(steps).items() for s in (f"--{name.replace('_', '-')}", str(value))]
    started = time.perf_counter()
    train = [*say, "train", "--config", folder / "config.yaml", "--device", "cpu", "--resume", "auto", *shorter]
    subprocess.run(train, check=True)
    seconds = time.perf_counter() - started
    subprocess.run([*say, "generate", "--model", folder / "run" / "checkpoint", "--seed", "1", "import "], check=True)
    return seconds if fresh else None


def ended(folder: Path, config: TrainConfig, dtype: str, steps: int) -> tuple[list[dict], float | None]:
    """Lines and seconds of transformers' first steps in a dtype, made once: a folder keeps a run that ended."""
    path = folder / f"transformers-{dtype}-{steps}-of-{config.steps}.json"
    if path.exists():
        return json.loads(path.read_text()), None
    started = time.perf_counter()
    lines = list(train_transformers(config, folder, dtype, steps))
    measure.save_record(path, lines)
    return lines, time.perf_counter() - started


def train_transformers(config: TrainConfig, folder: Path, dtype: str, steps: int) -> Iterator[dict]:
    """The lines that metrics.jsonl would have, of the first steps of transformers' model in a plain loop."""
    from transformers import GPT2LMHeadModel

    initial = folder / "initial"
    build_model(config, torch.device("cpu")).save_pretrained(initial)
    model = GPT2LMHeadModel.from_pretrained(initial, attn_implementation="eager").to(getattr(torch, dtype)).train()
    train, val = load_data(config.data, context=config.context, vocab_size=model.config.vocab_size)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=1e-8)
    yield {"step": 0, "val_loss": validation(model, val, config)}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate(step)
        loss = sum(backward(model, train, config, step, micro) for micro in range(config.grad_accum))
        torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        yield {"step": step + 1, "loss": loss}
        if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
            yield {"step": step + 1, "val_loss": validation(model, val, config)}
            print(f"transformers: step {step + 1} of {config.steps}, loss {loss:.4f}", file=sys.stderr, flush=True)


def cross_entropy(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())


def backward(model: torch.nn.Module, data: TokenDataset, config: TrainConfig, step: int, micro: int) -> float:
    """The gradients of one micro-batch, added to those of its step. Returns its part of the step's loss."""
    options = {name: getattr(config, name) for name in ("batch_size", "seed", "order", "grad_accum")}
    loss = cross_entropy(model, *data.batch(step, micro, **options)) / config.grad_accum
    loss.backward()
    return loss.item()


@torch.no_grad()
def validation(model: torch.nn.Module, data: TokenDataset, config: TrainConfig) -> float:
    model.eval()
    windows = data.windows(batch_size=config.batch_size, limit=config.eval_batches * config.batch_size)
    parts = [(cross_entropy(model, x, y).item() * y.numel(), y.numel()) for x, y in windows]
    model.train()
    return sum(loss for loss, _ in parts) / sum(count for _, count in parts)


def curves_of(records: Sequence[dict]) -> Curves:
    """ "loss" and "val_loss", each step -> value."""
    return {key: {r["step"]: r[key] for r in records if key in r} for key in ("loss", "val_loss")}


def read_curves(metrics: Path) -> Curves:
    return curves_of([json.loads(line) for line in metrics.read_text().splitlines()])


def farthest(curves: dict[str, Curves]) -> dict[str, float]:
    """The largest difference of the two programs at any step, for either curve. Raises where steps are missing."""
    ours, theirs = curves["gpt2_fast"], curves["transformers"]
    if missing := [key for key in ours if ours[key].keys() != theirs[key].keys()]:
        raise ValueError(f"the two runs have not the same steps in {missing[0]}")
    return {key: max(abs(ours[key][step] - theirs[key][step]) for step in ours[key]) for key in ours}


def from_truth(curves: dict[str, Curves], truth: Curves) -> dict[str, float]:
    """The largest difference of each program's training loss from that of float64, over the steps that it has."""
    exact = truth["loss"]
    return {name: max(abs(curve["loss"][s] - exact[s]) for s in exact) for name, curve in curves.items()}


def text(record: dict) -> str:
    """The outcome as a table."""
    curves, last = record["curves"], record["steps"]
    rows = [
        (name, f"{curves[name]['val_loss'][0]:.4f}", f"{curves[name]['val_loss'][last]:.4f}",
         f"{curves[name]['loss'][last]:.4f}", _seconds(record["seconds"][name]))
        for name in curves
    ]  # fmt: skip
    header = ("program", "val loss, step 0", f"val loss, step {last}", "training loss", "seconds")
    apart = ", ".join(f"{key} {value:.2g}" for key, value in record["farthest"].items())
    lines = [measure.text_table(header, rows), f"farthest apart at any step: {apart}"]
    if exact := record.get("float64"):
        apart = ", ".join(f"{name} {value:.2g}" for name, value in exact["farthest"].items())
        lines.append(f"farthest from float64 in the first {exact['steps']} steps: {apart}")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not timed" if value is None else f"{value:,.0f}"


def chart(curves: dict[str, Curves]):
    """Both validation curves and, below, how far apart the training losses are at each step."""
    from gpt2_fast.report.figures import Picture

    figure = Picture(figsize=(8, 5), layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for name, color, width in (("transformers", measure.PEER, 5), ("gpt2_fast", measure.OURS, 1.5)):
        loss, val = curves[name]["loss"], curves[name]["val_loss"]
        above.plot(list(loss), list(loss.values()), color=color, linewidth=width, label=f"{name}, training")
        above.plot(list(val), list(val.values()), "o", color=color, markersize=2 + width, label=f"{name}, validation")
    ours, theirs = (curves[name]["loss"] for name in ("gpt2_fast", "transformers"))
    below.plot(list(ours), [ours[s] - theirs[s] for s in ours], color="#444444", linewidth=0.8)
    above.set_ylabel("loss")
    above.set_title("The nano recipe: the same batches in two programs", loc="left", fontsize=11)
    above.legend(frameon=False, fontsize=9)
    below.set_ylabel("difference")
    below.set_xlabel("step")
    for axes in (above, below):
        axes.grid(alpha=0.25, linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
