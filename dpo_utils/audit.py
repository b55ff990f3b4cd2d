"""What is wrong with a preference data set, counted with 1-based row numbers. Nothing is changed or refused.

Beside the pipeline: calls `data` for reading and checking, `tokens` only when a tokenizer is given.
"""

import argparse
import json
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dpo_utils.data import PREFERENCES, Outcome, column_name, fold, parse, plain_text, prompt_key
from dpo_utils.rows import REASONS, BadRow, PreferenceDataError, read_rows

# Worth knowing, though the row stays in use.
NOTES = ("duplicate pair", "conflicting pair", "prompt also held out", "end-of-text marker", "some scores tied", "completion cut")
# What tokens.UnusablePair says -> the name under which it is counted; any other reason counts under its own words.
TOKEN_REASONS = {
    "chosen and rejected are the same tokens": "identical tokens",
    "prompt fills max_length": "prompt too long",
    "chosen and rejected are the same after the cut": "identical after truncation",
}
NEEDS = {  # what a finding needs beside the rows
    "identical tokens": ("tokenizer",),
    "prompt too long": ("tokenizer", "max_length"),
    "identical after truncation": ("tokenizer", "max_length"),
    "completion cut": ("tokenizer", "max_length"),
    "prompt also held out": ("held_out",),
}
MARKERS = ("<|endoftext|>", "<|im_end|>", "<|eot_id|>", "</s>", "<eos>")  # looked for when no tokenizer says its own
UNCUT = 10**9  # tokens: no completion is cut


@dataclass(frozen=True)
class AuditReport:
    """Counts and row numbers of everything found; `dropped` parts the dropped rows by their first reason."""

    source: str
    rows: int  # read
    kept: int  # rows that give at least one usable pair; kept + rows in `dropped` = rows
    pairs: int  # from the kept rows
    prompts: int  # distinct after folding, system turns left out
    dropped: dict[str, list[int]]  # reason -> row numbers, each row once
    noted: dict[str, list[int]]  # finding -> row numbers of kept rows, a row may be in several
    lengths: dict[str, dict[str, dict[str, float]]]  # unit -> prompt, chosen, rejected -> statistics
    unchecked: list[str]  # findings that would need a tokenizer, a max_length or a held_out set
    length_only: dict[str, float]  # unit -> accuracy of "the longer answer is the chosen one", a tie is half

    def to_dict(self) -> dict:
        """Plain data for JSON; row lists become {"count", "rows"}."""
        counted = {
            part: {name: {"count": len(rows), "rows": rows} for name, rows in getattr(self, part).items()}
            for part in ("dropped", "noted")
        }
        return asdict(self) | counted

    def __str__(self) -> str:
        lines = [
            f"{self.source}: {self.rows} rows read = {self.kept} kept + {self.rows - self.kept} dropped; "
            f"{self.pairs} pairs on {self.prompts} prompts"
        ]
        for part in ("dropped", "noted"):
            lines += [f"  {part:8}{name:28}{len(rows):6}  {row_list(rows)}" for name, rows in getattr(self, part).items() if rows]
        none = [name for part in (self.dropped, self.noted) for name, rows in part.items() if not rows]
        unchecked = [f"{name} (needs {' and '.join(NEEDS[name])})" for name in self.unchecked]
        lines += [
            textwrap.fill(f"  {title}: {', '.join(names)}", 110, subsequent_indent="    ")
            for title, names in (("none", none), ("not checked", unchecked))
            if names
        ]
        for unit, sides in self.lengths.items():
            lines += [
                f"  {unit}: {side:10}" + "  ".join(f"{name} {value:g}" for name, value in statistics.items())
                for side, statistics in sides.items()
            ]
            lines.append(f"  {unit}: the longer answer is the chosen one in {self.length_only[unit]:.3f} of the pairs")
        return "\n".join(lines)


def row_list(rows: list[int], shown: int = 8) -> str:
    """The first few row numbers: "rows 3, 7, 9 ..."."""
    return f"rows {', '.join(map(str, rows[:shown]))}{' ...' if len(rows) > shown else ''}" if rows else ""


def audit(dataset, tokenizer=None, max_length: int | None = None, held_out=None, columns: dict | None = None):
    """AuditReport of a data set: a file, a hub id, a bundled name, a Dataset or a list of rows.

    tokenizer: also count what tokenising does. max_length: tokens, also count what truncation does.
    held_out: another data set whose prompts must not appear in this one. columns: our names -> its own.
    Raises PreferenceDataError where there are no rows to read or no known columns.
    """
    given = {"tokenizer": tokenizer, "max_length": max_length, "held_out": held_out}
    source, rows = read_rows(dataset, bundled=PREFERENCES.bundled)
    outcomes, lengths = parse(rows, PREFERENCES, columns, source), {}
    dropped, noted = ({name: set() for name in names} for names in ((*REASONS, *TOKEN_REASONS.values()), NOTES))
    if tokenizer is not None:
        outcomes, lengths["tokens"] = tokenise(outcomes, tokenizer, max_length or UNCUT, noted)
    kept = [outcome for outcome in outcomes if outcome.pairs]
    pairs = [pair for outcome in kept for pair in outcome.pairs]
    lengths = {"characters": [character_lengths(pair) for pair in pairs]} | lengths
    note_repeats(kept, noted)
    note_each(kept, noted, "end-of-text marker", has_marker)
    if held_out is not None:
        note_each(kept, noted, "prompt also held out", shares_prompt(held_out, columns))
    for row, _, bad in outcomes:
        if bad:
            dropped.setdefault(bad.reason, set()).add(row.number)
        elif has_ties(row.values, columns or {}):
            noted["some scores tied"].add(row.number)
    unchecked = [name for name, needs in NEEDS.items() if any(given[need] is None for need in needs)]
    return AuditReport(
        source,
        len(rows),
        len(kept),
        len(pairs),
        len({prompt_key(pair["prompt"]) for pair in pairs}),
        *({name: sorted(found) for name, found in part.items() if name not in unchecked} for part in (dropped, noted)),
        {unit: describe(np.array(values)) for unit, values in lengths.items() if values},
        unchecked,
        {unit: length_only(np.array(values)) for unit, values in lengths.items() if values},
    )


# ---- findings ----


def tokenise(outcomes: list[Outcome], tokenizer, max_length: int, noted: dict) -> tuple[list[Outcome], list[tuple]]:
    """Outcomes without the pairs that cannot be trained on, and the uncut lengths of the others."""
    lengths, after = [], []
    for row, pairs, bad in outcomes:
        usable = []
        for pair in pairs:
            try:
                lengths.append(token_lengths(pair, tokenizer, max_length))
                usable.append(pair)
                if lengths[-1][0] + max(lengths[-1][1:]) > max_length:
                    noted["completion cut"].add(row.number)
            except BadRow as problem:
                bad = problem
        after.append(Outcome(row, usable, None if usable else bad))
    return after, lengths


def token_lengths(pair: dict, tokenizer, max_length: int) -> tuple[int, int, int]:
    """Tokens of prompt, chosen, rejected before any cut. Raises BadRow where nothing could be learnt from the pair."""
    from dpo_utils.tokens import UnusablePair, tokenize_pair  # needs torch; a report without a tokenizer does not

    try:
        ids = tokenize_pair(pair, tokenizer, UNCUT)
        lengths = len(ids["prompt_ids"]), len(ids["chosen_ids"]), len(ids["rejected_ids"])
        if lengths[0] + max(lengths[1:]) > max_length:
            tokenize_pair(pair, tokenizer, max_length)
        return lengths
    except UnusablePair as error:
        reason = "end-of-text marker" if " inside the " in error.reason else error.reason
        raise BadRow(TOKEN_REASONS.get(reason, reason), None, error.reason) from None


def note_repeats(kept: list[Outcome], noted: dict) -> None:
    """All rows of a group whose pairs are the same after folding, and of one in which A > B meets B > A."""
    groups = defaultdict(list)
    for row, pairs, _ in kept:
        for pair in pairs:
            groups[tuple(fold(plain_text(pair[side])) for side in ("prompt", "chosen", "rejected"))].append(row.number)
    for (prompt, chosen, rejected), numbers in groups.items():
        if len(numbers) > 1:
            noted["duplicate pair"].update(numbers)
        if (prompt, rejected, chosen) in groups:
            noted["conflicting pair"].update(numbers)


def note_each(kept: list[Outcome], noted: dict, name: str, holds: Callable[[dict], bool]) -> None:
    noted[name].update(row.number for row, pairs, _ in kept if any(map(holds, pairs)))


def has_marker(pair: dict) -> bool:
    return any(marker in plain_text(value) for value in pair.values() for marker in MARKERS)


def shares_prompt(held_out, columns: dict | None) -> Callable[[dict], bool]:
    source, rows = read_rows(held_out, bundled=PREFERENCES.bundled)
    columns = columns if isinstance(held_out, str | Path) else None  # what is loaded already has our names
    keys = {prompt_key(pair["prompt"]) for _, pairs, _ in parse(rows, PREFERENCES, columns, source) for pair in pairs}
    return lambda pair: prompt_key(pair["prompt"]) in keys


def has_ties(values: dict, columns: dict) -> bool:
    """A ranked row that gave pairs, but fewer than its answers allow."""
    responses, scores = (values.get(columns.get(name, name)) for name in ("responses", "scores"))
    return isinstance(responses, list) and isinstance(scores, list) and len(set(scores)) < len(scores)


# ---- lengths ----


def character_lengths(pair: dict) -> tuple[int, int, int]:
    return tuple(len(plain_text(pair[side])) for side in ("prompt", "chosen", "rejected"))


def describe(lengths: np.ndarray) -> dict[str, dict[str, float]]:
    """Statistics of each column of lengths (pairs, 3)."""
    return {
        side: {
            "min": int(column.min()),
            "median": float(np.median(column)),
            "mean": round(int(column.sum()) / len(column), 2),
            "p95": round(float(np.percentile(column, 95)), 2),
            "max": int(column.max()),
        }
        for side, column in zip(("prompt", "chosen", "rejected"), lengths.T, strict=True)
    }


def length_only(lengths: np.ndarray) -> float:
    """Accuracy of "the longer answer is the chosen one"; a tie counts half."""
    gap = lengths[:, 1] - lengths[:, 2]
    return float(((gap > 0) + 0.5 * (gap == 0)).mean())


# ---- command line ----


def main(arguments: list[str] | None = None) -> int:
    """`python -m dpo_utils.data audit FILE`: prints the report; 2 where the file cannot be read at all."""
    parser = argparse.ArgumentParser(prog="python -m dpo_utils.data")
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("audit", help="count what is wrong with a file of preference pairs")
    command.add_argument("file", help="a .json .jsonl .csv or .parquet file, a bundled name or a hub id")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.add_argument("--held-out", metavar="FILE", help="pairs whose prompts must not be in FILE")
    command.add_argument(
        "--column",
        action="append",
        default=[],
        type=column_name,
        metavar="OURS=THEIRS",
        help="the file's own name for a column, as in --column prompt=Question",
    )
    command.add_argument("--tokenizer", help="a directory or hub id: also count what tokenising does")
    command.add_argument("--max-length", type=int, help="tokens: also count what truncation does")
    options = parser.parse_args(arguments)
    try:
        report = audit(
            options.file,
            load_tokenizer(options.tokenizer),
            options.max_length,
            options.held_out,
            dict(options.column),
        )
    except PreferenceDataError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)
    return 0


def load_tokenizer(name: str | None):
    if name is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name)
