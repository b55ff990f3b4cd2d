"""Runs start from the same place and are kept; methods, labels and seeds; REINFORCE."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_utils import exact, world
from dpo_utils.experiments import grid
from dpo_utils.experiments.grid import Lab, Recipe, draw_pairs
from dpo_utils.experiments.reinforce import fit_reward_model, train_reinforce
from dpo_utils.models import load_policy
from dpo_utils.train import train_sft


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny):
    """The profile of short runs, and the adapter of a short SFT."""
    profile, folder = replace(tiny, sft_steps=12, steps=4, batch=8), tmp_path_factory.mktemp("sft")
    train_sft(*load_policy(profile), world.demonstrations(n=400), profile, folder)
    return profile, folder / "adapter"


@pytest.fixture
def lab(start, tmp_path):
    return Lab(*start, tmp_path)


def test_every_run_starts_from_the_same_place(lab, tmp_path):
    first = lab.run(Recipe("one", at=(0, 2)))
    point = first["points"][0]
    assert point["kl"] == 0.0 and point["accuracy"] == 0.5
    lab.run(Recipe("another", {"learning_rate": 1e-2}))
    lab.folder = tmp_path / "elsewhere"
    assert lab.run(Recipe("one", at=(0, 2)))["points"] == first["points"]
    assert [p["step"] for p in first["points"]] == [0, 2, 4] and first["points"][1]["kl"] > 0


def test_results_are_kept_and_read_back_only_where_nothing_changed(lab, monkeypatch):
    first = lab.run(Recipe("one"))
    fewer = Recipe("b", data=lambda seed: draw_pairs(seed)[:50])
    for other in (Recipe("a", mass=True), fewer, Recipe("c", {"beta": 2.0})):
        lab.run(other)
    assert len(list(lab.folder.iterdir())) == 4
    monkeypatch.setattr(grid, "METHODS", {})  # whatever trains would fail now
    assert lab.run(Recipe("by another name")) == {**first, "name": "by another name"}
    with pytest.raises(ValueError, match="recipe 'one': there is no method 'preferences'"):
        lab.run(Recipe("one"), seed=1)
    next(iter(lab.start.values())).add_(1)
    with pytest.raises(ValueError):
        lab.run(Recipe("one"))


def test_thumbs_keep_their_share_of_downs():
    pairs = draw_pairs(0)[:20]
    for share in (0.25, 0.5, 1.0):
        rows = grid.thumbs(pairs, share)
        ups = [row["completion"] for row in rows if row["label"]]
        assert ups == [pair["chosen"] for pair in pairs] and len(rows) == 20 * (1 + share)
    assert draw_pairs(1) != draw_pairs(0)


@pytest.mark.parametrize("method", list(grid.METHODS))
def test_every_method_trains_on_what_it_reads(lab, method):
    data = {"thumbs": lambda seed: grid.thumbs(draw_pairs(seed)[:60])}.get(method, draw_pairs)
    run = lab.run(Recipe("mine", data=data, method=method))
    assert len(run["history"]) == 4 and run["points"][-1]["kl"] > 0


def test_several_processes_give_what_one_gives_and_every_seed_its_own(lab, monkeypatch, capsys):
    monkeypatch.setenv("DPO_SEEDS", "2")
    recipes = [Recipe("one", mass=True), Recipe("two", {"beta": 0.1})]
    results = lab.run_all(recipes)
    shown = capsys.readouterr().out.splitlines()
    assert shown[-3].split() == grid.SHOWN and shown[-1].startswith("two") and "±" in shown[-1]
    assert [run["seed"] for run in results["two"]] == [0, 1]
    assert lab.run_all(recipes[:1], over=range(1, 2))["one"] == results["one"][1:]
    for path in lab.folder.iterdir():
        path.unlink()  # or it would only be read
    again = lab.run(recipes[0], seed=1)
    assert again["points"][0]["reward"] == pytest.approx(results["one"][1]["points"][0]["reward"])
    masses = [again["points"][0][name] for name in ("chosen mass", "rejected mass")]
    assert all(0 < mass < 1 for mass in masses)


def test_intervals_over_seeds_by_hand():
    mean, low, high = grid.across_seeds([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.302653 / 3**0.5)) and low < mean
    assert grid.across_seeds([0.5]) == (0.5, 0.5, 0.5)
    ends = [{"points": [dict.fromkeys(grid.SHOWN, kl)]} for kl in (0.1, 0.2, 0.3)]
    assert "±" not in grid.table({"DPO": ends[:1]}) and "0.100" in grid.table({"DPO": ends[:1]})
    assert "0.20±0.25" in grid.table({"DPO": ends})


def test_the_reward_model_ranks_answers_to_questions_it_has_not_seen(start):
    ours, rng = load_policy(start[0], adapter=start[1]), random.Random(0)
    rows, asked = [], [fact.question for fact in world.facts("test")[:12]]
    for fact in rng.choices(world.facts("train"), k=300):  # the careful voice is always preferred
        careful, careless = np.array(world.listed(fact.question)).reshape(2, 18)
        sides = {"chosen": rng.choice(careful).item(), "rejected": rng.choice(careless).item()}
        rows.append({"prompt": fact.question, **sides})
    items = exact.listed_items(ours[1], asked)
    reward = fit_reward_model(*ours, rows, start[0])
    scores = reward([(prompt, a) for prompt, answers in items for a in answers]).view(12, 2, 18)
    assert (scores[:, 0].amin(1) > scores[:, 1].amax(1)).all()


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
