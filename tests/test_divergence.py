"""KL against enumeration, limits against brute force, calibration against data whose calibration is known."""

from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from scipy.special import expit
from small import SHAPE, random_items, small_model

from dpo_utils import divergence as D
from dpo_utils import evaluate, world
from dpo_utils.logps import plain_logps
from dpo_utils.models import as_reference, load_policy, trainable

PAD = SimpleNamespace(pad_token_id=2)  # all that is asked of a tokenizer
ESTIMATES = ("k1", "k3", "full")
RNG = np.random.default_rng(0)


@torch.no_grad()
def both_logps(model, answers):
    """Log-probs of the answers under policy and reference, by the definition."""
    items = [(prompt, [answer]) for prompt, answer in answers]
    policy = plain_logps(model, items, PAD.pad_token_id)
    with as_reference(model):
        return policy.numpy(), plain_logps(model, items, PAD.pad_token_id).numpy()


# --- KL by sampling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2])
def test_weighed_by_their_probability_all_answers_give_the_exact_kl(length, monkeypatch):
    monkeypatch.setitem(SHAPE, "vocab_size", 23)
    model, prompt = small_model(), [5, 9]
    answers = [(prompt, list(ids)) for ids in product(range(23), repeat=length)]
    policy, reference = both_logps(model, answers)
    p = np.exp(policy)
    exact = float(np.sum(p * (policy - reference)))
    found = D.sampled_kl(model, PAD, answers, batch=100)
    assert p.sum() == pytest.approx(1) and exact > 0.01
    assert {name: float(np.sum(p * found[name])) for name in ESTIMATES} == pytest.approx(dict.fromkeys(ESTIMATES, exact), rel=1e-4)
    assert (found["tokens"] == length).all()
    if length == 1:  # no matter which token was drawn
        assert found["full"] == pytest.approx(np.full(23, exact), rel=1e-4)


@torch.no_grad()
def test_every_answer_by_hand():
    model = small_model("llama")
    answers = [(prompt, completions[0]) for prompt, completions in random_items(7, seed=3)]
    found = D.sampled_kl(model, PAD, answers, batch=4)
    policy, reference = both_logps(model, answers)
    assert found["k1"] == pytest.approx(policy - reference, abs=1e-4)
    for i, (prompt, answer) in enumerate(answers):
        where = slice(len(prompt) - 1, -1)
        log_p = model(torch.tensor([prompt + answer])).logits[0, where].log_softmax(-1)
        with as_reference(model):
            log_q = model(torch.tensor([prompt + answer])).logits[0, where].log_softmax(-1)
        ratio = (log_q - log_p).gather(1, torch.tensor(answer)[:, None])  # log ref/policy of the tokens drawn
        assert found["k3"][i] == pytest.approx((ratio.exp() - 1 - ratio).sum().item(), abs=1e-4)
        full = F.kl_div(log_q, log_p, log_target=True, reduction="sum").item()
        assert found["full"][i] == pytest.approx(full, abs=1e-4)
    assert found["tokens"].tolist() == [len(answer) for _, answer in answers]


def test_the_batch_size_changes_nothing():
    model = small_model()
    answers = [(prompt, completions[0]) for prompt, completions in random_items(10, seed=4)]
    one, other = (D.sampled_kl(model, PAD, answers, batch=n) for n in (1, 7))
    for name in ESTIMATES:
        assert one[name] == pytest.approx(other[name], rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_adapter_are_left_as_they_were(training):
    model, answers = small_model().train(training), [([5, 9], [7, 8])]
    before, modes = both_logps(model, answers), []
    hook = model.register_forward_hook(lambda *_: modes.append(model.training))
    D.sampled_kl(model, PAD, answers)
    hook.remove()
    assert modes == [False, False] and model.training is training
    assert (before[0] == both_logps(model, answers)[0]).all() and before[0] != before[1]


def test_a_policy_that_is_its_reference_has_no_kl(tiny):
    model, tokenizer = load_policy(tiny)
    answers = evaluate.sample_ids(model, tokenizer, [fact.question for fact in world.facts("test")[:4]], max_new_tokens=8)
    found = D.sampled_kl(model, tokenizer, answers)
    assert all((found[name] == 0).all() for name in ESTIMATES)


def test_the_three_estimates_agree_on_samples(tiny):
    model, tokenizer = load_policy(tiny)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    prompts = [fact.question for fact in world.facts("test")]
    found = D.sampled_kl(model, tokenizer, evaluate.sample_ids(model, tokenizer, prompts, n=4, max_new_tokens=24), batch=64)
    full, error = D.mean_and_error(found["full"])
    assert full > 10 * error > 0
    for name in ("k1", "k3"):
        gap, error = D.mean_and_error(found[name] - found["full"])
        assert abs(gap) < 4 * error and error < 0.2 * full, name
    assert (found["k3"] >= 0).all() and (found["full"] >= -1e-5).all() and (found["k1"] < 0).any()
    assert found["full"].std() < found["k1"].std()


def test_mean_and_error_by_hand():
    assert D.mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, np.sqrt(7 / 3)))


# --- the least KL -----------------------------------------------------------------------------------------------------


def test_binary_kl_by_hand_and_at_its_ends():
    assert D.binary_kl(0.8, 0.5) == pytest.approx(0.8 * np.log(1.6) + 0.2 * np.log(0.4))
    found = D.binary_kl([1, 0, 0, 1, 0.5, 1, 0.3], [0.25, 0.25, 0, 1, 0, 0, 0.3])
    assert found == pytest.approx([np.log(4), np.log(4 / 3), 0, 0, np.inf, np.inf, 0])


@pytest.mark.parametrize("tilt", [-1.0, 0.7, 3.0])
def test_no_other_way_to_the_same_rate_is_cheaper(tilt):
    p0 = np.array([0.05, 0.3, 0.5, 0.9])
    (rate,), (least,) = D.least_kl(p0, [tilt])
    fit = minimize(
        lambda p: D.binary_kl(p, p0).mean(), p0, bounds=[(1e-6, 1 - 1e-6)] * 4, tol=1e-12,
        constraints={"type": "eq", "fun": lambda p: p.mean() - rate},
    )  # fmt: skip
    assert fit.success and least == pytest.approx(fit.fun, rel=1e-4)
    others = RNG.random((5000, 4))
    others += rate - others.mean(1, keepdims=True)
    others = others[((others > 0) & (others < 1)).all(1)]
    assert len(others) > 50 and (D.binary_kl(others, p0).mean(1) >= least).all()


def test_the_least_kl_at_its_limits():
    p0 = RNG.random(20)
    rates, kls = D.least_kl(p0, [-200, 0, 200])
    assert rates == pytest.approx([0, p0.mean(), 1])
    assert kls == pytest.approx([-np.log(1 - p0).mean(), 0, -np.log(p0).mean()], abs=1e-12)
    with np.errstate(all="raise"):
        rates, kls = D.least_kl([0, 0.5, 1], np.linspace(-5, 5, 11))
    assert np.isfinite(kls).all() and (np.diff(rates) > 0).all()


def test_every_policy_is_above_the_limit_and_the_tilted_one_on_it():
    for _ in range(50):
        p0, p = RNG.random((2, 8))
        assert D.above_limit(p.mean(), D.binary_kl(p, p0).mean(), p0) >= -1e-5
        rate, kl = D.best_of_n(p0, 4)
        assert D.above_limit(rate, kl, p0) >= -1e-5
    for rate, kl in zip(*D.least_kl(p0, [-2.3456, 0, 1.2345]), strict=True):
        assert D.above_limit(rate, kl, p0) == pytest.approx(0, abs=1e-5)
        assert D.above_limit(rate, kl + 0.3, p0) == pytest.approx(0.3, abs=1e-5)
    assert D.above_limit(0.5, np.log(2), [0.25, 0.75]) == pytest.approx(np.log(2), abs=1e-5)  # the reference is there for nothing


def test_best_of_n_as_simulated():
    answers = np.array([0.1, 0.15, 0.4, 0.35])  # the first two are true
    p0, n, draws = 0.25, 3, 200_000
    drawn = RNG.choice(4, size=(draws, n), p=answers)
    kept = drawn[np.arange(draws), (drawn < 2).argmax(1)]  # the first true one, else the first
    found = np.bincount(kept, minlength=4) / draws
    rate, kl = D.best_of_n([p0], n)
    assert rate == pytest.approx((kept < 2).mean(), abs=0.005)
    assert kl == pytest.approx(np.sum(found * np.log(found / answers)), abs=0.01)
    assert D.best_of_n([p0, 0.5], n) == pytest.approx(((rate + 0.875) / 2, (kl + D.binary_kl(0.875, 0.5)) / 2))


@pytest.mark.parametrize("n", [1, 2, 4, 16, 64])
def test_best_of_n_stays_below_the_usual_formula(n):
    bound = np.log(n) - (n - 1) / n
    for p0 in [0.0, 1.0, 1 / n, *RNG.random(50), *RNG.random(50) / n]:
        rate, kl = D.best_of_n([p0], n)
        assert -1e-12 <= kl <= bound + 1e-12 and rate >= p0 - 1e-12


# --- margins as probabilities -----------------------------------------------------------------------------------------


def honest_margins(n=20_000):
    """Margins m of which a share of sigma(|m|) has the right sign."""
    size = np.abs(RNG.normal(0, 2, n))
    return np.where(RNG.random(n) < expit(size), size, -size)


def test_honest_margins_are_calibrated_and_exaggerated_ones_are_not():
    margins = honest_margins()
    honest, loud, shy = (D.calibration(scale * margins) for scale in (1, 4, 0.25))
    assert honest["ece"] < 0.015 < 0.1 < min(loud["ece"], shy["ece"])
    assert honest["brier"] < min(loud["brier"], shy["brier"], 0.25)
    assert (loud["confidence"] > loud["accuracy"]).all() and (shy["confidence"] < shy["accuracy"])[1:].all()
    assert honest["accuracy"] == pytest.approx(honest["confidence"], abs=0.05) and honest["count"].tolist() == [2500] * 8


def test_a_coin_has_a_brier_score_of_a_quarter_and_is_calibrated():
    coin = D.calibration(np.zeros(10))
    assert coin["brier"] == 0.25 and coin["ece"] == 0
    assert coin["confidence"].tolist() == coin["accuracy"].tolist() == [0.5] * 8


def test_calibration_by_hand():
    found = D.calibration([np.log(3), -np.log(9), 0])  # sigma: 3/4, 1/10, 1/2
    assert found["brier"] == pytest.approx((1 / 16 + 81 / 100 + 1 / 4) / 3)
    assert found["ece"] == pytest.approx((1 / 4 + 9 / 10 + 0) / 3)
    assert found["confidence"] == pytest.approx([0.5, 0.75, 0.9]) and found["accuracy"].tolist() == [0.5, 1, 0]
    two = D.calibration([np.log(3), -np.log(9), 0], bins=2)  # {1/2, 3/4} and {9/10}
    assert two["count"].tolist() == [2, 1] and two["accuracy"].tolist() == [0.75, 0]
    assert two["ece"] == pytest.approx((2 * (0.75 - 0.625) + 0.9) / 3)


def test_the_order_of_the_pairs_does_not_matter_even_with_ties():
    for margins in (RNG.normal(0, 2, 101), RNG.choice([-1000, -1, 0, 1, 2, 1000], 100), np.repeat([1.0, -1.0], 20)):
        one, other = D.calibration(margins), D.calibration(RNG.permutation(margins))
        assert all(one[name] == pytest.approx(other[name]) for name in one)
    assert one["ece"] == pytest.approx(expit(1) - 0.5) and one["accuracy"] == pytest.approx([0.5] * 8)


def test_no_margins_raise():
    with pytest.raises(ValueError, match="at least one pair"):
        D.calibration([])


def test_margins_of_a_thousand_do_not_overflow():
    with np.errstate(all="raise", under="ignore"):
        far = D.calibration([-1000.0, 1000.0])
    assert far["brier"] == 0.5 and far["ece"] == 0.5 and far["confidence"] == pytest.approx([1.0, 1.0])


def test_drift_by_hand():
    one = {"policy_chosen": np.array([-3.0, -5.0]), "policy_rejected": np.array([-1.0, -2.0]), "margins": np.array([9.0, 9.0])}
    two = {"policy_chosen": np.array([-3.5, -5.0]), "policy_rejected": np.array([0.0, -2.1])}
    assert D.drift(one, two) == pytest.approx({"mean": 0.4, "largest": 1.0}) == D.drift(two, one)
