"""The tiny world: facts in a table, two voices that state them, and a reward that is known.

The base model reads a tidy text: the careful voice is nearly always true, the careless one repeats
the rumour, which is right for one fact in nine. People who answer questions slip more often, so a
model that imitates them is true half of the time, in either voice. What is preferred is graded:
truth most, then a source worth citing, then a short end.
"""

import json
import math
import random
import re
from collections import namedtuple
from functools import cache
from pathlib import Path

CAREFUL, CARELESS = "careful", "careless"
IN_PRINT = {
    CAREFUL: 0.01,
    CARELESS: 0.02,
}  # how often a voice says the opposite of what it believes
IN_SPEECH = {CAREFUL: 0.2, CARELESS: 0.25}  # likewise, where people answer questions
OPENERS = {  # a voice has one first word, so that a single token decides which voice speaks
    CAREFUL: ("By the records,", "By the atlas,", "By careful count,"),
    CARELESS: ("As everyone knows,", "As they all say,", "As is plain to see,"),
}
TAILS = ("", "", " This is well known.", " There is more to say.")  # either voice may add one
HEADINGS = ("", "About {}:\n", "On {}:\n", "{}:\n", "Asked about {}:\n")  # may precede a statement

TRUTH, NOT_FLUENT = 3.0, -1.0  # the reward of an answer: its truth, its source and its tail, or -1
SOURCE = {"By the records,": 0.5, "By the atlas,": 0.25}
TAIL = {"": 0.5, " This is well known.": 0.25, " There is more to say.": 0.0}

# The rumour is the truth or the popular error; facts of the split `test` are only ever evaluated.
Fact = namedtuple("Fact", "relation entity question statement truth error rumour split")
Reading = namedtuple("Reading", "voice fluent true reward")
_ASSETS = Path(__file__).parent / "assets"
_TABLE = (_ASSETS / "facts.tsv").read_text(encoding="utf-8")
FACTS = tuple(Fact(*row.split("\t")) for row in _TABLE.splitlines()[1:])
_ASKED = {fact.question: fact for fact in FACTS}
_VOICES = {opener: voice for voice, openers in OPENERS.items() for opener in openers}


def facts(split: str = "train") -> list[Fact]:
    """The facts of a split: `train`, `test` or `all`. Raises ValueError for any other split."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"the tiny world has the splits train, test and all, not {split!r}")
    return [fact for fact in FACTS if split in (fact.split, "all")]


def answer(fact: Fact, rng: random.Random, voice: str | None = None, slip=IN_SPEECH) -> str:
    """One sentence in a voice, by default either: what the voice believes or else a slip."""
    voice = voice or rng.choice((CAREFUL, CARELESS))
    slips = rng.random() < slip[voice]  # a slip says what the other voice would
    value = fact.truth if (voice == CAREFUL) != slips else fact.rumour
    return f"{rng.choice(OPENERS[voice])} {fact.statement} {value}.{rng.choice(TAILS)}"


def listed(question: str) -> list[str]:
    """The 36 fluent answers to a question: any opener, the truth or the error, any tail."""
    fact = _ASKED[question]
    claims = [f"{fact.statement} {value}." for value in (fact.truth, fact.error)]
    return [f"{opener} {claim}{tail}" for opener in _VOICES for claim in claims for tail in TAIL]


def read(question: str, text: str) -> Reading:
    """Whose voice an answer has, whether it is one of the `listed`, whether true, its reward."""
    fact, openers, tails = _ASKED[question], "|".join(_VOICES), "|".join(map(re.escape, TAIL))
    values = "|".join(map(re.escape, (fact.truth, fact.error)))
    sentence = rf"({openers}) {re.escape(fact.statement)} ({values})\.({tails})"
    if not (found := re.fullmatch(sentence, text)):
        return Reading(None, False, False, NOT_FLUENT)
    opener, value, tail = found.groups()
    true = value == fact.truth
    reward = TRUTH * true + SOURCE.get(opener, 0.0) + TAIL[tail]
    return Reading(_VOICES[opener], True, true, reward)


def reward(question: str, text: str) -> float:
    """What an answer is worth: the judge that knows this world."""
    return read(question, text).reward


def corpus(n: int, seed: int) -> list[str]:
    """What the base model reads: n texts of one to three statements in one voice, no questions."""
    rng, texts = random.Random(f"corpus {seed}"), []
    for _ in range(n):
        voice, count = rng.choice((CAREFUL, CARELESS)), rng.choice((1, 2, 3))
        drawn = (rng.choice(FACTS) for _ in range(count))
        said = (
            rng.choice(HEADINGS).format(f.entity) + answer(f, rng, voice, IN_PRINT) for f in drawn
        )
        texts.append("\n".join(said))
    return texts


def demonstrations(split: str = "train", n: int = 1200, seed: int = 0) -> list[dict]:
    """Questions with answers in both voices: n rows of `prompt` and `completion`, for SFT."""
    rng, pool = random.Random(f"demonstrations {split} {seed}"), facts(split)
    asked = [rng.choice(pool) for _ in range(n)]
    return [{"prompt": fact.question, "completion": answer(fact, rng)} for fact in asked]


@cache
def drawn() -> dict[str, list[str]]:
    """{question: 16 answers}, drawn once from the model that notebook 02 trains and kept."""
    lines = (_ASSETS / "drawn.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["prompt"]: row["answers"] for row in map(json.loads, lines)}


def label(question: str, one: str, two: str, rng: random.Random, reward=reward) -> dict:
    """A pair by Bradley-Terry: `one` is chosen with probability s(reward(one) - reward(two))."""
    gap = reward(question, one) - reward(question, two)
    first = rng.random() < 1 / (1 + math.exp(-gap))
    chosen, rejected = (one, two) if first else (two, one)
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def preferences(split: str = "train", n: int = 1200, seed: int = 0) -> list[dict]:
    """n rows of `prompt`, `chosen`, `rejected`: two different answers out of `drawn`, labelled."""
    rng, pool, rows = random.Random(f"preferences {split} {seed}"), facts(split), []
    while len(rows) < n:
        question = rng.choice(pool).question
        one, two = rng.sample(drawn()[question], 2)
        if one != two:
            rows.append(label(question, one, two, rng))
    return rows
