"""The report's numbers."""

import json
from dataclasses import replace

from dpo_utils import commands
from dpo_utils.experiments import report


def test_the_command_reports_both_seeds(tmp_path, monkeypatch, capsys):
    settings = {"sft_steps": 3, "steps": 3, "max_new_tokens": 8}
    monkeypatch.setenv("DPO_FIGURES", str(tmp_path))
    monkeypatch.setenv("DPO_RUNS", str(tmp_path / "runs"))
    few = report.load_preferences("tiny").select(range(60))
    monkeypatch.setattr(report, "load_preferences", lambda *args, **options: few)
    args, tiny = commands.report(["--profile", "tiny", "--name", "few", "--seeds", "2"])
    report.command(args, replace(tiny, **settings))
    assert capsys.readouterr().out.count("| DPO, implicit reward, accuracy |") == 1
    numbers = json.loads((tmp_path / "tiny_few.json").read_text(encoding="utf-8"))
    assert len(numbers["seconds"]) == 2 and len(numbers["samples"]) == 5
    assert numbers["peak memory GiB"] > 0 and (tmp_path / "tiny_few.png").exists()
