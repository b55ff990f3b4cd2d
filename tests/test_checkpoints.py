"""A run that is killed, damaged or out of disk, and run again, gives what it gives left alone."""

import errno
import multiprocessing
import os
import signal

import pytest
import torch
from small_runs import adapter_bytes, dpo, numbers, pairs, policy, sft
from small_runs import profile as small_profile

from dpo_utils import checkpoints, train
from dpo_utils.checkpoints import SettingsChanged, read_history, read_tensors, write_tensors
from dpo_utils.train import train_dpo


def profile(**changes):
    """Steps of 4 out of 10 pairs in several micro-batches, a checkpoint every second step."""
    longer = {"steps": 9, "sft_steps": 9, "checkpoint_every": 2}
    return small_profile(**longer | {"micro_tokens": 120, "row_tokens": 60} | changes)


SETTINGS = profile()


@pytest.fixture(scope="module")
def same(tmp_path_factory):
    """A check that a run, run again, gives the history and the bytes of one left alone."""
    alone = {}
    for run in (dpo, sft):
        folder = tmp_path_factory.mktemp("alone")
        alone[run] = numbers(run(folder, SETTINGS)[0]), adapter_bytes(folder)

    def check(run, folder):
        history, _ = run(folder, SETTINGS)
        assert (numbers(history), adapter_bytes(folder)) == alone[run]
        assert read_history(folder) == history

    return check


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    dpo(folder, SETTINGS)
    return folder


def names(folder):
    return sorted(path.stem for path in (folder / "checkpoints").iterdir())


def at(step, act):
    """An `on_step` that acts once after a step."""
    return lambda history: len(history) == step and act()


def weight(model, name):
    return next(p for n, p in model.named_parameters() if name in n)


def send(number):
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("run, after", [(dpo, 1), (dpo, 9), (sft, 5)])
def test_killed_right_after_a_step(run, after, tmp_path, same):
    options = {"on_step": at(after, send(signal.SIGKILL))}
    fork = multiprocessing.get_context("fork")  # the child shares everything loaded so far
    child = fork.Process(target=run, args=(tmp_path, SETTINGS), kwargs=options)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL and len(read_history(tmp_path)) == after
    same(run, tmp_path)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_takes_one_run_at_a_time_until_that_process_is_gone(fresh, tmp_path, same):
    fork = multiprocessing.get_context("fork")
    there, wait = fork.Event(), {"on_step": at(3, lambda: [there.set(), signal.pause()])}
    child = fork.Process(target=dpo, args=(tmp_path, SETTINGS), kwargs=wait, daemon=True)
    child.start()
    assert there.wait(60)
    with pytest.raises(BlockingIOError, match=rf"process {child.pid} on .* is training into it"):
        dpo(tmp_path, SETTINGS, fresh=fresh)
    child.kill()
    child.join()
    assert len(read_history(tmp_path)) == 3
    same(dpo, tmp_path)


@pytest.mark.parametrize(
    "signals, said, newest",
    [
        ([signal.SIGTERM], "stopped after step 5: run again to resume", "step-000005"),
        ([signal.SIGINT], "stopped after step 5: run again to resume", "step-000005"),
        ([signal.SIGINT] * 2, "stopped at once", "step-000004"),
    ],
)
def test_a_signal_stops_after_the_running_step_with_a_checkpoint(
    signals, said, newest, tmp_path, same
):
    before, (model, tokenizer) = signal.getsignal(signal.SIGINT), policy(SETTINGS)
    on_step = at(5, lambda: [send(number)() for number in signals])
    with pytest.raises(KeyboardInterrupt, match=said):
        train_dpo(model, tokenizer, pairs(), SETTINGS, tmp_path, on_step=on_step)
    assert names(tmp_path)[-1] == newest and signal.getsignal(signal.SIGINT) is before
    train_dpo(model, tokenizer, pairs(), SETTINGS, tmp_path)  # in a notebook it is still there
    same(dpo, tmp_path)


def test_a_damaged_newest_checkpoint_costs_steps_but_not_the_result(tmp_path, same):
    with pytest.raises(KeyboardInterrupt):
        dpo(tmp_path, SETTINGS, on_step=at(7, send(signal.SIGTERM)))
    newest = tmp_path / "checkpoints" / "step-000007.safetensors"
    damaged = bytearray(newest.read_bytes())
    damaged[-5000] ^= 1  # among the weights
    newest.write_bytes(damaged)
    with pytest.warns(UserWarning, match="step-000007.safetensors is not what was written"):
        same(dpo, tmp_path)


@pytest.mark.filterwarnings("ignore:.*is not what was written")
def test_every_byte_of_a_small_file_counts(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.arange(3.0), "b": torch.ones(2, 2)}, {"beta": 0.1})
    whole, tensors = path.read_bytes(), read_tensors(path)[0]
    assert torch.equal(tensors["a"], torch.arange(3.0))
    for place, byte in enumerate(whole):
        path.write_bytes(whole[:place] + bytes([byte ^ 1]) + whole[place + 1 :])
        assert read_tensors(path) is None or chr(byte).isspace(), place
        path.write_bytes(whole[:place])
        assert read_tensors(path) is None, place


def test_two_checkpoints_stay_and_none_that_is_not_finite(tmp_path, finished):
    assert names(finished) == ["step-000008", "step-000009"]
    model, tokenizer = policy(SETTINGS)
    with pytest.raises(FloatingPointError, match="step 4: .* is not finite, nothing was saved"):
        on_step = at(4, lambda: weight(model, "lora_A").data[0, 0].fill_(float("nan")))
        train_dpo(model, tokenizer, pairs(), SETTINGS, tmp_path, on_step=on_step)
    assert names(tmp_path) == ["step-000002"]


def test_a_full_disk_stops_with_the_numbers_and_resumes(tmp_path, same, monkeypatch):
    real = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 500_000 and len(read_history(tmp_path)) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(handle)

    monkeypatch.setattr(checkpoints.os, "fsync", full)
    said = "disk full: .* needs 1,[0-9,]+ bytes, [0-9,]+ are free. What was saved before is whole"
    with pytest.raises(OSError, match=said):
        dpo(tmp_path, SETTINGS)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-000002", "step-000004"]  # and no half written file
    same(dpo, tmp_path)


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


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_tokenizer_or_template_refuses(finished, other):
    model, tokenizer = policy(SETTINGS)
    OTHERS[other](model, tokenizer)
    line = other if other in ("template", "tokenizer") else "weights"
    message = rf"reference.safetensors was made[\s\S]*\n  {line}: was"
    with pytest.raises(SettingsChanged, match=message):
        train_dpo(model, tokenizer, pairs(), SETTINGS, finished)
