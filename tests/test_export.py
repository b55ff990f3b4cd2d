"""The way out: cards that give no path away, merged models, and what a push sends to the hub."""

import base64
import json
import os
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import ModelCard

from dpo_utils.export import merge_and_save, push
from tests.small_runs import dpo, profile, sft

TOKEN = "hf_" + "secret" * 5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder, profile) of a run on a local model and data file, as a shell leaves it."""
    place = tmp_path_factory.mktemp("hidden")
    base = shutil.copytree(profile().model, place / "my-model")
    settings = profile(model=str(base), dataset=str(place / "mine.jsonl"), steps=2, seed=3)
    dpo(place / "run", settings)
    return place / "run", settings


@pytest.fixture
def merged(run, tmp_path):
    merge_and_save(run[1], run[0] / "adapter", tmp_path / "merged")
    return tmp_path / "merged"


def test_every_run_leaves_a_card_with_its_own_settings_and_no_path(run):
    text = (run[0] / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| base model | my-model |\n| base weights | NF4, double quantisation |" in text
    assert "| data | mine.jsonl: 10 rows, fingerprint " in text
    assert "| reference | the base model |\n| loss | dpo, beta 0.1, label smoothing 0 |" in text
    assert "| 2 of 4 rows, learning rate 0.001, seed 3 |\n| last step | loss 0." in text
    assert "rewards/accuracies " in text and "{" not in text and "hidden" not in text


def test_the_front_matter_names_what_is_on_the_hub_and_the_licence_of_the_base(tmp_path, run):
    sft(tmp_path, profile(sft_steps=1, sft_dataset="some/data", sft_dataset_revision="a" * 40))
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert card.data.to_dict() == {"datasets": "some/data", "license": "apache-2.0"} | {
        "library_name": "peft",
        "tags": ["sft", "lora"],
    }
    assert f"some/data @ {'a' * 40}: 10 rows" in card.text and "| loss |" not in card.text
    assert ModelCard.load(run[0] / "adapter" / "README.md").data.license == "unknown"


def test_an_adapter_of_another_base_is_refused_in_one_line(run, tmp_path):
    other = shutil.copytree(run[0] / "adapter", tmp_path / "other")
    config = (other / "adapter_config.json").read_text().replace('"r": 16', '"r": 8')
    (other / "adapter_config.json").write_text(config)
    with pytest.raises(ValueError, match="^.*other is no adapter of .*: name its own base$"):
        merge_and_save(run[1], other, tmp_path / "none")


def test_what_is_no_part_of_a_model_or_gives_a_path_away_is_refused(run, merged):
    def refused(folder, message, repo="o/n", error=ValueError):
        with pytest.raises(error, match=message):
            push(folder, repo)

    for name in ("pytorch_model.bin", "history.jsonl", "reference.safetensors"):
        (merged / name).touch()
        refused(merged, f"{name} is not for the hub: only README.md")
        (merged / name).unlink()
    refused(run[0] / "adapter", "adapter_config.json names /.*/my-model, which others do not have")
    refused(merged, "write owner/name", repo="name")
    refused(run[0], "did you mean .*adapter?", error=FileNotFoundError)
    (merged / "README.md").write_text("base_model: C:\\Users\\me\\model")
    refused(merged, "README.md names C:")
    (merged / "README.md").unlink()
    refused(merged, "no model card", error=FileNotFoundError)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a push talks to; keeps what it is sent."""

    def answer(self):
        server, body = self.server, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.got[self.path.split("?")[0]] = body
        url = f"http://127.0.0.1:{server.server_port}/o/n"
        reply = {"id": "o/n", "private": True, "url": url, "commitOid": "b" * 40, "commitUrl": url}
        if "/preupload/" in self.path:
            for file in (files := json.loads(body)["files"]):
                file |= {"uploadMode": "lfs" if file["size"] > 9**6 else "regular"}
            reply["files"] = [file | {"shouldIgnore": False} for file in files]
        elif self.path.endswith("/objects/batch"):
            (thing,) = json.loads(body)["objects"]
            reply["objects"] = [thing | {"actions": {"upload": {"href": f"{url}/put"}}}]
        self.send_response(server.status)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    do_GET = do_POST = do_PUT = answer


def pushed(folder, status=200, **options):
    """(what the hub got, by path; the output) of a push from a process of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        hub.got, hub.status = {}, status
        Thread(target=hub.serve_forever, daemon=True).start()
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": TOKEN}
        env = os.environ | env | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        code = "from dpo_utils.export import push; import sys; assert 'torch' not in sys.modules; "
        code += f"push({str(folder)!r}, 'o/n', **{options})"
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        hub.shutdown()
    assert TOKEN not in done.stdout + done.stderr
    return hub.got, done.stdout.splitlines(), done.stderr


def test_a_push_sends_every_file_as_it_is_and_a_dry_run_lists_them(merged):
    got, rows, _ = pushed(merged)
    assert json.loads(got["/api/repos/create"])["visibility"] == "private"
    lines = [json.loads(line) for line in got["/api/models/o/n/commit/main"].splitlines()]
    values = [x["value"] for x in lines if x["key"] != "header"]
    sent = {x["path"]: base64.b64decode(x.get("content", "")) for x in values}
    sent["model.safetensors"] += got["/o/n/put"]
    assert sent == {path.name: path.read_bytes() for path in merged.iterdir()}
    got, listed, _ = pushed(merged, dry_run=True)
    assert not got and listed == rows[:-1]
    assert listed[:-1] == [f"{len(sent[name]):15,} bytes  {name}" for name in sorted(sent)]
    assert listed[-1].endswith("bytes  to o/n, private")


def test_a_push_that_is_refused_or_would_be_public_sends_nothing(merged):
    for status, said in ((401, "401"), (None, "nothing")):  # None: it hangs up
        got, _, error = pushed(merged, status=status)
        assert error.endswith(f"OSError: the hub answered {said} to o/n: see `hf auth login`\n")
    more, _, error = pushed(merged, private=False)
    assert error.endswith("ValueError: o/n is there already and not public: nothing was sent\n")
    assert not [path for path in (*got, *more) if "commit" in path]
