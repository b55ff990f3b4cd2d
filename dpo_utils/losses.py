"""Preference losses as pure functions of sequence log-probs.

`logps` are natural logs, summed over the completion's tokens. A loss of pairs gives (losses,
chosen_rewards, rejected_rewards), each (B,), in the dtype of its input; rewards are beta
times c and r, without gradient. Unequal shapes, and beta, label_smoothing or kl out of range, raise
ValueError.

`dpo_loss` takes the four log-probs. Behind it, and behind every other loss of pairs, is a formula
of c (chosen) and r (rejected), (B,): log-ratios policy - ref, or log-probs where the loss has no
reference. `preference_loss` calls any of them by name, in float64. Below, z = beta (c - r) with
beta > 0, and s is the sigmoid. Gradients are with respect to c; the one for r is the negative
unless given.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid


def dpo_loss(
    policy_chosen_logps,
    policy_rejected_logps,
    ref_chosen_logps,
    ref_rejected_logps,
    beta=0.1,
    label_smoothing=0.0,
):
    """DPO, -log s(z) with z = beta ((policy - ref of chosen) - (policy - ref of rejected)).

    With label_smoothing e, 0 <= e < 1/2, conservative DPO: -(1-e) log s(z) - e log s(-z).
    Gradient: beta (s(z) - 1 + e), which for cDPO is zero at z = log((1-e)/e).
    Source: Rafailov et al. 2023, eq. 7; Mitchell 2023, "A note on DPO with noisy preferences".
    """
    logps = policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    _check_domain(beta, label_smoothing)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = _in_float64(*logps)
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    losses = dpo(chosen, rejected, beta, label_smoothing)
    outputs = losses, beta * chosen.detach(), beta * rejected.detach()
    return tuple(x.to(policy_chosen_logps.dtype) for x in outputs)


def _check_domain(beta, label_smoothing=0.0):
    if not beta > 0:
        raise ValueError(f"beta must be > 0, found {beta}: it weighs the KL penalty, 0.1 is usual")
    if not 0 <= label_smoothing < 0.5:
        share = f"{label_smoothing}: it is the share of flipped labels, 0 if they are trusted"
        raise ValueError(f"label_smoothing must be in [0, 0.5), found {share}")


def _in_float64(*logps):
    """Differences of large log-probs keep their digits there; B numbers cost nothing."""
    shapes = sorted({tuple(x.shape) for x in logps})
    if len(shapes) > 1:
        raise ValueError(f"log-probs must share one shape, found {shapes}: give one number a pair")
    return [x.float() if x.device.type == "mps" else x.double() for x in logps]  # no float64 on MPS


def dpo(c, r, beta, label_smoothing=0.0):
    """The formula of `dpo_loss`; of averages per token, dpo_norm: length-normalized DPO.

    dpo_norm: Lambert et al. 2024 (Tulu 3, arXiv 2411.15124), eq. 6, beta 5; TRL's sigmoid_norm.
    """
    z = beta * (c - r)
    return -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)


def robust(c, r, beta, label_smoothing=0.1):
    """Robust DPO, [-(1-e) log s(z) + e log s(-z)] / (1-2e): unbiased if a share e is flipped.

    Gradient: -beta (s(-z) + e / (1-2e)), never zero, so the loss has no lower bound.
    Source: Chowdhury et al. 2024 (arXiv 2403.00409).
    """
    z = beta * (c - r)
    return -logsigmoid(z) - label_smoothing * z / (1 - 2 * label_smoothing)


def ipo(c, r, beta):
    """IPO, (c - r - 1/(2 beta))^2 of averages per token: a margin to reach, not one to grow.

    Gradient: 2 (c - r - 1/(2 beta)). Source: Azar et al. 2024, eq. 17 with beta as tau; the formula
    has sums, but its authors use averages.
    """
    return (c - r - 1 / (2 * beta)) ** 2


def hinge(c, r, beta):
    """SLiC's hinge on log-ratios, max(0, 1 - z). Gradient: -beta where z < 1, else 0.

    Source: Zhao et al. 2023 (SLiC-HF); with the reference, Liu et al. 2024 (arXiv 2309.06657).
    """
    return torch.relu(1 - beta * (c - r))


def apo_zero(c, r, beta):
    """APO-zero, s(-beta c) + s(beta r): each log-ratio is pushed away from zero on its own.

    Gradients: -beta s(beta c) s(-beta c) for c, +beta s(beta r) s(-beta r) for r.
    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7.
    """
    return logsigmoid(-beta * c).exp() + logsigmoid(beta * r).exp()


def apo_down(c, r, beta):
    """APO-down, s(beta c) + s(-z): both log-ratios fall, that of rejected further.

    For a model that writes better answers than chosen; apo_zero is for one that writes worse.
    Gradients: beta (s(beta c) s(-beta c) - s(z) s(-z)) for c, +beta s(z) s(-z) for r.
    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8 plus 1, as in TRL.
    """
    return logsigmoid(beta * c).exp() + logsigmoid(-beta * (c - r)).exp()


def dpop(c, r, beta, lam=50.0):
    """DPO-Positive, -log s(y), y = z - beta lam max(0, -c), lam >= 0: chosen may not sink.

    Gradients: -beta s(-y) (1 + lam where c < 0) for c, at c = 0 as DPO; +beta s(-y) for r.
    Source: Pal et al. 2024 (arXiv 2402.13228), eq. 3; they use beta 0.3 and lam 50. Not in TRL.
    """
    return -logsigmoid(beta * (c - r - lam * torch.relu(-c)))


def chipo(c, r, beta, r_max=float("inf")):
    """Chi-squared PO, -log s(y), y = beta (f(c) - f(r)) clipped to +-2 r_max, f(x) = x + e^x.

    beta weighs KL + chi^2, with chi^2 half the mean of (policy/ref - 1)^2: at c = r = 0 it acts as
    twice DPO's beta. Gradients: -beta s(-y) (1 + e^c) for c, +beta s(-y) (1 + e^r) for r; e^x is
    constant above x = 20, as in the paper's runs; a clipped pair, even a wrong one, has none.
    Source: Huang et al. 2024 (arXiv 2407.13399), algorithm 1, r_max > 0. Not in TRL.
    """
    f_c, f_r = (x + x.clamp(max=20).exp() for x in (c, r))
    return -logsigmoid((beta * (f_c - f_r)).clamp(-2 * r_max, 2 * r_max))


def wpo(c, r, beta, means):
    """WPO, e^means times DPO; means (B,) adds the mean log p per token of chosen and rejected.

    Gradient: -e^means beta s(-z), none through means. Source: Zhou et al. 2024 (arXiv 2406.11827);
    their eq. 2, TRL's use_weighting, also divides each p by the sum of p^2 over the vocabulary.
    """
    return means.detach().exp() * dpo(c, r, beta)


def simpo(c, r, beta, gamma=0.5):
    """SimPO (Meng et al. 2024, eq. 6), -log s(z - gamma). Gradient: -beta s(gamma - z)."""
    return -logsigmoid(beta * (c - r) - gamma)


def log_odds(logps):
    """log(p / (1-p)) from log p; expm1 keeps 1 - p exact where p is close to one."""
    logps = logps.clamp(max=-1e-12)  # p = 1 to the last digit: there the gradient is zero anyway
    return logps - torch.log(-torch.expm1(logps))


def orpo(c, r, beta):
    """ORPO, -c - beta log s(o) with o = log_odds(c) - log_odds(r), averages per token, c, r <= 0.

    Gradients: -1 - beta s(-o) / (1 - e^c) for c, +beta s(-o) / (1 - e^r) for r.
    Source: Hong et al. 2024, eqs. 4, 6 and 7 with beta as lambda.
    """
    return -c - beta * logsigmoid(log_odds(c) - log_odds(r))


def with_sft(c, r, beta, sft, nll_weight=1.0):
    """-log s(z) + nll_weight sft, where sft is the mean -log p of chosen's tokens.

    CPO (Xu et al. 2024, arXiv 2401.08417) without a reference; DPO plus SFT (Pang et al. 2024,
    arXiv 2404.19733, eq. 1, where nll_weight is alpha) with one.
    Gradients: -beta s(-z) - nll_weight / length for c, +beta s(-z) for r.
    """
    return dpo(c, r, beta) + nll_weight * sft


def unlikelihood(c, r, beta):
    """Unlikelihood (Welleck et al. 2019), -c + beta r, unbounded below. Gradients: -1 and +beta."""
    return beta * r - c


def kto_loss(policy_logps, ref_logps, desirable, kl=0.0, beta=0.1, **weights):
    """KTO, unpaired: w s(-v) where desirable, else w s(v), with v = beta (policy - ref - kl).

    policy_logps, ref_logps (N,); desirable (N,) bool; kl estimates KL(policy || ref) >= 0, without
    gradient; weights: desirable_weight and undesirable_weight, 1 by default. Gives (losses,
    rewards), each (N,). Gradient: -+ w beta s(v) s(-v).
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), constants dropped.
    """
    _check_domain(beta)
    policy, ref = _in_float64(policy_logps, ref_logps)
    losses = _kto(policy - ref, desirable, beta, kl, **weights)
    return losses.to(policy_logps.dtype), (beta * (policy - ref).detach()).to(policy_logps.dtype)


def _kto(ratio, desirable, beta, kl=0.0, desirable_weight=1.0, undesirable_weight=1.0):
    kl = torch.as_tensor(kl).detach()
    if (kl < 0).any():
        raise ValueError(f"kl must be >= 0, found {kl.min():.3g}: clamp the estimate at zero")
    v = beta * (ratio - kl)
    # exp(logsigmoid): autograd's s (1 - s) loses its digits where the sigmoid is near one
    up, down = desirable_weight * logsigmoid(-v).exp(), undesirable_weight * logsigmoid(v).exp()
    return torch.where(torch.as_tensor(desirable), up, down)


def kto(c, r, beta, **options):
    """The mean of KTO's losses for chosen, taken as desirable, and for rejected, as undesirable."""
    return (_kto(c, True, beta, **options) + _kto(r, False, beta, **options)) / 2


class Loss(NamedTuple):
    """A formula, and what it is given."""

    formula: Callable
    reference: bool = True  # log-ratios to the reference; else log-probs of the policy
    per_token: bool = False  # averages over a completion's tokens; else sums
    smoothing: bool = False  # label_smoothing
    sft: bool = False  # the SFT loss of the chosen completion
    means: bool = False  # the policy's log-probs per token of both completions, added


LOSSES = {
    "dpo": Loss(dpo, smoothing=True),
    "robust": Loss(robust, smoothing=True),
    "dpo_norm": Loss(dpo, per_token=True),
    "wpo": Loss(wpo, means=True),
    "dpop": Loss(dpop),
    "chipo": Loss(chipo),
    "ipo": Loss(ipo, per_token=True),
    "hinge": Loss(hinge),
    "kto": Loss(kto),
    "apo_zero": Loss(apo_zero),
    "apo_down": Loss(apo_down),
    "simpo": Loss(simpo, reference=False, per_token=True),
    "orpo": Loss(orpo, reference=False, per_token=True),
    "cpo": Loss(with_sft, reference=False, sft=True),
    "dpo_sft": Loss(with_sft, sft=True),
    "unlikelihood": Loss(unlikelihood, reference=False),
    "reference_free": Loss(dpo, reference=False),  # some introductions print it as DPO
}


def needs_reference(name):
    """Whether the named loss takes the reference's log-probs; ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    return LOSSES[name].reference


def preference_loss(
    name,
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    chosen_lengths,
    rejected_lengths,
    beta,
    label_smoothing=0.0,
    **options,
):
    """Any loss of LOSSES from summed log-probs (B,) and completion lengths (B,), with its options.

    Reference log-probs may be None where needs_reference(name) is False. Gives (losses,
    chosen_rewards, rejected_rewards), each (B,); rewards are per token if the loss is.
    """
    _check_domain(beta, label_smoothing)
    logps = [policy_chosen, policy_rejected] + [ref_chosen, ref_rejected] * needs_reference(name)
    if any(x is None for x in logps):
        raise ValueError(f"the loss {name!r} needs the reference's log-probs, found None")
    loss, logps = LOSSES[name], _in_float64(*logps)
    if loss.smoothing:
        options["label_smoothing"] = label_smoothing
    elif label_smoothing:
        remedy = "use dpo or robust, or set it to 0"
        raise ValueError(f"the loss {name!r} has no label_smoothing: {remedy}")
    if loss.sft:
        options["sft"] = -logps[0] / chosen_lengths
    if loss.means:
        options["means"] = logps[0] / chosen_lengths + logps[1] / rejected_lengths
    if loss.per_token:
        lengths = 2 * [chosen_lengths, rejected_lengths]
        logps = [x / n for x, n in zip(logps, lengths, strict=False)]
    c, r = (logps[0] - logps[2], logps[1] - logps[3]) if loss.reference else logps
    outputs = loss.formula(c, r, beta, **options), beta * c.detach(), beta * r.detach()
    return tuple(x.to(policy_chosen.dtype) for x in outputs)
