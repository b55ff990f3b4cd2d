"""What training computes, what it does when a step goes wrong, and the command line."""

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.tracking import GeneralTracker
from small import moved
from small_runs import adapter_bytes, demonstrations, dpo, pairs, policy, profile, sft

from dpo_utils import commands, reference, train
from dpo_utils.checkpoints import SettingsChanged, read_history
from dpo_utils.ensure import ensure
from dpo_utils.logps import all_logps, options_for
from dpo_utils.losses import LOSSES, kto_loss
from dpo_utils.models import trainable
from dpo_utils.profiles import PROFILES
from dpo_utils.tokens import as_item, tokenize_all, tokenize_demonstration
from dpo_utils.train import learning_rate_at, main, step_items, train_dpo, train_unpaired

ROOT = Path(__file__).resolve().parent.parent
LN_2 = math.log(2)
SIDES = "chosen", "rejected"


def test_a_dpo_run_starts_at_ln_2_and_learns(tmp_path):
    history, _ = dpo(tmp_path, profile(steps=12))
    names = {*train.METRICS, "loss", "grad_norm", "learning_rate"}
    assert all(names <= set(row) for row in history)
    assert history[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert history[0]["rewards/accuracies"] == 0.5  # all are ties
    assert history[-1]["loss"] < 0.6 and history[-1]["rewards/margins"] > 0.1
    assert read_history(tmp_path) == history
    for row in history:
        margin = row["rewards/chosen"] - row["rewards/rejected"]
        assert row["rewards/margins"] == pytest.approx(margin, abs=1e-6)


def test_an_sft_loss_is_the_mean_over_the_tokens_of_the_step():
    history, _ = sft()
    model, tokenizer = policy()
    rows, _ = tokenize_all(demonstrations(), tokenizer, 128, tokenize_demonstration)
    first = [as_item(rows[i]) for i in step_items(1, len(rows), 4, 0)]
    scores = all_logps(model, first, **options_for(profile(), tokenizer))
    tokens = sum(len(answers[0]) for _, answers in first)
    assert history[0]["loss"] == pytest.approx(-float(scores.sum()) / tokens, rel=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]


def test_kto_on_single_answers_raises_good_and_lowers_bad_ones():
    both = [(row["prompt"], row[s], s == "chosen") for row in pairs() for s in SIDES]
    rows = [dict(zip(("prompt", "completion", "label"), row, strict=True)) for row in both]
    settings, weights = profile(steps=8, batch=8), {"desirable_weight": 2.0}
    history = train_unpaired(*policy(), rows, settings, loss_options=weights)
    up, down = kto_loss(*torch.zeros(2, 2), torch.tensor([True, False]), **weights)[0]
    good = sum(rows[i]["label"] for i in step_items(1, 20, 8, 0))
    assert history[0]["loss"] == pytest.approx(float(good * up + (8 - good) * down) / 8, abs=1e-5)
    assert history[-1]["rewards/chosen"] > 0 > history[-1]["rewards/rejected"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    history, _ = dpo(None, profile(steps=4, batch=10, learning_rate=2e-4), loss=name, plain=True)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert history[-1]["loss"] < history[0]["loss"]


def test_options_of_a_loss_reach_it():
    history, _ = dpo(None, profile(steps=1), loss="simpo", loss_options={"gamma": 9.0})
    assert history[0]["loss"] > 5


def test_dropped_rows_are_counted_aloud(capsys):
    same = {"prompt": "Why?", "chosen": "same", "rejected": "same"}
    dpo(None, profile(steps=1), [*pairs(), same])
    said = "10 rows kept, 1 dropped: 1 x chosen and rejected are the same tokens"
    assert said in capsys.readouterr().out


def test_every_item_comes_once_an_epoch_in_a_new_seeded_order():
    order = [i for step in range(1, 11) for i in step_items(step, 10, 4, seed=3)]
    epochs = [order[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert step_items(1, 10, 4, seed=4) != order[:4]
    assert len(step_items(1, 3, 8, seed=0)) == 8  # a step may be longer than an epoch


def test_the_rate_warms_up_then_follows_a_cosine_and_is_never_zero():
    rates = [learning_rate_at(step, 10, 1.0, 0.2) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half way down the cosine of 8 steps
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate_at(1, 10, 1.0, 0.0) == 1.0  # without warm-up as Transformers' and TRL's


def one_step(monkeypatch, order=None, plain=False, scale=1.0, **changes):
    """Metrics and gradient of one step on six pairs, of an adapter that is not zero."""
    sizes = {"batch": 6, "steps": 1, "micro_tokens": 10_000, "row_tokens": 1}
    settings = profile(**sizes | changes)
    model, tokenizer = policy(settings)
    real, plan, found = train._gradient, train.make_plan, []
    for name in ("before_first_step", "after_first_step"):
        monkeypatch.setattr(train.preflight, name, lambda run, *_: moved(run.model))
    monkeypatch.setattr(train, "step_items", lambda *_: order or list(range(6)))
    monkeypatch.setattr(train, "make_plan", lambda *a: replace(plan(*a), loss_scale=scale))

    def gradient(run, numbers):
        found.append(real(run, numbers))
        found.append(torch.cat([p.grad.flatten() for p in trainable(run.model)]))
        return found[0]

    monkeypatch.setattr(train, "_gradient", gradient)
    train_dpo(model, tokenizer, pairs(6), settings, plain=plain)
    return found


@pytest.fixture(scope="module")
def whole():
    """One micro-batch of six."""
    with pytest.MonkeyPatch.context() as patch:
        return one_step(patch)


WAYS = [{"order": [3, 0, 5, 1, 4, 2]}, {"row_tokens": 512}, {"micro_tokens": 60}]
WAYS += [{"micro_tokens": 150}, {"plain": True, "micro_tokens": 1}, {"scale": 1024.0}]


@pytest.mark.parametrize("change", WAYS, ids=str)
def test_order_micro_batches_and_form_leave_gradient_and_metrics_the_same(
    monkeypatch, whole, change
):
    means, gradient = one_step(monkeypatch, **change)
    assert (gradient - whole[1]).norm() <= 1e-5 * whole[1].norm() > 0
    assert means == pytest.approx(whole[0], rel=1e-4, abs=1e-5)


def poison(monkeypatch, steps, where="loss"):
    """Make the loss, or one gradient, of some steps not finite."""
    real, seen = train._backward, []

    def poisoned(run, *rest):
        seen.append(1)
        sums = real(run, *rest)
        if len(seen) in steps and where == "gradient":
            trainable(run.model)[5].grad[0, 0] = math.nan
        return sums | ({"loss": math.inf} if len(seen) in steps and where == "loss" else {})

    monkeypatch.setattr(train, "_backward", poisoned)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(monkeypatch, tmp_path, where):
    poison(monkeypatch, {2, 3, 5}, where)
    model, tokenizer = policy()
    weights = []

    def remember(history):
        weights.append(torch.cat([p.detach().flatten() for p in trainable(model)]))

    history = train_dpo(model, tokenizer, pairs(), profile(), tmp_path, on_step=remember)
    assert [row["step"] for row in history if row.get("nonfinite")] == [2, 3, 5]
    assert not {"loss", "grad_norm"} & set(history[1])
    for n in range(1, 7):
        assert torch.equal(weights[n], weights[n - 1]) == (n + 1 in {2, 3, 5})
    assert torch.isfinite(weights[-1]).all()


def test_the_third_in_a_row_stops_the_run_and_names_the_rows(monkeypatch, tmp_path):
    poison(monkeypatch, {3, 4, 5})
    rows = sorted(i + 1 for i in step_items(5, 10, 4, 0))
    said = f"3 steps in a row, last at step 5 on data rows {rows}"
    with pytest.raises(FloatingPointError, match=re.escape(said)):
        dpo(tmp_path)
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4, 5]
    assert [p.stem for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(monkeypatch, whole, capsys):
    real = train.completion_logps

    def greedy(model, data, *, micro_tokens, **options):
        for n, part in enumerate(real(model, data, micro_tokens=micro_tokens, **options)):
            if micro_tokens > 64 and n == 1:  # the first micro-batch has left its gradient
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield part

    monkeypatch.setattr(train, "completion_logps", greedy)
    means, gradient = one_step(monkeypatch, micro_tokens=128)
    assert "out of memory: micro_tokens is now 64," in capsys.readouterr().out
    assert means == pytest.approx(whole[0], rel=1e-4, abs=1e-5)
    assert (gradient - whole[1]).norm() <= 1e-5 * whole[1].norm()


def test_no_memory_at_the_smallest_size_stays_an_error(monkeypatch):
    full = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(train, "completion_logps", full)
    with pytest.raises(torch.OutOfMemoryError):
        dpo(None, profile(micro_tokens=8))
    assert full.call_count == 4  # 8, 4, 2, 1


class Remembering(GeneralTracker):
    name, requires_logging_directory, tracker = "remembering", False, None
    store_init_configuration, log, finish = Mock(), Mock(), Mock()


def test_a_tracker_gets_every_step_and_is_finished():
    history, _ = dpo(tracker=Remembering())
    logged = [(call.kwargs["step"], call.args[0]["loss"]) for call in Remembering.log.mock_calls]
    assert logged == [(row["step"], row["loss"]) for row in history]
    (config,) = Remembering.store_init_configuration.call_args.args
    assert config["beta"] == 0.1 and Remembering.finish.called


SECRETS = {"HF_TOKEN": "hf_notforyoureyes0123456789", "WANDB_API_KEY": "0123abcdnotforyoureyes"}


@pytest.fixture
def data(tmp_path):
    """Ten pairs in a file."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    return str(path)


def shell(tmp_path, data, *more):
    """Arguments of a short run; 3 pairs a step, so that two processes get unequal shares."""
    short = "--steps 4 --batch 3 --learning-rate 2e-3 --beta 0.2 --seed 5".split()
    output = str(tmp_path / "run")
    return ["dpo", "--profile", "tiny", "--output", output, "--data", data, *short, *more]


def test_two_processes_give_the_losses_of_one_and_write_no_secret(tmp_path, data):
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node 2 -m dpo_utils.train".split()
    command = [sys.executable, *torchrun, *shell(tmp_path, data)]
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    options = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, **options, timeout=150)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps, last loss") == 1  # only one process speaks
    _, settings, rows, _ = commands.train(shell(tmp_path / "one", data))
    one, _ = dpo(None, settings, rows)
    for ours, theirs in zip(read_history(tmp_path / "run"), one, strict=True):
        for name in ("loss", "grad_norm", "logps/chosen", "rewards/accuracies"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3 if "norm" in name else 1e-4)
    assert one[0]["logps/chosen"] != one[1]["logps/chosen"]  # other pairs, other numbers
    written = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    written += (done.stdout + done.stderr).encode()
    assert len(written) > 100_000 and not any(s.encode() in written for s in SECRETS.values())


def test_sft_then_dpo_from_the_shell(tmp_path, data, capsys):
    short = ["--steps", "2", "--batch", "4"]
    main(["sft", "--profile", "tiny", "--output", str(tmp_path / "sft"), *short])
    assert "SFT: 2 steps of 4 demonstrations" in capsys.readouterr().out
    main(shell(tmp_path, data, "--adapter", str(tmp_path / "sft" / "adapter")))
    out = capsys.readouterr().out
    assert "plan: cpu, float32, NF4" in out and "sft/adapter" in out and "DPO: 4 steps of 3" in out
    assert read_history(tmp_path / "run")[0]["loss"] == pytest.approx(LN_2, abs=1e-6)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "sft")
    main(shell(tmp_path, data, "--adapter", str(tmp_path / "sft" / "adapter")))
    assert "this run is finished" in capsys.readouterr().out


def test_columns_bad_rows_and_contradictions(tmp_path, capsys):
    rows = [{"Q": f"Why {i}?", "good": "So.", "bad": "No."} for i in range(9)]
    rows += [rows[0] | {"good": "No.", "bad": "So."}, rows[0] | {"Q": "Why 9?", "good": ""}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = "--column prompt=Q --column chosen=good --column rejected=bad".split()
    with pytest.raises(SystemExit, match="mine.jsonl.*row 11"):
        main(shell(tmp_path, str(path), *named))
    main(shell(tmp_path, str(path), *named, "--on-error", "skip"))
    out = capsys.readouterr().out
    assert re.search(r"\d rows, \d more held out by prompt\n  2 rows contradict", out)


def test_the_start_is_quiet_and_needs_no_network(tmp_path):
    code = "import socket; socket.socket.connect = None; from dpo_utils.train import main; main()"
    command = [sys.executable, "-c", code, *shell(tmp_path, "tiny", "--loss", "none")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.startswith("ValueError: unknown loss 'none': choose one of dpo")
    assert len(done.stderr.strip().splitlines()) == 1


def test_flags_change_the_fields_of_their_stage():
    line = "sft --output x --profile phi2 --data instructions --steps 3 --learning-rate 0.5"
    _, settings, *_ = commands.train([*line.split(), "--target-modules", "fc1", "fc2"])
    assert (settings.sft_dataset, settings.sft_steps) == ("instructions", 3)
    assert settings.sft_dataset_revision is None and settings.sft_learning_rate == 0.5
    assert settings.target_modules == ("fc1", "fc2") and settings.steps == 200


def test_what_a_notebook_misses_is_trained_once_or_taken_from_elsewhere(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("DPO_RUNS", str(tmp_path))
    short = profile(steps=2, sft_steps=2)
    assert ensure("dpo", short) == tmp_path / "tiny/dpo/adapter"
    said = capsys.readouterr().out
    assert said.index("no sft adapter in tiny/sft") < said.index("no dpo adapter in tiny/dpo")
    assert len(read_history(tmp_path / "tiny/sft")) == len(read_history(tmp_path / "tiny/dpo")) == 2
    monkeypatch.setattr("dpo_utils.ensure.load_policy", None)
    assert ensure("sft", short) == tmp_path / "tiny/sft/adapter"
    with pytest.raises(SettingsChanged, match="tiny/dpo was made with other .*\n.*beta: was"):
        ensure("dpo", replace(short, beta=9.0))
    with pytest.raises(SettingsChanged, match="steps: was 2, is 3$"):
        ensure("sft", replace(short, sft_steps=3))
    ensure("sft", replace(short, steps=3, beta=9.0))  # they are DPO's
    monkeypatch.setattr("dpo_utils.ensure.snapshot_download", lambda n: str(tmp_path / n))
    for source in (str(tmp_path / "tiny/sft/adapter"), "tiny/sft/adapter"):
        monkeypatch.setenv("DPO_SFT_ADAPTER", source)
        assert ensure("sft", profile(sft_steps=5)) == tmp_path / "tiny/sft/adapter"
        with pytest.raises(SettingsChanged):  # the bundled world has its own, of 2 steps
            ensure("sft", PROFILES["tiny"])


def test_reference_log_probs_are_scored_once_for_each_way_to_batch(monkeypatch, tmp_path):
    monkeypatch.setattr(reference, "_SCORED", {})
    monkeypatch.setattr(reference, "all_logps", scored := Mock(wraps=reference.all_logps))
    for row_tokens in (60, 200, 60, 200):
        dpo(None, profile(steps=1, row_tokens=row_tokens))
    for _ in range(2):
        dpo(tmp_path, profile(steps=1))
    assert [call.kwargs["row_tokens"] for call in scored.mock_calls] == [60, 200, 64]
