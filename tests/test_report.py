"""The report's numbers, and a model card that the hub reads and that gives no path away."""

import json
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from dpo_utils import commands
from dpo_utils.experiments import report
from dpo_utils.profiles import PROFILES, load_profile

METRICS = {"accuracy": (0.8125, 0.7504, 0.8746)}
DRIFT = {"NF4 against merged": {"mean": 0.01234, "largest": 0.5678}}


def card(folder, profile="tiny", metrics=METRICS, **changes):
    path = report.write_card(folder, load_profile(profile, **changes), 1200, 300, metrics, DRIFT)
    return path.read_text(encoding="utf-8")


def test_a_card_has_its_numbers_and_is_refused_without_any(tmp_path):
    text = card(tmp_path)
    for row in (
        "| preference data | tiny: 1200 pairs, 300 more held out by prompt |",
        "| loss | dpo, beta 1, label smoothing 0 |",
        "| steps | 60 of 16 pairs, learning rate 0.0003, seed 0 |",
        "| accuracy | 0.812 | 0.750 to 0.875 |",
        "| NF4 against merged | 0.012 | 0.57 |",
    ):
        assert f"{row}\n" in text
    assert "{" not in text and "It was not made safe" in text
    with pytest.raises(ValueError, match="a model card needs a measurement"):
        card(tmp_path, metrics={})


@pytest.mark.parametrize("name", PROFILES)
def test_the_hub_reads_the_front_matter_and_sources_are_pinned(tmp_path, name):
    text, profile = card(tmp_path, name), PROFILES[name]
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.tags) == ("peft", ["dpo", "lora"])
    assert data.base_model == (profile.model if profile.revision else None)
    assert data.datasets == (profile.dataset if profile.dataset_revision else None)
    assert not profile.revision or f"| {profile.model} @ {profile.revision} |" in text


def test_local_paths_do_not_leak(tmp_path, monkeypatch):
    (tmp_path / "secret" / "place").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    place, gone = str(tmp_path / "secret" / "place"), str(tmp_path / "secret" / "gone.jsonl")
    text = card(tmp_path, "smollm2", model=place, dataset=gone, sft_dataset="some/data")
    assert "secret" not in text and str(tmp_path) not in text
    assert "| base model | place |" in text and "| SFT data | some/data |" in text
    assert "secret" not in card(tmp_path, model="secret/place", dataset="~/secret/x.jsonl")


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
