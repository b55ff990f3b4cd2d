"""What a policy is worth in the tiny world, without sampling: all its answers can be listed.

Arrays are (questions, 37): the 36 listed answers of each question, and last everything else, which
the model hardly ever says and whose reward is that of nonsense. KL is in nats per answer, averaged
over the questions; over these 37 outcomes it is a lower bound to the one over all texts, and equal
to it for the optimum.
"""

import numpy as np
from scipy.special import expit, rel_entr

from dpo_utils import world
from dpo_utils.logps import all_logps, options_for
from dpo_utils.tokens import encode_completion, encode_prompt


def listed_items(tokenizer, questions) -> list[tuple]:
    """(prompt ids, ids of the 36 listed answers) for each question."""
    prompts = [encode_prompt(question, tokenizer) for question in questions]
    answers = [[encode_completion(x, tokenizer) for x in world.listed(q)] for q in questions]
    return list(zip(prompts, answers, strict=True))


def probabilities(model, tokenizer, profile, questions) -> np.ndarray:
    """(questions, 37): how probable the model makes each answer at temperature 1.

    Each answer counts as cut into tokens in one way only: a lower bound, tight in practice.
    """
    items = listed_items(tokenizer, questions)
    p = all_logps(model, items, **options_for(profile, tokenizer)).double().exp().numpy()
    return np.column_stack([p, np.maximum(1 - p.sum(1), 1e-12)])


def rewards(questions) -> np.ndarray:
    """(questions, 37): the known reward of each answer."""
    known = [[world.reward(q, text) for text in world.listed(q)] for q in questions]
    return np.column_stack([known, np.full(len(known), world.NOT_FLUENT)])


def truths(questions) -> np.ndarray:
    """(questions, 37): 1 where the answer is true."""
    true = [[world.read(q, text).true for text in world.listed(q)] for q in questions]
    return np.column_stack([true, np.zeros(len(true))])


def lengths(questions, tokenizer) -> np.ndarray:
    """(questions, 37): tokens of each answer, its end included; 0 for everything else."""
    ids = [[len(x) for x in answers] for _, answers in listed_items(tokenizer, questions)]
    return np.column_stack([ids, np.zeros(len(ids))])


def masses(p, pairs) -> dict[str, float]:
    """Where the probability of answers to the pairs' prompts is, p being (pairs, 37): `chosen mass`
    and `rejected mass`, those of `other true`, of `other false` answers, and of `not fluent`.
    """
    questions = [pair["prompt"] for pair in pairs]
    kind = np.where(truths(questions), "other true", "other false").astype("<U12")
    kind[:, -1] = "not fluent"
    for row, pair in zip(kind, pairs, strict=True):
        places = dict(zip(world.listed(pair["prompt"]), range(36), strict=True))
        for side in ("chosen", "rejected"):
            row[places.get(pair[side], 36)] = side
    names = ("chosen", "rejected", "other true", "other false", "not fluent")
    return {f"{name} mass": expected(p, kind == name) for name in names}


def expected(p, values) -> float:
    """The mean of the values under the policy, averaged over the questions."""
    return float((p * values).sum(1).mean())


def kl(p, q) -> float:
    """KL(p || q)."""
    return float(rel_entr(p, q).sum(1).mean())


def optimum(ref, reward, beta: float) -> np.ndarray:
    """The policy that maximises E[r] - beta KL: ref exp(r / beta) / Z (Rafailov et al., eq. 4)."""
    p = ref * np.exp((reward - reward.max(1, keepdims=True)) / beta)
    return p / p.sum(1, keepdims=True)


def least_kl(ref, reward, betas) -> tuple[np.ndarray, np.ndarray]:
    """(E[r], KL) of the optimum at every beta: no policy has as much reward for less KL."""
    best = [optimum(ref, reward, beta) for beta in betas]
    return np.array([(expected(p, reward), kl(p, ref)) for p in best]).T


def best_of_n(ref, reward, n: int) -> tuple[float, float]:
    """(E[r], KL) of drawing n answers from the reference and keeping the best, ties by chance.

    Exact. The usual ln n - (n-1)/n is an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    level = reward[:, :, None] >= reward[:, None, :]  # (questions, answer, no better than it)
    below = (ref[:, None] * level).sum(2)  # P(r <= r_i)
    equal = (ref[:, None] * (reward[:, :, None] == reward[:, None, :])).sum(2)
    p = ref / equal * (below**n - np.maximum(below - equal, 0) ** n)
    return expected(p, reward), kl(p, ref)


def labelled(ref, reward) -> np.ndarray:
    """(questions, 37, 37): how probable a pair is, chosen first, where two different answers are
    drawn from `ref` and labelled by Bradley-Terry in the reward.
    """
    pairs = ref[:, :, None] * ref[:, None, :] * expit(reward[:, :, None] - reward[:, None, :])
    pairs *= 1 - np.eye(ref.shape[1])
    return pairs / pairs.sum((1, 2), keepdims=True)


def accuracy(pairs, scores) -> float:
    """How often, among `labelled` pairs, scores (questions, 37) rank the chosen answer first.

    Of the reward itself this is the ceiling: the rest is the labeller's own doubt. Ties half.
    """
    gap = scores[:, :, None] - scores[:, None, :]
    return float((pairs * ((gap > 0) + 0.5 * (gap == 0))).sum((1, 2)).mean())
