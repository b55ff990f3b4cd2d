"""Tokenisation keeps its promises, whatever the text; shared rows are the tree they claim to be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import random_items

from dpo_utils import tokens as T
from dpo_utils.exercises.checks import check_collate
from dpo_utils.models import load_tokenizer
from dpo_utils.profiles import load_profile
from dpo_utils.tokens import collate_rows, plan_plain_rows

TOKENIZER = load_tokenizer(load_profile("tiny"))
PIECES = [*"ab 0159\n\té漢字🙂.?", "<|endoftext|>", "<|user|>", "  "]
TEXT = st.lists(st.sampled_from(PIECES), max_size=24).map("".join) | st.text(max_size=24)


def plain_tokenizer():
    """The bundled tokenizer without its chat template, as Phi-2's is."""
    tokenizer = load_tokenizer(load_profile("tiny"))
    tokenizer.chat_template = None
    return tokenizer


@settings(max_examples=400, deadline=None)
@given(TEXT, TEXT, TEXT, st.integers(4, 64), st.booleans())
def test_every_pair_is_sound_or_dropped_with_a_reason(prompt, chosen, rejected, max_length, template):
    tokenizer = TOKENIZER if template else PLAIN
    try:
        pair = T.tokenize_pair({"prompt": prompt, "chosen": chosen, "rejected": rejected}, tokenizer, max_length)
    except T.UnusablePair as problem:
        assert problem.reason
        return
    prompt_ids = T.encode_prompt(prompt, tokenizer)
    assert pair["prompt_ids"] == prompt_ids and pair["chosen_ids"] != pair["rejected_ids"]
    for side in ("chosen_ids", "rejected_ids"):
        ids = pair[side]
        cut = len(prompt_ids) + len(ids) == max_length and ids[-1] != tokenizer.eos_token_id
        assert 1 <= len(ids) <= max_length - len(prompt_ids)
        assert ids.count(tokenizer.eos_token_id) == (0 if cut else 1) and (cut or ids[-1] == tokenizer.eos_token_id)


PLAIN = plain_tokenizer()


def test_the_chat_template_frames_system_and_earlier_turns():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Three?"},
    ]
    text = T.prompt_text(messages, TOKENIZER)
    assert text == "<|system|>Be brief.<|user|>One?<|assistant|>Two.<|endoftext|><|user|>Three?<|assistant|>"
    assert T.prompt_text(messages, PLAIN) == "Be brief.\nInstruct: One?\nOutput: Two.\nInstruct: Three?\nOutput:"


def test_plain_form_is_phi_2s_and_the_completion_starts_with_a_space():
    pair = T.tokenize_pair({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, PLAIN, 64)
    assert PLAIN.decode(pair["prompt_ids"] + pair["chosen_ids"]) == "Instruct: Why?\nOutput: So.<|endoftext|>"


def test_conversational_and_plain_completions_give_the_same_ids():
    plain = T.tokenize_pair({"prompt": "Why?", "chosen": "So.", "rejected": "No."}, TOKENIZER, 64)
    talk = {"prompt": [{"role": "user", "content": "Why?"}]}
    talk |= {k: [{"role": "assistant", "content": v}] for k, v in (("chosen", "So."), ("rejected", "No."))}
    assert T.tokenize_pair(talk, TOKENIZER, 64) == plain


@pytest.mark.parametrize(
    "pair, max_length, reason",
    [
        (("Why is that so?", "a", "b"), 5, "prompt fills max_length"),
        (("Why?", "So.", "So."), 64, "same tokens"),
        (("Why?", "The same start, then this", "The same start, then that"), 14, "after the cut"),
        (("Why?", "So.<|endoftext|>", "No."), 64, "<|endoftext|> inside the completion"),
        (("Why?<|endoftext|>", "So.", "No."), 64, "<|endoftext|> inside the prompt"),
        (("Why?", "", "No."), 64, "completion has no tokens"),
    ],
)
def test_reasons(pair, max_length, reason):
    with pytest.raises(T.UnusablePair, match=reason.replace("|", r"\|")):
        T.tokenize_pair(dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)), TOKENIZER, max_length)


def test_tokenize_all_counts_every_row_and_refuses_an_empty_result():
    rows = [{"prompt": "Q?", "chosen": "a", "rejected": r} for r in ("b", "a", "c")]
    kept, dropped = T.tokenize_all(rows, TOKENIZER, 64)
    assert [k["row"] for k in kept] == [1, 3] and dropped == [(2, "chosen and rejected are the same tokens")]
    with pytest.raises(ValueError, match="none of the 1 rows can be used at max_length=64: chosen and rejected"):
        T.tokenize_all(rows[1:2], TOKENIZER, 64)


def test_collate_passes_the_learners_check():
    check_collate(T.collate)


def test_pad_equal_to_eos_leaves_the_closing_eos_scored():
    pairs = [{"prompt_ids": [5], "chosen_ids": [6, 0], "rejected_ids": [7, 8, 9, 0]}]
    batch = T.collate(pairs, pad_id=0)
    assert batch["completion_mask"].tolist() == [[False, True, True, False, False], [False, True, True, True, True]]


def test_shared_row_by_hand():
    # head [1 2], prompts [3] and [4 5], completions [6] [7 8] and [9] [10]
    rows = T.pack_rows([[([1, 2, 3], [[6], [7, 8]]), ([1, 2, 4, 5], [[9], [10]])]], pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 6, 7, 8, 4, 5, 9, 10]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 2, 3, 4, 4]]
    assert rows.labels.tolist() == [6, 7, 8, 9, 10] and rows.counts == [1, 2, 1, 1]
    assert rows.predictors.tolist() == [2, 2, 4, 7, 7]
    seen = [rows.mask[0, 0, i].nonzero().flatten().tolist() for i in range(10)]
    assert seen[3] == [0, 1, 2, 3]  # the first answer sees head and prompt
    assert seen[5] == [0, 1, 2, 4, 5]  # the second does not see the first
    assert seen[7] == [0, 1, 6, 7]  # the second prompt sees the head alone
    assert seen[9] == [0, 1, 6, 7, 9]


def test_what_answers_begin_with_stands_once_by_hand():
    # prompt [1 2], completions [3 4 9] and [3 5], scored tokens 3 (for both), 4, 9, 5
    rows = T.pack_rows([[([1, 2], [[3, 4, 9], [3, 5]])]], pad_id=0)
    assert rows.input_ids.tolist() == [[1, 2, 3, 4, 9, 5]] and rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert rows.labels.tolist() == [3, 4, 9, 5] and rows.predictors.tolist() == [1, 2, 3, 2]
    assert rows.label_index.tolist() == [0, 1, 2, 0, 3] and rows.counts == [3, 2]
    assert rows.mask[0, 0, 5].nonzero().flatten().tolist() == [0, 1, 2, 5]


def test_one_answer_in_two_pairs_stands_once():
    """Ranked answers a > b, a > c under one prompt: three answers in the row, and a is scored once."""
    prompt, a, b, c = [1, 2], [3, 4], [5, 6, 7], [8]
    rows = T.pack_rows([[(prompt, [a, b]), (prompt, [a, c])]], pad_id=0)
    assert rows.input_ids.tolist() == [prompt + a + b + c] and rows.labels.tolist() == a + b + c
    assert rows.label_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5] and rows.counts == [2, 3, 2, 1]


ids = st.lists(st.integers(3, 5), min_size=1, max_size=5)  # few ids: much begins alike


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(ids, st.tuples(ids, ids)), min_size=1, max_size=4))
def test_a_row_holds_every_beginning_once_and_every_sequence_whole(items):
    """Each completion's tokens, positions and sight, read back from the row, are those of its own sequence."""
    rows = T.pack_rows([items], pad_id=0)
    sequences = [(prompt + c, len(c)) for prompt, completions in items for c in completions]
    beginnings = {tuple(ids[: i + 1]) for ids, _ in sequences for i in range(len(ids))}
    assert rows.input_ids.shape == (1, len(beginnings)) and len(rows.labels) <= sum(rows.counts)
    assert len(items) > 1 or len(beginnings) == T.item_length(items[0])
    assert rows.counts == [count for _, count in sequences]
    for (sequence, count), scored in zip(sequences, rows.label_index.split(rows.counts), strict=True):
        assert rows.labels[scored].tolist() == sequence[-count:]
        for before, end in zip(rows.predictors[scored].tolist(), range(len(sequence) - count, len(sequence)), strict=True):
            seen = rows.mask[0, 0, before].nonzero().flatten()
            assert rows.input_ids[0, seen].tolist() == sequence[:end]
            assert rows.position_ids[0, seen].tolist() == list(range(end))


def test_padding_sees_only_itself():
    rows = T.pack_rows([[([1], [[2], [3]])], [([1, 1, 1], [[2, 2], [3]])]], pad_id=0)
    assert rows.mask[0, 0, 5].nonzero().flatten().tolist() == [5]
    assert rows.mask.any(-1).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 60), st.integers(1, 200))
def test_plan_rows_uses_every_item_once_within_the_budgets(sizes, row_tokens, micro_tokens):
    items = [([i + 3], [[4] * n, [5]]) for i, n in enumerate(sizes)]
    plan = T.plan_rows(items, row_tokens, micro_tokens)
    assert sorted(i for batch in plan for row in batch for i in row) == list(range(len(items)))
    for batch in plan:
        lengths = [sum(T.item_length(items[i]) for i in row) for row in batch]
        assert all(n <= row_tokens for n, row in zip(lengths, batch, strict=True) if len(row) > 1)
        assert len(batch) == 1 or len(batch) * max(lengths) <= micro_tokens


def test_a_demonstration_is_closed_by_one_eos():
    row = T.tokenize_demonstration({"prompt": "Q?", "completion": "A."}, TOKENIZER, 64)
    assert row["completion_ids"][-1] == TOKENIZER.eos_token_id and torch.tensor(row["completion_ids"]).eq(0).sum() == 1


def test_plain_rows_keep_to_their_budget_too():
    """Counted as they are run: every completion a row, all rows as wide as the widest."""
    items = random_items(20, seed=3, prompt=(3, 30), completion=(1, 40), head=8)
    batches = plan_plain_rows(items, 300)
    assert sorted(i for batch in batches for row in batch for i in row) == list(range(20))
    for batch in batches:
        cells = collate_rows([(items[i][0], c) for row in batch for i in row for c in items[i][1]], 0)["input_ids"].numel()
        assert cells <= 300 or len(batch) == 1
    assert max(map(len, batches)) > 2
    assert plan_plain_rows([items[0]], 1) == [[[0]]]
