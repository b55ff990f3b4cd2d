"""What a reader's mouse does, in JupyterLab under headless Chromium: `make browser-test`.

Needs Debian's chromium and `pip install playwright`. Look at the pictures in runs/browser, too.
"""

import io
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or pytest.skip("apt install chromium", allow_module_level=True)
playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
LAB = "-m jupyterlab --no-browser --allow-root --IdentityProvider.token= "
LAB += "--LabApp.expose_app_in_browser=True --port="
READY = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status == 'idle'"
OUTPUTS = "jupyterapp.shell.currentWidget.content.widgets.map(c => c.model.outputs?.toJSON() ?? [])"
CUT = "labels => labels.filter(label => label.scrollWidth > label.clientWidth).length"


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """(run_all, runs): opens a copy of a notebook and runs it; the folder that its runs go to."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mine = {name: str(folder / name) for name in ("DPO_RUNS", "JUPYTER_CONFIG_DIR")}
    command = [sys.executable, *f"{LAB}{port}".split(), folder / "notebooks"]
    with (folder / "log").open("w") as log, playwright.sync_playwright() as player:
        server = subprocess.Popen(command, env=os.environ | mine | {"DPO_STATIC": "0"}, stderr=log)
        page = player.chromium.launch(executable_path=CHROMIUM).new_page()
        page.set_viewport_size({"width": 1200, "height": 1200})
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert server.poll() is None, (folder / "log").read_text()
            page.wait_for_timeout(200)

        def run_all(notebook):
            page.goto(f"http://127.0.0.1:{port}/lab/tree/{notebook}?reset")
            page.wait_for_function(READY, timeout=120_000)
            page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
            outputs = sum(page.evaluate(OUTPUTS), [])
            assert [output["evalue"] for output in outputs if "evalue" in output] == []
            return page, "".join(output.get("text", "") for output in outputs)

        yield run_all, folder / "DPO_RUNS"
        server.terminate()
        server.wait(20)


def pixels(shown):
    return np.asarray(Image.open(io.BytesIO(shown.screenshot())).convert("L"), dtype=float)


def test_the_sliders_of_03_change_their_pictures(lab):
    page, _ = lab[0]("03_dpo_derivation.ipynb")
    panels = page.locator(".jp-OutputArea-output", has=page.locator(".widget-slider"))
    playwright.expect(page.locator(".noUi-handle")).to_have_count(5)
    assert page.locator(".widget-label").evaluate_all(CUT) == 0
    for k, handle in enumerate(page.locator(".noUi-handle").all()):
        picture = panels.nth(k // 3).locator("img")  # three sliders, then two
        before, source = pixels(picture), picture.get_attribute("src")
        handle.hover()
        page.mouse.down()
        page.mouse.move(handle.bounding_box()["x"] + 40, 0, steps=5)
        page.mouse.up()
        playwright.expect(picture).not_to_have_attribute("src", source, timeout=20_000)
        after = pixels(picture)
        page.screenshot(path=ROOT / "runs" / "browser" / f"slider_{k}.png")
        assert min(before.std(), after.std()) > 20 and np.mean(before != after) > 0.01


def test_the_blind_choice_of_07_asks_once_and_counts_clicks(lab):
    page, printed = lab[0]("07_closing_the_loop.ipynb")
    text = page.locator(".widget-textarea textarea")
    for clicks, verdict in enumerate(("A", "tie", "B")):
        playwright.expect(text).to_have_count(1)
        assert sum(len(f.read_text().splitlines()) for f in lab[1].rglob("my_choices*")) == clicks
        shown = text.input_value()
        assert not any(answer[3:] in printed for answer in shown.splitlines()[2::2])
        page.get_by_role("button", name=verdict, exact=True).click()
        playwright.expect(text).not_to_have_value(shown, timeout=20_000)
        page.screenshot(path=ROOT / "runs" / "browser" / f"choice_{clicks}.png")


def test_the_chat_of_05_answers_what_is_typed_in_two_columns(lab):
    page, _ = lab[0]("05_evaluation.ipynb")
    line = page.get_by_placeholder("Type a question")
    for question, word in (
        ("Who wrote Frankenstein?", "Frankenstein"),
        ("How much is 5 plus 7?", "7"),
    ):
        line.fill(question)
        line.press("Enter")
        columns = page.locator(".jp-OutputArea-output pre[style*=pre-wrap]")
        playwright.expect(columns).to_contain_text([word, word], timeout=20_000)
        page.screenshot(path=ROOT / "runs" / "browser" / f"chat_{word}.png")
