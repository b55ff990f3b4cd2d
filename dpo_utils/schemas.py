"""Rows -> pairs: the schema of a source is found by its columns, and every pair is checked."""

import difflib
import re
import unicodedata
from collections import Counter
from itertools import permutations, takewhile

from dpo_utils import world
from dpo_utils.rows import BadRow, PreferenceDataError, read_rows

# (prompt column, answer columns, score columns, system column); a string in place of a tuple is one
# column that holds a list or a vote, and "" says that the prompt is what the answers begin with
PREFERENCES = (
    ("question", ("answer_0", "answer_1"), ("score_0", "score_1")),  # webgpt_comparisons
    ("", ("conversation_a", "conversation_b"), "winner"),  # chatbot_arena_conversations
    ("prompt", "responses", "scores"),
    ("prompt", ("chosen", "rejected"), ("score_chosen", "score_rejected")),  # ultrafeedback
    ("prompt", ("chosen", "rejected"), (), "system"),  # truthy-dpo
    ("prompt", ("chosen", "rejected"), ()),
    ("", ("chosen", "rejected"), ()),  # hh-rlhf: the prompt is what both begin with
)
DEMONSTRATIONS = (("prompt", ("completion",), ()), ("", ("messages",), ()))
VOTES = {"model_a": [1, 0], "model_b": [0, 1], "tie": [0, 0], "tie (bothbad)": [0, 0]}
SYNONYMS = {"instruction": "prompt", "response": "completion", "output": "completion"}
ROLES = {"Human": "user", "Assistant": "assistant"}  # of a transcript


def fold(text: str) -> str:
    """Text without what a reader does not see: Unicode form (NFKC), case, runs of space."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def plain_text(value: str | list[dict]) -> str:
    """One string for a text or a list of messages."""
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def prompt_key(prompt: str | list[dict]) -> str:
    """What makes two prompts the same question: folded text, system turns left out."""
    asked = prompt if isinstance(prompt, str) else [t for t in prompt if t["role"] != "system"]
    return fold(plain_text(asked))


def check_text(text: object, column: str) -> None:
    """Raises BadRow where a value cannot be used as text."""
    is_text = isinstance(text, str)
    fault = "blank" if is_text or text == [] else "wrong type"
    if text is None or text != text:
        fault = "missing value"
    elif is_text and "\0" in text:
        fault = "NUL character"
    elif is_text and not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
        fault = "invalid UTF-8" if "\udc80" <= surrogate[0] <= "\udcff" else "lone surrogate"
    elif is_text and re.search(r"[^\s\u200b-\u200d\u2060\ufeff]", text):
        return
    raise BadRow(fault, column, text)


def messages(value: object) -> list[dict]:
    """A list of {"role", "content"} without other keys; [] for anything else."""
    try:
        turns = value if isinstance(value, list) else []
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    except (TypeError, KeyError):
        return []


def as_turns(value: object, column: str) -> list[dict]:
    """Messages, or those of a transcript, cut at its "Human:" and "Assistant:"."""
    if turns := messages(value):
        return turns
    check_text(value, column)
    start, *pieces = re.split(r"\n\n(Human|Assistant):", value)
    if start.strip() or not pieces:
        raise BadRow("not a transcript", column, value)
    said = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": ROLES[speaker], "content": text.strip()} for speaker, text in said]


def shared_beginning(talks: list[list[dict]]) -> tuple[list[dict], list[list[dict]]]:
    """What all conversations begin with, and the last turn of each."""
    rounds = zip(*(talk[:-1] for talk in talks), strict=False)
    shared = [turns[0] for turns in takewhile(lambda t: t.count(t[0]) == len(t), rounds)]
    if any(len(talk) > len(shared) + 1 for talk in talks):
        raise BadRow("diverged early", None, talks)
    return shared, [talk[-1:] for talk in talks]


def ranking(points: object, answers: int, scores: str | tuple) -> list[float]:
    """The score of each answer; raises BadRow where one is missing or all are the same."""
    column = scores if isinstance(scores, str) else " and ".join(scores)
    points = VOTES.get(str(points), points) if scores == "winner" else points
    listed = points if isinstance(points, list) else []
    numbers = [point for point in listed if type(point) in (int, float) and point == point]
    if not len(numbers) == len(listed) == answers:
        raise BadRow("missing score", column, points)
    if "score_chosen" in scores and points[0] < points[1]:
        raise BadRow("scores contradict", column, points)
    if len(set(points)) < 2:
        raise BadRow("tied scores", column, points)
    return points


def pairs_of(values: dict, columns: dict, prompt: str, answers, scores, system=None) -> list[dict]:
    """The pairs of a row, one for every strict gap in score; of one answer a demonstration."""
    row = {name: value for name, value in values.items() if name not in columns.values()}
    row |= {ours: values.get(theirs) for ours, theirs in columns.items()}
    for column in ("input", "context") if columns.get("prompt") == "instruction" else ():
        if row.get(column) == row.get(column) and str(row.get(column) or "").strip():
            check_text(row["prompt"], "prompt")
            check_text(row[column], column)
            row["prompt"] += f"\n\n{row[column]}"
    parts, question = (answers, scores), row.get(prompt)
    texts, points = (row.get(p) if isinstance(p, str) else [row.get(c) for c in p] for p in parts)
    if not isinstance(texts, list):
        raise BadRow("wrong type", answers, texts)
    unscored = isinstance(scores, tuple) and "score_chosen" in scores and points == [None, None]
    points = ranking(points, len(texts), scores) if scores and not unscored else [1, 0]
    if not prompt or (isinstance(question, str) and messages(texts[0])):
        names = answers if isinstance(answers, tuple) else [answers] * len(texts)
        question, texts = shared_beginning(list(map(as_turns, texts, names)))
    elif system:
        question = [{"role": "user", "content": question}]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    elif isinstance(question, dict):  # webgpt_comparisons
        question = question.get("full_text", question)
    if row.get(system) and row[system] == row[system]:  # NaN is none
        question = [{"role": "system", "content": row[system]}, *question]
    if len(texts) == 1:
        return [{"prompt": question, "completion": texts[0]}]
    return [
        {"prompt": question, "chosen": better, "rejected": worse}
        for (high, better), (low, worse) in permutations(zip(points, texts, strict=True), 2)
        if high > low
    ]


def checked(pair: dict) -> dict:
    """A pair or a demonstration; raises BadRow for the first thing that is wrong with it."""
    for column, value in pair.items():
        turns = messages(value)
        roles = [turn["role"] for turn in turns]
        for text in [turn["content"] for turn in turns] or [value]:
            check_text(text, column)
        fits = roles[-1:] != ["assistant"] if column == "prompt" else roles in ([], ["assistant"])
        if not fits or any(role not in ("system", "user", "assistant") for role in roles):
            raise BadRow("bad turns", column, roles)
        pair[column] = turns or value
    if len({type(value) for value in pair.values()}) > 1:
        raise BadRow("mixed forms", None, pair)
    if "chosen" in pair:
        chosen, rejected = plain_text(pair["chosen"]), plain_text(pair["rejected"])
        if fold(chosen) == fold(rejected):
            reason = "identical" if chosen == rejected else "identical after folding"
            raise BadRow(reason, "rejected", rejected)
    return pair


def choose_schema(source: str, names: set, kind: tuple, columns: dict) -> tuple:
    """The first schema whose columns are all there; raises PreferenceDataError with the nearest."""
    known = (names - set(columns.values())) | columns.keys()
    lost = {ours: theirs for ours, theirs in columns.items() if theirs not in names}
    for schema in () if lost else kind:
        parts = [part if isinstance(part, tuple) else (part,) for part in schema]
        needed = set().union(*parts) - {""}
        if needed <= known and (needed != {"chosen", "rejected"} or needed == known):
            return schema
    fields = ("prompt", "chosen", "rejected") if kind is PREFERENCES else ("prompt", "completion")
    lost = lost or {name: name for name in fields if name not in known}
    folded = {name.casefold(): name for name in sorted(names)}
    near = {o: difflib.get_close_matches(own.casefold(), folded, 1) for o, own in lost.items()}
    hint = columns | {ours: folded[n[0]] if n else "your name for it" for ours, n in near.items()}
    shell = ",".join(f"{ours}={theirs}" for ours, theirs in hint.items())
    problem = f"no column {', '.join(map(repr, lost.values()))}; the columns are {sorted(names)}"
    remedy = f"Rename, or pass columns={hint}, or set DPO_COLUMNS={shell!r} (--column in a shell)"
    raise PreferenceDataError(f"{source}: {problem}. {remedy}")


def read_pairs(source, kind=PREFERENCES, columns=None, keep=(), split="train", revision=None):
    """Name and rows of a source, each row with its checked pairs or with what is wrong with it."""
    tiny = world.preferences if kind is PREFERENCES else world.demonstrations
    name, rows = read_rows(source, tiny, split, revision)
    records = [row for row in rows if not row.bad]
    names = set().union(*(row.values for row in records))
    found = {ours: own for own, ours in SYNONYMS.items() if own in names and ours not in names}
    columns = found | (columns or {})
    schema = choose_schema(name, names, kind, columns) if records else ()
    if absent := sorted(set(keep) - names):
        raise PreferenceDataError(f"{name}: keep= names {absent}, which no row has. Correct it")
    for row in records:
        kept = {column: row.values.get(column) for column in keep}
        try:
            for column in [n for n in keep if isinstance(kept[n], str) and kept[n].strip()]:
                check_text(kept[column], column)
            row.pairs = [checked(pair) | kept for pair in pairs_of(row.values, columns, *schema)]
        except BadRow as bad:
            row.bad, bad.column = bad, columns.get(bad.column, bad.column)
    forms = Counter(type(row.pairs[0]["prompt"]) for row in records if row.pairs)
    for row in records:
        if row.pairs and type(row.pairs[0]["prompt"]) is not max(forms, key=forms.get):
            row.bad, row.pairs = BadRow("mixed forms", "prompt", row.pairs[0]["prompt"]), []
    return name, rows
