"""The runner of the notebooks: what it executes, what it leaves, what it says when a cell fails."""

import base64
import io

import nbformat
import pytest
from PIL import Image

from dpo_utils import workbook


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with a notebooks/ of its own, and a space in its name."""
    root = tmp_path / "a clone"
    (root / "notebooks").mkdir(parents=True)
    monkeypatch.setattr(workbook, "repository_root", lambda: root)
    return root


def write(root, name, *cells):
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbformat.write(notebook, root / "notebooks" / name)


def test_it_executes_in_order_times_each_and_refreshes_on_demand(clone, capsys):
    write(clone, "02_b.ipynb", "print(open('made').read())")
    write(clone, "01_a.ipynb", "import sys\nopen('made', 'w').write('by 01')\nprint('noise', file=sys.stderr)")
    assert workbook.main(["--refresh"]) == 0
    out = capsys.readouterr().out
    assert "[1/2] 01_a.ipynb" in out and "[2/2] 02_b.ipynb" in out and " s" in out
    executed = nbformat.read(clone / "runs" / "notebooks" / "02_b.ipynb", as_version=4)
    assert executed.cells[0].outputs[0].text == "by 01\n"
    refreshed = nbformat.read(clone / "notebooks" / "01_a.ipynb", as_version=4)
    assert not [o for o in refreshed.cells[0].outputs if o.get("name") == "stderr"] and refreshed.cells[0].execution_count == 1


def test_a_failing_cell_stops_the_run_and_is_shown(clone, capsys):
    write(clone, "01_a.ipynb", "1 / 0")
    write(clone, "02_b.ipynb", "print('never')")
    assert workbook.main([]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert not (clone / "runs" / "notebooks" / "02_b.ipynb").exists()


def test_no_kernel_is_left_and_none_has_names_of_ours(clone, monkeypatch):
    started, real = [], workbook.start_kernel
    monkeypatch.setattr(workbook, "start_kernel", lambda folder: started.append(real(folder)) or started[-1])
    write(clone, "01_a.ipynb", "import sys\nassert 'dpo_utils.experiments.grid' in sys.modules and 'dpo_utils' not in dir()")
    write(clone, "02_b.ipynb", "1 / 0")
    write(clone, "03_c.ipynb", "print('never')")
    assert workbook.main([]) == 1
    assert len(started) == 3 and not any(kernel.is_alive() for kernel in started)


def test_a_number_without_a_notebook_is_said(clone):
    with pytest.raises(SystemExit, match="no notebook has the number 09"):
        workbook.main(["09"])


def test_pictures_shrink_and_stay_pictures():
    out = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").save(out, "png", compress_level=0)
    encoded = base64.b64encode(out.getvalue()).decode()
    small = workbook.small_png(encoded)
    assert len(small) < len(encoded) / 2
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (256, 256)
