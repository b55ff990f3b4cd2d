"""Pictures. Plot functions take data and an optional `ax` and return the Axes; `save_figure` alone writes files."""

import json
import math
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from dpo_utils.profiles import repository_root

# Colours that stay apart for colour-blind readers (Okabe and Ito 2008), one meaning each.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
CHOSEN, REJECTED, MARGIN = BLUE, ORANGE, GREEN
STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "figure.dpi": 100}
plt.rcParams.update(STYLE)


def save_figure(figure, name: str, data: dict) -> Path:
    """Write figures/<name>.png and the numbers behind it as figures/<name>.json; returns the picture's path.

    figure: a Figure or Axes. `DPO_FIGURES` names another folder than the clone's figures/.
    """
    figure = getattr(figure, "figure", figure)
    folder = Path(os.environ.get("DPO_FIGURES") or repository_root() / "figures")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    (folder / f"{name}.json").write_text(json.dumps(_plain(data), indent=1) + "\n")
    return folder / f"{name}.png"


def _plain(value):
    """JSON-ready: arrays as lists, numbers to six digits."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _axes(ax, width=6.0, height=3.4):
    return ax if ax is not None else plt.subplots(figsize=(width, height), layout="constrained")[1]


def column(history, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one metric; rows without it (non-finite steps) are left out."""
    rows = [row for row in history if name in row]
    return [row["step"] for row in rows], [row[name] for row in rows]


def smooth(values, window: int = 5) -> np.ndarray:
    """Trailing mean over up to `window` values, as long as the input."""
    total = np.cumsum([0.0, *values])
    return np.array([(total[i] - total[max(0, i - window)]) / min(i, window) for i in range(1, len(total))])


def curve(history, name: str, label: str, color: str, ax=None):
    """One metric against the step: faint as measured, strong as a trailing mean of five."""
    ax = _axes(ax)
    steps, values = column(history, name)
    ax.plot(steps, values, color=color, alpha=0.25, linewidth=1)
    ax.plot(steps, smooth(values), color=color, label=label)
    ax.set_xlabel("optimiser step")
    return ax


def loss_curve(history, ax=None, unit: str = "nats a pair", start: float | None = None):
    """The training loss; `start` draws a dashed line, ln 2 for DPO."""
    ax = curve(history, "loss", "loss", BLUE, ax)
    if start is not None:
        ax.axhline(start, color=GREY, linestyle="--", linewidth=1, label=f"start, {start:.3f}")
    ax.set_ylabel(f"loss ({unit})")
    ax.legend(frameon=False)
    return ax


def reward_curves(history, ax=None):
    """Chosen and rejected implicit rewards apart: both may fall while their distance grows."""
    ax = curve(history, "rewards/chosen", "chosen", CHOSEN, ax)
    curve(history, "rewards/rejected", "rejected", REJECTED, ax)
    ax.axhline(0, color=GREY, linestyle="--", linewidth=1)
    ax.set_ylabel("implicit reward (beta × nats)")
    ax.legend(frameon=False)
    return ax


def margin_curve(history, ax=None, label: str = "margin", color: str = MARGIN):
    """The reward margin, chosen minus rejected."""
    ax = curve(history, "rewards/margins", label, color, ax)
    ax.set_ylabel("reward margin (beta × nats)")
    ax.legend(frameon=False)
    return ax


def accuracy_curve(history, ax=None):
    """Share of pairs whose chosen answer has the higher implicit reward; one half is a coin."""
    ax = curve(history, "rewards/accuracies", "accuracy", RED, ax)
    ax.axhline(0.5, color=GREY, linestyle="--", linewidth=1, label="a coin")
    ax.set(ylabel="accuracy (share of pairs)", ylim=(-0.02, 1.05))
    ax.legend(frameon=False)
    return ax


def training_panel(history):
    """Loss, rewards apart, margin and accuracy of a DPO run in one figure; returns the Figure."""
    figure, axes = plt.subplots(2, 2, figsize=(9.5, 6), layout="constrained")
    loss_curve(history, axes[0, 0], start=math.log(2))
    reward_curves(history, axes[0, 1])
    margin_curve(history, axes[1, 0])
    accuracy_curve(history, axes[1, 1])
    return figure


def margin_histogram(margins, ax=None, label: str | None = None, color: str = MARGIN):
    """How the margins of single pairs spread; left of zero the model prefers the rejected answer."""
    ax = _axes(ax)
    ax.hist(margins, bins=30, color=color, alpha=0.7, label=label)
    ax.axvline(0, color="black", linewidth=1)
    ax.set(xlabel="reward margin of a pair (beta × nats)", ylabel="pairs")
    if label:
        ax.legend(frameon=False)
    return ax


def length_histogram(chosen, rejected, ax=None, unit: str = "tokens"):
    """Lengths of chosen and rejected answers over each other."""
    ax = _axes(ax)
    bins = np.histogram_bin_edges(np.concatenate([chosen, rejected]), bins=20)
    ax.hist(chosen, bins, color=CHOSEN, alpha=0.6, label=f"chosen, mean {np.mean(chosen):.1f}")
    ax.hist(rejected, bins, color=REJECTED, alpha=0.6, label=f"rejected, mean {np.mean(rejected):.1f}")
    ax.set(xlabel=f"length of the answer ({unit})", ylabel="answers")
    ax.legend(frameon=False)
    return ax


def interval_bars(results: dict[str, tuple[float, float, float]], ax=None, unit: str = "share", marks=()):
    """Horizontal bars with intervals: {name: (estimate, low, high)}; `marks` draws dashed lines at (value, label)."""
    ax = _axes(ax, height=0.45 * len(results) + 1.1)
    names = list(results)
    values = np.array([results[name] for name in names])
    errors = np.abs(values[:, 1:].T - values[:, 0])
    ax.barh(names, values[:, 0], xerr=errors, color=BLUE, alpha=0.75, error_kw={"elinewidth": 1.2, "capsize": 3})
    for value, label in marks:
        ax.axvline(value, color=GREY, linestyle="--", linewidth=1, label=label)
    if marks:
        ax.legend(frameon=False, loc="lower right", bbox_to_anchor=(1.0, 0.98))  # above the bars: none hides it
    ax.invert_yaxis()
    ax.set_xlabel(unit)
    ax.grid(axis="y", visible=False)
    return ax


def mask_picture(mask, labels=None, ax=None):
    """What sees what: mask (L, L) bool, row = the token that looks, column = the token that is seen."""
    ax = _axes(ax, 4.6, 4.4)
    ax.imshow(np.asarray(mask), cmap="Blues", vmin=0, vmax=1.4, interpolation="nearest")
    if labels:
        ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
        ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.set(xlabel="seen token", ylabel="token that looks")
    ax.grid(visible=False)
    return ax


class LiveMargins:
    """A margin plot that redraws while training runs, for `train_dpo(..., on_step=LiveMargins())` in a notebook.

    Outside an interactive front end, and where `DPO_STATIC` is set, it draws nothing.
    """

    def __init__(self, every: int = 5):
        self.every, self.handle = every, None

    def __call__(self, history):
        """Redraw after every `every` steps."""
        if os.environ.get("DPO_STATIC") or len(history) % self.every:
            return
        from IPython.display import display

        figure = training_panel(history)
        if self.handle is None:
            self.handle = display(figure, display_id=True)
        elif self.handle:
            self.handle.update(figure)
        plt.close(figure)


def token_strip(tokens, scored, ax=None, width: int = 14):
    """Tokens in reading order, `width` a line; blue where the loss scores them, grey where it does not."""
    lines = math.ceil(len(tokens) / width)
    ax = _axes(ax, 9.0, 0.45 * lines + 0.3)
    for i, (token, counts) in enumerate(zip(tokens, scored, strict=True)):
        box = {
            "boxstyle": "round,pad=0.25",
            "facecolor": CHOSEN if counts else "#DDDDDD",
            "edgecolor": "none",
            "alpha": 0.45,
        }
        ax.text(i % width + 0.5, -(i // width), token, ha="center", va="center", fontsize=8, family="monospace", bbox=box)
    ax.set(xlim=(0, width), ylim=(-lines + 0.4, 0.6))
    ax.axis("off")
    return ax


def margin_against_length(difference, margins, ax=None):
    """Margins of pairs against how much longer the chosen answer is, with the least-squares line."""
    ax = _axes(ax)
    ax.scatter(difference, margins, s=10, color=MARGIN, alpha=0.4, linewidths=0)
    if np.ptp(difference) > 0:
        slope, height = np.polyfit(difference, margins, 1)
        ends = np.array([np.min(difference), np.max(difference)])
        ax.plot(ends, slope * ends + height, color="black", linewidth=1, label=f"{slope:+.3f} a token")
        ax.legend(frameon=False)
    ax.set(xlabel="chosen minus rejected (tokens)", ylabel="reward margin (beta × nats)")
    return ax


def reliability(results: dict[str, dict], ax=None):
    """Confidence against accuracy, one curve a result of `divergence.calibration`; on the dashed line they are equal."""
    ax = _axes(ax, 4.4, 3.8)
    ax.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1, label="honest")
    for (name, result), color in zip(results.items(), (BLUE, RED, GREEN, ORANGE), strict=False):
        ax.plot(result["confidence"], result["accuracy"], "o-", color=color, markersize=4, label=name)
    ax.set(xlabel="confidence σ(|margin|)", ylabel="accuracy (share of pairs)", xlim=(0.48, 1.02), ylim=(-0.02, 1.05))
    ax.legend(frameon=False)
    return ax


def frontier(points: dict[str, list[tuple[float, float]]], limit=None, ax=None):
    """Reward against KL: {name: [(kl, rate), ...]}, names that share their first word share a colour; limit: (kls, rates)."""
    ax = _axes(ax, 7.2, 4.2)
    if limit is not None:
        ax.plot(*limit, color="black", linewidth=1, label="exact limit")
    families = list(dict.fromkeys(name.split()[0] for name in points))
    colours = (BLUE, RED, GREEN, ORANGE, "#CC79A7", "#56B4E9", GREY)
    palette = {name: colours[i % len(colours)] for i, name in enumerate(families)}
    marks = {name: "osD^vP*X"[i % 8] for i, name in enumerate(points)}
    for name, places in points.items():
        ax.scatter(*zip(*places, strict=True), s=24, alpha=0.75, color=palette[name.split()[0]], marker=marks[name], label=name)
    ax.set(xlabel="KL(policy ‖ reference), nats an answer (square-root scale)", ylabel="probability of a true answer")
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return ax


def bands(x, results: dict[str, list[tuple[float, float, float]]], ax=None, xlabel: str = "", ylabel: str = ""):
    """Curves with intervals: {name: [(estimate, low, high) at every x]}."""
    ax = _axes(ax)
    for (name, rows), color in zip(results.items(), (BLUE, RED, GREEN, ORANGE, GREY), strict=False):
        middle, low, high = np.array(rows).T
        ax.plot(x, middle, "o-", color=color, markersize=4, label=name)
        ax.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(frameon=False)
    return ax


def heat(values, rows, columns, ax=None, xlabel: str = "", ylabel: str = "", form: str = "{:.2f}"):
    """A small map of numbers: values (rows, columns), each written into its cell."""
    ax = _axes(ax, 1.2 + 0.9 * len(columns), 1.0 + 0.5 * len(rows))
    values = np.asarray(values, dtype=float)
    ax.imshow(values, cmap="Blues", aspect="auto", alpha=0.7)
    for (i, j), value in np.ndenumerate(values):
        ax.text(j, i, form.format(value), ha="center", va="center", fontsize=9)
    ax.set_xticks(range(len(columns)), [str(c) for c in columns])
    ax.set_yticks(range(len(rows)), [str(r) for r in rows])
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(visible=False)
    return ax
