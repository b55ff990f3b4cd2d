"""Log-probs of completions: the definition in a few lines, and a fast way that equals it.

The definition runs one padded row per completion and keeps all logits. The fast way runs rows that share what is the
same (`tokens.pack_rows`), applies the output head only where a scored token is predicted, and never stores logits.
`why_plain` says when a model must fall under the definition.
"""

from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from dpo_utils.attention import SDPA
from dpo_utils.models import unwrap
from dpo_utils.profiles import Profile
from dpo_utils.tokens import collate_rows, pack_rows, plan_plain_rows, plan_rows

HEAD_LOGITS = 2**23  # logits that are alive at once: 32 MiB in float32
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}  # relative, between two batchings; half precision: 2e-2
_TRIED = WeakKeyDictionary()  # model -> {attention: why shared rows are not for it, or None}


def sequence_logps(logits, input_ids, completion_mask):
    """Summed log-probs of the completions, (N,), in nats; float32, or float64 for float64 logits.

    logits: (N, T, V); input_ids: (N, T); completion_mask: (N, T), true where the token belongs to the completion.
    The logits at t-1 predict token t, so the first token of a row is never scored.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logps = logits[:, :-1].to(wide).log_softmax(-1)  # (N, T-1, V)
    token_logps = logps.gather(-1, input_ids[:, 1:, None])[..., 0]  # (N, T-1)
    return (token_logps * completion_mask[:, 1:]).sum(-1)


def plain_logps(model, items, pad_id: int):
    """The definition: summed log-probs of every completion of the items, (C,). One padded row a completion."""
    batch = collate_rows([(prompt, c) for prompt, completions in items for c in completions], pad_id)
    batch = {name: value.to(model.device) for name, value in batch.items()}
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return sequence_logps(logits, batch["input_ids"], batch["completion_mask"])


class HeadLogps(torch.autograd.Function):
    """log p(label) for S hidden states under a frozen linear head, a chunk of logits at a time.

    Forward: hidden (S, H), weight (V, H), bias (V,) or None, labels (S,) -> (S,), float32 or wider. Kept for backward
    are the S x H derivatives d logp / d hidden = (onehot(label) - softmax) @ weight, never the S x V logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
        """Chunk by chunk; the softmax is taken in float32."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logps = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        slope = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = max(1, HEAD_LOGITS // len(weight))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            label = labels[part, None]
            logits = F.linear(hidden[part], weight, bias).to(wide)
            log_z = logits.logsumexp(-1, keepdim=True)
            logps[part] = (logits.gather(1, label) - log_z)[:, 0]
            if slope is not None:
                minus_p = logits.sub_(log_z).exp_().neg_()  # in place: the chunk is not needed again
                minus_p.scatter_add_(1, label, torch.ones_like(log_z))
                slope[part] = minus_p.to(weight.dtype) @ weight
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):
        """grad: (S,)."""
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None].to(slope.dtype), None, None, None


def shared_logps(model, rows):
    """The fast way: summed log-probs of every completion of `SharedRows`, (C,)."""
    causal_lm = unwrap(model)
    head = causal_lm.get_output_embeddings()
    rows = rows.to(causal_lm.device)
    hidden = causal_lm.base_model(
        input_ids=rows.input_ids, attention_mask=rows.mask, position_ids=rows.position_ids, use_cache=False
    ).last_hidden_state.flatten(0, 1)  # (N*L, H)
    token_logps = HeadLogps.apply(hidden[rows.predictors], head.weight, head.bias, rows.labels)
    return torch.stack([part.sum() for part in token_logps[rows.label_index].split(rows.counts)])


def why_plain(model) -> str | None:
    """Why this model cannot use shared rows, in a few words; None if it can.

    What its settings do not say is tried once, on a few tokens.
    """
    causal_lm = unwrap(model)
    config, head = causal_lm.config.get_text_config(), causal_lm.get_output_embeddings()
    if config._attn_implementation not in SDPA:
        return f"attention is {config._attn_implementation}, which does not take a boolean 4-D mask as sdpa does"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return f"attention slides over {config.sliding_window} tokens"
    if type(head) is not nn.Linear:
        return f"the output head is a {type(head).__name__}, not a plain linear layer"
    if any(p.requires_grad for p in head.parameters()):
        return "the output head is trained"
    for name in ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            return f"the logits are rescaled ({name})"
    tried = _TRIED.setdefault(causal_lm, {})
    if config._attn_implementation not in tried:
        tried[config._attn_implementation] = _trial(causal_lm)
    return tried[config._attn_implementation]


@torch.no_grad()
def _trial(model) -> str | None:
    """Do shared rows give the definition's log-probs, and does no completion hear another? If not, what happened."""
    draw = torch.Generator().manual_seed(0)
    vocabulary = model.get_output_embeddings().out_features
    ids = torch.randperm(vocabulary, generator=draw)[torch.arange(54) % vocabulary]  # no two completions begin alike
    stem, *ends, other = ids.view(6, 9).tolist()
    items = [(stem, ends[:2]), (stem[:5], ends[2:])]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        plain = plain_logps(model, items, 0)
        shared = shared_logps(model, pack_rows([items], 0))
        changed = shared_logps(model, pack_rows([[(stem, [other, ends[1]]), items[1]]], 0))
    except Exception as problem:
        if should_reduce_batch_size(problem):  # out of memory says nothing about the model
            raise
        return f"it fails on shared rows ({type(problem).__name__}: {problem})"
    finally:
        for module in training:
            module.training = True
    if not torch.isfinite(plain).all():
        return None  # the check before the first step has the words for this
    if not torch.equal(shared[1:], changed[1:]):  # exactly: what is masked is multiplied by zero
        leak = (shared - changed)[1:].abs().max()
        return f"log-probs move by {leak:.1g} nats with another completion in their row: some layers pass over the mask"
    gap = (shared - plain).abs()
    if (gap > TOLERANCE.get(model.dtype, 2e-2) * (1 + plain.abs())).any():
        return f"shared rows part from plain ones by {gap.max():.1g} nats"
    return None


def completion_logps(model, items, *, pad_id: int, micro_tokens: int, row_tokens: int, plain: bool | None = None):
    """Yield (item numbers, log-probs (n, completions an item)) micro-batch by micro-batch, with gradient.

    items: (prompt_ids, completions), all with the same number of completions. `plain` forces one way or the other;
    by default the fast one wherever `why_plain` has no objection. The log-probs do not depend on the micro-batch.
    """
    plain = why_plain(model) is not None if plain is None else plain
    for rows in plan_plain_rows(items, micro_tokens) if plain else plan_rows(items, row_tokens, micro_tokens):
        numbers = [i for row in rows for i in row]
        if plain:
            logps = plain_logps(model, [items[i] for i in numbers], pad_id)
        else:
            logps = shared_logps(model, pack_rows([[items[i] for i in row] for row in rows], pad_id))
        yield numbers, logps.view(len(numbers), -1)


@torch.no_grad()
def all_logps(model, items, **options):
    """Log-probs of all items without gradient, (items, completions an item), on the CPU. Options: `completion_logps`."""
    out = None
    for numbers, logps in completion_logps(model, items, **options):
        if out is None:
            out = torch.empty(len(items), logps.shape[1], dtype=logps.dtype)
        out[numbers] = logps.cpu()
    return out


def options_for(profile: Profile, tokenizer) -> dict:
    """The arguments of `completion_logps` that a profile sets."""
    pad_id = tokenizer.pad_token_id
    return {"pad_id": pad_id, "micro_tokens": profile.micro_tokens, "row_tokens": profile.row_tokens}
