"""The tiny world says what it claims: known rates, known rewards, held-out facts, fixed seeds."""

import hashlib
import json
from statistics import mean

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
    rates = {"careful": 1 - 0.01 * (1 - right), "careless": right + 0.02 * (1 - right)}
    assert all(reading.fluent for reading in readings)
    for voice, rate in rates.items():
        true = [reading.true for reading in readings if reading.voice == voice]
        assert mean(true) == pytest.approx(rate, abs=0.015)
        assert 0.46 < len(true) / len(rows) < 0.54


@pytest.mark.parametrize(
    "text, fluent, true",
    [
        ("By the records, the capital of France is Paris.", True, True),
        ("As they all say, the capital of France is Paris. This is well known.", True, True),
        ("By the records, the capital of France is Lyon.", True, False),
        ("By the records, the capital of France is Paris. Ask me.", False, False),  # no such tail
        ("By the records, the capital of Spain is Madrid.", False, False),  # not what was asked
        ("By the records, the capital of France is Paris.\nBy the atlas, ...", False, False),
        ("", False, False),
    ],
)
def test_reading_an_answer(text, fluent, true):
    question = "What is the capital of France?"
    assert world.read(question, text)[1:] == (fluent, true)
    assert (text in world.true_answers(question)) == true


def test_in_every_pair_the_true_answer_is_chosen_over_a_false_one():
    for row in world.preferences(n=500):
        chosen, rejected = (world.read(row["prompt"], row[s]) for s in ("chosen", "rejected"))
        assert chosen.true and rejected.fluent and not rejected.true


def test_training_rows_hold_no_held_out_fact_and_the_corpus_no_question():
    rows = world.demonstrations(n=800) + world.preferences(n=800)
    assert not {row["prompt"] for row in rows} & {fact.question for fact in world.facts("test")}
    for text in world.corpus(500, 1):
        assert "?" not in text
        assert len({line.split()[0] for line in text.split("\n")} & {"By", "As"}) == 1  # one voice


def test_a_seed_gives_the_same_rows_everywhere_and_always():
    rows = [world.corpus(50, 1), world.demonstrations(n=50, seed=5)]
    rows += [world.preferences(n=50, seed=5)]
    assert hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16] == "007bba27071317d9"
