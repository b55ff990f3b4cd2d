"""The bug museum: wrong implementations found in circulating code, each with the check of `checks` that rejects it.

Every function here is wrong on purpose; its docstring says how, and where the wrong number comes from. Never import it
for work.
"""

import torch
from torch.nn.functional import logsigmoid

# ---- log-probs of completions: judged by check_sequence_logps


def unshifted_labels(logits, input_ids, completion_mask):
    """Scores token t with the logits at t, which predict token t+1: a model is asked what it has just read."""
    logps = logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return (logps * completion_mask).sum(-1)


def mask_off_by_one(logits, input_ids, completion_mask):
    """Shifts the labels but not the mask: the first answer token is lost and one token of padding is scored."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, :-1]).sum(-1)


def first_token_missed(logits, input_ids, completion_mask):
    """Forgets that the prompt's last position predicts the answer's first token, often the one that decides."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * (completion_mask[:, 1:] & completion_mask[:, :-1])).sum(-1)


def mean_over_padding(logits, input_ids, completion_mask):
    """Divides by the padded width: the same answer scores differently in another batch."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).mean(-1)


def prompt_scored(logits, input_ids, completion_mask):
    """Sums from the row's first token: the prompt's log-prob drowns the answer's."""
    logps = logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    up_to_the_end = completion_mask.flip(1).cumsum(1).flip(1) > 0
    return (logps * up_to_the_end[:, 1:]).sum(-1)


def half_precision(logits, input_ids, completion_mask):
    """Takes log-softmax and sum in bfloat16, two to three significant digits: nats are lost on a long answer."""
    logps = logits.bfloat16()[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(-1).to(torch.promote_types(logits.dtype, torch.float32))


def log_of_softmax(logits, input_ids, completion_mask):
    """Takes the log of a probability that has already become zero."""
    logps = logits[:, :-1].float().softmax(-1).log().gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(-1)


# ---- batches: judged by check_collate


def _pad(rows, pad_id):
    width = max(len(ids) for ids in rows)
    return torch.tensor([ids + [pad_id] * (width - len(ids)) for ids in rows])


def _rows(pairs):
    return [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]


def masks_by_pad_id(pairs, pad_id):
    """Takes every token equal to the pad id for padding. Where pad is EOS, no answer is ever taught to stop."""
    ids = _pad([prompt + answer for prompt, answer in _rows(pairs)], pad_id)
    starts = torch.tensor([len(prompt) for prompt, _ in _rows(pairs)])
    real = ids != pad_id
    return {
        "input_ids": ids,
        "attention_mask": real.long(),
        "completion_mask": real & (torch.arange(ids.shape[1]) >= starts[:, None]),
    }


def prompt_in_the_mask(pairs, pad_id):
    """Uses the attention mask as completion mask: the prompt is trained as if it were an answer."""
    rows = [prompt + answer for prompt, answer in _rows(pairs)]
    mask = _pad([[1] * len(row) for row in rows], 0)
    return {"input_ids": _pad(rows, pad_id), "attention_mask": mask, "completion_mask": mask.bool()}


def response_hidden(pairs, pad_id):
    """Builds attention from the prompt alone: every answer token is scored as if it were the first."""
    batch = prompt_in_the_mask(pairs, pad_id)
    prompts = torch.tensor([len(prompt) for prompt, _ in _rows(pairs)])[:, None]
    before_answer = torch.arange(batch["input_ids"].shape[1]) < prompts
    batch["completion_mask"] &= ~before_answer
    return {**batch, "attention_mask": before_answer.long()}


# ---- the loss: judged by check_dpo_loss


def wrong_sign(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Rejected minus chosen: the loss falls nicely while the model learns the opposite."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (rejected - chosen)), (beta * chosen).detach(), (beta * rejected).detach()


def rewards_without_beta(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The loss is right, the logged rewards are log-ratios: 1/beta times the rewards."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (chosen - rejected)), chosen.detach(), rejected.detach()


def beta_outside(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Scales the loss, not the margin: beta becomes a second learning rate and the optimum forgets it."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -beta * logsigmoid(chosen - rejected), (beta * chosen).detach(), (beta * rejected).detach()


def reference_forgotten(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Compares the policy's log-probs alone: short or already likely answers win, and nothing holds the policy back."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (policy_chosen - policy_rejected)), (beta * chosen).detach(), (beta * rejected).detach()


def log_of_sigmoid(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Takes the log of a sigmoid that has already become zero: the loss is infinite just where it matters."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -torch.sigmoid(beta * (chosen - rejected)).log(), (beta * chosen).detach(), (beta * rejected).detach()


def rewards_with_gradient(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Hands out rewards that keep the graph: a history of them keeps every step's activations in memory."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (chosen - rejected)), beta * chosen, beta * rejected


# ---- IPO and KL: judged by check_ipo_loss and check_kl_estimate


def ipo_summed(policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta):
    """IPO on sums: the target 1/(2 beta) is meant per token; a long answer reaches it with a tiny change per token."""
    return (policy_chosen - ref_chosen - (policy_rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def kl_on_the_dataset(policy, ref, dataset, generator):
    """Averages log(policy / ref) over completions someone else wrote: this can be negative, and a KL cannot."""
    return (policy / ref).log()[dataset].mean()


# ---- the reference: judged by check_reference; each gives (policy_logps, reference_logps) from two models


def reference_with_gradient(policy, reference, score):
    """No torch.no_grad() around the reference: twice the memory, and a reference that trains if it shares weights."""
    return lambda: score(policy), lambda: score(reference)


def reference_in_train_mode(policy, reference, score):
    """Dropout left on: two looks at the same answer disagree by nats, and the first loss is not ln 2."""
    reference.train()
    return lambda: score(policy), lambda: score(reference).detach()


def reference_is_the_policy(policy, reference, score):
    """`reference = policy` is a second name, not a copy: loss ln 2, weight one half for ever, and no leash."""
    return lambda: score(policy), lambda: score(policy).detach()


def policy_frozen(policy, reference, score):
    """An adapter loaded for inference: every number is right and nothing learns."""
    return lambda: score(policy).detach(), lambda: score(reference).detach()


def reference_before_sft(policy, reference, score):
    """The base model where the SFT model should stand: the policy starts with rewards it has not earned."""
    base = next(p for p in reference.parameters() if p.ndim == 2)
    with torch.no_grad():
        base += 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    return lambda: score(policy), lambda: score(reference).detach()


EXHIBITS = {
    "check_sequence_logps": [
        unshifted_labels, mask_off_by_one, first_token_missed, mean_over_padding, prompt_scored, half_precision,
        log_of_softmax,
    ],
    "check_collate": [masks_by_pad_id, prompt_in_the_mask, response_hidden],
    "check_dpo_loss": [
        wrong_sign, rewards_without_beta, beta_outside, reference_forgotten, log_of_sigmoid, rewards_with_gradient,
    ],
    "check_ipo_loss": [ipo_summed],
    "check_kl_estimate": [kl_on_the_dataset],
    "check_reference": [
        reference_with_gradient, reference_in_train_mode, reference_is_the_policy, policy_frozen, reference_before_sft,
    ],
}  # fmt: skip
