"""Plot functions draw what they are given, on the axes they are given; only save_figure writes."""

import json

import numpy as np
import pytest

from dpo_utils import plots

NAMES = ["loss", *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))]
HISTORY = [{"step": step, **dict.fromkeys(NAMES, 0.2 * step)} for step in range(1, 11)]


@pytest.fixture(autouse=True)
def close():
    yield
    plots.plt.close("all")


def test_a_curve_shows_the_metric_and_its_mean_without_non_finite_steps():
    history = [*HISTORY[:2], {"step": 3, "nonfinite": True}, *HISTORY[3:]]
    measured, mean = plots.curve(history, "loss", "loss", plots.BLUE).lines
    assert measured.get_xdata().tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert mean.get_ydata()[[0, 1, -1]] == pytest.approx([7 / 15, 0.6, 1.8])


def test_every_axis_of_the_training_panel_is_labelled():
    assert all(ax.get_xlabel() and ax.get_ylabel() for ax in plots.training_panel(HISTORY).axes)


def test_interval_bars_put_the_whiskers_where_the_interval_is():
    ax = plots.interval_bars({"a": (0.5, 0.4, 0.7), "one seed": (0.6, 0.6, 0.6)})
    segment, none = ax.collections[0].get_segments()
    assert sorted(segment[:, 0]) == pytest.approx([0.4, 0.7]) and len(none) == 0


def test_save_figure_writes_picture_and_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_FIGURES", str(tmp_path))
    data = {"m": np.float32(1 / 3), "n": [np.int64(2), float("nan")], "a": np.arange(2)}
    path = plots.save_figure(plots.interval_bars({"a": (0.5, 0.4, 0.7)}), "x", data)
    assert path.read_bytes().startswith(b"\x89PNG")
    saved = json.loads((tmp_path / "x.json").read_text())
    assert saved == {"m": 0.333333, "n": [2, None], "a": [0, 1]}


def test_the_frontier_joins_the_steps_in_their_order_and_keeps_names_apart():
    paths = {"a": [(0.0, 1.0), (2.0, 3.0), (1.0, 2.0)], "b": [(0.0, 1.0), (1.0, 2.0)]}
    ax = plots.frontier(paths, ([0.0, 4.0], [1.0, 5.0]), {2: (1.0, 3.0)})
    assert ax.lines[2].get_xydata().tolist() == [list(place) for place in paths["a"]]
    heights = {text.get_text(): text.xy[1] for text in ax.texts}
    assert abs(heights["a"] - heights["b"]) > 0.1 and {"exact limit", "best of 2"} <= {*heights}


def test_an_arrow_of_a_diagram_runs_from_box_to_box():
    ax = plots.diagram({"pair": (0, 0, "k"), "loss": (1, 1, "k")}, [("pair", "loss", "fit")])
    places = {text.get_text(): text.get_position() for text in ax.texts}
    (arrow,) = [text for text in ax.texts if getattr(text, "arrow_patch", None)]
    assert (arrow.get_position(), arrow.xy) == (places["pair"], places["loss"])
    assert places["fit"][0] == (places["pair"][0] + places["loss"][0]) / 2
