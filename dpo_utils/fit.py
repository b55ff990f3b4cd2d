"""The loop behind SFT and DPO: resumed to the bit, stopped between steps, never silently wrong."""

import contextlib
import json
import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from dpo_utils import checkpoints
from dpo_utils.keys import run_key
from dpo_utils.logps import options_for, why_plain
from dpo_utils.models import save_adapter, trainable, unwrap
from dpo_utils.preflight import after_first_step, before_first_step
from dpo_utils.profiles import Profile, make_plan
from dpo_utils.step import Run, Task, take_step

PATIENCE = 3  # non-finite steps in a row before the run stops


def engine(model, tracker=None, output=None) -> Accelerator:
    """Accelerate, on the device the model is on."""
    return Accelerator(cpu=model.device.type == "cpu", log_with=tracker, project_dir=output)


def read_history(folder) -> list[dict]:
    """The rows of a run's history.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def fit(
    model, tokenizer, task: Task, profile: Profile, output=None, *,
    fresh=False, keep=2, tracker=None, on_step=None, plain=None, loss_options=None,
) -> list[dict]:  # fmt: skip
    """Train the adapter in place and return one dict a step.

    output: folder for history.jsonl, adapter/ and checkpoints/; run again with the same settings it resumes, and a
    finished run is loaded, not repeated. fresh: start over. keep: checkpoints kept. tracker: an Accelerate tracker
    (tensorboard, wandb, trackio). on_step: called with the history after every step. plain: force (True) or forbid
    (False) the plain form of the log-probs.
    Raises SettingsChanged if `output` was made with other settings, FloatingPointError after three non-finite steps,
    RuntimeError if a check around the first step fails, KeyboardInterrupt between two steps, after a checkpoint.
    """
    if task.steps < 1:
        raise ValueError(f"steps must be at least 1, found {task.steps}")
    if not trainable(model):
        raise RuntimeError("nothing is trainable: load the adapter with is_trainable=True (load_policy does)")
    run = Run(
        model, task, profile, engine(model, tracker, output),
        torch.optim.AdamW(trainable(model), lr=task.learning_rate, weight_decay=0.0),
        {**options_for(profile, tokenizer), "plain": plain}, make_plan(profile, model.device.type).loss_scale,
        Path(output) if output else None,
        run_key(model, tokenizer, task, profile, loss_options=loss_options), keep, [],
    )  # fmt: skip
    if fresh and run.writes:
        _clear(run.folder)
    run.accelerator.wait_for_everyone()
    _resume(run)
    with _tracking(run, tracker):
        _loop(run, on_step)
    if run.writes:
        _export(run)
    run.accelerator.wait_for_everyone()
    return run.history


def _clear(folder: Path) -> None:
    """Delete what a run wrote, and nothing else that may lie in its folder."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    (folder / "history.jsonl").unlink(missing_ok=True)


def _resume(run: Run) -> None:
    """Load the newest whole checkpoint, if there is one, into model, optimiser and history."""
    say = run.accelerator.print
    checkpoint = checkpoints.newest(run.folder / "checkpoints") if run.folder else None
    if checkpoint is None:
        reason = why_plain(run.model)
        if reason or run.folder:
            how = f"plain rows, since {reason}" if reason else "shared rows"
            say(f"log-probs: {how}; attention {unwrap(run.model).config.get_text_config()._attn_implementation}")
        return None
    key, weights, optimizer_state, run.history = checkpoints.load(checkpoint)
    checkpoints.require_same(key, run.key, run.folder)
    own = _adapter(run.model)
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    run.optimizer.load_state_dict(optimizer_state)
    if len(run.history) == run.task.steps:
        return say(f"{run.folder.name}: this run is finished, its adapter is loaded (fresh=True trains again)")
    return say(f"resumed after step {len(run.history)} from {checkpoint.name}")


def _adapter(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextlib.contextmanager
def _tracking(run: Run, tracker):
    """Trackers around the loop, finished one by one: Accelerate's end_training would end the process group too."""
    if tracker:
        config = {name: value for name, value in run.key.items() if isinstance(value, (int, float, str))}
        run.accelerator.init_trackers("dpo_utils", config=config)
    try:
        yield
    finally:
        for started in run.accelerator.trackers:
            started.finish()


def _export(run: Run) -> None:
    """The adapter in PEFT's format, in DIR/adapter: written aside, then moved file by file."""
    folder, aside = run.folder / "adapter", run.folder / "adapter.tmp"
    checkpoints.require_space(run.folder, sum(p.numel() * p.element_size() for p in trainable(run.model)))
    shutil.rmtree(aside, ignore_errors=True)
    save_adapter(run.model, aside)
    folder.mkdir(exist_ok=True)
    for path in aside.iterdir():
        path.replace(folder / path.name)
    aside.rmdir()


def _loop(run: Run, on_step) -> None:
    done, task = len(run.history), run.task
    if run.writes:
        run.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_file(run.folder / "history.jsonl", checkpoints.lines(run.history))
    if done == task.steps:
        return
    run.model.train()
    start = None if done else before_first_step(run.model, task, run.numbers(1)[:2], run.profile, run.options)
    quiet = {} if run.accelerator.is_main_process else {"disable": True}  # else TQDM_DISABLE decides
    bar = tqdm(total=task.steps, initial=done, desc=task.stage, **quiet)
    with bar, _signals() as stop:
        for step in range(done + 1, task.steps + 1):
            row = take_step(run, step)
            if start and "nonfinite" not in row:
                start = after_first_step(run.model, start, row["grad_norm"], run.options)
            run.history.append(row)
            _show(run, row, bar, on_step)
            _abort_if_hopeless(run)
            stopping = _any_process(stop.signal is not None, run.accelerator)
            if run.writes and (step % run.profile.checkpoint_every == 0 or step == task.steps or stopping):
                _save(run)
            if stopping:
                run.accelerator.wait_for_everyone()
                raise KeyboardInterrupt(f"stopped by {stop.signal} after step {step}; run again to resume")


def _save(run: Run) -> None:
    checkpoints.save(
        run.folder / "checkpoints", len(run.history), _adapter(run.model), run.optimizer.state_dict(), run.history,
        run.key, run.keep,
    )  # fmt: skip


def _show(run: Run, row: dict, bar, on_step) -> None:
    """One row to the file, the trackers, the bar and the caller."""
    if run.writes:
        checkpoints.append_row(run.folder / "history.jsonl", row)
    run.accelerator.log({name: value for name, value in row.items() if isinstance(value, float)}, step=row["step"])
    bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "rewards/margins") if name in row}, refresh=False)
    bar.update()
    if on_step:
        on_step(run.history)


def _abort_if_hopeless(run: Run) -> None:
    last = run.history[-PATIENCE:]
    if len(last) == PATIENCE and all(row.get("nonfinite") for row in last):
        step = len(run.history)
        rows = sorted(run.task.rows[i] for i in run.numbers(step))
        raise FloatingPointError(
            f"the loss or its gradient was NaN or infinite {PATIENCE} steps in a row, last at step {step} on data rows "
            f"{rows}. They changed no parameter. Lower the learning rate, or look at these rows."
        )


# --- stopping ---------------------------------------------------------------------------------------------------------


class _Stop:
    signal = None


@contextlib.contextmanager
def _signals():
    """Turn SIGTERM and SIGINT into a request to stop after the running step, with a checkpoint."""
    stop = _Stop()

    def request(number, _frame):
        if stop.signal:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of the running step")
        stop.signal = signal.Signals(number).name

    try:
        old = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: leave signals to whoever owns them
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _any_process(flag: bool, accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))
