"""What a policy is worth: against sums by hand, brute force, and the bundled model's samples."""

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import entropy

from dpo_utils import exact, world
from dpo_utils.evaluate import sample
from dpo_utils.models import load_policy

REF = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
REWARD = np.array([[1.0, 2.0, 0.0], [0.0, 3.0, 3.0]])


@pytest.fixture(scope="module")
def bundled(tiny):
    """The base model, which hardly ever answers a question."""
    return load_policy(tiny)


def draw(p, n, rng):
    return np.array([rng.choice(3, n, p=row) for row in p])  # (questions, n)


@pytest.mark.parametrize("beta", [0.2, 1.0, 5.0])
def test_the_optimum_has_more_reward_minus_kl_than_any_other_policy(beta):
    best, rng = exact.optimum(REF, REWARD, beta), np.random.default_rng(0)

    def value(p):
        return exact.expected(p, REWARD) - beta * exact.kl(p, REF)

    z = (REF * np.exp(REWARD / beta)).sum(1)
    assert value(best) == pytest.approx(beta * np.log(z).mean())  # the value of the optimum
    for p in [rng.dirichlet(np.ones(3), 2) for _ in range(200)] + [REF]:
        missing = beta * exact.kl(p, best)  # the step that notebook 03 takes
        assert value(best) - value(p) == pytest.approx(missing) and missing > 0


def test_kl_and_least_kl():
    p = np.array([[0.5, 0.5, 0.0], [0.1, 0.2, 0.7]])
    assert exact.kl(p, REF) == pytest.approx(entropy(p.T, REF.T).mean())
    rewards, kls = exact.least_kl(REF, REWARD, [1e6, 1.0, 0.3, 0.01])
    assert (np.diff(rewards) > 0).all() and (np.diff(kls) > 0).all()
    assert kls[0] == pytest.approx(0, abs=1e-9) and rewards[-1] == pytest.approx(2.5, abs=1e-6)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_best_of_n_as_drawn(n):
    rng = np.random.default_rng(1)
    drawn = np.array([draw(REF, n, rng) for _ in range(6000)])  # (times, questions, n)
    worth = np.take_along_axis(REWARD[None], drawn.transpose(1, 0, 2).reshape(1, 2, -1), 2)
    kept = worth.reshape(2, 6000, n).max(2).mean()
    reward, kl = exact.best_of_n(REF, REWARD, n)
    assert reward == pytest.approx(kept, abs=0.03)
    assert 0 <= kl <= np.log(n) - (n - 1) / n + 1e-12


def test_labelled_pairs_and_their_ceiling_as_drawn():
    pairs, rng = exact.labelled(REF, REWARD), np.random.default_rng(2)
    assert np.allclose(pairs.sum((1, 2)), 1) and np.allclose(np.einsum("qii->qi", pairs), 0)
    one, two = draw(REF, 40_000, rng), draw(REF, 40_000, rng)
    q = np.arange(2)[:, None]
    first = rng.random(one.shape) < expit(REWARD[q, one] - REWARD[q, two])
    chosen, rejected, used = np.where(first, one, two), np.where(first, two, one), one != two
    found = [(chosen[0] == i)[used[0]].mean() for i in range(3)]
    assert np.allclose(pairs[0].sum(1), found, atol=0.01)
    right = (np.sign(REWARD[q, chosen] - REWARD[q, rejected]) + 1) / 2
    seen = np.mean([right[i][used[i]].mean() for i in range(2)])
    assert exact.accuracy(pairs, REWARD) == pytest.approx(seen, abs=0.01)
    assert exact.accuracy(pairs, rng.normal(size=REWARD.shape)) <= exact.accuracy(pairs, REWARD)


def test_rewards_truths_and_lengths_belong_to_the_listed_answers(bundled):
    questions = [fact.question for fact in world.facts("test")][:3]
    reward, true = exact.rewards(questions), exact.truths(questions)
    assert reward.shape == true.shape == (3, 37) and (true.sum(1) == 18).all()
    assert (reward[:, -1] == world.NOT_FLUENT).all() and (reward[true == 1] >= 3).all()
    lengths = exact.lengths(questions, bundled[1])
    assert lengths[1, 4] == 1 + len(bundled[1](world.listed(questions[1])[4])["input_ids"])


def test_probabilities_are_those_of_samples(bundled, tiny):
    questions = [fact.question for fact in world.facts("test")][:2]
    p = exact.probabilities(*bundled, tiny, questions)
    assert np.allclose(p.sum(1), 1) and (p > 0).all()
    drawn = sample(*bundled, questions, n=400, max_new_tokens=tiny.max_new_tokens)
    asked = zip(questions, drawn, strict=True)
    listed = np.mean([text in world.listed(q) for q, texts in asked for text in texts])
    assert listed == pytest.approx(1 - p[:, -1].mean(), abs=0.08)


def test_masses_say_where_the_probability_is():
    question = "What is the capital of France?"
    answers = world.listed(question)
    pair = {"prompt": question, "chosen": answers[0], "rejected": answers[3]}
    p = np.arange(37.0)[None] / 666
    found = exact.masses(p, [pair])
    assert sum(found.values()) == pytest.approx(1)
    assert found["chosen mass"] == 0 and found["rejected mass"] == pytest.approx(3 / 666)
    assert found["not fluent mass"] == pytest.approx(36 / 666)
    assert found["other true mass"] == pytest.approx(exact.expected(p, exact.truths([question])))
    garbled = exact.masses(p, [pair | {"rejected": "gibberish"}])
    assert garbled["rejected mass"] == pytest.approx(36 / 666) and garbled["not fluent mass"] == 0
