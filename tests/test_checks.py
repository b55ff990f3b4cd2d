"""Every check accepts the right implementation and rejects each planted bug of its kind, naming it."""

import pytest
import torch

from dpo_utils import losses
from dpo_utils.exercises import bugs, checks
from dpo_utils.logps import sequence_logps
from dpo_utils.tokens import collate


def right_ipo(a, b, c, d, chosen_lengths, rejected_lengths, beta):
    return losses.preference_loss("ipo", a, b, c, d, chosen_lengths, rejected_lengths, beta)[0]


def right_kl(policy, ref, dataset, generator):
    return (policy / ref).log()[policy.multinomial(20_000, replacement=True, generator=generator)].mean()


RIGHT = {
    "check_sequence_logps": sequence_logps,
    "check_collate": collate,
    "check_dpo_loss": losses.dpo_loss,
    "check_ipo_loss": right_ipo,
    "check_kl_estimate": right_kl,
}
BUG_NAMED = {
    "unshifted_labels": "labels are not shifted",
    "mask_off_by_one": "mask is off by one",
    "first_token_missed": "first completion token is lost",
    "mean_over_padding": "mean over all positions, padding included",
    "prompt_scored": "prompt's tokens are scored too",
    "half_precision": "half precision",
    "log_of_softmax": "use log_softmax",
    "masks_by_pad_id": "mask made from token ids",
    "response_hidden": "response is masked out of attention",
    "prompt_in_the_mask": "prompt tokens are scored",
    "wrong_sign": "prefers the rejected completion",
    "rewards_without_beta": "rewards leave out beta",
    "beta_outside": "beta stands outside",
    "reference_forgotten": "reference is missing",
    "log_of_sigmoid": "use logsigmoid",
    "rewards_with_gradient": "detach them",
    "ipo_summed": "summed log-probs",
    "kl_on_the_dataset": "sample them from the policy",
    "reference_with_gradient": "outside torch.no_grad",
    "reference_in_train_mode": "dropout is on in the reference",
    "reference_is_the_policy": "share trained weights",
    "policy_frozen": "nothing is trainable",
    "reference_before_sft": "not the model training starts from",
}
FUNCTIONS = [(check, bug) for check, bugs in bugs.EXHIBITS.items() if check != "check_reference" for bug in bugs]


@pytest.mark.parametrize("check", RIGHT)
def test_the_right_one_is_accepted(check):
    getattr(checks, check)(RIGHT[check])


@pytest.mark.parametrize("check,bug", FUNCTIONS, ids=lambda x: getattr(x, "__name__", x))
def test_each_bug_is_rejected_and_named(check, bug):
    with pytest.raises(AssertionError, match=BUG_NAMED[bug.__name__]):
        getattr(checks, check)(bug)


def test_every_exhibit_has_a_check_and_a_name():
    names = [bug.__name__ for family in bugs.EXHIBITS.values() for bug in family]
    assert sorted(names) == sorted(BUG_NAMED) and len(names) == len(set(names)) >= 10
    assert set(bugs.EXHIBITS) == {name for name in vars(checks) if name.startswith("check_")}


# ---- bugs that only the tests hold: one line each, on top of the museum's


def shifted(logits, ids):
    return logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]


@pytest.mark.parametrize(
    "wrong,named",
    [
        (lambda x, ids, m: -sequence_logps(x, ids, m), "sign is wrong"),
        (lambda x, ids, m: sequence_logps(x, ids, m) / m.sum(1), "mean over the completion"),
        (lambda x, ids, m: sequence_logps(x, ids, m).mean(), "reduced or broadcast"),
        (lambda x, ids, m: sequence_logps(x, ids, m.cumsum(1) > 0), "padding after the completion"),
        (lambda x, ids, m: sequence_logps(x, ids, torch.ones_like(m)), "prompt and padding"),
        (lambda x, ids, m: sequence_logps(x, ids, m).detach(), "detached"),
        (lambda x, ids, m: sequence_logps(x.bfloat16().log_softmax(-1), ids, m), "half precision"),
        (lambda x, ids, m: (shifted(x, ids).exp() * m[:, 1:]).sum(1), "probabilities are summed"),
        (lambda x, ids, m: (shifted(x, ids) * torch.cat([m[:, 2:], m[:, :1]], 1) * m[:, 1:]).sum(1), "EOS, is lost"),
    ],
)  # fmt: skip
def test_more_wrong_log_probs(wrong, named):
    with pytest.raises(AssertionError, match=named):
        checks.check_sequence_logps(wrong)


def changed(**changes):
    def wrong(pairs, pad_id):
        batch = collate(pairs, pad_id)
        return {**batch, **{name: change(batch) for name, change in changes.items()}}

    return wrong


@pytest.mark.parametrize(
    "wrong,named",
    [
        (changed(attention_mask=lambda b: torch.ones_like(b["attention_mask"])), "padding is attended to"),
        (changed(completion_mask=lambda b: b["completion_mask"].roll(1, 1)), "padding is scored"),
        (changed(completion_mask=lambda b: b["completion_mask"].cumsum(1) > 0), "padding is scored"),
        (changed(completion_mask=lambda b: b["completion_mask"] & (b["input_ids"] != 7)), "EOS is not supervised"),
        (changed(completion_mask=lambda b: (m := b["completion_mask"]) & m.roll(1, 1)), "tokens are missing"),
        (changed(input_ids=lambda b: b["input_ids"].view(2, 2, -1).transpose(0, 1).flatten(0, 1)), "out of order"),
        (changed(input_ids=lambda b: torch.stack([r.roll(int(n)) for r, n in zip(
            b["input_ids"], b["input_ids"].shape[1] - b["attention_mask"].sum(1), strict=True)])), "on the left"),
        (lambda pairs, pad_id: {"input_ids": collate(pairs, pad_id)["input_ids"]}, "missing or misnamed"),
        (lambda pairs, pad_id: {k: v[:, :-1] for k, v in collate(pairs, pad_id).items()}, "longest"),
    ],
)  # fmt: skip
def test_more_wrong_batches(wrong, named):
    with pytest.raises(AssertionError, match=named):
        checks.check_collate(wrong)


def with_losses(change):
    def wrong(a, b, c, d, beta=0.1):
        right = losses.dpo_loss(a, b, c, d, beta)
        return change(right[0], a, b, c, d, beta), *right[1:]

    return wrong


def scaled(outputs, *factors):
    return tuple(x * factor for x, factor in zip(outputs, factors, strict=True))


@pytest.mark.parametrize(
    "wrong,named",
    [
        (with_losses(lambda x, *_: x.mean()), "reduced"),
        (with_losses(lambda x, *_: -x), "without its minus"),
        (with_losses(lambda x, a, b, c, d, beta: x * (a - c != b - d)), "where policy equals reference"),
        (lambda *four, beta=0.1: scaled(losses.dpo_loss(*four, beta), 1, 1 / beta, 1), "chosen_rewards"),
        (lambda *four, beta=0.1: scaled(losses.dpo_loss(*four, beta), 1, 1, 1 / beta), "rejected_rewards"),
        (with_losses(lambda x, *_: x.detach() + (x - x.detach()) * 2), "gradient on the chosen"),
        (with_losses(lambda x, a, b, *ref: losses.dpo_loss(a, b.detach(), *ref)[0] + 0 * b), "rejected is left"),
        (lambda a, b, c, d, beta=0.1: losses.dpo_loss(a, b, c, d, 1 / beta), "beta divides"),
        (lambda a, b, c, d, beta=0.1: losses.dpo_loss(a, b, c, d, 1.0), "beta is missing"),
        (lambda a, b, c, d, beta=0.1: losses.dpo_loss(c, d, a, b, beta), "rejected completion"),
        (lambda a, b, c, d, beta=0.1: losses.reference_free_loss(a, b, beta), "reference is missing"),
    ],
)  # fmt: skip
def test_more_wrong_losses(wrong, named):
    with pytest.raises(AssertionError, match=named):
        checks.check_dpo_loss(wrong)


# ---- the reference, with real models


def tiny_phi(dropout=0.1):
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, resid_pdrop=dropout, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return PhiForCausalLM(config).eval()


IDS = torch.randint(1, 32, (3, 8), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(8).expand(3, 8) >= 3


def score(model):
    return sequence_logps(model(input_ids=IDS, use_cache=False).logits, IDS, MASK)


def no_grad(fn):
    def call():
        with torch.no_grad():
            return fn()

    return call


def test_a_copy_is_a_reference():
    policy, reference = tiny_phi(), tiny_phi()
    before = score(policy)
    checks.check_reference(policy, lambda: score(policy), no_grad(lambda: score(reference)))
    assert torch.equal(score(policy), before)  # the step was undone


@pytest.mark.parametrize("bug", bugs.EXHIBITS["check_reference"], ids=lambda x: x.__name__)
def test_each_wrong_reference_is_rejected_and_named(bug):
    policy, reference = tiny_phi(), tiny_phi()
    with pytest.raises(AssertionError, match=BUG_NAMED[bug.__name__]):
        checks.check_reference(policy, *bug(policy, reference, score))


def adapted(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1"], task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(tiny_phi(), config)
    model.eval()

    def adapter_off():
        with torch.no_grad(), model.disable_adapter():
            return score(model)

    return model, lambda: score(model), adapter_off


def test_adapter_off_is_a_reference():
    checks.check_reference(*adapted())


def test_trained_biases_break_adapter_off():
    with pytest.raises(AssertionError, match="share trained weights"):
        checks.check_reference(*adapted(bias="all"))


def test_dropout_in_the_policy_is_named():
    model, policy, reference = adapted()
    model.train()
    with pytest.raises(AssertionError, match="dropout is on in the policy"):
        checks.check_reference(model, policy, reference)


def test_a_step_that_misses_the_policy_is_named():
    policy, other = tiny_phi(), tiny_phi()
    pretend = torch.nn.Parameter(torch.zeros(()))
    lonely = torch.nn.ParameterList([pretend])
    with pytest.raises(AssertionError, match="does not reach the weights"):
        checks.check_reference(lonely, lambda: score(policy) + 0 * pretend, no_grad(lambda: score(other)))


def test_non_finite_log_probs_are_named_before_dropout_is_blamed():
    policy = tiny_phi()
    with pytest.raises(AssertionError, match="overflow in half precision"):
        checks.check_reference(policy, lambda: score(policy) * float("nan"), no_grad(lambda: score(policy)))
