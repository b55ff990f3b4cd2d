"""Evaluation numbers that a person can check."""

import numpy as np
import pytest
import torch

from dpo_utils import evaluate as E
from dpo_utils import world
from dpo_utils.logps import plain_logps
from dpo_utils.tokens import collate_rows, encode_completion, encode_prompt


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


def test_rows_of_a_group_are_drawn_together():
    values, groups = np.repeat([0.0, 1.0] * 5, 20), np.repeat(np.arange(10), 20)
    alone, together = E.bootstrap(values), E.bootstrap(values, groups=groups)
    assert alone[0] == together[0] == 0.5
    assert together[2] - together[1] == pytest.approx(np.sqrt(20) * (alone[2] - alone[1]), rel=0.2)
    each = E.bootstrap(values[:50], groups=range(50))
    assert each == E.bootstrap(values[:50])  # groups of one change nothing
    uneven = E.bootstrap([1.0, 1.0, 1.0, 0.0], groups=["p", "p", "p", "q"])
    assert uneven == (0.75, 0.0, 1.0)


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


# --- answers as ids, and their probability ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled(tiny):
    """(model, tokenizer) of the bundled model."""
    from dpo_utils.models import load_policy

    return load_policy(tiny)


def test_sampled_ids_end_in_one_eos_or_are_cut(bundled):
    _, tokenizer = bundled
    prompts = [fact.question for fact in world.facts("test")[:8]]
    drawn = E.sample_ids(*bundled, prompts, n=3, max_new_tokens=20, seed=3)
    assert [prompt for prompt, _ in drawn] == [encode_prompt(prompt, tokenizer) for prompt in prompts for _ in range(3)]
    ended = [answer.count(tokenizer.eos_token_id) == 1 and answer[-1] == tokenizer.eos_token_id for _, answer in drawn]
    cut = [tokenizer.eos_token_id not in answer and len(answer) == 20 for _, answer in drawn]
    assert all(e != c for e, c in zip(ended, cut, strict=True)) and 2 < sum(ended) < 22
    texts = [text for answers in E.sample(*bundled, prompts, n=3, max_new_tokens=20, seed=3) for text in answers]
    assert texts == [tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in drawn]


def test_greedy_ids_do_not_depend_on_the_batch(bundled):
    prompts = [fact.question for fact in world.facts("test")[::5]]  # of all lengths
    one, other = (E.sample_ids(*bundled, prompts, temperature=0, max_new_tokens=16, batch=n) for n in (1, 20))
    assert one == other


def test_drawn_tokens_are_as_surprising_as_the_model_says(bundled):
    model, tokenizer = bundled
    prompts = [fact.question for fact in world.facts("test")[::2]]
    drawn = E.sample_ids(model, tokenizer, prompts, n=5, max_new_tokens=12)
    rows = collate_rows(drawn, tokenizer.pad_token_id)
    with torch.no_grad():
        logps = model(rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1].log_softmax(-1)
    surprise = -logps.gather(-1, rows["input_ids"][:, 1:, None])[..., 0]
    entropy = -(logps.exp() * logps).sum(-1)
    excess = ((surprise - entropy) * rows["completion_mask"][:, 1:]).sum(-1).numpy()  # mean 0 at temperature 1
    assert abs(excess.mean()) < 4 * excess.std() / len(excess) ** 0.5


def test_every_true_answer_is_read_as_true_and_fluent():
    for fact in world.facts("all"):
        answers = world.true_answers(fact.question)
        assert len(set(answers)) == len(answers) == 18  # openers of both voices, tails
        readings = [world.read(fact.question, text) for text in answers]
        assert all(reading.true and reading.fluent for reading in readings)
        assert {reading.voice for reading in readings} == {world.CAREFUL, world.CARELESS}


def test_the_probability_of_truth_is_the_rate_among_samples(bundled, tiny):
    questions, n = [fact.question for fact in world.facts("test")[:10]], 60
    p = E.true_probability(*bundled, tiny, questions)
    drawn = E.sample(*bundled, questions, n=n, max_new_tokens=tiny.max_new_tokens, seed=1)
    rates = np.array([np.mean([world.read(q, t).true for t in texts]) for q, texts in zip(questions, drawn, strict=True)])
    errors = np.sqrt(p * (1 - p) / n)
    assert p.shape == (10,) and 0.1 < p.mean() < 0.9
    assert (np.abs(rates - p) < 4 * errors).all()
    assert abs(rates.mean() - p.mean()) < 4 * np.sqrt((errors**2).sum()) / 10


def test_the_probability_of_truth_is_a_sum_over_the_true_answers(bundled, tiny):
    model, tokenizer = bundled
    questions = [fact.question for fact in world.facts("test")]
    found = E.true_probability(model, tokenizer, tiny)
    assert found.shape == (len(questions),) and (found > 0).all() and (found < 1).all()
    i = 5
    answers = [encode_completion(text, tokenizer) for text in world.true_answers(questions[i])]
    with torch.no_grad():
        logps = plain_logps(model, [(encode_prompt(questions[i], tokenizer), answers)], tokenizer.pad_token_id)
    assert found[i] == pytest.approx(logps.double().exp().sum().item(), rel=1e-4)
