"""What committed notebooks may hold, and the command that runs them. nbval runs them all."""

import base64
import io
import re

import nbformat
import pytest
from PIL import Image

import dpo_utils
from dpo_utils import workbook
from dpo_utils.profiles import repository_root

PATHS = sorted((repository_root() / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b(?=.*wandb)|(WANDB_API_KEY|HF_TOKEN)=\S")
ASKING = re.compile(r"(?<![.\w])(input|getpass|notebook_login|login)\(")
LOCAL = re.compile(r"(?<![\w.:/<])/[A-Za-z][\w.-]*/[\w.-]+")


def code_of(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def words(output):  # without pictures, whose encoding may hold anything
    data = {**output, **output.get("data", {})}
    return "".join(data.get(kind, "") for kind in ("text", "text/plain", "text/html"))


@every_notebook
def test_a_committed_notebook_is_valid_small_and_holds_no_secret(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    assert path.stat().st_size < 250_000
    assert not SECRET.search(path.read_text(encoding="utf-8"))
    assert not [cell.source for cell in code_of(path) if ASKING.search(cell.source)]


@every_notebook
def test_it_was_run_from_top_to_bottom_without_an_error(path):
    counts = [cell.execution_count for cell in code_of(path)]
    outputs = [output for cell in code_of(path) for output in cell.outputs]
    assert counts == list(range(1, len(counts) + 1))
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert not [text for text in map(words, outputs) if LOCAL.search(text) or "it/s]" in text]


@every_notebook
def test_it_checks_its_own_numbers(path):
    assert any(re.search(r"^\s*assert |\bcheck_", cell.source, re.M) for cell in code_of(path))


def test_setup_prints_the_profile_with_the_readers_changes(capsys):
    profile = dpo_utils.setup("tiny", target_modules=("q_proj", "v_proj"), beta=0.3)
    assert profile.target_modules == ("q_proj", "v_proj") and "beta 0.3" in capsys.readouterr().out


@every_notebook
def test_tidy_keeps_what_is_committed_and_takes_the_rest(path):
    committed, messy = nbformat.read(path, as_version=4), nbformat.read(path, as_version=4)
    messy.metadata |= {"widgets": {}, "language_info": {"name": "python", "version": "3"}}
    messy.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    outputs = next(cell for cell in messy.cells if cell.cell_type == "code").outputs
    outputs.append(nbformat.v4.new_output("display_data", {workbook.WIDGET: {}}))
    outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    for notebook in (workbook.tidy(messy), committed):
        for output in sum((cell.get("outputs", []) for cell in notebook.cells), []):
            assert len(output.get("data", {}).pop("image/png", "")) < 50_000
    assert messy == committed


def test_tidy_keeps_the_colour_of_a_small_mark_apart_from_that_of_a_large_one():
    colours = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (230, 159, 0)]
    picture = Image.linear_gradient("L").convert("RGB")  # a thousand greys are not more important
    for i, colour in enumerate(colours):
        picture.paste(colour, (9 * i, 0, 9 * i + 3, 3))
    picture.save(file := io.BytesIO(), "png")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("display_data", data)])
    workbook.tidy(nbformat.v4.new_notebook(cells=[cell]))
    kept = Image.open(io.BytesIO(base64.b64decode(cell.outputs[0].data["image/png"])))
    for i, colour in enumerate(colours):
        found = kept.convert("RGB").getpixel((9 * i + 1, 1))
        assert max(abs(a - b) for a, b in zip(found, colour, strict=True)) < 20


def write(root, name, *sources):
    """A notebook of code cells under root."""
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(notebook, root / "notebooks" / name)


def test_notebooks_run_but_those_that_need_one_that_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workbook, "repository_root", lambda: tmp_path)
    write(tmp_path, "04_c.ipynb", "print('never')")
    write(tmp_path, "02_b.ipynb", "import os\nprint(os.environ['DPO_PROFILE'])", "1 / 0")
    write(tmp_path, "01_a.ipynb", "1 + 1")
    with pytest.raises(SystemExit, match="1"):
        workbook.main(["--refresh"])
    assert re.search("02_b.ipynb stopped.*1 / 0.*ZeroDivisionError", capsys.readouterr().err, re.S)
    ran = code_of(tmp_path / "runs/notebooks/02_b.ipynb")
    assert ran[0].outputs[0].text == "tiny\n" and ran[1].outputs[0].ename == "ZeroDivisionError"
    assert not (tmp_path / "runs/notebooks/04_c.ipynb").exists()
    assert code_of(tmp_path / "notebooks/01_a.ipynb")[0].execution_count == 1


def test_a_dead_kernel_and_a_number_without_a_notebook_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(workbook, "repository_root", lambda: tmp_path)
    write(tmp_path, "01_a.ipynb", "import os\nos.kill(os.getpid(), 9)")
    problems = {"01": "kernel died, most often because memory", "09": "begins with 09"}
    for number, said in problems.items():
        with pytest.raises(SystemExit):
            workbook.main([number])
        assert said in capsys.readouterr().err
