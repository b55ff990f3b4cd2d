"""What is wrong with a preference data set, counted by row: `python -m dpo_utils audit FILE`."""

import sys

from dpo_utils import __main__, commands

if __name__ == "__main__":  # before torch is imported
    sys.exit(__main__.main(["audit", *sys.argv[1:]]))

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas
from transformers import AutoTokenizer

from dpo_utils.cells import fold, plain_text, prompt_key
from dpo_utils.rows import BadRow, PreferenceDataError, Rows
from dpo_utils.schemas import read_pairs
from dpo_utils.tokens import UnusablePair, tokenize_pair

SIDES = ["prompt", "chosen", "rejected"]
TOKEN_REASONS = {  # what tokens.UnusablePair says -> the name under which it is counted
    "chosen and rejected are the same tokens": "identical tokens",
    "prompt fills max_length": "prompt too long",
    "chosen and rejected are the same after the cut": "identical after truncation",
}
NEEDS = dict.fromkeys([*TOKEN_REASONS.values(), "completion cut"], ("tokenizer", "max_length"))
NEEDS |= {"identical tokens": ("tokenizer",), "prompt also held out": ("held_out",)}
MARKER = re.compile(r"<\|endoftext\|>|<\|im_end\|>|<\|eot_id\|>|</s>|<eos>")  # ends of a text
UNCUT = 10**9  # tokens: no completion is cut


@dataclass(frozen=True)
class AuditReport:
    """What was found, with 1-based row numbers; kept and dropped rows together are all rows."""

    source: str
    rows: int  # read
    kept: int  # rows that give at least one usable pair
    pairs: int  # from the kept rows
    prompts: int  # distinct after folding, system turns left out
    dropped: dict[str, list[int]]  # reason -> rows; each row once, under its first reason
    noted: dict[str, list[int]]  # finding -> kept rows; a row may have several
    lengths: dict[str, dict[str, dict[str, float]]]  # unit -> side -> statistics
    length_only: dict[str, float]  # unit -> how often the longer answer is chosen; a tie is half
    unchecked: list[str]  # findings that need a tokenizer, a max_length or a held_out set

    def __str__(self) -> str:
        total = f"{self.rows} rows read = {self.kept} kept + {self.rows - self.kept} dropped"
        lines = [f"{self.source}: {total}; {self.pairs} pairs on {self.prompts} prompts"]
        for part, found in (("dropped", self.dropped), ("noted", self.noted)):
            for name, rows in found.items():
                some = ", ".join(map(str, rows[:8])) + " ..." * (len(rows) > 8)
                lines += [f"  {part:8}{name:28}{len(rows):6}  rows {some}"] if rows else []
        if self.unchecked:
            lines.append(f"  not checked for want of arguments: {', '.join(self.unchecked)}")
        for unit, share in self.length_only.items():
            lines.append(pandas.DataFrame(self.lengths[unit]).T.to_string())
            lines.append(f"{unit}: the longer answer is the chosen one in {share:.3f} of the pairs")
        return "\n".join(lines)


def audit(dataset, tokenizer=None, max_length=None, held_out=None, columns=None) -> AuditReport:
    """What is wrong with a file, a hub id, a bundled set, a Dataset or a list of rows.

    tokenizer: also count what tokenising does. max_length: tokens, also count what truncation does.
    held_out: another data set whose prompts must not be in this one. columns: our names -> its own.
    Raises PreferenceDataError where there are no rows to read or no known columns.
    """
    rows = read_pairs(dataset, columns=columns)
    own = columns if isinstance(held_out, str | Path) else None  # rows in memory have our names
    others = [] if held_out is None else read_pairs(held_out, columns=own).pairs["prompt"]
    asked = set(map(prompt_key, others))
    given = {"tokenizer": tokenizer, "max_length": max_length, "held_out": held_out}
    unchecked = [name for name, needs in NEEDS.items() if any(given[n] is None for n in needs)]
    limit = max_length or UNCUT
    tokens = [] if tokenizer is None else token_lengths(rows, tokenizer, limit)
    numbers = np.array(rows.numbers, dtype=int)
    keys = [prompt_key(prompt) for prompt in rows.pairs["prompt"]]
    texts = {side: [plain_text(value) for value in rows.pairs[side]] for side in SIDES}
    folded = list(zip(*([hash(fold(t)) for t in texts[side]] for side in SIDES), strict=True))
    times = Counter(folded)
    holds = {  # finding -> whether it holds, pair by pair
        "duplicate pair": [times[pair] > 1 for pair in folded],
        "conflicting pair": [yes != no and (q, no, yes) in times for q, yes, no in folded],
        "same after folding": [yes == no for _, yes, no in folded],
        "prompt also held out": [key in asked for key in keys],
        "end-of-text marker": [
            any(map(MARKER.search, t)) for t in zip(*texts.values(), strict=True)
        ],
        "completion cut": [prompt + max(answers) > limit for prompt, *answers in tokens],
    }
    checked = {name: np.array(held, bool) for name, held in holds.items() if name not in unchecked}
    noted = {name: np.unique(numbers[held]).tolist() for name, held in checked.items()}
    noted |= {name: sorted({*found} & {*rows.numbers}) for name, found in rows.notes.items()}
    dropped = {}
    for number, bad in rows.bad.items():
        dropped.setdefault(bad.reason, []).append(number)
    sizes = pandas.DataFrame({side: list(map(len, texts[side])) for side in SIDES})
    tables = {"characters": sizes, "tokens": pandas.DataFrame(tokens, columns=SIDES)}
    tables = {unit: table for unit, table in tables.items() if len(table)}
    lengths = {u: t.describe([0.5, 0.95]).drop("std").round(2).to_dict() for u, t in tables.items()}
    length_only = {u: (1 + np.sign(t.chosen - t.rejected).mean()) / 2 for u, t in tables.items()}
    counts = len(rows.values), len(set(rows.numbers)), len(numbers), len(set(keys))
    return AuditReport(rows.name, *counts, dropped, noted, lengths, length_only, unchecked)


def token_lengths(rows: Rows, tokenizer, max_length: int) -> list[list[int]]:
    """Tokens of each pair before any cut; takes pairs that cannot be trained on from `rows`."""
    lengths, usable, reasons = [], [], {}
    for n, (number, *pair) in enumerate(zip(rows.numbers, *rows.pairs.values(), strict=True)):
        pair = dict(zip(SIDES, pair, strict=True))
        try:
            ids = tokenize_pair(pair, tokenizer, UNCUT)
            tokenize_pair(pair, tokenizer, max_length)
        except UnusablePair as error:
            reason = "end-of-text marker" if " inside the " in error.reason else error.reason
            reasons[number] = BadRow(TOKEN_REASONS.get(reason, reason), None, error.reason)
        else:
            usable.append(n)
            lengths.append([len(ids[f"{side}_ids"]) for side in SIDES])
    rows.keep(usable)
    lost = reasons.keys() - set(rows.numbers)
    rows.bad = dict(sorted((rows.bad | {n: reasons[n] for n in lost}).items()))
    return lengths


def main(argv: list[str] | None = None) -> None:
    """`python -m dpo_utils audit` for callers in Python."""
    command(*commands.audit(argv))


def command(args) -> None:
    """Print the report on a file; ends with status 2 where the file cannot be read."""
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer) if args.tokenizer else None
    try:
        report = audit(args.file, tokenizer, args.max_length, args.held_out, dict(args.column))
    except PreferenceDataError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    if args.json:
        found = {"dropped": report.dropped, "noted": report.noted}
        for part, findings in found.items():
            found[part] = {name: {"count": len(n), "rows": n} for name, n in findings.items()}
        report = json.dumps(asdict(report) | found, indent=2)
    print(report)
