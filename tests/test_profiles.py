"""A profile is checked where it is loaded, and its plan says what this machine does otherwise."""

from pathlib import Path

import pytest
import torch

from dpo_utils import profiles
from dpo_utils.profiles import describe, load_profile, make_plan, run_directory

PHI2 = load_profile("phi2")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("phi3", {}, "unknown profile 'phi3': choose one of tiny, smollm2, phi2"),
        ("tiny", {"betta": 1}, "has no field 'betta'; its fields are .*, beta, "),
        ("tiny", {"beta": 0.0}, "beta must be greater than 0, got 0.0"),
        ("tiny", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
    ],
)
def test_what_a_profile_cannot_be_is_refused_with_the_choices(name, changes, message):
    with pytest.raises(ValueError, match=message):
        load_profile(name, **changes)


@pytest.mark.parametrize("major, minor", [(7, 5), (8, 0), (9, 0), (12, 0)])
def test_bfloat16_is_a_question_of_compute_capability(major, minor):
    """A T4 gets float16, with attention in float32 and a scaled loss, and the plan says so."""
    plan = make_plan(PHI2, device="cuda", capability=(major, minor))
    new, t4 = (torch.bfloat16, "sdpa", 1.0), (torch.float16, "sdpa_float32", 1024.0)
    assert (plan.dtype, plan.attention, plan.loss_scale) == (new if major >= 8 else t4)
    stated = "compute capability 7.5 has no bfloat16: float16, with attention in float32"
    assert (stated in str(plan)) == bool(plan.notes) == (major < 8)


def test_without_gpu_and_bitsandbytes_the_plan_says_so(monkeypatch):
    monkeypatch.setattr(profiles.importlib.util, "find_spec", lambda name: None)
    plan = make_plan(PHI2, device="cpu")
    assert not plan.quantize and "bitsandbytes is not installed: NOT quantised" in str(plan)
    assert "no GPU: everything runs on the CPU, which takes days for phi2" in str(plan)


def test_a_model_and_data_of_ones_own_are_unpinned_and_get_a_folder_of_their_own(monkeypatch):
    monkeypatch.setenv("DPO_RUNS", "runs")
    assert run_directory(PHI2) == Path("runs/phi2") and PHI2.revision[:12] in describe(PHI2)
    monkeypatch.setenv("DPO_MODEL", "org/Phi-1.5")
    monkeypatch.setenv("DPO_DATASET", "data/pairs.v2.jsonl")
    mine = load_profile("phi2")
    assert run_directory(mine) == Path("runs/phi2-Phi-1.5-pairs.v2")
    assert mine.revision is None and mine.dataset_revision is None


def test_a_path_seen_from_the_repository_is_found_from_its_notebooks(monkeypatch):
    monkeypatch.chdir(profiles.repository_root() / "notebooks")
    for source in ("dpo_utils/assets/misconceptions.jsonl", "misconceptions", "nowhere.jsonl"):
        monkeypatch.setenv("DPO_DATASET", source)
        given = Path(load_profile("tiny").dataset)
        assert given.exists() if "assets" in source else given == Path(source)
