"""A run that is killed, damaged or out of disk, and run again, gives what it gives when left alone.

DPO_KILLS sets how many random moments are tried: `DPO_KILLS=200 pytest tests/test_checkpoints.py`.
"""

import errno
import json
import os
import random
import shutil
import signal
import time
import warnings

import pytest
import torch
from small_runs import adapter_bytes, child, dpo, ended, numbers, pairs, policy, sft
from small_runs import profile as small_profile

from dpo_utils import checkpoints, reference, train
from dpo_utils.checkpoints import SettingsChanged, read_history, read_tensors, write_tensors
from dpo_utils.logps import all_logps, options_for
from dpo_utils.tokens import as_item, tokenize_all
from dpo_utils.train import train_dpo

KILLS = int(os.environ.get("DPO_KILLS", 6))
KEY = {"beta": 0.1, "data": "abc"}


def profile(**changes):
    """Steps of 4 out of 10 pairs in several micro-batches, a checkpoint every second step."""
    changes = {"steps": 9, "sft_steps": 9, "checkpoint_every": 2, **changes}
    return small_profile(**{"micro_tokens": 120, "row_tokens": 60, **changes})


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The profile on a model with dropout in its config, as Phi-2 has it."""
    folder = tmp_path_factory.mktemp("model") / "dropout"
    shutil.copytree(profile().model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}
    (folder / "config.json").write_text(json.dumps(config))
    return profile(model=str(folder))


@pytest.fixture(scope="module")
def left_alone(settings, tmp_path_factory):
    """{run: (history, adapter bytes)} of runs that nobody killed."""
    found = {}
    for run in (dpo, sft):
        folder = tmp_path_factory.mktemp("alone")
        found[run] = numbers(run(folder, settings)[0]), adapter_bytes(folder)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    dpo(folder, profile())
    return folder


def same(run, folder, settings, left_alone):
    history, _ = run(folder, settings)
    assert (numbers(history), adapter_bytes(folder)) == left_alone[run]
    assert read_history(folder) == history


def names(folder):
    return sorted(path.stem for path in (folder / "checkpoints").iterdir())


def at(step, act):
    """An `on_step` that acts once after a step."""
    return lambda history: len(history) == step and act()


def weight(model, name):
    return next(p for n, p in model.named_parameters() if name in n)


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("run, after", [(dpo, 1), (dpo, 4), (dpo, 9), (sft, 5)])
def test_killed_right_after_a_step(run, after, tmp_path, settings, left_alone):
    with child(lambda: run(tmp_path, settings, on_step=at(after, send(signal.SIGKILL)))) as pid:
        assert ended(pid) == -signal.SIGKILL
    assert len(read_history(tmp_path)) == after
    same(run, tmp_path, settings, left_alone)


def test_killed_at_random_moments_again_and_again(tmp_path, settings, left_alone):
    """At any moment of the run, from its first file to its last, until one try gets through."""
    rng, start = random.Random(os.environ.get("DPO_SEED", "kill")), time.perf_counter()
    with child(lambda: dpo(tmp_path / "timed", settings)) as pid:
        assert ended(pid) == 0
    whole, kills = time.perf_counter() - start, 0
    while kills < KILLS:
        alive = True
        while alive:
            with child(lambda: dpo(tmp_path / "killed", settings)) as pid:
                time.sleep(rng.uniform(0.1, 1.0) * whole)
                os.kill(pid, signal.SIGKILL)
                alive = ended(pid) == -signal.SIGKILL
            kills += alive
        same(dpo, tmp_path / "killed", settings, left_alone)
        shutil.rmtree(tmp_path / "killed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_running_step_with_a_checkpoint(
    number, tmp_path, settings, monkeypatch, left_alone
):
    before, real = signal.getsignal(signal.SIGINT), train.take_step

    def interrupted(run, step, items):
        if step == 3:
            os.kill(os.getpid(), number)
        return real(run, step, items)

    monkeypatch.setattr(train, "take_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 3: run again to resume"):
        dpo(tmp_path, settings)
    assert names(tmp_path) == ["step-000002", "step-000003"]
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    same(dpo, tmp_path, settings, left_alone)


def test_a_second_signal_stops_at_once(tmp_path, settings, left_alone):
    twice = at(5, lambda: [send(signal.SIGINT)() for _ in range(2)])
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        dpo(tmp_path, settings, on_step=twice)
    assert names(tmp_path)[-1] == "step-000004"
    same(dpo, tmp_path, settings, left_alone)


def test_the_cell_run_again_with_the_model_in_memory_resumes(tmp_path, settings, left_alone):
    model, tokenizer = policy(settings)  # in a notebook it is still there, trained half way
    with pytest.raises(ZeroDivisionError):
        train_dpo(model, tokenizer, pairs(), settings, tmp_path, on_step=at(3, lambda: 1 / 0))
    history = train_dpo(model, tokenizer, pairs(), settings, tmp_path)
    assert (numbers(history), adapter_bytes(tmp_path)) == left_alone[dpo]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(place):
    def harm(path):
        data = bytearray(path.read_bytes())
        data[place if place >= 0 else len(data) + place] ^= 1
        path.write_bytes(data)

    return harm


HARMS = {"cut short": truncate, "header": flip(3), "key": flip(90), "weights": flip(-5000)}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_result(
    harm, tmp_path, settings, left_alone
):
    with pytest.raises(KeyboardInterrupt):
        dpo(tmp_path, settings, on_step=at(7, send(signal.SIGTERM)))
    HARMS[harm](tmp_path / "checkpoints" / "step-000007.safetensors")
    with pytest.warns(UserWarning, match="step-000007.safetensors is not what was written"):
        same(dpo, tmp_path, settings, left_alone)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*not what was written")  # it is gone
        same(dpo, tmp_path, settings, left_alone)


def test_every_byte_of_a_small_file_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"key": KEY})
    whole, tensors = path.read_bytes(), read_tensors(path)[0]
    assert torch.equal(tensors["a"], torch.arange(3.0))
    for place in range(len(whole)):
        flip(place)(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = read_tensors(path)
        assert found is None or whole[place : place + 1].isspace(), place
        path.write_bytes(whole)


def test_two_checkpoints_stay_and_none_that_is_not_finite(tmp_path, settings):
    dpo(tmp_path, settings)
    assert names(tmp_path) == ["step-000008", "step-000009"]
    model, tokenizer = policy(settings)
    with pytest.raises(FloatingPointError, match="step 4: .* is not finite, nothing was saved"):
        on_step = at(4, lambda: weight(model, "lora_A").data[0, 0].fill_(float("nan")))
        train_dpo(model, tokenizer, pairs(), settings, tmp_path / "nan", on_step=on_step)
    assert names(tmp_path / "nan") == ["step-000002"]


def test_a_full_disk_stops_with_the_numbers_and_resumes(
    tmp_path, settings, left_alone, monkeypatch
):
    real = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 500_000 and len(read_history(tmp_path)) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    said = "disk full: .* needs 1,[0-9,]+ bytes, [0-9,]+ are free. What was saved before is whole"
    with pytest.raises(OSError, match=said):
        dpo(tmp_path, settings)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000002", "step-000004"]  # and no half written file
    same(dpo, tmp_path, settings, left_alone)


@pytest.mark.parametrize("run", [dpo, sft])
def test_a_finished_run_is_loaded_not_repeated(tmp_path, monkeypatch, capsys, run):
    history, weights = run(tmp_path)
    whole = adapter_bytes(tmp_path)
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(whole[:1000])
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setattr(train, "take_step", None)
    again, same_weights = run(tmp_path)
    assert again == history and adapter_bytes(tmp_path) == whole
    assert all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
    assert "this run is finished" in capsys.readouterr().out
    monkeypatch.undo()
    afresh, _ = run(tmp_path, fresh=True)
    assert numbers(afresh) == numbers(history) and afresh != history  # other wall times
    assert (tmp_path / "thesis.txt").read_text() == "mine"


OTHER_PAIRS = [{**row, "chosen": row["chosen"].replace(".", "!")} for row in pairs()]
HASH = "'[0-9a-f]{16}'"
CHANGES = {
    "beta: was 0.1, is 0.3": {"beta": 0.3},
    "learning_rate: was 0.001, is 0.002": {"learning_rate": 2e-3},
    "steps: was 9, is 11": {"steps": 11},
    "loss: was 'dpo', is 'ipo'": {"loss": "ipo"},
    "lora_r: was 16, is 8": {"lora_r": 8},
    "quantised: was True, is False": {"quantize": False},
    f"revision: was None, is '{'a' * 40}'": {"revision": "a" * 40},
    "max_length: was 128, is 64": {"max_length": 64},
    f"data: was {HASH}, is {HASH}": {},
}


@pytest.mark.parametrize("line", CHANGES)
def test_changed_settings_refuse_and_print_the_difference(finished, line):
    before = (finished / "history.jsonl").read_bytes()
    message = rf"made with other settings; pass fresh=True[\s\S]*\n  {line}"
    with pytest.raises(SettingsChanged, match=message):
        dpo(finished, profile(**CHANGES[line]), None if CHANGES[line] else OTHER_PAIRS)
    assert (finished / "history.jsonl").read_bytes() == before


OTHERS = {
    "a weight": lambda model, _: weight(model, "layernorm.weight").data[1].mul_(1.01),
    "scales": lambda model, _: weight(model, "fc1.base_layer").quant_state.absmax[1].add_(1),
    "template": lambda _, t: setattr(t, "chat_template", t.chat_template + "{# another #}"),
    "tokenizer": lambda _, tokenizer: tokenizer.add_tokens(["zyzzyva"]),
}


@pytest.mark.parametrize("cached", [False, True], ids=["run", "cached reference"])
@pytest.mark.parametrize("other", OTHERS)
def test_another_model_tokenizer_or_template_refuses(finished, monkeypatch, other, cached):
    model, tokenizer = policy(profile())
    OTHERS[other](model, tokenizer)
    line = other if other in ("template", "tokenizer") else "weights"
    if not cached:
        monkeypatch.setattr(train, "reference_logps", lambda *_: torch.zeros(10, 2))
    with pytest.raises(SettingsChanged, match=f"\n  {line}: was") as problem:
        train_dpo(model, tokenizer, pairs(), profile(), finished)
    assert ("reference.safetensors was made" in str(problem.value)) == cached


def test_sft_does_not_mind_settings_of_dpo(tmp_path, capsys):
    sft(tmp_path)
    sft(tmp_path, small_profile(beta=0.5, loss="ipo"))
    assert "this run is finished" in capsys.readouterr().out


def test_the_reference_is_the_model_dpo_starts_from_and_is_kept(tmp_path, monkeypatch):
    sft(tmp_path)
    model, tokenizer = policy(adapter=tmp_path / "adapter")
    items = [as_item(row) for row in tokenize_all(pairs(), tokenizer, 128)[0]]
    start = all_logps(model, items, **options_for(small_profile(), tokenizer))
    train_dpo(model, tokenizer, pairs(), small_profile(steps=2), tmp_path / "dpo")
    kept, _ = read_tensors(tmp_path / "dpo" / "reference.safetensors")
    assert torch.equal(kept["logps"], start)
    monkeypatch.setattr(reference, "all_logps", None)  # not computed again
    found = reference.reference_logps(model, tokenizer, items, small_profile(), tmp_path / "dpo")
    assert torch.equal(found, start)
