"""A run that is killed and run again gives what a run that was left alone gives: every number, every byte.

DPO_KILLS sets how many random moments are tried; `DPO_KILLS=200 pytest tests/test_resume.py` is the long form.
"""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from small_runs import adapter_bytes, child, demonstrations, dpo, ended, numbers, pairs, policy, profile, sft

from dpo_utils import checkpoints, fit
from dpo_utils.models import load_base
from dpo_utils.train import read_history, train_dpo, train_sft

KILLS = int(os.environ.get("DPO_KILLS", 6))


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory):
    """The bundled model with dropout in its config, as Phi-2 has it."""
    folder = shutil.copytree(profile().model, tmp_path_factory.mktemp("model") / "dropout")
    config = json.loads((folder / "config.json").read_text())
    config |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def settings(dropout_model):
    """Steps of 4 out of 10 pairs, each in several micro-batches, a checkpoint after every second step."""
    return profile(model=dropout_model, steps=9, sft_steps=9, checkpoint_every=2, micro_tokens=120, row_tokens=60)


@pytest.fixture(scope="module")
def left_alone(settings, tmp_path_factory):
    """{run: (history, adapter bytes)} of runs that nobody killed."""
    found = {}
    for run in (dpo, sft):
        folder = tmp_path_factory.mktemp("alone")
        found[run] = numbers(run(folder, settings)[0]), adapter_bytes(folder)
    return found


def same(run, folder, settings, left_alone):
    history, _ = run(folder, settings)
    assert (numbers(history), adapter_bytes(folder)) == left_alone[run]
    assert read_history(folder) == history


def test_dropout_in_the_config_is_off_in_training(settings, left_alone):
    for model in (load_base(settings), policy(settings)[0]):
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}
    assert model.config.resid_pdrop == 0.1  # the file did ask for it
    assert numbers(dpo(None, profile(steps=9, micro_tokens=120, row_tokens=60))[0]) == left_alone[dpo][0]


@pytest.mark.parametrize("run, after", [(dpo, 1), (dpo, 4), (dpo, 9), (sft, 5)])
def test_killed_right_after_a_step(run, after, tmp_path, settings, left_alone):
    def die(history):
        if len(history) == after:
            os.kill(os.getpid(), signal.SIGKILL)

    with child(lambda: run(tmp_path, settings, on_step=die)) as pid:
        assert ended(pid) == -signal.SIGKILL
    assert len(read_history(tmp_path)) == after
    same(run, tmp_path, settings, left_alone)


def test_killed_at_random_moments_again_and_again(tmp_path, settings, left_alone):
    """SIGKILL at any moment of the run, from its first file to its last, until one try gets through."""
    rng = random.Random(os.environ.get("DPO_SEED", "kill"))
    start = time.perf_counter()
    with child(lambda: dpo(tmp_path / "timed", settings)) as pid:
        assert ended(pid) == 0
    whole = time.perf_counter() - start
    kills, progress, tries = 0, [], 0
    while kills < KILLS:
        tries += 1
        folder, alive = tmp_path / str(tries), True
        while alive:
            with child(lambda folder=folder: dpo(folder, settings)) as pid:
                time.sleep(rng.uniform(0.1, 1.0) * whole)
                os.kill(pid, signal.SIGKILL)
                alive = ended(pid) == -signal.SIGKILL
            kills += alive
            if folder.exists() and (at := checkpoints.newest(folder / "checkpoints")):
                progress.append(at.name)
        same(dpo, folder, settings, left_alone)
        shutil.rmtree(folder)
    print(f"{kills} kills in {tries} runs, left at {sorted(set(progress))}")


@pytest.mark.parametrize("touch, at", [("fsync", 8), ("replace", 3)])
def test_killed_while_a_checkpoint_is_written(touch, at, tmp_path, settings, left_alone):
    """test_checkpoints tries every touch of the disk; here a few within a whole run."""

    def work():
        real, seen = getattr(os, touch), []

        def deadly(*arguments):
            seen.append(1)
            if len(seen) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        setattr(os, touch, deadly)
        dpo(tmp_path, settings)

    with child(work) as pid:
        assert ended(pid) == -signal.SIGKILL
    same(dpo, tmp_path, settings, left_alone)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_within_a_step_with_a_checkpoint(number, tmp_path, settings, left_alone):
    before = signal.getsignal(signal.SIGINT)

    def signalled(history):
        if len(history) == 3:
            os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt, match=f"stopped by {number.name} after step 3; run again to resume"):
        dpo(tmp_path, settings, on_step=signalled)
    assert checkpoints.newest(tmp_path / "checkpoints").name == "step-000003"
    assert signal.getsignal(signal.SIGINT) is before
    same(dpo, tmp_path, settings, left_alone)


def test_a_signal_in_the_middle_of_a_step_lets_the_step_end(tmp_path, settings, monkeypatch, left_alone):
    real = fit.take_step

    def interrupted(run, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(run, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match="after step 4"):
        patch.setattr(fit, "take_step", interrupted)
        dpo(tmp_path, settings)
    same(dpo, tmp_path, settings, left_alone)


def test_a_second_signal_stops_at_once(tmp_path, settings, left_alone):
    def impatient(history):
        if len(history) == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        dpo(tmp_path, settings, on_step=impatient)
    assert checkpoints.newest(tmp_path / "checkpoints").name == "step-000004"
    same(dpo, tmp_path, settings, left_alone)


def test_a_signal_in_the_last_step_is_not_swallowed(tmp_path, settings, left_alone):
    with pytest.raises(KeyboardInterrupt, match="after step 9"):
        dpo(tmp_path, settings, on_step=lambda h: len(h) == 9 and os.kill(os.getpid(), signal.SIGTERM))
    same(dpo, tmp_path, settings, left_alone)


def test_the_cell_run_again_with_the_model_in_memory_resumes(tmp_path, settings, left_alone):
    """In a notebook the interrupted model is still there, trained half way."""
    model, tokenizer = policy(settings)
    with pytest.raises(KeyboardInterrupt):
        train_dpo(
            model, tokenizer, pairs(), settings, tmp_path,
            on_step=lambda h: len(h) == 3 and os.kill(os.getpid(), signal.SIGINT),
        )  # fmt: skip
    history = train_dpo(model, tokenizer, pairs(), settings, tmp_path)
    assert (numbers(history), adapter_bytes(tmp_path)) == left_alone[dpo]


def test_an_error_of_the_caller_loses_at_most_the_steps_since_the_checkpoint(tmp_path, settings, left_alone):
    with pytest.raises(ZeroDivisionError):
        dpo(tmp_path, settings, on_step=lambda h: 1 / (len(h) - 5))
    same(dpo, tmp_path, settings, left_alone)


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.pt"])
def test_a_broken_newest_checkpoint_costs_steps_but_not_the_result(file, tmp_path, settings, left_alone):
    stop = {"on_step": lambda h: len(h) == 7 and os.kill(os.getpid(), signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt):
        dpo(tmp_path, settings, **stop)
    path = tmp_path / "checkpoints" / "step-000007" / file
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.warns(UserWarning, match=f"passed over: .*step-000007/{file}"):
        same(dpo, tmp_path, settings, left_alone)


def test_only_keep_checkpoints_stay(tmp_path, settings):
    dpo(tmp_path / "two", settings)
    dpo(tmp_path / "one", settings, keep=1)
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["step-000008", "step-000009"]
    assert [p.name for p in (tmp_path / "one" / "checkpoints").iterdir()] == ["step-000009"]


def test_a_full_disk_stops_with_the_numbers_and_resumes(tmp_path, settings, left_alone):
    """The limit on file sizes stands in for the disk: the adapter still fits, the optimiser's state does not."""
    import resource

    def work():
        def small_disk(history):
            if len(history) == 6:
                resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))

        try:
            dpo(tmp_path, settings, on_step=small_disk)
        except OSError as problem:
            (tmp_path / "said.txt").write_text(str(problem))

    with child(work) as pid:
        assert ended(pid) == 0
    assert "File too large" in (tmp_path / "said.txt").read_text()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    same(dpo, tmp_path, settings, left_alone)


def test_sft_then_dpo_resumes_from_the_sft_reference(tmp_path, settings):
    """Killed in DPO after SFT: the reference stays the SFT adapter."""

    def pipeline(folder, **options):
        model, tokenizer = policy(settings)
        train_sft(model, tokenizer, demonstrations(), settings, folder / "sft")
        model, tokenizer = policy(settings, adapter=folder / "sft" / "adapter")
        return train_dpo(model, tokenizer, pairs(), settings, folder / "dpo", **options)

    alone = numbers(pipeline(tmp_path / "alone"))
    with child(lambda: pipeline(tmp_path / "killed", on_step=lambda h: len(h) == 5 and os.kill(os.getpid(), 9))) as pid:
        assert ended(pid) == -signal.SIGKILL
    assert numbers(pipeline(tmp_path / "killed")) == alone
    assert adapter_bytes(tmp_path / "killed" / "dpo") == adapter_bytes(tmp_path / "alone" / "dpo")
