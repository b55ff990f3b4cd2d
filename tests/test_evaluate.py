"""Numbers of the evaluation against enumeration, hand and brute force."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit
from small import SHAPE, random_items, small_model

from dpo_utils import evaluate as E
from dpo_utils import world
from dpo_utils.experiments import limits as L
from dpo_utils.logps import plain_logps
from dpo_utils.models import as_reference, load_policy, trainable
from dpo_utils.tokens import encode_completion, encode_prompt

RNG = np.random.default_rng(0)
QUESTIONS = [fact.question for fact in world.facts("test")]
PAD = SimpleNamespace(pad_token_id=2)  # all that sampled_kl asks of a tokenizer
ESTIMATES = ("k1", "k3", "full")


@pytest.fixture(scope="module")
def bundled(tiny):
    """(model, tokenizer) of the bundled model; the policy is the reference."""
    return load_policy(tiny)


def test_a_bootstrap_interval_covers_as_often_as_it_says():
    hits = [E.bootstrap(RNG.random(60) < 0.7, resamples=300, seed=i)[1:] for i in range(200)]
    assert 0.88 < np.mean([low <= 0.7 <= high for low, high in hits]) < 0.99
    with pytest.raises(ValueError, match="no values"):
        E.bootstrap([])


def test_a_bootstrap_keeps_rows_and_groups_together():
    ratio = E.bootstrap([[1, 1], [2, 2], [3, 3]], lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
    assert ratio == (1.0, 1.0, 1.0)
    values, groups = np.repeat([0.0, 1.0] * 5, 20), np.repeat(np.arange(10), 20)
    alone, together = E.bootstrap(values), E.bootstrap(values, groups=groups)
    assert together[2] - together[1] == pytest.approx(20**0.5 * (alone[2] - alone[1]), rel=0.2)
    assert E.bootstrap(values, groups=range(200)) == alone  # groups of one change nothing
    assert E.bootstrap([1, 1, 1, 0], groups=["p", "p", "p", "q"]) == (0.75, 0.0, 1.0)


def test_a_tie_is_half_a_win():
    assert E.wins([1, 2, 3], [2, 2, 2]).tolist() == [0.0, 0.5, 1.0]


def test_surface_baselines_find_what_is_on_the_surface_and_only_that():
    rows = [{"chosen": f"good {i}", "rejected": f"bad thing {i}"} for i in range(40)]
    flipped = [{"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    same = [{"chosen": "same words", "rejected": "words same"}] * 20
    cases = ((rows, rows, 1), (flipped, flipped, 1), (rows, flipped, 0), (same, same, 0.5))
    for train, held_out, rate in cases:
        hits = E.surface_baselines(train, held_out)
        assert hits["length"].mean() == hits["bag of words"].mean() == rate


def test_a_policy_that_is_its_reference_has_moved_nowhere(bundled, tiny):
    table = E.preference_table(*bundled, world.preferences("test", n=12), tiny)
    assert not table["margins"].any() and (E.wins(table["margins"], 0) == 0.5).all()
    assert table["row"].tolist() == list(range(1, 13))
    found = E.sampled_kl(*bundled, E.sample_ids(*bundled, QUESTIONS[:4], max_new_tokens=8))
    assert not any(found[name].any() for name in ESTIMATES)


def test_samples_are_seeded_and_end_in_one_eos_or_are_cut(bundled):
    model, tokenizer = bundled
    prompts, options = QUESTIONS[:8], {"n": 3, "max_new_tokens": 20}
    model.train()
    one, again, other = (E.sample_ids(*bundled, prompts, seed=s, **options) for s in (3, 3, 4))
    assert one == again != other and model.training
    assert [prompt for prompt, _ in one[::3]] == [encode_prompt(q, tokenizer) for q in prompts]
    for _, ids in one:
        assert tokenizer.eos_token_id not in ids[:-1]
        assert ids[-1] == tokenizer.eos_token_id or len(ids) == 20
    assert 2 < sum(ids[-1] == tokenizer.eos_token_id for _, ids in one) < 22
    texts = E.sample(*bundled, prompts, seed=3, **options)
    assert texts[2][1] == tokenizer.decode(one[7][1], skip_special_tokens=True).strip()


def test_greedy_answers_do_not_depend_on_their_neighbours(bundled):
    options = {"temperature": 0, "max_new_tokens": 16}
    together = E.sample_ids(*bundled, QUESTIONS[::5], **options)  # prompts of all lengths
    assert together == [E.sample_ids(*bundled, [q], **options)[0] for q in QUESTIONS[::5]]


def test_the_probability_of_truth_is_a_sum_and_the_rate_among_samples(bundled, tiny):
    model, tokenizer = bundled
    p, n = E.true_probability(model, tokenizer, tiny, QUESTIONS), 12
    answers = [encode_completion(text, tokenizer) for text in world.true_answers(QUESTIONS[5])]
    with torch.no_grad():
        items = [(encode_prompt(QUESTIONS[5], tokenizer), answers)]
        logps = plain_logps(model, items, tokenizer.pad_token_id)
    assert p[5] == pytest.approx(logps.double().exp().sum().item(), rel=1e-4)
    scores = E.world_scores(model, tokenizer, tiny)
    assert scores["true"].shape == scores["fluent"].shape == (len(QUESTIONS), n)
    error = np.sqrt((p * (1 - p) / n).sum()) / len(p)
    assert 0.1 < p.mean() < 0.9 and abs(scores["true"].mean() - p.mean()) < 4 * error
    assert (scores["true"] <= scores["fluent"]).all() and 0 < scores["careful"].mean() < 1


@torch.no_grad()
def both_logps(model, answers):
    """Log-probs of (prompt ids, answer ids) under policy and reference, by the definition."""
    items = [(prompt, [answer]) for prompt, answer in answers]
    policy = plain_logps(model, items, PAD.pad_token_id).numpy()
    with as_reference(model):
        return policy, plain_logps(model, items, PAD.pad_token_id).numpy()


@pytest.mark.parametrize("length", [1, 2])
def test_weighted_by_their_probability_all_answers_give_the_exact_kl(length, monkeypatch):
    monkeypatch.setitem(SHAPE, "vocab_size", 23)
    model = small_model()
    answers = [([5, 9], list(ids)) for ids in product(range(23), repeat=length)]
    policy, reference = both_logps(model, answers)
    p = np.exp(policy)
    exact = np.sum(p * (policy - reference))
    found = E.sampled_kl(model, PAD, answers, batch=100)
    assert p.sum() == pytest.approx(1) and exact > 0.01 and (found["tokens"] == length).all()
    for name in ESTIMATES:
        assert np.sum(p * found[name]) == pytest.approx(exact, rel=1e-4), name


def test_k1_is_the_log_ratio_k3_is_never_negative_and_batches_change_nothing():
    model = small_model("llama")
    answers = [(prompt, completions[0]) for prompt, completions in random_items(9, seed=3)]
    found, alone = (E.sampled_kl(model, PAD, answers, batch=n) for n in (4, 1))
    policy, reference = both_logps(model, answers)
    assert found["k1"] == pytest.approx(policy - reference, abs=1e-4) and (found["k1"] < 0).any()
    assert (found["k3"] >= 0).all()
    for name in ESTIMATES:
        assert found[name] == pytest.approx(alone[name], rel=1e-6)


def test_the_estimates_agree_on_samples_of_the_policy(tiny):
    model, tokenizer = load_policy(tiny)
    for parameter in trainable(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(1))
    drawn = E.sample_ids(model, tokenizer, QUESTIONS, n=2, max_new_tokens=24)
    found = E.sampled_kl(model, tokenizer, drawn, batch=64)
    full, error = E.mean_and_error(found["full"])
    assert full > 10 * error > 0 and found["full"].std() < found["k1"].std()
    for name in ("k1", "k3"):
        gap, error = E.mean_and_error(found[name] - found["full"])
        assert abs(gap) < 4 * error, name
    assert E.mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, (7 / 3) ** 0.5))
    assert E.mean_and_error([3.0]) == (3.0, 0.0)


@pytest.mark.parametrize("tilt", [-1.0, 0.7, 3.0])
def test_no_other_way_to_the_same_rate_is_cheaper(tilt):
    p0 = np.array([0.05, 0.3, 0.5, 0.9])
    (rate,), (least,) = L.least_kl(p0, [tilt])
    same_rate = {"type": "eq", "fun": lambda p: p.mean() - rate}
    bounds = [(1e-6, 1 - 1e-6)] * 4
    fit = minimize(
        lambda p: L.binary_kl(p, p0).mean(), p0, bounds=bounds, constraints=same_rate, tol=1e-12
    )
    assert fit.success and least == pytest.approx(fit.fun, rel=1e-4)
    assert np.isfinite(L.least_kl([0, 1], [tilt])).all() and L.binary_kl(1, 0.5) == np.log(2)
    assert L.above_limit(rate, least + 0.3, p0) == pytest.approx(0.3, abs=1e-5)


def test_best_of_n_as_simulated():
    answers = np.array([0.1, 0.15, 0.4, 0.35])  # the first two are true
    drawn = RNG.choice(4, size=(200_000, 3), p=answers)
    kept = drawn[np.arange(len(drawn)), (drawn < 2).argmax(1)]  # the first true one, else the first
    found = np.bincount(kept) / len(kept)
    rate, kl = L.best_of_n([0.25], 3)
    assert rate == pytest.approx((kept < 2).mean(), abs=0.005)
    assert kl == pytest.approx(np.sum(found * np.log(found / answers)), abs=0.01)


def test_margins_of_the_right_size_are_calibrated_and_others_are_not():
    size = np.abs(RNG.normal(0, 2, 20_000))
    margins = np.where(RNG.random(20_000) < expit(size), size, -size)
    right, loud, shy = (E.calibration(scale * margins) for scale in (1, 4, 0.25))
    assert right["ece"] < 0.015 < 0.1 < min(loud["ece"], shy["ece"])
    assert right["brier"] < min(loud["brier"], shy["brier"], 0.25)


def test_calibration_by_hand():
    found = E.calibration([np.log(3), -np.log(9), 0])  # sigma: 3/4, 1/10, 1/2
    assert found["brier"] == pytest.approx((1 / 16 + 81 / 100 + 1 / 4) / 3)
    assert found["ece"] == pytest.approx((1 / 4 + 9 / 10 + 0) / 3)
    assert found["confidence"] == pytest.approx([0.5, 0.75, 0.9])
    assert found["accuracy"].tolist() == [0.5, 1, 0]
    two = E.calibration([np.log(3), -np.log(9), 0], bins=2)  # {1/2, 3/4} and {9/10}
    assert two["ece"] == pytest.approx((2 * (0.75 - 0.625) + 0.9) / 3)
    ties = np.repeat([1.0, -1.0], 20)  # whatever their order, right is half of each bin
    for margins in (ties, RNG.permutation(ties)):
        assert E.calibration(margins)["accuracy"] == pytest.approx([0.5] * 8)
    with pytest.raises(ValueError, match="at least one pair"):
        E.calibration([])
