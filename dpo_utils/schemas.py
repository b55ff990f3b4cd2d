"""Rows -> pairs: the schema of a source is found by its columns, and every pair is checked."""

import re
import unicodedata
from collections import Counter

from dpo_utils import world
from dpo_utils.rows import BadRow, PreferenceDataError, Row, nearest, read_rows, show

PREFERENCES = (  # the columns of prompt, answers, scores; or the one column that lists them
    ("question", ("answer_0", "answer_1"), ("score_0", "score_1")),  # webgpt_comparisons
    ("", ("conversation_a", "conversation_b"), "winner"),  # chatbot_arena_conversations
    ("prompt", "responses", "scores"),
    ("prompt", ("chosen", "rejected"), ("score_chosen", "score_rejected")),  # ultrafeedback
    ("prompt", ("chosen", "rejected"), (), "system"),  # truthy-dpo
    ("prompt", ("chosen", "rejected"), ()),
    ("", ("chosen", "rejected"), ()),  # hh-rlhf: the prompt is what both begin with
)
DEMONSTRATIONS = (("prompt", "completion"), ("", "messages"))
VOTES = {"model_a": [1, 0], "model_b": [0, 1], "tie": [0, 0], "tie (bothbad)": [0, 0]}


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


def is_messages(value: object) -> bool:
    """Whether it is a list of {"role", "content"}, whatever these hold."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in value)


def as_turns(value: object, column: str) -> list[dict]:
    """Messages without other keys; a transcript is cut at its "Human:" and "Assistant:"."""
    if is_messages(value):
        return [{"role": turn["role"], "content": turn["content"]} for turn in value]
    if not isinstance(value, str):
        raise BadRow(fault_in(value), column, show(value))
    start, *pieces = re.split(r"\n\n(Human|Assistant):", value)
    if start.strip() or not pieces:
        found = f"with no prompt column a text opens with \\n\\nHuman: but {show(value)}"
        raise BadRow("bad turns", column, found)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(pieces[::2], pieces[1::2], strict=True)
    return [{"role": roles[speaker], "content": text.strip()} for speaker, text in turns]


def our_names(values: dict, columns: dict) -> dict:
    """The values under our names; an instruction is a prompt together with its input."""
    own = columns.values()
    row = {name: value for name, value in values.items() if name not in own}
    row |= {ours: values[theirs] for ours, theirs in columns.items() if theirs in values}
    for synonym in ("output", "response"):
        if synonym in row:
            row.setdefault("completion", row[synonym])
    if "instruction" in row and "prompt" not in row:
        row["prompt"] = row["instruction"]
        for column in [name for name in ("input", "context") if name in row]:
            fault = fault_in(row[column])
            if fault == "wrong type":
                raise BadRow(fault, column, show(row[column]))
            if fault not in ("missing value", "blank") and isinstance(row["prompt"], str):
                row["prompt"] += f"\n\n{row[column]}"
    return row


def listed(row: dict, columns: str | tuple) -> list:
    """The values of these columns, or those that one column lists."""
    values = row[columns] if isinstance(columns, str) else [row[column] for column in columns]
    if not isinstance(values, list):
        raise BadRow(fault_in(values) or "wrong type", columns, show(values))
    return values


def demonstrations_of(row: dict, prompt: str, answer: str) -> list[dict]:
    """The demonstration of a row; of a conversation the last turn is the completion."""
    if prompt:
        return [{"prompt": row[prompt], "completion": row[answer]}]
    turns = as_turns(row[answer], answer)
    return [{"prompt": turns[:-1], "completion": turns[-1:]}]


def ranking(row: dict, texts: list, scores: str | tuple) -> list[float]:
    """The score of each text, high to low for a pair without scores."""
    if not scores:
        return [1, 0]
    if scores == "winner":
        if str(row[scores]) not in VOTES:
            raise BadRow("unknown label", scores, show(row[scores]))
        return VOTES[row[scores]]
    points = listed(row, scores)
    if len(texts) != len(points):
        found = f"found {len(texts)} responses and {len(points)} scores"
        raise BadRow("missing score", scores, found)
    for number, point in enumerate(points):
        if type(point) not in (int, float) or point != point:
            column = scores if isinstance(scores, str) else scores[number]
            raise BadRow("missing score", column, show(point))
    if "score_chosen" in scores and points[0] < points[1]:
        raise BadRow("scores contradict", scores[0], f"found {points[0]} and {points[1]}")
    return points


def pairs_of(row: dict, prompt: str, answers, scores, system=None) -> list[dict]:
    """The pairs of a row: one for every strict gap in score, none for a tie."""
    question, texts = row.get(prompt), listed(row, answers)
    points = ranking(row, texts, scores)
    if len(set(points)) < 2:
        raise BadRow("tied scores", scores if isinstance(scores, str) else None, show(points))
    said = [{"role": "system", "content": row[system]}] if row.get(system) else []
    if not prompt or (isinstance(question, str) and is_messages(texts[0])):
        question, texts = shared_beginning(*map(as_turns, texts, answers))
        question = said + question
    elif system:
        question = [*said, {"role": "user", "content": question}]
        texts = [[{"role": "assistant", "content": text}] for text in texts]
    elif prompt == "question" and isinstance(question, dict):
        question = question.get("full_text")
    scored = list(zip(points, texts, strict=True))
    return [
        {"prompt": question, "chosen": better, "rejected": worse}
        for high, better in scored
        for low, worse in scored
        if high > low
    ]


def shared_beginning(first: list[dict], second: list[dict]) -> tuple[list[dict], list[list[dict]]]:
    """What two conversations begin with, and the last turn of each."""
    last = min(len(first), len(second)) - 1
    shared = next((i for i in range(last) if first[i] != second[i]), last)
    if max(len(first), len(second)) > shared + 1:
        found = f"found {len(first)} and {len(second)} turns, the first {shared} alike"
        raise BadRow("parted early", None, found)
    return first[:shared], [first[shared:], second[shared:]]


def fault_in(text: object) -> str | None:
    """Why a value cannot be used as text; None where it can."""
    if text is None or text != text:
        return "missing value"
    if not isinstance(text, str):
        return "blank" if text == [] else "wrong type"
    if "\0" in text:
        return "NUL character"
    if not text.isascii() and (surrogate := re.search("[\ud800-\udfff]", text)):
        return "invalid UTF-8" if "\udc80" <= surrogate[0] <= "\udcff" else "lone surrogate"
    return None if re.search(r"[^\s\u200b-\u200d\u2060\ufeff]", text) else "blank"


def check(pair: dict) -> None:
    """Raises BadRow for the first thing that is wrong with a pair or a demonstration."""
    for column, value in pair.items():
        is_talk = is_messages(value)
        for text in [turn["content"] for turn in value] if is_talk else [value]:
            if reason := fault_in(text):
                raise BadRow(reason, column, show(text))
        roles = [turn["role"] for turn in value] if is_talk else []
        known = all(role in ("system", "user", "assistant") for role in roles)
        fits = roles[-1:] != ["assistant"] if column == "prompt" else roles in ([], ["assistant"])
        if not (known and fits):
            raise BadRow("bad turns", column, f"found the roles {roles}")
    if len({type(value) for value in pair.values()}) > 1:
        raise BadRow("mixed forms", None, "found text in one column and messages in another")
    if "chosen" in pair:
        chosen, rejected = plain_text(pair["chosen"]), plain_text(pair["rejected"])
        if fold(chosen) == fold(rejected):
            reason = "identical" if chosen == rejected else "identical after folding"
            raise BadRow(reason, "rejected", show(rejected))


def columns_of(schema: tuple) -> set[str]:
    """All columns that a schema needs."""
    parts = ([part] if isinstance(part, str) else part for part in schema)
    return {column for part in parts for column in part if column}


def choose_schema(source: str, names: set, kind: tuple, columns: dict) -> tuple:
    """The first schema whose columns are all there; raises PreferenceDataError with the nearest."""
    known = our_names(dict.fromkeys(names), columns).keys()
    missing = [ours for ours, theirs in columns.items() if theirs not in names]
    for schema in () if missing else kind:
        needed = columns_of(schema)
        if needed <= known and (needed != {"chosen", "rejected"} or needed == known):
            return schema
    fields = ("prompt", "chosen", "rejected") if kind is PREFERENCES else ("prompt", "completion")
    missing = missing or [field for field in fields if field not in known]
    lost = {ours: columns.get(ours, ours) for ours in missing}
    near = columns | {ours: nearest(own, names) or "your name for it" for ours, own in lost.items()}
    shell = ",".join(f"{ours}={theirs}" for ours, theirs in near.items())
    raise PreferenceDataError(
        f"{source}: no column {', '.join(map(repr, lost.values()))}; the columns are "
        f"{sorted(names)}. Rename, pass columns={near}, or, in the notebooks, set "
        f"DPO_COLUMNS={shell!r}"
    )


def checked_pairs(row: Row, kind: tuple, schema: tuple, columns: dict, keep) -> list[dict]:
    """The pairs of a row, with the columns `keep`; raises BadRow where it has a fault."""
    if row.bad:
        raise row.bad
    if not isinstance(row.values, dict):
        found = f"{show(row.values)} where an object with named columns is needed"
        raise BadRow("wrong type", None, found)
    values = our_names(row.values, columns)
    for column in sorted(columns_of(schema[:3]) - values.keys()):
        near = nearest(column, values)
        found = f"found no such key{f' but {near!r}' if near else ''} in {list(row.values)}"
        raise BadRow("missing value", column, found)
    pairs = (pairs_of if kind is PREFERENCES else demonstrations_of)(values, *schema)
    for pair in pairs:
        pair |= {side: as_turns(value, side) for side, value in pair.items() if is_messages(value)}
        check(pair)
        pair |= {column: row.values.get(column) for column in keep}
    for column in keep:
        if (reason := fault_in(row.values.get(column))) in ("invalid UTF-8", "lone surrogate"):
            raise BadRow(reason, column, show(row.values[column]))
    return pairs


def read_pairs(
    source, kind=PREFERENCES, columns=None, keep=(), split="train", revision=None
) -> tuple[str, list[Row]]:
    """Name and rows of a source, each row with its checked pairs or with what is wrong with it."""
    tiny = world.preferences if kind is PREFERENCES else world.demonstrations
    name, rows = read_rows(source, tiny, split, revision)
    columns = columns or {}
    records = [row.values for row in rows if isinstance(row.values, dict) and not row.bad]
    names = {column for values in records for column in values}
    schema = choose_schema(name, names, kind, columns) if records else ()
    if absent := sorted(set(keep) - names):
        raise PreferenceDataError(f"{name}: keep= names {absent}, which no row has. Correct it")
    for row in rows:
        try:
            row.pairs = checked_pairs(row, kind, schema, columns, keep)
        except BadRow as bad:
            row.bad = bad
            bad.column = columns.get(bad.column, bad.column)
    forms = Counter(type(row.pairs[0]["prompt"]) for row in rows if row.pairs)
    usual = max(forms, key=forms.get, default=None)
    for row in rows:
        if row.pairs and type(row.pairs[0]["prompt"]) is not usual:
            form, other = ("text", "messages") if usual is list else ("messages", "text")
            row.bad = BadRow("mixed forms", None, f"found {form} where most rows hold {other}")
            row.pairs = []
    return name, rows
