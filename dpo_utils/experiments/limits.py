"""The least KL that a rate of true answers can cost, exactly, where the reward is 1 or 0."""

import numpy as np
from scipy.special import expit, logit, rel_entr


def binary_kl(p, p0):
    """p ln(p/p0) + (1-p) ln((1-p)/(1-p0)), in nats; zero where p is 0 or 1 and p0 is the same."""
    return rel_entr(p, p0) + rel_entr(1 - np.asarray(p), 1 - np.asarray(p0))


def least_kl(p0, tilts) -> tuple[np.ndarray, np.ndarray]:
    """(rates, KLs), one per tilt: the cheapest policies for their rates, averaged over the prompts.

    p0: (prompts,) rates of true answers under the reference. The optimum of E[r] - beta KL moves
    probability from false to true answers only: logit p = logit p0 + tilt, tilt = 1/beta.
    """
    p0 = np.clip(np.asarray(p0, dtype=float), 1e-12, 1 - 1e-12)
    p = expit(logit(p0) + np.asarray(tilts, dtype=float)[:, None])
    return p.mean(1), binary_kl(p, p0).mean(1)


def above_limit(rate: float, kl: float, p0) -> float:
    """Nats that a policy with this rate and KL spends beyond the least that reaches the rate."""
    return float(kl - np.interp(rate, *least_kl(p0, np.linspace(-20, 40, 6001))))


def best_of_n(p0, n: int) -> tuple[float, float]:
    """(rate, KL) of drawing n answers from the reference and keeping a true one if there is one.

    Exact. The usual ln n - (n-1)/n is an upper bound (Beirami et al. 2024, arXiv 2401.01879).
    """
    p = 1 - (1 - np.asarray(p0, dtype=float)) ** n
    return float(p.mean()), float(binary_kl(p, p0).mean())
