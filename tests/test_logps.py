"""Summed log-probs of completions: the definition by hand, and whatever the batch around them."""

import math

import pytest
import torch
from small import random_items, small_model
from torch.nn.functional import log_softmax

from dpo_utils.exercises.checks import check_sequence_logps
from dpo_utils.logps import all_logps, plain_logps, sequence_logps
from dpo_utils.tokens import collate

ITEMS = random_items(4, seed=9)


def test_sequence_logps_passes_the_learners_check():
    """Logits predict the next token, prompts and padding do not count, nothing underflows."""
    check_sequence_logps(sequence_logps)


def test_sequence_logps_by_hand():
    # A prompt [0], a completion [1 0] and padding [1]. The logits before the completion's tokens
    # give p(1) = 1/4 and p(0) = 2/3; those before and at the padding do not count.
    logits = torch.tensor([[[math.log(3), 0.0], [math.log(2), 0.0], [9.0, 0.0], [0.0, 5.0]]])
    mask = torch.tensor([[False, True, True, False]])
    value = sequence_logps(logits, torch.tensor([[0, 1, 0, 1]]), mask)
    assert value.item() == pytest.approx(math.log(1 / 4) + math.log(2 / 3), abs=1e-6)


def test_half_precision_logits_are_scored_in_float32():
    """In bfloat16 the sum over 200 tokens would be off by nats."""
    logits = torch.randn(1, 200, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, mask = torch.arange(200)[None] % 50, torch.ones(1, 200, dtype=torch.bool)
    value, exact = (sequence_logps(x, ids, mask).item() for x in (logits, logits.double()))
    halves = log_softmax(logits[0, :-1], -1).gather(1, ids[0, 1:, None]).sum().item()
    assert value == pytest.approx(exact, rel=1e-5) and abs(halves - exact) > 0.1


def test_a_sum_over_thousands_of_tokens_loses_nothing_in_either_form():
    """In float32 the two forms would differ by several thousandths of a nat."""
    item = random_items(1, completion=(4000, 4000))
    model = small_model("llama", torch.float32, max_position_embeddings=5000)
    options = {"pad_id": 2, "micro_tokens": 1, "row_tokens": 1}
    plain, shared = (all_logps(model, item, plain=form, **options) for form in (True, False))
    assert plain.dtype == shared.dtype == torch.float64 and plain.max() < -10_000
    assert (plain - shared).abs().max() < 1e-3


def test_the_plain_form_scores_the_collated_pairs_one_token_after_the_other():
    """Against a loop over the tokens of each unpadded sequence."""
    model = small_model("phi")
    wanted = []
    for prompt, completions in ITEMS:
        for completion in completions:
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
            places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
            tokens = zip(places, completion, strict=True)
            wanted.append(sum(log_softmax(logits[i], -1)[token] for i, token in tokens))
    got = plain_logps(model, ITEMS, pad_id=2)
    assert torch.allclose(got, torch.stack(wanted), rtol=0, atol=1e-10)
    assert torch.equal(got, plain_logps(model, ITEMS, pad_id=50))  # padding does not matter
    pairs = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, (c, r) in ITEMS]
    batch = collate(pairs, pad_id=2)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    sides = sequence_logps(logits, batch["input_ids"], batch["completion_mask"]).view(2, -1)
    assert torch.allclose(sides.T.flatten(), got, rtol=0, atol=1e-10)


@pytest.mark.parametrize("plain", [True, None])
def test_all_log_probs_are_in_the_order_of_the_items_whatever_the_budget(plain):
    items = random_items(12, seed=3, completion=(1, 30))
    model = small_model("llama")
    wanted = plain_logps(model, items, pad_id=2).view(-1, 2)
    for micro_tokens in (1, 100, 10_000):
        options = {"pad_id": 2, "micro_tokens": micro_tokens, "row_tokens": 60, "plain": plain}
        assert torch.allclose(all_logps(model, items, **options), wanted, rtol=0, atol=1e-10)
