"""Preference pairs and demonstrations from any source, checked before a model is loaded."""

import argparse
import hashlib
import json
import os
import re
import uuid
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
from datasets import Dataset

from dpo_utils.cells import fold as fold  # found here too
from dpo_utils.cells import plain_text as plain_text
from dpo_utils.cells import prompt_key
from dpo_utils.profiles import Profile
from dpo_utils.rows import COUNTED, REMEDIES, PreferenceDataError, Rows
from dpo_utils.schemas import DEMONSTRATIONS, PREFERENCES, read_pairs


def load_preferences(
    source,
    *,
    split="train",
    columns=None,
    on_error=None,
    keep=(),
    quarantine=None,
    revision=None,
    name=None,
    kind=PREFERENCES,
) -> Dataset:
    """Preference pairs in TRL's format: prompt, chosen, rejected, all text or all message lists.

    source: a file (.json .jsonl .csv .tsv .parquet, also .gz), several, a glob, a folder, also of
    `save_to_disk`; "misconceptions", "tiny"; a hub id, with its configuration as owner/name:config
    or in `name`; a Dataset, DatasetDict, DataFrame or list of rows. columns: our names -> its own.
    keep: extra columns to carry along. on_error: "raise" refuses the first bad row; "skip" writes
    the bad rows with their reasons to `quarantine`, by default a file next to the source; both can
    be set by DPO_ON_ERROR and DPO_QUARANTINE. What is dropped or not used is printed with its
    count. Raises PreferenceDataError.
    """
    on_error = on_error or os.environ.get("DPO_ON_ERROR") or "raise"
    quarantine = quarantine or os.environ.get("DPO_QUARANTINE")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    where = {"split": split, "revision": revision, "config": name}
    rows = read_pairs(source, kind, columns, keep, **where)
    name, total = rows.name, len(rows.values)
    faults = {n: bad for n, bad in rows.bad.items() if bad.reason not in COUNTED}
    if faults and on_error == "raise":
        number, bad = next(iter(faults.items()))
        column = f", column {bad.column!r}" if bad.column else ""
        problem = f"row {number}{rows.place(number)}{column}: {bad.reason}, found {bad.found}"
        remedy = REMEDIES.get(bad.reason, "Correct or remove it")
        others = f'{len(faults)} bad of {total} rows. on_error="skip" sets them aside'
        raise PreferenceDataError(f"{name}, {problem}. {remedy}; {others}, or DPO_ON_ERROR=skip")
    if counts := Counter(bad.reason for bad in rows.bad.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        kept = f"{total - counts.total()} kept, {counts.total()} dropped ({reasons})"
        aside = f"; set aside in {set_aside(rows, faults, quarantine)}" if faults else ""
        print(f"{name}: {total} rows read, {kept}{aside}")
    for note, numbers in rows.notes.items():
        if note.startswith("not used"):
            print(f"{name}: {note}, though {len(numbers)} rows hold something there")
    if not rows.numbers:
        raise PreferenceDataError(f"{name}: no row is left of {total}. Mend the rows")
    return as_dataset(rows.pairs)


def as_dataset(columns: dict[str, list]) -> Dataset:
    """A data set of columns; messages that call tools are kept as they are, key by key."""
    lists = [name for name, column in columns.items() if isinstance(column[0], list)]
    if any(len(turn) > 2 for name in lists for talk in columns[name] for turn in talk):
        if not hasattr(datasets, "Json"):
            remedy = f"need a newer datasets than {datasets.__version__}: pip install -U datasets"
            raise PreferenceDataError(f"messages that call tools {remedy}")
        features = Dataset.from_list([{n: column[0] for n, column in columns.items()}]).features
        features |= {name: datasets.List(datasets.Json()) for name in lists}
        return Dataset.from_dict(columns, features=datasets.Features(features))
    return Dataset(pa.table(columns), fingerprint=uuid.uuid4().hex)


def load_demonstrations(source, **options) -> Dataset:
    """Demonstrations for SFT in TRL's format: prompt, completion. See `load_preferences`."""
    return load_preferences(source, kind=DEMONSTRATIONS, **options)


def set_aside(rows: Rows, faults: dict, quarantine: str | Path | None) -> Path:
    """Writes the bad rows with their reasons as JSON lines and gives the path."""
    near = Path(rows.name)
    if not (near.exists() and os.access(near.parent, os.W_OK)):
        near = Path(re.sub(r"[^\w.-]+", "_", rows.name))
    path = Path(quarantine or f"{near}.quarantine.jsonl")
    records = [
        {"row": n, "line": rows.lines[n - 1], **vars(bad), "data": rows.values[n - 1]}
        for n, bad in faults.items()
    ]
    text = "".join(json.dumps(record, default=repr) + "\n" for record in records)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise PreferenceDataError(f"{path}: cannot be written, {error}. Pass quarantine=") from None
    return path


def split_by_prompt(dataset: Dataset, held_out=0.2, seed=0) -> tuple[Dataset, Dataset]:
    """(train, test): `held_out` of the distinct folded prompts, all their rows, go to test.

    Which ones depends on the prompts and the seed alone, not on the order. Raises ValueError.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: a share between 0 and 1 is needed")
    keys = [prompt_key(prompt) for prompt in dataset["prompt"][:]]
    order = sorted(set(keys), key=lambda k: hashlib.sha256(f"{seed}\n{k}".encode()).digest())
    if len(order) < 2:
        raise PreferenceDataError("one distinct prompt cannot be split. Add rows with others")
    test = set(order[: min(max(round(held_out * len(order)), 1), len(order) - 1)])
    sides = ([i for i, key in enumerate(keys) if (key in test) is side] for side in (False, True))
    return tuple(map(dataset.select, sides))


def column_name(text: str) -> tuple[str, str]:
    """`prompt=Question` as (our name, the file's own), for argparse."""
    ours, _, theirs = text.partition("=")
    if not (ours and theirs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OURS=THEIRS, as in prompt=Question")
    return ours.strip(), theirs.strip()


def columns_asked_for() -> dict | None:
    """`DPO_COLUMNS` (prompt=Question,chosen=Good) as our names -> the file's; None if not set."""
    named = os.environ.get("DPO_COLUMNS", "")
    try:
        return (
            dict(column_name(part) for part in re.split(r",\s*(?=\w+\s*=)", named) if part) or None
        )
    except argparse.ArgumentTypeError as problem:
        raise ValueError(f"DPO_COLUMNS: {problem}") from None


def bad_rows(profile: Profile, on_error=None, quarantine=None) -> dict:
    """What becomes of bad rows: as asked for, else as the environment says, else the profile."""
    asked = {"on_error": on_error, "quarantine": quarantine}
    told = {name: value or os.environ.get(f"DPO_{name.upper()}") for name, value in asked.items()}
    return {name: value or getattr(profile, name) for name, value in told.items()}


def training_data(stage: str, profile: Profile, **options):
    """(train, held out) pairs, split by prompt; for "sft" (demonstrations, None).

    options of `load_preferences`. Unless they are given, columns are those of `DPO_COLUMNS`, and
    on_error and quarantine those of `DPO_ON_ERROR` and `DPO_QUARANTINE`, or else of the profile.
    """
    options |= bad_rows(profile, options.get("on_error"), options.get("quarantine"))
    if stage == "sft":
        source, revision = profile.sft_dataset, profile.sft_dataset_revision
        return load_demonstrations(source, revision=revision, **options), None
    if profile.dataset == "tiny":
        return load_preferences("tiny"), load_preferences("tiny", split="test")
    options["columns"] = options.get("columns") or columns_asked_for()
    pairs = load_preferences(profile.dataset, revision=profile.dataset_revision, **options)
    if profile.max_prompts and len(pairs) > profile.max_prompts:
        pairs = pairs.shuffle(seed=0).select(range(profile.max_prompts))
    return split_by_prompt(pairs, profile.held_out)
