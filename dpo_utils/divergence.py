"""How far the policy went from its reference, and whether its margins can be taken as probabilities."""

import numpy as np
import torch
from scipy.special import expit, logit, rel_entr

from dpo_utils.models import as_reference
from dpo_utils.tokens import collate_rows

# --- KL by sampling ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def sampled_kl(model, tokenizer, answers, batch: int = 16) -> dict[str, np.ndarray]:
    """Three estimates of KL(policy || reference) in nats, (answers,) each, from answers that the policy gave.

    answers: (prompt ids, answer ids), from `evaluate.sample_ids` at temperature 1 with the same policy. With
    d = log pi(token) - log ref(token) at a token of the answer: `k1` is the sum of d, unbiased and noisy; `k3` the sum of
    e^-d - 1 + d, unbiased too and never negative (Schulman 2020, "Approximating KL divergence"); `full` sums the KL
    between the two whole next-token distributions: the same mean, without the noise of which token was drawn.
    tokens: length of every answer, its EOS included. An answer that was cut counts as far as it goes.
    """
    was_training, parts = model.training, []
    model.eval()
    for start in range(0, len(answers), batch):
        rows = collate_rows(answers[start : start + batch], tokenizer.pad_token_id)
        rows = {name: x.to(model.device) for name, x in rows.items()}
        policy = _next_token_logps(model, rows)
        with as_reference(model):
            reference = _next_token_logps(model, rows)
        labels, scored = rows["input_ids"][:, 1:, None], rows["completion_mask"][:, 1:]
        d = (policy - reference).gather(-1, labels)[..., 0]  # (N, T-1)
        full = (policy.exp() * (policy - reference)).sum(-1)
        parts.append([(x * scored).sum(-1).cpu() for x in (d, torch.expm1(-d) + d, full)])
    model.train(was_training)
    k1, k3, full = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
    return {"k1": k1, "k3": k3, "full": full, "tokens": np.array([len(ids) for _, ids in answers])}


def _next_token_logps(model, rows):
    logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], use_cache=False).logits
    return logits[:, :-1].float().log_softmax(-1)


def mean_and_error(values) -> tuple[float, float]:
    """(mean, standard error of the mean); the error of a single value, which is unknown, is given as 0."""
    values = np.asarray(values, dtype=float)
    return float(values.mean()), float(values.std(ddof=min(1, len(values) - 1)) / np.sqrt(len(values)))


# --- the least KL for a rate of true answers --------------------------------------------------------------------------


def least_kl(p0, tilts) -> tuple[np.ndarray, np.ndarray]:
    """(rates, KLs), one a tilt: the cheapest policies that answer truly more often than p0, averaged over the prompts.

    p0: (prompts,) probability of a true answer under the reference. The reward is 1 or 0, so the optimum of
    E[r] - beta KL only shifts weight from false to true answers, logit p = logit p0 + tilt with tilt = 1/beta, and its
    KL is the binary divergence p ln(p/p0) + (1-p) ln((1-p)/(1-p0)), in nats a sequence.
    """
    p0 = np.clip(np.asarray(p0, dtype=float), 1e-12, 1 - 1e-12)
    p = expit(logit(p0) + np.asarray(tilts, dtype=float)[:, None])
    return p.mean(1), binary_kl(p, p0).mean(1)


def binary_kl(p, p0):
    """p ln(p/p0) + (1-p) ln((1-p)/(1-p0)), in nats; zero where p is 0 or 1 and p0 is the same."""
    p, p0 = np.asarray(p, dtype=float), np.asarray(p0, dtype=float)
    return rel_entr(p, p0) + rel_entr(1 - p, 1 - p0)


def above_limit(rate: float, kl: float, p0) -> float:
    """Nats that a policy with this rate and KL spends beyond the least that reaches the rate."""
    rates, kls = least_kl(p0, np.linspace(-20, 40, 6001))
    return float(kl - np.interp(rate, rates, kls))


def best_of_n(p0, n: int) -> tuple[float, float]:
    """(rate, KL) of drawing n answers from the reference and keeping a true one if there is one.

    Exact for a reward of 0 or 1. The formula ln n - (n-1)/n that is usually quoted is an upper bound, for rewards
    without ties (Beirami et al. 2024, arXiv 2401.01879).
    """
    p0 = np.asarray(p0, dtype=float)
    p = 1 - (1 - p0) ** n
    return float(p.mean()), float(binary_kl(p, p0).mean())


# --- margins as probabilities -----------------------------------------------------------------------------------------


def calibration(margins, bins: int = 8) -> dict:
    """Is sigma(margin) an honest probability that the chosen answer is the preferred one?

    A pair is seen from the side the model favours: confidence max(sigma(m), sigma(-m)), right where that side was
    chosen, a tie half right. Bins hold equally many pairs. Returns brier (mean of (1 - sigma(m))^2; a coin has 0.25), ece
    (mean distance of confidence and accuracy over the bins, weighed by pairs) and per bin confidence, accuracy, count.
    """
    margins = np.asarray(margins, dtype=float)
    if len(margins) == 0:
        raise ValueError("no margins: calibration needs at least one pair")
    confidence = expit(np.abs(margins))
    right = (margins > 0) + 0.5 * (margins == 0)
    _, group = np.unique(confidence, return_inverse=True)
    right = (np.bincount(group, right) / np.bincount(group))[group]  # equally confident pairs share: their order is nothing
    parts = np.array_split(np.argsort(confidence, kind="stable"), min(bins, len(margins)))
    counts = np.array([len(part) for part in parts])
    means = np.array([(confidence[part].mean(), right[part].mean()) for part in parts])
    return {
        "brier": float(np.mean(expit(-margins) ** 2)),
        "ece": float(np.sum(counts * np.abs(means[:, 0] - means[:, 1])) / len(margins)),
        "confidence": means[:, 0], "accuracy": means[:, 1], "count": counts,
    }  # fmt: skip


def drift(first: dict, second: dict) -> dict[str, float]:
    """How much the log-probs of two tables of `preference_table` differ on the same pairs: mean and largest, in nats."""
    difference = np.abs(np.concatenate([first[f"policy_{side}"] - second[f"policy_{side}"] for side in ("chosen", "rejected")]))
    return {"mean": float(difference.mean()), "largest": float(difference.max())}
