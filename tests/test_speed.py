"""The fast step does less than the plain one: fewer operations, fewer bytes, by ratios that do not depend on the machine.

On the truthy-like lengths of the benchmark (tests/bench), with a small body under a head of ordinary proportions.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from bench.memory import full_pairs, one
from bench.meter import Meter
from bench.shapes import pair_lengths, save_model
from bench.worker import move_adapter
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from dpo_utils.logps import completion_logps
from dpo_utils.models import fuse_gelu, trainable
from dpo_utils.profiles import PHI_TARGETS
from dpo_utils.tokens import item_length, plan_rows, tokenize_all

SHAPE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 2560}
FLOPS, BYTES = 0.63, 0.57  # of the plain form's at the same budget of tokens; measured 0.614 and 0.556
ATTENTION = 0.48  # of whole squares; measured 0.469, what no block could leave out is 0.412


def phi(fused=True, attention="sdpa_blocks"):
    """A random Phi with a moved adapter."""
    torch.manual_seed(0)
    config = PhiConfig(**SHAPE, resid_pdrop=0.0, hidden_act="gelu_new", pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).requires_grad_(False)
    if fused:
        fuse_gelu(model)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(PHI_TARGETS), task_type="CAUSAL_LM"))
    move_adapter(model)
    return model


def items(count=8, lengths="truthy"):
    """Items of the benchmark's lengths with random ids."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, SHAPE["vocab_size"], (n,), generator=generator).tolist()

    return [(ids(p), [ids(c), ids(r)]) for p, c, r in pair_lengths(lengths, count)]


def cost(model, what, plain, micro_tokens=512, pairs=None):
    """Forward and backward of one step under the meter: (what it cost, its loss)."""
    pairs, total = pairs or items(), 0.0
    with Meter(what) as meter:
        for _, logps in completion_logps(model, pairs, pad_id=0, micro_tokens=micro_tokens, row_tokens=384, plain=plain):
            loss = -F.logsigmoid(0.1 * (logps[:, 0] - logps[:, 1])).sum() / len(pairs)
            loss.backward()
            total += loss.item()
    for parameter in trainable(model):
        parameter.grad = None
    return meter.result, total


@pytest.fixture(scope="module")
def costs():
    """{(form, what): result} of the plain form and the fast one, after one unmeasured step each."""
    models, out = {"plain": phi(fused=False, attention="sdpa"), "fast": phi()}, {}
    for form, model in models.items():
        for what in ("time", "flops", "memory"):
            out[form, what], out[form, "loss"] = cost(model, what, plain=form == "plain")
    return out


def within(fast: float, plain: float, share: float) -> bool:
    """What every ratio below asks."""
    return fast <= share * plain


def test_the_same_loss(costs):
    assert costs["fast", "loss"] == pytest.approx(costs["plain", "loss"], rel=1e-5)


def test_fewer_operations(costs):
    assert within(costs["fast", "flops"]["flops"], costs["plain", "flops"]["flops"], FLOPS)


def test_fewer_bytes(costs):
    assert within(costs["fast", "memory"]["peak_bytes"], costs["plain", "memory"]["peak_bytes"], BYTES)


def test_long_rows_leave_out_most_of_what_the_mask_hides():
    """Pairs of about 1,000 tokens and more: operations of attention, in blocks against whole squares."""
    pairs = items(3, "hh")
    squares, loss = cost(phi(attention="sdpa"), "flops", plain=False, pairs=pairs)
    blocks, same = cost(phi(), "flops", plain=False, pairs=pairs)
    assert same == pytest.approx(loss, rel=1e-5)
    share = blocks["attention_flops"] / squares["attention_flops"]
    seen = sum(p * p / 2 + sum(n * p + n * n / 2 for n in (c, r)) for p, c, r in pair_lengths("hh", 3))
    seen /= sum((p + c + r) ** 2 for p, c, r in pair_lengths("hh", 3))
    assert seen < share < ATTENTION and 1 - share > 0.5 * (1 - seen)


def test_a_slow_path_in_disguise_fails_both(costs):
    model = phi()
    assert not within(cost(model, "flops", plain=True)[0]["flops"], costs["plain", "flops"]["flops"], FLOPS)
    assert not within(cost(model, "memory", plain=True)[0]["peak_bytes"], costs["plain", "memory"]["peak_bytes"], BYTES)


def test_a_wider_micro_batch_costs_memory_and_padding(costs):
    model = phi()
    wide, _ = cost(model, "memory", plain=False, micro_tokens=2048)
    assert costs["fast", "memory"]["peak_bytes"] < 0.35 * wide["peak_bytes"]
    more, _ = cost(model, "flops", plain=False, micro_tokens=2048)
    assert costs["fast", "flops"]["flops"] <= more["flops"] < 1.2 * costs["fast", "flops"]["flops"]


@pytest.mark.parametrize(
    ("n", "row_tokens", "micro_tokens", "most"), [(64, 384, 1024, 1.02), (16, 512, 2048, 1.07), (9, 512, 2048, 1.12)]
)
def test_rows_are_hardly_padded(n, row_tokens, micro_tokens, most):
    pairs = items(n)
    batches = [[sum(item_length(pairs[i]) for i in row) for row in batch] for batch in plan_rows(pairs, row_tokens, micro_tokens)]
    assert sum(len(lengths) * max(lengths) for lengths in batches) <= most * sum(map(item_length, pairs))


def test_checkpointing_trades_half_more_operations_for_memory(costs):
    model = phi()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert cost(model, "memory", plain=False)[0]["peak_bytes"] < 0.6 * costs["fast", "memory"]["peak_bytes"]
    ratio = cost(model, "flops", plain=False)[0]["flops"] / costs["fast", "flops"]["flops"]
    assert 1.4 < ratio < 1.55


def test_the_meter_counts_what_can_be_worked_by_hand():
    a, b = torch.randn(10, 20), torch.randn(20, 30)
    with Meter("flops") as meter:
        a @ b
    assert meter.result["flops"] == 2 * 10 * 20 * 30
    query = torch.randn(1, 2, 7, 4, requires_grad=True)  # 2 heads, 7 tokens, 4 wide
    with Meter("flops") as meter:
        F.scaled_dot_product_attention(query, query, query)
    assert meter.result["attention_flops"] == 2 * (2 * 2 * 7 * 7 * 4)  # scores, then values
    with Meter("memory") as meter:
        kept = torch.empty(1000)
        torch.empty(3000).zero_()  # released at once
    assert meter.result["peak_bytes"] == 4 * (len(kept) + 3000)


def test_the_memory_script_trains_on_pairs_that_fill_their_length(tmp_path):
    """`bench.memory`, in the phi2 profile's 4 bits and bfloat16, on a small shape."""
    save_model("small", tmp_path)
    rows, dropped = tokenize_all(full_pairs("small", 40, 3), AutoTokenizer.from_pretrained(tmp_path), 40)
    assert not dropped and {len(row["prompt_ids"] + row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")} == {40}
    assert all(row[side][-1] == 2 for row in rows for side in ("chosen_ids", "rejected_ids"))  # uncut
    row = one(str(tmp_path), "small", "a pair at a time, checkpointing", 40, 2, 3)
    assert row["losses"][0] == pytest.approx(math.log(2), abs=1e-3) and row["losses"][1] < row["losses"][0]
