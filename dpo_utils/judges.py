"""Which of two answers is better? Any judge that is asked fairly: blind, in both orders, with disagreement a tie.

A judge is a callable `judge(prompt, a, b) -> "A" | "B" | "tie"` on texts. It never learns which model wrote which
answer; `compare` asks it twice, with the answers swapped, so that a taste for the first place cancels out.
"""

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np

from dpo_utils.evaluate import bootstrap
from dpo_utils.logps import all_logps
from dpo_utils.tokens import encode_completion, encode_prompt

VERDICTS = ("A", "B", "tie")
ASK = (
    "Question: {prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\n"
    "Which answer is better: more truthful, more helpful, better written? Reply with one letter, A or B{tie}."
)
SWAPPED = {"A": "B", "B": "A", "tie": "tie"}


class JudgeError(RuntimeError):
    """A judge that did not judge: what was asked, what came back, what to do."""


def compare(judge: Callable, prompts, first, second) -> list[dict]:
    """Put every pair of answers to the judge in both orders; one row a prompt.

    prompts, first, second: lists of texts. Row: `score` of the first answer (1 won, 0 lost, 0.5 tie), `agreed` (both
    orders gave the same answer the prize, or both a tie), `length` (characters of first minus second). Equal answers
    are a tie and are not put to the judge. Raises JudgeError for a verdict that is not "A", "B" or "tie".
    """
    rows = []
    for prompt, one, two in zip(prompts, first, second, strict=True):
        if one == two:
            verdicts = ("tie", "tie")
        else:
            verdicts = (_ask(judge, prompt, one, two), SWAPPED[_ask(judge, prompt, two, one)])
        agreed = verdicts[0] == verdicts[1]
        score = {"A": 1.0, "B": 0.0, "tie": 0.5}[verdicts[0]] if agreed else 0.5
        rows.append({"prompt": prompt, "score": score, "agreed": agreed, "length": len(one) - len(two)})
    return rows


def _ask(judge, prompt, a, b) -> str:
    verdict = judge(prompt, a, b)
    if verdict not in VERDICTS:
        raise JudgeError(f"the judge said {verdict!r} to {prompt[:60]!r}: a judge returns one of {', '.join(VERDICTS)}")
    return verdict


def win_rate(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Share won by the first answers, ties half, with a 95 % bootstrap interval: in all, and by length bucket.

    Buckets: first shorter or longer than the second by more than a tenth of the median length difference, or about as
    long. An empty bucket is left out. `agreed`: how often the judge stood by its verdict when the answers were swapped.
    """
    if not rows:
        raise ValueError("no comparisons: nothing was judged")
    lengths = np.array([row["length"] for row in rows])
    slack = 0.1 * np.median(np.abs(lengths))
    buckets = {
        "all": np.ones(len(rows), dtype=bool),
        "shorter": lengths < -slack,
        "about as long": np.abs(lengths) <= slack,
        "longer": lengths > slack,
    }
    scores = np.array([row["score"] for row in rows])
    out = {name: bootstrap(scores[chosen]) for name, chosen in buckets.items() if chosen.any()}
    return out | {"agreed": bootstrap([row["agreed"] for row in rows])}


# --- ready judges -----------------------------------------------------------------------------------------------------


def reward_judge(reward: Callable) -> Callable:
    """A judge that knows the reward: `reward(prompt, answer) -> float`; equal rewards are a tie."""

    def judge(prompt, a, b):
        gap = reward(prompt, a) - reward(prompt, b)
        return "tie" if gap == 0 else "A" if gap > 0 else "B"

    return judge


def logprob_judge(model, tokenizer, tie: float = 0.0) -> Callable:
    """A local model as the judge: it is shown both answers and names the one whose letter it finds more probable.

    tie: a difference of log-probs, in nats, up to which it is a tie. A small model mostly likes a letter, not an
    answer: `compare` shows it in `agreed`.
    """

    def judge(prompt, a, b):
        question = encode_prompt(ASK.format(prompt=prompt, a=a, b=b, tie=""), tokenizer)
        letters = [encode_completion(letter, tokenizer)[:1] for letter in ("A", "B")]
        options = {"pad_id": tokenizer.pad_token_id, "micro_tokens": 1, "row_tokens": 1}
        one, two = all_logps(model, [(question, letters)], **options)[0].tolist()
        return "tie" if abs(one - two) <= tie else "A" if one > two else "B"

    return judge


def http_judge(
    url: str, model: str, *, key_variable: str = "OPENAI_API_KEY", timeout: float = 30.0, retries: int = 3, pause: float = 1.0
) -> Callable:
    """A judge behind an OpenAI-compatible endpoint; `url` ends in /v1 or the like, `/chat/completions` is added.

    The key is read from the environment when a question is asked and appears nowhere else. Time-outs, broken
    connections, statuses 429 and 5xx, and replies that cannot be read are tried again `retries` times, with a pause
    that doubles. A refusal, or an answer that names no letter or both, is a tie. Raises JudgeError where all tries failed,
    the server said no (4xx) or pointed elsewhere (3xx; the key does not follow), or the key cannot be sent.
    """

    def judge(prompt, a, b):
        question = ASK.format(prompt=prompt, a=a, b=b, tie=", or tie")
        problem = None
        for attempt in range(retries + 1):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            try:
                return _verdict(_post(url, model, question, key_variable, timeout))
            except urllib.error.HTTPError as failure:
                problem = f"status {failure.code}"
                if failure.code != 429 and failure.code < 500:
                    remedy = f"check the address, the model's name and {key_variable}"
                    raise JudgeError(f"the judge at {url} refused with {problem}: {remedy}") from None
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError) as failure:
                problem = f"{type(failure).__name__}: {failure}"
        tries = f"{retries + 1} tries (last: {problem})"
        raise JudgeError(f"the judge at {url} gave nothing usable in {tries}: is it running? Raise timeout or retries.")

    return judge


def _post(url, model, question, key_variable, timeout) -> dict:
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(key_variable, "").strip():
        if not (key.isascii() and key.isprintable()):  # the library's own message would quote it
            raise JudgeError(f"{key_variable} holds no key: there is a line break or a letter in it that no header can carry")
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.build_opener(_StayHere).open(request, timeout=timeout) as reply:
        return json.loads(reply.read())["choices"][0]["message"]


class _StayHere(urllib.request.HTTPRedirectHandler):
    """No redirects: they would take the key to another address."""

    def redirect_request(self, *_):
        """None makes the redirect an HTTPError."""
        return None


def _verdict(message: dict) -> str:
    """The letter a reply names; a refusal or anything else is a tie."""
    named = set(re.findall(r"\b[AB]\b", message.get("content") or ""))
    return named.pop() if len(named) == 1 else "tie"
