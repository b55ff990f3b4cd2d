"""Invariants that tell a right implementation from a wrong one, for learners, the bug museum and the tests alike.

Each check takes the function to be judged, feeds it inputs with known answers, and raises AssertionError with the
likely bug in words. A check that passes says nothing. Expected values are worked out here, apart from `losses` and
`logps`, so that the checks can judge those too.
"""

import math
from types import SimpleNamespace

import torch


def _fail(what, found, expected, bug):
    def show(x):
        return [round(v, 4) for v in x.flatten().tolist()] if torch.is_tensor(x) else x

    raise AssertionError(f"{what}: found {show(found)}, expected {show(expected)}. Likely bug: {bug}.")


def _same(found, expected, tolerance=1e-6):
    if found.shape != expected.shape:
        return False
    return torch.allclose(found.detach().double(), expected.double(), rtol=tolerance, atol=tolerance, equal_nan=False)


def _compare(what, found, expected, suspects, tolerance=1e-5):
    """Accept the expected value; otherwise name the suspect whose wrong value was found."""
    if found.shape != expected.shape:
        _fail(what, f"shape {tuple(found.shape)}", f"shape {tuple(expected.shape)}", "reduced or broadcast over pairs")
    if not _same(found, expected, tolerance):
        named = [bug for bug, value in suspects.items() if _same(found, value, tolerance)]
        if _same(found, expected, 0.03):
            named.append("half precision somewhere; use float32")
        _fail(what, found, expected, (named or ["not one of the usual ones; compare term by term"])[0])


# ---- log-probs of completions


def check_sequence_logps(fn):
    """fn(logits (N, T, V), input_ids (N, T), completion_mask (N, T)) -> summed completion log-probs (N,)."""
    generator = torch.Generator().manual_seed(0)
    prompt, end, width = torch.tensor([2, 3, 1, 6]), torch.tensor([5, 5, 8, 7]), 8
    logits = torch.randn(4, width, 11, generator=generator, dtype=torch.float64) * 2
    ids = torch.randint(11, (4, width), generator=generator)
    place = torch.arange(width)
    mask = (place >= prompt[:, None]) & (place < end[:, None])

    _compare("sequence_logps", fn(logits, ids, mask), *_logps_and_suspects(logits, ids, mask))
    _check_precision(fn, generator)
    leaf = logits.clone().requires_grad_()
    if not fn(leaf, ids, mask).requires_grad:
        _fail("sequence_logps", "no gradient", "a gradient", "detached, or computed under no_grad")


def _logps_and_suspects(logits, ids, mask):
    everywhere = logits.log_softmax(-1)
    token = everywhere[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]  # log p(token t | tokens < t) at t - 1
    keep = mask[:, 1:]
    after_first = keep & mask[:, :-1]
    before_last = keep & torch.cat([mask[:, 2:], mask[:, :1]], 1)
    from_start = keep.cumsum(1) > 0
    to_end = keep.flip(1).cumsum(1).flip(1) > 0

    def total(where):
        return (token * where).sum(1)

    right = total(keep)
    unshifted = everywhere.gather(-1, ids[..., None])[..., 0]
    return right, {
        "labels are not shifted; the logits at t-1 predict token t": (unshifted * mask).sum(1),
        "mean over the completion's tokens instead of their sum": right / keep.sum(1),
        "mean over all positions, padding included": right / keep.shape[1],
        "mean over the whole row, padding included": right / mask.shape[1],
        "the mask is off by one; shift it together with the labels": total(mask[:, :-1]),
        "the first completion token is lost; the prompt's last position predicts it": total(after_first),
        "the last completion token, EOS, is lost": total(before_last),
        "the prompt's tokens are scored too": total(to_end),
        "the prompt is scored and the completion is not": total(~keep & to_end),
        "padding after the completion is scored": total(from_start),
        "prompt and padding are scored too": total(torch.ones_like(keep)),
        "the sign is wrong; this is a loss, not a log-prob": -right,
        "probabilities are summed, not their logs": (token.exp() * keep).sum(1),
    }


def _check_precision(fn, generator):
    logits = torch.randn(2, 257, 64, generator=generator).bfloat16()
    ids = torch.randint(64, (2, 257), generator=generator)
    mask = torch.ones(2, 257, dtype=torch.bool)
    found, (exact, _) = fn(logits, ids, mask), _logps_and_suspects(logits.double(), ids, mask)
    if not _same(found, exact, 1e-4):
        _fail("sequence_logps of bfloat16 logits", found, exact, "half precision in log-softmax or sum; use float32")
    sharp = torch.zeros(1, 2, 3)
    sharp[0, 0, 0] = 300.0  # the other tokens have probability e^-300, which is zero in float32
    found = fn(sharp, torch.tensor([[0, 1]]), torch.tensor([[False, True]]))
    if not _same(found, torch.tensor([-300.0])):
        _fail("sequence_logps of a rare token", found, -300, "log(softmax(x)) underflows; use log_softmax")


# ---- batches


def check_collate(fn):
    """fn(pairs, pad_id) -> dict of input_ids, attention_mask, completion_mask, each (2B, T), as `tokens.collate`."""
    eos = 7  # also the pad id, and also a token of one prompt: masks made from ids go wrong on all three counts
    pairs = [
        {"prompt_ids": [1, 2], "chosen_ids": [3, eos], "rejected_ids": [4, 5, 6, eos]},
        {"prompt_ids": [1, eos, 2], "chosen_ids": [3, 3, 3, eos], "rejected_ids": [4]},
    ]
    batch = fn(pairs, eos)
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    width = max(len(a) + len(b) for a, b in rows)
    for name in ("input_ids", "attention_mask", "completion_mask"):
        if name not in batch:
            _fail("collate", f"keys {sorted(batch)}", f"the key {name}", "a tensor is missing or misnamed")
        if tuple(batch[name].shape) != (4, width):
            _fail(f"collate, {name}", f"shape {tuple(batch[name].shape)}", (4, width), "rows not padded to the longest")
    for n, (prompt, completion) in enumerate(rows):
        _check_row(n, prompt, completion, width, *(batch[k][n].tolist() for k in ("input_ids", "attention_mask")))
        _check_completion_mask(n, prompt, completion, batch["completion_mask"][n].bool().tolist())


def _check_row(n, prompt, completion, width, ids, attention):
    text = prompt + completion
    if ids[: len(text)] != text:
        left = ids[-len(text) :] == text
        bug = "padded on the left" if left else "rows out of order; all chosen rows come first, then all rejected"
        _fail(f"collate, input_ids of row {n}", ids, text, bug)
    right = [1] * len(text) + [0] * (width - len(text))
    attention = [int(a) for a in attention]
    if attention != right:
        if not any(attention[len(prompt) : len(text)]):
            bug = "the response is masked out of attention, so its tokens cannot see each other"
        elif sum(attention) > len(text):
            bug = "padding is attended to"
        else:
            bug = "mask made from token ids, so a real token equal to the pad id is hidden; make it from lengths"
        _fail(f"collate, attention_mask of row {n}", attention, right, bug)


def _check_completion_mask(n, prompt, completion, mask):
    right = [len(prompt) <= t < len(prompt) + len(completion) for t in range(len(mask))]
    if mask == right:
        return
    end = len(prompt) + len(completion)
    if any(mask[: len(prompt)]):
        bug = "prompt tokens are scored"
    elif any(mask[end:]):
        bug = "padding is scored"
    elif not mask[end - 1]:
        bug = "EOS is not supervised, as where pad equals EOS and the mask is made from ids; make it from lengths"
    else:
        bug = "completion tokens are missing, perhaps an off-by-one at the prompt's end"
    _fail(f"collate, completion_mask of row {n}", mask, right, bug)


# ---- losses


def check_dpo_loss(fn):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta) -> (losses, chosen and rejected rewards)."""
    logps = [-10.0, -8.0], [-12.0, -3.0], [-11.0, -9.0], [-11.5, -6.0]  # two pairs: policy's, then the reference's
    a, b, c, d = (torch.tensor(x, dtype=torch.float64) for x in logps)
    losses, chosen, rejected = fn(a, b, c, d, beta=0.5)
    chosen_ratio, rejected_ratio = a - c, b - d
    h = chosen_ratio - rejected_ratio  # 1.5 and -2

    def loss_at(z):
        return torch.log1p(torch.exp(-z))

    _compare(
        "dpo_loss",
        losses,
        loss_at(0.5 * h),
        {
            "the sign of the margin is wrong; this prefers the rejected completion": loss_at(-0.5 * h),
            "log s(z) without its minus; minimising it unlearns the preferences": -loss_at(0.5 * h),
            "beta is missing inside the sigmoid": loss_at(h),
            "beta stands outside the sigmoid": 0.5 * loss_at(h),
            "beta divides where it should multiply": loss_at(h / 0.5),
            "the reference is missing; this is not DPO": loss_at(0.5 * (a - b)),
            "the reference is added where it should be subtracted": loss_at(0.5 * ((a + c) - (b + d))),
            "policy and reference are swapped": loss_at(0.5 * ((c - a) - (d - b))),
            "the sigmoid is there but its log is not": 1 - torch.sigmoid(0.5 * h),
        },
    )
    unscaled = "rewards leave out beta; a reward is beta (policy - ref)"
    bare = "rewards leave out the reference; a reward is beta (policy - ref)"
    _compare("chosen_rewards", chosen, 0.5 * chosen_ratio, {unscaled: chosen_ratio, bare: 0.5 * a})
    _compare("rejected_rewards", rejected, 0.5 * rejected_ratio, {unscaled: rejected_ratio, bare: 0.5 * b})
    _check_dpo_start_and_slope(fn, a, b, c, d)
    _check_dpo_extremes(fn)


def _check_dpo_start_and_slope(fn, a, b, c, d):
    start = fn(a, b, a, b, beta=0.1)[0]
    if not _same(start, torch.full_like(a, math.log(2))):
        _fail("dpo_loss where policy equals reference", start, "ln 2 = 0.6931", "the reference does not cancel")
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    losses, chosen, rejected = fn(a, b, c, d, beta=0.5)
    if chosen.requires_grad or rejected.requires_grad:
        _fail("rewards", "a gradient", "none", "rewards are for the log; detach them")
    up, down = torch.autograd.grad(losses.sum(), (a, b))
    weight = 0.5 * torch.sigmoid(-0.5 * ((a - c) - (b - d))).detach()
    _compare("gradient on the chosen log-probs", up, -weight, {"a sign, or a weight that is detached": weight})
    _compare("gradient on the rejected log-probs", down, weight, {"rejected is left without gradient": 0 * weight})


def _check_dpo_extremes(fn):
    zero = torch.zeros(1)
    for h, expected in ((-1e4, 1e3), (1e4, 0.0)):
        losses = fn(torch.tensor([h]), zero, zero, zero, beta=0.1)[0]
        if not _same(losses, torch.tensor([expected])):
            _fail(f"dpo_loss at h = {h:g} nats", losses, expected, "log(sigmoid(z)) underflows; use logsigmoid")


def check_ipo_loss(fn):
    """fn(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta) -> losses.

    The log-probs given are sums; IPO compares averages, and answers of 2 and 4 tokens tell the two apart.
    """
    sums = [torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, -14.0, -13.0)]
    lengths = [torch.tensor([2.0]), torch.tensor([4.0])]
    a, b, c, d = sums
    right = ((a - c) / 2 - (b - d) / 4 - 1 / (2 * 0.25)) ** 2
    summed = ((a - c) - (b - d) - 1 / (2 * 0.25)) ** 2
    found = fn(*sums, *lengths, 0.25)
    _compare("ipo_loss", found, right, {"summed log-probs; divide each by its completion's length": summed})


def check_kl_estimate(fn):
    """fn(policy (K,), ref (K,), dataset (n,), generator) -> an estimate of KL(policy || ref) in nats.

    policy and ref are probabilities, dataset holds completions that were written by the reference.
    """
    policy, ref = (torch.tensor(p, dtype=torch.float64) for p in ([0.7, 0.2, 0.05, 0.05], [0.1, 0.2, 0.3, 0.4]))
    dataset = ref.multinomial(20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    found = torch.as_tensor(float(fn(policy, ref, dataset, torch.Generator().manual_seed(1))))
    exact = (policy * (policy / ref).log()).sum()
    backward = (ref * (policy / ref).log()).sum()
    bug = "averaged over the data set's completions; sample them from the policy"
    _compare("KL(policy || ref)", found, exact, {bug: backward}, tolerance=0.02)


# ---- the reference


def check_reference(model, policy_logps, reference_logps, tolerance=1e-4):
    """The reference of a training run, before its first step: fixed, without gradient, equal to the policy's start.

    model is what will be trained, in the mode (train or eval) the loop uses; policy_logps() and reference_logps()
    each give log-probs (N,) of the same batch, the second for instance under `with model.disable_adapter()`.
    Takes one small step on the trainable weights and undoes it. tolerance in nats, for policy == reference.
    """
    policy, reference = policy_logps(), reference_logps()
    if not (policy.isfinite().all() and reference.isfinite().all()):
        _fail("log-probs", policy, "finite numbers", "overflow in half precision, or a row without any visible token")
    if not torch.equal(policy, policy_logps()):
        _fail("policy log-probs, twice", "two values", "one", "dropout is on in the policy; set it to 0 or call eval()")
    if not torch.equal(reference, reference_logps()):
        _fail("reference log-probs, twice", "two values", "one", "dropout is on in the reference; call eval()")
    if reference.requires_grad:
        _fail("reference log-probs", "a gradient", "none", "the reference runs outside torch.no_grad()")
    if not policy.requires_grad:
        _fail("policy log-probs", "no gradient", "a gradient", "nothing is trainable, as where an adapter is frozen")
    if not _same(policy, reference, tolerance):
        _fail("policy before the first step", policy, reference, "the reference is not the model training starts from")
    moved_policy, moved_reference = _after_a_step(model, policy, policy_logps, reference_logps)
    if torch.equal(moved_policy, policy):
        _fail("policy after a step", "no change", "a change", "the step does not reach the weights the policy uses")
    if not torch.equal(moved_reference, reference):
        _fail("reference after a step", moved_reference, reference, "policy and reference share trained weights")


def _after_a_step(model, policy, policy_logps, reference_logps):
    weights = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(policy.sum(), weights, allow_unused=True)
    kept = [p.detach().clone() for p in weights]
    with torch.no_grad():
        for weight, slope in zip(weights, slopes, strict=True):
            if slope is not None:
                weight += 1e-2 * slope / (slope.norm() + 1e-12)
        try:
            return policy_logps(), reference_logps()
        finally:
            for weight, old in zip(weights, kept, strict=True):
                weight.copy_(old)


# ---- the other implementation


def trl_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta=0.1, **config):
    """The mean loss that TRL's own DPOTrainer code computes from the given summed log-probs (B,) and lengths (B,).

    The trainer's loss method runs on a model that answers with these log-probs, put on each completion's first
    token; nothing of its arithmetic is repeated here. config: loss_type, label_smoothing. Written for TRL 1.16.
    """
    from trl import DPOTrainer  # heavy, and wanted only where a comparison is asked for

    lengths = torch.cat([chosen_lengths, rejected_lengths])
    width = int(lengths.max()) + 1  # one prompt token, then the completion
    position = torch.arange(width)
    mask = (position >= 1) & (position <= lengths[:, None])  # (2B, T)
    per_token = torch.zeros(len(lengths), width - 1)
    per_token[:, 0] = torch.cat([policy_chosen, policy_rejected])
    answer = SimpleNamespace(
        log_probs=per_token,
        entropy=torch.zeros_like(per_token),
        mean_logits=torch.zeros_like(per_token),
        is_top1=torch.zeros_like(per_token, dtype=torch.bool),
    )
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=accelerator,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        beta=beta,
        loss_types=[config.get("loss_type", "sigmoid")],
        loss_weights=[1.0],
        label_smoothing=config.get("label_smoothing", 0.0),
        use_weighting=False,
        _total_train_tokens=0,
        _metrics={"eval": _Lists()},
    )
    inputs = {
        "input_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: answer, inputs, False).item()


class _Lists(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])
