"""Rows of any source: files, the hub, memory. Each row keeps its number, its line, and why it could not be read.

Beside the pipeline and without imports from it; `data` turns rows into pairs.
"""

import csv
import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset

# Why a row cannot be used -> what to do about it. A row is counted under the first reason that holds.
REASONS = {
    "broken row": "Repair the line",
    "invalid UTF-8": "Save the file as UTF-8",
    "missing value": "Fill it in or remove the row",
    "wrong type": "Write it as text, or as a list of {'role', 'content'} messages",
    "mixed forms": "Write every row as text, or every row as messages",
    "blank": "Write the text or remove the row",
    "NUL character": "Remove the character \\x00",
    "lone surrogate": "Remove the half of a surrogate pair, or write the whole character",
    "bad turns": "Use the roles system, user, assistant; end the prompt with the user; give one assistant turn",
    "unknown label": "Use model_a, model_b, tie or tie (bothbad)",
    "missing score": "Give one number for each response",
    "scores contradict": "Swap the two answers or correct their scores",
    "identical": "Remove the row: it prefers an answer to itself",
    "identical after folding": "Remove the row: the answers differ in case, spacing or Unicode form only",
    "tied scores": "No preference, no pair",
    "parted early": "The conversations part before the last answer, so they share no prompt",
}
COUNTED = ("tied scores", "parted early")  # no fault of the file: dropped and counted, never an error


class PreferenceDataError(ValueError):
    """Data that cannot be used; the message names file, row, column, what was found, and the fix."""


class BadRow(Exception):
    """One row, or one answer in it, cannot be used: a reason of `REASONS`, its column, what was found."""

    def __init__(self, reason: str, column: str | None, found: str):
        super().__init__(reason, column, found)
        self.reason, self.column, self.found = reason, column, found


@dataclass(frozen=True)
class Row:
    """One record as read: its 1-based number, its values, the file's line, and why it could not be read, if so."""

    number: int
    values: object
    line: int | None = None
    problem: BadRow | None = None

    def describe(self, source: str, bad: BadRow) -> str:
        """One line: source, row, line, column, reason, what was found, the fix."""
        line = f" (line {self.line})" if self.line else ""
        column = f", column {bad.column!r}" if bad.column else ""
        return f"{source}, row {self.number}{line}{column}: {bad.reason}, {bad.found}. {REASONS[bad.reason]}"


def show(value: object) -> str:
    """What was found: the value, cut to 60 characters, and its type."""
    text = repr(value)
    return f"found {text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def decode(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at position {error.start + 1} of line {number}"
        raise BadRow("invalid UTF-8", None, found) from None


def read_json(path: Path) -> Iterator[Row]:
    """An array of objects, or an object that holds one under "data"."""
    try:
        with path.open("rb") as file:
            data = json.loads("".join(decode(line, number) for number, line in enumerate(file, 1)))
    except BadRow as bad:
        raise PreferenceDataError(f"{path}: {bad.reason}, {bad.found}. {REASONS[bad.reason]}") from None
    except (ValueError, RecursionError) as error:
        hint = ". One object a line? Then name it .jsonl" if "Extra data" in str(error) else ""
        raise PreferenceDataError(f"{path}: broken JSON, {error}{hint}") from None
    records = data.get("data") if isinstance(data, dict) else data
    if not isinstance(records, list):
        raise PreferenceDataError(f'{path}: {show(data)}; a .json file holds an array of rows, or {{"data": [rows]}}')
    yield from number(records)


def read_jsonl(path: Path) -> Iterator[Row]:
    """One object a line; blank lines do not count as rows."""
    count = 0
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            count += 1
            try:
                yield Row(count, json.loads(decode(data, line)), line)
            except BadRow as bad:
                yield Row(count, repr(data), line, bad)
            except (ValueError, RecursionError) as error:
                yield Row(count, data.decode(), line, BadRow("broken row", None, f"not JSON on line {line}: {error}"))


def read_csv(path: Path) -> Iterator[Row]:
    """Cells stay text: an answer that reads NA or None is an answer. Invalid bytes travel as lone surrogates."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader((line.replace("\r\n", "\n") for line in file), strict=True)
        header, count, line = None, 0, 1
        while True:
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if header is None or "unexpected end of data" in str(error):  # what follows cannot be told apart
                    fix = "Close the quote that opens there"
                    raise PreferenceDataError(f"{path}, line {line}: {error}. {fix}") from None
                cells = BadRow("broken row", None, f"lines {line} to {reader.line_num}: {error}")
            if cells is None:
                return
            if header is None:
                header = header_of(path, cells)
            elif cells:
                count += 1
                yield csv_row(count, header, cells, line)
            line = reader.line_num + 1


def header_of(path: Path, cells: list[str]) -> list[str]:
    if len(set(cells)) < len(cells):
        raise PreferenceDataError(f"{path}, line 1: two columns have one name in {cells}. Rename one")
    return cells


def csv_row(number: int, header: list[str], cells: list[str] | BadRow, line: int) -> Row:
    if isinstance(cells, BadRow):
        return Row(number, None, line, cells)
    bad = next((cell for cell in cells if re.search("[\udc80-\udcff]", cell)), None)
    if bad is not None:
        return Row(number, cells, line, BadRow("invalid UTF-8", None, f"on line {line}, {show(bad)}"))
    if len(cells) != len(header):
        return Row(number, cells, line, BadRow("broken row", None, f"{len(cells)} cells under {len(header)} columns"))
    return Row(number, dict(zip(header, cells, strict=True)), line)


def read_parquet(path: Path) -> Iterator[Row]:
    try:
        batches = pyarrow.parquet.ParquetFile(path).iter_batches()
        records = (record for batch in batches for record in batch.to_pylist())
        yield from number(records)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise PreferenceDataError(f"{path}: not a readable parquet file, {error}") from None


READERS = {".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".parquet": read_parquet}


def number(records: Iterable) -> Iterator[Row]:
    """Rows 1, 2, 3 ... of records that come from no file."""
    return (Row(count, record) for count, record in enumerate(records, 1))


def read_hub(name: str, split: str, revision: str | None) -> Dataset:
    """A split of a hub data set; what goes wrong is told in one line, with what to do."""
    try:
        return load_dataset(name, split=split, revision=revision)
    except OSError as error:  # no network, offline mode, no such repository, no access
        fix = "Connect once to fill the cache, or use a local file or a bundled set (misconceptions, tiny)"
        raise PreferenceDataError(f"{name}: not in the cache and not reached on the hub, {error}. {fix}") from None
    except ValueError as error:  # an unknown split, a set with several configurations
        raise PreferenceDataError(f"{name}, split {split!r}: {error}. Pass another split=") from None
    except RuntimeError as error:  # a set that is a script
        raise PreferenceDataError(f"{name}: {error}. Try revision='refs/convert/parquet'") from None


def read_file(path: Path) -> Iterable[Row]:
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise PreferenceDataError(f"{path}: suffix {path.suffix!r} is none of {', '.join(READERS)}. Convert it")
    return reader(path) if path.stat().st_size else []


def read_rows(
    source, split: str = "train", revision: str | None = None, bundled: dict[str, Path | Callable] | None = None
) -> tuple[str, list[Row]]:
    """Name and rows of rows in memory, a bundled set, a local file or a hub id. Raises PreferenceDataError."""
    bundled = bundled or {}
    name = str(source) if isinstance(source, str | Path) else "rows in memory"
    path = bundled.get(name, Path(name))
    if callable(path):
        rows = number(path(split=split))
    elif (
        name != "rows in memory"
        and not path.is_file()
        and re.fullmatch(r"[\w.-]+/[\w.-]+", name)
        and path.suffix.lower() not in READERS
    ):
        rows = number(read_hub(name, split, revision))
    elif split != "train":
        raise PreferenceDataError(f"{name}: no split {split!r}, all of it is 'train'. Use split_by_prompt to part it")
    elif name == "rows in memory":
        rows = number(source)
    elif path.is_file():
        rows = read_file(path)
    else:
        near = difflib.get_close_matches(name, bundled, 1)
        fix = f"Did you mean {near[0]!r}" if near else f"Give a file, a hub id (owner/name) or one of {sorted(bundled)}"
        raise PreferenceDataError(f"{name}: no such file, seen from {Path.cwd()}. {fix}")
    rows = list(rows)
    if not rows:
        raise PreferenceDataError(f"{name}: empty, it holds no rows. Fill it or name another source")
    return name, rows
