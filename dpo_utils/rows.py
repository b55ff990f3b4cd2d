"""Records of any source: files, the hub, memory. Each keeps its number, and why it gives no
pair.
"""

import csv
import difflib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, load_dataset

REASONS = {  # why a row cannot be used -> what to do about it
    "broken row": "Repair the line",
    "missing value": "Fill it in or remove the row",
    "wrong type": "Write it as text, or as a list of {'role', 'content'} messages",
    "NUL character": "Remove the character \\x00",
    "invalid UTF-8": "Save the file as UTF-8",
    "lone surrogate": "Write the whole character, not half of a surrogate pair",
    "blank": "Write the text or remove the row",
    "mixed forms": "Write every row as text, or every row as messages",
    "bad turns": "Let the user speak last in the prompt, and the assistant once in an answer",
    "unknown label": "Use model_a, model_b, tie or tie (bothbad)",
    "missing score": "Give one number for each response",
    "scores contradict": "Swap the two answers or correct their scores",
    "identical": "Remove the row: it prefers an answer to itself",
    "identical after folding": "Remove the row: only case, spacing or Unicode form differ",
    "tied scores": "No preference, no pair",
    "parted early": "The conversations differ before the last answer, so they share no prompt",
}
COUNTED = ("tied scores", "parted early")  # no fault of the file: counted, never an error
BUNDLED = {
    name: Path(__file__).parent / "assets" / f"{name}.jsonl"
    for name in ("misconceptions", "instructions")
}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
REMEDIES = {  # what the reader of a source raises -> what to do about it
    OSError: "Connect once to fill the cache, or use a local file or a bundled set",
    csv.Error: "Close the quote, and double those inside the text",
    RuntimeError: "Try revision='refs/convert/parquet', which needs no script",
    ValueError: "Correct the file (one object a line is .jsonl) or pass another split=",
}


class PreferenceDataError(ValueError):
    """Data that cannot be used; names the source, the row, what was found, and the remedy."""


class BadRow(Exception):
    """Why one row cannot be used: a reason of `REASONS`, the column, and what was found there."""

    def __init__(self, reason: str, column: str | None, found: str):
        self.reason, self.column, self.found = reason, column, found


@dataclass
class Row:
    """One record of a source, and then its pairs or why it gives none."""

    values: object
    line: int | None = None  # in the file; of a .csv record the last one
    bad: BadRow | None = None
    pairs: list[dict] = field(default_factory=list)
    number: int = 0  # 1-based place in the source


def show(value: object) -> str:
    """What was found: the value, cut to 60 characters, and its type."""
    text = repr(value)
    return f"found {text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file. Cells of a .csv file stay text: NA and None are answers."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from map(Row, pyarrow.parquet.read_table(path).to_pylist())
        return
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        if suffix == ".csv":
            reader = csv.DictReader(file, strict=True)
            if len(set(reader.fieldnames)) < len(reader.fieldnames):
                raise ValueError(f"two columns have one name in {reader.fieldnames}")
            for values in reader:
                extra = BadRow("broken row", None, f"cells without a column: {values.get(None)}")
                yield Row(values, reader.line_num, extra if None in values else None)
        elif suffix == ".json":
            data = json.load(file)
            rows = data.get("data") if isinstance(data, dict) else data
            if not isinstance(rows, list):
                raise ValueError('it holds no array of rows, on its own or as {"data": [rows]}')
            yield from map(Row, rows)
        else:
            for line, text in enumerate(file, 1):
                try:
                    if not text.isspace():
                        yield Row(json.loads(text), line)
                except (ValueError, RecursionError) as error:
                    yield Row(text, line, BadRow("broken row", None, f"not JSON: {error}"))


def read_hub(name: str, split: str, revision: str | None) -> Iterator[Row]:
    """The rows of a hub data set."""
    yield from map(Row, load_dataset(name, split=split, revision=revision).to_list())


def read_rows(source, tiny, split: str, revision: str | None) -> tuple[str, list[Row]]:
    """Name and rows of a file, a bundled set, a hub id or rows in memory."""
    name = str(source) if isinstance(source, str | Path) else "rows in memory"
    path = BUNDLED.get(name, Path(name))
    if name == "tiny":
        reader = map(Row, tiny(split=split))
    elif not path.is_file() and path.suffix not in SUFFIXES and name.count("/") == 1:
        reader = read_hub(name, split, revision)
    elif split != "train":
        raise PreferenceDataError(f"{name}: no split {split!r}, only 'train'. Use split_by_prompt")
    elif name == "rows in memory":
        reader = map(Row, source.to_list() if isinstance(source, Dataset) else source)
    elif not path.is_file() or path.suffix.lower() not in SUFFIXES:
        missing = f"no such file, seen from {Path.cwd()}"
        problem = f"unknown suffix {path.suffix!r}" if path.is_file() else missing
        near = nearest(name, [*BUNDLED, "tiny"])
        kinds = f"a {', '.join(SUFFIXES)} file or a hub id (owner/name)"
        remedy = f"Did you mean {near!r}" if near else f"Give {kinds}"
        raise PreferenceDataError(f"{name}: {problem}. {remedy}")
    else:
        reader = read_file(path) if path.stat().st_size else ()
    rows = []
    try:
        for row in reader:
            rows.append(row)
            row.number = len(rows)
    except tuple(REMEDIES) as error:
        remedy = next(text for kind, text in REMEDIES.items() if isinstance(error, kind))
        problem, place = " ".join(str(error).split()), f", after row {len(rows)}" if rows else ""
        raise PreferenceDataError(f"{name}{place}: cannot be read, {problem}. {remedy}") from None
    if not rows:
        raise PreferenceDataError(f"{name}: empty, it holds no rows. Name another source")
    return name, rows


def nearest(wanted: str, names: Iterable[str]) -> str | None:
    """The name that differs least, case aside."""
    folded = {name.casefold(): name for name in sorted(names)}
    near = difflib.get_close_matches(wanted.casefold(), folded, 1)
    return folded[near[0]] if near else None
