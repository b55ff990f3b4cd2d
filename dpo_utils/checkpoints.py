"""What a run leaves on disk, so that no work is lost and nothing stale is used.

A file is written aside, flushed and renamed, and carries a hash of all it says: a reader finds a
whole file or none. Next to the tensors it holds a *key*, everything they depend on; under another
key nothing is used again.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import signal
import threading
import warnings
from pathlib import Path

import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from dpo_utils import export

STEP = "step-??????.safetensors"
KEEP = 2  # checkpoints: the newest, and one to fall back on


class SettingsChanged(ValueError):
    """What is on disk was made with other settings, data or weights; the message says which."""


def require_same(old: dict, new: dict, where) -> None:
    """Raise SettingsChanged if two keys differ."""
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if names:
        lines = (f"\n  {name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in names)
        raise SettingsChanged(
            f"{where} was made with other settings; pass fresh=True (or --fresh) to start over, or "
            f"choose another folder:{''.join(lines)}"
        )


@contextlib.contextmanager
def disk_full_explained(folder: Path, needed: int):
    """Turn "no space left" into an error with the bytes needed and free."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        sizes = f"{folder} needs {needed:,} bytes, {free:,} are free"
        saved = "What was saved before is whole: make room and run again to resume"
        raise OSError(errno.ENOSPC, f"disk full: {sizes}. {saved}") from problem


def write_file(path: Path, data: bytes) -> None:
    """Write aside, flush to the disk, rename. Raises OSError with both numbers on a full disk."""
    aside = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with disk_full_explained(path.parent, len(data)), open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # a full disk gets its space back


def _lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_history(folder) -> list[dict]:
    """The rows of a run's history.jsonl."""
    text = (Path(folder) / "history.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def write_tensors(path: Path, tensors: dict, notes: dict) -> None:
    """Tensors by name, notes as JSON and the hash of both in one safetensors file."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(notes)
    head = {"notes": text, "sha256": digest(text, tensors)}
    write_file(path, safetensors.torch.save(tensors, metadata=head))


def read_tensors(path: Path) -> tuple[dict, dict] | None:
    """(tensors, notes) of a file, or None: there is none or, with a warning, it is damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            head, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
        if head["sha256"] == digest(head["notes"], tensors):
            return tensors, json.loads(head["notes"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        pass  # named below
    warnings.warn(f"{path} is not what was written: passed over", stacklevel=2)
    return None


def newest_checkpoint(folder: Path) -> tuple[dict, dict] | None:
    """(tensors, notes) of the newest whole checkpoint of a run, or None."""
    found = sorted((folder / "checkpoints").glob(STEP), reverse=True)
    return next(filter(None, map(read_tensors, found)), None)


def digest(*parts) -> str:
    """Hex SHA-256 of texts, of JSON, and of the names, shapes and bytes of tensors."""
    total = hashlib.sha256()
    for part in parts:
        tensors = isinstance(part, dict) and all(map(torch.is_tensor, part.values()))
        total.update(b"" if tensors else json.dumps(part, sort_keys=True).encode())
        for name, value in sorted(part.items()) if tensors else ():
            total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            value = value.detach().cpu().contiguous().flatten()
            total.update(value.view(torch.uint8).numpy())
    return total.hexdigest()[:16]


class RunFolder:
    """Where a run keeps its history, checkpoints and adapter; without a path it keeps nothing.

    The same settings resume, others are refused, and only the main process writes.
    """

    def __init__(self, run, path, key: dict):
        self.run, self.path, self.key = run, Path(path) if path else None, key
        self.writes = self.path is not None and run.accelerator.is_main_process
        self.weights = {n: p for n, p in run.model.named_parameters() if p.requires_grad}

    @contextlib.contextmanager
    def alone(self):
        """Keep the folder to this run. Raises BlockingIOError while another process trains in it.

        The lock is the process's own: it goes with it, however it ends.
        """
        if not self.writes:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        lock, holder = FileLock(self.path / "run.lock", blocking=False), self.path / "run.pid"
        try:
            held = lock.acquire()
        except Timeout:
            who = f"process {holder.read_text(encoding='utf-8')} is training into it"
            raise BlockingIOError(f"{self.path}: {who}; wait, or choose another folder") from None
        with held:
            write_file(holder, f"{os.getpid()} on {platform.node()}".encode())
            yield

    def open(self, fresh: bool) -> None:
        """Load the newest whole checkpoint into model, optimizer and history; fresh deletes it."""
        run = self.run
        if fresh and self.writes:  # what a run wrote, and nothing else that may be in its folder
            for name in ("checkpoints", "adapter"):
                shutil.rmtree(self.path / name, ignore_errors=True)
        run.accelerator.wait_for_everyone()
        if loaded := self.path and newest_checkpoint(self.path):
            tensors, notes = loaded
            require_same(notes["key"], self.key, self.path)
            run.history = notes["history"]
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(tensors.pop(name))
            states = {}
            for name, value in tensors.items():
                number, moment = name.split()
                states.setdefault(int(number), {})[moment] = value
            run.optimizer.load_state_dict(run.optimizer.state_dict() | {"state": states})
        if self.path and (done := len(run.history)):
            finished = "this run is finished, its adapter is loaded (fresh=True trains again)"
            status = finished if done == run.profile.steps else f"resumed after step {done}"
            run.accelerator.print(f"{self.path.name}: {status}")
        if self.writes:
            write_file(self.path / "history.jsonl", _lines(run.history))

    def append(self, row: dict) -> None:
        """One more row of history.jsonl, not flushed: resuming writes the file again."""
        if self.writes:
            path = self.path / "history.jsonl"
            with disk_full_explained(self.path, 4096), path.open("ab") as file:
                file.write(_lines([row]))

    def save(self) -> None:
        """A checkpoint after the last step; older ones than the newest `KEEP` are deleted.

        Raises FloatingPointError for weights that are not finite; the others stay whole.
        """
        step, weights = len(self.run.history), self.weights
        if not self.writes:
            return
        if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
            said = f"step {step}: {bad[0]} is not finite, nothing was saved"
            raise FloatingPointError(f"{said}. Lower the learning rate.")
        states = self.run.optimizer.state_dict()["state"]
        moments = {f"{i} {name}": x for i, state in states.items() for name, x in state.items()}
        path = self.path / "checkpoints" / f"step-{step:06d}.safetensors"
        write_tensors(path, weights | moments, {"key": self.key, "history": self.run.history})
        found = sorted(path.parent.glob(STEP))
        whole = found[: found.index(path) + 1]  # what comes after it was passed over as damaged
        for old in {*found} - {*whole[-KEEP:]}:
            old.unlink()

    def close(self) -> None:
        """The adapter in PEFT's format, in adapter/: the same adapter gives the same bytes."""
        if self.writes:
            needed = sum(p.numel() * p.element_size() for p in self.weights.values())
            with disk_full_explained(self.path, needed):
                if shutil.disk_usage(self.path).free < needed:
                    raise OSError(errno.ENOSPC, "the library would say it in its own way")
                export.save_adapter(self.run.model, self.path / "adapter")
                export.write_card(self.run, self.key, self.path / "adapter")
        self.run.accelerator.wait_for_everyone()


@contextlib.contextmanager
def orderly_stop(accelerator):
    """A list of SIGTERM and SIGINT as they come, to stop after the step; a second stops at once.

    Trackers are finished, whatever ends the run.
    """
    caught = []

    def note(number, _frame):
        if caught:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of the running step")
        caught.append(signal.Signals(number).name)

    in_main = threading.current_thread() is threading.main_thread()  # only it may catch them
    old = {n: signal.signal(n, note) for n in (signal.SIGTERM, signal.SIGINT) if in_main}
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for tracker in accelerator.trackers:  # end_training would end the process group too
            tracker.finish()
