"""Runs the notebooks, opens them, and gives them an address: what `make` is for, without make.

`python -m dpo_utils workbook` runs them; on the tiny profile two at a time, each after the one
whose adapter it needs. Executed copies and figures go to runs/; only --refresh writes notebooks/
and figures/.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbclient
import nbformat
from PIL import Image

from dpo_utils import commands
from dpo_utils.profiles import repository_root, run_directory, runs_directory

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET = ["--IPKernelApp.log_level=40"]  # errors only
NEEDS = {"04": "02", "05": "04", "06": "02", "07": "02"}  # what a notebook reads is made by another


def tidy(notebook):
    """Keep what is committed, in place: no stderr, widgets or timings, pictures in 128 colours."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in ("tags", "alt") if key in cell.metadata}
        for output in list(cell.get("outputs", ())):
            data = output.get("data", {})
            if output.get("name") == "stderr" or WIDGET in data:
                cell.outputs.remove(output)
            elif "image/png" in data:
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                few = picture.convert("RGB").quantize(128, method=Image.Quantize.FASTOCTREE)
                few.save(out := io.BytesIO(), "png", optimize=True)
                data["image/png"] = base64.b64encode(out.getvalue()).decode()
    return notebook


def main(argv=None) -> None:
    """`python -m dpo_utils workbook` for callers in Python."""
    with commands.one_line():
        command(*commands.workbook(argv))


def command(args, profile) -> None:
    """Run the notebooks; exits with status 1 where a cell fails or a kernel dies."""
    tiny = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} if profile.name == "tiny" else {}
    os.environ |= {"DPO_PROFILE": profile.name, "DPO_STATIC": "1", "TQDM_DISABLE": "1", **tiny}
    if args.fresh:
        shutil.rmtree(run_directory(profile), ignore_errors=True)
    folder, copies = repository_root() / "notebooks", runs_directory() / "notebooks"
    if args.refresh:
        os.environ["DPO_FIGURES"] = str(repository_root() / "figures")
    copies.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for number in args.numbers for path in folder.glob(f"{number}*.ipynb"))
    if not paths:
        raise ValueError(f"no notebook in {folder} begins with {' or '.join(args.numbers)}")

    def run(path, needed):
        if needed:
            needed.result()  # or its error
        notebook, copy = nbformat.read(path, as_version=4), copies / path.name
        print(path.name, flush=True)
        try:
            nbclient.execute(notebook, cwd=folder, record_timing=False, extra_arguments=QUIET)
        except nbclient.exceptions.CellExecutionError as error:  # with the cell and the traceback
            raise SystemExit(f"{path.name} stopped; what ran is in {copy}. {error}") from None
        except nbclient.exceptions.DeadKernelError:
            died = f"{path.name}: the kernel died, most often because memory ran out"
            raise SystemExit(died) from None
        finally:
            nbformat.write(notebook, copy)
        if args.refresh:
            nbformat.write(tidy(notebook), path)

    jobs = {}
    with ThreadPoolExecutor(2 if profile.name == "tiny" else 1) as pool:
        for path in paths:
            number = path.name[:2]
            jobs[number] = pool.submit(run, path, jobs.get(NEEDS.get(number)))
    for job in jobs.values():
        job.result()


def lab(arguments: list[str]) -> None:
    """JupyterLab with the repository as its root; `arguments` are its own."""
    root = repository_root()
    options = [f"--ServerApp.root_dir={root}", "--LabApp.default_url=/lab/tree/notebooks"]
    options += ["--allow-root"] if getattr(os, "geteuid", lambda: 1)() == 0 else []
    subprocess.run([sys.executable, "-m", "jupyterlab", *options, *arguments], cwd=root)


BADGES = {  # name -> (picture, where a notebook of a GitHub repository opens)
    "Colab": (
        "https://colab.research.google.com/assets/colab-badge.svg",
        "https://colab.research.google.com/github/{}/blob/{}/notebooks/{}",
    ),
    "Kaggle": (
        "https://kaggle.com/static/images/open-in-kaggle.svg",
        "https://kaggle.com/kernels/welcome?src=https://github.com/{}/blob/{}/notebooks/{}",
    ),
}


def publish(repository: str, branch: str) -> None:
    """Write where the workbook is to be had into every notebook and the README; again is the same.

    repository: owner/name on GitHub, which gives badges too, or the URL of any git repository.
    """
    root, on_github = repository_root(), re.fullmatch(r"[\w.-]+/[\w.-]+", repository)
    address = f"https://github.com/{repository}" if on_github else repository
    paths = sorted((root / "notebooks").glob("*.ipynb"))

    def badged(text: str, notebook: str) -> str:
        row = " ".join(
            f"[![Open in {name}]({picture})]({link.format(repository, branch, notebook)})"
            for name, (picture, link) in BADGES.items()
        )
        text = re.sub(r"^\[!\[Open in .*\n\n", "", text, flags=re.M)
        return re.sub(r"\A(# .*\n\n)", rf"\g<1>{row}\n\n" if on_github else r"\1", text)

    for path in paths:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        title, setup = notebook["cells"][:2]
        title["source"] = badged("".join(title["source"]), path.name).splitlines(keepends=True)
        source = re.sub(
            r'^SOURCE = ".*?"',
            f'SOURCE = "git+{address}@{branch}"',
            "".join(setup["source"]),
            flags=re.M,
        )
        setup["source"] = source.splitlines(keepends=True)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    readme = root / "README.md"
    text = badged(readme.read_text(encoding="utf-8"), paths[0].name)
    readme.write_text(text, encoding="utf-8")
    print(f"{len(paths)} notebooks and the README are at {address}, branch {branch}")


if __name__ == "__main__":
    main()
