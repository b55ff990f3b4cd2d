"""Checks that tell a right implementation from a wrong one, for learners, the museum and the tests.

Each gives the function to be judged inputs whose answer is worked out here, apart from `losses` and
`logps`. Another answer raises AssertionError, which names the bug of the museum that gives it too.
"""

import torch
from torch.nn.functional import cross_entropy, softplus

from dpo_utils.exercises import bugs


def _fail(what, found, expected, bug):
    bug = f"{bug.__name__}: {bug.__doc__}" if callable(bug) else bug
    message = f"{what}: found {found}, expected {expected}. Likely bug: {bug}"
    raise AssertionError(" ".join(message.split()))  # in one line, where a tensor prints in several


def _same(x, y, tolerance):
    alike = x.shape == y.shape and x.requires_grad == y.requires_grad
    return alike and torch.allclose(x.double(), y.double(), tolerance, tolerance, equal_nan=True)


def _judge(fn, check, answer, expected, tolerance=1e-5):
    """Compare the named tensors of answer(fn) with those expected; _fail at the first other one."""
    found = answer(fn)
    for name, right in expected.items():
        mine = torch.as_tensor(found.get(name, []))
        if not _same(mine, right, tolerance):
            twins = [b for b in bugs.EXHIBITS[check] if _same(answer(b)[name], mine, tolerance)]
            _fail(f"{check}, {name}", mine, right, [*twins, "none of the museum's"][0])


def check_sequence_logps(fn):
    """fn(logits (N, T, V), input_ids (N, T), completion_mask (N, T)) -> summed log-probs (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 257, 64, generator=generator)
    logits[3] *= 100  # probabilities of e^-300 are zero in float32
    ids = torch.randint(64, (4, 257), generator=generator)
    start, end = torch.tensor([[[2], [3], [1], [6]], [[5], [257], [200], [8]]])
    mask = (torch.arange(257) >= start) & (torch.arange(257) < end)
    for x in (logits.requires_grad_(), logits.detach().bfloat16()):
        losses = cross_entropy(x[:, :-1].double().mT, ids[:, 1:], reduction="none")
        expected = {"logps": -(losses * mask[:, 1:]).sum(1)}
        _judge(fn, "check_sequence_logps", lambda f, x=x: {"logps": f(x, ids, mask)}, expected)


def check_collate(fn):
    """fn(pairs, pad_id) -> dict of input_ids, attention_mask, completion_mask, (2B, T) each."""
    pairs = [  # 7 is EOS, the pad id and a token of one prompt: masks made from ids go wrong
        {"prompt_ids": [1, 2], "chosen_ids": [3, 7], "rejected_ids": [4, 5, 6, 7]},
        {"prompt_ids": [1, 7, 2], "chosen_ids": [3, 3, 3, 7], "rejected_ids": [4]},
    ]
    rows = {
        "input_ids": "1237777 1723337 1245677 1724777",
        "attention_mask": "1111000 1111111 1111110 1111000",
        "completion_mask": "0011000 0001111 0011110 0001000",
    }
    expected = {k: torch.tensor([list(map(int, x)) for x in v.split()]) for k, v in rows.items()}
    _judge(fn, "check_collate", lambda f: f(pairs, 7), expected)


def check_dpo_loss(fn):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> losses and rewards."""
    # Two ordinary pairs, one as at the start of training, and two where the sigmoid is zero.
    policy = torch.tensor([[-10.0, -8, -5, -301, -1], [-12, -3, -6, -1, -301]]).requires_grad_()
    ref = torch.tensor([[-11, -9, -5, -1, -1], [-11.5, -6, -6, -1, -1]])
    chosen, rejected = 0.5 * (policy - ref)
    right = softplus(rejected - chosen), chosen.detach(), rejected.detach()

    def answer(f):
        losses, *rewards = f(*policy, *ref, 0.5)
        slopes = torch.autograd.grad(losses.sum(), policy)[0] if losses.requires_grad else losses
        return {"losses": losses, "gradient": slopes, "rewards": torch.stack(rewards)}

    _judge(fn, "check_dpo_loss", answer, answer(lambda *_: right))


def check_ipo_loss(fn):
    """fn(four log-probs as for DPO, chosen_lengths, rejected_lengths, beta) -> losses."""
    inputs = [torch.tensor([x]) for x in (-10.0, -12.0, -14.0, -13.0, 2.0, 4.0)]
    expected = torch.tensor([(4 / 2 - 1 / 4 - 1 / (2 * 0.25)) ** 2])  # averages over 2 and 4 tokens
    _judge(fn, "check_ipo_loss", lambda f: {"losses": f(*inputs, 0.25)}, {"losses": expected})


def check_kl_estimate(fn):
    """fn(policy (K,), ref (K,), dataset (n,) sampled from ref, generator) -> KL(policy || ref)."""
    policy, ref = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    inputs = policy, ref, torch.tensor([0, 1, 1, 1, 1]).repeat(4000), torch.Generator()
    expected = {"KL": (policy * (policy / ref).log()).sum()}
    _judge(fn, "check_kl_estimate", lambda f: {"KL": f(*inputs)}, expected, tolerance=0.02)


def check_reference(model, policy_logps, reference_logps):
    """The reference before training's first step: fixed, without gradient, equal to the policy.

    Both functions give log-probs (N,) of one batch, with model in the loop's mode (train or eval).
    """
    policy, reference = policy_logps(), reference_logps()
    weights = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    with torch.no_grad():
        for weight in weights:
            weight += 0.01  # for a moment, and the reference must not notice
        reference_moved = reference_logps()
        for weight, before in weights.items():
            weight.copy_(before)
    for wrong, bug in (
        (not (policy - reference).isfinite().all(), "overflow in half precision, or an empty row"),
        (not policy.equal(policy_logps()), "dropout is on in the policy; call eval()"),
        (not reference.equal(reference_logps()), bugs.reference_in_train_mode),
        (reference.requires_grad, bugs.reference_with_gradient),
        (not policy.requires_grad, bugs.policy_frozen),
        (not torch.allclose(policy, reference, atol=1e-4), bugs.reference_before_sft),
        (not reference.equal(reference_moved), bugs.reference_is_the_policy),
    ):
        if wrong:
            _fail("policy and reference before training", policy, reference, bug)
