"""Runs every notebook alone in another place: `python -m tests.places colab` or `canary`.

colab: an environment with the versions that Colab had in August 2026, none of which the notebooks'
set-up cell may replace. canary: the newest release of everything. The environment is made anew, up
to 10 GB of it; each notebook runs in a new folder, and a line says how long and how it ended.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).resolve().parent.parent
# From pip-freeze.txt of github.com/googlecolab/backend-info, for Python 3.13. What stands after
# notebook is there too, in versions near these: pandas 2.2.2 has no wheel for Python 3.13.
COLAB = """torch==2.11.0 transformers==5.15.0 peft==0.20.0 accelerate==1.14.0 datasets==4.0.0
numpy==2.1.3 scikit-learn==1.6.1 ipykernel==6.17.1 ipython==7.34.0 ipywidgets==7.7.1 notebook==6.5.7
pandas==2.2.3 matplotlib==3.10.0 scipy==1.16.3 pillow==11.3.0 sympy==1.14.0 httpx==0.28.1
tqdm==4.67.1"""


def installed(python: Path) -> dict[str, str]:
    """Version by name of everything in the environment."""
    listing = subprocess.check_output([python, "-m", "pip", "list", "--format=json"], text=True)
    return {package["name"]: package["version"] for package in json.loads(listing)}


def install(place: str, folder: Path, python: Path, notebook: Path) -> None:
    """Put a wheel into `place`, in Colab by the set-up cell; exits where that replaces anything."""
    pip, others = [python, "-m", "pip"], "runs notebooks tests figures .* *.egg-info".split()
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*others))
    subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", folder, source], check=True)
    if place == "canary":
        wheel = next(folder.glob("*.whl"))
        subprocess.run([*pip, "install", "-q", f"{wheel}[notebooks,benchmark]"], check=True)
        return
    subprocess.run([*pip, "install", "-q", *COLAB.split()], check=True)
    before = installed(python)
    set_up = next(c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code")
    subprocess.run([python, "-c", set_up], check=True, cwd=folder)  # where it finds the wheel
    after = installed(python)
    changed = [f"{n} {v} -> {after.get(n)}" for n, v in before.items() if after.get(n) != v]
    if changed:
        sys.exit(f"the set-up cell replaces what Colab has: {', '.join(changed)}")
    print("the set-up cell adds", *sorted(after.keys() - before), "and changes nothing")


def run_alone(path: Path, folder: Path) -> str:
    """Run a notebook in a new folder, where its executed copy stays; "ok" or why it stopped."""
    folder.mkdir()
    notebook = nbformat.read(path, as_version=4)
    try:
        nbclient.execute(notebook, cwd=folder, kernel_name="place", timeout=1800)
    except (nbclient.exceptions.CellExecutionError, RuntimeError, TimeoutError) as error:
        return str(error).strip().splitlines()[-1]
    finally:
        nbformat.write(notebook, folder / path.name)
    return "ok"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.places", description=__doc__)
    parser.add_argument("place", choices=["colab", "canary"])
    parser.add_argument("--python", default="python3.13", help="makes the environment")
    parser.add_argument("--folder", default=ROOT / "runs/places", type=Path, help="holds it")
    args = parser.parse_args()
    folder, notebooks = args.folder.resolve() / args.place, sorted(ROOT.glob("notebooks/*.ipynb"))
    shutil.rmtree(folder, ignore_errors=True)
    maker = shutil.which(args.python) or sys.executable
    subprocess.run([maker, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for name in [name for name in os.environ if name.startswith(("DPO_", "PYTHONPATH"))]:
        del os.environ[name]
    os.environ |= {"JUPYTER_PATH": str(folder), "DPO_STATIC": "1", "OMP_NUM_THREADS": "1"}
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    install(args.place, folder, python, notebooks[0])
    versions = [f"{n} {v}" for n, v in installed(python).items() if f"{n}==" in COLAB]
    print(f"{args.place}, {maker}:", *versions, flush=True)
    kernel = folder / "kernels" / "place" / "kernel.json"
    kernel.parent.mkdir(parents=True)
    command = "-m ipykernel_launcher -f {connection_file} --IPKernelApp.log_level=40"
    spec = {"argv": [str(python), *command.split()], "display_name": "place", "language": "python"}
    kernel.write_text(json.dumps(spec))
    outcomes = []
    for path in notebooks:
        start = time.perf_counter()
        outcomes.append(run_alone(path, folder / path.stem))
        print(f"{path.name:24} {time.perf_counter() - start:5.0f} s  {outcomes[-1]}", flush=True)
    sys.exit(set(outcomes) != {"ok"})


if __name__ == "__main__":
    main()
