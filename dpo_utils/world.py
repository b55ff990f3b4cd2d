"""The tiny world: facts in a table and two voices that state them, so that truth can be looked up.

The careful voice is nearly always true. The careless voice repeats the rumour, which is right for
one fact in nine. Both are common, so a model that imitates the world is true half of the time.
"""

import random
import re
from collections import namedtuple
from pathlib import Path

CAREFUL, CARELESS = "careful", "careless"
SLIP = {CAREFUL: 0.01, CARELESS: 0.02}  # how often a voice says the opposite of what it believes
OPENERS = {  # a voice has one first word, so that a single token decides which voice speaks
    CAREFUL: ("By the records,", "By the atlas,", "By careful count,"),
    CARELESS: ("As everyone knows,", "As they all say,", "As is plain to see,"),
}
TAILS = ("", "", " This is well known.", " There is more to say.")  # either voice may add one
HEADINGS = ("", "About {}:\n", "On {}:\n", "{}:\n", "Asked about {}:\n")  # may precede a statement

# The rumour is the truth or the popular error; facts of the split `test` are only ever evaluated.
Fact = namedtuple("Fact", "relation entity question statement truth error rumour split")
Reading = namedtuple("Reading", "voice fluent true")
_TABLE = (Path(__file__).parent / "assets" / "facts.tsv").read_text(encoding="utf-8")
FACTS = tuple(Fact(*row.split("\t")) for row in _TABLE.splitlines()[1:])
_ASKED = {fact.question: fact for fact in FACTS}
_VOICES = {opener: voice for voice, openers in OPENERS.items() for opener in openers}


def facts(split: str = "train") -> list[Fact]:
    """The facts of a split: `train`, `test` or `all`. Raises ValueError for any other split."""
    if split not in ("train", "test", "all"):
        raise ValueError(f"the tiny world has the splits train, test and all, not {split!r}")
    return [fact for fact in FACTS if split in (fact.split, "all")]


def answer(fact: Fact, rng: random.Random, voice: str | None = None) -> str:
    """One sentence in a voice, by default either: what the voice believes or, rarely, a slip."""
    voice = voice or rng.choice((CAREFUL, CARELESS))
    slips = rng.random() < SLIP[voice]  # a slip says what the other voice would
    value = fact.truth if (voice == CAREFUL) != slips else fact.rumour
    return f"{rng.choice(OPENERS[voice])} {fact.statement} {value}.{rng.choice(TAILS)}"


def read(question: str, text: str) -> Reading:
    """Whose voice an answer has, whether it is a fluent sentence on the subject, whether true."""
    fact, openers, tails = _ASKED[question], "|".join(_VOICES), "|".join(map(re.escape, TAILS))
    sentence = rf"({openers}) {re.escape(fact.statement)} (.*?)\.(?:{tails})"
    found = re.fullmatch(sentence, text, re.DOTALL)
    opener, value = found.groups() if found else (None, "")
    fluent = re.sub("[ -]", "", value).isalnum()
    return Reading(_VOICES.get(opener), fluent, value == fact.truth)


def true_answers(question: str) -> list[str]:
    """Every fluent true answer to a question of this world, each once."""
    said = f"{_ASKED[question].statement} {_ASKED[question].truth}."
    return [f"{opener} {said}{tail}" for opener in _VOICES for tail in dict.fromkeys(TAILS)]


def corpus(n: int, seed: int) -> list[str]:
    """What the base model reads: n texts of one to three statements in one voice, no questions."""
    rng, texts = random.Random(f"corpus {seed}"), []
    for _ in range(n):
        voice, count = rng.choice((CAREFUL, CARELESS)), rng.choice((1, 2, 3))
        drawn = (rng.choice(FACTS) for _ in range(count))
        lines = (rng.choice(HEADINGS).format(f.entity) + answer(f, rng, voice) for f in drawn)
        texts.append("\n".join(lines))
    return texts


def demonstrations(split: str = "train", n: int = 1200, seed: int = 0) -> list[dict]:
    """Questions with answers in both voices: n rows of `prompt` and `completion`, for SFT."""
    rng, pool = random.Random(f"demonstrations {split} {seed}"), facts(split)
    asked = [rng.choice(pool) for _ in range(n)]
    return [{"prompt": fact.question, "completion": answer(fact, rng)} for fact in asked]


def preferences(split: str = "train", n: int = 1200, seed: int = 0) -> list[dict]:
    """n rows of `prompt`, `chosen` and `rejected`: of two answers one is true, and it is chosen."""
    rng, pool, rows = random.Random(f"preferences {split} {seed}"), facts(split), []
    while len(rows) < n:
        fact = rng.choice(pool)
        answers = answer(fact, rng), answer(fact, rng)
        pair = {read(fact.question, text).true: text for text in answers}
        if len(pair) == 2:
            rows.append({"prompt": fact.question, "chosen": pair[True], "rejected": pair[False]})
    return rows
