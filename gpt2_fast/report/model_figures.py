"""Pictures of a model. Every function returns a matplotlib Figure and leaves pyplot's global state alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from torch import Tensor

from gpt2_fast.report.figures import GRID, INK, MUTED, Picture, smoothed
from gpt2_fast.report.measures import weight_measures

SOFT = "#6b7280"

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
MAX_BLOCKS = 256  # a side, of the view of a whole matrix
MAX_LABELS = 64  # tokens with a label each; of a longer text every second, third, ... has one


def weight_figure(weight: Tensor, name: str, size: int | None = 300, cmap: str = "RdBu_r") -> Figure:
    """A matrix: its first `size` rows and columns (None: all), the whole by blocks, its singular values and histogram.

    The corner is that which chapter 8 draws of transformer.h.1.attn.c_attn.weight. Its colours are symmetric about 0:
    white is 0, and what is beyond the 99.5th percentile of the magnitudes has the last colour. The whole matrix shows
    magnitudes, for signs would cancel out: root mean squares of blocks. A vector is a curve.
    """
    data = _array(weight)
    shape = " × ".join(map(str, data.shape))
    if data.ndim == 1:
        figure, axes = _figure(8, 3.6)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.plot(data, color="#2563eb", linewidth=0.9)
        _plain(axes)
        axes.set_xlabel("index", color=INK, fontsize=10)
        _title(axes, name, f"{shape}, mean {data.mean():.3g}, std {data.std():.3g}")
        return figure
    figure = Picture(figsize=(12, 9.2), layout="constrained", facecolor="white")
    (corner, whole), (spectrum, histogram) = figure.subplots(2, 2, height_ratios=[5, 2.6])
    _draw_corner(figure, corner, data, size, cmap)
    _draw_whole(figure, whole, data)
    measures = weight_measures(weight)
    _draw_spectrum(spectrum, measures.singular_values)
    _draw_histogram(histogram, data)
    _label_matrix(corner, name)
    _label_matrix(whole, name)
    summary = f"{name}\n{measures.line()}"
    figure.suptitle(summary, x=0.01, ha="left", color=INK, fontsize=12, parse_math=False)
    return figure


def _draw_corner(figure: Figure, axes: Axes, data: np.ndarray, size: int | None, cmap: str) -> None:
    part = data[:size, :size]
    limit = max(float(np.quantile(np.abs(part), 0.995)), 1e-12)
    image = axes.imshow(part, cmap=cmap, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _bar(figure, axes, image, "weight", extend="both")
    _frame(axes)
    cut = part.shape != data.shape
    _title(axes, f"The first {part.shape[0]} × {part.shape[1]}" if cut else "Every weight", "")


def _draw_whole(figure: Figure, axes: Axes, data: np.ndarray) -> None:
    """Root mean squares of blocks, at most MAX_BLOCKS a side."""
    rows, columns = (-(-n // MAX_BLOCKS) for n in data.shape)
    square = data.astype(np.float64) ** 2
    for axis, block in enumerate((rows, columns)):
        starts = np.arange(0, data.shape[axis], block)
        counts = np.diff([*starts, data.shape[axis]])
        square = np.add.reduceat(square, starts, axis) / (counts[:, None] if axis == 0 else counts)
    blocks = np.sqrt(square)
    low, high = np.quantile(blocks, [0.005, 0.995])
    extent = (-0.5, data.shape[1] - 0.5, data.shape[0] - 0.5, -0.5)
    image = axes.imshow(
        blocks, cmap="magma_r", vmin=low, vmax=max(high, low + 1e-12), aspect="auto", interpolation="nearest",
        extent=extent,
    )  # fmt: skip
    _bar(figure, axes, image, "magnitude", extend="both")
    _frame(axes)
    _title(axes, "The whole matrix", f"root mean square of {rows} × {columns}")


def _draw_spectrum(axes: Axes, values: np.ndarray) -> None:
    axes.plot(np.arange(1, len(values) + 1), values, color="#2563eb", linewidth=1.6)
    axes.set_ylim(0, values[0] * 1.06 or 1)
    _plain(axes)
    axes.set_xlabel("singular value, by size", color=INK, fontsize=10)
    _title(axes, "Singular values", "the largest " + ", ".join(f"{v:.3g}" for v in values[:5]))


def _draw_histogram(axes: Axes, data: np.ndarray) -> None:
    reach = max(float(np.quantile(np.abs(data), 0.9995)), 1e-12)
    density, edges = np.histogram(data, np.linspace(-reach, reach, 121), density=True)
    middles, deviation = (edges[1:] + edges[:-1]) / 2, float(data.std())
    axes.fill_between(middles, density, color="#2563eb", alpha=0.35, linewidth=0)
    if deviation > 0:
        normal = np.exp(-0.5 * ((middles - data.mean()) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
        axes.plot(middles, normal, color=SOFT, linewidth=1, linestyle=(0, (3, 2)))
    axes.set_ylim(0, None)
    axes.set_yticks([])
    _plain(axes, grid="x")
    axes.set_xlabel("weight", color=INK, fontsize=10)
    _title(axes, "Distribution", "dashed: the normal of this mean and std")


def _label_matrix(axes: Axes, name: str) -> None:
    table = name.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
    axes.set_xlabel("channel" if table else "output", color=INK, fontsize=10)
    axes.set_ylabel(("position" if "wpe" in name else "token") if table else "input", color=INK, fontsize=10)


def attention_figure(pattern: Tensor, labels: Sequence[str], title: str = "Attention") -> Figure:
    """What each token (row) attends to (columns): probabilities [T, T] of one head, with a label for each token."""
    data, count = _array(pattern), len(labels)
    if data.shape != (count, count):
        raise ValueError(f"the pattern is {list(data.shape)} and there are {count} labels; give one a token")
    side = min(max(0.3 * count, 4.0), 11.0)
    figure, axes = _figure(side + 2.2, side + 1.6)
    hidden = np.ma.masked_array(data, mask=np.triu(np.ones_like(data, dtype=bool), 1))  # the future: not a probability
    # The first token can only attend to itself, so 1 is always there: by the square root, the small ones show too.
    scale = PowerNorm(0.5, vmin=0.0, vmax=max(float(data.max()), 1e-6))
    image = axes.imshow(hidden, cmap="Blues", norm=scale, interpolation="nearest")
    _bar(figure, axes, image, "attention", ticks=[0, 0.05, 0.2, 0.4, 0.6, 0.8, 1])
    shown = range(0, count, -(-count // MAX_LABELS))
    style = {"labels": [_drawable(labels[i]) for i in shown], "color": INK, "parse_math": False}
    style["fontsize"] = min(max(150 * side / 3 / max(len(shown), 1) / 2.2, 6.0), 11.0)
    axes.set_yticks(list(shown), **style)
    axes.set_xticks(list(shown), rotation=90, **style)
    if count <= MAX_LABELS:
        axes.set_xticks(np.arange(count + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(count + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=0.6)
    _frame(axes)
    axes.tick_params(which="both", length=0)
    _title(axes, title, "")
    axes.set_xlabel("a row is what its token attends to, and sums to 1", color=SOFT, fontsize=9.5, labelpad=8)
    return figure


def positions_figure(wpe: Tensor, channels: Sequence[int] | None = None) -> Figure:
    """The position embedding [n_positions, C]: some channels as curves over the position, the whole, and likeness.

    A channel's values are faint, their smoothed curve is strong: of a trained model a wave, of a fresh one a line near
    0. Below stand all channels, and how alike the embeddings of two positions are: the mean cosine by their distance,
    1 at distance 0, which falls slowly once a model knows where things stand and at once while it does not.

    channels: 150, 200 and 250 unless given, or three spread evenly where the model is smaller.
    """
    data = _array(wpe)
    width = data.shape[1]
    if channels is None:
        channels = (150, 200, 250) if width > 250 else sorted({width // 4, width // 2, 3 * width // 4})
    if any(not 0 <= channel < width for channel in channels):
        raise ValueError(f"channels are {list(channels)}; the position embedding has 0 to {width - 1}")
    figure = Picture(figsize=(9, 8.6), layout="constrained", facecolor="white")
    curves, whole, alike = figure.subplots(3, 1, height_ratios=[3, 2.4, 1.6])
    positions = np.arange(data.shape[0], dtype=np.float64)
    for channel, color in zip(channels, _colors("viridis", len(channels)), strict=True):
        curves.plot(data[:, channel], color=color, linewidth=0.7, alpha=0.3)
        x, y = smoothed(positions, data[:, channel].astype(np.float64))
        curves.plot(x, y, color=color, linewidth=1.8, label=f"channel {channel}")
    curves.legend(frameon=False, labelcolor=INK, fontsize=9.5, ncols=len(channels), loc="lower left",
                  bbox_to_anchor=(-0.005, 1.0), borderaxespad=0.2, handlelength=1.4)  # fmt: skip
    curves.set_ylabel("embedding", color=INK, fontsize=10)
    _plain(curves)
    _title(curves, "Position embedding", f"{data.shape[0]} positions × {width} channels", pad=24)
    limit = max(float(np.quantile(np.abs(data), 0.99)), 1e-12)
    image = whole.imshow(data.T, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    _bar(figure, whole, image, "embedding", extend="both")
    whole.set_ylabel("channel", color=INK, fontsize=10)
    whole.set_xlabel("position", color=INK, fontsize=10)
    _frame(whole)
    cosine = likeness_by_distance(data)
    alike.axhline(0, color=MUTED, linewidth=0.8)
    alike.plot(cosine, color="#2563eb", linewidth=1.6)
    alike.set_ylim(min(-0.1, cosine.min() * 1.05), 1.05)
    alike.set_xlabel("distance between two positions", color=INK, fontsize=10)
    alike.set_ylabel("cosine", color=INK, fontsize=10)
    _plain(alike)
    _title(alike, "Likeness of positions", "mean over all pairs at a distance")
    figure.align_ylabels()
    return figure


def likeness_by_distance(data: np.ndarray) -> np.ndarray:
    """Mean cosine of the rows of [n, C] that are d apart, for d from 0 to 3/4 of n: beyond, few pairs are left."""
    rows = data.astype(np.float64)
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    cosines = rows @ rows.T
    return np.array([np.diagonal(cosines, d).mean() for d in range(max(3 * len(rows) // 4, 1))])


def histograms_figure(weights: Mapping[str, Tensor], n_layer: int, bins: int = 81) -> Figure:
    """Histograms of the four matrices of every layer, a ridge a layer, with the standard deviation beside each.

    Each panel's histograms are densities over one range, four of its largest standard deviations to either side.
    """
    spacing = min(max(8.0 / n_layer, 0.16), 0.48)
    figure = Picture(figsize=(12, 1.7 + spacing * (n_layer + 1)), layout="constrained", facecolor="white")
    colors = _colors("viridis", n_layer)
    for column, (axes, matrix) in enumerate(zip(figure.subplots(1, 4, sharey=True), MATRICES, strict=True)):
        values = [_array(weights[f"transformer.h.{i}.{matrix}.weight"]).ravel() for i in range(n_layer)]
        deviations = [float(v.std()) for v in values]
        reach = max(4 * max(deviations), 1e-12)
        edges = np.linspace(-reach, reach, bins + 1)
        densities = [np.histogram(v, edges)[0] / (v.size * (edges[1] - edges[0])) for v in values]
        unit = 1.6 / max(max(d.max() for d in densities), 1e-12)
        middles = (edges[1:] + edges[:-1]) / 2
        for i, (density, color) in enumerate(zip(densities, colors, strict=True)):
            axes.fill_between(middles, i, i - unit * density, color=color, alpha=0.8,
                              linewidth=0, zorder=2 + i)  # fmt: skip
            line = np.where(density > 0, i - unit * density, np.nan)
            axes.plot(middles, line, color="white", linewidth=0.9, zorder=2.5 + i)
            if spacing > 0.2:
                axes.text(reach, i - 0.08, f"σ {deviations[i]:.3f}", color=INK, fontsize=7.5, ha="right", zorder=99 + i)
        axes.set_xlim(-reach, reach)
        axes.set_ylim(n_layer - 0.6, -1.75)
        _plain(axes, grid="x")
        axes.set_title(matrix, loc="left", color=INK, fontsize=11, pad=6)
        step = -(-n_layer // 24)
        axes.set_yticks(range(0, n_layer, step), [f"layer {i}" for i in range(0, n_layer, step)])
        axes.tick_params(axis="y", labelleft=column == 0)
    figure.suptitle("Weights by layer", x=0.01, ha="left", color=INK, fontsize=13, fontweight="bold")
    return figure


def _drawable(label: str) -> str:
    """A label in which characters that the font lacks are written U+...."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in label)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Picture(figsize=(width, height), layout="compressed", facecolor="white")
    return figure, figure.subplots()


def _colors(cmap: str, count: int) -> np.ndarray:
    return matplotlib.colormaps[cmap](np.linspace(0.1, 0.8, count))


def _bar(figure: Figure, axes: Axes, image, label: str, **options) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.03, aspect=48, pad=0.015, **options)
    bar.set_label(label, color=INK, fontsize=10)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=INK, labelsize=9, length=0)


def _title(axes: Axes, title: str, note: str, pad: float = 8) -> None:
    axes.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold", pad=pad, parse_math=False)
    axes.set_title(note, loc="right", color=SOFT, fontsize=9.5, pad=pad)


def _frame(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=INK, labelsize=None, length=0)


def _plain(axes: Axes, grid: str = "y") -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.grid(axis=grid, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=INK, labelsize=9.5, length=0)
