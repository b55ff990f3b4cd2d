"""Executes the notebooks in order: python -m dpo_utils.workbook [--profile tiny] [--fresh] [--refresh] [NUMBERS...]

Executed copies go to runs/notebooks/. With --refresh the outputs also go back into notebooks/, for committing.
"""

import argparse
import base64
import io
import os
import shutil
import sys
import time
from pathlib import Path

import nbformat
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from dpo_utils.profiles import load_profile, repository_root, run_directory

WIDGET = "application/vnd.jupyter.widget-view+json"


def environment(profile: str) -> dict[str, str]:
    """What the kernels run under: the profile, no network for tiny, no progress bars in committed outputs."""
    changes = {"DPO_PROFILE": profile, "DPO_STATIC": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if profile == "tiny":
        changes |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return changes


def start_kernel(folder: Path) -> KernelManager:
    """A kernel in a folder that imports the libraries, which takes seconds, without binding a name; does not wait for it."""
    quiet = "--IPKernelApp.log_level=40"  # errors alone: its warnings would cut our lines in two
    kernel = KernelManager(kernel_name="python3")
    kernel.start_kernel(cwd=str(folder), extra_arguments=[quiet, "--IPKernelApp.exec_lines=__import__('dpo_utils.experiments.grid')"])
    return kernel


def execute(path: Path, target: Path, kernel: KernelManager | None = None) -> float:
    """Run one notebook in its own folder and write the executed copy; returns the seconds. Re-raises a failing cell."""
    notebook, start = nbformat.read(path, as_version=4), time.perf_counter()
    kernel = kernel or start_kernel(path.parent)
    try:
        NotebookClient(notebook, km=kernel, timeout=None, resources={"metadata": {"path": str(path.parent)}}).execute()
    finally:
        kernel.shutdown_kernel(now=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, target)
    return time.perf_counter() - start


def tidy(notebook) -> None:
    """What is committed: outputs and counts, but no widget state, timings or stderr chatter."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr" and WIDGET not in o.get("data", {})]
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    output.data["image/png"] = small_png(output.data["image/png"])


def small_png(encoded: str) -> str:
    """A base64 PNG with 64 colours: plots look the same at half the size."""
    image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
    out = io.BytesIO()
    image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def main(argv=None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("numbers", nargs="*", help="01 02 ...: only these notebooks")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--fresh", action="store_true", help="delete the profile's runs first")
    parser.add_argument("--refresh", action="store_true", help="put outputs back into notebooks/")
    args = parser.parse_args(argv)
    os.environ.update(environment(args.profile))
    if args.fresh:
        shutil.rmtree(run_directory(load_profile(args.profile)), ignore_errors=True)
    root, start = repository_root(), time.perf_counter()
    paths = sorted(root.glob("notebooks/*.ipynb"))
    paths = [p for p in paths if not args.numbers or p.name[:2] in args.numbers]
    if not paths:
        raise SystemExit(f"no notebook has the number {' or '.join(args.numbers)}: they are 01 to 06")
    for path, outcome in run_in_order(paths, root / "runs" / "notebooks"):
        if isinstance(outcome, CellExecutionError):
            print(f"failed\n{outcome}\nThe executed copy up to there: runs/notebooks/{path.name}")
            return 1
        print(f"{outcome:.0f} s", flush=True)
        if args.refresh:
            notebook = nbformat.read(root / "runs" / "notebooks" / path.name, as_version=4)
            tidy(notebook)
            nbformat.write(notebook, path)
    total = time.perf_counter() - start
    print(f"{len(paths)} notebooks in {total:.0f} s: executed copies in runs/notebooks, figures in figures, adapters in runs")
    return 0


def run_in_order(paths: list[Path], target: Path):
    """Yield (notebook, seconds or its CellExecutionError); the next one's kernel starts and imports beside this one."""
    coming = start_kernel(paths[0].parent)
    try:
        for number, path in enumerate(paths, start=1):
            kernel, coming = coming, start_kernel(path.parent) if number < len(paths) else None
            print(f"[{number}/{len(paths)}] {path.name} ...", end=" ", flush=True)
            try:
                yield path, execute(path, target / path.name, kernel)
            except CellExecutionError as failure:
                yield path, failure
    finally:
        if coming:
            coming.shutdown_kernel(now=True)


if __name__ == "__main__":
    sys.exit(main())
