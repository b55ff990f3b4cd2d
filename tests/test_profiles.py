"""A profile is checked where it is loaded, and its plan says what this machine does otherwise."""

from pathlib import Path

import pytest
import torch

import dpo_utils
from dpo_utils import profiles
from dpo_utils.profiles import describe, load_profile, make_plan, run_directory

PHI2 = load_profile("phi2")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("phi3", {}, "unknown profile 'phi3': choose one of tiny, smollm2, phi2"),
        ("tiny", {"betta": 1}, "has no field 'betta'; its fields are .*, beta, "),
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
    plan = str(make_plan(PHI2, device="cpu"))
    assert "NF4" not in plan and "bitsandbytes is not installed: NOT quantised" in plan
    assert "no GPU: all runs on the CPU, which takes days for phi2" in plan


def test_a_cpu_computes_in_what_it_is_faster_in_and_says_so(monkeypatch):
    assert 0.1 < profiles.bfloat16_slowdown() < 100
    said = "bfloat16 takes 8.0 times as long on this CPU: float32"
    for slowdown, dtype in ((8.04, torch.float32), (0.5, torch.bfloat16)):
        monkeypatch.setattr(profiles, "bfloat16_slowdown", lambda slowdown=slowdown: slowdown)
        plan = make_plan(load_profile("smollm2"), device="cpu")
        assert plan.dtype == dtype and (said in str(plan)) == (dtype == torch.float32)


def test_any_gpu_takes_all_but_the_tiny_profile(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    for name, gpu in (("cuda", torch.cuda), ("mps", torch.backends.mps)):
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "is_available", lambda: True)
            plans = {of: make_plan(load_profile(of)) for of in ("tiny", "smollm2", "phi2")}
        assert [plan.device for plan in plans.values()] == ["cpu", name, name]
    assert plans["phi2"].dtype == torch.bfloat16 and not plans["phi2"].quantize
    assert "4 bits are for CUDA and CPUs: NOT quantised" in str(plans["phi2"])


def test_the_reader_starts_small_and_is_told_what_the_others_cost(monkeypatch, capsys):
    monkeypatch.delenv("DPO_PROFILE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert dpo_utils.setup().name == "tiny"
    phi2 = capsys.readouterr().out.splitlines()[-1]
    assert phi2.startswith('or setup("phi2"): microsoft/phi-2, SFT 2 and DPO 3 minutes, 11 GB')
    assert "not known" in load_profile("phi2", dataset="mine.jsonl").cost


def test_a_hub_source_without_a_revision_is_called_not_pinned():
    assert "preferences jondurbin/truthy-dpo-v0.1 (not pinned)" in describe(PHI2)
    assert describe(load_profile("tiny")).count("not pinned") == 0


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
