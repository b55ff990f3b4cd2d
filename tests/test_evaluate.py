"""Numbers of the evaluation against enumeration, hand and brute force."""

from contextlib import nullcontext
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import chisquare
from small import SHAPE, random_items, small_model

from dpo_utils import evaluate as E
from dpo_utils import exact, world
from dpo_utils.logps import plain_logps
from dpo_utils.models import as_reference, load_policy, trainable, unwrap
from dpo_utils.tokens import encode_prompt

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


@pytest.fixture
def from_ids(monkeypatch):
    """A function (model, prompts as ids, ...) -> answers as ids; ids end with 2."""
    monkeypatch.setattr(E, "encode_prompt", lambda prompt, tokenizer: prompt)
    monkeypatch.setattr(E, "encode_completion", lambda text, tokenizer: [2])
    return lambda model, *how, **options: [
        answer
        for _, answer in E.sample_ids(model, SimpleNamespace(eos_token_id=2), *how, **options)
    ]


@pytest.mark.parametrize("kind", ["gpt2", "phi", "llama", "qwen3"])
def test_answers_depend_on_seed_and_number_alone_and_no_token_is_read_twice(kind, from_ids):
    model, prompts, rows = small_model(kind), [prompt for prompt, _ in random_items(5)], []
    unwrap(model).register_forward_pre_hook(lambda _, args: rows.extend(args[0]))
    drawn = from_ids(model, prompts, 3, max_new_tokens=9)
    begun = {(i // 3, *ids[:t]) for i, ids in enumerate(drawn) for t in range(len(ids))}
    assert len(rows) == len(begun) < sum(map(len, drawn)) < 15 * 9
    for batch in (1, 4):
        assert from_ids(model, prompts, 3, max_new_tokens=9, batch=batch) == drawn
    assert from_ids(model, prompts[:2], 3, max_new_tokens=9) == drawn[:6]


@pytest.mark.parametrize("kind", ["gpt2", "phi", "llama", "qwen3", "mamba"])  # without a cache
def test_greedy_answers_are_those_of_generate_and_end_at_every_stop_token(
    kind, from_ids, monkeypatch
):
    model, found = small_model(kind, attention={"mamba": "eager"}.get(kind, "sdpa")), []
    prompts = [prompt for prompt, _ in random_items(5)]
    how = {"do_sample": False, "max_new_tokens": 9, "pad_token_id": 2}
    for adapter in (nullcontext, model.disable_adapter):
        with adapter():
            found.append(from_ids(model, prompts, temperature=0, max_new_tokens=9))
            for prompt, answer in zip(prompts, found[-1], strict=True):
                ids = torch.tensor([prompt])
                whole = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
                assert whole[0].tolist() == prompt + answer
    assert found[0] != found[1]
    answer = found[0][0]
    for stop in (answer[3], [2, answer[3]], None):  # None: the chat template's end of a turn
        unwrap(model).generation_config.eos_token_id = stop
        if stop is None:
            monkeypatch.setattr(E, "encode_completion", lambda *_: [answer[0], answer[3]])
        cut = from_ids(model, prompts[:1], temperature=0, max_new_tokens=9)
        assert cut == [answer[: answer.index(answer[3]) + 1]]


def test_draws_follow_the_policy_and_the_temperature_not_the_generation_config(from_ids):
    model, n = small_model("llama", vocab_size=5), 20_000
    unwrap(model).generation_config.update(do_sample=True, top_k=1, repetition_penalty=9.0)
    outcomes = [[2], *map(list, product([0, 1, 3, 4], range(5)))]  # 2 ends an answer
    drawn = from_ids(model, [[3, 4]], n, max_new_tokens=2, batch=n)
    p = np.exp(both_logps(model, [([3, 4], answer) for answer in outcomes])[0])
    assert chisquare([drawn.count(answer) for answer in outcomes], n * p).pvalue > 0.001
    p = np.exp(both_logps(model, [([3, 4], [token]) for token in range(5)])[0]) ** 2
    drawn = np.ravel(from_ids(model, [[3, 4]], n, 0.5, max_new_tokens=1, batch=n))
    assert chisquare(np.bincount(drawn, minlength=5), n * p / p.sum()).pvalue > 0.001
    trainable(model)[-1].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="lower the learning rate"):
        from_ids(model, [[3, 4]], max_new_tokens=1)


def test_sampled_answers_are_true_as_often_as_their_probabilities_say(bundled, tiny):
    p = (exact.probabilities(*bundled, tiny, QUESTIONS) * exact.truths(QUESTIONS)).sum(1)
    scores, n = E.world_scores(*bundled, tiny), 12
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
