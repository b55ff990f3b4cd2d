"""A checkpoint is whole or is not chosen: whatever is broken, whenever the process dies, however full the disk."""

import errno
import json
import os
import pickle
import shutil
import signal
import warnings

import pytest
import torch
from small_runs import child, ended

from dpo_utils import checkpoints as C

KEY = {"beta": 0.1, "data": "abc"}


def weights(step):
    return {"a.lora_A": torch.full((4, 8), float(step)), "a.lora_B": torch.arange(8.0) + step}


def state(step):
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.full((3,), float(step))
    optimizer.step()
    return optimizer.state_dict()


def save(folder, step, **options):
    return C.save(folder, step, weights(step), state(step), [{"step": n + 1} for n in range(step)], KEY, **options)


def test_what_is_saved_comes_back(tmp_path):
    save(tmp_path, 3)
    key, loaded, optimizer_state, history = C.load(C.newest(tmp_path))
    assert key == KEY and [row["step"] for row in history] == [1, 2, 3]
    assert all(torch.equal(loaded[name], value) for name, value in weights(3).items())
    assert torch.equal(optimizer_state["state"][0]["exp_avg"], torch.full((3,), 0.3))  # (1 - 0.9) * gradient 3


def test_at_most_keep_checkpoints_and_the_newest_ones(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        save(tmp_path, 5, keep=0)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def delete(path):
    path.unlink()


def swap(path):
    """Put the same file of the older checkpoint in its place."""
    shutil.copy(path.parent.parent / "step-000001" / path.name, path)


FILES = ["adapter.safetensors", "optimizer.pt", "history.jsonl", "manifest.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("harm", [truncate, flip, delete, swap])
def test_a_broken_file_falls_back_to_the_whole_one_and_is_named(tmp_path, file, harm):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    harm(broken / file)
    with pytest.warns(UserWarning, match=f"step-000002/{file}"):
        assert C.newest(tmp_path).name == "step-000001"


def test_every_single_bit_of_the_manifest_counts(tmp_path):
    path = save(tmp_path, 1) / C.MANIFEST
    whole = path.read_bytes()
    for place in range(0, len(whole) - 1, 7):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(data)
        same = _parsed(bytes(data)) == _parsed(whole)  # white space may change
        assert same or C.damage(path.parent), place


def _parsed(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_checkpoints_that_changed_places_are_refused(tmp_path):
    old, new = save(tmp_path, 1), save(tmp_path, 2)
    new.rename(tmp_path / "aside")
    old.rename(tmp_path / "step-000002")
    (tmp_path / "aside").rename(tmp_path / "step-000001")
    with pytest.warns(UserWarning, match="passed over"):
        assert C.newest(tmp_path) is None


def test_broken_newer_ones_do_not_push_out_the_whole_one(tmp_path):
    save(tmp_path, 2)
    truncate(save(tmp_path, 9) / "optimizer.pt")
    save(tmp_path, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert C.newest(tmp_path).name == "step-000003"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_a_pickle_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    checkpoint = save(tmp_path / "checkpoints", 1)
    torch.save({"state": Evil()}, checkpoint / "optimizer.pt")
    with pytest.raises(pickle.UnpicklingError):
        C.load(checkpoint)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_that_is_not_finite_is_saved(tmp_path, value):
    save(tmp_path, 1)
    bad = weights(2)
    bad["a.lora_B"][3] = value
    with pytest.raises(FloatingPointError, match=r"step 2: a\.lora_B is not finite"):
        C.save(tmp_path, 2, bad, state(2), [], KEY)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


# --- a full disk ------------------------------------------------------------------------------------------------------


class FullDisk:
    """`open` for a disk with so many bytes left."""

    def __init__(self, left):
        self.left = left

    def __call__(self, path, mode="r", *rest):
        file = open(path, mode, *rest)
        if "r" not in mode:
            write, file = file.write, _Limited(file, self)
            file.really = write
        return file


class _Limited:
    def __init__(self, file, disk):
        self.file, self.disk = file, disk

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *problem):
        return self.file.__exit__(*problem)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        fits = data[: max(0, self.disk.left)]
        self.disk.left -= len(fits)
        self.really(fits)
        if len(fits) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_gives_the_numbers_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    size = sum(p.stat().st_size for p in save(tmp_path, 1).iterdir())
    before = {p: p.read_bytes() for p in (tmp_path / "step-000001").iterdir()}
    for left in range(0, size, size // 12):
        with monkeypatch.context() as patch:
            patch.setattr(C, "open", FullDisk(left), raising=False)
            message = f"disk full: {tmp_path} needs [0-9,]+ bytes, [0-9,]+ are free. What was saved before is whole"
            with pytest.raises(OSError, match=message) as problem:
                save(tmp_path, 2)
        needed = int(str(problem.value).split("needs ")[1].split(" bytes")[0].replace(",", ""))
        assert problem.value.errno == errno.ENOSPC and 0 <= needed - size < 20  # step 2 has one row more
        assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert C.newest(tmp_path).name == "step-000001"
    assert {p: p.read_bytes() for p in (tmp_path / "step-000001").iterdir()} == before


def test_other_write_errors_stay_what_they_are(tmp_path, monkeypatch):
    def no_permission(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(C, "open", no_permission, raising=False)
    with pytest.raises(PermissionError, match="Permission denied"):
        save(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


# --- killed while writing ---------------------------------------------------------------------------------------------


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Fuse:
    """Kills the process at the n-th touch of the disk; half of what is being written gets there."""

    def __init__(self, touches):
        self.touches = touches

    def burn(self):
        self.touches -= 1
        if self.touches == 0:
            die()

    def around(self, function):
        def touched(*arguments, **options):
            self.burn()
            return function(*arguments, **options)

        return touched

    def install(self):
        for module, name in ((os, "fsync"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (os, "mkdir")):
            setattr(module, name, self.around(getattr(module, name)))

        def opened(path, mode="r", *rest):
            file = open(path, mode, *rest)
            if "r" in mode:
                return file
            limited, half = _Limited(file, self), lambda data: len(data) // 2
            limited.write = lambda data: (
                file.write(data[: half(data)]), file.flush(), self.burn(), file.write(data[half(data) :])
            )  # fmt: skip
            return limited

        C.open = opened


def test_killed_at_every_single_touch_of_the_disk(tmp_path):
    """At whichever moment: the old or the new checkpoint is found, whole, without a warning, and saving goes on."""
    found = []
    for touches in range(1, 100):
        folder = tmp_path / str(touches)
        save(folder, 1), save(folder, 2)

        def work(folder=folder, touches=touches):
            Fuse(touches).install()
            save(folder, 3)

        with child(work) as pid:
            status = ended(pid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(C.load(C.newest(folder))[3][-1]["step"])
        assert not any(C.damage(path) for path in folder.glob(C.STEP))
        save(folder, found[-1] + 1)
        assert len(list(folder.iterdir())) == 2
        if status == 0:
            break
        assert status == -signal.SIGKILL
    assert found == sorted(found) and found[0] == 2 and found[-1] == 3
    assert 15 < len(found) < 99, "the fuse saw every touch, and the last one was past the end"


# --- the cached tensor ------------------------------------------------------------------------------------------------


def test_a_cached_tensor_is_guarded_by_its_key(tmp_path):
    path, values = tmp_path / "reference.safetensors", torch.randn(5, 2)
    assert C.load_cache(path, KEY) is None
    C.save_cache(path, values, KEY)
    assert torch.equal(C.load_cache(path, KEY), values)
    with pytest.raises(C.SettingsChanged, match=r"reference\.safetensors .*\n  data: was 'abc', is 'xyz'$"):
        C.load_cache(path, KEY | {"data": "xyz"})


@pytest.mark.parametrize("harm", [truncate, flip])
def test_a_broken_cache_is_computed_again(tmp_path, harm):
    path = tmp_path / "reference.safetensors"
    C.save_cache(path, torch.randn(500, 2), KEY)
    harm(path)
    with pytest.warns(UserWarning, match=r"reference\.safetensors is not what was written"):
        assert C.load_cache(path, KEY) is None


def test_differences_name_what_changed_and_what_is_new():
    assert C.differences({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == ["b: was 2, is 3", "c: was None, is 4"]
