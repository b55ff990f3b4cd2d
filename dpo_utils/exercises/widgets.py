"""Sliders over a draw function, where someone sits in front of the notebook to move them."""

import os
import sys

from IPython import get_ipython
from ipywidgets import interactive


def live():
    """Whether someone sits in front of Jupyter, VS Code or Colab; never if DPO_STATIC=1."""
    in_code = "__vsc_ipynb_file__" in getattr(get_ipython(), "user_ns", {})
    someone = in_code or "google.colab" in sys.modules or bool(os.environ.get("JPY_SESSION_NAME"))
    return someone and os.environ.get("DPO_STATIC") != "1"


def show(draw, **ranges):
    """Sliders name=(lowest, highest, step) that start at draw's defaults; None in a batch run."""
    if not live():
        print("sliders appear here in Jupyter, VS Code and Colab; the next figure is a still")
        return None
    panel = interactive(draw, **ranges)
    for slider in panel.children[:-1]:
        slider.continuous_update = False  # draw once, when it is let go
    return panel
