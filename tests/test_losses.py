"""Every loss against an oracle of 60 digits, written from the papers, and against TRL's code."""

from unittest.mock import MagicMock

import mpmath as mp
import pytest
import torch

from dpo_utils import losses
from dpo_utils.losses import LOSSES, dpo_loss, kto_loss, log_odds, needs_reference, preference_loss

BETAS = [0.01, 0.1, 0.5]
DIFFERENCES = [0.0, 1e-6, -1e-6, 1.0, -1.0, 50.0, -50.0, 1e3, -1e3, 1e4, -1e4]
TINY = 1.2e-38  # the smallest normal float32: below it a relative error has no meaning
mp.mp.dps = 60
EPS, KL, STEP = mp.mpf("0.1"), mp.mpf("0.25"), mp.mpf(10) ** -25


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def log_sigmoid(x):
    return mp.log(sigmoid(x))


def odds(x):
    return mp.exp(x) / (1 - mp.exp(x))


def smoothed(z, sign):
    return -(1 - EPS) * log_sigmoid(z) + sign * EPS * log_sigmoid(-z)


def kto(up, down, beta):
    return (2 - sigmoid(beta * (up - KL)) - sigmoid(beta * (KL - down))) / 2


def link(log_ratio):
    return mp.exp(log_ratio) + log_ratio


# The papers' formulas of log-probs a (chosen), b (rejected), of their references c, d, and of beta.
ORACLE = {
    "dpo": lambda a, b, c, d, beta: -log_sigmoid(beta * ((a - c) - (b - d))),
    "cdpo": lambda a, b, c, d, beta: smoothed(beta * ((a - c) - (b - d)), -1),
    "robust": lambda a, b, c, d, beta: smoothed(beta * (a - c - b + d), 1) / (1 - 2 * EPS),
    "ipo": lambda a, b, c, d, beta: ((a - c) - (b - d) - 1 / (2 * beta)) ** 2,
    "hinge": lambda a, b, c, d, beta: max(mp.mpf(0), 1 - beta * ((a - c) - (b - d))),
    "kto": lambda a, b, c, d, beta: kto(a - c, b - d, beta),
    "apo_zero": lambda a, b, c, d, beta: 1 - sigmoid(beta * (a - c)) + sigmoid(beta * (b - d)),
    "simpo": lambda a, b, c, d, beta: -log_sigmoid(beta * (a - b) - mp.mpf(0.5)),
    "dpo_norm": lambda a, b, c, d, beta: -log_sigmoid(beta * (a - c - b + d)),
    "wpo": lambda a, b, c, d, beta: -mp.exp((a + b) / 8) * log_sigmoid(beta * (a - c - b + d)),
    "dpop": lambda a, b, c, d, beta: -log_sigmoid(beta * (a - c - b + d - 50 * max(0, c - a))),
    "chipo": lambda a, b, c, d, beta: -log_sigmoid(beta * (link(a - c) - link(b - d))),
    "apo_down": lambda a, b, c, d, beta: sigmoid(beta * (a - c)) + sigmoid(beta * (b - d - a + c)),
    "orpo": lambda a, b, c, d, beta: -a - beta * log_sigmoid(mp.log(odds(a) / odds(b))),
    "cpo": lambda a, b, c, d, beta: -log_sigmoid(beta * (a - b)) - a / 8,
    "dpo_sft": lambda a, b, c, d, beta: -log_sigmoid(beta * ((a - c) - (b - d))) - a / 8,
    "unlikelihood": lambda a, b, c, d, beta: beta * b - a,
    "reference_free": lambda a, b, c, d, beta: -log_sigmoid(beta * (a - b)),
}
SMOOTHED = {"label_smoothing": 0.1}
OPTIONS = {"kto": {"kl": 0.25}, "robust": SMOOTHED, "cdpo": SMOOTHED}


def call(name, logps, beta):
    """By the adapter; lengths of 1 make sums and averages the same (8 where both are used)."""
    lengths = torch.tensor([8.0 if name in ("cpo", "dpo_sft", "wpo") else 1.0])
    base = name.replace("cdpo", "dpo")
    return preference_loss(base, *logps, lengths, lengths, beta, **OPTIONS.get(name, {}))


def close(found, exact):
    return abs(mp.mpf(found) - exact) <= 1e-6 * abs(exact) + TINY


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_value_and_gradient_in_float32(name, beta, difference):
    values = (-1.5, -1.5 - difference) if difference >= 0 else (-1.5 + difference, -1.5)
    logps = [torch.tensor([x], requires_grad=True) for x in (*values, -2.0, -2.0)]
    exact = [mp.mpf(x.item()) for x in logps] + [mp.mpf(str(beta))]  # what float32 made of them
    loss = call(name, logps, beta)[0]
    assert loss.dtype == torch.float32 and close(loss.item(), ORACLE[name](*exact))
    for i, slope in enumerate(torch.autograd.grad(loss.sum(), logps, allow_unused=True)):
        if slope is not None:
            sign, place = (-1, i + 2) if name == "wpo" and i < 2 else (1, i)  # detached weights
            order = tuple(int(j == place) for j in range(5))
            assert close(sign * slope.item(), mp.diff(ORACLE[name], exact, order, h=STEP)), i


@pytest.mark.parametrize("x", [-700.3, -13.7, -0.8, -0.6, -1.234567e-6, -1.234567e-9])
def test_log_odds_are_exact_at_both_ends(x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = mp.log(odds(mp.mpf(x.item())))
    assert abs(log_odds(x).item() - exact) < 1e-14 * (1 + abs(exact))
    assert torch.isfinite(torch.autograd.grad(log_odds(x), x)[0])


def test_chipo_by_hand_where_its_margin_is_clipped_and_where_its_exponential_stops():
    ratios = torch.tensor([[3.0, 0.0, 1e4], [0.0, 3.0, 1e4]], requires_grad=True)  # c and r
    loss = losses.chipo(*ratios, 0.1, r_max=0.5)  # y would be 2.2, -2.2 and 0
    assert loss.tolist() == pytest.approx([0.313262, 1.313262, 0.693147], abs=1e-6)
    loss.sum().backward()
    assert ratios.grad.T.flatten().tolist() == pytest.approx([0, 0, 0, 0, -0.05, 0.05])


def test_orpo_is_finite_at_probability_one():
    a = torch.zeros(2, requires_grad=True)
    loss = losses.orpo(a, torch.tensor([-1e4, 0.0]), 0.1)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(a.grad).all()


FOUR = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)]  # log-ratios +1 and -1, so h = 2
ONE = torch.ones(1)


def test_dpo_by_hand():
    loss, chosen, rejected = dpo_loss(*FOUR, beta=0.5)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)  # log(1 + e^-1)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)  # rewards include beta
    assert dpo_loss(*FOUR[2:], *FOUR[2:])[0].item() == pytest.approx(0.693147, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LOSSES)
def test_rewards_carry_beta_and_no_gradient_and_all_keep_the_dtype(name, dtype):
    logps = [x.to(dtype).requires_grad_() for x in FOUR]
    loss, chosen, rejected = preference_loss(name, *logps, ONE, ONE, 0.1)
    assert loss.dtype == chosen.dtype == rejected.dtype == dtype
    assert loss.requires_grad and not chosen.requires_grad and not rejected.requires_grad
    expected = (0.1, -0.1) if needs_reference(name) else (-1.0, -1.2)
    assert (chosen.item(), rejected.item()) == pytest.approx(expected)


def test_kto_of_pairs_is_the_mean_of_unpaired_kto_and_its_kl_has_no_gradient():
    kl = torch.tensor(0.3, requires_grad=True)
    policy, ref = torch.cat(FOUR[:2]).requires_grad_(), torch.cat(FOUR[2:])
    unpaired, rewards = kto_loss(policy, ref, torch.tensor([True, False]), kl=kl)
    assert torch.autograd.grad(unpaired.sum(), kl, allow_unused=True) == (None,)
    paired = preference_loss("kto", *FOUR, None, None, 0.1, kl=0.3)[0]
    assert paired.item() == pytest.approx(unpaired.mean().item())
    assert rewards.tolist() == pytest.approx([0.1, -0.1])


def test_the_adapter_averages_where_the_loss_compares_averages():
    lengths = torch.tensor([4.0]), torch.tensor([8.0])
    averages = [x / n for x, n in zip(FOUR, lengths * 2, strict=True)]
    a, b, c, d = (x.double() for x in averages)
    ipo, simpo = losses.ipo(a - c, b - d, 0.1), losses.simpo(a, b, 2.0)
    assert preference_loss("ipo", *FOUR, *lengths, 0.1)[0] == ipo.float()
    assert preference_loss("simpo", *FOUR[:2], None, None, *lengths, 2.0)[0] == simpo.float()
    assert preference_loss("dpo", *FOUR, *lengths, 0.1)[0] == dpo_loss(*FOUR)[0]
    loss, *rewards = preference_loss("dpo_norm", *FOUR, *lengths, 5.0)
    assert loss == dpo_loss(*averages, beta=5.0)[0] and rewards == [1.25, -0.625]


REFUSED = [
    (lambda: dpo_loss(*FOUR, beta=0), "beta must be > 0, found 0"),
    (lambda: dpo_loss(*FOUR, label_smoothing=0.5), "label_smoothing must be in"),
    (lambda: dpo_loss(ONE, *[torch.zeros(2)] * 3), "share one shape"),
    (lambda: kto_loss(ONE, ONE, ONE.bool(), kl=-0.1), "kl must be >= 0, found -0.1"),
    (lambda: needs_reference("dpp"), "unknown loss 'dpp': choose one of dpo"),
    (lambda: preference_loss("ipo", *FOUR, ONE, ONE, 0.1, 0.1), "has no label_smoothing"),
    (lambda: preference_loss("dpo", ONE, ONE, None, None, ONE, ONE, 0.1), "needs the reference"),
]


@pytest.mark.parametrize("refused, reason", REFUSED)
def test_refusals(refused, reason):
    with pytest.raises(ValueError, match=reason):
        refused()


POLICY, REF = [[-10, -40.2, -3.5], [-12, -31, -90.5]], [[-11.0, -40, -5], [-11, -35.5, -60]]
SUMS = [*torch.tensor(POLICY), *torch.tensor(REF)]
LENGTHS = torch.tensor([4, 9, 2]), torch.tensor([6, 7, 12])
AVERAGES = [x / n for x, n in zip(SUMS, LENGTHS, strict=False)]


def stub(**fields):
    """A trainer of TRL's with these settings and nothing else; its arithmetic stays TRL's own."""
    fields = {"label_smoothing": 0, "alpha": 0, "aux_loss_enabled": 0, "use_weighting": 0} | fields
    accelerator = MagicMock(device="cpu", gather_for_metrics=lambda x: x)
    return MagicMock(accelerator=accelerator, **{"model.training": False}, **fields)


def model_of(logps, tokens):
    """A model that gives completions log-probs (N,), all on the first of so many tokens."""
    zeros = torch.zeros(len(logps), tokens)
    outputs = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
    outputs["log_sum_sq_probs"] = zeros  # log 1, so that WPO's weights are the plain ones
    outputs["log_probs"] = zeros.index_copy(1, torch.tensor([0]), logps[:, None])
    return MagicMock(return_value=MagicMock(**outputs))


def trl_loss(**settings):
    """The mean loss of SUMS by the arithmetic inside TRL's own DPOTrainer."""
    trainer = pytest.importorskip("trl").DPOTrainer
    settings |= {"loss_weights": [1.0], "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    place = torch.arange(13)  # a prompt of one token, then the completion
    mask = ((place > 0) & (place <= torch.cat(LENGTHS)[:, None])).long()
    batch = {"input_ids": mask, "completion_mask": mask}
    batch |= {"ref_chosen_logps": SUMS[2], "ref_rejected_logps": SUMS[3]}
    model = model_of(torch.cat(SUMS[:2]), tokens=12)
    return trainer._compute_loss(stub(**settings), model, batch, False).item()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", "dpo dpo_norm wpo hinge ipo robust apo_zero apo_down".split())
def test_against_trl_dpo_trainer(name, beta):
    smoothing = 0.2 if name == "robust" else 0.0
    ours = preference_loss(name, *SUMS, *LENGTHS, beta, label_smoothing=smoothing)[0].mean()
    kind = name.replace("wpo", "dpo").replace("dpo", "sigmoid")
    settings = {"loss_types": [kind], "use_weighting": name == "wpo"}
    theirs = trl_loss(beta=beta, label_smoothing=smoothing, **settings)
    assert ours.item() == pytest.approx(theirs, rel=2e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_against_trl_cpo_simpo_and_orpo_whose_sft_terms_are_added_apart(beta):
    cpo = pytest.importorskip("trl.experimental.cpo").CPOTrainer.cpo_loss
    orpo = pytest.importorskip("trl.experimental.orpo").ORPOTrainer.odds_ratio_loss
    theirs = {
        "cpo": cpo(stub(beta=beta, loss_type="sigmoid"), *SUMS[:2])[0],
        "simpo": cpo(stub(beta=beta, loss_type="simpo", simpo_gamma=0.5), *AVERAGES)[0],
        "orpo": -AVERAGES[0] - orpo(stub(beta=beta), *AVERAGES)[0],
    }
    for name, expected in theirs.items():
        options = {"nll_weight": 0.0} if name == "cpo" else {}
        ours = preference_loss(name, *SUMS[:2], None, None, *LENGTHS, beta, **options)[0]
        torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)


def test_against_trl_kto_which_averages_over_completions():
    trainer = pytest.importorskip("trl").KTOTrainer
    policy, ref, wanted = torch.cat(SUMS[:2]), torch.cat(SUMS[2:]), torch.arange(6) < 3
    fake = stub(beta=0.1, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5)
    fake._compute_kl_logps.return_value = torch.tensor([0.25])  # its own estimate, at least 0
    batch = {"label": wanted, "input_ids": torch.zeros(6, 2).long(), "ref_logps": ref}
    batch |= {"completion_mask": torch.ones(6, 2), "ref_KL_logps": torch.tensor([0.0])}
    theirs = trainer._compute_loss(fake, model_of(policy, tokens=1), batch, False)
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    ours = kto_loss(policy, ref, wanted, 0.25, 0.1, **weights)[0].mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)
