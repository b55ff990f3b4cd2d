"""Attention in blocks equals PyTorch's own, does less, and steps aside where it does not apply."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from small import CONFIGS, VOCABULARY, random_items, small_model
from small_runs import profile
from test_logps import loss_and_gradients
from transformers import AutoConfig, AutoModelForCausalLM, FalconConfig, GPTNeoConfig

from dpo_utils import attention, models
from dpo_utils.logps import plain_logps, shared_logps, unwrap, why_plain
from dpo_utils.tokens import pack_rows

LONG = random_items(4, seed=1, head=9) + random_items(2, seed=2, prompt=(30, 40), completion=(1, 40))
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": None,
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys) of every call of PyTorch's sdpa, under blocks of 7 tokens."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(query, key, *rest, **options):
        seen.append((query.shape[2], key.shape[2]))
        return real(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "BLOCK", 7)
    return seen


@pytest.mark.parametrize("name", ["sdpa_blocks", "sdpa_float32"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_equal_the_definition(kind, name, calls):
    """Value and every gradient, against plain rows under PyTorch's attention."""
    model = small_model(kind)
    wanted, wanted_grads = loss_and_gradients(model, LONG, plain=True)
    assert all(queries == keys for queries, keys in calls)
    unwrap(model).set_attn_implementation(name)
    assert why_plain(model) is None
    calls.clear()
    got, grads = loss_and_gradients(model, LONG, plain=False)
    tolerance = 1e-10 if name == "sdpa_blocks" else 1e-4  # the other one's scores are float32 by design
    assert (got - wanted).abs().max() < tolerance
    assert max((a - b).abs().max() for a, b in zip(grads, wanted_grads, strict=True)) < tolerance
    assert {(7, 7), (7, 14), (7, 21)} <= set(calls) and max(queries for queries, _ in calls) == 7


@pytest.mark.parametrize("kind", attention.TESTED)
def test_the_name_changes_nothing_but_the_arithmetic(kind, calls):
    """Every model type that is switched: logits of shared rows, and of plain padded ones."""
    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES), attn_implementation="sdpa")
        .eval()
        .requires_grad_(False)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() > 1 else None
        wanted = plain_logps(model, LONG, 0), shared_logps(model, pack_rows([LONG[:3], LONG[3:]], 0))
        attention.use(model, "sdpa_blocks")
        assert model.config._attn_implementation == "sdpa_blocks" and why_plain(model) is None
        calls.clear()
        got = plain_logps(model, LONG, 0), shared_logps(model, pack_rows([LONG[:3], LONG[3:]], 0))
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-4) for a, b in zip(got, wanted, strict=True))
    assert (7, 14) in calls and wanted[0].std() > 1


def test_models_that_are_not_tested_keep_their_attention(tmp_path):
    """Falcon has no attention under other names, GPT-Neo none but eager: both load, and give the definition's log-probs."""
    for config, name in (
        (FalconConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False), "sdpa"),
        (
            GPTNeoConfig(vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global"], 2]]),
            "eager",
        ),
    ):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name)
        model = models.load_base(profile(model=str(tmp_path / name), quantize=False))
        assert model.config._attn_implementation == name
        assert (why_plain(model) is None) == (name == "sdpa") and (name == "sdpa" or "eager" in why_plain(model))


def test_a_plan_for_float32_scores_that_is_not_followed_is_said():
    tested = small_model("phi", lora=False)
    other = AutoModelForCausalLM.from_config(FalconConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention.use(tested, "sdpa_float32")
        attention.use(other, "sdpa_blocks")
    assert tested.config._attn_implementation == "sdpa_float32"
    with pytest.warns(UserWarning, match="a falcon model keeps its own attention .sdpa., with scores in float16"):
        attention.use(other, "sdpa_float32")


def layer(groups: int = 1) -> torch.nn.Module:
    """All that sdpa asks of an attention layer."""
    module = torch.nn.Module()
    module.is_causal, module.num_key_value_groups = True, groups
    return module


def test_a_block_may_end_anywhere(calls):
    """Also with a last block of a single token, with grouped heads, and with a mask for each head."""
    torch.manual_seed(0)
    for length in (8, 13, 14, 15):
        query, key = torch.randn(2, 4, length, 8).double(), torch.randn(2, 2, length, 8).double()
        for heads in (1, 4):
            mask = torch.rand(2, heads, length, length).tril() > 0.3
            mask |= torch.eye(length, dtype=torch.bool)
            got, _ = attention.sdpa_blocks(layer(2), query, key, key, mask, scaling=0.3)
            wanted, _ = attention.sdpa_attention_forward(layer(2), query, key, key, mask, scaling=0.3)
            assert (got - wanted).abs().max() < 1e-14 and got.shape == (2, length, 4, 8) and got.is_contiguous()
    assert (1, 8) in calls and (1, 15) in calls


def test_answers_do_not_reach_over_each_other(monkeypatch):
    """Prompt 0-4, chosen 5-7, rejected 8-10: by hand, and from a packed row."""
    monkeypatch.setattr(attention, "BLOCK", 3)
    mask = torch.ones(11, 11, dtype=torch.bool).tril()
    mask[8:, 5:8] = False
    order, moved, blocks = attention._cut(mask[None, None])
    assert order.tolist() == [7, 6, 5, 0, 1, 2, 3, 4, 8, 9, 10]
    assert torch.equal(moved[0, 0], mask[:, order])
    # Tokens 0-2; 3-5, of which 5 is chosen; 6-8, chosen and the first rejected; 9-10, which see no chosen one.
    assert [(q.start, k.start, k.stop) for q, k in blocks] == [(0, 3, 6), (3, 2, 8), (6, 0, 9), (9, 3, 11)]
    row = pack_rows([[(list(range(3, 8)), [[8, 9, 10], [11, 12, 13]])]], 0)
    assert attention._cut(row.mask)[2] == blocks


@pytest.mark.parametrize("case", ["anything", "nothing", "ahead", "prefix", "trees"])
def test_no_key_is_left_out_that_is_looked_at(case, calls):
    """Whatever the mask: also where a token sees ahead, or a block nothing at all."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 1, 23, 23, dtype=torch.bool).tril()
    if case == "anything":
        mask = torch.rand(2, 3, 23, 23, generator=generator) > 0.99
    elif case == "nothing":
        mask[:, :, :9] = False
    elif case == "ahead":
        mask = torch.ones_like(mask).tril(1)
    elif case == "prefix":
        mask |= torch.arange(23) < 4
    else:
        mask = pack_rows([LONG[:3], LONG[3:]], 0).mask
    length, heads = mask.shape[-1], mask.shape[1]
    query, key = (torch.randn(2, heads, length, 8, generator=generator).double() for _ in range(2))
    got, _ = attention.sdpa_blocks(layer(), query, key, key, mask)
    cut = list(calls)
    wanted, _ = attention.sdpa_attention_forward(layer(), query, key, key, mask)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-14, equal_nan=True)
    assert len(cut) > 1 and (case == "anything" or sum(q * k for q, k in cut) < 0.9 * length**2)


def _masks(length: int) -> dict:
    ones = torch.ones(1, 1, length, length, dtype=torch.bool)
    return {
        "none": None,
        "short": ones[..., :7, :7].tril(),
        "all seen": ones,
        "keys alone": ones[..., :1, :],
        "numbers": torch.zeros(ones.shape).masked_fill(~ones.tril(), -1e9),
        "cached": torch.ones(1, 1, length, length + 3, dtype=torch.bool).tril(3),
        "biased": ones.tril(),
    }


@pytest.mark.parametrize("case", _masks(9))
def test_everything_else_runs_whole(case, calls):
    mask = _masks(9)[case]
    queries, keys = {"short": (7, 7), "cached": (9, 12)}.get(case, (9, 9))
    query, key = torch.randn(1, 2, queries, 8), torch.randn(1, 2, keys, 8)
    options = {"position_bias": torch.randn(1, 2, 9, 9)} if case == "biased" else {}
    got, _ = attention.sdpa_blocks(layer(), query, key, key, mask, **options)
    assert calls == [(queries, keys)]
    assert torch.equal(got, attention.sdpa_attention_forward(layer(), query, key, key, mask, **options)[0])


def test_softcapped_scores_are_refused_as_by_sdpa(calls):
    query, mask = torch.randn(1, 2, 9, 8), torch.ones(1, 1, 9, 9, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="softcap"):
        attention.sdpa_blocks(layer(), query, query, query, mask, softcap=30.0)


def test_the_mask_is_looked_at_once(monkeypatch, calls):
    looks, real = [], attention._cut
    monkeypatch.setattr(attention, "_cut", lambda mask: (looks.append(mask), real(mask))[1])
    model = unwrap(small_model("phi"))
    model.set_attn_implementation("sdpa_blocks")
    shared_logps(model, pack_rows([LONG], 0))
    assert len(looks) == 1 and len(calls) > 2


def test_compiled_layers_are_not_compiled_again_for_every_length():
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(attention.sdpa_blocks, backend=counter, dynamic=True)
    for length in (300, 400, 520, 777, 801):
        query, mask = torch.randn(1, 2, length, 8), torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        got, _ = compiled(layer(), query, query, query, mask)
        assert torch.allclose(got, attention.sdpa_blocks(layer(), query, query, query, mask)[0], atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", CONFIGS)
def test_padded_prompts_are_continued_alike(kind, calls):
    """Left-padded generation with a cache: the prompts in blocks, the new tokens one by one."""
    model = unwrap(small_model(kind)).eval()
    ids = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    wanted = model.generate(ids, **options)
    model.set_attn_implementation("sdpa_blocks")
    calls.clear()
    assert torch.equal(model.generate(ids, **options), wanted)
    assert (7, 14) in calls and any(keys > 19 for _, keys in calls)
