"""Sliders over a draw function, where someone sits in front of the notebook to move them."""

from threading import Lock

from IPython.core.pylabtools import print_figure
from ipywidgets import FloatSlider, Image, VBox
from matplotlib.figure import Figure

from dpo_utils.plots import live


def show(draw, **ranges):
    """Sliders name=(start, lowest, highest, step) over draw(ax, **values); None in a batch run."""
    if not live():
        print("sliders appear here in Jupyter, VS Code and Colab; the next figure is a still")
        return None
    sliders, picture, lock, width = {}, Image(), Lock(), f"{max(map(len, ranges))}ch"
    look = {"continuous_update": False, "style": {"description_width": width}}  # no label is cut

    def redraw(moved=None):  # perhaps in another thread than the cells, so without pyplot
        with lock:
            figure = Figure((6.0, 3.0), layout="constrained")
            draw(figure.subplots(), **{name: slider.value for name, slider in sliders.items()})
            picture.value = print_figure(figure, bbox_inches=None)

    for name, (start, low, high, step) in ranges.items():
        sliders[name] = FloatSlider(start, min=low, max=high, step=step, description=name, **look)
        sliders[name].observe(redraw, "value")
    redraw()
    return VBox([*sliders.values(), picture], layout={"align_items": "flex-start"})
