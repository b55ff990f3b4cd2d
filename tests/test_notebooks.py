"""What committed notebooks may hold, and the command that runs them. nbval runs them all."""

import base64
import io
import re
import statistics
import subprocess
import zipfile

import nbformat
import pytest
from PIL import Image

import dpo_utils
from dpo_utils import workbook
from dpo_utils.profiles import PROFILES, repository_root

PATHS = sorted((repository_root() / "notebooks").glob("*.ipynb"))
SECRET = re.compile(r"hf_[A-Za-z0-9]{20,}|\b[0-9a-f]{40}\b(?=.*wandb)|(WANDB_API_KEY|HF_TOKEN)=\S")
ASKING = re.compile(r"(?<![.\w])(input|getpass|notebook_login|login)\(")
LOCAL = re.compile(r"(?<![\w.:/<])/[A-Za-z][\w.-]*/[\w.-]+")


def committed(path) -> str:
    """A notebook as it was committed: saving one in JupyterLab is nobody's mistake."""
    show = ["git", "-C", str(path.parent), "show", f"HEAD:./{path.name}"]
    done = subprocess.run(show, capture_output=True)
    return (done.stdout if done.returncode == 0 else path.read_bytes()).decode()


def code_of(text):
    return [c for c in nbformat.reads(text, as_version=4).cells if c.cell_type == "code"]


every_notebook = pytest.mark.parametrize(
    "text", [*map(committed, PATHS)], ids=[p.stem for p in PATHS]
)


def words(output):  # without pictures, whose encoding may hold anything
    data = {**output, **output.get("data", {})}
    return "".join(data.get(kind, "") for kind in ("text", "text/plain", "text/html"))


@every_notebook
def test_it_is_valid_and_small_holds_no_secret_and_ran_from_top_to_bottom(text):
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert len(text.encode()) < 250_000
    assert not SECRET.search(text)
    assert not [cell.source for cell in code_of(text) if ASKING.search(cell.source)]
    outputs = [output for cell in code_of(text) for output in cell.outputs]
    assert [c.execution_count for c in code_of(text)] == [*range(1, 1 + len(code_of(text)))]
    assert outputs and not [o for o in outputs if o.output_type == "error"]
    assert not [said for said in map(words, outputs) if LOCAL.search(said) or "it/s]" in said]


@every_notebook
def test_it_checks_its_numbers_in_short_cells_and_says_in_words_what_a_figure_shows(text):
    cells = [cell.source for cell in code_of(text)]
    assert any(re.search(r"^\s*assert |\bcheck_", cell, re.M) for cell in cells)
    lengths = [len(re.findall(r"^.*\S", cell, re.M)) for cell in cells]
    assert max(lengths) <= 25 and statistics.median(lengths) <= 6
    drawing = [cell for cell in code_of(text) if "save_figure(" in cell.source]
    assert all(len(cell.metadata.get("alt", "")) > 40 for cell in drawing)


def test_nbval_compares_outputs_in_every_corner_of_the_book():
    tags = [c.metadata.get("tags", []) for path in PATHS for c in code_of(committed(path))]
    assert sum("nbval-check-output" in tag for tag in tags) >= 12


def test_setup_prints_the_readers_changes_and_a_profile_stays_as_it_is(monkeypatch, capsys):
    profile = dpo_utils.setup("tiny", target_modules=("q_proj", "v_proj"), beta=0.3)
    assert profile.target_modules == ("q_proj", "v_proj") and "beta 0.3" in capsys.readouterr().out
    monkeypatch.setenv("DPO_MODEL", "mine")
    assert dpo_utils.setup("tiny").model == "mine" and "for its own" in capsys.readouterr().out
    assert dpo_utils.setup(PROFILES["tiny"]) == PROFILES["tiny"]
    assert "for its own" not in capsys.readouterr().out


@every_notebook
def test_tidy_keeps_what_is_committed_and_takes_the_rest(text):
    kept, messy = nbformat.reads(text, as_version=4), nbformat.reads(text, as_version=4)
    messy.metadata |= {"widgets": {}, "language_info": {"name": "python", "version": "3"}}
    messy.cells[0].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}
    outputs = next(cell for cell in messy.cells if cell.cell_type == "code").outputs
    outputs.append(nbformat.v4.new_output("display_data", {workbook.WIDGET: {}}))
    outputs.append(nbformat.v4.new_output("stream", name="stderr", text="a warning"))
    for notebook in (workbook.tidy(messy), kept):
        for output in sum((cell.get("outputs", []) for cell in notebook.cells), []):
            assert len(output.get("data", {}).pop("image/png", "")) < 50_000
    assert messy == kept


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


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder that stands for the clone."""
    monkeypatch.setattr(workbook, "repository_root", lambda: tmp_path)
    monkeypatch.setenv("DPO_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DPO_FIGURES", "")
    return tmp_path


def test_notebooks_run_but_those_that_need_one_that_failed(root):
    write(root, "04_c.ipynb", "print('never')")
    write(root, "02_b.ipynb", "import os\nprint(os.environ['DPO_PROFILE'])", "1 / 0")
    write(root, "01_a.ipynb", "1 + 1")
    with pytest.raises(SystemExit, match=re.compile("02_b.ipynb stopped.*1 / 0.*ZeroDiv", re.S)):
        workbook.main(["--refresh"])
    ran = code_of((root / "runs/notebooks/02_b.ipynb").read_text())
    assert ran[0].outputs[0].text == "tiny\n" and ran[1].outputs[0].ename == "ZeroDivisionError"
    assert not (root / "runs/notebooks/04_c.ipynb").exists()
    assert code_of((root / "notebooks/01_a.ipynb").read_text())[0].execution_count == 1


def test_only_a_refresh_writes_what_is_committed(root):
    draw = "from dpo_utils import plots\nplots.save_figure(plots.plt.figure(), 'x', {})"
    write(root, "01_a.ipynb", draw)
    before = (root / "notebooks/01_a.ipynb").read_bytes()
    workbook.main([])
    assert (root / "runs/figures/x.png").exists() and not (root / "figures").exists()
    assert (root / "notebooks/01_a.ipynb").read_bytes() == before
    workbook.main(["--refresh"])
    assert (root / "figures/x.png").exists()
    assert (root / "notebooks/01_a.ipynb").read_bytes() != before


def test_a_dead_kernel_and_a_number_without_a_notebook_are_said(root):
    write(root, "01_a.ipynb", "import os\nos.kill(os.getpid(), 9)")
    problems = {"01": "kernel died, most often because memory", "09": "begins with 09"}
    for number, said in problems.items():
        with pytest.raises(SystemExit, match=said):
            workbook.main([number])


def test_publishing_twice_is_publishing_once_and_another_address_takes_the_place(root):
    (root / "notebooks").mkdir()
    for path in PATHS:
        (root / "notebooks" / path.name).write_bytes(path.read_bytes())
    readme = (repository_root() / "README.md").read_bytes()
    (root / "README.md").write_bytes(readme)
    seen = []
    for repository in ("one/book", "two/book", "two/book", "file:///a/clone"):
        workbook.publish(repository, "main")
        seen.append([path.read_text() for path in [*root.glob("notebooks/*"), root / "README.md"]])
    assert seen[1] == seen[2] and "one/book" not in str(seen[1])
    for text in seen[1]:
        assert text.count("[![Open in Colab]") == text.count("[![Open in Kaggle]") == 1
        assert "two/book/blob/main/notebooks/" in text
    assert all('SOURCE = \\"git+https://github.com/two/book@main\\"' in x for x in seen[1][:-1])
    assert all('SOURCE = \\"git+file:///a/clone@main\\"' in x for x in seen[3][:-1])
    assert "two/book" not in str(seen[3]) and (root / "README.md").read_bytes() == readme


def test_every_set_up_cell_is_the_same_and_finds_what_lies_near(tmp_path, monkeypatch, capsys):
    cells = [code_of(path.read_text(encoding="utf-8"))[0].source for path in PATHS]
    assert len({cell.partition("import dpo_utils\n")[0] for cell in cells}) == 1
    (here := tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: installed.append(command[-1]))
    monkeypatch.setattr(dpo_utils, "setup", lambda *_: None)
    installed, cell = [], cells[0]
    with pytest.raises(SystemExit, match="upload its wheel or zip"):
        exec(re.sub('SOURCE = ".*"', 'SOURCE = ""', cell), {})
    exec(re.sub('SOURCE = ".*"', 'SOURCE = "git+https://x"', cell), {})
    (tmp_path / "dpo_utils").mkdir()
    (tmp_path / "pyproject.toml").touch()
    exec(cell, {})
    for name, inside in (
        ("other.zip", "x.txt"),
        ("book-main.zip", "book-main/dpo_utils/__init__.py"),
    ):
        with zipfile.ZipFile(here / name, "w") as file:
            file.writestr(inside, "")
    exec(cell, {})
    assert installed == ["git+https://x", str(tmp_path), str(here / "book-main.zip")]
    assert f"installing dpo_utils from {here / 'book-main.zip'}" in capsys.readouterr().out
