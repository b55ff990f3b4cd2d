"""Plot functions draw what they are given, on the axes they are given; only save_figure writes."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from dpo_utils import plots

HISTORY = [
    {"step": s, "loss": 0.7 - 0.01 * s, "rewards/chosen": 0.1 * s, "rewards/rejected": -0.1 * s, "rewards/margins": 0.2 * s}
    | {"rewards/accuracies": 0.5}
    for s in range(1, 11)
]


@pytest.fixture(autouse=True)
def close():
    """No figure outlives its test."""
    yield
    plt.close("all")


def test_smooth_is_a_trailing_mean_by_hand():
    assert plots.smooth([1, 2, 3, 4], window=2).tolist() == [1.0, 1.5, 2.5, 3.5]


def test_curves_draw_the_metric_and_label_their_axes():
    _, ax = plt.subplots()
    assert plots.margin_curve(HISTORY, ax) is ax
    assert ax.lines[0].get_ydata().tolist() == pytest.approx([0.2 * s for s in range(1, 11)])
    assert ax.get_xlabel() and "nats" in ax.get_ylabel()
    assert all(a.get_xlabel() and a.get_ylabel() for a in plots.training_panel(HISTORY).axes)


def test_non_finite_steps_are_left_out():
    steps, values = plots.column([*HISTORY[:2], {"step": 3, "nonfinite": True}, *HISTORY[3:4]], "loss")
    assert steps == [1, 2, 4] and len(values) == 3


def test_interval_bars_put_the_whiskers_where_the_interval_is():
    ax = plots.interval_bars({"a": (0.5, 0.4, 0.7)})
    (segment,) = ax.collections[0].get_segments()
    assert sorted(segment[:, 0]) == pytest.approx([0.4, 0.7])


def test_save_figure_writes_picture_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_FIGURES", str(tmp_path))
    path = plots.save_figure(
        plots.margin_histogram(np.arange(5.0)), "x", {"m": np.float32(1 / 3), "n": [np.int64(2), float("nan")]}
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "x.json").read_text()) == {"m": 0.333333, "n": [2, None]}


def test_mask_picture_shows_the_mask():
    mask = np.tril(np.ones((3, 3), bool))
    assert np.array_equal(plots.mask_picture(mask, list("abc")).images[0].get_array(), mask)
