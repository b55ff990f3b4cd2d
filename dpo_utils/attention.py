"""PyTorch's attention (sdpa) in two forms of our own, under names that Transformers knows them by.

A mask says in row i which tokens token i may look at; most of it is empty. `sdpa_blocks` computes little of what is
empty; `sdpa_float32` does the same with scores in float32, for models whose scores overflow in float16.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BLOCK = 128  # tokens at a time; shorter rows run whole
SDPA = ("sdpa", "sdpa_blocks", "sdpa_float32")  # implementations that honour a boolean 4-D mask
# Model types for which a test shows that nothing but the arithmetic changes with the name of the attention: a few
# others (DeepSeek-V3.2, Falcon) do something else under a name they do not know, and stay with sdpa.
TESTED = ("gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3")
_PLANS = WeakIdKeyDictionary()  # mask -> its plan: all layers share one mask, so it is looked at once


def sdpa_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Attention, a block of tokens at a time, each over one run of keys that holds all it may look at.

    query (B, heads, L, D); key and value (B, key heads, L, D); attention_mask (B, 1, L, L), true where a token may
    look. Returns ((B, L, heads, D), None), as Transformers' own sdpa, which it calls for everything else.
    """
    more = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    plan = None if more else _plan(attention_mask, query, key)
    if plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    order, mask, blocks = plan
    groups = query.shape[1] // key.shape[1]
    key, value = (repeat_kv(tensor.index_select(2, order), groups) for tensor in (key, value))
    out = [
        F.scaled_dot_product_attention(query[:, :, q], key[:, :, k], value[:, :, k], mask[:, :, q, k], dropout, scale=scaling)
        for q, k in blocks
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous(), None


def _plan(mask, query, key):
    """`_cut` of a boolean (.., L, L) mask, made once; None where attention runs whole, as in compiled code, which cannot look."""
    length = query.shape[2]
    if length <= BLOCK or mask is None or mask.dtype != torch.bool or torch.compiler.is_compiling():
        return None
    if mask.shape[-2:] != (length, length) or key.shape[2] != length:
        return None
    if mask not in _PLANS:
        _PLANS[mask] = _cut(mask)
    return _PLANS[mask]


def _cut(mask):
    """(an order of the keys, the mask in that order, a slice of queries and one of keys a block); None if all is seen.

    What the last token does not see goes to the front, backwards: a row prompt, chosen, rejected has its keys as
    chosen backwards, prompt, rejected. Both answers then find the prompt at their side, and neither reaches over the other.
    """
    seen = mask.flatten(0, -3).any(0).cpu()  # by any row of the batch, under any head
    last = seen[-1]
    order = torch.cat([(~last).nonzero().flip(0), last.nonzero()]).flatten()
    blocks = []
    for start in range(0, len(seen), BLOCK):
        queries = slice(start, start + BLOCK)
        keys = seen[queries].any(0)[order].nonzero().flatten().tolist() or [0, len(seen) - 1]
        blocks.append((queries, slice(keys[0], keys[-1] + 1)))
    if all(keys == slice(0, len(seen)) for _, keys in blocks):
        return None
    order = order.to(mask.device)
    return order, mask.index_select(-1, order), blocks


def sdpa_float32(module, query, key, value, attention_mask, **options):
    """The same with scores in float32: Phi-2's overflow in float16. Returns the type of the query."""
    out, weights = sdpa_blocks(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), weights


def use(model, name: str) -> None:
    """Switch a model that runs under sdpa to `name`, if its type is one of `TESTED`; leave any other as it is.

    Warns where that leaves scores in float16 that were to be in float32.
    """
    config = model.config.get_text_config()
    if config.model_type in TESTED and config._attn_implementation == "sdpa":
        model.set_attn_implementation(name)
    elif name == "sdpa_float32":
        warnings.warn(
            f"a {config.model_type} model keeps its own attention ({config._attn_implementation}), with scores in float16 and not "
            "in float32 as planned. If they overflow, training stops before its first step.",
            stacklevel=2,
        )


for function in (sdpa_blocks, sdpa_float32):
    AttentionInterface.register(function.__name__, function)
    AttentionMaskInterface.register(function.__name__, sdpa_mask)
