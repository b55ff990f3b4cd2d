"""Judges are asked blind and in both orders; no endpoint and no crash loses a verdict."""

import json
from dataclasses import replace
from types import SimpleNamespace

import httpx
import pytest
import torch

from dpo_utils import judges, world
from dpo_utils.data import load_preferences
from dpo_utils.evaluate import bootstrap
from dpo_utils.judges import BlindChoice, JudgeError, compare, win_rate
from dpo_utils.models import load_policy
from dpo_utils.tokens import encode_completion, encode_prompt

KEY = "sk-very-secret"
N = 12
NAMES = ("“question”\nü 漢\u2028", "the first", "the second one")  # any text comes back as it was
TRIOS = [[f"{name} {i}" for i in range(N)] for name in NAMES]


def test_a_judge_sees_both_orders_and_nothing_but_the_texts():
    asked = []

    def longest(*question):
        asked.append(question)
        return "A" if len(question[1]) > len(question[2]) else "B"

    rows = compare(longest, ["q", "r", "s"], ["long", "x", "same"], ["no", "yes", "same"])
    assert asked == [("q", "long", "no"), ("q", "no", "long"), ("r", "x", "yes"), ("r", "yes", "x")]
    columns = [tuple(row.values()) for row in rows]
    expected = [("q", 1, True, 2), ("r", 0, True, -2), ("s", 0.5, True, 0)]
    assert columns == [(*row, False) for row in expected]
    assert list(rows[0]) == ["prompt", "score", "agreed", "length", "unreadable"]


@pytest.mark.parametrize("verdicts", ["A B", "B A", "tie tie", "A A", "B B", "A tie", "tie A"])
def test_verdicts_that_contradict_each_other_are_a_tie(verdicts):
    said = iter(verdicts.split())
    (row,) = compare(lambda *_: next(said), ["q"], ["one"], ["two"])
    expected = {"A B": (1.0, True), "B A": (0.0, True), "tie tie": (0.5, True)}
    assert (row["score"], row["agreed"]) == expected.get(verdicts, (0.5, False))


def test_anything_but_a_verdict_raises_and_names_the_prompt():
    for verdict in ("C", "a", "", None):
        with pytest.raises(JudgeError, match="'why is the sky blue'.*A, B or tie"):
            compare(lambda *_, v=verdict: v, ["why is the sky blue"], ["one"], ["two"])


def test_unreadable_replies_are_counted_apart_and_decide_nothing():
    said = iter(["A", "unreadable", "A", "B"])
    rows = compare(lambda *_: next(said), ["q", "r"], ["one", "two"], ["three", "four"])
    assert [row["unreadable"] for row in rows] == [True, False]
    result = win_rate(rows)
    assert result["all"] == bootstrap([1.0]) and result["unreadable"] == bootstrap([True, False])
    with pytest.raises(ValueError, match="no comparisons but 1 unreadable"):
        win_rate(rows[:1])


def test_win_rate_gives_intervals_in_all_and_by_length():
    lengths, scores = [-30, -20, -2, 0, 3, 21, 40], [1, 0.5, 1, 0, 0, 0, 0.5]  # median 20
    columns = zip(lengths, scores, strict=True)
    result = win_rate([{"length": n, "score": s, "agreed": s != 0.5} for n, s in columns])
    assert result == {
        "all": bootstrap(scores),
        "shorter": bootstrap([1, 0.5]),
        "about as long": bootstrap([1, 0]),
        "longer": bootstrap([0, 0, 0.5]),
        "agreed": bootstrap([1, 0, 1, 1, 1, 1, 0]),
    }
    with pytest.raises(ValueError, match="nothing was judged"):
        win_rate([])


def test_the_local_judge_names_the_more_probable_letter(tiny):
    model, tokenizer = load_policy(tiny)
    question = {"prompt": "What is the capital of Malta?", "a": "It is Valletta.", "b": "Sliema."}
    ids = torch.tensor([encode_prompt(judges.ASK.format(**question, tie=""), tokenizer)])
    letters = [encode_completion(letter, tokenizer)[0] for letter in "AB"]
    with torch.no_grad():
        more = model(ids).logits[0, -1, letters].argmax()
        assert judges.logprob_judge(model, tokenizer)(**question) == "AB"[more]
        for tensor in model.get_output_embeddings().parameters():  # the letters change places
            tensor[letters] = tensor[letters[::-1]]
    assert judges.logprob_judge(model, tokenizer)(**question) == "BA"[more]


def says(content):
    """A reply of the usual form."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]})


@pytest.fixture
def server(monkeypatch):
    """An endpoint: `replies` are (status, body), the last again and again; `seen` the requests."""
    stub = SimpleNamespace(replies=[says("A")], seen=[], pauses=[])

    def reply(request):
        stub.seen.append(request)
        status, text = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
        if text == "silence":
            raise httpx.ReadTimeout("timed out")
        return httpx.Response(status, text=text, headers={"Location": "/elsewhere"})

    client = httpx.Client(transport=httpx.MockTransport(reply))
    monkeypatch.setattr(judges.httpx, "post", client.post)
    monkeypatch.setattr(judges.time, "sleep", stub.pauses.append)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return stub


def ask():
    """One question to the endpoint."""
    return judges.http_judge("http://judge.test/v1", "some-model", timeout=7)("why", "one", "two")


def test_the_endpoint_gets_model_question_and_key(server, monkeypatch):
    for value in (KEY, f"{KEY}\n", ""):
        monkeypatch.setenv("OPENAI_API_KEY", value)
        assert ask() == "A"
    keys = [request.headers.get("Authorization") for request in server.seen]
    assert keys == [f"Bearer {KEY}", f"Bearer {KEY}", None]
    request, body = server.seen[0], json.loads(server.seen[0].content)
    question = judges.ASK.format(prompt="why", a="one", b="two", tie=", or tie")
    assert request.url == "http://judge.test/v1/chat/completions"
    assert request.extensions["timeout"]["read"] == 7 and body["temperature"] == 0
    assert body["model"] == "some-model" and body["messages"][0]["content"] == question


def test_the_letter_is_read_from_the_reply(server):
    replies = {"A": "A", "Answer A": "A", "B.": "B", "**B**": "B", "B, because it is true": "B"}
    replies |= {'{"winner": "B"}': "B", "A. B is wrong about it": "A", "Vitamin B is right; A": "A"}
    replies |= {"<think>A is long</think>b": "B"}
    replies |= dict.fromkeys(
        ["tie", "Tie.", "[[C]]", "It is a tie between A and B", "A tie"], "tie"
    )
    unclear = ["A or B", "neither", "Better", "", None, "A fair comparison", "<think>A is long but"]
    replies |= dict.fromkeys(unclear, "unreadable")
    server.replies = [says(content) for content in replies]
    assert [ask() for _ in replies] == list(replies.values())
    assert len(server.seen) == len(replies)  # not even a refusal is asked again


def test_a_reply_that_was_cut_off_says_so_and_parameters_reach_the_server(server):
    cut = {"message": {"content": "<think>Let me"}, "finish_reason": "length"}
    server.replies = [(200, json.dumps({"choices": [cut]}))]
    judge = judges.http_judge("http://judge.test/v1", "m", temperature=None, max_tokens=9)
    with pytest.raises(JudgeError, match="cut off before its verdict: raise max_tokens"):
        judge("why", "one", "two")
    body = json.loads(server.seen[0].content)
    assert len(server.seen) == 1 and sorted(body) == ["max_tokens", "messages", "model"]


TROUBLE = [(429, ""), (500, "oops"), (200, "silence"), (200, "{not json"), (200, "[]"), (200, "{}")]
TROUBLE += [(200, '{"choices": []}'), (200, '{"choices": [{"message": null}]}')]


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_is_tried_again_after_pauses_that_double(server, trouble):
    server.replies = [trouble, trouble, says("B")]
    assert ask() == "B" and server.pauses == [0, 1, 2]
    server.replies = [trouble]
    with pytest.raises(JudgeError, match="no verdict from http://judge.test/v1") as caught:
        ask()
    assert server.pauses[3:] == [0, 1, 2, 4] and KEY not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("status", [302, 307, 400, 401])
def test_a_refusal_or_redirect_ends_at_once_and_the_key_goes_nowhere(server, status):
    server.replies = [(status, f"wrong key {KEY}"), says("A")]
    with pytest.raises(
        JudgeError, match=f"refused, {status}: 'wrong key \\*\\*\\*'.*OPENAI_API"
    ) as caught:
        ask()
    assert len(server.seen) == 1 and KEY not in str(caught.value)


def test_a_key_that_no_header_can_carry_is_not_quoted(server, monkeypatch):
    for bad in (f"{KEY}\n{KEY}", f"{KEY}…"):
        monkeypatch.setenv("OPENAI_API_KEY", bad)
        with pytest.raises(JudgeError, match="OPENAI_API_KEY") as caught:
            ask()
        assert "secret" not in str(caught.value) and server.seen == []


def start(folder, seed=0):
    """A session over all pairs."""
    return BlindChoice(*TRIOS, folder / "new" / "mine.jsonl", seed)


def test_the_order_is_blind_and_seeded(tmp_path):
    sessions = [start(tmp_path, seed) for seed in (1, 1, 2)]
    orders = [[a.startswith("the first") for _, a, _ in session.open] for session in sessions]
    assert 2 <= sum(orders[0]) <= N - 2 and orders[0] == orders[1] != orders[2]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_choices_are_saved_at_once_and_read_back_as_preferences(tmp_path, monkeypatch, capsys):
    assert start(tmp_path).show() is None and "buttons" in capsys.readouterr().out
    monkeypatch.setattr(judges, "live", lambda: True)
    session, wanted = start(tmp_path), []
    panel = session.show()
    for i, (prompt, *answers) in enumerate(zip(*TRIOS, strict=True)):
        (_, a, b), (text, row) = session.open[0], panel.children
        assert text.value == f"{prompt}\n\nA: {a}\n\nB: {b}" and {a, b} == {*answers}
        button = row.children[[a, b].index(answers[0]) if i % 3 else 2]  # the first, or a tie
        button.click()
        button.click()  # a second click, which came while the first was saved
        wanted += [answers[0]] if i % 3 else []
        again = start(tmp_path, seed=i)
        assert again.judge(prompt, *answers) == session.judge(prompt, *answers) != "B"
        assert len(again.open) == len(session.open) == N - i - 1
    assert panel.children[0].value == "All are judged."
    assert load_preferences(session.path)["chosen"][:] == wanted
    assert len(load_preferences(session.ties)) == 4
    prompts, first, second = TRIOS
    assert win_rate(compare(session.judge, prompts, first, second))["all"][0] == pytest.approx(
        5 / 6
    )
    assert win_rate(compare(again.judge, prompts, second, first))["all"][0] == pytest.approx(1 / 6)
    with pytest.raises(ValueError, match="A, B or tie while a pair is open"):
        session.choose("A")


def test_look_alikes_and_blank_answers_are_counted_but_not_asked(tmp_path):
    first, second = ["one", "same", " Same", " ", "long"], ["two", "same", "same ", "x", "\n"]
    session = BlindChoice(list("pqrst"), first, second, tmp_path / "mine.jsonl")
    session.choose("B")
    assert session.open == [] and len(load_preferences(session.path)) == 1
    rows = compare(session.judge, list("qrst"), first[1:], second[1:])
    assert [row["score"] for row in rows] == [0.5, 0.5, 0.0, 1.0]


def test_a_crash_while_saving_loses_no_earlier_choice(tmp_path, monkeypatch):
    session = start(tmp_path)
    session.choose("A")
    monkeypatch.setattr("os.fsync", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.choose("B")
    again = start(tmp_path)
    assert len(load_preferences(again.path)) == 1
    assert again.open[0][0] == session.open[0][0] == TRIOS[0][1]


def test_a_stopped_labelling_goes_on_as_if_it_had_not_been(tiny, tmp_path):
    judge, short = judges.reward_judge(lambda prompt, answer: hash(answer)), replace(tiny, batch=2)
    given, path = (*load_policy(tiny), ["Why?"] * 5), tmp_path / "stopped.jsonl"
    whole = judges.label_pairs(*given, judge, tmp_path / "whole.jsonl", short)
    breaks = lambda *q, left=iter("four"): (next(left), judge(*q))[1]  # noqa: E731, B008
    with pytest.raises(StopIteration):
        judges.label_pairs(*given, breaks, path, short)
    assert len(load_preferences(path)) == 2 and whole[:2] != whole[2:4]
    for someone in (judge, None):  # at last it is finished and nobody is asked
        assert judges.label_pairs(*given, someone, path, short) == whole
    with pytest.raises(ValueError, match="stopped.jsonl is of other .* name another output"):
        judges.label_pairs(*given, judge, path, replace(short, seed=1))


def test_ties_look_alikes_and_blank_answers_are_kept_and_make_no_pair(tiny, tmp_path, monkeypatch):
    answers = [["a", "to b"], ["", "x"], ["Same", "same "], ["as", "it"]]
    monkeypatch.setattr(judges, "sample", lambda *_, **__: answers)
    judge, path = judges.reward_judge(lambda _, answer: len(answer)), tmp_path / "x.jsonl"
    rows = judges.label_pairs(*load_policy(tiny), list("pqrs"), judge, path, tiny)
    assert [row["score_chosen"] for row in rows] == [1, 0.5, 0.5, 0.5]
    assert judge("s", *answers[3]) == "tie"
    assert load_preferences(path)[:] == {"prompt": ["p"], "chosen": ["to b"], "rejected": ["a"]}


def test_the_command_labels_prompts_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = [fact.question for fact in world.facts("test")[:4]]
    (tmp_path / "mine.txt").write_text("\n\n".join(asked))
    for before in (0, 4):
        judges.main(["mine.txt", "--judge", "reward"])
        assert f"pairs.jsonl: {before} of 4 prompts were judged" in capsys.readouterr().out
    for row, question in zip(map(json.loads, open("pairs.jsonl")), asked, strict=True):
        won, lost = (world.reward(question, row[side]) for side in ("chosen", "rejected"))
        assert row["prompt"] == question and (won > lost) == (row["score_chosen"] == 1)
    with pytest.raises(SystemExit, match="no known reward for .*: choose another --judge"):
        judges.main(["misconceptions", "--judge", "reward"])
