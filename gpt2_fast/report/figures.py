"""Pictures of a run. Every function returns a matplotlib Figure and leaves pyplot's global state alone."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from gpt2_fast.files import atomic_write

INK, MUTED, GRID = "#1f2937", "#9ca3af", "#e5e7eb"
TRAIN, VAL = "#2563eb", "#ea580c"

DPI = 160
MAX_POINTS = 2000  # of a line, before it is smoothed: more cannot be seen
SMOOTHING = 1 / 60  # standard deviation of the smoothing, as a share of the line
NOTEBOOK_DPI = 100


class Picture(Figure):
    """A Figure that a notebook shows where pyplot, which would teach it to, was never imported."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=NOTEBOOK_DPI)
        return buffer.getvalue()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut off, as by a crash, is passed over.

    Raises FileNotFoundError, or ValueError naming the line that is not a JSON object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a training run writes it")
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):  # bytes that are not UTF-8 among them
            record = {} if number == len(lines) else None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} is not a JSON object")
        if record:
            records.append(record)
    return records


def loss_figure(records: Iterable[Mapping[str, Any]], title: str = "Loss") -> Figure:
    """Training loss (each step and smoothed), validation loss and, faint, the learning rate, by step.

    records: of metrics.jsonl: "step" with any of "loss", "val_loss", "lr". Of records of one step, as a
    resumed run leaves them, the last counts. Raises ValueError where no record has a finite loss.
    """
    records = list(records)
    steps, losses = _series(records, "loss")
    val_steps, val_losses = _series(records, "val_loss")
    if not len(steps) and not len(val_steps):
        raise ValueError("no record has a finite loss; there is nothing to draw")
    figure = Picture(figsize=(8, 5), layout="constrained", facecolor="white")
    rates = _series(records, "lr")
    axes, strip = (
        figure.subplots(2, 1, sharex=True, height_ratios=[7, 1]) if len(rates[0]) else (figure.subplots(), None)
    )
    if len(steps):
        x, y = smoothed(steps, losses)
        axes.plot(steps, losses, color=TRAIN, alpha=0.25, linewidth=0.8)
        axes.plot(x, y, color=TRAIN, linewidth=2, label=f"training  {y[-1]:.3f}", **_dot(x))
    if len(val_steps):
        axes.plot(
            val_steps, val_losses, color=VAL, linewidth=1, linestyle=(0, (1, 2)), marker="o", markersize=6,
            markeredgecolor="white", markeredgewidth=1.2, label=f"validation  {val_losses[-1]:.3f}", zorder=4,
        )  # fmt: skip
    _style_loss(axes, title)
    if strip is not None:
        _draw_lr(strip, *rates)
    figure.align_ylabels()
    (axes if strip is None else strip).set_xlabel("step", color=INK, fontsize=10)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure, atomically, in the format of the path's suffix. Raises OSError where it cannot be written."""
    path = Path(path)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=DPI)


def save_loss_plot(metrics: str | os.PathLike[str], path: str | os.PathLike[str], title: str = "Loss") -> None:
    """Draw a metrics.jsonl into a picture file: `read_metrics`, `loss_figure`, `save_figure`."""
    save_figure(loss_figure(read_metrics(metrics), title), path)


def smoothed(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line through noise: at each point the straight line that fits its neighbours best, with Gaussian weights.

    Unlike a running mean it neither lags behind nor bends away where the loss falls steeply, as at the start.
    """
    bins = min(len(y), MAX_POINTS)
    x, y = (np.array([part.mean() for part in np.array_split(values, bins)]) for values in (x, y))
    sigma = max(1.0, bins * SMOOTHING)
    reach = int(3 * sigma)
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    fit = lambda values, power: np.correlate(np.pad(values, reach), weights * offsets**power, mode="valid")
    ones = np.ones(bins)  # padded with zeros: what lies beyond an end weighs nothing
    s0, s1, s2, t0, t1 = fit(ones, 0), fit(ones, 1), fit(ones, 2), fit(y, 0), fit(y, 1)
    determinant = s0 * s2 - s1 * s1
    return x, np.where(determinant > 0, s2 * t0 - s1 * t1, t0) / np.where(determinant > 0, determinant, s0)


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    values = {r["step"]: r[key] for r in records if "step" in r and r.get(key) is not None}
    points = sorted((step, value) for step, value in values.items() if np.isfinite(value))
    x, y = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return x, y


def _dot(x: np.ndarray) -> dict[str, Any]:
    """A marker for what is a line of one point, which could not be seen."""
    return {"marker": "o", "markersize": 5} if len(x) == 1 else {}


def _draw_lr(axes: Axes, steps: np.ndarray, rates: np.ndarray) -> None:
    axes.fill_between(steps, rates, color=MUTED, alpha=0.15, linewidth=0)
    axes.plot(steps, rates, color=MUTED, linewidth=1.2, **_dot(steps))
    axes.set_ylim(0, max(rates.max(), 1e-12) * 1.1)
    axes.set_yticks([0, rates.max()] if rates.max() > 0 else [0])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.2g}"))
    axes.set_ylabel("learning\nrate", color=INK, fontsize=9)
    axes.spines[["top", "right", "left"]].set_visible(False)
    _style_ticks(axes)


def _style_loss(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold", pad=32)
    axes.set_ylabel("cross-entropy, nats a token", color=INK, fontsize=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.015, y=0.08)
    # Under the title, where no data can be.
    axes.legend(
        frameon=False, labelcolor=INK, fontsize=10, ncols=2, loc="lower left", bbox_to_anchor=(-0.005, 1.0),
        borderaxespad=0.3, handlelength=1.6, columnspacing=1.6,
    )  # fmt: skip
    _style_ticks(axes)


def _style_ticks(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.tick_params(colors=INK, labelsize=9.5, length=0)
    axes.spines["bottom"].set_color(MUTED)
