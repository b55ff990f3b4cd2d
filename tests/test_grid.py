"""Runs start from the same place and are kept; methods, labels and seeds; REINFORCE."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_utils import world
from dpo_utils.experiments import grid
from dpo_utils.experiments.grid import Lab, Recipe
from dpo_utils.experiments.reinforce import fit_reward_model, train_reinforce
from dpo_utils.models import load_policy
from dpo_utils.tokens import tokenize_all
from dpo_utils.train import train_sft


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny):
    """The profile of short runs, and the adapter of a short SFT."""
    profile, folder = replace(tiny, sft_steps=12, steps=4, batch=8), tmp_path_factory.mktemp("sft")
    train_sft(*load_policy(profile), world.demonstrations(n=400), profile, folder)
    return profile, folder / "adapter"


@pytest.fixture
def lab(start, tmp_path, monkeypatch):
    monkeypatch.setitem(grid.SIZES, "reduced", (24, 20, 1))
    return Lab(*start, tmp_path)


def test_wrong_names_are_refused(lab, monkeypatch):
    with pytest.raises(ValueError, match="recipe 'mine': there is no method 'magic'"):
        lab.run(Recipe("mine", method="magic"))
    monkeypatch.setenv("DPO_GRID", "huge")
    with pytest.raises(ValueError, match="DPO_GRID is 'huge': it can be reduced or full"):
        grid.grid()


def test_every_run_starts_from_the_same_place(lab, tmp_path):
    point = lab.measure(lab.profile)
    assert point["kl"] == point["margin"] == 0.0 and point["accuracy"] == 0.5 and point["true"] > 0
    first = lab.run(Recipe("one"), at=(2,))
    lab.run(Recipe("another", {"learning_rate": 1e-2}))
    lab.folder = tmp_path / "elsewhere"
    assert lab.run(Recipe("one"), at=(2,))["points"] == first["points"]
    assert [point["step"] for point in first["points"]] == [2, 4] and point != first["points"][0]


def test_results_are_kept_and_read_back_only_where_nothing_changed(lab, monkeypatch):
    first = lab.run(Recipe("one"))
    for other in (Recipe("a", noise=0.5), Recipe("b", pairs=5), Recipe("c", {"beta": 2.0})):
        lab.run(other)
    assert len(list(lab.folder.iterdir())) == 4
    monkeypatch.setattr(grid, "METHODS", {})  # whatever trains would fail now
    assert lab.run(Recipe("by another name")) == {**first, "name": "by another name"}
    with pytest.raises(ValueError):
        lab.run(Recipe("one"), seed=1)
    next(iter(lab.start.values())).add_(1)
    with pytest.raises(ValueError):
        lab.run(Recipe("one"))


def test_noise_flips_its_share_of_the_labels_and_thumbs_keep_their_share_of_downs(lab):
    plain = lab.rows(Recipe("a"), 0)
    for share in (0.25, 0.5, 1.0):
        noisy = zip(plain, lab.rows(Recipe("b", noise=share), 0), strict=True)
        flipped = [(a["chosen"], a["rejected"]) == (b["rejected"], b["chosen"]) for a, b in noisy]
        assert np.mean(flipped) == pytest.approx(share, abs=0.05)
        rows = lab.rows(Recipe("c", method="thumbs", pairs=20, downs=share), 0)
        ups = [row["completion"] for row in rows if row["label"]]
        assert ups == [pair["chosen"] for pair in plain[:20]] and len(rows) == 20 * (1 + share)
    assert lab.rows(Recipe("a"), 1) != plain


@pytest.mark.parametrize("method", ["preferences", "chosen", "thumbs", "reinforce"])
def test_every_method_trains_and_is_shown(lab, method, capsys):
    (run,) = lab.run_all([Recipe("mine", method=method)])["mine"]
    assert len(run["history"]) == 4 and run["points"][-1]["kl"] > 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].split() == grid.SHOWN and shown[-1].startswith("mine")


def test_intervals_over_seeds_by_hand():
    mean, low, high = grid.across_seeds([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.302653 / 3**0.5)) and low < mean
    assert grid.across_seeds([0.5]) == (0.5, 0.5, 0.5)
    one, *rest = ([{"points": [{"true": 0.5, "kl": kl}]}] for kl in (0.1, 0.2, 0.3))
    assert "±" not in grid.table({"DPO": one}) and "0.100" in grid.table({"DPO": one})
    assert "0.200 ± 0.248" in grid.table({"DPO": one + sum(rest, [])})


def test_the_reward_model_ranks_pairs_it_has_not_seen(start):
    ours = load_policy(start[0], adapter=start[1])
    reward = fit_reward_model(*ours, world.preferences(n=300), start[0])
    rows, _ = tokenize_all(world.preferences("test", n=60), ours[1], 128)
    sides = ([(r["prompt_ids"], r[f"{side}_ids"]) for r in rows] for side in ("chosen", "rejected"))
    chosen, rejected = map(reward, sides)
    assert (chosen > rejected).float().mean() > 0.9


@pytest.mark.parametrize("level", [0.0, 1000.0])  # a constant is no news: the baseline takes it off
def test_reinforce_raises_what_is_rewarded_and_beta_holds_it_back(start, level):
    def short(rows):  # an odd taste, so that nothing else explains the change
        return torch.tensor([level - len(answer) for _, answer in rows])

    def history(beta):
        profile = replace(start[0], steps=8, learning_rate=1e-3, beta=beta)
        questions = [{"prompt": fact.question} for fact in world.facts("train")[:40]]
        ours = load_policy(profile, adapter=start[1])
        return train_reinforce(*ours, questions, profile, reward=short)

    free, held = history(0.01), history(100.0)
    assert free[-1]["reward"] > free[0]["reward"] + 1 and abs(held[-1]["kl"]) < abs(free[-1]["kl"])
