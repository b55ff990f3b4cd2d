"""Notebooks in the hands of their users: cells out of order, cells twice."""

import pytest
from cells import NOTEBOOKS, order, run, unclear


def test_the_orders_are_what_they_say():
    assert order(3, "twice") == [0, 0, 1, 1, 2, 2]
    assert order(9, "shuffled", 1)[0] == 0 and sorted(order(9, "shuffled", 1)) == list(range(9))
    assert order(9, "shuffled", 1) != order(9, "shuffled", 2)
    assert unclear([(1, None), (2, "NameError: run code cell 1 first"), (3, "KeyError: 'x'")]) == [(3, "KeyError: 'x'")]


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
