"""Whatever the text, a tokenised row keeps its promises or is dropped with a reason."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, processors
from tokenizers import models as kinds
from transformers import PreTrainedTokenizerFast

from dpo_utils import tokens as T
from dpo_utils.exercises.checks import check_collate
from dpo_utils.models import load_tokenizer
from dpo_utils.profiles import load_profile

CHAT, PLAIN, BARE = (load_tokenizer(load_profile("tiny")) for _ in range(3))
PLAIN.chat_template = None  # as Phi-2's is
BARE.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"  # adds nothing
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


LAST = (
    "{% if loop.last %}<think>\n{{ c.split('</think>')[0].split('<think>')[1] | trim if '</think>'"
)
LAST += " in c }}\n</think>\n\n{% endif %}{{ c.split('</think>')[-1] | trim }}"
FRAMES = {  # shaped as: (user's turn, assistant's turn, what asks for one, end of the answer below)
    "chatml": ("<|a|>user\n#<|z|>\n", "<|a|>assistant\n#<|z|>\n", "<|a|>assistant\n", " 4 <|z|>"),
    "llama 3": ("<|a|>user<|h|>\n\n@<|z|>", "<|a|>it<|h|>\n\n@<|z|>", "<|a|>it<|h|>\n\n", "4<|z|>"),
    "gemma": ("<|s|>user\n@<|z|>\n", "<|s|>model\n@<|z|>\n", "<|s|>model\n", "4<|z|>"),
    "phi 3": ("<|a|>\n@<|z|>\n", "<|b|>\n@<|z|>\n", "<|b|>\n{% else %}{{ eos_token }}", "4<|z|>"),
    "mistral": ("[INST] @[/INST]", " @{{ eos_token }}", "", " 4<|endoftext|>"),
    "qwen 3": ("<|a|>#<|z|>", f"<|b|>\n{LAST}<|z|>\n", "<|b|>\n", "<think>\n\n</think>\n\n4<|z|>"),
    "r1": (
        *("<|a|>#", "<|b|>{{ c.split('</think>')[-1] }}{{ eos_token }}"),
        *("<|b|><think>\n", " 4 <|endoftext|>"),
    ),
    "zephyr": ("<|a|>\n@</s>\n", "<|b|>\n@{{ eos_token }}\n", "<|b|>\n", "4 </s>"),
}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
TURNS.append({"role": "user", "content": "2+2?"})


def framed(name):
    """A tokenizer with that template; Zephyr's begins every text with a space, as SentencePiece."""
    tokenizer = load_tokenizer(load_profile("tiny"))
    if name == "zephyr":
        pieces = ["<unk>", "<s>", "</s>", "\u2581", *map(chr, range(10, 127))]
        plain = Tokenizer(kinds.Unigram([(p, -float(n)) for n, p in enumerate(pieces)], 0))
        space = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        plain.normalizer = normalizers.Sequence(space)
        ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **ends)
    tokenizer.add_tokens(["<|s|>", "<|a|>", "<|b|>", "<|z|>", "<|h|>"], special_tokens=True)
    user, assistant, asks, _ = (x.replace("#", "{{ c }}") for x in FRAMES[name])
    turn = f"{{% if m.role == 'user' %}}{user}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
    turn = "<|s|>{% for m in messages %}{% set c = m.content %}" + turn
    turn += f"{{% if add_generation_prompt %}}{asks}{{% endif %}}"
    tokenizer.chat_template = turn.replace("@", "{{ c | trim }}")
    return tokenizer


@pytest.mark.parametrize("name", FRAMES)
def test_the_template_says_where_an_answer_begins_and_how_it_ends(name):
    """As in TRL 1.16, but what follows the end of the turn, for which nobody waits, is left out."""
    trl, tokenizer = pytest.importorskip("trl.trainer.dpo_trainer"), framed(name)
    row = T.tokenize_pair(pair(TURNS, " 4 ", "5"), tokenizer, 200)
    asked = trl._tokenize(tokenizer, TURNS, add_generation_prompt=True)["input_ids"]
    answer = [{"role": "assistant", "content": " 4 "}]
    theirs, ours = trl._tokenize(tokenizer, TURNS + answer)["input_ids"], row["chosen_ids"]
    assert row["prompt_ids"] == theirs[: trl.common_prefix_length(asked, theirs)]
    assert ours == theirs[len(row["prompt_ids"]) :][: len(ours)]
    assert tokenizer.decode(ours) == FRAMES[name][3]


THOUGHT = "<think>\nAdd.\n</think>\n\n4"


@pytest.mark.parametrize("begin", [0, 8], ids=["opened", "unopened"])
@pytest.mark.parametrize("name", ["qwen 3", "r1"])
def test_a_thought_is_neither_left_out_nor_wrapped_in_another(name, begin):
    """Nor left unopened, as an answer is to a prompt that opens the block."""
    tokenizer = framed(name)
    tokenizer.chat_template = tokenizer.chat_template.replace("('<think>')[1]", "('<think>')[-1]")
    ids = T.encode_completion(THOUGHT[begin:], tokenizer, TURNS)
    assert tokenizer.decode(ids[:-1]) == THOUGHT


def test_a_system_turn_that_moves_once_answered_stays_in_the_prompt():
    """As in Mistral's: it is written into the user's turn where that is the last."""
    tokenizer, system = framed("mistral"), {"role": "system", "content": "Be brief."}
    now = "{% if loop.last %}{{ messages[0].content }} {% endif %}"
    skip = "{% for m in messages[1:] %}"
    template = tokenizer.chat_template.replace("{% for m in messages %}", skip)
    tokenizer.chat_template = template.replace("[INST] ", "[INST] " + now)
    row = T.tokenize_pair(pair([system, *TURNS], "4", "5"), tokenizer, 200)
    assert tokenizer.decode(row["prompt_ids"]).endswith("[INST] Be brief. 2+2?[/INST]")
    assert tokenizer.decode(row["chosen_ids"]) == " 4<|endoftext|>"


def test_the_day_in_a_template_is_always_the_same():
    tokenizer = framed("chatml")
    tokenizer.chat_template = "{{ strftime_now('%-d %B %Y') }}: " + BARE.chat_template
    assert T.prompt_text("?", tokenizer) == "01 January 2026: ?"


def test_roles_that_a_template_refuses_drop_the_row_with_its_words():
    tokenizer, system = framed("gemma"), [{"role": "system", "content": "Be brief."}, *TURNS]
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    kept, dropped = T.tokenize_all([pair(system), pair(TURNS)], tokenizer, 200)
    assert dropped == [(1, "the chat template refuses it: No system")] and kept[0]["row"] == 2
    with pytest.raises(T.UnusablePair, match="no plain form of a tool turn"):
        T.tokenize_pair(pair([{"role": "tool", "content": "42"}]), PLAIN, 64)


def test_special_tokens_inside_a_text_are_noted():
    rows = [pair(), pair(chosen="<|user|>"), pair("<|user|> and <|system|>")]
    with pytest.warns(UserWarning, match="the text of 2 rows are read .*<.user.> in row 2"):
        T.tokenize_all(rows, CHAT, 64)


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
