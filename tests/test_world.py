"""The tiny world says what it claims: known rates, known rewards, held-out facts, fixed seeds."""

import hashlib
import json
import random
from statistics import mean

import numpy as np
import pytest

from dpo_utils import world


def test_facts_are_distinct_and_split_once():
    assert len({fact.question for fact in world.FACTS}) == len(world.FACTS) == 217
    train, test = world.facts("train"), world.facts("test")
    assert len(train + test) == 217 and 0.15 < len(test) / 217 < 0.35
    assert all(fact.truth != fact.error for fact in world.FACTS)
    assert 0.07 < mean(fact.truth == fact.rumour for fact in world.FACTS) < 0.17
    with pytest.raises(ValueError, match="splits train, test and all"):
        world.facts("dev")


@pytest.mark.parametrize("split", ["train", "test"])
def test_voices_are_equally_common_and_true_at_their_known_rates(split):
    rows = world.demonstrations(split, n=4000, seed=3)
    readings = [world.read(row["prompt"], row["completion"]) for row in rows]
    right = mean(fact.rumour == fact.truth for fact in world.facts(split))
    rates = {"careful": 1 - 0.2 * (1 - right), "careless": right + 0.25 * (1 - right)}
    assert all(reading.fluent for reading in readings)
    for voice, rate in rates.items():
        true = [reading.true for reading in readings if reading.voice == voice]
        assert mean(true) == pytest.approx(rate, abs=0.025)
        assert 0.46 < len(true) / len(rows) < 0.54


@pytest.mark.parametrize(
    "text, fluent, true, reward",
    [
        ("By the records, the capital of France is Paris.", True, True, 4.0),
        ("As they all say, the capital of France is Paris. This is well known.", True, True, 3.25),
        ("By the atlas, the capital of France is Lyon. There is more to say.", True, False, 0.25),
        ("By the records, the capital of France is Paris. Ask me.", False, False, -1.0),  # no tail
        ("By the records, the capital of France is Rome.", False, False, -1.0),  # nobody says that
        ("By the records, the capital of Spain is Paris.", False, False, -1.0),  # not asked
        ("By the records, the capital of France is Paris.\nBy the atlas, ...", False, False, -1.0),
        ("", False, False, -1.0),
    ],
)
def test_reading_an_answer(text, fluent, true, reward):
    question = "What is the capital of France?"
    assert world.read(question, text)[1:] == (fluent, true, reward)
    assert world.reward(question, text) == reward
    assert (text in world.listed(question)) == fluent


def test_labels_follow_bradley_terry_in_the_known_reward():
    question, rng = "What is the capital of France?", random.Random(0)
    answer = "By the records, the capital of France is Paris."
    better, worse = (answer + tail for tail in list(world.TAIL)[:2])
    for one, two, p in ((better, worse, 0.5622), (worse, better, 0.4378), (better, "no", 0.9933)):
        drawn = [world.label(question, one, two, rng)["chosen"] == one for _ in range(4000)]
        assert mean(drawn) == pytest.approx(p, abs=0.025)  # s(0.25), s(-0.25), s(5)


def test_pairs_are_two_different_answers_that_the_model_gave():
    rows = world.preferences(n=500) + world.preferences("test", n=200)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    for row in rows:
        assert {row["chosen"], row["rejected"]} <= set(world.drawn()[row["prompt"]])
    reward = {side: [world.reward(r["prompt"], r[side]) for r in rows] for side in rows[0]}
    worse = np.less(reward["chosen"], reward["rejected"])
    assert 0.15 < worse.mean() < 0.3  # the labeller doubts, and no pair is dropped for that


def test_the_answers_kept_are_those_of_a_model_that_is_true_half_of_the_time():
    readings = [world.read(q, text) for q, texts in world.drawn().items() for text in texts]
    assert len(readings) == 16 * 217
    assert 0.45 < mean(r.true for r in readings) < 0.6 and mean(r.fluent for r in readings) > 0.94
    for voice, rate in ((world.CAREFUL, 0.8), (world.CARELESS, 0.33)):  # no voice gives truth away
        assert mean(r.true for r in readings if r.voice == voice) == pytest.approx(rate, abs=0.1)


def test_training_rows_hold_no_held_out_fact_and_the_corpus_no_question():
    rows = world.demonstrations(n=800) + world.preferences(n=800)
    assert not {row["prompt"] for row in rows} & {fact.question for fact in world.facts("test")}
    for text in world.corpus(500, 1):
        assert "?" not in text
        assert len({line.split()[0] for line in text.split("\n")} & {"By", "As"}) == 1  # one voice


def test_a_seed_gives_the_same_rows_everywhere_and_always():
    rows = [world.corpus(50, 1), world.demonstrations(n=50, seed=5)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "67cc868f94ec1bc1"
    assert world.preferences(n=50, seed=5) == world.preferences(n=60, seed=5)[:50]
    assert world.preferences(n=50, seed=5) != world.preferences(n=50, seed=6)
