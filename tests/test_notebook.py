"""What notebooks share: their opening, and a word on which cell to run first when one is run too early."""

import json

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell

import dpo_utils.notebook
from dpo_utils.notebook import cell_that_makes, explain_missing_names, names_made

CELLS = ["import math as m", "def f(x):\n    return x", "total, *rest = f([1, 2])", "print(total + m.pi)", "print(nowhere)"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with one notebook, which is where its kernel runs."""
    cells = [{"cell_type": "markdown", "source": "# Title"}, *({"cell_type": "code", "source": c} for c in CELLS)]
    (tmp_path / "07_sums.ipynb").write_text(json.dumps({"cells": cells}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "source, made",
    [
        ("a = b = 1\nfor i, (j, k) in []: pass", {"a", "b", "i", "j", "k"}),
        ("import os.path, numpy as np\nfrom x import y as z, w", {"os", "np", "z", "w"}),
        ("class C: pass\nwith open(p) as f: print(q)", {"C", "f"}),
        ("%matplotlib inline", set()),
    ],
)
def test_names_that_a_cell_makes(source, made):
    assert names_made(source) == made


def test_the_cell_is_found(folder):
    assert cell_that_makes("total", CELLS[3], folder) == "code cell 3 of 07_sums.ipynb"
    assert cell_that_makes("m", CELLS[3] + "\n", folder) == "code cell 1 of 07_sums.ipynb"
    assert cell_that_makes("nowhere", CELLS[4], folder) is None
    assert cell_that_makes("total", "print(1)", folder) is None


def test_a_cell_run_too_early_names_the_one_to_run_first(folder, capsys):
    shell = InteractiveShell()
    explain_missing_names(shell)
    result = shell.run_cell(CELLS[3], store_history=True)
    out = capsys.readouterr().out
    assert isinstance(result.error_in_exec, NameError)
    assert "run code cell 3 of 07_sums.ipynb first" in out and "Traceback" not in out and len(out.strip().splitlines()) == 1
    for cell in CELLS[:4]:
        assert shell.run_cell(cell).success
    shell.run_cell("1 / 0", store_history=True)
    assert "Traceback" in capsys.readouterr().out  # other errors stay as they are


@pytest.mark.parametrize("cell", [CELLS[4], "x = 1\nprint(nowhere)", "def g():\n    return nowhere\ng()"])
def test_a_name_that_no_cell_makes_keeps_its_trace(folder, capsys, cell):
    shell = InteractiveShell()
    explain_missing_names(shell)
    shell.run_cell(cell, store_history=True)
    out = capsys.readouterr().out
    assert "Traceback" in out and "'nowhere' is not defined; if a cell above makes it, run that first" in out
    assert "nowhere" in out.split("-->")[-1]  # the line that failed


def test_nothing_happens_outside_ipython():
    explain_missing_names()


def test_setup_prints_the_profile_with_the_readers_changes(capsys, monkeypatch):
    monkeypatch.setenv("DPO_PROFILE", "tiny")
    monkeypatch.setattr(dpo_utils.notebook, "explain_missing_names", lambda: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    profile = dpo_utils.setup(target_modules=("q_proj", "v_proj"), beta=0.3)
    out = capsys.readouterr().out
    assert profile.target_modules == ("q_proj", "v_proj") and "LoRA r=16 on q_proj v_proj\n" in out and "beta 0.3" in out
