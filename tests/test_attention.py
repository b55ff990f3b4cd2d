"""Attention in blocks equals PyTorch's own, does less, and steps aside where it does not apply."""

import pytest
import torch
from small import CONFIGS, random_items, small_model
from test_logps import loss_and_gradients

from dpo_utils import attention
from dpo_utils.logps import unwrap, why_plain

LONG = random_items(4, seed=1, head=9) + random_items(2, seed=2, prompt=(30, 40), completion=(1, 40))


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys) of every call to Transformers' sdpa, under blocks of 7 tokens."""
    seen, real = [], attention.sdpa_attention_forward

    def spy(module, query, key, value, mask, **options):
        seen.append((query.shape[2], key.shape[2]))
        return real(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "sdpa_attention_forward", spy)
    monkeypatch.setattr(attention, "BLOCK", 7)
    return seen


@pytest.mark.parametrize("name", ["sdpa_blocks", "sdpa_float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_equal_the_definition(kind, name, calls):
    """Value and every gradient, against plain rows under PyTorch's attention."""
    model = small_model(kind)
    wanted, wanted_grads = loss_and_gradients(model, LONG, plain=True)
    assert not calls
    unwrap(model).set_attn_implementation(name)
    assert why_plain(model) is None
    got, grads = loss_and_gradients(model, LONG, plain=False)
    tolerance = 1e-10 if name == "sdpa_blocks" else 1e-4  # the other one's scores are float32 by design
    assert (got - wanted).abs().max() < tolerance
    assert max((a - b).abs().max() for a, b in zip(grads, wanted_grads, strict=True)) < tolerance
    assert {(7, 7), (7, 14), (7, 21)} <= set(calls) and max(queries for queries, _ in calls) == 7


def test_a_block_may_end_anywhere(calls):
    """Also with a last block of a single query, which grouped heads treat on their own."""
    torch.manual_seed(0)
    layer = unwrap(small_model("llama")).model.layers[0].self_attn
    for length in (7, 8, 13, 14, 15):
        query, key = torch.randn(2, 4, length, 8).double(), torch.randn(2, 2, length, 8).double()
        mask = torch.ones(length, length, dtype=torch.bool).tril() & (torch.rand(2, 1, length, length) < 0.7)
        mask |= torch.eye(length, dtype=torch.bool)
        got, _ = attention.sdpa_blocks(layer, query, key, key, mask)
        wanted, _ = attention.sdpa_attention_forward(layer, query, key, key, mask)
        assert (got - wanted).abs().max() < 1e-14 and got.shape == (2, length, 4, 8)
    assert (1, 8) in calls and (1, 15) in calls


@pytest.mark.parametrize("why", ["short", "no mask", "cached", "encoder", "position bias"])
def test_it_steps_aside(why, calls):
    layer = torch.nn.Module()
    layer.is_causal, layer.num_key_value_groups = why != "encoder", 1
    length, keys = (7 if why == "short" else 9), (12 if why == "cached" else 7 if why == "short" else 9)
    mask = None if why == "no mask" else torch.ones(1, 1, length, keys, dtype=torch.bool).tril(keys - length)
    if why == "encoder":
        mask = torch.ones_like(mask)
    query, key = torch.randn(1, 2, length, 8), torch.randn(1, 2, keys, 8)
    bias = {"position_bias": torch.randn(1, 2, length, keys)} if why == "position bias" else {}
    got, _ = attention.sdpa_blocks(layer, query, key, key, mask, **bias)
    assert calls == [(length, keys)]
    assert torch.equal(got, attention.sdpa_attention_forward(layer, query, key, key, mask, **bias)[0])


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_prompts_are_continued_alike(kind, calls):
    """Left-padded generation with a cache: the prompts in blocks, the new tokens one by one."""
    model = unwrap(small_model(kind)).eval()
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    wanted = model.generate(ids, **options)
    assert not calls
    model.set_attn_implementation("sdpa_blocks")
    assert torch.equal(model.generate(ids, **options), wanted)
    assert (7, 14) in calls and any(queries == 1 and keys > 19 for queries, keys in calls)
