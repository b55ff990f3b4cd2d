"""Comparisons under equal conditions: every run from the same start, kept, and read back only where nothing changed."""

import dataclasses

import numpy as np
import pytest
import torch

from dpo_utils import train, world
from dpo_utils.experiments import grid, reinforce
from dpo_utils.checkpoints import SettingsChanged
from dpo_utils.models import load_policy, trainable
from dpo_utils.experiments.grid import Lab, Recipe


@pytest.fixture(scope="module")
def start(tmp_path_factory, tiny):
    """The adapter of a short SFT, and the profile of short runs."""
    profile = dataclasses.replace(tiny, sft_steps=12, steps=4, batch=8)
    model, tokenizer = load_policy(profile)
    folder = tmp_path_factory.mktemp("sft")
    train.train_sft(model, tokenizer, world.demonstrations(n=400), profile, folder)
    return profile, folder / "adapter"


@pytest.fixture(autouse=True)
def small_measures(monkeypatch):
    monkeypatch.setitem(grid.SIZES, "reduced", (24, 20, 1))


@pytest.fixture
def lab(start):
    return Lab(*start)


def test_at_the_start_nothing_has_moved(lab):
    lab.reset()
    point = lab.measure(lab.profile)
    assert point["kl"] == point["margin"] == point["chosen"] == 0.0 and point["accuracy"] == 0.5
    assert 0.0 < point["true"] < 1.0


def test_it_measures_on_as_much_as_the_grid_says(start, monkeypatch):
    monkeypatch.setenv("DPO_GRID", "full")
    full = Lab(*start)
    assert (len(full.held_out), len(full.questions), full.answers) == (150, 49, 4)
    monkeypatch.setenv("DPO_GRID", "reduced")
    reduced = Lab(*start)
    assert (len(reduced.held_out), len(reduced.questions), reduced.answers) == (24, 20, 1)


def test_the_reference_scores_the_same_pairs_once(lab, monkeypatch):
    monkeypatch.setattr(train, "_SCORED", {})
    calls, real = [], train.all_logps
    monkeypatch.setattr(train, "all_logps", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    first = lab.run(Recipe("one", pairs=16))
    again = lab.run(Recipe("one", pairs=16))
    assert len(calls) == 1 and first["points"] == again["points"]
    lab.run(Recipe("flipped", pairs=16, labels="flipped"))
    assert len(calls) == 2


def test_every_run_starts_from_the_same_place(lab):
    first = lab.run(Recipe("one"), at=(2,))
    lab.run(Recipe("another", {"learning_rate": 1e-2}))
    again = lab.run(Recipe("one"), at=(2,))
    assert [p["step"] for p in first["points"]] == [2, 4]
    assert first["points"] == again["points"] and first["points"][-1]["kl"] > 0
    unmeasured = lab.run(Recipe("one"), at=None)
    assert unmeasured["points"] == [] and unmeasured["history"][-1]["loss"] == first["history"][-1]["loss"]


def test_results_are_kept_and_read_back_only_where_nothing_changed(start, tmp_path, monkeypatch):
    kept = Lab(*start, folder=tmp_path)
    first = kept.run(Recipe("one"))
    for other in (Recipe("noisy", noise=0.5), Recipe("few", pairs=5), Recipe("hot", {"beta": 2.0})):
        kept.run(other)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(grid, "METHODS", {"preferences": None})  # a run that trains would fail now
    assert kept.run(Recipe("by another name"))["points"] == first["points"]
    with pytest.raises(TypeError):
        kept.run(Recipe("one"), seed=1)


def test_labels_and_noise_do_what_they_say(lab):
    plain, flipped = lab.pairs(Recipe("a"), 0), lab.pairs(Recipe("b", labels="flipped"), 0)
    assert all(a["chosen"] == b["rejected"] for a, b in zip(plain, flipped, strict=True))
    noisy = lab.pairs(Recipe("c", noise=0.3), 0)
    assert 0.25 < np.mean([a["chosen"] != b["chosen"] for a, b in zip(plain, noisy, strict=True)]) < 0.35
    assert len(lab.pairs(Recipe("d", pairs=7), 0)) == 7
    for wrong in ({"method": "magic"}, {"labels": "eaten"}):
        with pytest.raises(ValueError, match="it can be"):
            Recipe("e", **wrong)


def test_thumbs_keep_the_share_of_downs():
    pairs = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 20
    for share, downs in ((1.0, 20), (0.1, 2), (0.25, 5)):
        rows = grid.thumbs(pairs, share)
        assert sum(row["label"] for row in rows) == 20 and sum(not row["label"] for row in rows) == downs


def test_the_interval_over_seeds_by_hand(monkeypatch):
    mean, low, high = grid.across_seeds([1.0, 2.0, 3.0])
    assert (mean, high - mean) == (2.0, pytest.approx(4.302653 / 3**0.5)) and low < mean
    assert grid.across_seeds([0.5]) == (0.5, 0.5, 0.5)
    monkeypatch.setenv("DPO_GRID", "huge")
    with pytest.raises(ValueError, match="DPO_GRID is 'huge'"):
        grid.grid()


@pytest.mark.parametrize("method", grid.METHODS)
def test_every_method_trains_and_leaves_a_point(lab, method):
    result = lab.run(Recipe(method, method=method))
    assert len(result["history"]) == 4 and result["points"][-1]["kl"] > 0
    assert grid.line([result]).startswith("true")


# --- thumbs, one by one -----------------------------------------------------------------------------------------------


def test_kto_starts_at_one_half_and_its_labels_are_part_of_the_run(start, tmp_path):
    profile, adapter = start
    rows = grid.thumbs(world.preferences(n=20))

    def run(rows, **options):
        model, tokenizer = load_policy(profile, adapter=adapter)
        return train.train_unpaired(model, tokenizer, rows, profile, tmp_path / "kto", **options)

    history = run(rows)
    assert history[0]["loss"] == pytest.approx(0.5) and history[-1]["rewards/chosen"] > history[-1]["rewards/rejected"]
    assert run(rows) == history
    with pytest.raises(SettingsChanged, match="thumbs"):
        run([{**row, "label": not row["label"]} for row in rows])
    with pytest.raises(SettingsChanged, match="undesirable_weight"):
        run(rows, loss_options={"undesirable_weight": 3.0})
    heavier = run(rows, loss_options={"undesirable_weight": 3.0}, fresh=True)
    assert heavier[0]["loss"] > 0.6


# --- reward model and policy gradient ---------------------------------------------------------------------------------


def test_the_reward_model_ranks_pairs_it_has_not_seen(start):
    profile, adapter = start
    model, tokenizer = load_policy(profile, adapter=adapter)
    reward = reinforce.fit_reward_model(model, tokenizer, world.preferences(n=300), profile)
    rows, _ = train.tokenize_all(world.preferences("test", n=60), tokenizer, profile.max_length)
    scores = [reward([(row["prompt_ids"], row[f"{side}_ids"]) for row in rows]) for side in ("chosen", "rejected")]
    assert (scores[0] > scores[1]).float().mean() > 0.9


def test_the_policy_gradient_raises_what_is_rewarded_and_beta_holds_it_back(start):
    profile, adapter = start
    profile = dataclasses.replace(profile, steps=8, learning_rate=1e-3)
    questions = [fact.question for fact in world.facts("train")[:40]]

    def short(rows):  # an odd taste, so that nothing else explains the change
        return torch.tensor([-float(len(answer)) for _, answer in rows])

    def last_reward(beta):
        model, tokenizer = load_policy(profile, adapter=adapter)
        before = [p.detach().clone() for p in trainable(model)]
        history = reinforce.train_reinforce(model, tokenizer, questions, short, dataclasses.replace(profile, beta=beta))
        assert any(not torch.equal(a, b) for a, b in zip(before, trainable(model), strict=True))
        return history

    free, held = last_reward(0.01), last_reward(100.0)
    assert free[-1]["reward"] > free[0]["reward"] + 1 and abs(held[-1]["kl"]) < abs(free[-1]["kl"])


def test_without_several_seeds_there_is_no_interval():
    point = {"true": 0.5, "kl": 0.25}
    one, three = [{"points": [point]}], [{"points": [{**point, "kl": kl}]} for kl in (0.1, 0.2, 0.3)]
    assert "±" not in grid.table({"DPO": one}) and "0.250" in grid.table({"DPO": one})
    assert "0.200 ± 0.248" in grid.table({"DPO": three})
