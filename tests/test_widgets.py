"""The draw functions behind notebook 03's sliders, and that no widget is made in a batch run."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest

from dpo_utils import tabular
from dpo_utils.exercises import widgets


@pytest.fixture(autouse=True)
def batch(monkeypatch):
    monkeypatch.delenv("DPO_STATIC", raising=False)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    yield
    plt.close("all")


def test_a_batch_run_makes_no_widget(capsys):
    assert not widgets.live()
    assert widgets.show(widgets.draw_optimum, beta=(0.05, 3.0, 0.5)) is None
    assert "sliders appear here" in capsys.readouterr().out


def test_live_in_jupyter_unless_told_otherwise(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    assert widgets.live()
    monkeypatch.setenv("DPO_STATIC", "1")
    assert not widgets.live()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sliders_redraw_with_their_values(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "03.ipynb")
    seen = []
    box = widgets.show(lambda **values: seen.append(values), beta=(0.05, 3.0, 0.5), ref_of_F=(0.0, 1.0, 0.1))
    assert seen == [{"beta": 0.5, "ref_of_F": 0.1}]
    slider = box.children[0]
    assert (slider.min, slider.max, slider.description) == (0.05, 3.0, "beta")
    slider.value = 2.0
    assert seen[-1] == {"beta": 2.0, "ref_of_F": 0.1}


def test_the_turned_world_keeps_what_is_not_turned():
    turned, plain = widgets.turned_world(beta=2.0, reward_of_F=-1.0, ref_of_F=0.5), tabular.make_world()
    assert turned.beta == 2.0 and turned.reward[0, 5] == -1.0 and turned.ref[0, 5] == 0.5
    assert turned.ref.sum().item() == pytest.approx(1)
    assert (turned.reward[0, :5] == plain.reward[0, :5]).all()
    ratio = turned.ref[0, :5] / plain.ref[0, :5]
    assert (ratio - ratio[0]).abs().max() < 1e-12


def test_summary_holds_together():
    world = widgets.turned_world(beta=0.7)
    numbers = widgets.summary(world)
    assert numbers["J"] == pytest.approx(numbers["reward"] - 0.7 * numbers["KL"])
    assert numbers["J"] == pytest.approx(0.7 * tabular.log_partition(world).item())
    assert numbers["Z"] == pytest.approx(tabular.log_partition(world).exp().item())


def test_bars_are_the_reference_and_the_optimum():
    ax = widgets.draw_optimum(beta=0.5)
    world = widgets.turned_world(beta=0.5)
    heights = [bar.get_height() for bar in ax.patches]
    assert heights[:6] == pytest.approx(world.ref[0].tolist())
    assert heights[6:] == pytest.approx(tabular.optimal_policy(world)[0].tolist())
    assert ax.get_xlabel() and ax.get_ylabel() and "beta 0.50" in ax.get_title()


def test_the_dotted_lines_mark_the_minima():
    ax = widgets.draw_losses(beta=0.1, label_smoothing=0.1)
    h, smoothed = ax.lines[1].get_data()
    ipo = ax.lines[2].get_ydata()
    minima = [line.get_xdata()[0] for line in ax.lines[3:]]
    assert minima == pytest.approx([h[ipo.argmin()], h[smoothed.argmin()]], abs=0.5)
    assert ax.lines[0].get_ydata()[-1] == min(ax.lines[0].get_ydata())  # DPO has none
