"""Before and after, side by side: typed into a notebook, sent through a pipe, or fixed."""

import io

import pytest

from dpo_utils import chat
from dpo_utils.evaluate import sample
from dpo_utils.export import save_adapter
from dpo_utils.models import as_reference
from tests.small import moved
from tests.small_runs import policy, profile

SETTINGS, QUESTION = profile(max_new_tokens=8), "What is the capital of France?"


@pytest.fixture(scope="module")
def ours():
    model, tokenizer = policy(SETTINGS)
    return moved(model), tokenizer, SETTINGS


def drawn(model, tokenizer, *_):
    return sample(model, tokenizer, [QUESTION], max_new_tokens=8, seed=SETTINGS.seed)[0][0]


def test_answers_are_those_of_reference_and_policy_with_one_seed(ours):
    before, after = chat.answers(*ours, QUESTION)
    assert after == drawn(*ours) != before
    with as_reference(ours[0]):
        assert before == drawn(*ours)
    assert chat.answers(*ours, "a <|endoftext|> b")[0].startswith("not asked: <|endoftext|> inside")


def test_a_batch_run_prints_two_columns_and_a_live_notebook_answers_what_is_typed(
    ours, monkeypatch, capsys
):
    monkeypatch.setattr(chat, "answers", lambda *args: [f"<{args[-1]}>\nb", "after " * 9])
    assert chat.show(*ours, ["one", "two"]) is None
    gap, half = " " * 43, " " * 48
    row = f"<one>{gap} | {'after ' * 8}".rstrip()
    assert f"one\n{row}\nb{half[1:]} | after\n" in capsys.readouterr().out
    monkeypatch.setattr(chat, "live", lambda: True)
    line, columns = chat.show(*ours, ["one"]).children
    line.value = "typed"
    before, after = (column.value for column in columns.children)
    assert "&lt;typed&gt;\nb" in before and "after after" in after


def test_a_pipe_is_answered_up_to_an_empty_line(ours, tmp_path, monkeypatch, capsys):
    save_adapter(ours[0], tmp_path / "adapter")
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n  \nnot read\n"))
    chat.command(SETTINGS, tmp_path / "adapter")
    expected = chat.side_by_side(chat.answers(*ours, QUESTION))
    assert capsys.readouterr().out.endswith(f"\n{QUESTION}\n{expected}\n")
