"""The pairs of the controlled experiment: known rewards, and labels by Bradley-Terry in them."""

import random

import numpy as np
import pytest
from scipy.special import expit

from dpo_utils.data import load_preferences, split_by_prompt
from dpo_utils.evaluate import wins

pytest.importorskip("vaderSentiment")
from dpo_utils.experiments import controlled

SIDES = ("chosen", "rejected")


def test_the_reward_is_vaders_compound_score():
    assert [controlled.reward(x) for x in ("Good.", "Bad.", "A hotel.")] == [0.4404, -0.5423, 0]


def test_a_label_has_the_probability_of_bradley_terry():
    rng, (okay, nice) = random.Random(0), ("It was okay.", "It was nice.")
    rows = [controlled.label("How?", okay, nice, rng) for _ in range(4000)]
    gap = controlled.reward(okay) - controlled.reward(nice)
    share = np.mean([row["chosen"] == okay for row in rows])
    assert share == pytest.approx(expit(controlled.SHARPNESS * gap), abs=0.03)
    assert all(row["chosen_reward"] == controlled.reward(row["chosen"]) for row in rows)


def test_the_bundled_pairs_hold_their_rewards_and_such_labels_and_split_by_prompt():
    pairs = load_preferences(controlled.PAIRS, keep=[f"{side}_reward" for side in SIDES])
    rewards = np.array([[controlled.reward(row[side]) for side in SIDES] for row in pairs])
    assert np.array_equal(rewards.T, [pairs[f"{side}_reward"] for side in SIDES])
    better = expit(controlled.SHARPNESS * np.abs(np.diff(rewards)))
    assert wins(*rewards.T).mean() == pytest.approx(better.mean(), abs=0.04)
    train, held_out = split_by_prompt(pairs)
    assert len(held_out) == 72 and not {*train["prompt"]} & {*held_out["prompt"]}
    assert controlled.PAIRS.stat().st_size <= 300_000
