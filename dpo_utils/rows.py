"""Rows of any source: files, folders, saved data sets, tables in memory, the hub."""

import csv
import glob
import gzip
import json
import re
import tomllib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pandas
import pyarrow.parquet
from datasets import Dataset, load_dataset, load_dataset_builder, load_from_disk

from dpo_utils.profiles import ASSETS

TABLES = tomllib.loads((ASSETS / "names.toml").read_text(encoding="utf-8"))
REMEDIES = TABLES["remedies"]
COUNTED = ("tied scores", "diverged early")  # rows without a preference: counted, never an error
BUNDLED = {path.stem: path for path in ASSETS.glob("*.jsonl")}
SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".tsv", ".ndjson")
SOURCES = f"a {' '.join(SUFFIXES[:4])} file (.tsv, .gz), a folder, a glob, a hub id owner/name"
OFFLINE = "Connect once, use a local file, another split=, or revision='refs/convert/parquet'"
UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, csv.Error, zlib.error)


class PreferenceDataError(ValueError):
    """Data that cannot be used; names the source, the row, what was found, and the remedy."""


class BadRow(Exception):
    """Why one row gives no pair: the reason, the column, and the value found there."""

    def __init__(self, reason: str, column: str | None, value: object):
        self.reason, self.column = reason, column
        self.found = f"{value!r:.60} ({type(value).__name__})"


@dataclass
class Rows:
    """The rows of a source and their pairs; rows are numbered from 1."""

    name: str
    values: list = field(default_factory=list)  # a dict for each row, unless it is bad
    lines: list = field(default_factory=list)  # in its file; the last one of a .csv record
    starts: dict[int, Path] = field(default_factory=dict)  # first row -> file, of several files
    bad: dict[int, BadRow] = field(default_factory=dict)  # row -> why it gives no pair
    pairs: dict[str, list] = field(default_factory=dict)  # column -> its value in every pair
    numbers: list[int] = field(default_factory=list)  # the row of each pair
    notes: dict[str, list[int]] = field(default_factory=dict)  # finding -> rows

    def add(self, rows) -> None:
        """Appends (values, line, what is wrong with it) of every row."""
        for values, line, bad in rows:
            self.values.append(values)
            self.lines.append(line)
            if bad or not isinstance(values, dict):
                self.bad[len(self.values)] = bad or BadRow("not an object", None, values)

    def keep(self, places: list[int]) -> None:
        """Leaves only the pairs at these places."""
        self.numbers = [self.numbers[n] for n in places]
        self.pairs = {name: [column[n] for n in places] for name, column in self.pairs.items()}

    def place(self, number: int) -> str:
        """Where a row is: its line, and its file where there are several."""
        place = [path.name for start, path in self.starts.items() if start <= number][-1:]
        place += [f"line {line}" for line in (self.lines[number - 1],) if line]
        return f" ({' '.join(place)})" if place else ""


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, whether it is packed or not."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def read_file(path: Path) -> Iterator[tuple]:
    """(values, line, fault) of each row. Cells of a table stay text: NA and None are answers."""
    kind, unpack = kind_of(path), gzip.open if path.suffix.lower() == ".gz" else open
    if kind == ".parquet":
        yield from ((row, None, None) for row in pyarrow.parquet.read_table(path).to_pylist())
        return
    with unpack(path, "rb") as file:  # Excel's "Unicode text" is UTF-16
        encoding = "utf-16" if file.read(2) in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    with unpack(path, "rt", encoding=encoding, errors="surrogateescape") as file:
        if kind in (".csv", ".tsv"):
            yield from read_table(file)
            return
        first = next((line for line in file if not line.isspace()), "")
        file.seek(0)
        try:  # an array is read as one, whatever the file is called
            if kind == ".json" or first.lstrip().startswith("["):
                data = json.load(file)
                rows = data.get("data") if isinstance(data, dict) else data
                if not isinstance(rows, list):
                    raise ValueError('it holds no array of rows, on its own or as {"data": [rows]}')
                yield from ((row, None, None) for row in rows)
                return
        except (ValueError, RecursionError):
            if kind == ".json":
                raise
            file.seek(0)
        for line, text in enumerate(file, 1):
            try:
                if not text.isspace():
                    yield json.loads(text), line, None
            except (ValueError, RecursionError) as error:
                yield text, line, BadRow("broken row", None, str(error))


def read_table(file) -> Iterator[tuple]:
    """One row a record; a record of another length than the header is a bad row."""
    csv.field_size_limit(2**31 - 1)
    head = file.readline()
    reader = csv.reader(chain([head], file), strict=True, delimiter=max(",;\t", key=head.count))
    names = [name.strip() for name in next(reader, [])]
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name in {names}")
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # a quote never closes: what follows is lost
                raise
            yield None, reader.line_num, BadRow("broken row", None, str(error))
            continue
        if cells is None:
            return
        wrong = cells and len(cells) != len(names)
        bad = BadRow("not as many cells as columns", None, cells) if wrong else None
        if cells:
            yield dict(zip(names, cells, strict=False)), reader.line_num, bad


def find(name: str, split: str, revision: str | None, config: str | None):
    """What a name stands for: a list of files, or rows that are saved or on the hub."""
    path = BUNDLED.get(name, Path(name).expanduser())
    if not path.exists() and (named := re.fullmatch(r"(.+):([^:/\\]+)", name)):
        return find(named[1], split, revision, named[2])
    if path.is_dir():
        if any((path / part).exists() for part in ("dataset_dict.json", "state.json")):
            return load_from_disk(str(path))
        files = load_dataset_builder(str(path.resolve()), config).config.data_files
        if split not in files:
            raise ValueError(f"no split {split!r}, only {', '.join(files)}")
        found = [Path(file) for file in files[split] if ".quarantine." not in file]
        known = {*map(Path, chain.from_iterable(files.values()))}
        if left := {
            f.name for f in path.iterdir() if kind_of(f) in SUFFIXES and f.resolve() not in known
        }:
            print(f"{name}: not read, of another kind or configuration: {', '.join(sorted(left))}")
        return found
    known = kind_of(path) in SUFFIXES
    if not (known or path.exists()) and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return load_dataset(name, *filter(None, [config]), split=split, revision=revision)
    found = map(Path, sorted(glob.glob(str(path), recursive=True)))
    files = [path] if known and path.is_file() else [f for f in found if kind_of(f) in SUFFIXES]
    if not files:
        remedy = f"Give {SOURCES} or {' or '.join(BUNDLED)}"
        problem = f"no such file or kind, seen from {Path.cwd()}"
        raise PreferenceDataError(f"{name}: {problem}. {remedy}")
    if split != "train":
        raise PreferenceDataError(f"{name}: no split {split!r}, only 'train'. Use split_by_prompt")
    return [file for file in files if ".quarantine." not in file.name or file == path]


def read_rows(source, tiny, split="train", revision=None, config=None) -> Rows:
    """The rows of any source that `load_preferences` takes. Raises PreferenceDataError."""
    places = [source] if isinstance(source, str | Path) else source
    if not isinstance(places, list | tuple) or not all(
        isinstance(place, Path)
        or (isinstance(place, str) and (place is source or kind_of(Path(place)) in SUFFIXES))
        for place in places
    ):
        places = []
    rows, remedy = Rows(", ".join(map(str, places)) or "rows in memory"), OFFLINE
    try:
        if rows.name == "tiny":
            source = tiny(split=split)
        elif places:
            found = [find(str(place), split, revision, config) for place in places]
            source = found[0] if len(found) == 1 else list(chain.from_iterable(found))
        if isinstance(source, dict):  # of splits
            if split not in source:
                raise ValueError(f"no split {split!r}, only {', '.join(source)}")
            source = source[split]
        elif split != "train" and not places:
            raise ValueError(f"no split {split!r}, only 'train'")
        if isinstance(source, pandas.DataFrame):
            source = source.astype(object).where(source.notna(), None).to_dict("records")
            for row in source:  # a list may have become an array
                row |= {name: v.tolist() for name, v in row.items() if hasattr(v, "tolist")}
        if isinstance(source, Dataset):
            source = source.to_list()
        for values in source:
            if not (places and isinstance(values, Path)):
                rows.add([(values, None, None)])
                continue
            remedy = "Correct the file"
            if len(source) > 1:
                rows.starts[len(rows.values) + 1] = values
            rows.add(read_file(values))
    except UNREADABLE as error:
        if isinstance(error, PreferenceDataError):
            raise
        problem, count = " ".join(str(error).split()), len(rows.values)
        known = (what for said, what in TABLES["sources"].items() if re.search(said, problem))
        where = f"{rows.name}, after row {count}" if count else rows.name
        problem = f"{where}: cannot be read, {problem}. {next(known, remedy)}"
        raise PreferenceDataError(problem) from None
    if not rows.values:
        raise PreferenceDataError(f"{rows.name}: empty, it holds no rows. Name another source")
    return rows
