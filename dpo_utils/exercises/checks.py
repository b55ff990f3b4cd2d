"""Checks that tell a right implementation from a wrong one, for learners, the museum and the tests.

Each takes the function to be judged, gives it inputs whose answer is worked out here, apart from
`losses` and `logps`, and raises AssertionError if the function gives another answer, naming the bug
of the museum that gives it too. A check that passes says nothing.
"""

from unittest.mock import MagicMock

import torch
from torch.distributions import Categorical
from torch.nn.functional import softplus

from dpo_utils.exercises import bugs


def _fail(what, found, expected, bug):
    def show(x):
        if not torch.is_tensor(x):
            return x
        numbers = [round(v, 4) for v in x.flatten()[:8].tolist()]
        gradient = ", with gradient" if x.requires_grad else ""
        return f"{numbers} (shape {tuple(x.shape)}{gradient})"

    named = f"{bug.__name__}: {bug.__doc__}" if callable(bug) else bug
    raise AssertionError(
        f"{what}: found {show(found)}, expected {show(expected)}. Likely bug: {named}"
    )


def _same(x, y, tolerance):
    if x is None or y is None or x.shape != y.shape or x.requires_grad != y.requires_grad:
        return False
    x, y = x.detach().double(), y.detach().double()
    return torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def _outputs(fn, inputs):
    """What fn gives, by name, and its first output's gradient along the inputs that take one."""
    found = fn(*inputs)
    if not isinstance(found, dict):
        found = found if isinstance(found, tuple) else (found,)
        names = ("result", "chosen_rewards", "rejected_rewards")
        found = {name: torch.as_tensor(x) for name, x in zip(names, found, strict=False)}
        leaves = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
        if leaves and found["result"].requires_grad:
            slopes = torch.autograd.grad(found["result"].sum(), leaves, materialize_grads=True)
            found |= {f"gradient along input {i}": x for i, x in enumerate(slopes, 1)}
    return found


def _judge(check, fn, right, *inputs, tolerance=1e-5):
    """Raise AssertionError at the first output where fn differs from right on these inputs."""
    found = _outputs(fn, inputs)
    for what, expected in _outputs(right, inputs).items():
        mine = found.get(what)
        if not _same(mine, expected, tolerance):
            suspects = [*bugs.EXHIBITS[check], "none of the museum's; compare term by term"]
            if _same(mine, expected, 0.03):
                suspects[-1] = bugs.half_precision
            same = (b for b in suspects[:-1] if _same(_outputs(b, inputs)[what], mine, tolerance))
            _fail(f"{check}, {what}", mine, expected, next(same, suspects[-1]))


def check_sequence_logps(fn):
    """fn(logits (N, T, V), input_ids (N, T), completion_mask (N, T)) -> summed log-probs (N,)."""

    def right(logits, ids, mask):
        token = Categorical(logits=logits[:, :-1].double()).log_prob(ids[:, 1:])
        return (token * mask[:, 1:]).sum(1)

    generator = torch.Generator().manual_seed(0)
    start, end = torch.tensor([[2], [3], [1], [6]]), torch.tensor([[5], [5], [8], [7]])
    some = (torch.arange(8) >= start) & (torch.arange(8) < end)
    short = torch.randn(4, 8, 11, generator=generator).double().requires_grad_()
    long = torch.randn(2, 257, 64, generator=generator).bfloat16()
    rare = torch.zeros(1, 8, 4).index_fill(2, torch.tensor(0), 300.0)  # e^-300 is 0 in float32
    for logits, mask in ((short, some), (long, torch.ones(2, 257).bool()), (rare, some[:1])):
        ids = torch.randint(1, logits.shape[-1], mask.shape, generator=generator)
        _judge("check_sequence_logps", fn, right, logits, ids, mask)


def check_collate(fn):
    """fn(pairs, pad_id) -> dict of input_ids, attention_mask, completion_mask, (2B, T) each."""
    eos = 7  # also the pad id and a token of one prompt, so that masks made from ids go wrong
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, eos], "rejected_ids": [4, 5, 6, eos]},
        {"prompt_ids": [1, eos, 2], "chosen_ids": [3, 3, 3, eos], "rejected_ids": [4]},
    ]
    rows = ["1237777", "1723337", "1245677", "1724777"]
    ids = torch.tensor([[int(token) for token in row] for row in rows])
    start, end = torch.tensor([[2], [3], [2], [3]]), torch.tensor([[4], [7], [6], [4]])
    real, answer = torch.arange(7) < end, torch.arange(7) >= start
    masks = {"attention_mask": real, "completion_mask": real & answer}
    _judge("check_collate", fn, lambda *_: {"input_ids": ids, **masks}, pairs, eos)


def check_dpo_loss(fn):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> losses and rewards."""

    def right(a, b, c, d, beta):
        chosen, rejected = beta * (a - c), beta * (b - d)
        return softplus(rejected - chosen), chosen.detach(), rejected.detach()

    # Two pairs, one at the start of training, where the loss is ln 2, and two far from it.
    policy = [[-10, -8, -5, -1e4, -1], [-12, -3, -6, -1, -1e4]]
    ref = [[-11, -9, -5, -1, -1], [-11.5, -6, -6, -1, -1]]
    policy, ref = (torch.tensor(x, dtype=torch.float64) for x in (policy, ref))
    policy = [x.clone().requires_grad_() for x in policy]
    _judge("check_dpo_loss", fn, right, *policy, *ref, 0.5)


def check_ipo_loss(fn):
    """fn(four log-probs as for DPO, chosen_lengths, rejected_lengths, beta) -> losses.

    The log-probs are sums over 2 and 4 tokens; IPO compares averages.
    """
    inputs = [torch.tensor([x]) for x in (-10.0, -12.0, -14.0, -13.0, 2.0, 4.0)]
    expected = torch.tensor([(4 / 2 - 1 / 4 - 1 / (2 * 0.25)) ** 2])
    _judge("check_ipo_loss", fn, lambda *_: expected, *inputs, 0.25)


def check_kl_estimate(fn):
    """fn(policy (K,), ref (K,), dataset (n,), generator) -> estimate of KL(policy || ref) in nats.

    policy and ref are probabilities; dataset holds completions sampled from the reference.
    """
    policy, ref = torch.tensor([0.7, 0.2, 0.05, 0.05]), torch.tensor([0.1, 0.2, 0.3, 0.4])
    dataset = ref.multinomial(20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    exact = (policy * (policy / ref).log()).sum()
    inputs = policy, ref, dataset, torch.Generator().manual_seed(1)
    _judge("check_kl_estimate", fn, lambda *_: exact, *inputs, tolerance=0.02)


def check_reference(model, policy_logps, reference_logps, tolerance=1e-4):
    """The reference before training's first step: fixed, without gradient, equal to the policy.

    model is what will be trained, in the mode (train or eval) of the loop; policy_logps() and
    reference_logps() give log-probs (N,) of the same batch. tolerance in nats, for policy ==
    reference. Takes a small step on the trainable weights and undoes it.
    """
    policy, reference = policy_logps(), reference_logps()
    finite = policy.isfinite().all() and reference.isfinite().all()
    start = _same(policy.detach(), reference.detach(), tolerance)
    for wrong, bug in (
        (not finite, "overflow in half precision, or a row without any visible token"),
        (not policy.equal(policy_logps()), "dropout is on in the policy; call eval()"),
        (not reference.equal(reference_logps()), bugs.reference_in_train_mode),
        (reference.requires_grad, bugs.reference_with_gradient),
        (not policy.requires_grad, bugs.policy_frozen),
        (not start, bugs.reference_before_sft),
    ):
        if wrong:
            _fail("policy and reference before training", policy, reference, bug)
    moved_policy, moved_reference = _after_a_step(model, policy, policy_logps, reference_logps)
    if moved_policy.equal(policy):
        bug = "the step does not reach the weights that the policy uses"
        _fail("policy after a step", moved_policy, "a change", bug)
    if not moved_reference.equal(reference):
        _fail("reference after a step", moved_reference, reference, bugs.reference_is_the_policy)


def _after_a_step(model, policy, policy_logps, reference_logps):
    weights = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(policy.sum(), weights, materialize_grads=True)
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            weight += 1e-2 * slope / (slope.norm() + 1e-12)
        try:
            return policy_logps(), reference_logps()
        finally:
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


def trl_loss(*inputs, beta=0.1, loss_type="sigmoid", label_smoothing=0.0):
    """The mean loss that TRL 1.16's own DPOTrainer code gives for what `preference_loss` takes.

    inputs: log-probs (B,) of policy and reference, chosen first, and both lengths (B,). The model
    is a stand-in with a completion's whole log-prob on its first token; the arithmetic is TRL's.
    """
    from trl import DPOTrainer  # heavy, and wanted only where a comparison is asked for

    policy, ref, lengths = (torch.cat(x) for x in (inputs[:2], inputs[2:4], inputs[4:]))
    place = torch.arange(int(lengths.max()) + 1)  # a prompt of one token, then the completion
    mask = (place >= 1) & (place <= lengths[:, None])  # (2B, T)
    zeros = torch.zeros(len(mask), len(place) - 1)
    outputs = {"entropy": zeros, "mean_logits": zeros, "is_top1": zeros.bool()}
    outputs["log_probs"] = policy[:, None] * (place[1:] == 1)
    settings = {"beta": beta, "loss_types": [loss_type], "label_smoothing": label_smoothing}
    settings |= {"loss_weights": [1.0], "ld_alpha": None, "f_divergence_type": "reverse_kl"}
    settings |= {"model.training": False, "aux_loss_enabled": False, "use_weighting": False}
    trainer = MagicMock(**settings)
    trainer.accelerator = MagicMock(device="cpu", gather_for_metrics=lambda x: x)
    batch = {"input_ids": mask.long(), "completion_mask": mask.long()}
    refs = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), ref.chunk(2), strict=True))
    model = MagicMock(return_value=MagicMock(**outputs))
    return DPOTrainer._compute_loss(trainer, model, batch | refs, False).item()
