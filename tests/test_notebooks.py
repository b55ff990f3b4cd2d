"""What the committed notebooks may hold. That they run is nbval's part of `make test`."""

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b(?=.*wandb)|WANDB_API_KEY=\S|HF_TOKEN=\S")
pytestmark = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind="code"):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_nothing_secret_nothing_asked_for(path):
    assert not SECRET.search(path.read_text())
    for cell in cells(path):
        assert not re.search(r"(?<![.\w])(input|getpass|notebook_login|login)\(", "".join(cell["source"]))


def test_no_widget_state_and_no_progress_bars(path):
    notebook = json.loads(path.read_text())
    assert "widgets" not in notebook["metadata"]
    for cell in cells(path):
        for output in cell["outputs"]:
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
            assert "it/s]" not in "".join(output.get("text", ""))


def test_it_was_run_from_top_to_bottom_without_an_error(path):
    assert [cell["execution_count"] for cell in cells(path)] == list(range(1, len(cells(path)) + 1))
    assert not [o for cell in cells(path) for o in cell["outputs"] if o["output_type"] == "error"]


def test_the_set_up_cell_comes_first_and_is_the_same_everywhere(path):
    first = ["".join(cells(other)[0]["source"]).replace("profile = ", "") for other in NOTEBOOKS]
    assert "dpo_utils.setup()" in first[0] and set(first) == {first[0]}


def test_it_is_small_and_every_cell_has_its_own_id(path):
    assert path.stat().st_size < 250_000
    ids = [cell["id"] for cell in json.loads(path.read_text())["cells"]]
    assert len(set(ids)) == len(ids)


def texts(output) -> str:
    """What a reader reads of an output: no pictures, whose encoding may hold anything."""
    data = output.get("data", {})
    return "".join([*output.get("text", ""), *data.get("text/plain", ""), *data.get("text/html", "")])


def test_no_path_of_the_machine_it_was_made_on(path):
    absolute = re.compile(r"(?<![\w.:/<])/[A-Za-z][\w.-]*/[\w.-]+")
    for cell in cells(path):
        assert not [found for output in cell["outputs"] for found in absolute.findall(texts(output))]


def test_nothing_went_to_the_error_stream(path):
    assert not [o for cell in cells(path) for o in cell["outputs"] if o.get("name") == "stderr"]
