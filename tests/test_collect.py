"""A person's choices: blind, saved at once, never asked twice, and read back as preferences."""

import json
import os
import signal

import pytest
from small_runs import child, ended

from dpo_utils import collect, judges
from dpo_utils.collect import BlindChoice
from dpo_utils.data import load_preferences

N = 12
PROMPTS = [f"question {i}" for i in range(N)]
FIRST = [f"the first answer, number {i}" for i in range(N)]
SECOND = [f"the second, {i}" for i in range(N)]


def start(path, seed=0):
    """A session over all pairs."""
    return BlindChoice(PROMPTS, FIRST, SECOND, path / "mine.jsonl", seed)


def lines(path):
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prefer(session, answers):
    """Choose the answer of the shown pair that is in `answers`; a tie if none is."""
    _, a, b = session.question
    session.choose("A" if a in answers else "B" if b in answers else "tie")


# --- blind ------------------------------------------------------------------------------------------------------------


def order_shown(path, seed):
    """Whether the first answers stood first, in a session that chooses A throughout."""
    session, order = start(path, seed), []
    while session.question:
        order.append(session.question[1] in FIRST)
        session.choose("A")
    return order


def test_the_order_is_seeded_and_both_orders_occur(tmp_path):
    one = order_shown(tmp_path / "a", seed=1)
    assert len(one) == N and 2 <= sum(one) <= N - 2
    assert order_shown(tmp_path / "b", seed=1) == one
    assert order_shown(tmp_path / "c", seed=2) != one
    assert {start(tmp_path, seed).question[1] in FIRST for seed in range(8)} == {True, False}


def test_a_question_holds_the_prompt_and_its_two_answers_and_stays_until_chosen(tmp_path):
    session = start(tmp_path)
    for i in range(N):
        assert session.question == session.question
        prompt, *answers = session.question
        assert prompt == PROMPTS[i] and set(answers) == {FIRST[i], SECOND[i]}
        session.choose("B")
    assert session.question is None


# --- what is saved ----------------------------------------------------------------------------------------------------


def test_choices_become_rows_that_load_preferences_reads(tmp_path):
    session = start(tmp_path)
    wanted = [f if i % 3 else s for i, (f, s) in enumerate(zip(FIRST, SECOND, strict=True))]
    for i in range(N):
        prefer(session, wanted)
        assert len(lines(session.path)) == i + 1  # saved before the next question
    pairs = load_preferences(session.path)
    assert (pairs["prompt"][:], pairs["chosen"][:]) == (PROMPTS, wanted)
    assert all({row["chosen"], row["rejected"]} == {FIRST[i], SECOND[i]} for i, row in enumerate(pairs))
    assert [row["score"] for row in session.rows] == [float(i % 3 != 0) for i in range(N)]
    assert not session.ties.exists()


def test_ties_are_kept_apart_and_count_a_half(tmp_path):
    session = start(tmp_path)
    for verdict in ("tie", "A", "tie"):
        session.choose(verdict)
    assert [row["prompt"] for row in lines(tmp_path / "mine.jsonl")] == [PROMPTS[1]]
    assert [row["prompt"] for row in lines(tmp_path / "mine_ties.jsonl")] == [PROMPTS[0], PROMPTS[2]]
    assert [row["score"] for row in session.rows][::2] == [0.5, 0.5]


def test_the_scores_go_into_win_rate(tmp_path):
    session = start(tmp_path)
    for i in range(N):
        prefer(session, FIRST if i < 9 else SECOND)
    result = judges.win_rate(session.rows)
    assert result["all"][0] == 0.75 and result["agreed"][0] == 1.0
    assert [row["length"] for row in session.rows] == [len(f) - len(s) for f, s in zip(FIRST, SECOND, strict=True)]


def test_what_needs_no_eyes_is_counted_and_neither_asked_nor_saved(tmp_path):
    answers = ["one", "same", "Same", "one", " ", "long"], ["two", "same", " same", "two", "x", "\n"]
    prompts = ["p", "q", "r", "p", "s", "t"]
    session = BlindChoice(prompts, *answers, tmp_path / "mine.jsonl")
    assert [len(session.open), scores(session)] == [1, {"q": 0.5, "r": 0.5, "s": 0.0, "t": 1.0}]
    session.choose("A")
    assert session.question is None and len(session.rows) == 5
    assert len(load_preferences(session.path)) == 1
    same = judges.compare(lambda *_: "A", ["q"], ["same"], ["same"])
    assert [row for row in session.rows if row["prompt"] == "q"] == same


def test_lists_of_unequal_length_are_refused(tmp_path):
    with pytest.raises(ValueError):
        BlindChoice(PROMPTS, FIRST, SECOND[:-1], tmp_path / "mine.jsonl")


@pytest.mark.parametrize("verdict", ["C", "a", "", None])
def test_a_wrong_verdict_raises_and_saves_nothing(tmp_path, verdict):
    session = start(tmp_path)
    with pytest.raises(ValueError, match="A, B or tie"):
        session.choose(verdict)
    assert list(tmp_path.iterdir()) == [] and session.rows == [] and session.question[0] == PROMPTS[0]


def test_choosing_with_none_left_raises(tmp_path):
    session = BlindChoice(["p"], ["one"], ["two"], tmp_path / "mine.jsonl")
    session.choose("tie")
    with pytest.raises(ValueError, match="judged already"):
        session.choose("A")


# --- resumed ----------------------------------------------------------------------------------------------------------


def scores(session):
    """{prompt: score}."""
    return {row["prompt"]: row["score"] for row in session.rows}


def test_resumed_with_the_same_path_only_what_is_open_is_asked(tmp_path):
    session = start(tmp_path)
    for verdict in ("A", "tie", "B", "A", "B"):
        session.choose(verdict)
    again = start(tmp_path, seed=5)
    assert again.question[0] == PROMPTS[5] and len(again.open) == N - 5
    assert again.rows == session.rows
    for _ in again.open[:]:
        again.choose("A")
    assert start(tmp_path).question is None and scores(start(tmp_path)) == scores(again)
    assert len(lines(again.path)) == N - 1 and len(load_preferences(again.path)) == N - 1


def test_a_killed_session_loses_nothing(tmp_path):
    def work():
        session = start(tmp_path)
        for answers in (FIRST, SECOND, [], FIRST):
            prefer(session, answers)
        os.kill(os.getpid(), signal.SIGKILL)

    with child(work) as pid:
        assert ended(pid) == -signal.SIGKILL
    session = start(tmp_path)
    assert scores(session) == {PROMPTS[0]: 1.0, PROMPTS[1]: 0.0, PROMPTS[2]: 0.5, PROMPTS[3]: 1.0}
    assert session.question[0] == PROMPTS[4]


def test_a_line_cut_short_is_dropped_and_said_and_its_pair_asked_again(tmp_path, capsys):
    session = start(tmp_path)
    for answers in (FIRST, SECOND):
        prefer(session, answers)
    whole = session.path.read_bytes()
    for cut in range(1, len(whole.splitlines()[1])):
        session.path.write_bytes(whole[: -1 - cut])
        again = start(tmp_path)
        assert "cut short" in capsys.readouterr().out and again.question[0] == PROMPTS[1]
        assert session.path.read_bytes() == whole.splitlines(keepends=True)[0]
    session.path.write_bytes(whole[:-1])  # an editor's file: nothing is missing but the end of the line
    again = start(tmp_path)
    assert capsys.readouterr().out == "" and session.path.read_bytes() == whole and again.question[0] == PROMPTS[2]


def test_a_broken_line_inside_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"mine.jsonl, line 2: not JSON.*mend or delete"):
        start(tmp_path)


def test_scores_turn_around_when_first_and_second_change_places(tmp_path):
    session = start(tmp_path)
    for answers in (FIRST, SECOND, []):
        prefer(session, answers)
    turned = BlindChoice(PROMPTS, SECOND, FIRST, tmp_path / "mine.jsonl")
    assert [row["score"] for row in turned.rows] == [0.0, 1.0, 0.5]


def test_new_answers_to_a_judged_prompt_are_asked(tmp_path):
    start(tmp_path).choose("A")
    session = BlindChoice(PROMPTS[:1], ["another"], SECOND[:1], tmp_path / "mine.jsonl")
    assert session.question[0] == PROMPTS[0] and session.rows == []


@pytest.mark.parametrize("text", ["two\nlines", "a\u2028separator\u0085and another", '“quotes” \\ " ü 漢'])
def test_any_text_comes_back_as_it_was(tmp_path, text):
    BlindChoice([text], [text], ["plain"], tmp_path / "mine.jsonl").choose("A")
    assert json.dumps(text, ensure_ascii=False) in (tmp_path / "mine.jsonl").read_text(encoding="utf-8")
    again = BlindChoice([text], [text], ["plain"], tmp_path / "mine.jsonl")
    assert again.question is None and len(again.rows) == 1
    (row,) = load_preferences(tmp_path / "mine.jsonl")
    assert row["prompt"] == text and {row["chosen"], row["rejected"]} == {text, "plain"}


# --- buttons ----------------------------------------------------------------------------------------------------------


def test_show_outside_a_front_end_says_so(tmp_path, capsys):
    assert start(tmp_path).show() is None
    assert f"{N} pairs to judge" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_buttons_save_and_go_on_to_the_next(tmp_path, monkeypatch):
    monkeypatch.delenv("DPO_STATIC")
    monkeypatch.setattr(collect, "live", lambda: True)
    session = BlindChoice(PROMPTS[:3], FIRST[:3], SECOND[:3], tmp_path / "mine.jsonl")
    text, row = session.show().children
    a, b, tie = row.children
    assert [button.description for button in (a, b, tie)] == ["A", "B", "tie"]
    for i, button in enumerate((a, b, tie)):
        assert not button.disabled
        prompt, one, two = session.question
        assert text.value.index(prompt) < text.value.index(one) < text.value.index(two) and f"{i} judged" in text.value
        shown = {"A": one, "B": two}.get(button.description)
        button.click()
        assert shown is None or lines(session.path)[-1]["chosen"] == shown
    assert len(lines(session.ties)) == 1 and len(session.rows) == 3
    assert "All judged: 3" in text.value and all(button.disabled for button in (a, b, tie))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_html_in_texts_is_shown_not_obeyed(tmp_path, monkeypatch):
    monkeypatch.setattr(collect, "live", lambda: True)
    evil = "<script>alert('&')</script>"
    text, _ = BlindChoice([evil], [evil + "1"], [evil + "2"], tmp_path / "mine.jsonl").show().children
    assert "<script" not in text.value and text.value.count("&lt;script&gt;") == 3
