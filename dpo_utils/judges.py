"""Which of two answers is better? Asked blind and in both orders; a contradiction is a tie.

A judge is a callable `judge(prompt, a, b) -> "A" | "B" | "tie"`; it never learns who wrote what.
"unreadable" is a reply that names no winner: it is counted apart and decides nothing.

python -m dpo_utils pairs PROMPTS --judge {reward,logprob,URL} [--adapter DIR] [--output ...]
"""

import sys

from dpo_utils import __main__, commands

if __name__ == "__main__":  # before torch is imported
    sys.exit(__main__.main(["pairs", *sys.argv[2:]]))

import json
import os
import random
import re
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import torch
from ipywidgets import Button, HBox, Textarea, VBox
from tqdm import tqdm

from dpo_utils import world
from dpo_utils.checkpoints import digest, write_file
from dpo_utils.data import columns_asked_for, fold, load_preferences
from dpo_utils.evaluate import bootstrap, sample
from dpo_utils.logps import plain_logps
from dpo_utils.models import load_policy, trainable
from dpo_utils.plots import live
from dpo_utils.schemas import PROMPTS
from dpo_utils.tokens import encode_completion, encode_prompt

SCORES = {"A": 1.0, "B": 0.0, "tie": 0.5}
UNREADABLE = "unreadable"
PAUSES = (0, 1, 2, 4)  # seconds before each try of an endpoint
ASK = "Question: {prompt}\n\nAnswer A: {a}\n\nAnswer B: {b}\n\nWhich answer is better: more "
ASK += "truthful, more helpful, better written? Reply with one letter, A or B{tie}."


class JudgeError(OSError):
    """A judge gave no verdict: what was asked, what came back and what to do."""


def compare(judge, prompts, first, second) -> list[dict]:
    """Ask about every pair of answers (lists of texts) in both orders; gives a row for each prompt.

    Row: `score` of the first answer (1 won, 0 lost, 0.5 tie), `agreed` (both orders gave the same
    winner), `length` (characters of first minus second), `unreadable` (a reply was: the score is a
    tie's). Look-alikes are a tie, without asking.
    """
    rows = []
    for prompt, one, two in zip(prompts, first, second, strict=True):
        orders = [] if fold(one) == fold(two) else [(one, two), (two, one)]
        verdicts = [judge(prompt, *order) for order in orders] or ["tie", "tie"]
        if not set(verdicts) <= {*SCORES, UNREADABLE}:
            raise JudgeError(f"the judge said {verdicts} to {prompt[:50]!r}: return A, B or tie")
        unreadable = UNREADABLE in verdicts
        won, lost = (0, 0) if unreadable else map(SCORES.get, verdicts)
        row = {"score": won if won + lost == 1 else 0.5, "agreed": won + lost == 1}
        row |= {"length": len(one) - len(two), UNREADABLE: unreadable}
        rows.append({"prompt": prompt, **row})
    return rows


def win_rate(rows: list[dict]) -> dict[str, tuple[float, float, float]]:
    """Share won by the first answers, ties half, with a 95 % bootstrap interval; also by length.

    "about as long": within a tenth of the median difference. `agreed`: the share of rows that did.
    Rows with an unreadable reply are in none of these, but in "unreadable", their share.
    """
    lost = [row.get(UNREADABLE, False) for row in rows]
    rows = [row for row, unreadable in zip(rows, lost, strict=True) if not unreadable]
    if not rows:
        raise ValueError(f"nothing was judged: no comparisons but {sum(lost)} unreadable ones")
    score, agreed, length = (np.array([r[k] for r in rows]) for k in ("score", "agreed", "length"))
    slack = 0.1 * np.median(np.abs(length))
    shorter, longer = length < -slack, length > slack
    buckets = {"shorter": shorter, "about as long": ~(shorter | longer), "longer": longer}
    by_length = {name: bootstrap(score[rows]) for name, rows in buckets.items() if rows.any()}
    apart = {UNREADABLE: bootstrap(np.array(lost))} if any(lost) else {}
    return {"all": bootstrap(score), **by_length, "agreed": bootstrap(agreed), **apart}


def reward_judge(reward):
    """A judge that knows the reward: `reward(prompt, answer) -> float`; equal rewards are a tie."""
    return lambda prompt, a, b: _larger(reward(prompt, a), reward(prompt, b))


def logprob_judge(model, tokenizer):
    """A local model that names the answer whose letter it finds more probable."""

    @torch.no_grad()
    def judge(prompt, a, b):
        question = encode_prompt(ASK.format(prompt=prompt, a=a, b=b, tie=""), tokenizer)
        one, two = (encode_completion(letter, tokenizer) for letter in "AB")
        n = next(i for i, ids in enumerate(zip(one, two, strict=False)) if len({*ids}) == 2)
        item = question + one[:n], [one[n : n + 1], two[n : n + 1]]  # a template may open alike
        return _larger(*plain_logps(model, [item], tokenizer.pad_token_id).tolist())

    return judge


def _larger(a: float, b: float) -> str:
    return "tie" if a == b else "A" if a > b else "B"


def read_verdict(reply: str | None) -> str:
    """A, B or tie, if a reply is one of them, opens or ends with one set apart; else unreadable."""
    text = re.sub(r"<think>.*?</think>", "", reply or "", flags=re.S).strip()
    words = re.sub(r"[\W_]+", " ", text).strip()  # of "[[A]]", "**B**", '{"winner": "B"}'
    alone = re.fullmatch(r"(?:(?:answer|winner|verdict) )?([ABC]|tie)", words, re.I)
    apart = re.match(r"([AB])(?=[.:,;>\n])", text) or re.search(r"[,;:]\s*(?:so )?([AB])\W*$", text)
    if found := alone or apart:
        return {"A": "A", "B": "B"}.get(found[1].upper(), "tie")
    return "tie" if "tie" in words.lower().split() else UNREADABLE


def http_judge(url, model, *, timeout=30.0, **parameters):
    """A judge behind an OpenAI-compatible endpoint; `url` ends in /v1 or the like.

    parameters: of the request, None leaves one out; by default {"temperature": 0}. OPENAI_API_KEY
    is read for every question and appears nowhere else. Time-outs, broken connections and status
    429 or 5xx are tried again, with a pause that doubles. Raises JudgeError after the last try
    and, at once and in the server's words, for other statuses, and for a reply that was cut off.
    """
    address = f"{url.rstrip('/')}/chat/completions"
    sent = {k: x for k, x in ({"temperature": 0} | parameters).items() if x is not None}

    def judge(prompt, a, b):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        if not (key.isascii() and key.isprintable()):  # httpx would quote it in its own error
            raise JudgeError("OPENAI_API_KEY holds what no header can carry: set it again")
        question = {"role": "user", "content": ASK.format(prompt=prompt, a=a, b=b, tie=", or tie")}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = {"json": {"model": model, "messages": [question], **sent}, "headers": headers}
        for pause in PAUSES:
            time.sleep(pause)
            try:
                reply = httpx.post(address, timeout=timeout, **request)
                if 300 <= (status := reply.status_code) < 500 and status != 429:
                    said = reply.text.replace(key or "\0", "***")[:300]
                    remedy = (
                        "check the address, the model's name, its parameters and OPENAI_API_KEY"
                    )
                    raise JudgeError(f"the judge at {url} refused, {status}: {said!r}; {remedy}")
                choice = reply.raise_for_status().json()["choices"][0]
                verdict = read_verdict(choice["message"].get("content"))
                if verdict == UNREADABLE and choice.get("finish_reason") == "length":
                    raise JudgeError(f"{model} was cut off before its verdict: raise max_tokens")
                return verdict
            except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as failure:
                problem = f"{type(failure).__name__}: {failure}".splitlines()[0]
        raise JudgeError(f"no verdict from {url} ({problem}): is it running? Raise timeout.")

    return judge


class BlindChoice:
    """A person as the judge: two answers in random order, and every click is saved at once.

    prompts, first, second: lists of texts. path: JSONL for `load_preferences`; ties go to
    `<name>_ties.jsonl`. With the same path again, only what is still open is asked. `open`: the
    (prompt, answer A, answer B) to judge, as they are shown. When all are, `judge` can `compare`.
    """

    def __init__(self, prompts, first, second, path, seed: int = 0):
        self.path, self.verdicts, rng = Path(path), {}, random.Random(seed)
        self.ties = self.path.with_name(f"{self.path.stem}_ties.jsonl")
        for file, verdict in ((self.path, "A"), (self.ties, "tie")):
            for row in load_preferences(file) if file.exists() else []:
                self.verdicts[row["prompt"], row["chosen"], row["rejected"]] = verdict
        trios = dict.fromkeys(zip(prompts, first, second, strict=True))
        shown = [(prompt, *rng.sample(answers, 2)) for prompt, *answers in trios]
        self.open = [trio for trio in shown if not self.judge(*trio)]

    def judge(self, prompt, a, b) -> str | None:
        """The verdict, None while open. Unasked, a blank answer loses and look-alikes are a tie."""
        if fold(a) == fold(b):
            return "tie"
        if not (fold(a) and fold(b)):
            return "A" if fold(a) else "B"
        turned = {"A": "B", "tie": "tie"}.get(self.verdicts.get((prompt, b, a)))
        return self.verdicts.get((prompt, a, b), turned)

    def choose(self, verdict: str) -> None:
        """Take "A", "B" or "tie" for the first open pair; saved before the next one comes."""
        if not self.open or verdict not in SCORES:
            raise ValueError(f"cannot take {verdict!r}: choose A, B or tie while a pair is open")
        prompt, a, b = self.open[0]
        trio = (prompt, b, a) if verdict == "B" else (prompt, a, b)
        row = dict(zip(("prompt", "chosen", "rejected"), trio, strict=True))
        file = self.ties if verdict == "tie" else self.path
        lines = file.read_bytes().splitlines() if file.exists() else []
        lines.append(json.dumps(row, ensure_ascii=False).encode())
        write_file(file, b"\n".join(lines) + b"\n")
        self.verdicts[trio] = "tie" if verdict == "tie" else "A"
        self.open.pop(0)

    def show(self):
        """The buttons, in Jupyter, VS Code and Colab; elsewhere a line that says so."""
        if not live():
            return print("buttons to choose with appear here in Jupyter, VS Code and Colab")
        panel = VBox()

        def ask(pair=None, clicked=None):
            if pair in self.open[:1]:  # no click that came late judges a pair unseen
                self.choose(clicked.description)
            shown = "{}\n\nA: {}\n\nB: {}".format(*self.open[0]) if self.open else "All are judged."
            text = Textarea(shown, disabled=True, rows=12, layout={"width": "100%"})
            for button in (buttons := [Button(description=v) for v in SCORES if self.open]):
                button.on_click(partial(ask, self.open[0]))
            panel.children = [text, HBox(buttons)]

        ask()
        return panel


def label_pairs(model, tokenizer, prompts, judge, path, profile, temperature=1.0, **known_by):
    """Let a judge choose between two answers of the model to every prompt; returns the rows.

    path: JSONL for `load_preferences`, saved after every `profile.batch` prompts. Run again, it
    goes on as if never stopped: an answer depends on its prompt's number and the seed. A tie is a
    row with equal scores, which makes no pair; look-alikes and blanks are ties, unasked. Raises
    ValueError if path is of another run; known_by: what else it is known by, as its judge.
    """
    how = {"n": 2, "temperature": temperature, "max_new_tokens": profile.max_new_tokens}
    path, weights = Path(path), {str(i): weight for i, weight in enumerate(trainable(model))}
    run = digest([profile.model, profile.seed, profile.batch, how, prompts, known_by], weights)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    if any(row.get("run") != run for row in rows):
        raise ValueError(f"{path} is of other prompts, settings or weights: name another output")
    print(f"{path.name}: {len(rows)} of {len(prompts)} prompts were judged before")
    for start in tqdm(range(len(rows), len(prompts), profile.batch), "batches of prompts"):
        how["seed"] = random.Random(f"{profile.seed} {start}").getrandbits(32)
        answers = sample(model, tokenizer, some := prompts[start : start + profile.batch], **how)
        asked = [(a, b if fold(a) and fold(b) else a) for a, b in answers]  # a blank one is a tie
        verdicts = compare(judge, some, *zip(*asked, strict=True))
        for prompt, texts, verdict in zip(some, answers, verdicts, strict=True):
            high = max(won := verdict["score"], 1 - won)
            row = {"prompt": prompt, "chosen": texts[won < high], "rejected": texts[won == high]}
            row |= {"score_chosen": high, "score_rejected": 1 - high, "run": run}
            rows.append(row | ({UNREADABLE: True} if verdict[UNREADABLE] else {}))
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def main(argv=None) -> None:
    """`python -m dpo_utils pairs` for callers in Python."""
    with commands.one_line():
        command(*commands.pairs(argv))


def command(args, profile) -> None:
    """Write preference pairs of a model's own answers to your prompts; run again, it goes on."""
    rows = Path(args.prompts)
    if rows.suffix == ".txt":
        lines = rows.read_text(encoding="utf-8-sig").splitlines()
        rows = [{"prompt": line.strip()} for line in lines if line.strip()]
    prompts = load_preferences(rows, kind=PROMPTS, columns=columns_asked_for())["prompt"][:]
    if args.judge == "reward" and (new := {*prompts} - {f.question for f in world.FACTS}):
        raise ValueError(f"no known reward for {min(new)!r}: choose another --judge")
    policy = load_policy(profile, adapter=args.adapter)
    judges = {"reward": reward_judge(world.reward), "logprob": logprob_judge(*policy)}
    judge = judges.get(args.judge) or http_judge(args.judge, args.model)
    options = {"judge_name": (args.judge, args.model), "temperature": args.temperature}
    rows = label_pairs(*policy, prompts, judge, args.output, profile, **options)
    ties, lost = sum(r["score_chosen"] == 0.5 for r in rows), sum(UNREADABLE in r for r in rows)
    print(f"{args.output}: {len(rows) - ties} pairs, {ties - lost} ties, {lost} unreadable replies")
