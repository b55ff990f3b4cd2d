"""One entry to every command: it answers at once, and what it refuses takes one line."""

import subprocess
import sys
from unittest.mock import Mock

import pytest

from dpo_utils import commands, workbook
from dpo_utils.__main__ import main

LATE = "import sys; sys.modules['torch'] = None; from dpo_utils.__main__ import main; main()"
HELP = [(f"{name} --help", 0, f"python -m dpo_utils {name}") for name in {*commands.RUN} - {"lab"}]
REFUSED = [
    ("tarin", 1, "no command 'tarin'"),
    ("train dpo --output x --profile huge", 1, "unknown profile 'huge'"),
    ("train dpo --output x --beta 0", 1, "beta must be greater than 0, got 0.0"),
    ("train dpo --output x --column prompt", 2, "'prompt' is not OURS=THEIRS"),
    ("train dpo --output x --tracker wandb", 2, "wandb is not installed: pip install wandb"),
    ("train dpo --output x --data no.jsonl", 1, "no.jsonl: no such file"),
    ("train dpo --output x --adapter tests", 1, "no adapter in tests"),
    ("pairs p.txt --judge reward --adapter tests", 1, "no adapter in tests"),
    ("chat --adapter tests", 1, "no adapter in tests"),
    ("audit no.csv", 2, "no.csv: no such file"),
    ("report --profile huge", 1, "unknown profile 'huge'"),
    ("workbook --profile huge", 1, "unknown profile 'huge'"),
]


@pytest.mark.parametrize("line, status, said", [*sorted(HELP), *REFUSED])
def test_help_and_refusals_come_before_torch_is_imported(line, status, said):
    command = [sys.executable, "-c", LATE, *line.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_older_spellings_are_refused_as_early():
    for line in ("train", "audit", "judges pairs", "report"):
        command = [sys.executable, "-X", "importtime", "-m", *f"dpo_utils.{line} --help".split()]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 and "usage: python -m dpo_utils" in done.stdout
        assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


def test_a_stop_ends_with_130_and_what_is_not_foreseen_shows_where(monkeypatch):
    problems = [KeyboardInterrupt("stopped"), TypeError("a defect")]
    monkeypatch.setattr(workbook, "command", Mock(side_effect=problems))
    with pytest.raises(SystemExit, check=lambda stop: stop.code == 130):
        main(["workbook"])
    with pytest.raises(TypeError):
        main(["workbook"])


def test_jupyterlab_opens_the_repository_also_for_root(monkeypatch):
    monkeypatch.setattr(workbook.subprocess, "run", run := Mock())
    monkeypatch.setattr(workbook.os, "geteuid", lambda: 0, raising=False)
    main(["lab", "--port", "9999"])
    (command,), options = run.call_args
    assert f"--ServerApp.root_dir={options['cwd']}" in command
    assert command[-3:] == ["--allow-root", "--port", "9999"]
