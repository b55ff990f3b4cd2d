"""Every loss against an independent oracle, mpmath at 60 digits written from the papers, and against TRL's own code."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import mpmath as mp
import pytest
import torch

from dpo_utils import losses
from dpo_utils.losses import LOSSES, dpo_loss, kto_loss, log_odds, needs_reference, preference_loss

BETAS = [0.01, 0.1, 0.5]
DIFFERENCES = [0.0, 1e-6, -1e-6, 1.0, -1.0, 50.0, -50.0, 1e3, -1e3, 1e4, -1e4]
TINY = 1.2e-38  # the smallest normal float32: below it a relative error has no meaning
EPS = 0.1
mp.mp.dps = 60


def sigmoid(x):
    return 1 / (1 + mp.exp(-x))


def odds(x):
    return mp.exp(x) / (1 - mp.exp(x))


# The papers' formulas in log-probs a (chosen), b (rejected), c, d (their references) and beta; 60 digits do the rest.
ORACLE = {
    "dpo": lambda a, b, c, d, beta: -mp.log(sigmoid(beta * ((a - c) - (b - d)))),
    "cdpo": lambda a, b, c, d, beta: (
        -(1 - mp.mpf(str(EPS))) * mp.log(sigmoid(beta * ((a - c) - (b - d))))
        - mp.mpf(str(EPS)) * mp.log(sigmoid(-beta * ((a - c) - (b - d))))
    ),
    "robust": lambda a, b, c, d, beta: (
        (
            -(1 - mp.mpf(str(EPS))) * mp.log(sigmoid(beta * ((a - c) - (b - d))))
            + mp.mpf(str(EPS)) * mp.log(sigmoid(-beta * ((a - c) - (b - d))))
        )
        / (1 - 2 * mp.mpf(str(EPS)))
    ),
    "ipo": lambda a, b, c, d, beta: ((a - c) - (b - d) - 1 / (2 * beta)) ** 2,
    "hinge": lambda a, b, c, d, beta: max(mp.mpf(0), 1 - beta * ((a - c) - (b - d))),
    "kto": lambda a, b, c, d, beta: (
        ((1 - sigmoid(beta * (a - c - mp.mpf(0.25)))) + (1 - sigmoid(beta * (mp.mpf(0.25) - (b - d))))) / 2
    ),
    "apo_zero": lambda a, b, c, d, beta: (1 - sigmoid(beta * (a - c))) + sigmoid(beta * (b - d)),
    "simpo": lambda a, b, c, d, beta: -mp.log(sigmoid(beta * (a - b) - mp.mpf(0.5))),
    "orpo": lambda a, b, c, d, beta: -a - beta * mp.log(sigmoid(mp.log(odds(a) / odds(b)))),
    "cpo": lambda a, b, c, d, beta: -mp.log(sigmoid(beta * (a - b))) - a / 8,
    "dpo_sft": lambda a, b, c, d, beta: -mp.log(sigmoid(beta * ((a - c) - (b - d)))) - a / 8,
    "unlikelihood": lambda a, b, c, d, beta: beta * b - a,
    "reference_free": lambda a, b, c, d, beta: -mp.log(sigmoid(beta * (a - b))),
}
OPTIONS = {"kto": {"kl": 0.25}, "robust": {"label_smoothing": EPS}, "cdpo": {"label_smoothing": EPS}}


def inputs(difference):
    """Log-probs (a, b, c, d) whose chosen minus rejected log-ratio is the difference, up to float32."""
    a, b = (-1.5, -1.5 - difference) if difference >= 0 else (-1.5 + difference, -1.5)
    return [torch.tensor([x], dtype=torch.float32, requires_grad=True) for x in (a, b, -1.5, -1.5)]


def call(name, logps, beta):
    """The loss by its public adapter: lengths of 1 make sums and averages the same number (8 where SFT is added)."""
    lengths = torch.tensor([8.0 if name in losses.WITH_SFT else 1.0])
    base = {"cdpo": "dpo"}.get(name, name)
    return preference_loss(base, *logps, lengths, lengths, beta, **OPTIONS.get(name, {}))


def close(found, exact):
    return abs(mp.mpf(found) - exact) <= 1e-6 * abs(exact) + TINY


@pytest.mark.parametrize("name", ORACLE)
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_value_and_gradient_in_float32(name, beta, difference):
    logps = inputs(difference)
    exact_inputs = [mp.mpf(x.item()) for x in logps]  # the float32 numbers themselves; beta as its decimal
    oracle = ORACLE[name]
    loss = call(name, logps, beta)[0]
    assert loss.dtype == torch.float32 and torch.isfinite(loss).all()
    exact = oracle(*exact_inputs, mp.mpf(str(beta)))
    assert close(loss.item(), exact), (loss.item(), exact)

    gradients = torch.autograd.grad(loss.sum(), logps, allow_unused=True)
    for i, g in enumerate(gradients):
        if g is None:
            continue

        def along(x, i=i):
            return oracle(*[x if j == i else v for j, v in enumerate(exact_inputs)], mp.mpf(str(beta)))

        exact = mp.diff(along, exact_inputs[i], h=mp.mpf(10) ** -25)
        assert torch.isfinite(g).all()
        assert close(g.item(), exact), (i, g.item(), exact)


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "orpo"])  # ORPO's inputs are averages, never in thousands
def test_large_log_probs_keep_their_difference(name):
    """Thousands of nats on each side: arithmetic in float32 would lose digits in the differences."""
    logps = [torch.tensor([x], dtype=torch.float32) for x in (-9001.3, -4000.7, -9003.9, -4001.2)]
    exact = ORACLE[name](*[mp.mpf(x.item()) for x in logps], mp.mpf("0.1"))
    lengths = torch.tensor([8.0 if name in losses.WITH_SFT else 1.0])
    found = preference_loss(name, *logps, lengths, lengths, 0.1, **OPTIONS.get(name, {}))[0]
    assert close(found.item(), exact)


@pytest.mark.parametrize("x", [-700.3, -13.7, -0.8, -0.6, -1.234567e-6, -1.234567e-9])
def test_log_odds_at_both_ends(x):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    exact = mp.log(odds(mp.mpf(x.item())))
    assert abs(log_odds(x).item() - exact) < 1e-14 * (1 + abs(exact))
    assert torch.isfinite(torch.autograd.grad(log_odds(x), x)[0])


def test_orpo_is_finite_at_probability_one():
    a = torch.zeros(2, requires_grad=True)
    loss = losses.orpo_loss(a, torch.tensor([-1e4, 0.0]))[0]
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(a.grad).all()


# ---- numbers a person can check

FOUR = [torch.tensor([x]) for x in (-10.0, -12.0, -11.0, -11.0)]  # log-ratios +1 and -1, so h = 2


def test_dpo_by_hand():
    loss, chosen, rejected = dpo_loss(*FOUR, beta=0.5)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)  # log(1 + e^-1)
    assert (chosen.item(), rejected.item()) == (0.5, -0.5)  # rewards include beta


def test_policy_equal_to_reference_gives_log_two():
    x = torch.tensor([-3.0, -700.0])
    assert dpo_loss(x, x - 5, x, x - 5)[0].tolist() == pytest.approx([0.693147, 0.693147], abs=1e-6)


def test_rewards_carry_no_gradient_and_losses_keep_the_dtype():
    for name in LOSSES:
        for dtype in (torch.float32, torch.float64):
            logps = [x.to(dtype).clone().requires_grad_() for x in FOUR]
            loss, chosen, rejected = preference_loss(name, *logps, torch.ones(1), torch.ones(1), 0.1)
            assert loss.dtype == chosen.dtype == rejected.dtype == dtype
            assert loss.requires_grad and not chosen.requires_grad and not rejected.requires_grad


def test_stationary_points():
    """IPO rests at h = 1/(2 beta) = 5, cDPO at z = log 9, and robust DPO nowhere."""

    def gradient(name, h, **options):
        a = torch.tensor([h - 3.0], dtype=torch.float64, requires_grad=True)
        rest = torch.tensor([-3.0], dtype=torch.float64)
        loss = preference_loss(name, a, rest, rest, rest, torch.ones(1), torch.ones(1), 0.1, **options)[0]
        return torch.autograd.grad(loss.sum(), a)[0].item()

    assert gradient("ipo", 5.0) == pytest.approx(0, abs=1e-12)
    assert gradient("dpo", 10 * float(mp.log(9)), label_smoothing=0.1) == pytest.approx(0, abs=1e-12)
    assert gradient("robust", 1e4, label_smoothing=0.1) == pytest.approx(-0.1 * 0.1 / 0.8)


def test_robust_is_unbiased():
    """(1-e) robust(h) + e robust(-h) = dpo(h): averaging over flips gives the clean loss back."""
    swapped = [FOUR[1], FOUR[0], FOUR[3], FOUR[2]]
    clean = dpo_loss(*FOUR)[0]
    mixed = 0.8 * losses.robust_loss(*FOUR, label_smoothing=0.2)[0]
    mixed += 0.2 * losses.robust_loss(*swapped, label_smoothing=0.2)[0]
    assert mixed.item() == pytest.approx(clean.item(), rel=1e-6)


def test_reference_free_is_dpo_with_a_constant_reference():
    flat = torch.full((1,), -7.0)
    assert losses.reference_free_loss(*FOUR[:2])[0] == dpo_loss(*FOUR[:2], flat, flat)[0]


def test_kto_pair_is_the_mean_of_two_unpaired():
    policy, ref = torch.cat(FOUR[:2]), torch.cat(FOUR[2:])
    unpaired, rewards = kto_loss(policy, ref, torch.tensor([True, False]), kl=0.3)
    paired = preference_loss("kto", *FOUR, None, None, 0.1, kl=0.3)
    assert paired[0].item() == pytest.approx(unpaired.mean().item())
    assert rewards.tolist() == pytest.approx([0.1, -0.1])


def test_the_adapter_averages_where_the_loss_compares_averages():
    lengths = torch.tensor([4.0]), torch.tensor([8.0])
    averages = [x / n for x, n in zip(FOUR, lengths * 2, strict=True)]
    assert preference_loss("ipo", *FOUR, *lengths, 0.1)[0] == losses.ipo_loss(*averages)[0]
    assert preference_loss("simpo", *FOUR[:2], None, None, *lengths, 2.0)[0] == losses.simpo_loss(*averages[:2])[0]
    assert preference_loss("dpo", *FOUR, *lengths, 0.1)[0] == dpo_loss(*FOUR)[0]


# ---- refusals


def test_refusals():
    one, two = torch.zeros(1), torch.zeros(2)
    with pytest.raises(ValueError, match="beta must be > 0, found 0"):
        dpo_loss(*FOUR, beta=0)
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        dpo_loss(*FOUR, label_smoothing=0.5)
    with pytest.raises(ValueError, match="share one shape"):
        dpo_loss(one, two, two, two)
    with pytest.raises(ValueError, match="kl must be >= 0"):
        kto_loss(one, one, one.bool(), kl=-0.1)
    with pytest.raises(ValueError, match="unknown loss 'dpp': choose one of dpo"):
        needs_reference("dpp")
    with pytest.raises(ValueError, match="has no label_smoothing"):
        preference_loss("ipo", *FOUR, one, one, 0.1, label_smoothing=0.1)
    with pytest.raises(ValueError, match="needs the reference"):
        preference_loss("dpo", one, one, None, None, one, one, 0.1)


# ---- TRL

CHOSEN, REJECTED = [-10.0, -40.2, -3.5], [-12.0, -31.0, -90.5]
SUMS = [torch.tensor(x) for x in (CHOSEN, REJECTED, [-11.0, -40.0, -5.0], [-11.0, -35.5, -60.0])]
LENGTHS = torch.tensor([4, 9, 2]), torch.tensor([6, 7, 12])


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("name", ["dpo", "hinge", "ipo", "robust", "apo_zero"])
def test_against_trl_dpo_trainer(name, beta):
    from dpo_utils.exercises.checks import trl_loss

    trl_name = {"dpo": "sigmoid"}.get(name, name)
    smoothing = 0.2 if name == "robust" else 0.0
    ours = preference_loss(name, *SUMS, *LENGTHS, beta, label_smoothing=smoothing)[0].mean()
    theirs = trl_loss(*SUMS, *LENGTHS, beta=beta, loss_type=trl_name, label_smoothing=smoothing)
    assert ours.item() == pytest.approx(theirs, rel=2e-6)


def test_trl_sigmoid_ignores_label_smoothing():
    """A difference in meaning, held here so that a change in TRL is noticed: ours is cDPO."""
    from dpo_utils.exercises.checks import trl_loss

    plain = trl_loss(*SUMS, *LENGTHS, beta=0.1, loss_type="sigmoid")
    assert trl_loss(*SUMS, *LENGTHS, beta=0.1, loss_type="sigmoid", label_smoothing=0.2) == plain
    assert dpo_loss(*SUMS, beta=0.1, label_smoothing=0.2)[0].mean().item() != pytest.approx(plain, rel=1e-3)


def stub(**fields):
    return SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), label_smoothing=0.0, alpha=0.0, **fields)


@pytest.fixture(scope="module")
def cpo_trainer():
    return pytest.importorskip("trl.experimental.cpo").CPOTrainer


@pytest.mark.parametrize("beta", BETAS)
def test_against_trl_cpo_and_simpo(cpo_trainer, beta):
    """TRL adds CPO's SFT part apart, as a mean over the batch's tokens; ours is per pair, then averaged."""
    theirs = cpo_trainer.cpo_loss(stub(beta=beta, loss_type="sigmoid"), *SUMS[:2])[0]
    ours = losses.cpo_loss(*SUMS[:2], LENGTHS[0], beta=beta, nll_weight=0.0)[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)
    averages = [x / n for x, n in zip(SUMS, LENGTHS, strict=False)]
    theirs = cpo_trainer.cpo_loss(stub(beta=beta, loss_type="simpo", simpo_gamma=0.5), *averages)[0]
    ours = preference_loss("simpo", *SUMS[:2], None, None, *LENGTHS, beta, gamma=0.5)[0]
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=0)


def test_against_trl_orpo():
    """TRL returns beta log s(odds ratio) and adds the SFT part apart, over prompt and completion alike."""
    trainer = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    averages = [x / n for x, n in zip(SUMS, LENGTHS, strict=False)]
    theirs = -trainer.odds_ratio_loss(stub(beta=0.1), *averages)[0]
    ours = losses.orpo_loss(*averages, beta=0.1)[0] + averages[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_against_trl_kto():
    """TRL clamps its KL estimate at zero and averages over completions; run here with that estimate given as 0.25."""
    trainer = pytest.importorskip("trl").KTOTrainer
    kl = {"policy": torch.tensor([0.25]), "ref": torch.tensor([0.0])}
    policy, ref = torch.cat(SUMS[:2])[:, None], torch.cat(SUMS[2:])
    model = SimpleNamespace(training=False)
    zeros = torch.zeros_like(policy)
    answer = SimpleNamespace(log_probs=policy, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    fake = stub(
        beta=0.1, loss_type="kto", desirable_weight=1.5, undesirable_weight=0.5, calculate_KL=True,
        precompute_ref_logps=True, aux_loss_enabled=False, model=model, _compute_kl_logps=lambda *_: kl["policy"],
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0,
    )  # fmt: skip
    fake.accelerator.gather_for_metrics = lambda x: x
    wanted = torch.tensor([True] * 3 + [False] * 3)
    batch = {
        "label": wanted, "input_ids": torch.zeros(6, 2, dtype=torch.long), "completion_mask": torch.ones(6, 2),
        "ref_logps": ref, "ref_KL_logps": kl["ref"],
    }  # fmt: skip
    theirs = trainer._compute_loss(fake, lambda **_: answer, batch, False)
    ours = kto_loss(policy[:, 0], ref, wanted, kl=0.25, desirable_weight=1.5, undesirable_weight=0.5)[0].mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)


def test_every_loss_has_an_oracle():
    assert set(LOSSES) <= set(ORACLE)
    assert list(itertools.compress(LOSSES, [not needs_reference(n) for n in LOSSES])) == [
        "simpo", "orpo", "cpo", "unlikelihood", "reference_free",
    ]  # fmt: skip
