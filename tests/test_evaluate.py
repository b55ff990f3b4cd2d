"""Evaluation numbers that a person can check."""

import numpy as np
import pytest

from dpo_utils import evaluate as E
from dpo_utils import world


def test_bootstrap_covers_a_coin_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [E.bootstrap(rng.random(60) < 0.7, resamples=300, seed=i)[1:] for i in range(200)]
    covered = np.mean([low <= 0.7 <= high for low, high in hits])
    assert 0.88 < covered < 0.99
    with pytest.raises(ValueError, match="no values"):
        E.bootstrap([])


def test_bootstrap_of_constants_has_no_width_and_rows_stay_together():
    assert E.bootstrap([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    pairs = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    value, low, high = E.bootstrap(pairs, statistic=lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
    assert (value, low, high) == (1.0, 1.0, 1.0)


def test_wins_counts_ties_half():
    assert E.wins([1, 2, 3], [2, 2, 2]).tolist() == [0.0, 0.5, 1.0]


def test_surface_baselines_find_what_is_on_the_surface():
    rows = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad thing {i}"} for i in range(40)]
    hits = E.surface_baselines(rows[:30], rows[30:])
    assert hits["length"].mean() == 1.0 and hits["bag of words"].mean() == 1.0  # shorter is chosen, "good" is chosen
    flipped = E.surface_baselines(rows[:30], [E.swap(row) for row in rows[30:]])
    assert flipped["length"].mean() == 0.0 and flipped["bag of words"].mean() == 0.0


def test_surface_baselines_give_a_coin_where_there_is_nothing():
    rows = [{"prompt": f"q{i}", "chosen": "same words", "rejected": "words same"} for i in range(20)]
    assert {name: hits.mean() for name, hits in E.surface_baselines(rows[:10], rows[10:]).items()} == {
        "length": 0.5,
        "bag of words": 0.5,
    }


def test_shuffled_labels_flip_half_and_touch_nothing_else():
    rows = world.preferences(n=1000)
    mixed = E.shuffled(rows, seed=1)
    flipped = np.mean([a["chosen"] == b["rejected"] for a, b in zip(rows, mixed, strict=True)])
    assert 0.45 < flipped < 0.55
    assert all({a["chosen"], a["rejected"]} == {b["chosen"], b["rejected"]} for a, b in zip(rows, mixed, strict=True))


def test_a_policy_that_is_its_reference_has_zero_margins_and_one_half(tiny):
    from dpo_utils.models import load_policy

    model, tokenizer = load_policy(tiny)
    table = E.preference_table(model, tokenizer, world.preferences("test", n=12), tiny)
    assert np.abs(table["margins"]).max() == 0.0 and E.wins(table["margins"], 0).mean() == 0.5
    assert table["row"].tolist() == list(range(1, 13))


def test_sampling_is_seeded_shaped_and_restores_the_mode(tiny):
    from dpo_utils.models import load_policy

    model, tokenizer = load_policy(tiny)
    model.train()
    prompts = [fact.question for fact in world.facts("test")[:3]]
    one = E.sample(model, tokenizer, prompts, n=2, max_new_tokens=8, seed=1)
    assert [len(answers) for answers in one] == [2, 2, 2] and model.training
    assert one == E.sample(model, tokenizer, prompts, n=2, max_new_tokens=8, seed=1)
    assert one != E.sample(model, tokenizer, prompts, n=2, max_new_tokens=8, seed=2)
    greedy = E.sample(model, tokenizer, prompts, n=2, temperature=0, max_new_tokens=8)
    assert all(a == b for a, b in greedy)
