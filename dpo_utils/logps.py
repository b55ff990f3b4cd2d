"""Log-probs of completions, by their definition; `fast` computes the same numbers for half the
work.
"""

import torch

from dpo_utils.profiles import Profile
from dpo_utils.tokens import collate_rows, micro_batches

try:
    from dpo_utils.fast import SharedForm
except ImportError as problem:  # the plain form does it all
    SharedForm, NO_FAST = None, f"dpo_utils/fast.py cannot be used ({problem})"


def sequence_logps(logits, input_ids, completion_mask, dtype=None):
    """Summed log-probs of the completions, (N,), in nats; float32, or float64 for float64 logits.

    logits: (N, T, V); input_ids: (N, T); completion_mask: (N, T), true where the token belongs to
    the completion. The logits at t-1 predict token t, so the first token of a row is never scored.
    dtype: of the sum, where another is wanted.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = logits[:, :-1].to(wide).log_softmax(-1)  # (N, T-1, V)
    token_logps = logps.gather(-1, input_ids[:, 1:, None])[..., 0]  # (N, T-1)
    return (token_logps * completion_mask[:, 1:]).sum(-1, dtype=dtype)


def plain_logps(model, items, pad_id: int):
    """The definition: summed log-probs of every completion of the items, (C,), one padded row each.

    Summed in float64: in float32 a sum over 8,000 tokens is off by 0.004 nats.
    """
    rows = [(prompt, answer) for prompt, completions in items for answer in completions]
    batch = {name: x.to(model.device) for name, x in collate_rows(rows, pad_id).items()}
    ids, attention, scored = batch["input_ids"], batch["attention_mask"], batch["completion_mask"]
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return sequence_logps(logits, ids, scored, torch.float64)


def why_plain(model) -> str | None:
    """Why this model needs the plain form, in a few words; None if the fast form gives the same."""
    if SharedForm is None:
        return NO_FAST
    return SharedForm(model, plain_logps).objection()


def options_for(profile: Profile, tokenizer) -> dict:
    """The arguments of `completion_logps` that a profile sets."""
    budgets = {"micro_tokens": profile.micro_tokens, "row_tokens": profile.row_tokens}
    return {"pad_id": tokenizer.pad_token_id, **budgets}


def completion_logps(model, items, *, pad_id: int, micro_tokens: int, row_tokens: int, plain=None):
    """Yield (item numbers, log-probs (n, completions an item)), a micro-batch at a time, with
    gradient.

    items: (prompt_ids, completions), all with the same number of completions. micro_tokens: size of
    a micro-batch; row_tokens: of a row of the fast form. The log-probs do not depend on either.
    plain: True or False force one form; by default `why_plain` decides.
    """
    plain = why_plain(model) is not None if plain is None else plain
    if not plain:
        yield from SharedForm(model, plain_logps)(items, micro_tokens, row_tokens)
        return
    sizes = [len(answers) * (len(prompt) + max(map(len, answers))) for prompt, answers in items]
    for numbers in micro_batches(sizes, micro_tokens):
        logps = plain_logps(model, [items[i] for i in numbers], pad_id)
        yield numbers, logps.view(len(numbers), -1)


@torch.no_grad()
def all_logps(model, items, **options):
    """Log-probs of all items, (items, completions an item), on the CPU. Options:
    `completion_logps`.
    """
    out = None
    for numbers, logps in completion_logps(model, items, **options):
        if out is None:
            out = torch.empty(len(items), logps.shape[1], dtype=logps.dtype)
        out[numbers] = logps.cpu()
    return out
