"""PyTorch's attention (sdpa) in two forms of our own, under names that Transformers knows them by.

A mask says in row i which tokens token i may look at; in a causal one nothing stands right of the diagonal.
`sdpa_blocks` does not compute what stands there; `sdpa_float32` does the same with scores in float32, for models
whose scores overflow in float16. Both are sdpa for every mask: what is not causal runs whole.
"""

import warnings

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BLOCK = 256  # tokens at a time; shorter rows run whole
SDPA = ("sdpa", "sdpa_blocks", "sdpa_float32")  # implementations that honour a boolean 4-D mask
# Model types for which a test shows that nothing but the arithmetic changes with the name of the attention: a few
# others (DeepSeek-V3.2, Falcon) do something else under a name they do not know, and stay with sdpa.
TESTED = ("gpt2", "gpt_neox", "llama", "mistral", "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3")
_CAUSAL = WeakIdKeyDictionary()  # mask -> is it causal: all layers share one mask, so it is looked at once


def sdpa_blocks(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **options):
    """Attention, a block of tokens at a time, each over the keys up to the block's end: no more is causal.

    query (B, heads, L, D); key and value (B, key heads, L, D); attention_mask (B, 1, L, L), true where a token may
    look. Returns ((B, L, heads, D), None), as Transformers' own sdpa, which it calls for everything else.
    """
    length = query.shape[2]
    more = any(options.get(name) is not None for name in ("position_bias", "softcap"))
    if length <= BLOCK or more or not _causal_square(attention_mask, length, key):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    blocks = []
    for start in range(0, length, BLOCK):
        end = start + BLOCK
        mask = attention_mask[:, :, start:end, :end]
        queries, keys, values = query[:, :, start:end], key[:, :, :end], value[:, :, :end]
        blocks.append(F.scaled_dot_product_attention(queries, keys, values, mask, dropout, scale=scaling))
    return torch.cat(blocks, dim=2).transpose(1, 2).contiguous(), None


def _causal_square(mask, length: int, key) -> bool:
    """Is it a boolean (.., L, L) with nothing right of the diagonal? Compiled code, which cannot look, is told no."""
    if mask is None or mask.dtype != torch.bool or torch.compiler.is_compiling():
        return False
    if mask.shape[-2:] != (length, length) or key.shape[2] != length:
        return False
    if mask not in _CAUSAL:
        _CAUSAL[mask] = not mask.triu(1).any().item()
    return _CAUSAL[mask]


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
