"""`python -m dpo_utils.train`: one process or two, one line on what is wrong, nothing secret written."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import adapter_bytes, child, dpo, ended, numbers, pairs, profile

from dpo_utils import fit, train
from dpo_utils.train import main, read_history

ROOT = Path(__file__).resolve().parent.parent
SECRETS = {"HF_TOKEN": "hf_notforyoureyes0123456789", "WANDB_API_KEY": "0123456789abcdefnotforyoureyes"}


@pytest.fixture
def data(tmp_path):
    """Ten pairs in a file."""
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs()))
    return str(path)


def shell(tmp_path, data, *more):
    """Arguments of a short run; 3 pairs a step, so that two processes get unequal shares."""
    short = ["--steps", "4", "--batch", "3", "--learning-rate", "2e-3", "--beta", "0.2", "--seed", "5"]
    return ["dpo", "--profile", "tiny", "--output", str(tmp_path / "run"), "--data", data, *short, *more]


def test_two_processes_give_the_losses_of_one(tmp_path, data):
    """The same pairs a step, the same losses to 1e-4, and a clean exit in time."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", "dpo_utils.train", *shell(tmp_path, data)]
    environment = {**os.environ, **SECRETS, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("4 steps, last loss") == 1  # only one process speaks
    two = read_history(tmp_path / "run")
    settings = train._profile(train._arguments(shell(tmp_path / "one", data)))
    one, _ = dpo(None, settings, train.training_data("dpo", settings)[0])
    for ours, theirs in zip(two, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        assert ours["logps/chosen"] == pytest.approx(theirs["logps/chosen"], rel=1e-4)
        assert ours["rewards/accuracies"] == theirs["rewards/accuracies"]
    assert one[0]["logps/chosen"] != one[1]["logps/chosen"]  # other pairs, other numbers
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert not_secret(tmp_path, done.stdout + done.stderr)


def not_secret(folder, text) -> bool:
    written = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file()) + text.encode()
    assert len(written) > 100_000
    return not any(secret.encode() in written for secret in SECRETS.values())


def test_the_command_line_in_one_process(tmp_path, data, capsys):
    main(shell(tmp_path, data))
    out = capsys.readouterr().out
    assert "plan: cpu, float32, NF4" in out and "reference: the base model" in out
    assert len(read_history(tmp_path / "run")) == 4
    main(shell(tmp_path, data))
    assert "this run is finished" in capsys.readouterr().out
    main(shell(tmp_path, data, "--fresh"))
    assert "log-probs: shared rows" in capsys.readouterr().out


def test_sft_then_dpo_from_the_shell(tmp_path, data):
    main(["sft", "--profile", "tiny", "--output", str(tmp_path / "sft"), "--steps", "2", "--batch", "4"])
    main(shell(tmp_path, data, "--adapter", str(tmp_path / "sft" / "adapter")))
    history = read_history(tmp_path / "run")
    assert history[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert adapter_bytes(tmp_path / "run") != adapter_bytes(tmp_path / "sft")


def one_line(arguments, message):
    """The command ends with a message that holds this, and with no traceback."""
    with pytest.raises(SystemExit, match=message) as stop:
        main(arguments)
    assert stop.value.code not in (0, None)


def test_what_can_be_foreseen_ends_in_one_message(tmp_path, data, monkeypatch):
    one_line(shell(tmp_path, str(tmp_path / "missing.jsonl")), "missing.jsonl")
    one_line([*shell(tmp_path, data), "--beta", "-1"], "beta must be greater than 0, got -1")
    one_line(["sft", "--profile", "tiny", "--output", str(tmp_path), "--steps", "0"], "steps must be .*, found 0|got 0")
    one_line([*shell(tmp_path, data), "--loss", "dop"], "unknown loss 'dop': choose one of dpo, robust")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "Why?", "chosen": "a"\n')
    one_line(shell(tmp_path, str(tmp_path / "broken.jsonl")), "broken.jsonl.*1")
    one_line(["dpo", "--profile", "huge", "--output", str(tmp_path)], "unknown profile 'huge'")
    monkeypatch.setenv("DPO_MODEL", "nobody/nothing")
    one_line(shell(tmp_path, data), "cannot get 'nobody/nothing'.*DPO_PROFILE=tiny")


def test_changed_settings_end_in_the_difference(tmp_path, data):
    main(shell(tmp_path, data))
    one_line([*shell(tmp_path, data), "--beta", "0.3"], r"SettingsChanged: [\s\S]*beta: was 0\.2, is 0\.3$")


def test_columns_bad_rows_and_contradictions(tmp_path, capsys):
    rows = [{"Q": f"Why {i}?", "good": "So.", "bad": "No."} for i in range(9)]
    rows += [{"Q": "Why 0?", "good": "No.", "bad": "So."}, {"Q": "Why 9?", "good": "", "bad": "No."}]
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = ["--column", "prompt=Q", "--column", "chosen=good", "--column", "rejected=bad"]
    one_line(shell(tmp_path, str(path), *named), "mine.jsonl.*row 11")
    main(shell(tmp_path, str(path), *named, "--on-error", "skip"))
    out = capsys.readouterr().out
    assert "DPO: 4 steps of" in out
    assert re.search(r"reference: the base model\n\d pairs, \d more held out by prompt\n  2 rows contradict another", out)
    one_line(shell(tmp_path, str(path), "--column", "prompt"), "2")


def test_a_run_folder_in_place_of_its_adapter_is_told_so(tmp_path, data, capsys):
    short = ["--steps", "1", "--batch", "2", "--target-modules", "q_proj", "fc2"]
    main(["sft", "--profile", "tiny", "--output", str(tmp_path / "sft"), *short])
    out = capsys.readouterr().out
    assert "SFT: 1 steps of 2 demonstrations" in out and "DPO:" not in out and "r=16 on q_proj fc2\n" in out
    one_line(shell(tmp_path, data, "--adapter", str(tmp_path / "sft")), "did you mean .*sft/adapter")


def test_the_start_is_quiet_but_for_what_is_ours(tmp_path):
    arguments = ["dpo", "--profile", "tiny", "--output", str(tmp_path), "--loss", "none"]
    done = subprocess.run([sys.executable, "-m", "dpo_utils.train", *arguments], capture_output=True, text=True)
    assert done.stderr.strip().startswith("ValueError: unknown loss") and len(done.stderr.strip().splitlines()) == 1


def test_bad_data_stops_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "load_policy", None)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "Why?", "chosen": "So.", "rejected": null}\n')
    one_line(shell(tmp_path, str(path)), "bad.jsonl")


def test_sigterm_ends_with_130_and_a_checkpoint(tmp_path, data):
    main(shell(tmp_path, data))
    alone = numbers(read_history(tmp_path / "run")), adapter_bytes(tmp_path / "run")
    arguments = shell(tmp_path / "killed", data)
    real = fit.take_step

    def work():
        fit.take_step = lambda run, step: (step == 2 and os.kill(os.getpid(), 15), real(run, step))[1]
        try:
            main(arguments)
        except SystemExit as stop:
            os._exit(stop.code)

    with child(work) as pid:
        assert ended(pid) == 130
    assert [p.name for p in (tmp_path / "killed" / "run" / "checkpoints").iterdir()] == ["step-000002"]
    main(arguments)
    assert (numbers(read_history(tmp_path / "killed" / "run")), adapter_bytes(tmp_path / "killed" / "run")) == alone


def test_no_network_is_needed_and_none_is_asked_for(tmp_path, data, monkeypatch):
    import socket

    def no_network(*_, **__):
        raise OSError("the test has no network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr("builtins.input", no_network)
    main(shell(tmp_path, data))
    assert len(read_history(tmp_path / "run")) == 4


def test_the_profile_takes_what_the_line_says():
    line = "sft --output x --data d.jsonl --steps 3 --learning-rate 0.5"
    settings = train._profile(train._arguments(line.split()))
    assert (settings.sft_dataset, settings.sft_steps, settings.sft_learning_rate) == ("d.jsonl", 3, 0.5)
    assert settings.steps == profile(steps=60).steps and settings.dataset == "tiny"
