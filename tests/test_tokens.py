"""Whatever the text, a tokenised row keeps its promises or is dropped with a reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from dpo_utils import tokens as T
from dpo_utils.exercises.checks import check_collate
from dpo_utils.models import load_tokenizer
from dpo_utils.profiles import load_profile

CHAT, PLAIN, BARE = (load_tokenizer(load_profile("tiny")) for _ in range(3))
PLAIN.chat_template = None  # as Phi-2's is
BARE.chat_template = "{{ messages[0].content }}"  # adds nothing
EOS = CHAT.eos_token_id
PIECES = [*"ab 0159\n\té漢字🙂.?", "<|endoftext|>", "<|user|>", "  "]
TEXT = st.lists(st.sampled_from(PIECES), max_size=24).map("".join) | st.text(max_size=24)
SIDES = ("chosen_ids", "rejected_ids")


def pair(prompt="Why?", chosen="So.", rejected="No."):
    """A preference in TRL's standard format."""
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@settings(max_examples=200, deadline=None)
@given(TEXT, TEXT, TEXT, st.integers(4, 64), st.sampled_from([CHAT, PLAIN]))
def test_every_pair_is_sound_or_dropped_with_a_reason(prompt, chosen, rejected, length, tokenizer):
    """One prompt for both sides, something to learn, and one EOS, at the end, unless cut."""
    try:
        row = T.tokenize_pair(pair(prompt, chosen, rejected), tokenizer, length)
    except T.UnusablePair as problem:
        assert problem.reason
        return
    before = T.encode_prompt(prompt, tokenizer)
    assert row["prompt_ids"] == before and row["chosen_ids"] != row["rejected_ids"]
    for ids in (row[side] for side in SIDES):
        cut = len(before) + len(ids) == length and ids[-1] != EOS
        assert 1 <= len(ids) <= length - len(before)
        assert ids.count(EOS) == (not cut) and (cut or ids[-1] == EOS)


def test_the_chat_template_frames_all_turns_and_without_one_the_text_is_phi_2s():
    turns = [("system", "Brief."), ("user", "One?"), ("assistant", "Two."), ("user", "Three?")]
    messages = [{"role": role, "content": text} for role, text in turns]
    chat = "<|system|>Brief.<|user|>One?<|assistant|>Two.<|endoftext|><|user|>Three?<|assistant|>"
    assert T.prompt_text(messages, CHAT) == chat
    row = T.tokenize_pair(pair(messages), PLAIN, 64)
    plain = "Brief.\nInstruct: One?\nOutput: Two.\nInstruct: Three?\nOutput: So.<|endoftext|>"
    assert PLAIN.decode(row["prompt_ids"] + row["chosen_ids"]) == plain


def test_no_token_spans_the_boundary_of_prompt_and_completion():
    """`Wh` and `y` are encoded apart, although the tokenizer has a token for both together."""
    row = T.tokenize_pair(pair("Wh", "y", "at"), BARE, 64)
    wh, y, why = (BARE(text)["input_ids"] for text in ("Wh", "y", "Why"))
    assert row["prompt_ids"] == wh and row["chosen_ids"] == [*y, EOS] and wh + y != why


def test_conversational_and_standard_pairs_give_the_same_ids():
    talk = pair([{"role": "user", "content": "Why?"}])
    for side in ("chosen", "rejected"):
        talk[side] = [{"role": "assistant", "content": talk[side]}]
    assert T.tokenize_pair(talk, CHAT, 64) == T.tokenize_pair(pair(), CHAT, 64)


@pytest.mark.parametrize("ends", ["$A:0", "<|endoftext|>:0 $A:0 <|endoftext|>:0"])
def test_bos_is_the_tokenizers_and_eos_is_neither_doubled_nor_missing(ends):
    """Also with a tokenizer that puts both around every text."""
    tokenizer = load_tokenizer(load_profile("tiny"))
    tokenizer.chat_template = None
    bare = T.encode_prompt("Why?", tokenizer)
    marks = [("<|endoftext|>", EOS)]
    processor = processors.TemplateProcessing(single=ends, pair="$A $B", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = processor
    row = T.tokenize_pair(pair(), tokenizer, 64)
    assert row["prompt_ids"] == [EOS] * ("endoftext" in ends) + bare
    assert [row[side].count(EOS) for side in SIDES] == [1, 1]


@pytest.mark.parametrize(
    "row, length, reason",
    [
        (pair("Why is that so?", "a", "b"), 5, "prompt fills max_length"),
        (pair(rejected="So."), 64, "same tokens"),
        (pair(chosen="The same start, so", rejected="The same start, no"), 11, "after the cut"),
        (pair(chosen="So.<|endoftext|>"), 64, r"<\|endoftext\|> inside the completion"),
        (pair("Why?<|endoftext|>"), 64, r"<\|endoftext\|> inside the prompt"),
        (pair(chosen=""), 64, "completion has no tokens"),
        (pair(chosen=[{"role": "user", "content": "So."}]), 64, "not one assistant message"),
    ],
)
def test_a_pair_that_teaches_nothing_says_why(row, length, reason):
    with pytest.raises(T.UnusablePair, match=reason):
        T.tokenize_pair(row, CHAT, length)


@pytest.mark.parametrize("tokenize", [T.tokenize_pair, T.tokenize_demonstration])
def test_an_empty_prompt_is_refused(tokenize):
    """Nothing would predict the first token of the completion."""
    with pytest.raises(T.UnusablePair, match="prompt has no tokens"):
        tokenize({**pair(""), "completion": "So."}, BARE, 64)


def test_every_row_is_kept_or_counted_and_an_empty_result_refused():
    rows = [pair("Q?", "a", rejected) for rejected in "bac"]
    kept, dropped = T.tokenize_all(rows, CHAT, 64)
    same = "chosen and rejected are the same tokens"
    assert [row["row"] for row in kept] == [1, 3] and dropped == [(2, same)]
    with pytest.raises(ValueError, match=f"no row of 1 is usable at max_length=64: {same}"):
        T.tokenize_all(rows[1:2], CHAT, 64)


def test_collate_passes_the_learners_check():
    """Masks come from lengths: a pad id that is also the EOS is still scored where it ends."""
    check_collate(T.collate)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 200))
def test_micro_batches_hold_every_row_once_within_their_budget(lengths, tokens):
    """Counted as they run: every row as wide as the widest. A row over the budget runs alone."""
    batches = T.micro_batches(lengths, tokens)
    assert sorted(sum(batches, [])) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
