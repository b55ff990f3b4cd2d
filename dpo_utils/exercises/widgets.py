"""Sliders over a draw function, where someone sits in front of the notebook to move them."""

import os
import sys

import ipywidgets
import matplotlib.pyplot as plt


def live():
    """Whether someone sits in front of Jupyter, VS Code or Colab, without DPO_STATIC=1.

    A batch run has none of their marks, so that no widget state is ever saved by it.
    """
    if os.environ.get("DPO_STATIC") == "1":
        return False
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    in_code = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return in_code or "google.colab" in sys.modules or bool(os.environ.get("JPY_SESSION_NAME"))


def show(draw, **ranges):
    """Sliders over draw's arguments, name=(lowest, highest, start); in a batch run, nothing.

    One picture is drawn for each slider that is let go: while it moves, they would queue up.
    """
    if not live():
        print("sliders appear here in Jupyter, VS Code and Colab; the next figure is a still")
        return

    def redraw(**values):
        draw(**values)
        plt.show()

    sliders = {
        name: ipywidgets.FloatSlider(
            start, min=low, max=high, step=(high - low) / 100, continuous_update=False
        )
        for name, (low, high, start) in ranges.items()
    }
    ipywidgets.interact(redraw, **sliders)
