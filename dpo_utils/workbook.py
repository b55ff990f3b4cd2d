"""Runs the notebooks: `python -m dpo_utils.workbook --help` lists the options.

On the tiny profile two at a time, each after the one whose adapter it needs. Executed copies go to
runs/notebooks; --refresh also puts their tidied outputs into notebooks/.
"""

import argparse
import base64
import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import nbclient
import nbformat
from PIL import Image

from dpo_utils.profiles import load_profile, repository_root, run_directory

KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
QUIET = ["--IPKernelApp.log_level=40"]  # errors only
NEEDS = {"04": "02", "05": "04", "06": "02", "07": "02"}  # what a notebook reads is made by another


def tidy(notebook):
    """Keep what is committed, in place: no stderr, widgets or timings, pictures in 128 colours."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
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
    """The command line; exits with status 1 where a cell fails or a kernel dies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("numbers", nargs="*", default=[""], help="01 02 ...: only these")
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--fresh", action="store_true", help="delete the profile's runs first")
    parser.add_argument("--refresh", action="store_true", help="put outputs back into notebooks/")
    args = parser.parse_args(argv)
    tiny = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} if args.profile == "tiny" else {}
    os.environ |= {"DPO_PROFILE": args.profile, "DPO_STATIC": "1", "TQDM_DISABLE": "1", **tiny}
    if args.fresh:
        shutil.rmtree(run_directory(load_profile(args.profile)), ignore_errors=True)
    folder, copies = repository_root() / "notebooks", repository_root() / "runs" / "notebooks"
    copies.mkdir(parents=True, exist_ok=True)
    paths = sorted(path for number in args.numbers for path in folder.glob(f"{number}*.ipynb"))
    if not paths:
        parser.error(f"no notebook begins with {' or '.join(args.numbers)}")

    def run(path, needed):
        if needed:
            needed.result()  # or its error
        notebook, copy = nbformat.read(path, as_version=4), copies / path.name
        print(path.name, flush=True)
        try:
            nbclient.execute(notebook, cwd=folder, record_timing=False, extra_arguments=QUIET)
        except nbclient.exceptions.CellExecutionError as error:  # with the cell and the traceback
            parser.exit(1, f"{path.name} stopped; what ran is in {copy}. {error}\n")
        except nbclient.exceptions.DeadKernelError:
            parser.exit(1, f"{path.name}: the kernel died, most often because memory ran out\n")
        finally:
            nbformat.write(notebook, copy)
        if args.refresh:
            nbformat.write(tidy(notebook), path)

    jobs = {}
    with ThreadPoolExecutor(2 if args.profile == "tiny" else 1) as pool:
        for path in paths:
            number = path.name[:2]
            jobs[number] = pool.submit(run, path, jobs.get(NEEDS.get(number)))
    for job in jobs.values():
        job.result()


if __name__ == "__main__":
    main()
