"""Preference losses as pure functions of sequence log-probs.

`logps` are natural logs, summed over the completion's tokens unless a name says `avg`. Every pair loss gives
(losses, chosen_rewards, rejected_rewards), each (B,), in the dtype it was given. Rewards include beta and carry no
gradient. Below, h is the difference of the two log-ratios,

    h = (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected),    z = beta h,    s = sigmoid,

and a gradient is written with respect to policy_chosen_logps; the one for policy_rejected_logps is its negative
unless said otherwise.

Against TRL 1.16, whose numbers the tests compare: its `sigmoid` is dpo here but ignores label_smoothing; it logs
rewards as beta times summed log-ratios for every loss, ipo included; `sigmoid_norm` averages but keeps the reference,
so it is not simpo; orpo's SFT part there covers the prompt too, and cpo's is a mean over the batch's tokens, not pair
by pair; kto there is a mean over completions, here over pairs, and estimates its own KL, clamped at zero.
"""

import torch
from torch.nn.functional import logsigmoid


def _wide(*logps):
    """The same tensors in float64, where differences of large log-probs keep their digits: B numbers cost nothing."""
    shapes = {tuple(x.shape) for x in logps}
    if len(shapes) > 1:
        raise ValueError(f"log-probs must share one shape, found {sorted(shapes)}: broadcasting would mix up pairs")
    return [x.float() if x.device.type == "mps" else x.double() for x in logps]  # MPS has no float64


def _sigmoid(x):
    """The sigmoid with an exact gradient: autograd's own s (1 - s) loses its digits where s is near one."""
    return torch.exp(logsigmoid(x))


def _check_beta(beta):
    if not beta > 0:
        raise ValueError(f"beta must be > 0, found {beta}: it is the weight of the KL to the reference, 0.1 is usual")


def _check_smoothing(label_smoothing):
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing must be in [0, 0.5), found {label_smoothing}: it is the share of flipped labels, "
            "and at one half the labels say nothing"
        )


def _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta):
    _check_beta(beta)
    chosen, rejected, ref_chosen, ref_rejected = _wide(
        policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    return chosen - ref_chosen, rejected - ref_rejected


def _outputs(losses, chosen_rewards, rejected_rewards, like):
    return losses.to(like.dtype), chosen_rewards.detach().to(like.dtype), rejected_rewards.detach().to(like.dtype)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.0):
    """DPO, -log s(z), or with label_smoothing = e > 0 its conservative form cDPO, -(1-e) log s(z) - e log s(-z).

    Source: Rafailov et al. 2023, eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences".
    Domain: beta > 0, 0 <= e < 1/2. Gradient: beta (s(z) - 1 + e), that is -beta s(-z) when e = 0; cDPO stands still
    at z = log((1-e)/e). Raises ValueError outside the domain or where shapes differ.
    """
    _check_smoothing(label_smoothing)
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(z) - label_smoothing * logsigmoid(-z)
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def robust_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, label_smoothing=0.1):
    """Robust DPO: an unbiased estimate of the clean DPO loss when a share e = label_smoothing of labels is flipped.

    [-(1-e) log s(z) + e log s(-z)] / (1-2e), which is -log s(z) - e z / (1-2e) because log s(-z) = log s(z) - z.
    Source: Chowdhury et al. 2024 (arXiv 2403.00409). Domain: beta > 0, 0 <= e < 1/2; the loss can be negative and has
    no lower bound. Gradient: -beta (s(-z) + e / (1-2e)), never zero.
    """
    _check_smoothing(label_smoothing)
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    z = beta * (chosen - rejected)
    losses = -logsigmoid(z) - label_smoothing * z / (1 - 2 * label_smoothing)
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def ipo_loss(policy_chosen_avg_logps, policy_rejected_avg_logps, ref_chosen_avg_logps, ref_rejected_avg_logps, beta=0.1):
    """IPO, (h - 1/(2 beta))^2: a margin to reach, not one to grow for ever.

    The caller gives log-probs averaged per token (the paper's formula has sums; its authors confirmed to
    implementers that their results use averages). Source: Azar et al. 2024, eq. 17, beta is their tau.
    Domain: beta > 0. Gradient: 2 (h - 1/(2 beta)), zero at h = 1/(2 beta).
    """
    chosen, rejected = _log_ratios(
        policy_chosen_avg_logps, policy_rejected_avg_logps, ref_chosen_avg_logps, ref_rejected_avg_logps, beta
    )
    losses = (chosen - rejected - 1 / (2 * beta)) ** 2
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_avg_logps)


def hinge_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """Hinge on the DPO margin, max(0, 1 - z): SLiC's calibration loss with log-ratios in place of log-probs.

    Source: SLiC-HF, Zhao et al. 2023; with the reference, RSO, Liu et al. 2024 (arXiv 2309.06657). Domain: beta > 0.
    Gradient: -beta where z < 1, else 0.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    losses = torch.relu(1 - beta * (chosen - rejected))
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def apo_zero_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
    """APO-zero, s(-beta c) + s(beta r): each log-ratio (c chosen, r rejected) is pushed from zero on its own.

    Source: D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7. Domain: beta > 0; values in (0, 2).
    Gradients: -beta s(beta c) s(-beta c) for chosen, +beta s(beta r) s(-beta r) for rejected.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    losses = _sigmoid(-beta * chosen) + _sigmoid(beta * rejected)
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def kto_loss(policy_logps, ref_logps, desirable, kl=0.0, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO for unpaired completions: with v = beta (policy - ref - kl), w s(-v) where desirable and w s(v) where not.

    policy_logps, ref_logps (N,); desirable (N,) bool; kl is an estimate of KL(policy || ref) >= 0 that the caller
    makes, from samples or mismatched completions, and that carries no gradient. Gives (losses, rewards), each (N,).
    Source: Ethayarajh et al. 2024 (arXiv 2402.01306), the value function written as a loss, constants dropped.
    Domain: beta > 0, kl >= 0. Gradient: -w beta s(v) s(-v) where desirable, +w beta s(v) s(-v) where not.
    """
    _check_beta(beta)
    kl = torch.as_tensor(kl).detach()
    if (kl < 0).any():
        raise ValueError(f"kl must be >= 0, found {kl.min().item():.3g}: clamp the estimate at zero")
    policy, ref = _wide(policy_logps, ref_logps)
    log_ratio = policy - ref
    v = beta * (log_ratio - kl)
    losses = torch.where(desirable, desirable_weight * _sigmoid(-v), undesirable_weight * _sigmoid(v))
    return losses.to(policy_logps.dtype), (beta * log_ratio).detach().to(policy_logps.dtype)


def kto_pair_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1, **options):
    """KTO on pairs, chosen taken as desirable and rejected as undesirable: the mean of the two KTO losses (B,).

    options: kl, desirable_weight, undesirable_weight, as in `kto_loss`.
    """
    wanted = torch.ones_like(policy_chosen_logps, dtype=torch.bool)
    up, chosen_rewards = kto_loss(policy_chosen_logps, ref_chosen_logps, wanted, beta=beta, **options)
    down, rejected_rewards = kto_loss(policy_rejected_logps, ref_rejected_logps, ~wanted, beta=beta, **options)
    return (up + down) / 2, chosen_rewards, rejected_rewards


def simpo_loss(policy_chosen_avg_logps, policy_rejected_avg_logps, beta=2.0, gamma=0.5):
    """SimPO, -log s(beta (a - b) - gamma) with a, b the per-token averages the caller gives; no reference.

    Source: Meng et al. 2024, eq. 6. Domain: beta > 0, gamma >= 0 (the margin asked for, in units of reward).
    Gradient: -beta s(gamma - beta (a - b)).
    """
    _check_beta(beta)
    chosen, rejected = _wide(policy_chosen_avg_logps, policy_rejected_avg_logps)
    losses = -logsigmoid(beta * (chosen - rejected) - gamma)
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_avg_logps)


def log_odds(logps):
    """log(p / (1-p)) from log p < 0; expm1 keeps 1 - p exact where p is close to one."""
    logps = logps.clamp(max=-1e-12)  # p = 1 to the last digit: there the model's own gradient is zero as well
    return logps - torch.log(-torch.expm1(logps))


def orpo_loss(policy_chosen_avg_logps, policy_rejected_avg_logps, beta=0.1):
    """ORPO, -a + beta (-log s(odds(a) - odds(b))): SFT on chosen plus a log-odds ratio; no reference.

    a, b are per-token averages the caller gives, so -a is the usual SFT loss and e^a lies in (0, 1); odds = log_odds.
    Source: Hong et al. 2024, eqs. 4, 6 and 7, beta is their lambda. Domain: beta > 0, a, b <= 0.
    Gradients: -1 - beta s(-o) / (1 - e^a) for a, +beta s(-o) / (1 - e^b) for b, with o = odds(a) - odds(b).
    """
    _check_beta(beta)
    chosen, rejected = _wide(policy_chosen_avg_logps, policy_rejected_avg_logps)
    losses = -chosen - beta * logsigmoid(log_odds(chosen) - log_odds(rejected))
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_avg_logps)


def cpo_loss(policy_chosen_logps, policy_rejected_logps, chosen_lengths, beta=0.1, nll_weight=1.0):
    """CPO, -log s(beta (c - r)) + nll_weight (-c / length): a contrast of sums plus SFT on chosen; no reference.

    chosen_lengths (B,) counts the chosen completion's tokens: the SFT part is a per-token average, so that
    nll_weight means the same at every length. Source: Xu et al. 2024 (arXiv 2401.08417). Domain: beta > 0.
    Gradients: -beta s(-beta (c - r)) - nll_weight / length for chosen, +beta s(-beta (c - r)) for rejected.
    """
    _check_beta(beta)
    chosen, rejected = _wide(policy_chosen_logps, policy_rejected_logps)
    losses = -logsigmoid(beta * (chosen - rejected)) - nll_weight * chosen / chosen_lengths
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def dpo_sft_loss(
    policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, beta=0.1,
    nll_weight=1.0,
):  # fmt: skip
    """DPO plus SFT on chosen, -log s(z) + nll_weight (-c / length): holds the chosen log-prob c up.

    chosen_lengths (B,) counts the chosen completion's tokens. Source: Pang et al. 2024 (arXiv 2404.19733), eq. 1, in
    whose words nll_weight is alpha. Domain: beta > 0. Gradient: -beta s(-z) - nll_weight / length for chosen,
    +beta s(-z) for rejected.
    """
    chosen, rejected = _log_ratios(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta)
    losses = -logsigmoid(beta * (chosen - rejected)) - nll_weight * _wide(policy_chosen_logps)[0] / chosen_lengths
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


def unlikelihood_loss(policy_chosen_logps, policy_rejected_logps, beta=1.0):
    """-c + beta r: up on chosen, down on rejected, always equally hard. A baseline of the DPO paper; no reference.

    It is DPO's gradient without its weight, and has no lower bound: what is already unlikely is pushed down for ever.
    Source: Welleck et al. 2019, as used on sequences by Rafailov et al. 2023, section 6. Domain: beta > 0.
    Gradients: -1 for chosen, +beta for rejected.
    """
    _check_beta(beta)
    chosen, rejected = _wide(policy_chosen_logps, policy_rejected_logps)
    return _outputs(beta * rejected - chosen, chosen, beta * rejected, policy_chosen_logps)


def reference_free_loss(policy_chosen_logps, policy_rejected_logps, beta=0.1):
    """-log s(beta (c - r)): the form without a reference that some introductions print as DPO. It is not DPO.

    It equals DPO under a reference that gives every completion the same probability, so nothing holds the policy
    near the model it started from. Domain: beta > 0. Gradient: -beta s(-beta (c - r)).
    """
    _check_beta(beta)
    chosen, rejected = _wide(policy_chosen_logps, policy_rejected_logps)
    losses = -logsigmoid(beta * (chosen - rejected))
    return _outputs(losses, beta * chosen, beta * rejected, policy_chosen_logps)


LOSSES = {
    "dpo": dpo_loss,
    "robust": robust_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "kto": kto_pair_loss,
    "apo_zero": apo_zero_loss,
    "simpo": simpo_loss,
    "orpo": orpo_loss,
    "cpo": cpo_loss,
    "dpo_sft": dpo_sft_loss,
    "unlikelihood": unlikelihood_loss,
    "reference_free": reference_free_loss,
}
REFERENCE_FREE = {"simpo", "orpo", "cpo", "unlikelihood", "reference_free"}
PER_TOKEN = {"ipo", "simpo", "orpo"}  # compare averages over the completion's tokens, not sums
SMOOTHED = {"dpo", "robust"}  # take label_smoothing
WITH_SFT = {"cpo", "dpo_sft"}  # add SFT on chosen, averaged over its tokens


def needs_reference(name):
    """Whether the named loss reads the reference's log-probs."""
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LOSSES)}")
    return name not in REFERENCE_FREE


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
    """Any loss of LOSSES from the same summed log-probs (B,) and completion lengths (B,); averages are taken here.

    ref_chosen and ref_rejected may be None where `needs_reference(name)` is False. options go to the loss: gamma
    (simpo), nll_weight (cpo, dpo_sft), kl, desirable_weight, undesirable_weight (kto). Gives (losses, chosen_rewards,
    rejected_rewards), each (B,); the rewards are in the loss's own terms (per token for ipo, simpo, orpo).
    """
    logps = [policy_chosen, policy_rejected]
    if needs_reference(name):
        if ref_chosen is None or ref_rejected is None:
            raise ValueError(f"the loss {name!r} needs the reference's log-probs, found None")
        logps += [ref_chosen, ref_rejected]
    if name in PER_TOKEN:
        lengths = [chosen_lengths, rejected_lengths, chosen_lengths, rejected_lengths]
        logps = [x / n for x, n in zip(_wide(*logps), lengths, strict=False)]
    if name in WITH_SFT:
        options["chosen_lengths"] = chosen_lengths
    if name in SMOOTHED:
        options["label_smoothing"] = label_smoothing
    elif label_smoothing:
        raise ValueError(f"the loss {name!r} has no label_smoothing: use dpo or robust, or set it to 0")
    outputs = LOSSES[name](*logps, beta=beta, **options)
    return tuple(x.to(policy_chosen.dtype) for x in outputs)
