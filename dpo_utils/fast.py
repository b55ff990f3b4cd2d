"""The same log-probs for half the work. Without this file the plain form does it all.

The sequences of a micro-batch form prefix trees, in which a prompt, or the words that open both
answers, is computed once; attention skips what no token of a block may see; the output head runs
only where a scored token is predicted; LoRA and GELU take one pass each. `SharedForm` is the entry.
"""

import functools
from heapq import heappush, heapreplace
from os.path import commonprefix
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.activations import NewGELUActivation
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dpo_utils.adapters import LINEAR
from dpo_utils.models import SDPA_MODELS, in_float32, tolerance, unwrap
from dpo_utils.tokens import micro_batches

HEAD_LOGITS = 2**23  # logits alive at once: 32 MiB in float32
BLOCK = 128  # queries of one attention block; shorter rows run whole, and all rows on CUDA
BLOCKS = {"sdpa": "sdpa_blocks", "sdpa_float32": "sdpa_float32_blocks"}
MASKED = (*BLOCKS, *BLOCKS.values())  # implementations that take a boolean 4-D mask
RESCALED = ("final_logit_softcapping", "attn_logit_softcapping", "logit_scale", "logits_scaling")
_TRIED = WeakKeyDictionary()  # model -> {attention: why shared rows do not suit it, or None}
_CUT = WeakIdKeyDictionary()  # mask -> its blocks: all layers share one mask


class SharedForm:
    """Log-probs of a model, made lean in place, over rows that share tokens; plain ones' equal."""

    def __init__(self, model, plain_logps):
        self.model, self.plain_logps = unwrap(model), plain_logps
        config = self.model.config.get_text_config()
        if config.model_type in SDPA_MODELS and config._attn_implementation in BLOCKS:
            self.model.set_attn_implementation(BLOCKS[config._attn_implementation])
        lean_layers(self.model)

    def __call__(self, items, micro_tokens: int, row_tokens: int):
        """Yield (item numbers, log-probs (n, completions an item)), a micro-batch at a time."""
        for rows in plan_rows(items, row_tokens, micro_tokens):
            numbers = [i for row in rows for i in row]
            split = [part for row in rows for part in split_row([items[i] for i in row])]
            logps = shared_logps(self.model, pack_rows(split))
            yield numbers, logps.view(len(numbers), -1)

    def objection(self) -> str | None:
        """Why this model must use the plain form, in a few words; None if it need not."""
        config, head = self.model.config.get_text_config(), self.model.get_output_embeddings()
        attention, tried = config._attn_implementation, _TRIED.setdefault(self.model, {})
        window, kind = getattr(config, "sliding_window", None), type(head)
        slides = window and getattr(config, "use_sliding_window", True)
        rescaled = [name for name in RESCALED if getattr(config, name, None) not in (None, 1, 1.0)]
        reasons = [
            (attention not in MASKED, f"attention is {attention}, which takes no boolean 4-D mask"),
            (slides, f"attention slides over {window} tokens"),
            (kind is not nn.Linear, f"the output head is a {kind.__name__}, not a Linear"),
            (any(p.requires_grad for p in head.parameters()), "the output head is trained"),
            (rescaled, f"the logits are rescaled ({', '.join(rescaled)})"),
        ]
        if found := [reason for holds, reason in reasons if holds]:
            return found[0]
        if attention not in tried:
            tried[attention] = self._trial()
        return tried[attention]

    @torch.no_grad()
    def _trial(self) -> str | None:
        """Shared rows must give the definition's log-probs, and no completion may see another."""
        size = self.model.get_output_embeddings().out_features
        order = torch.randperm(size, generator=torch.Generator().manual_seed(0))
        stem, *ends, other = order[torch.arange(54) % size].view(6, 9).tolist()  # all begin apart
        items = [(stem, ends[:2]), (stem[:5], ends[2:])]
        try:
            plain = self.plain_logps(self.model, items, 0)
            shared = shared_logps(self.model, pack_rows([items]))
            changed = shared_logps(self.model, pack_rows([[(stem, [other, ends[1]]), items[1]]]))
        except Exception as problem:
            if should_reduce_batch_size(problem):  # out of memory says nothing about the model
                raise
            return f"it fails on shared rows ({type(problem).__name__}: {problem})"
        leak, gap = (shared - changed)[1:].abs().max(), (shared - plain).abs()
        if leak > 0:  # what is masked is multiplied by zero: not even a rounding error is right
            return f"some layers ignore the mask: log-probs move by {leak:.1g} with another answer"
        if (gap > tolerance(self.model.dtype) * (1 + plain.abs())).any():
            return f"shared rows differ from plain ones by {gap.max():.1g} nats"
        return None


def item_length(item) -> int:
    """Tokens of an item in a shared row: what all its completions begin with counts once."""
    prompt, completions = item
    twice = (len(completions) - 1) * len(commonprefix(completions))
    return len(prompt) + sum(map(len, completions)) - twice


def split_row(items) -> list[list]:
    """A row of items; a row a completion of one that shares too little to pay for its mask."""
    (prompt, completions), *more = items
    padded = len(completions) * (len(prompt) + max(map(len, completions)))
    if more or 16 * padded >= 17 * item_length(items[0]):  # measured: the mask is quadratic
        return [items]
    return [[(prompt, [answer])] for answer in completions]


def plan_rows(items, row_tokens: int, micro_tokens: int) -> list[list[list[int]]]:
    """Micro-batches of rows of item numbers, within their token budgets or of one item alone."""
    shared = len(commonprefix([prompt for prompt, _ in items]))
    room = max(1, row_tokens - shared)
    sizes = [item_length(item) - shared for item in items]  # what an item adds to a row
    least = -(-sum(min(size, room) for size in sizes) // room)
    rows = _spread(sizes, room, len(_spread(sizes, room, least)))
    batches = micro_batches([shared + length for length, _, _ in rows], micro_tokens)
    return [[rows[n][2] for n in batch] for batch in batches]


def _spread(sizes, room: int, count: int) -> list[tuple[int, int, list[int]]]:
    """(length, number, items) of `count` rows or more: the longest item to the shortest row."""
    rows = [(0, n, []) for n in range(count)]
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        length, number, row = rows[0]  # a heap: the shortest row is on top
        if row and length + sizes[i] > room:
            heappush(rows, (sizes[i], len(rows), [i]))
        else:
            heapreplace(rows, (length + sizes[i], number, [*row, i]))
    return [row for row in rows if row[2]]


class SharedRows(NamedTuple):
    """N rows of L tokens, each a prefix tree, for C completions of S different scored tokens."""

    input_ids: torch.Tensor  # (N, L)
    position_ids: torch.Tensor  # (N, L): the distance of a token from the root
    mask: torch.Tensor  # (N, 1, L, L) bool: a token sees itself and the path up to the root
    predictors: torch.Tensor  # (S,) index into the N*L positions: the token before a scored one
    labels: torch.Tensor  # (S,) the scored tokens
    label_index: torch.Tensor  # the scored tokens of every completion, one after the other
    counts: list[int]  # (C,) how many each has


def pack_rows(rows) -> SharedRows:
    """Shared rows from lists of items, one list a row; completions come out in the order given.

    A row is a dict (place of the token before, id) -> place. Padding sees itself alone.
    """
    trees, paths, scored = [{} for _ in rows], [], {}  # scored: (predictor, label) -> its number
    for n, items in enumerate(rows):
        for prompt, completions in items:
            for completion in completions:
                path = [None]
                for token in (*prompt, *completion):
                    path.append(trees[n].setdefault((path[-1], token), len(trees[n])))
                paths.append((n, path[-len(completion) - 1 : -1], completion))
    length = max(map(len, trees))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    positions, mask = np.zeros_like(ids), np.tile(np.eye(length, dtype=bool), (len(rows), 1, 1))
    for n, tree in enumerate(trees):
        for (before, token), i in tree.items():
            ids[n, i] = token
            if before is not None:
                positions[n, i] = positions[n, before] + 1
                mask[n, i] |= mask[n, before]
    steps = [(n * length + i, t) for n, path, end in paths for i, t in zip(path, end, strict=True)]
    index = torch.tensor([scored.setdefault(step, len(scored)) for step in steps])
    predictors, labels = torch.tensor(list(scored)).T
    tensors = map(torch.from_numpy, (ids, positions, mask[:, None]))
    return SharedRows(*tensors, predictors, labels, index, [len(answer) for *_, answer in paths])


def shared_logps(model, rows: SharedRows):
    """Summed log-probs of every completion of shared rows, (C,), in float64."""
    (*tensors, counts), model = rows, unwrap(model)
    ids, positions, mask, predictors, labels, index = (t.to(model.device) for t in tensors)
    base, head = model.base_model, model.get_output_embeddings()
    out = base(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    hidden = out.last_hidden_state.flatten(0, 1)[predictors]  # (S, H)
    token_logps = HeadLogps.apply(hidden, head.weight, head.bias, labels).double()
    return torch.stack([part.sum() for part in token_logps[index].split(counts)])


class HeadLogps(torch.autograd.Function):
    """log p(label) for S hidden states under a frozen linear head, a chunk of logits at a time.

    hidden (S, H), weight (V, H), bias (V,) or None, labels (S,) -> (S,), in float32 or wider. Kept
    for backward is d logp / d hidden = (onehot(label) - softmax) @ weight, (S, H), not the logits.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, labels):
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
                minus_p = logits.sub_(log_z).exp_().neg_()  # in place: the chunk is used up
                minus_p.scatter_add_(1, label, torch.ones_like(log_z))
                slope[part] = minus_p.to(weight.dtype) @ weight
        ctx.save_for_backward(slope)
        return logps

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, None].to(ctx.saved_tensors[0].dtype), None, None, None


def sdpa_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Transformers' sdpa, a block of queries at a time, over the keys that the block may see.

    query (B, heads, L, D); key, value (B, key heads, L, D); attention_mask (B, 1, L, L), true where
    a token may look. Returns ((B, L, heads, D), None).
    """
    if (blocks := _blocks(attention_mask, query, key)) is None:
        rest = attention_mask, dropout, scaling
        return sdpa_attention_forward(module, query, key, value, *rest, **options)
    order, mask, runs = blocks
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(t.index_select(2, order), groups) for t in (key, value))
    attend = functools.partial(F.scaled_dot_product_attention, dropout_p=dropout, scale=scaling)
    parts = ((query[:, :, q], key[:, :, k], value[:, :, k], mask[:, :, q, k]) for q, k in runs)
    return torch.cat([attend(*part) for part in parts], 2).transpose(1, 2).contiguous(), None


def _blocks(mask, query, key):
    """(order of the keys, mask in that order, (queries, keys) slices); None: attention runs whole.

    What the last token does not see comes first, backwards: of a row prompt, chosen, rejected come
    chosen backwards, prompt, rejected. Neither answer then reaches over the other.
    """
    length = query.shape[2]
    whole = query.is_cuda or torch.compiler.is_compiling()  # launches cost more than blocks save
    whole |= length <= BLOCK or key.shape[2] != length
    if whole or mask is None or mask.dtype != torch.bool or mask.shape[-2:] != (length, length):
        return None
    if mask not in _CUT:
        seen = mask.flatten(0, -3).any(0).cpu()  # by any row of the batch
        last = seen[-1]
        order = torch.cat([(~last).nonzero().flip(0), last.nonzero()]).flatten()
        runs = []
        for start in range(0, length, BLOCK):
            queries = slice(start, start + BLOCK)
            keys = seen[queries].any(0)[order].nonzero().flatten().tolist() or [0, length - 1]
            runs += [(queries, slice(keys[0], keys[-1] + 1))]
        whole = all(keys == slice(0, length) for _, keys in runs)
        order = order.to(mask.device)
        _CUT[mask] = None if whole else (order, mask.index_select(-1, order), runs)
    return _CUT[mask]


for _name, _attend in zip(BLOCKS.values(), (sdpa_blocks, in_float32(sdpa_blocks)), strict=True):
    AttentionInterface.register(_name, _attend)
    AttentionMaskInterface.register(_name, sdpa_mask)


class LeanLora:
    """Mixed into PEFT's LoRA layers: W x + s B A x in one pass. Other sums go PEFT's way."""

    def forward(self, x, *args, **kwargs):
        """x: (..., in) -> (..., out) in the base's dtype; the sum in the wider of the two."""
        name, *more = self.active_adapters or [None]
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        if args or kwargs or more or not plain or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight  # (r, in), (out, r)
        base = self.base_layer(x)
        low = F.linear(self.lora_dropout[name](x.to(a.dtype)), a) * self.scaling[name]  # (..., r)
        wide = torch.promote_types(base.dtype, a.dtype)
        base_rows, low_rows = (t.reshape(-1, t.shape[-1]).to(wide) for t in (base, low))
        return torch.addmm(base_rows, low_rows, b.T.to(wide)).view(base.shape).to(base.dtype)


@functools.cache  # one class for all layers of a kind: compiled code is made once for them all
def _lean(kind: type) -> type:
    return type(kind.__name__, (LeanLora, kind), {})


def lean_layers(model) -> None:
    """In place: LoRA on linear layers becomes lean, `gelu_new` PyTorch's own tanh GELU."""
    for module in list(model.modules()):
        linear = isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), LINEAR)
        if linear and not isinstance(module, LeanLora):
            module.__class__ = _lean(type(module))
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
