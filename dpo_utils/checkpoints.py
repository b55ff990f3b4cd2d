"""Checkpoints that survive a kill: written aside, hashed, renamed; the newest whole one is found again.

A checkpoint is a folder `checkpoints/step-000040` with the adapter (safetensors), the optimiser's state (read with
`weights_only=True`), the history (JSON lines), and last a manifest with the size and SHA-256 of every file.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

MANIFEST = "manifest.json"
STEP = "step-??????"  # what a finished checkpoint is called; one being written or deleted ends in .tmp


class SettingsChanged(ValueError):
    """What is on disk was made with other settings, data or weights; the message prints the difference."""


def differences(old: dict, new: dict) -> list[str]:
    """One line for every entry of a key that is not the same in both."""
    return [
        f"{name}: was {old.get(name)!r}, is {new.get(name)!r}" for name in sorted({*old, *new}) if old.get(name) != new.get(name)
    ]


def require_same(old: dict, new: dict, where) -> None:
    """Raise SettingsChanged if the keys differ."""
    if changed := differences(old, new):
        raise SettingsChanged(
            f"{where} was made with other settings; pass fresh=True (or --fresh) to start over, or choose another "
            "folder:" + "".join(f"\n  {line}" for line in changed)
        )


# --- files ------------------------------------------------------------------------------------------------------------


def digest(data: bytes) -> str:
    """Hex SHA-256."""
    return hashlib.sha256(data).hexdigest()


def disk_full(where, needed: int, free: int) -> OSError:
    """The error of a full disk, with the bytes needed and free."""
    return OSError(
        errno.ENOSPC,
        f"disk full: {where} needs {needed:,} bytes, {free:,} are free. What was saved before is whole: make room and "
        "run again to resume",
    )


@contextlib.contextmanager
def full_disk_explained(folder: Path, needed: int):
    """Turn "no space left" inside into an error that gives the bytes needed and free."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(folder, needed, shutil.disk_usage(folder).free) from problem


def require_space(folder: Path, needed: int) -> None:
    """Raise the error of a full disk before a library writes there that would report it in its own way."""
    if (free := shutil.disk_usage(folder).free) < needed:
        raise disk_full(folder, needed, free)


def write_file(path: Path, data: bytes) -> None:
    """Write aside, fsync, rename: a reader never sees half of it."""
    aside = path.with_name(path.name + ".tmp")
    with full_disk_explained(path.parent, len(data)), open(aside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def lines(rows: list[dict]) -> bytes:
    """Rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def append_row(path: Path, row: dict) -> None:
    """One more JSON line; not fsynced, since resuming writes the file again from the checkpoint."""
    data = lines([row])
    with full_disk_explained(path.parent, len(data)), open(path, "ab") as file:
        file.write(data)


def _fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def save(folder: Path, step: int, weights: dict, optimizer_state: dict, history: list[dict], key: dict, keep: int = 2) -> Path:
    """Write `folder/step-NNNNNN` and delete all but the newest `keep` checkpoints; returns the new folder.

    weights: {name: tensor}. Raises FloatingPointError for weights that are not finite and OSError on a full disk; the
    checkpoints before it stay whole either way.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, found {keep}: a run without a checkpoint cannot be resumed")
    if bad := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise FloatingPointError(f"step {step}: {bad[0]} is not finite, nothing was saved. Lower the learning rate.")
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("*.tmp"):
        shutil.rmtree(leftover)
    final = folder / f"step-{step:06d}"
    files = _contents(step, weights, optimizer_state, history, key)
    aside = final.with_name(final.name + ".tmp")
    with full_disk_explained(folder, sum(map(len, files.values()))):
        _write(aside, files)
    if final.exists():  # a broken one: a whole one would have been resumed from
        shutil.rmtree(final)
    os.replace(aside, final)
    _fsync_folder(folder)
    _delete_others(folder, final, keep)
    return final


def _contents(step, weights, optimizer_state, history, key) -> dict[str, bytes]:
    """The files of a checkpoint in the order they are written, the manifest last."""
    buffer = io.BytesIO()
    torch.save(optimizer_state, buffer)
    files = {
        "adapter.safetensors": safetensors.torch.save({n: v.detach().cpu().contiguous() for n, v in weights.items()}),
        "optimizer.pt": buffer.getvalue(),
        "history.jsonl": lines(history),
    }
    hashes = {name: {"bytes": len(data), "sha256": digest(data)} for name, data in files.items()}
    content = {"step": step, "key": key, "files": hashes}
    return files | {MANIFEST: json.dumps({"sha256": _own_hash(content), **content}, indent=1).encode()}


def _write(aside: Path, files: dict[str, bytes]) -> None:
    try:
        aside.mkdir()
        for name, data in files.items():
            write_file(aside / name, data)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk gets its space back
        raise
    _fsync_folder(aside)


def _own_hash(content: dict) -> str:
    return digest(json.dumps(content, sort_keys=True).encode())


def _delete_others(folder: Path, newest_one: Path, keep: int) -> None:
    """All but the newest `keep`; also those past the newest, which were passed over as broken."""
    found = sorted(folder.glob(STEP))
    whole_past = found[: found.index(newest_one) + 1]
    for old in {*found} - {*whole_past[-keep:]}:
        doomed = old.with_name(old.name + ".tmp")
        os.replace(old, doomed)  # a kill while it is deleted must not leave half a checkpoint under its name
        shutil.rmtree(doomed)


def read_manifest(checkpoint: Path) -> dict:
    """step, key and files of a checkpoint. Raises ValueError if it is not what was written."""
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    content = {name: manifest[name] for name in ("step", "key", "files")}
    if manifest["sha256"] != _own_hash(content) or checkpoint.name != f"step-{content['step']:06d}":
        raise ValueError("hash or step differs")
    return content


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is whole."""
    try:
        files = read_manifest(checkpoint)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{checkpoint / MANIFEST} is missing or not what was written"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.exists():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"] or digest(path.read_bytes()) != expected["sha256"]:
            return f"{path} is not what was written"
    return None


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; a broken one is passed over with a warning that names the file."""
    for checkpoint in sorted(folder.glob(STEP), reverse=True):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        warnings.warn(f"checkpoint passed over: {problem}", stacklevel=2)
    return None


def load(checkpoint: Path):
    """(key, weights, optimizer state, history) of a whole checkpoint."""
    history = [json.loads(line) for line in (checkpoint / "history.jsonl").read_text().splitlines()]
    optimizer_state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    weights = safetensors.torch.load_file(checkpoint / "adapter.safetensors")
    return read_manifest(checkpoint)["key"], weights, optimizer_state, history


# --- one cached tensor ------------------------------------------------------------------------------------------------


def save_cache(path: Path, tensor: torch.Tensor, key: dict) -> None:
    """A tensor in one safetensors file, with its key and its hash inside."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(key)
    notes = {"key": text, "sha256": _cache_hash(tensor, text)}
    write_file(path, safetensors.torch.save({"values": tensor.contiguous()}, metadata=notes))


def load_cache(path: Path, key: dict) -> torch.Tensor | None:
    """The tensor, or None if there is none or, with a warning, a broken one. Raises SettingsChanged for another key."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            notes, tensor = file.metadata(), file.get_tensor("values")
        old_key, whole = json.loads(notes["key"]), notes["sha256"] == _cache_hash(tensor, notes["key"])
    except (SafetensorError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        warnings.warn(f"{path} is not what was written: computed again", stacklevel=2)
        return None
    require_same(old_key, key, path)
    return tensor


def _cache_hash(tensor: torch.Tensor, key: str) -> str:
    return digest(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() + key.encode())
