"""The loss curve: what is drawn is what was logged."""

import json
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from gpt2_fast.report.figures import MAX_POINTS, loss_figure, read_metrics, save_figure, save_loss_plot, smoothed

RECORDS = [
    {"step": 0, "val_loss": 10.5},
    *({"step": step, "loss": 10.0 - step, "lr": step * 1e-4, "tokens_per_second": 9.0} for step in range(1, 7)),
    {"step": 6, "val_loss": 4.25},
]


def lines(axes):
    return {line.get_label().split("  ")[0]: line for line in axes.lines}


def test_lines_hold_the_records():
    figure = loss_figure(RECORDS, "a title")
    assert isinstance(figure, Figure)
    loss, lr = figure.axes
    assert loss.get_title(loc="left") == "a title"
    assert loss.lines[0].get_xydata().tolist() == [[step, 10.0 - step] for step in range(1, 7)]
    assert lines(loss)["validation"].get_xydata().tolist() == [[0, 10.5], [6, 4.25]]
    assert np.allclose(lines(loss)["training"].get_ydata(), [10.0 - step for step in range(1, 7)])
    assert np.allclose(lr.lines[0].get_ydata(), [step * 1e-4 for step in range(1, 7)])
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["training  4.000", "validation  4.250"]


def test_pyplot_is_left_alone(tmp_path):
    figures = lambda: getattr(sys.modules.get("matplotlib._pylab_helpers"), "Gcf", None)
    before = len(figures().figs) if figures() else 0
    save_figure(loss_figure(RECORDS), tmp_path / "a.png")
    assert (len(figures().figs) if figures() else 0) == before


def test_of_a_step_logged_twice_the_last_counts():
    records = [{"step": s, "loss": 1.0} for s in (1, 2, 3)] + [{"step": s, "loss": 5.0} for s in (2, 3, 4)]
    assert loss_figure(records).axes[0].lines[0].get_xydata().tolist() == [[1, 1], [2, 5], [3, 5], [4, 5]]


def test_values_that_are_not_finite_are_left_out():
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": None}]
    assert loss_figure(records).axes[0].lines[0].get_xydata().tolist() == [[1, 2]]
    for nothing in ([], [{"step": 1, "lr": 0.1}], records[1:]):
        with pytest.raises(ValueError, match="nothing to draw"):
            loss_figure(nothing)


@pytest.mark.parametrize("kept", ["loss", "val_loss"])
def test_one_point_or_one_kind_is_enough(kept, tmp_path):
    records = [record for record in RECORDS if kept in record][:1]
    figure = loss_figure(records)
    assert all(line.get_marker() == "o" for line in lines(figure.axes[0]).values() if line.get_label()[0] != "_")
    save_figure(figure, tmp_path / "a.png")


def test_smoothing_follows_a_line_and_removes_noise():
    x = np.arange(500.0)
    assert np.allclose(smoothed(x, 3 - 2 * x)[1], 3 - 2 * x)
    noise = np.random.default_rng(0).normal(size=500)
    assert np.abs(smoothed(x, 5 + noise)[1] - 5).max() < 1.0
    assert smoothed(x, 5 + noise)[1].std() < 0.35
    for n in (1, 2, 3):
        assert np.allclose(smoothed(x[:n], x[:n])[1], x[:n])


def test_long_runs_are_thinned():
    x = np.arange(10_001.0)
    thin, y = smoothed(x, 2 * x)
    assert len(thin) == MAX_POINTS
    assert np.allclose(y, 2 * thin, atol=2)


def test_file_to_picture(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps(record) + "\n" for record in RECORDS) + '{"step": 7, "lo')
    assert read_metrics(metrics) == RECORDS
    save_loss_plot(metrics, tmp_path / "sub" / "loss.png")
    png = (tmp_path / "sub" / "loss.png").read_bytes()
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (1280, 800)
    save_loss_plot(metrics, tmp_path / "loss.svg")
    assert (tmp_path / "loss.svg").read_text().startswith("<?xml")


def test_bad_metrics_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist"):
        read_metrics(tmp_path / "metrics.jsonl")
    for broken in ('{"step"\n{}\n', "[1]\n", "3"):
        (tmp_path / "metrics.jsonl").write_text(broken)
        with pytest.raises(ValueError, match="line 1 is not a JSON object"):
            read_metrics(tmp_path / "metrics.jsonl")


def test_unwritable_picture(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/loss\.png"):
        save_figure(loss_figure(RECORDS), tmp_path / "file" / "loss.png")
