"""Rows -> pairs: cells become text or messages first, and then the shape of a row is looked for.

What others call their columns, roles and votes is in assets/names.toml.
"""

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from itertools import permutations, takewhile

from dpo_utils import world
from dpo_utils.cells import (
    CONTENT,
    body,
    check_text,
    filled,
    flat,
    follow,
    is_plain,
    is_talk,
    listed,
    normal,
    parsed,
    plain_text,
)
from dpo_utils.rows import TABLES, BadRow, PreferenceDataError, Rows, read_rows

# what is read, by the columns that come out
PREFERENCES, DEMONSTRATIONS = ("prompt", "chosen", "rejected"), ("prompt", "completion")
PROMPTS = ("prompt",)
WORDS = {kind: words.split() for kind, words in TABLES["words"].items()}
THUMBS = dict.fromkeys(WORDS["yes"], True) | dict.fromkeys(WORDS["no"], False)
LABEL = re.compile(r"(.*?)(?:[ _.-]|(?=\d)|^)([ab]|\d+|chosen|rejected)", re.IGNORECASE)
NUMBER = re.compile(r"\s*[-+]?\d*\.?\d+(e[-+]?\d+)?\s*", re.IGNORECASE)


def thumb(value, column: str = "label") -> bool:
    """True for a thumb up, False for one down; raises BadRow for what is neither."""
    if (found := THUMBS.get(str(value).strip().casefold())) is None:
        raise BadRow("not a label", column, value)
    return found


@dataclass
class Shape:
    """How the rows of a source are read; names are the source's own."""

    columns: dict[str, str]  # our name -> the source's
    answers: dict | str = ""  # {label: column}, or one column that holds a list
    scores: dict | str = ""  # {label: column}, or one column that holds a list or a vote
    implicit: bool = False  # the prompt is what the answers begin with
    more: tuple = ()  # columns of text that follow the prompt
    chat: bool = False  # a row has a system turn or a history: all become messages

    def get(self, row: dict, name: str) -> object:
        """The cell of a row by our name of its column."""
        return row.get(self.columns.get(name))


def joined(asked: list[dict], talks: list, column: str, notes: set) -> tuple[list, list]:
    """The prompt, from a column and from what all answers begin with, and the last turns."""
    rounds = zip(*(talk[:-1] for talk in talks), strict=False)
    shared = [turns[0] for turns in takewhile(lambda t: t.count(t[0]) == len(t), rounds)]
    if any(len(talk) > len(shared) + 1 for talk in talks):
        raise BadRow("diverged early", None, talks)
    own, begun = body(asked), body(shared)
    if own and (not begun or own[-len(begun) :] == begun):
        begun = own
    elif own and begun[0]["role"] == "assistant":
        begun = own + begun
    missing = [t for t in own if str(t["content"]).strip() not in plain_text(begun)]
    notes.update([f"not used: {column}"] * bool(missing))
    system = shared[: len(shared) - len(body(shared))]
    return follow(asked[: len(asked) - len(own)], system + begun, column), [t[-1:] for t in talks]


def name_parts(name: str) -> tuple[str, str]:
    """("response", "a") for response_a; ("score", "chosen") for score_chosen or chosen_score."""
    turned = "_".join(re.split("[_-]", name, maxsplit=1)[::-1])
    found = LABEL.fullmatch(name) or LABEL.fullmatch(turned)
    return (found[1].casefold(), found[2].casefold()) if found else (name, "")


def votes(value: object, labels: tuple, inner=False) -> list[float] | None:
    """Points that one or several votes give to each answer; None for what is no vote."""
    value = parsed(value) if isinstance(value, str) and value[:1] == "{" else listed(value)
    if isinstance(value, dict):  # Argilla, Label Studio
        return votes(value.get("selected", value.get("value")), labels, True)
    if isinstance(value, list):  # votes of several people; inside one, a ranking
        ranks = [one.get("rank") if isinstance(one, dict) else None for one in value]
        worth = [-(rank or n) if rank or inner else 1 for n, rank in enumerate(ranks)]
        each = [votes(one, labels, True) or [] for one in value]
        sums = [[w * v for v in vote] for w, vote in zip(worth, each, strict=True)]
        return list(map(sum, zip(*sums, strict=True))) if all(each) and each else None
    text = str(value).strip().casefold().removesuffix(".0")
    if re.match(r"(tie|both|equal|same|draw|neither)\b", text):
        return [0.0] * len(labels)
    stem, label = name_parts({"left": labels[0], "right": labels[1]}.get(text, text))
    known = label in labels and stem in ("", "model", "assistant", *WORDS["answers"])
    return [float(label == one) for one in labels] if known else None


def answers_of(row: dict, shape: Shape) -> tuple[list, list[float]]:
    """The answers of a row and the score of each; raises BadRow where one has none."""
    answers, scores = shape.answers, shape.scores
    column = " and ".join(scores.values()) if isinstance(scores, dict) else scores or "score"
    points = [row.get(s) for s in scores.values()] if isinstance(scores, dict) else row.get(scores)
    if isinstance(answers, dict):
        texts, labels = [row.get(name) for name in answers.values()], tuple(answers)
        if not scores or ("chosen" in labels and not any(map(filled, points))):
            return texts, [1, 0]
    elif not isinstance(texts := listed(row.get(answers)), list):
        raise BadRow("wrong type", answers, texts)
    else:
        labels = tuple(map(str, range(len(texts))))
        made = [text for text in texts if isinstance(text, dict) and "role" not in text]
        if made and not scores:
            column = next((key for key in WORDS["score"] if key in made[0]), column)
            points = [one.get(column) for one in made]
        keys = [next((k for k in WORDS["text"] if t in made and k in t), None) for t in texts]
        texts = [t[key] if key else t for t, key in zip(texts, keys, strict=True)]
    vote = scores and scores == shape.columns.get("winner")
    numbers = votes(points, labels) if vote and len(labels) > 1 else listed(points)
    numbers = numbers if isinstance(numbers, list) else []
    if all(isinstance(number, str) for number in numbers):
        numbers = [float(number) for number in numbers if NUMBER.fullmatch(number)]
    sound = [n for n in numbers if type(n) in (int, float) and n == n]
    if not len(sound) == len(numbers) == len(texts):
        raise BadRow("missing score", column, listed(points))
    if len(set(numbers)) < 2:
        raise BadRow("tied scores", column, points)
    if not vote and re.search(r"(^|[ _-])rank", column):  # the lowest is the best
        numbers = [-number for number in numbers]
    if "chosen" in labels and numbers[0] < numbers[1]:
        raise BadRow("scores contradict", column, numbers)
    return texts, numbers


def before(row: dict, shape: Shape, notes: set) -> list[dict]:
    """The system turn and the history that have columns of their own."""
    system, said = shape.get(row, "system"), listed(shape.get(row, "history"))
    said = normal(said, "history", notes) if filled(said) else []
    if isinstance(said, list) and all(isinstance(pair, list) for pair in said):
        texts = [text for pair in said for text in pair]  # [[question, answer], ...]
        said = [{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(texts)]
    if said and not is_talk(said):
        notes.add(f"not used: {shape.columns['history']}")
    turns = [{"role": "system", "content": system}] if filled(system) else []
    return turns + said if is_talk(said) else turns


def pairs_of(row: dict, shape: Shape, notes: set) -> list[dict]:
    """The pairs of a row, one for every strict gap in score; of one answer a demonstration."""
    asked = shape.columns.get("prompt", "prompt")
    question = normal(row.get(asked), asked, notes)
    for column in (name for name in shape.more if filled(row.get(name))):
        check_text(question, asked)
        check_text(row[column], column)
        question += f"\n\n{row[column]}"
    texts, points = answers_of(row, shape) if shape.answers else ([], [])
    names = shape.answers.values() if isinstance(shape.answers, dict) else [asked] * len(texts)
    texts = [normal(text, name, notes) for text, name in zip(texts, names, strict=True)]
    spoken = [is_talk(text) for text in texts]
    talk = question if is_talk(question) else [{"role": "user", "content": question}]
    talk = [] if question is None and shape.implicit else talk
    if talk[-1:] == [{"role": "assistant", "content": ""}]:  # a transcript that ends in Assistant:
        talk.pop()
    if texts and all(spoken):
        question = talk
        if shape.implicit or any(t["role"] != "assistant" for text in texts for t in text):
            question, texts = joined(talk, texts, asked, notes)
    elif shape.implicit:
        raise BadRow("not a transcript", next(iter(names)), texts[0])
    elif not any(spoken) and (shape.chat or is_talk(question)):
        question, texts = talk, [[{"role": "assistant", "content": text}] for text in texts]
    if shape.chat and isinstance(question, list):
        question = follow(before(row, shape, notes), question, shape.columns.get("system", asked))
    if len(texts) < 2:
        return [dict(zip(DEMONSTRATIONS, (question, *texts), strict=False))]
    notes.update(["some scores tied"] * (len(set(points)) < len(points)))
    return [
        {"prompt": question, "chosen": better, "rejected": worse}
        for (high, better), (low, worse) in permutations(zip(points, texts, strict=True), 2)
        if high > low
    ]


def checked(pair: dict, columns: dict) -> dict:
    """A pair or a demonstration; raises BadRow for the first thing that is wrong with it."""
    for ours, value in pair.items():
        column, turns = columns.get(ours, ours), value if is_talk(value) else []
        texts = [turn["content"] for turn in turns if turn["content"] or "tool_calls" not in turn]
        for text in texts if turns else [value]:
            check_text(text, column)
        roles = [turn["role"] for turn in turns]
        fits = roles[-1:] != ["assistant"] if ours == "prompt" else roles in ([], ["assistant"])
        if not fits or not {"system", "user", "assistant", "tool"}.issuperset(map(str, roles)):
            raise BadRow("bad turns", column, roles)
    if len(set(map(type, pair.values()))) > 1:
        raise BadRow("mixed forms", None, pair)
    if "chosen" in pair and pair["chosen"] == pair["rejected"]:
        raise BadRow("identical", columns.get("rejected"), plain_text(pair["rejected"]))
    return pair


def speaks(value: object) -> bool:
    """Whether a cell holds messages, in whatever form."""
    try:
        return is_talk(normal(value, "", set()))
    except BadRow:  # messages with a fault
        return True


def shape_of(source: str, rows: list[dict], kind: tuple, asked: dict) -> Shape:
    """The shape of the rows; raises PreferenceDataError with the nearest names."""
    names, columns, groups = set().union(*rows), dict(asked), {}
    free = names - set(asked.values())
    for ours, others in TABLES["columns"].items():
        known = [own for name in (ours, *others.split()) for own in (name, f"{name}.responses")]
        known = [own for own in known if own in free and ours not in asked]
        columns |= {ours: known[0]} if known else {}
    for name in sorted(free):
        stem, label = name_parts(name)
        groups.setdefault(stem, {})[label] = name
    shape, sides = Shape(columns), {side: columns[side] for side in kind[1:] if side in columns}
    stems = WORDS["answers"] if kind == PREFERENCES else ()
    for group in (sides, *(groups.get(stem, {}) for stem in stems)):
        paired = set(kind[1:]) <= group.keys()
        group = {side: group[side] for side in kind[1:]} if paired else group
        marks = [groups.get(stem, {}) for stem in WORDS["scores"]]
        scored = [{k: mark[k] for k in group} for mark in marks if group.keys() <= mark.keys()]
        scores = scored[0] if scored else "" if paired else columns.get("winner", "")
        if len(group) > (kind == PREFERENCES) and (scores or paired):
            shape.answers, shape.scores = group, scores
            break
    else:
        if kind == DEMONSTRATIONS and "talk" in columns:
            shape.answers, shape.implicit = {"completion": columns["talk"]}, True
            columns["prompt"] = columns["prompt"] if columns["prompt"] != columns["talk"] else ""
        elif kind == PREFERENCES and "responses" in columns:
            shape.answers = columns["responses"]
            shape.scores = columns.get("scores", columns.get("winner", ""))
    if isinstance(shape.answers, dict) and not columns.get("prompt"):
        some = [row.get(name) for row in rows[:50] for name in shape.answers.values()]
        shape.implicit |= names == {"chosen", "rejected"} or any(map(speaks, some))
    lost = {ours: theirs for ours, theirs in asked.items() if theirs not in names}
    asks = shape.implicit or "prompt" in columns
    if lost or not (asks and (shape.answers or kind == PROMPTS)):
        missing = kind[:1] if shape.answers else kind
        lost = lost or {name: name for name in missing if name not in columns}
        folded = {name.casefold(): name for name in sorted(names)}
        near = {o: difflib.get_close_matches(own.casefold(), folded, 1) for o, own in lost.items()}
        hint = asked | {o: folded[n[0]] if n else "your name for it" for o, n in near.items()}
        shell = ",".join(f"{ours}={theirs}" for ours, theirs in hint.items())
        what = f"no column {', '.join(map(repr, lost.values()))}; the columns are {sorted(names)}"
        how = f"pass columns={hint}, or set DPO_COLUMNS={shell!r} (--column in a shell)"
        raise PreferenceDataError(f"{source}: {what}. Rename, or {how}")
    if columns.get("prompt") == "instruction":
        shape.more = tuple(name for name in ("input", "context") if name in names)
    beside = {columns.get("system"), columns.get("history")} - {columns.get("prompt"), None}
    shape.chat = any(filled(row.get(name)) for name in beside for row in rows)
    return shape


def kept_of(row: dict, own: dict, kind: tuple) -> dict:
    """The extra columns of a row; the label of an unpaired answer is True or False."""
    for name, value in (kept := {name: row.get(column) for name, column in own.items()}).items():
        if name == "label" and kind == DEMONSTRATIONS:
            kept[name] = thumb(value, own[name])
        elif isinstance(value, str) and value.strip():
            check_text(value, own[name])
    return kept


def read_pairs(source, kind=PREFERENCES, columns=None, keep=(), **where) -> Rows:
    """The rows of a source, with their checked pairs or with what is wrong with them."""
    tiny = world.preferences if kind == PREFERENCES else world.demonstrations
    rows = read_rows(source, tiny, **where)
    good = {n: flat(row) for n, row in enumerate(rows.values, 1) if n not in rows.bad}
    rows.pairs, names = {name: [] for name in (*kind, *keep)}, set().union(*good.values())
    shape = shape_of(rows.name, [*good.values()], kind, columns or {}) if good else Shape({})
    if absent := sorted(set(keep) - names - shape.columns.keys()):
        what = f"keep= names {absent}, which no row has"
        raise PreferenceDataError(f"{rows.name}: {what}. Correct it")
    own = {name: shape.columns.get(name, name) for name in keep}
    used = [shape.columns.get(name) for name in ("prompt", "system", "history")]
    label = shape.columns.get("label") if kind == DEMONSTRATIONS else None
    content = {n for n in names if CONTENT.fullmatch(n) or n == label}
    content -= {*used, *shape.more, *own.values()}
    special = content or keep or shape.more or shape.scores or shape.implicit or shape.chat
    special = special or isinstance(shape.answers, str)
    plain = [] if special else [shape.columns["prompt"], *shape.answers.values()]
    for number, row in good.items():
        pairs, notes = [], set()
        if plain and is_plain(texts := [row.get(name) for name in plain]):
            pairs = [dict(zip(kind, texts, strict=True))]
        else:
            notes.update(f"not used: {name}" for name in content if filled(row.get(name)))
            try:
                kept = kept_of(row, own, kind)
                found = pairs_of(row, shape, notes)
                pairs = [checked(pair, shape.columns) | kept for pair in found]
            except BadRow as bad:
                rows.bad[number] = bad
        for pair in pairs:
            rows.numbers.append(number)
            for name, value in pair.items():
                rows.pairs[name].append(value)
        for note in notes if pairs else ():
            rows.notes.setdefault(note, []).append(number)
    forms = list(map(type, rows.pairs["prompt"]))
    if len(counts := Counter(forms)) > 1:
        most = max(counts, key=counts.get)
        for number, prompt in zip(rows.numbers, rows.pairs["prompt"], strict=True):
            if type(prompt) is not most:
                rows.bad[number] = BadRow("mixed forms", "prompt", prompt)
        rows.keep([n for n, form in enumerate(forms) if form is most])
    rows.bad = dict(sorted(rows.bad.items()))
    return rows
