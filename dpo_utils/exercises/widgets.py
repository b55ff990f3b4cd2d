"""Sliders over a draw function, where someone sits in front of the notebook to move them."""

from ipywidgets import interactive

from dpo_utils.plots import live


def show(draw, **ranges):
    """Sliders name=(lowest, highest, step) that start at draw's defaults; None in a batch run."""
    if not live():
        print("sliders appear here in Jupyter, VS Code and Colab; the next figure is a still")
        return None
    panel = interactive(draw, **ranges)
    for slider in panel.children[:-1]:
        slider.continuous_update = False  # draw once, when it is let go
    return panel
