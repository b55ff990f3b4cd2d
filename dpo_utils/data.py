"""Preference pairs and demonstrations: any source, checked row by row before a model is loaded, split by prompt.

The way of a row: `rows` reads it -> an adapter for its schema makes pairs -> `check` looks at each pair. A row that
fails has one reason of `REASONS`: `load_preferences` refuses it or sets it aside, `audit` counts it.
`python -m dpo_utils.data audit FILE [--json]` reports on a file.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from dpo_utils import schemas
from dpo_utils.rows import COUNTED, BadRow, PreferenceDataError, Row, read_rows, show
from dpo_utils.schemas import Fields, as_turns, is_messages, is_missing

ASSETS = Path(__file__).parent / "assets"


# ---- text ----


def fold(text: str) -> str:
    """Text without what a reader does not see: Unicode form (NFKC), case, runs of space."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def plain_text(value: str | list[dict]) -> str:
    """One string for a text or a list of messages."""
    return value if isinstance(value, str) else "\n".join(turn["content"] for turn in value)


def prompt_key(prompt: str | list[dict]) -> str:
    """What makes two prompts the same question: folded text, system turns left out."""
    return fold(prompt if isinstance(prompt, str) else plain_text([t for t in prompt if t["role"] != "system"]))


# ---- checks: what every pair must be ----


def check(pair: dict) -> None:
    """Raises BadRow for the first thing that is wrong with a pair or a demonstration."""
    for column, value in pair.items():
        for text in texts(value, column):
            check_text(text, column)
    if len({isinstance(value, str) for value in pair.values()}) > 1:
        raise BadRow("mixed forms", None, "found text in one column and messages in another")
    for column, value in pair.items():
        if not isinstance(value, str):
            check_roles(value, column)
    if "chosen" in pair:
        chosen, rejected = plain_text(pair["chosen"]), plain_text(pair["rejected"])
        if fold(chosen) == fold(rejected):
            reason = "identical" if chosen == rejected else "identical after folding"
            raise BadRow(reason, "rejected", show(rejected))


def texts(value: object, column: str) -> list:
    """The texts in a value: itself, or the content of each message."""
    if is_messages(value):
        return [turn["content"] for turn in value]
    if isinstance(value, list):
        raise BadRow("wrong type" if value else "blank", column, show(value))
    return [value]


def check_text(text: object, column: str) -> None:
    """A text with something in it, or BadRow."""
    if is_missing(text):
        raise BadRow("missing value", column, show(text))
    if not isinstance(text, str):
        raise BadRow("wrong type", column, show(text))
    if re.search("[\ud800-\udfff]", text):
        raise BadRow("lone surrogate", column, show(text))
    if "\0" in text:
        raise BadRow("NUL character", column, show(text))
    if not text.strip("\u200b\u200c\u200d\u2060\ufeff \t\r\n") or not text.strip():
        raise BadRow("blank", column, show(text))


def check_roles(turns: list[dict], column: str) -> None:
    """Known roles in an order that a conversation can have, or BadRow."""
    roles = [turn["role"] for turn in turns]
    known = all(role in ("system", "user", "assistant") for role in roles)
    if not known or (roles[-1] == "assistant" if column == "prompt" else roles != ["assistant"]):
        raise BadRow("bad turns", column, f"found the roles {roles}")


# ---- rows -> pairs ----


@dataclass(frozen=True)
class Kind:
    """What rows are read for: columns to make, schemas (a test of the column names, an adapter), bundled sets."""

    fields: tuple[str, ...]
    schemas: tuple[tuple[Callable[[set], bool], Callable[[Fields], list[dict]]], ...]
    bundled: dict[str, Path | Callable]


def tiny_world(name: str) -> Callable:
    """A reader of one of the tiny world's lists: split -> rows."""

    def read(split: str) -> list[dict]:
        from dpo_utils import world  # only the tiny profile needs it

        return getattr(world, name)(split=split)

    return read


PREFERENCES = Kind(
    ("prompt", "chosen", "rejected"),
    (
        ({"question", "answer_0", "answer_1", "score_0", "score_1"}.issubset, schemas.webgpt),
        ({"conversation_a", "conversation_b", "winner"}.issubset, schemas.arena),
        ({"prompt", "responses", "scores"}.issubset, schemas.ranked),
        ({"system", "prompt", "chosen", "rejected"}.issubset, schemas.with_system),
        ({"prompt", "chosen", "rejected"}.issubset, schemas.standard),
        ({"instruction", "chosen", "rejected"}.issubset, schemas.instructed),
        ({"chosen", "rejected"}.__eq__, schemas.transcripts),
    ),
    {"misconceptions": ASSETS / "misconceptions.jsonl", "tiny": tiny_world("preferences")},
)
DEMONSTRATIONS = Kind(
    ("prompt", "completion"),
    (
        ({"prompt", "completion"}.issubset, schemas.completed),
        ({"instruction", "output"}.issubset, schemas.answered),
        ({"instruction", "response"}.issubset, schemas.answered),
        ({"messages"}.issubset, schemas.conversation),
    ),
    {"instructions": ASSETS / "instructions.jsonl", "tiny": tiny_world("demonstrations")},
)


class Outcome(NamedTuple):
    """A row, the pairs it gave, and what is wrong with it, if anything."""

    row: Row
    pairs: list[dict]
    bad: BadRow | None


def parse(rows: list[Row], kind: Kind, columns: dict | None, source: str) -> list[Outcome]:
    """Every row with its pairs or its fault, in order. Raises PreferenceDataError where no schema fits the columns."""
    columns = columns or {}
    names = {name for row in rows if isinstance(row.values, dict) for name in row.values}
    adapt = choose_adapter(names, kind, columns, source) if names else None
    outcomes = []
    for row in rows:
        try:
            outcomes.append(Outcome(row, pairs_of(row, adapt, columns), None))
        except BadRow as bad:
            bad.column = columns.get(bad.column, bad.column)
            outcomes.append(Outcome(row, [], bad))
    return one_form(outcomes)


def pairs_of(row: Row, adapt: Callable, columns: dict) -> list[dict]:
    """The checked pairs of one row; raises BadRow."""
    if row.problem:
        raise row.problem
    if not isinstance(row.values, dict):
        raise BadRow("wrong type", None, f"{show(row.values)} where an object with named columns is needed")
    mapped = {field: row.values[name] for field, name in columns.items() if name in row.values}
    pairs = [
        {field: as_turns(value, field) if is_messages(value) else value for field, value in pair.items()}
        for pair in adapt(Fields(row.values | mapped))
    ]
    for pair in pairs:
        check(pair)
    return pairs


def one_form(outcomes: list[Outcome]) -> list[Outcome]:
    """A data set is all text or all messages: rows in the rarer form are bad rows."""
    forms = Counter(isinstance(outcome.pairs[0]["prompt"], str) for outcome in outcomes if outcome.pairs)
    if len(forms) < 2:
        return outcomes
    text = forms[True] >= forms[False]
    rare, usual = ("messages", "text") if text else ("text", "messages")
    odd = BadRow("mixed forms", None, f"found {rare} where most rows hold {usual}")
    return [
        Outcome(row, [], odd) if pairs and isinstance(pairs[0]["prompt"], str) != text else Outcome(row, pairs, bad)
        for row, pairs, bad in outcomes
    ]


def choose_adapter(names: set[str], kind: Kind, columns: dict, source: str) -> Callable:
    """The adapter whose columns are there; raises PreferenceDataError that names the nearest ones."""
    for wanted in columns.values():
        if wanted not in names:
            near = nearest(wanted, names)
            raise PreferenceDataError(
                f"{source}: columns= names {wanted!r}, but the columns are {sorted(names)}"
                + (f". Did you mean {near!r}?" if near else "")
            )
    names = (names - set(columns.values())) | set(columns)
    for fits, adapt in kind.schemas:
        if fits(names):
            return adapt
    missing = [field for field in kind.fields if field not in names]
    mapping = {field: nearest(field, names) or "your name for it" for field in missing}
    shell = ",".join(f"{ours}={theirs}" for ours, theirs in mapping.items())
    raise PreferenceDataError(
        f"{source}: no column {', '.join(map(repr, missing))}; the columns are {sorted(names)}. "
        f"Rename, pass columns={mapping}, or, in the notebooks, set DPO_COLUMNS={shell!r}"
    )


def nearest(wanted: str, names: set[str]) -> str | None:
    """The name that differs least, case aside."""
    folded = {name.casefold(): name for name in sorted(names)}
    near = difflib.get_close_matches(wanted.casefold(), folded, 1)
    return folded[near[0]] if near else None


# ---- what others call ----


def load_preferences(
    source,
    *,
    split: str = "train",
    columns: dict | None = None,
    on_error: str = "raise",
    keep: tuple[str, ...] = (),
    quarantine: str | Path | None = None,
    revision: str | None = None,
) -> Dataset:
    """Preference pairs in TRL's format: prompt, chosen, rejected, all text or all message lists.

    source: a .json .jsonl .csv .parquet file, "misconceptions", "tiny", a hub id, or rows in memory.
    columns: our names -> the file's own. keep: extra columns to carry along.
    on_error: "raise" refuses the first bad row; "skip" writes bad rows with reasons to `quarantine`.
    Ties make no pair and are counted. Raises PreferenceDataError.
    """
    options = {"split": split, "columns": columns, "on_error": on_error}
    return load(PREFERENCES, source, **options, keep=keep, quarantine=quarantine, revision=revision)


def load_demonstrations(source, **options) -> Dataset:
    """Demonstrations for SFT in TRL's format: prompt, completion. Options and errors: `load_preferences`.

    Bundled: "instructions", "tiny".
    """
    return load(DEMONSTRATIONS, source, **options)


def load(kind: Kind, source, *, split="train", columns=None, on_error="raise", keep=(), quarantine=None, revision=None) -> Dataset:
    """What load_preferences and load_demonstrations share."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    name, rows = read_rows(source, split, revision, kind.bundled)
    outcomes = parse(rows, kind, columns, name)
    faults = [outcome for outcome in outcomes if outcome.bad and outcome.bad.reason not in COUNTED]
    if faults and on_error == "raise":
        first = faults[0].row.describe(name, faults[0].bad)
        raise PreferenceDataError(f'{first}; {len(faults)} bad of {len(rows)} rows. on_error="skip" sets them aside')
    counts = Counter(outcome.bad.reason for outcome in outcomes if outcome.bad)
    for column in keep:
        if not any(column in outcome.row.values for outcome in outcomes if outcome.pairs):
            raise PreferenceDataError(f"{name}: keep= names {column!r}, which no row has. Correct it or leave it out")
    pairs = [pair | {column: row.values.get(column) for column in keep} for row, found, _ in outcomes for pair in found]
    if counts:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        aside = f"; set aside in {set_aside(name, faults, quarantine)}" if faults else ""
        print(f"{name}: {len(rows)} rows read, {len(rows) - counts.total()} kept, {counts.total()} dropped ({reasons}){aside}")
    if not pairs:
        raise PreferenceDataError(f"{name}: no row is left of {len(rows)}. Mend the rows, or name another source")
    return Dataset.from_list(pairs)


def set_aside(source: str, faults: list[Outcome], quarantine: str | Path | None) -> Path:
    """Writes the bad rows with their reasons as JSON lines, next to the source unless told where."""
    near = Path(source) if Path(source).is_file() else Path(source.replace("/", "--").replace(" ", "_"))
    path = Path(quarantine or near.with_name(near.name + ".quarantine.jsonl"))
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise PreferenceDataError(f"{path}: bad rows cannot be written here, {error}. Pass quarantine=") from None
    with file:
        for row, _, bad in faults:
            record = {
                "row": row.number,
                "line": row.line,
                "column": bad.column,
                "reason": bad.reason,
                "found": bad.found,
                "data": row.values,
            }
            file.write(json.dumps(record, default=repr) + "\n")
    return path


def split_by_prompt(dataset: Dataset, held_out: float = 0.2, seed: int = 0) -> tuple[Dataset, Dataset]:
    """(train, test): `held_out` of the distinct folded prompts, all their rows, go to test.

    Which ones depends on the prompts and the seed alone, not on the order of rows. Raises ValueError.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: a share between 0 and 1 is needed")
    keys = [prompt_key(prompt) for prompt in dataset["prompt"]]
    order = sorted(set(keys), key=lambda key: hashlib.sha256(f"{seed}\n{key}".encode()).digest())
    if len(order) < 2:
        raise PreferenceDataError("one distinct prompt cannot be split in two. Add rows with other prompts")
    test = set(order[: min(max(round(held_out * len(order)), 1), len(order) - 1)])
    sides = [dataset.select([i for i, key in enumerate(keys) if (key in test) == side]) for side in (False, True)]
    overlap = set(map(prompt_key, sides[0]["prompt"])) & set(map(prompt_key, sides[1]["prompt"]))
    assert not overlap, f"prompts on both sides: {sorted(overlap)[:3]}"
    return sides[0], sides[1]


def audit(dataset, *args, **options):
    """What is wrong with a data set, counted: see `dpo_utils.audit.audit`."""
    from dpo_utils.audit import audit as run  # audit imports this file

    return run(dataset, *args, **options)


# ---- command line ----


def column_name(text: str) -> tuple[str, str]:
    """`prompt=Question` on a command line as (our name, the file's own)."""
    ours, _, theirs = text.partition("=")
    if not (ours and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OURS=THEIRS, as in --column prompt=Question")
    return ours, theirs


def columns_asked_for() -> dict | None:
    """`DPO_COLUMNS`, as in `prompt=Question,chosen=Best Answer`: our names -> the file's own; None if it is not set."""
    named = os.environ.get("DPO_COLUMNS")
    try:
        return dict(column_name(part) for part in named.split(",")) if named else None
    except argparse.ArgumentTypeError:
        raise ValueError(
            f"DPO_COLUMNS={named!r}: write OURS=THEIRS with commas between, as in prompt=Question,chosen=Good"
        ) from None


if __name__ == "__main__":
    from dpo_utils.audit import main

    raise SystemExit(main())
