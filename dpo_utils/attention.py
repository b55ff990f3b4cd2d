"""PyTorch's attention (sdpa) in two forms of our own, under names that Transformers knows them by.

`sdpa_blocks` leaves out what lies beyond every token's view. `sdpa_float32` does the same with scores in float32, for
models whose scores overflow in float16. Both equal sdpa; `logps.why_plain` accepts all three.
"""

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

BLOCK = 256  # queries at a time; shorter rows run as one
SDPA = ("sdpa", "sdpa_blocks", "sdpa_float32")  # implementations that honour a boolean 4-D mask


def sdpa_blocks(module, query, key, value, attention_mask, **options):
    """Causal attention, a block of queries at a time: no query looks beyond its block, so no score there is computed.

    query (B, heads, L, D); key and value (B, key heads, L, D); attention_mask (B, 1, L, L), true where a query may
    look, and never above the diagonal. Returns ((B, L, heads, D), None), as Transformers' own sdpa, which is called
    once for everything that is not such a square: a cached prefix, no mask, an encoder, few queries.
    """
    length = query.shape[2]
    square = attention_mask is not None and key.shape[2] == length and getattr(module, "is_causal", True)
    if not square or length <= BLOCK or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    blocks = []
    for start in range(0, length, BLOCK):
        end = start + BLOCK
        mask = attention_mask[:, :, start:end, :end]
        block = query[:, :, start:end], key[:, :, :end], value[:, :, :end], mask
        blocks.append(sdpa_attention_forward(module, *block, **options)[0])
    return torch.cat(blocks, dim=1), None


def sdpa_float32(module, query, key, value, attention_mask, **options):
    """The same with scores in float32: Phi-2's overflow in float16. Returns the type of the query."""
    out, weights = sdpa_blocks(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return out.to(query.dtype), weights


for function in (sdpa_blocks, sdpa_float32):
    AttentionInterface.register(function.__name__, function)
    AttentionMaskInterface.register(function.__name__, sdpa_mask)
