"""Notebooks in the hands of their users: cells out of order, cells twice."""

import asyncio
import json
import threading
import time

import nbformat
import pytest
from cells import NOTEBOOKS, QUIET, order, run, unclear
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError


def test_the_orders_are_what_they_say():
    assert order(3, "twice") == [0, 0, 1, 1, 2, 2]
    assert order(9, "shuffled", 1)[0] == 0 and sorted(order(9, "shuffled", 1)) == list(range(9))
    assert order(9, "shuffled", 1) != order(9, "shuffled", 2)
    bare = (3, "NameError: name 'first' is not defined")
    assert unclear([(1, None), (2, "NameError: run code cell 1 first"), bare]) == [bare]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_cell_run_too_early_says_what_to_run_first(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_RUNS", str(tmp_path))
    monkeypatch.setenv("DPO_FIGURES", str(tmp_path))
    results = run(path, "shuffled", seed=1)
    assert unclear(results) == []
    assert any(error for _, error in results), "a shuffled notebook in which everything runs was not shuffled"


def test_every_cell_twice_gives_what_once_gives(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_RUNS", str(tmp_path))
    monkeypatch.setenv("DPO_FIGURES", str(tmp_path))
    assert [(i, error) for i, error in run(NOTEBOOKS[0], "twice") if error] == []  # the others: python tests/cells.py


def until(path, last: str):
    """A notebook up to the first cell that holds the text."""
    notebook = nbformat.read(path, as_version=4)
    end = next(i for i, cell in enumerate(notebook.cells) if last in cell.source)
    notebook.cells = notebook.cells[: end + 1]
    return notebook


def execute(notebook, while_running=None):
    """Run it in the folder of the notebooks; `while_running(kernel manager)` watches from another thread."""
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(NOTEBOOKS[0].parent)}})
    if while_running:
        client.create_kernel_manager()
        threading.Thread(target=while_running, args=(client.km,), daemon=True).start()
    client.execute()
    return "".join(output.get("text", "") for output in notebook.cells[-1].get("outputs", ()))


def test_a_kernel_killed_in_training_goes_on_where_it_was(tmp_path, monkeypatch):
    for name, value in {**QUIET, "DPO_RUNS": str(tmp_path), "DPO_FIGURES": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    execute(until(NOTEBOOKS[1], "train_sft("))
    rows = tmp_path / "tiny" / "dpo" / "history.jsonl"

    def kill(manager):
        while not rows.exists() or len(rows.read_text().splitlines()) < 25:
            time.sleep(0.05)
        asyncio.run(manager.provisioner.kill())

    training = 'train_dpo(model, tokenizer, train, profile, RUNS / "dpo"'
    with pytest.raises(DeadKernelError):
        execute(until(NOTEBOOKS[3], training), kill)
    before = [json.loads(line) for line in rows.read_text().splitlines()]
    assert 25 <= len(before) < 60
    said = execute(until(NOTEBOOKS[3], training))
    assert "resumed after step 20" in said or "resumed after step 40" in said
    after = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(after) == 60 and [row["loss"] for row in after[: len(before)]] == [row["loss"] for row in before]
