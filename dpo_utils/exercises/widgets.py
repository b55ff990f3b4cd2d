"""Sliders for notebook 03. Each calls a plain draw function, so that the same picture can be had without one."""

import os
import sys

import matplotlib.pyplot as plt
import torch

from dpo_utils import tabular
from dpo_utils.losses import dpo_loss, ipo_loss
from dpo_utils.plots import BLUE, GREY, ORANGE, RED


def live():
    """Whether someone sits in front of the notebook: Jupyter, VS Code or Colab, and not DPO_STATIC=1.

    A batch run (nbval, nbconvert, `make workbook`) has none of these marks, so no widget state is ever saved by it.
    """
    if os.environ.get("DPO_STATIC") == "1":
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    in_code = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return in_code or "google.colab" in sys.modules or bool(os.environ.get("JPY_SESSION_NAME"))


def show(draw, **ranges):
    """Sliders over draw's arguments, name=(lowest, highest, start), redrawn while they move; nothing in a batch run."""
    if not live():
        print("sliders appear here in Jupyter, VS Code and Colab; the next figure shows what they show")
        return None
    import ipywidgets
    from IPython.display import display

    def slider(name, lowest, highest, start):
        return ipywidgets.FloatSlider(
            value=start, min=lowest, max=highest, step=(highest - lowest) / 100, description=name.replace("_", " "),
            continuous_update=True, style={"description_width": "8em"},
        )  # fmt: skip

    sliders = {name: slider(name, *limits) for name, limits in ranges.items()}

    def redraw(**values):
        draw(**values)
        plt.show()

    box = ipywidgets.VBox([*sliders.values(), ipywidgets.interactive_output(redraw, sliders)])
    display(box)
    return box


# ---- what the sliders of step 10 move


def turned_world(beta=0.5, reward_of_F=1.05, ref_of_F=0.06):
    """The first prompt of the default world with three knobs: beta, and the last response's reward and reference.

    The knobs start at the world's own values rounded to two decimals, 1.05 for 1.047 and 0.06 for 0.0615.
    """
    world = tabular.make_world()
    reward, ref = world.reward[:1].clone(), world.ref[:1].clone()
    reward[0, -1] = reward_of_F
    ref[0, :-1] *= (1 - ref_of_F) / ref[0, :-1].sum()
    ref[0, -1] = ref_of_F
    return tabular.World(ref, reward, beta)


def summary(world):
    """Z, KL(pi* || ref), expected reward and J at the optimum of a one-prompt world, as floats."""
    best = tabular.optimal_policy(world)
    return {
        "Z": tabular.log_partition(world).exp().item(),
        "KL": tabular.kl(best, world.ref).item(),
        "reward": (best * world.reward).sum().item(),
        "J": tabular.objective(best, world).item(),
    }


def draw_optimum(beta=0.5, reward_of_F=1.05, ref_of_F=0.06, ax=None):
    """Bars of pi_ref and pi* over the six responses, with Z, KL, expected reward and J in the title; gives the Axes."""
    world = turned_world(beta, reward_of_F, ref_of_F)
    numbers = summary(world)
    ax = ax if ax is not None else plt.subplots(figsize=(6.0, 3.0), layout="constrained")[1]
    place = torch.arange(world.ref.shape[1])
    ax.bar(place - 0.2, world.ref[0], width=0.4, color=GREY, label="reference")
    ax.bar(place + 0.2, tabular.optimal_policy(world)[0], width=0.4, color=BLUE, label="optimum")
    ax.set_xticks(place, [f"{name}\n{r:+.2f}" for name, r in zip("ABCDEF", world.reward[0].tolist(), strict=True)])
    ax.set(xlabel="response and its reward", ylabel="probability", ylim=(0, 1))
    ax.set_title(f"beta {beta:.2f}:  " + "  ".join(f"{k} {v:.3g}" for k, v in numbers.items()), fontsize=9)
    ax.legend(frameon=False)
    return ax


# ---- what the sliders of step 11 move


def draw_losses(beta=0.1, label_smoothing=0.1, ax=None):
    """DPO, cDPO and IPO against the log-ratio difference h, and where each comes to rest; gives the Axes."""
    h = torch.linspace(-40, 80, 241, dtype=torch.float64)
    zero = torch.zeros_like(h)
    ax = ax if ax is not None else plt.subplots(figsize=(6.0, 3.0), layout="constrained")[1]
    ax.plot(h, dpo_loss(h, zero, zero, zero, beta)[0], color=BLUE, label="DPO: falls for ever")
    smoothed = dpo_loss(h, zero, zero, zero, beta, label_smoothing)[0]
    ax.plot(h, smoothed, color=ORANGE, label="label smoothing")
    scale = (2 * beta) ** 2  # IPO at h = 0 is 1 / (2 beta)^2: drawn relative to that
    ax.plot(h, scale * ipo_loss(h, zero, zero, zero, beta)[0], color=RED, label="IPO, per token, scaled")
    ax.axvline(1 / (2 * beta), color=RED, linestyle=":", linewidth=1)
    ax.axvline(torch.logit(torch.tensor(1 - label_smoothing)).item() / beta, color=ORANGE, linestyle=":", linewidth=1)
    ax.set(xlabel="h (nats per answer; for IPO nats per token)", ylabel="loss", xlim=(-40, 80), ylim=(0, 4))
    ax.set_title(f"beta {beta:.2f}, smoothing {label_smoothing:.2f}: dotted lines mark the minima", fontsize=9)
    ax.legend(frameon=False)
    return ax
