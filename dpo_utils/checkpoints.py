"""Checkpoints that survive a kill: written aside, hashed, renamed; the newest whole one is found again.

A checkpoint is a folder `checkpoints/step-000040` with the adapter (safetensors), the optimiser's state (read with
`weights_only=True`), the history (JSON lines), and last a manifest with the size and SHA-256 of every file.
"""

import errno
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

MANIFEST = "manifest.json"


class SettingsChanged(ValueError):
    """What is on disk was made with other settings, data or weights; the message prints the difference."""


def digest(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def differences(old: dict, new: dict) -> list[str]:
    """One line for every entry of a key that is not the same in both."""
    return [
        f"{name}: was {old.get(name)!r}, is {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    ]


def require_same(old: dict, new: dict, where) -> None:
    """Raise SettingsChanged if the keys differ."""
    if changed := differences(old, new):
        raise SettingsChanged(
            f"{where} was made with other settings; pass fresh=True (or --fresh) to start over, or choose another folder:\n  "
            + "\n  ".join(changed)
        )


def write_file(path: Path, data: bytes) -> None:
    """Write, flush and fsync. A full disk is reported with the bytes needed and free."""
    try:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            errno.ENOSPC,
            f"disk full: {path} needs {len(data):,} bytes, {free:,} are free; the last checkpoint is whole",
        ) from problem


def write_json(path: Path, value) -> None:
    """A JSON file, written aside and renamed, so that a reader never sees half of it."""
    aside = path.with_name(path.name + ".tmp")
    write_file(aside, (json.dumps(value, indent=1) + "\n").encode())
    os.replace(aside, path)


def write_lines(path: Path, rows: list[dict]) -> None:
    """A JSON-lines file, written aside and renamed."""
    aside = path.with_name(path.name + ".tmp")
    write_file(aside, "".join(json.dumps(row) + "\n" for row in rows).encode())
    os.replace(aside, path)


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save(
    folder: Path, step: int, weights: dict, optimizer_state: dict, history: list[dict], key: dict, keep: int = 2
) -> Path:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep` checkpoints; returns the new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:06d}"
    aside = folder / f"{final.name}.tmp"
    aside.mkdir()
    try:
        _write(aside, step, weights, optimizer_state, history, key)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    _fsync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
    return final


def _write(aside: Path, step, weights, optimizer_state, history, key) -> None:
    weights = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    needed = 3 * sum(v.numel() * v.element_size() for v in weights.values())  # the adapter and its two Adam moments
    if (free := shutil.disk_usage(aside).free) < needed:
        raise OSError(
            errno.ENOSPC,
            f"disk full: a checkpoint in {aside.parent} needs {needed:,} bytes, {free:,} are free; the last one is whole",
        )
    try:
        save_file(weights, aside / "adapter.safetensors")
        torch.save(optimizer_state, aside / "optimizer.pt")
    except Exception as problem:  # safetensors and torch wrap "no space left" in errors of their own
        if "space" in str(problem) or getattr(problem, "errno", None) == errno.ENOSPC or "write" in str(problem):
            free = shutil.disk_usage(aside).free
            raise OSError(
                errno.ENOSPC,
                f"disk full: a checkpoint in {aside.parent} needs {needed:,} bytes, {free:,} are free; the last one is whole",
            ) from problem
        raise
    write_file(aside / "history.jsonl", "".join(json.dumps(row) + "\n" for row in history).encode())
    files = {}
    for path in sorted(aside.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": digest(path.read_bytes())}
    write_file(aside / MANIFEST, json.dumps({"step": step, "key": key, "files": files}, indent=1).encode())
    _fsync_folder(aside)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        for name, expected in manifest["files"].items():
            path = checkpoint / name
            if not path.exists():
                return f"{path} is missing"
            if path.stat().st_size != expected["bytes"] or digest(path.read_bytes()) != expected["sha256"]:
                return f"{path} is not what was written"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{checkpoint / MANIFEST} cannot be read"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; a broken one is passed over with a warning that names the file."""
    for checkpoint in sorted(folder.glob("step-??????"), reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        warnings.warn(f"checkpoint passed over: {problem}", stacklevel=2)
    return None


def load(checkpoint: Path):
    """(step, key, weights, optimizer state, history) of a whole checkpoint."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    history = [json.loads(line) for line in (checkpoint / "history.jsonl").read_text().splitlines()]
    optimizer_state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return manifest["step"], manifest["key"], load_file(checkpoint / "adapter.safetensors"), optimizer_state, history
