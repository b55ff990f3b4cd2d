"""Is it better, and by how much? Samples, accuracies, intervals, and the baselines that stand beside them."""

import random

import numpy as np
import torch

from dpo_utils import world
from dpo_utils.data import plain_text
from dpo_utils.logps import all_logps
from dpo_utils.models import as_reference
from dpo_utils.tokens import as_item, encode_completion, encode_prompt, tokenize_all
from dpo_utils.train import options_for


def bootstrap(values, statistic=np.mean, resamples: int = 2000, level: float = 0.95, seed: int = 0, groups=None):
    """(estimate, low, high): a statistic of the values with its percentile bootstrap interval.

    values: (n,) or (n, k), resampled by rows. groups: (n,), for instance the prompts: rows of one group are alike, so
    they are drawn together. Raises ValueError for no values.
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("an interval of nothing: there are no values")
    rng = np.random.default_rng(seed)
    members = _members(groups) if groups is not None else None
    count = len(values if members is None else members)

    def draw():
        chosen = rng.integers(0, count, count)
        return np.concatenate([members[g] for g in chosen]) if members is not None else chosen

    draws = [statistic(values[draw()]) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return float(statistic(values)), float(low), float(high)


def _members(groups) -> list[np.ndarray]:
    """The row numbers of each group, groups in the order in which they appear."""
    rows = {}
    for i, group in enumerate(groups):
        rows.setdefault(str(group), []).append(i)
    return [np.array(numbers) for numbers in rows.values()]


def wins(first, second) -> np.ndarray:
    """1 where first > second, 0 where it is less, a half for ties."""
    first, second = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    return (first > second) + 0.5 * (first == second)


def preference_table(model, tokenizer, pairs, profile) -> dict[str, np.ndarray]:
    """Per usable pair, (n,) each: log-probs and lengths of both sides under policy and reference, and the margin.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected (nats, summed), chosen_tokens, rejected_tokens,
    chosen_rewards, rejected_rewards, margins (beta times log-ratios), row (1-based row in `pairs`).
    """
    rows, _ = tokenize_all(pairs, tokenizer, profile.max_length)
    items, options = [as_item(row) for row in rows], options_for(profile, tokenizer)
    policy = all_logps(model, items, **options).double().numpy()
    with as_reference(model):
        reference = all_logps(model, items, **options).double().numpy()
    rewards = profile.beta * (policy - reference)
    return {
        "policy_chosen": policy[:, 0],
        "policy_rejected": policy[:, 1],
        "ref_chosen": reference[:, 0],
        "ref_rejected": reference[:, 1],
        "chosen_tokens": np.array([len(row["chosen_ids"]) for row in rows]),
        "rejected_tokens": np.array([len(row["rejected_ids"]) for row in rows]),
        "chosen_rewards": rewards[:, 0],
        "rejected_rewards": rewards[:, 1],
        "margins": rewards[:, 0] - rewards[:, 1],
        "row": np.array([row["row"] for row in rows]),
    }


def surface_baselines(train, held_out, seed: int = 0) -> dict[str, np.ndarray]:
    """What can be had without a model: per held-out pair, 1 where the baseline picks the chosen answer, ties a half.

    length: the longer or the shorter answer, whichever the training pairs prefer. bag of words: logistic regression
    on the answers alone (scikit-learn's CountVectorizer), fitted on the training pairs, blind to the question.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def sides(pairs):
        return [plain_text(row["chosen"]) for row in pairs], [plain_text(row["rejected"]) for row in pairs]

    chosen, rejected = sides(train)
    longer = np.mean(wins([len(t) for t in chosen], [len(t) for t in rejected])) >= 0.5
    words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000, random_state=seed))
    words.fit(chosen + rejected, [1] * len(chosen) + [0] * len(rejected))
    test_chosen, test_rejected = sides(held_out)
    by_length = wins([len(t) for t in test_chosen], [len(t) for t in test_rejected])
    return {
        "length": by_length if longer else 1 - by_length,
        "bag of words": wins(words.decision_function(test_chosen), words.decision_function(test_rejected)),
    }


@torch.no_grad()
def sample(model, tokenizer, prompts, *, n=1, temperature=1.0, max_new_tokens=48, seed=0, batch=256) -> list[list[str]]:
    """n answers to every prompt, drawn at a temperature (0: greedy), as a list of n texts a prompt. Seeded."""
    drawn = sample_ids(model, tokenizer, prompts, n, temperature, max_new_tokens, seed, batch)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in drawn]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


@torch.no_grad()
def sample_ids(model, tokenizer, prompts, n=1, temperature=1.0, max_new_tokens=48, seed=0, batch=256) -> list[tuple]:
    """The same answers as (prompt ids, answer ids), n a prompt in a row; the final EOS is part of the answer."""
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    ids = [encode_prompt(prompt, tokenizer) for prompt in prompts for _ in range(n)]
    answers = []
    for start in range(0, len(ids), batch):
        answers += _generate(model, tokenizer, ids[start : start + batch], temperature, max_new_tokens)
    model.train(was_training)
    return list(zip(ids, answers, strict=True))


def _generate(model, tokenizer, prompts, temperature, max_new_tokens) -> list[list[int]]:
    longest, eos = max(map(len, prompts)), tokenizer.eos_token_id
    pad = tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    seen = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {"do_sample": False}
    out = model.generate(
        input_ids=ids, attention_mask=seen, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=eos,
        use_cache=True, **how,
    )  # fmt: skip
    answers = [row[longest:].tolist() for row in out]
    return [row[: row.index(eos) + 1] if eos in row else row for row in answers]


def world_scores(model, tokenizer, profile, *, questions=None, n=4, seeds=(0, 1, 2), temperature=1.0) -> dict[str, np.ndarray]:
    """Sampled answers to the tiny world's held-out questions, judged by the known reward.

    true, fluent, careful: (questions, n * seeds) of 0 and 1; texts: the same shape.
    """
    questions = questions or [fact.question for fact in world.facts("test")]
    texts = [[] for _ in questions]
    for seed in seeds:
        drawn = sample(model, tokenizer, questions, n=n, temperature=temperature, max_new_tokens=profile.max_new_tokens, seed=seed)
        for all_answers, answers in zip(texts, drawn, strict=True):
            all_answers += answers
    readings = [[world.read(q, t) for t in answers] for q, answers in zip(questions, texts, strict=True)]
    out = {name: np.array([[float(getattr(r, name)) for r in row] for row in readings]) for name in ("true", "fluent")}
    out["careful"] = np.array([[float(r.voice == world.CAREFUL) for r in row] for row in readings])
    return out | {"texts": np.array(texts, dtype=object)}


def true_probability(model, tokenizer, profile, questions=None) -> np.ndarray:
    """(questions,): the probability that an answer drawn at temperature 1 is fluent and true, without drawing any.

    The true sentences of a question can be listed (voices, openers, tails), so their probabilities are added up. Other
    ways to cut the same text into tokens are left out, which makes it a lower bound, tight in practice.
    """
    questions = questions or [fact.question for fact in world.facts("test")]
    items = [
        (encode_prompt(q, tokenizer), [encode_completion(text, tokenizer) for text in world.true_answers(q)]) for q in questions
    ]
    return all_logps(model, items, **options_for(profile, tokenizer)).double().exp().sum(1).numpy()


def shuffled(pairs, seed: int = 0) -> list[dict]:
    """The pairs with every label tossed by a coin: a control from which nothing can be learnt."""
    coin = random.Random(seed)
    return [swap(row) if coin.random() < 0.5 else dict(row) for row in pairs]


def swap(row) -> dict:
    """The pair with its label flipped."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
