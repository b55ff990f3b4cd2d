"""The model card says what was measured, is read by the hub's own parser, and gives no path away."""

import pytest
import yaml
from huggingface_hub import ModelCard

from dpo_utils.card import LIMITS, write_card
from dpo_utils.profiles import PROFILES, load_profile

METRICS = {"accuracy": (0.8125, 0.7504, 0.8746), "KL, nats": (12.3456, 11.0, 14.0)}
DRIFT = {"NF4 against merged": {"mean": 0.01234, "largest": 0.5678}}


def card(folder, profile="tiny", metrics=METRICS, drift=DRIFT, limits=(), **changes):
    """The text of a card."""
    path = write_card(folder, load_profile(profile, **changes), 1200, 300, metrics, drift, limits)
    assert path == folder / "README.md"
    return path.read_text(encoding="utf-8")


def test_every_section_with_its_numbers(tmp_path):
    profile, text = PROFILES["tiny"], card(tmp_path, limits=["Nobody checked names."])
    head, data, measured, drift, limits = text.split("\n## ")
    assert "# tiny: DPO" in head
    assert [part.splitlines()[0] for part in (data, measured, drift, limits)] == [
        "Data and settings", "Measured", "Drift between forms of the same weights", "Limits",
    ]  # fmt: skip
    for wanted in (
        "| base weights | NF4", f"r={profile.lora_r}, alpha={profile.lora_alpha}, on q_proj k_proj", "| SFT data | tiny |",
        "| preference data | tiny: 1200 pairs, 300 more held out by prompt |", f"| loss | dpo, beta {profile.beta:g}, ",
        f"| steps | {profile.steps} of {profile.batch} pairs, learning rate {profile.learning_rate:g}, seed 0 |",
    ):  # fmt: skip
        assert wanted in data
    assert "| accuracy | 0.812 | 0.750 to 0.875 |" in measured and "| KL, nats | 12.346 | 11.000 to 14.000 |" in measured
    assert "| NF4 against merged | 0.012 | 0.57 |" in drift
    assert limits.splitlines()[2:] == [f"- {sentence}" for sentence in (*LIMITS, "Nobody checked names.")]


def test_tables_are_tables(tmp_path):
    lines = card(tmp_path).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len(rows) == 2 + 7 + 2 + 2 + 2 + 1
    for i, line in enumerate(lines):
        if line.startswith("|---"):
            assert lines[i - 2] == "" and lines[i - 1].count("|") == line.count("|") == lines[i + 1].count("|")


@pytest.mark.parametrize("name", PROFILES)
def test_the_front_matter_is_yaml_that_the_hub_reads(tmp_path, name):
    text, profile = card(tmp_path, name), PROFILES[name]
    front = yaml.safe_load(text.split("---\n")[1])
    wanted = {"library_name": "peft", "tags": ["dpo", "lora"]}
    wanted |= {"base_model": profile.model} if profile.revision else {}
    wanted |= {"datasets": profile.dataset} if profile.dataset_revision else {}
    assert front == wanted
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.library_name, data.tags, data.base_model) == ("peft", ["dpo", "lora"], wanted.get("base_model"))


def test_hub_ids_appear_with_their_revision(tmp_path):
    text, profile = card(tmp_path, "phi2"), PROFILES["phi2"]
    for source, revision in (
        (profile.model, profile.revision),
        (profile.dataset, profile.dataset_revision),
        (profile.sft_dataset, profile.sft_dataset_revision),
    ):
        assert f"{source} @ {revision}" in text
    assert "| base model | some/model |" in card(tmp_path, "phi2", model="some/model", revision=None)  # not pinned, but named


def test_local_paths_do_not_leak(tmp_path, monkeypatch):
    secret = tmp_path / "secret" / "place"
    secret.mkdir(parents=True)
    (secret / "pairs.jsonl").touch()
    monkeypatch.chdir(tmp_path)
    sources = {"model": str(secret), "dataset": str(secret / "pairs.jsonl"), "sft_dataset": str(secret / "gone.jsonl")}
    text = card(tmp_path, "smollm2", revision=None, **sources)
    assert "secret" not in text and str(tmp_path) not in text
    assert "| base model | place |" in text and "| SFT data | gone.jsonl |" in text and "| preference data | pairs.jsonl: " in text
    assert "secret" not in card(tmp_path, model="secret/place", dataset="./secret/pairs.jsonl", sft_dataset="~/secret/x.jsonl")
    assert "| base model | tiny |" in card(tmp_path)  # the bundled one stands in a folder, too


def test_nothing_measured_no_card(tmp_path):
    with pytest.raises(ValueError, match="run the evaluation first"):
        card(tmp_path, metrics={})
    assert list(tmp_path.iterdir()) == []


def test_a_second_card_replaces_the_first(tmp_path):
    card(tmp_path)
    assert "0.812" not in card(tmp_path, metrics={"accuracy": (0.5, 0.4, 0.6)}, drift={})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
