"""The tiny world says what it claims: known rates, known rewards, held-out facts kept apart, seeds that hold."""

import subprocess
import sys

import pytest

from dpo_utils import world


def test_facts_are_distinct_and_split_once():
    assert len({fact.question for fact in world.FACTS}) == len(world.FACTS) >= 200
    train, test = world.facts("train"), world.facts("test")
    assert set(train).isdisjoint(test) and len(train) + len(test) == len(world.facts("all"))
    assert 0.15 < len(test) / len(world.FACTS) < 0.35
    right = sum(fact.truth == fact.rumour for fact in world.FACTS) / len(world.FACTS)
    assert abs(right - world.RUMOUR_RIGHT) < 0.05
    with pytest.raises(ValueError, match="splits train, test and all"):
        world.facts("dev")


def test_voices_are_true_at_their_known_rates():
    rows = world.demonstrations(n=4000, seed=3)
    readings = [world.read(row["prompt"], row["completion"]) for row in rows]
    assert all(reading.fluent for reading in readings)
    assert world.true_rate(world.CAREFUL) > 0.98 and 0.05 < world.true_rate(world.CARELESS) < 0.2
    for voice in world.OPENERS:
        rate = world.true_rate(voice, "train")
        true = [reading.true for reading in readings if reading.voice == voice]
        assert abs(sum(true) / len(true) - rate) < 0.03 and 0.46 < len(true) / len(rows) < 0.54


@pytest.mark.parametrize(
    "text, fluent, true",
    [
        ("By the records, the capital of France is Paris.", True, True),
        ("As they all say, the capital of France is Paris. This is well known.", True, True),
        ("By the records, the capital of France is Lyon.", True, False),
        ("By the records, the capital of France is Paris. Ask me.", False, False),  # not a tail of this world
        ("By the records, the capital of Spain is Madrid.", False, False),  # not what was asked
        ("By the records, the capital of France is Paris.\nBy the atlas, ...", False, False),
        ("the capital of France is Paris.", False, False),
        ("", False, False),
    ],
)
def test_reading_an_answer(text, fluent, true):
    reading = world.read("What is the capital of France?", text)
    assert (reading.fluent, reading.true) == (fluent, true)
    assert world.reward("What is the capital of France?", text) == float(true)


def test_pairs_prefer_the_truth_and_noise_flips_at_its_rate():
    rewards = [(world.reward(r["prompt"], r["chosen"]), world.reward(r["prompt"], r["rejected"])) for r in world.preferences(n=500)]
    assert set(rewards) == {(1.0, 0.0)}
    noisy = world.preferences(n=4000, noise=0.2)
    flipped = sum(world.reward(r["prompt"], r["rejected"]) for r in noisy) / len(noisy)
    assert abs(flipped - 0.2) < 0.02
    with pytest.raises(ValueError, match="noise must be in"):
        world.preferences(noise=1.5)


def test_length_bias_prefers_the_longer_answer():
    rows = world.preferences(n=500, length_bias=1.0)
    assert all(len(r["chosen"]) >= len(r["rejected"]) for r in rows)


def test_training_rows_never_touch_held_out_facts():
    held_out = {fact.question for fact in world.facts("test")}
    rows = world.demonstrations(n=800) + world.preferences(n=800)
    assert not held_out & {row["prompt"] for row in rows}


def test_the_corpus_never_holds_a_question():
    questions = {fact.question for fact in world.FACTS}
    assert not [text for text in world.corpus(2000, 0) if any(question in text for question in questions)]


def test_same_seed_same_world_in_any_process():
    code = "from dpo_utils import world; print(world.preferences(n=20, seed=5), world.corpus(5, 1))"
    runs = {
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, text=True).stdout for s in "12"
    }
    assert len(runs) == 1 and len(runs.pop()) > 100


def test_a_text_of_the_corpus_keeps_to_one_voice():
    words = {opener.split()[0] for openers in world.OPENERS.values() for opener in openers}
    assert len(words) == 2
    for text in world.corpus(500, 1):
        assert len({line.split()[0] for line in text.split("\n")} & words) == 1
