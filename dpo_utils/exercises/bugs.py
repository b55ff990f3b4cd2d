"""The bug museum: wrong implementations found in circulating code. Never import them for work.

A docstring says what is wrong, then the remedy: a check quotes it where a function does the same.
"""

from inspect import isfunction, signature

from torch.nn.functional import logsigmoid

from dpo_utils.tokens import collate


def logps_of(logits, input_ids):
    """The log-probs of all tokens but the first, (N, T - 1): right in float32, often misused."""
    return logits[:, :-1].log_softmax(-1).gather(-1, input_ids[:, 1:, None])[..., 0]


def unshifted_labels(logits, input_ids, completion_mask):
    """Token t is scored by the logits at t, which predict token t + 1. Shift the labels."""
    logps = logits.log_softmax(-1).gather(-1, input_ids[..., None])[..., 0]
    return (logps * completion_mask).sum(-1)


def mask_off_by_one(logits, input_ids, completion_mask):
    """The first token is lost and a token of padding is scored. Shift the mask with the labels."""
    return (logps_of(logits, input_ids) * completion_mask[:, :-1]).sum(-1)


def first_token_missed(logits, input_ids, completion_mask):
    """The completion's first token is lost. The prompt's last position predicts it: start there."""
    return (logps_of(logits, input_ids) * completion_mask[:, 1:] * completion_mask[:, :-1]).sum(-1)


def mean_over_padding(logits, input_ids, completion_mask):
    """Divided by the padded width, an answer's score depends on its batch. Sum over its tokens."""
    return (logps_of(logits, input_ids) * completion_mask[:, 1:]).mean(-1)


def prompt_scored(logits, input_ids, completion_mask):
    """Without the mask, the prompt and the padding drown the answer. Multiply by the mask."""
    return logps_of(logits, input_ids).sum(-1)


def half_precision(logits, input_ids, completion_mask):
    """In bfloat16 two or three digits are left: a long answer is nats off. Use float32."""
    return (logps_of(logits.bfloat16(), input_ids) * completion_mask[:, 1:]).sum(-1)


def log_of_softmax(logits, input_ids, completion_mask):
    """A rare token's probability is zero before its log is taken. Use log_softmax."""
    logps = logits[:, :-1].float().softmax(-1).log().gather(-1, input_ids[:, 1:, None])[..., 0]
    return (logps * completion_mask[:, 1:]).sum(-1)


def masks_by_pad_id(pairs, pad_id):
    """If pad is EOS, the mask hides it and no answer learns to stop. Make masks from lengths."""
    batch = collate(pairs, pad_id)
    real = batch["input_ids"] != pad_id
    return batch | {"attention_mask": real, "completion_mask": batch["completion_mask"] & real}


def response_hidden(pairs, pad_id):
    """The response is masked out of attention, so its tokens do not see each other. Show it."""
    batch = collate(pairs, pad_id)
    return batch | {"attention_mask": batch["attention_mask"] * ~batch["completion_mask"]}


def wrong_sign(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Rejected minus chosen: the loss falls while the model learns the opposite. Swap them."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -logsigmoid(rejected - chosen), chosen.detach(), rejected.detach()


def rewards_without_beta(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """The loss is right, the logged rewards are log-ratios. A reward is beta (policy - ref)."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -logsigmoid(beta * (chosen - rejected)), chosen.detach(), rejected.detach()


def beta_outside(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """Beta scales the loss, a second learning rate. Multiply the margin, inside the sigmoid."""
    chosen, rejected = policy_chosen - ref_chosen, policy_rejected - ref_rejected
    return -beta * logsigmoid(chosen - rejected), beta * chosen.detach(), beta * rejected.detach()


def log_of_sigmoid(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
    """The sigmoid is zero, and the loss infinite, just where it matters. Use logsigmoid."""
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    return -(chosen - rejected).sigmoid().log(), chosen.detach(), rejected.detach()


def rewards_with_gradient(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta):
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
    return lambda: score(policy), lambda: score(reference.train()).detach()


def reference_is_the_policy(policy, reference, score):
    """`reference = policy` is a second name: the loss stays at ln 2. Copy it before training."""
    return lambda: score(policy), lambda: score(policy).detach()


def policy_frozen(policy, reference, score):
    """Nothing is trainable, as in an adapter loaded for inference. Load it trainable."""
    return lambda: score(policy).detach(), lambda: score(reference).detach()


def reference_before_sft(policy, reference, score):
    """The policy starts with rewards it has not earned. Use the model that training starts from."""
    reference.get_input_embeddings().weight.data *= 2  # any other weights will do
    return lambda: score(policy), lambda: score(reference).detach()


def _like(bug):
    """The museum's functions with the parameters of this one: they imitate the same function."""
    return [f for f in globals().values() if isfunction(f) and signature(f) == signature(bug)]


EXHIBITS = {
    "check_sequence_logps": _like(unshifted_labels),
    "check_collate": _like(masks_by_pad_id),
    "check_dpo_loss": _like(wrong_sign),
    "check_ipo_loss": _like(ipo_summed),
    "check_kl_estimate": _like(kl_on_the_dataset),
    "check_reference": _like(policy_frozen),
}
