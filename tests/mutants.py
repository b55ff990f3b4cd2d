"""Ways to break the code that the tests must notice: python tests/mutants.py [WORD ...]

Each row of mutants.tsv is one break: what, file, old text, new text (JSON strings), and the test
that must fail. Words choose the rows that hold them all. Works on a copy, a few seconds a break.
"""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__")


def rows() -> list[dict]:
    """The table, old and new text as they are in the code."""
    with (ROOT / "tests" / "mutants.tsv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row | {side: json.loads(row[side]) for side in ("old", "new")} for row in table]


def survives(row: dict, copy: Path) -> bool:
    """Whether the break goes unnoticed by its test."""
    path = copy / row["file"]
    whole = path.read_text(encoding="utf-8")
    assert whole.count(row["old"]) == 1, (
        f"{row['what']}: the old text is not unique in {row['file']}"
    )
    path.write_text(whole.replace(row["old"], row["new"]), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", row["test"]]
    done = subprocess.run(command, cwd=copy, env=None, capture_output=True)
    path.write_text(whole, encoding="utf-8")
    return done.returncode != 1


if __name__ == "__main__":
    chosen = [row for row in rows() if all(word in str(row) for word in sys.argv[1:])]
    with tempfile.TemporaryDirectory() as folder:
        tree = shutil.copytree(ROOT, Path(folder) / "copy", ignore=IGNORED)
        alive = [row["what"] for row in chosen if survives(row, tree)]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} breaks noticed; not noticed: {alive}")
