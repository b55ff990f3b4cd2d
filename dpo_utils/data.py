"""Preference pairs and demonstrations from any source, checked before a model is loaded."""

import argparse
import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path

from datasets import Dataset

from dpo_utils.profiles import Profile
from dpo_utils.rows import COUNTED, REMEDIES, PreferenceDataError, Row
from dpo_utils.schemas import DEMONSTRATIONS, PREFERENCES, prompt_key, read_pairs
from dpo_utils.schemas import fold as fold  # found here too
from dpo_utils.schemas import plain_text as plain_text


def load_preferences(
    source,
    *,
    split="train",
    columns=None,
    on_error="raise",
    keep=(),
    quarantine=None,
    revision=None,
    kind=PREFERENCES,
) -> Dataset:
    """Preference pairs in TRL's format: prompt, chosen, rejected, all text or all message lists.

    source: a .json .jsonl .csv .parquet file, "misconceptions", "tiny", a hub id, or rows in
    memory. split, revision: of a hub id. columns: our names -> the file's own. keep: extra columns
    to carry along. on_error: "raise" refuses the first bad row; "skip" writes the bad rows with
    their reasons to `quarantine`, by default a file next to the source. Ties make no pair and are
    counted. Raises PreferenceDataError.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r}: use 'raise' or 'skip'")
    name, rows = read_pairs(source, kind, columns, keep, split, revision)
    faults = [row for row in rows if row.bad and row.bad.reason not in COUNTED]
    if faults and on_error == "raise":
        row, bad = faults[0], faults[0].bad
        line = f" (line {row.line})" if row.line else ""
        column = f", column {bad.column!r}" if bad.column else ""
        problem = f"row {row.number}{line}{column}: {bad.reason}, found {bad.found}"
        remedy = REMEDIES.get(bad.reason, "Correct or remove it")
        others = f'{len(faults)} bad of {len(rows)} rows. on_error="skip" sets them aside'
        raise PreferenceDataError(f"{name}, {problem}. {remedy}; {others}")
    if counts := Counter(row.bad.reason for row in rows if row.bad):
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))
        kept = f"{len(rows) - counts.total()} kept, {counts.total()} dropped ({reasons})"
        aside = f"; set aside in {set_aside(name, faults, quarantine)}" if faults else ""
        print(f"{name}: {len(rows)} rows read, {kept}{aside}")
    pairs = [pair for row in rows for pair in row.pairs]
    if not pairs:
        raise PreferenceDataError(f"{name}: no row is left of {len(rows)}. Mend the rows")
    return Dataset.from_list(pairs)


def load_demonstrations(source, **options) -> Dataset:
    """Demonstrations for SFT in TRL's format: prompt, completion. See `load_preferences`."""
    return load_preferences(source, kind=DEMONSTRATIONS, **options)


def set_aside(name: str, faults: list[Row], quarantine: str | Path | None) -> Path:
    """Writes the bad rows with their reasons as JSON lines and gives the path."""
    near = name if Path(name).is_file() else re.sub(r"[/\s]", "_", name)
    path = Path(quarantine or f"{near}.quarantine.jsonl")
    records = [{"row": r.number, "line": r.line, **vars(r.bad), "data": r.values} for r in faults]
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
    return ours, theirs


def columns_asked_for() -> dict | None:
    """`DPO_COLUMNS` (prompt=Question,chosen=Good) as our names -> the file's; None if not set."""
    named = os.environ.get("DPO_COLUMNS", "")
    try:
        return dict(column_name(part) for part in named.split(",") if part) or None
    except argparse.ArgumentTypeError as problem:
        raise ValueError(f"DPO_COLUMNS: {problem}") from None


def training_data(stage: str, profile: Profile, **options):
    """(train, held out) pairs, split by prompt; for "sft" (demonstrations, None).

    options of `load_preferences`; columns are those of `DPO_COLUMNS` unless given.
    """
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
