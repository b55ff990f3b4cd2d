"""Records of any source: a file, the hub, memory. Each keeps its row number and its line."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset, load_dataset

from dpo_utils.profiles import ASSETS

COUNTED = ("tied scores", "diverged early")  # rows without a preference: counted, never an error
REMEDIES = {  # why a row cannot be used -> what to do, where 'Correct or remove it' is not enough
    "wrong type": "Write text, or a list of {'role', 'content'} messages",
    "invalid UTF-8": "Save the file as UTF-8",
    "mixed forms": "Write every row as text, or every row as messages",
    "bad turns": "Let the user speak last in the prompt, and the assistant once in an answer",
    "not a transcript": "Name the column of the prompt, or open the text with \\n\\nHuman:",
    "missing score": "Give each response a number, or a winner: model_a, model_b, tie",
}
BUNDLED = {path.stem: path for path in ASSETS.glob("*.jsonl")}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
FILE_REMEDIES = {".json": "Correct it; one object a line is .jsonl", ".csv": "Close the quote"}
HUB_REMEDY = "Connect once, use a local file, another split=, or revision='refs/convert/parquet'"


class PreferenceDataError(ValueError):
    """Data that cannot be used; names the source, the row, what was found, and the remedy."""


class BadRow(Exception):
    """Why one row gives no pair: the reason, the column, and the value found there."""

    def __init__(self, reason: str, column: str | None, value: object):
        self.reason, self.column = reason, column
        self.found = f"{value!r:.60} ({type(value).__name__})"


@dataclass(slots=True)
class Row:
    """One record of a source, and then its pairs or why it gives none."""

    values: object
    line: int | None = None  # in the file; the last one of a .csv record
    bad: BadRow | None = None
    pairs: list[dict] = field(default_factory=list)
    number: int = 0  # 1-based place in the source


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file. Cells of a .csv file stay text: NA and None are answers."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from map(Row, pyarrow.parquet.read_table(path).to_pylist())
        return
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        if suffix == ".csv":
            yield from read_csv(file)
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
                    yield Row(text, line, BadRow("broken row", None, str(error)))


def read_csv(file) -> Iterator[Row]:
    """One row a record; a record of another length than the header is a bad row."""
    reader = csv.reader(file, strict=True)
    names = next(reader, [])
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name in {names}")
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote never closes: what follows is lost
                raise
            yield Row(None, reader.line_num, BadRow("broken row", None, str(error)))
            continue
        if cells is None:
            return
        wrong = cells and len(cells) != len(names)
        bad = BadRow("not as many cells as columns", None, cells) if wrong else None
        if cells:
            yield Row(dict(zip(names, cells, strict=False)), reader.line_num, bad)


def read_rows(source, tiny, split: str, revision: str | None) -> tuple[str, list[Row]]:
    """Name and rows of a file, a bundled set, a hub id or rows in memory."""
    name = str(source) if isinstance(source, str | Path) else "rows in memory"
    path = BUNDLED.get(name, Path(name))
    is_file = path.is_file() and path.suffix.lower() in SUFFIXES
    on_hub = not path.is_file() and path.suffix not in SUFFIXES and name.count("/") == 1
    if not (is_file or on_hub or name in ("tiny", "rows in memory")):
        remedy = f"Give a {' '.join(SUFFIXES)} file, a hub id owner/name or {' or '.join(BUNDLED)}"
        raise PreferenceDataError(f"{name}: no such file or kind, seen from {Path.cwd()}. {remedy}")
    if split != "train" and not (on_hub or name == "tiny"):
        raise PreferenceDataError(f"{name}: no split {split!r}, only 'train'. Use split_by_prompt")
    remedy, rows = FILE_REMEDIES.get(path.suffix.lower(), "Correct the file"), []
    try:
        if on_hub:
            remedy = HUB_REMEDY
            source = load_dataset(name, split=split, revision=revision)
        elif name == "tiny":
            source = tiny(split=split)
        records = source.to_list() if isinstance(source, Dataset) else source
        for row in read_file(path) if is_file else map(Row, records):
            rows.append(row)
            row.number = len(rows)
            if not (row.bad or isinstance(row.values, dict)):
                row.bad = BadRow("not an object", None, row.values)
    except (OSError, ValueError, RuntimeError, csv.Error) as error:
        problem, place = " ".join(str(error).split()), f", after row {len(rows)}" if rows else ""
        raise PreferenceDataError(f"{name}{place}: cannot be read, {problem}. {remedy}") from None
    if not rows:
        raise PreferenceDataError(f"{name}: empty, it holds no rows. Name another source")
    return name, rows
