"""Runs the code cells of a notebook in any order: python tests/cells.py NOTEBOOK {twice,shuffled} [SEED]."""

import os
import random
import re
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
QUIET = {"DPO_PROFILE": "tiny", "DPO_STATIC": "1", "TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def order(count: int, how: str, seed: int = 0) -> list[int]:
    """Numbers of cells: each twice in a row, or all once in seeded random order after the set-up cell.

    Before the set-up cell nothing of ours is loaded, so Python's own message is all that a reader can get.
    """
    if how == "twice":
        return [i for i in range(count) for _ in range(2)]
    return [0, *random.Random(seed).sample(range(1, count), count - 1)]


def run(path: Path, how: str, seed: int = 0) -> list[tuple[int, str | None]]:
    """(number of the code cell from 1, its error as `Name: message` or None), in the order they were run."""
    os.environ.update(QUIET)
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    numbers = order(len(code), how, seed)
    notebook.cells = [nbformat.v4.new_code_cell(code[i].source) for i in numbers]
    client = NotebookClient(notebook, timeout=600, allow_errors=True, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    errors = [next((o for o in cell.outputs if o.output_type == "error"), None) for cell in notebook.cells]
    return [(i + 1, e and f"{e.ename}: {e.evalue}") for i, e in zip(numbers, errors, strict=True)]


def unclear(results) -> list[tuple[int, str]]:
    """Errors that do not say what to run first."""
    return [(i, error) for i, error in results if error and not re.search(r"\b(run|make)\b.* first\b", error)]


if __name__ == "__main__":
    found = run(next(p for p in NOTEBOOKS if p.name.startswith(sys.argv[1])), sys.argv[2], int((sys.argv[3:] or ["0"])[0]))
    print(f"{sum(error is None for _, error in found)} of {len(found)} cells ran; unclear: {unclear(found)}")
