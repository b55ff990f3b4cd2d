"""Pictures that several places draw: data and an optional `ax` in, the Axes out."""

import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import display

from dpo_utils.profiles import runs_directory

# Colours that colour-blind readers can tell apart (Okabe and Ito 2008), one meaning each.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
CHOSEN, REJECTED, MARGIN = BLUE, RED, GREEN
CYCLE = plt.cycler(color=[BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", GREY, RED])  # C0, C1, ...
plt.rcParams.update({"axes.prop_cycle": CYCLE, "axes.grid": True, "grid.alpha": 0.25})
plt.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False})
GUIDE = {"color": GREY, "linestyle": "--", "linewidth": 1}  # a line to compare with


def save_figure(figure, name: str, data: dict) -> Path:
    """Write <name>.png and its numbers as <name>.json; returns the picture's path.

    They go to `figures` under `runs_directory()`, or to `DPO_FIGURES`. `data` is kept to six
    digits, NaN and infinity as null.
    """
    folder = Path(os.environ.get("DPO_FIGURES") or runs_directory() / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    picture, figure = folder / f"{name}.png", getattr(figure, "figure", figure)  # or an Axes
    figure.savefig(picture, dpi=110, bbox_inches="tight", metadata={"Software": None})
    exact = json.dumps(data, default=lambda value: value.tolist())  # arrays and NumPy's numbers
    short = json.loads(exact, parse_float=_six_digits, parse_constant=lambda _: None)
    picture.with_suffix(".json").write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
    return picture


def _six_digits(text: str) -> float:
    return float(f"{float(text):.6g}")


def _axes(ax, width=6.0, height=3.4):
    return ax or plt.subplots(figsize=(width, height), layout="constrained")[1]


def column(history, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; rows without it (non-finite steps) are left out."""
    rows = [row for row in history if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def curve(history, name: str, label: str, color: str, ax=None, line=None):
    """One metric: faint as measured, strong the mean of five steps around; `line`: (y, label)."""
    ax = _axes(ax)
    steps, values = column(history, name)
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    means = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(len(values))]
    ax.plot(steps, means, color=color, label=label)
    if line:
        ax.axhline(line[0], label=line[1], **GUIDE)
    ax.set_xlabel("optimiser step")
    ax.legend()
    return ax


def training_panel(history):
    """Loss, chosen and rejected rewards, margin and accuracy of a DPO run; returns the Figure."""
    figure, axes = plt.subplots(2, 2, figsize=(7.4, 4.6), layout="constrained")
    loss, rewards, margin, accuracy = axes.flat
    curve(history, "loss", "loss", BLUE, loss, (np.log(2), "start, ln 2"))
    curve(history, "rewards/chosen", "chosen", CHOSEN, rewards)
    curve(history, "rewards/rejected", "rejected", REJECTED, rewards, (0, None))
    curve(history, "rewards/margins", "margin", MARGIN, margin)
    curve(history, "rewards/accuracies", "accuracy", MARGIN, accuracy, (0.5, "chance"))
    loss.set_ylabel("loss (nats per pair)")
    rewards.set_ylabel("reward (beta × nats)")
    margin.set_ylabel("margin (beta × nats)")
    accuracy.set(ylabel="share of pairs", ylim=(-0.02, 1.05))
    return figure


def live():
    """Whether someone sits before Jupyter, VS Code, Colab or Kaggle; never if DPO_STATIC=1."""
    in_code = "__vsc_ipynb_file__" in getattr(get_ipython(), "user_ns", {})
    on_kaggle = os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive"
    in_jupyter = bool(os.environ.get("JPY_SESSION_NAME"))
    someone = in_code or on_kaggle or in_jupyter or "google.colab" in sys.modules
    return someone and os.environ.get("DPO_STATIC") != "1"


class LiveMargins:
    """For `train_dpo(on_step=LiveMargins())`: the panel as it grows, unless DPO_STATIC is set."""

    handle = None

    def __call__(self, history):
        """Redraw after every fifth step."""
        if os.environ.get("DPO_STATIC") == "1" or len(history) % 5:
            return
        figure = training_panel(history)
        if self.handle:
            self.handle.update(figure)
        else:
            self.handle = display(figure, display_id=True)
        plt.close(figure)


def interval_bars(results: dict, ax=None, unit: str = "share", marks=()):
    """Bars of {name: (estimate, low, high)}; `marks`: (value, label) of dashed lines."""
    ax = _axes(ax, height=0.45 * len(results) + 1.1)
    values = np.array(list(results.values()))
    errors = np.abs(values[:, 1:].T - values[:, 0])
    errors[:, values[:, 1] == values[:, 2]] = np.nan  # one seed has no interval: none is drawn
    ax.barh(list(results), values[:, 0], color=BLUE, alpha=0.75, xerr=errors, capsize=3)
    for value, label in marks:
        ax.axvline(value, label=label, **GUIDE)
    if marks:
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 0.98))  # above the bars: none hides it
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.grid(axis="y", visible=False)
    return ax


def name_lines(ax, ends: dict) -> None:
    """Write names next to lines, {name: (x, y, colour)}, apart enough to be read."""
    low, gap = -np.inf, 0.05 * np.diff(ax.get_ylim())[0]
    for name, (x, y, color) in sorted(ends.items(), key=lambda item: item[1][1]):
        low = max(y, low + gap)
        where = {"xytext": (7, 0), "textcoords": "offset points", "annotation_clip": False}
        where["bbox"] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.2}
        ax.annotate(name, (x, low), color=color, fontsize=8, va="center", **where)


def frontier(paths: dict[str, list[tuple]], limit, best_of=None, colors=None):
    """Reward against KL: {name: [(kl, reward) in the order of the steps]}, labelled at the ends.

    limit: (kls, rewards) that no policy passes; best_of: {n: (kl, reward)} of best-of-n sampling;
    colors: {name: colour}.
    """
    ax = _axes(None, 7.2, 4.2)
    ax.plot(*limit, color="black", linewidth=1)
    ax.fill_between(*limit, ax.get_ylim()[1], color=GREY, alpha=0.12, linewidth=0)
    end = {"xytext": (0, 5), "textcoords": "offset points", "ha": "right"}
    ax.annotate("exact limit", (limit[0][-1], limit[1][-1]), **end)
    for n, place in (best_of or {}).items():
        ax.plot(*place, "k+", markersize=9)
        where = {"xytext": (-5, 4), "textcoords": "offset points", "ha": "right"}
        ax.annotate(f"best of {n}", place, fontsize=8, **where)
    colors = colors or {name: f"C{i}" for i, name in enumerate(paths)}
    for name, places in paths.items():
        ax.plot(*zip(*places, strict=True), "o-", color=colors[name], markersize=4)
    name_lines(ax, {n: (max(at)[0], at[-1][1], colors[n]) for n, at in paths.items()})
    ax.set_xlabel("KL(policy ‖ reference), nats per answer (square-root scale)")
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.set(ylabel="expected reward", xlim=(0, None))
    return ax


def bands(x, results: dict, ax=None, xlabel: str = "", ylabel: str = ""):
    """Curves with intervals: {name: [(estimate, low, high) at every x]}."""
    ax = _axes(ax)
    for i, (name, rows) in enumerate(results.items()):
        middle, low, high = np.array(rows).T
        ax.plot(x, middle, "o-", color=f"C{i}", markersize=4, label=name)
        ax.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return ax


def diagram(boxes: dict[str, tuple], arrows=(), ax=None):
    """Boxes {text: (x, y, colour)}, in units of a box, and arrows (from, to, label)."""
    ax = _axes(ax, *np.ptp([place[:2] for place in boxes.values()], axis=0) * (2.1, 1.1) + (2, 0.9))
    drawn, style = {}, {"ha": "center", "va": "center"}
    for text, (x, y, color) in boxes.items():
        style["bbox"] = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color}
        drawn[text] = ax.text(2.1 * x, 1.1 * y, text, fontsize=9, **style)
    ax.update_datalim([(2.1 * x, 1.1 * y) for x, y, _ in boxes.values()])
    ax.margins(0.25)
    for start, end, label in arrows:
        ends = {"patchA": drawn[start].get_bbox_patch(), "patchB": drawn[end].get_bbox_patch()}
        (x0, y0), (x1, y1) = (drawn[name].get_position() for name in (start, end))
        arrow = {"arrowstyle": "-|>", "color": GREY, "shrinkA": 2, "shrinkB": 2, **ends}
        ax.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        where = {"color": GREY, "ha": "center", "va": "bottom", "fontsize": 8}
        ax.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.04, label, **where)
    ax.axis("off")
    return ax
