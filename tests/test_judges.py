"""Judges are asked blind and in both orders; an endpoint that misbehaves never stops a run without saying why."""

import http.server
import json
import socket
import threading

import pytest
import torch

from dpo_utils import judges
from dpo_utils.evaluate import bootstrap
from dpo_utils.judges import JudgeError, compare, http_judge, logprob_judge, reward_judge, win_rate
from dpo_utils.logps import plain_logps
from dpo_utils.tokens import encode_completion, encode_prompt


def longer(prompt, a, b):
    """A judge by length, indifferent to places."""
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def always(verdict):
    """A judge that does not read."""
    return lambda prompt, a, b: verdict


# --- both orders ------------------------------------------------------------------------------------------------------


def test_a_pair_is_put_to_the_judge_in_both_orders_and_nothing_else_is_told():
    asked = []

    def judge(*question):
        asked.append(question)
        return longer(*question)

    rows = compare(judge, ["q1", "q2"], ["long answer", "x"], ["short", "longer"])
    assert asked == [("q1", "long answer", "short"), ("q1", "short", "long answer"), ("q2", "x", "longer"), ("q2", "longer", "x")]
    assert rows == [
        {"prompt": "q1", "score": 1.0, "agreed": True, "length": 6},
        {"prompt": "q2", "score": 0.0, "agreed": True, "length": -5},
    ]


@pytest.mark.parametrize(
    ("verdicts", "score", "agreed"),
    [
        (("A", "B"), 1.0, True),
        (("B", "A"), 0.0, True),
        (("tie", "tie"), 0.5, True),
        (("A", "A"), 0.5, False),
        (("B", "B"), 0.5, False),
        (("A", "tie"), 0.5, False),
        (("tie", "A"), 0.5, False),
    ],
)
def test_disagreement_between_the_orders_is_a_tie(verdicts, score, agreed):
    said = iter(verdicts)
    (row,) = compare(lambda *_: next(said), ["q"], ["one"], ["two"])
    assert (row["score"], row["agreed"]) == (score, agreed)


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_taste_for_a_place_cancels_out(letter):
    result = win_rate(compare(always(letter), ["q"] * 9, [f"long {i}" for i in range(9)], ["b"] * 9))
    assert result["all"] == (0.5, 0.5, 0.5) and result["agreed"] == (0.0, 0.0, 0.0)


def test_equal_answers_are_a_tie_and_not_asked():
    def judge(*_):
        raise AssertionError("asked about equal answers")

    assert compare(judge, ["q"], ["same"], ["same"]) == [{"prompt": "q", "score": 0.5, "agreed": True, "length": 0}]


@pytest.mark.parametrize("verdict", ["C", "a", "", None])
def test_a_verdict_that_is_none_raises_and_names_the_prompt(verdict):
    with pytest.raises(JudgeError, match="'why is the sky blue'.*A, B, tie"):
        compare(always(verdict), ["why is the sky blue"], ["one"], ["two"])


def test_lists_of_unequal_length_are_refused():
    with pytest.raises(ValueError):
        compare(longer, ["q", "r"], ["one"], ["two"])


def test_win_rate_in_all_and_by_length_with_intervals():
    lengths, scores = [-30, -20, -2, 0, 3, 21, 40], [1, 0.5, 1, 0, 0, 0, 0.5]  # median 20: within 2 is about as long
    rows = [{"length": n, "score": s, "agreed": s != 0.5} for n, s in zip(lengths, scores, strict=True)]
    result = win_rate(rows)
    assert result == {
        "all": bootstrap(scores),
        "shorter": bootstrap([1, 0.5]),
        "about as long": bootstrap([1, 0]),
        "longer": bootstrap([0, 0, 0.5]),
        "agreed": bootstrap([1, 0, 1, 1, 1, 1, 0]),
    }
    assert result["all"][0] == pytest.approx(3 / 7) and result["all"][1] < 3 / 7 < result["all"][2]


def test_an_empty_bucket_is_left_out_and_no_rows_raise():
    assert set(win_rate([{"length": 3, "score": 1, "agreed": True}])) == {"all", "longer", "agreed"}
    with pytest.raises(ValueError, match="nothing was judged"):
        win_rate([])


def test_the_reward_judge_takes_the_higher_reward():
    judge = reward_judge(lambda prompt, answer: float(answer == prompt))
    assert [judge("x", "x", "y"), judge("x", "y", "x"), judge("x", "y", "z"), judge("x", "x", "x")] == ["A", "B", "tie", "tie"]


# --- a local model ----------------------------------------------------------------------------------------------------


def letter_gap(model, tokenizer, prompt, a, b):
    """log p(A) - log p(B), by the definition."""
    question = encode_prompt(judges.ASK.format(prompt=prompt, a=a, b=b, tie=""), tokenizer)
    letters = [[encode_completion(letter, tokenizer)[0]] for letter in "AB"]
    with torch.no_grad():
        one, two = plain_logps(model, [(question, letters)], tokenizer.pad_token_id).tolist()
    return one - two


def test_the_local_judge_names_the_more_probable_letter(tiny):
    from dpo_utils.models import load_policy

    model, tokenizer = load_policy(tiny)
    question = ("What is the capital of Malta?", "By the atlas, it is Valletta.", "As they all say, it is Sliema.")
    gap = letter_gap(model, tokenizer, *question)
    verdict = "A" if gap > 0 else "B"
    assert abs(gap) > 0.01
    assert [logprob_judge(model, tokenizer)(*question) for _ in range(2)] == [verdict, verdict]
    assert logprob_judge(model, tokenizer, tie=abs(gap) + 1e-3)(*question) == "tie"
    assert logprob_judge(model, tokenizer, tie=abs(gap) - 1e-3)(*question) == verdict

    head, ids = model.get_output_embeddings(), [encode_completion(letter, tokenizer)[0] for letter in "AB"]
    with torch.no_grad():  # the letters change places in the head
        for tensor in (head.weight, head.bias):
            tensor[ids] = tensor[ids[::-1]]
    assert letter_gap(model, tokenizer, *question) == pytest.approx(-gap, abs=1e-4)
    assert logprob_judge(model, tokenizer)(*question) == {"A": "B", "B": "A"}[verdict]


# --- an endpoint ------------------------------------------------------------------------------------------------------

KEY = "sk-very-secret"


def says(content, **more):
    """A reply of the usual form."""
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content, **more}}]})


@pytest.fixture
def server(monkeypatch):
    """A stub on this machine: `replies` are (status, body[, headers]), the last again and again; `seen` what was asked."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "*")
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stub.seen.append((self.path, dict(self.headers), body))
            reply = stub.replies.pop(0) if len(stub.replies) > 1 else stub.replies[0]
            if reply == "silence":
                over.wait(10)
                return
            if reply == "noise":
                self.wfile.write(b"not http at all\r\n\r\n")
                return
            status, text, *headers = reply
            self.send_response(status)
            for name, value in dict(*headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_):
            pass

    stub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.replies, stub.seen, stub.url = [says("A")], [], f"http://127.0.0.1:{stub.server_port}/v1"
    threading.Thread(target=stub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield stub
    over.set()
    stub.shutdown()
    stub.server_close()


def ask(server, **options):
    """One question to the stub, without pauses."""
    return http_judge(server.url, "some-model", **{"pause": 0, "timeout": 5, **options})("the prompt", "the first", "the second")


def test_the_endpoint_gets_model_question_and_key(server):
    server.url += "/"
    assert ask(server) == "A"
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}" and headers["Content-Type"] == "application/json"
    (message,) = body["messages"]
    assert body["model"] == "some-model" and body["temperature"] == 0 and message["role"] == "user"
    assert "the prompt" in message["content"] and "A: the first" in message["content"] and "B: the second" in message["content"]
    assert KEY not in json.dumps(body)


def test_the_key_comes_from_the_variable_named_and_none_is_sent_without(server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "other\n")
    ask(server, key_variable="MY_KEY")
    ask(server, key_variable="NOT_SET")
    assert [headers.get("Authorization") for _, headers, _ in server.seen] == ["Bearer other", None]


@pytest.mark.parametrize(
    ("content", "verdict"),
    [
        ("A", "A"), ("B.", "B"), ("**B**", "B"), ("Answer A", "A"), ("(B)", "B"), ("B, because it is true", "B"),
        ("tie", "tie"), ("A or B", "tie"), ("neither", "tie"), ("Better", "tie"), ("", "tie"),
    ],
)  # fmt: skip
def test_the_letter_is_read_from_the_reply(server, content, verdict):
    server.replies = [says(content)]
    assert ask(server) == verdict


def test_a_refusal_is_a_tie_and_not_asked_again(server):
    server.replies = [says(None, refusal="I cannot compare these.")]
    assert ask(server) == "tie" and len(server.seen) == 1


def test_compare_with_an_endpoint_asks_in_both_orders(server):
    judge = http_judge(server.url, "m", pause=0)
    assert compare(judge, ["q"], ["one"], ["two"])[0]["agreed"] is False
    first, second = (body["messages"][0]["content"] for *_, body in server.seen)
    assert "A: one" in first and "A: two" in second


UNUSABLE = [
    "{not json", "[]", "{}", '{"choices": []}', '{"choices": null}', '{"choices": [{}]}',
    '{"choices": [{"message": null}]}', '{"choices": [{"message": {"content": [{"text": "A"}]}}]}',
]  # fmt: skip


@pytest.mark.parametrize("trouble", ["silence", "noise", (429, ""), (500, "oops"), (503, ""), *((200, text) for text in UNUSABLE)])
def test_trouble_is_tried_again_and_then_forgotten(server, trouble):
    server.replies = [trouble, trouble, says("B")]
    assert ask(server, timeout=0.15 if trouble == "silence" else 5) == "B"
    assert len(server.seen) == 3


@pytest.mark.parametrize("trouble", ["silence", (429, ""), (500, ""), (200, "{not json")])
@pytest.mark.parametrize("retries", [0, 2])
def test_trouble_that_stays_ends_after_the_retries_and_says_so(server, trouble, retries):
    server.replies = [trouble]
    with pytest.raises(JudgeError, match=f"127.0.0.1.* nothing usable in {retries + 1} tries") as caught:
        ask(server, retries=retries, timeout=0.15 if trouble == "silence" else 5)
    assert len(server.seen) == retries + 1
    assert KEY not in str(caught.value)
    what = "timed out" if trouble == "silence" else "JSONDecodeError" if trouble[0] == 200 else f"status {trouble[0]}"
    assert what in str(caught.value)


def test_the_pause_doubles(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(judges.time, "sleep", pauses.append)
    server.replies = [(500, "")]
    with pytest.raises(JudgeError):
        ask(server, retries=3, pause=0.5)
    assert pauses == [0.5, 1.0, 2.0]


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_no_is_not_asked_again_and_the_message_names_the_variable_not_the_key(server, status):
    server.replies = [(status, f"wrong key {KEY}")]
    with pytest.raises(JudgeError, match=f"status {status}.*OPENAI_API_KEY") as caught:
        ask(server)
    assert len(server.seen) == 1 and KEY not in str(caught.value)


def test_the_key_does_not_follow_a_redirect(server):
    server.replies = [(302, "", {"Location": f"{server.url}/elsewhere"}), says("A")]
    with pytest.raises(JudgeError, match="status 302"):
        ask(server)
    assert len(server.seen) == 1


@pytest.mark.parametrize("bad", [f"{KEY}\n{KEY}", f"{KEY}…"])
def test_a_key_that_cannot_be_sent_is_not_quoted(server, monkeypatch, bad):
    monkeypatch.setenv("OPENAI_API_KEY", bad)
    with pytest.raises(JudgeError, match="OPENAI_API_KEY") as caught:
        ask(server)
    assert "secret" not in str(caught.value) and server.seen == []


def test_a_server_that_is_down_is_tried_and_reported(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(JudgeError, match="in 2 tries.*is it running") as caught:
        http_judge(url, "m", retries=1, pause=0)("q", "a", "b")
    assert KEY not in str(caught.value)
