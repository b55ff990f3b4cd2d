"""The bug museum: wrong implementations found in circulating code. Never import them for work.

A docstring says what is wrong and what follows from it, then the remedy. EXHIBITS names the check
of `checks` that rejects each and quotes its docstring to a learner whose function does the same.
"""

from inspect import isfunction, signature

import torch
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence


def next_token_logps(logits, input_ids):
    """The log-probs of all tokens but the first, (N, T - 1): right, but often misused."""
    return logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def unshifted_labels(logits, input_ids, completion_mask):
    """Token t is scored by the logits at t, which predict token t + 1. Shift the labels."""
    logps = logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return (logps * completion_mask).sum(-1)


def mask_off_by_one(logits, input_ids, completion_mask):
    """The first token is lost and a token of padding is scored. Shift the mask with the labels."""
    return (next_token_logps(logits, input_ids) * completion_mask[:, :-1]).sum(-1)


def first_token_missed(logits, input_ids, completion_mask):
    """The completion's first token is lost. The prompt's last position predicts it: start there."""
    kept = completion_mask[:, 1:] & completion_mask[:, :-1]
    return (next_token_logps(logits, input_ids) * kept).sum(-1)


def mean_over_padding(logits, input_ids, completion_mask):
    """Divided by the padded width, an answer's score depends on its batch. Sum over its tokens."""
    return (next_token_logps(logits, input_ids) * completion_mask[:, 1:]).mean(-1)


def prompt_scored(logits, input_ids, completion_mask):
    """The prompt's log-prob is added and drowns the answer's. Mask the prompt."""
    kept = completion_mask.flip(1).cumsum(1).flip(1) > 0
    return (next_token_logps(logits, input_ids) * kept[:, 1:]).sum(-1)


def half_precision(logits, input_ids, completion_mask):
    """In bfloat16 two or three digits are left: a long answer is nats off. Use float32."""
    logps = next_token_logps(logits.bfloat16(), input_ids)
    return (
        (logps * completion_mask[:, 1:]).sum(-1).to(torch.promote_types(logits.dtype, torch.float))
    )


def log_of_softmax(logits, input_ids, completion_mask):
    """A rare token's probability is zero before its log is taken. Use log_softmax."""
    logps = logits[:, :-1].float().softmax(-1).log().gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(-1)


def _rows(pairs, pad_id):
    rows = [(p["prompt_ids"], p[side]) for side in ("chosen_ids", "rejected_ids") for p in pairs]
    ids = [torch.tensor(prompt + completion) for prompt, completion in rows]
    starts = torch.tensor([[len(prompt)] for prompt, _ in rows])
    ends = torch.tensor([[len(x)] for x in ids])
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    place = torch.arange(ids.shape[1])
    return ids, place < starts, place < ends  # (2B, T): tokens, which are prompt, which are real


def masks_by_pad_id(pairs, pad_id):
    """If pad is EOS, the mask hides it and no answer learns to stop. Make masks from lengths."""
    ids, prompt, _ = _rows(pairs, pad_id)
    real = ids != pad_id
    return {"input_ids": ids, "attention_mask": real.long(), "completion_mask": real & ~prompt}


def prompt_in_the_mask(pairs, pad_id):
    """The attention mask serves as completion mask, so the prompt is trained too. Exclude it."""
    ids, _, real = _rows(pairs, pad_id)
    return {"input_ids": ids, "attention_mask": real.long(), "completion_mask": real}


def response_hidden(pairs, pad_id):
    """The response is masked out of attention, so its tokens do not see each other. Show it."""
    ids, prompt, real = _rows(pairs, pad_id)
    return {"input_ids": ids, "attention_mask": prompt.long(), "completion_mask": real & ~prompt}


def wrong_sign(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Rejected minus chosen: the loss falls while the model learns the opposite. Swap them."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -logsigmoid(rejected - chosen), chosen.detach(), rejected.detach()


def rewards_without_beta(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The loss is right, the logged rewards are log-ratios. A reward is beta (policy - ref)."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (chosen - rejected)), chosen.detach(), rejected.detach()


def beta_outside(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Beta scales the loss, a second learning rate. Multiply the margin, inside the sigmoid."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -beta * logsigmoid(chosen - rejected), beta * chosen.detach(), beta * rejected.detach()


def reference_forgotten(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """Likely or short answers win, and nothing holds the policy back. Subtract the reference."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    losses = -logsigmoid(beta * (policy_chosen - policy_rejected))
    return losses, chosen.detach(), rejected.detach()


def log_of_sigmoid(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """The sigmoid is zero, and the loss infinite, just where it matters. Use logsigmoid."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -torch.sigmoid(chosen - rejected).log(), chosen.detach(), rejected.detach()


def rewards_with_gradient(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1):
    """A history of such rewards keeps every step's activations in memory. Detach them."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -logsigmoid(chosen - rejected), chosen, rejected


def ipo_summed(
    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta
):
    """The target 1/(2 beta) is per token. Divide each log-prob by its completion's length."""
    return (policy_chosen - ref_chosen - (policy_rejected - ref_rejected) - 1 / (2 * beta)) ** 2


def kl_on_the_dataset(policy, ref, dataset, generator):
    """Averaged over completions of the reference, it can be negative. Sample from the policy."""
    return (policy / ref).log()[dataset].mean()


def reference_with_gradient(policy, reference, score):
    """Twice the memory, and it trains if it shares weights. Score it under torch.no_grad()."""
    return lambda: score(policy), lambda: score(reference)


def reference_in_train_mode(policy, reference, score):
    """With dropout, the same answer scores differently each time. Call eval() on the reference."""
    reference.train()
    return lambda: score(policy), lambda: score(reference).detach()


def reference_is_the_policy(policy, reference, score):
    """`reference = policy` is a second name: the loss stays at ln 2. Copy it before training."""
    return lambda: score(policy), lambda: score(policy).detach()


def policy_frozen(policy, reference, score):
    """Nothing is trainable, as in an adapter loaded for inference. Load it trainable."""
    return lambda: score(policy).detach(), lambda: score(reference).detach()


def reference_before_sft(policy, reference, score):
    """The policy starts with rewards it has not earned. Use the model that training starts from."""
    base = next(p for p in reference.parameters() if p.ndim == 2)
    with torch.no_grad():
        base += 0.05 * torch.randn(base.shape, generator=torch.Generator().manual_seed(0))
    return lambda: score(policy), lambda: score(reference).detach()


def _with_parameters(*names):
    functions = [x for x in globals().values() if isfunction(x) and not x.__name__.startswith("_")]
    return [f for f in functions if tuple(signature(f).parameters) == names]


FOUR = "policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected"
EXHIBITS = {  # a bug has the parameters of what it imitates, and they tell its check
    "check_sequence_logps": _with_parameters("logits", "input_ids", "completion_mask"),
    "check_collate": _with_parameters("pairs", "pad_id"),
    "check_dpo_loss": _with_parameters(*FOUR, "beta"),
    "check_ipo_loss": _with_parameters(*FOUR, "chosen_lengths", "rejected_lengths", "beta"),
    "check_kl_estimate": _with_parameters("policy", "ref", "dataset", "generator"),
    "check_reference": _with_parameters("policy", "reference", "score"),
}
