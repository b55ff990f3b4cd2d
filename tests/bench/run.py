"""How fast is a DPO step? The variants of `worker.py` take turns, each in a process of its own.

python -m bench.run [--shapes C A] [--lengths truthy hh] [--rounds 3] [--before CHECKOUT], from
tests/ or as `make bench`; on a CPU in float32, on one thread. On a GPU --shapes phi2 is Phi-2's
size in its profile's 4 bits, and --lengths full shows the memory for pairs of 1024 tokens.
BENCH_MICRO_TOKENS (ours) and BENCH_MICRO_PAIRS (TRL, loops) set what each side takes at a time.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from bench.meter import GPU
from bench.shapes import MODELS, QUANTISED, STEP, pair_lengths, save_model
from bench.worker import VARIANTS

from dpo_utils.plots import BLUE, GREY, ORANGE, save_figure
from dpo_utils.profiles import runs_directory

HERE = Path(__file__).resolve().parents[2]
CLOCK, NAME = ("wall", "bench_gpu") if GPU else ("cpu", "bench_cpu")  # a busy neighbour costs wall
OURS, BEFORE, LEAN = "ours", "ours, before", "ours, checkpointing"
RIVALS = ("TRL default", "TRL best", "TRL best, pair by pair, same GELU", BEFORE)
COLUMNS = {"pairs/s": ".2f", "1 epoch": ".2f", "3 epochs": ".2f", "GFLOP": ".0f", "peak MB": ".0f"}


class Worker:
    """A variant's process, asked for one step at a time; `checkout`: whose package and worker."""

    def __init__(self, case: list[str], variant: str, checkout: Path):
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join([str(checkout), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | quiet | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, "-m", "bench.worker", *case, variant]
        self.log = tempfile.TemporaryFile("w+", encoding="utf-8")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        where = {"cwd": checkout / "tests", "env": environment}
        self.process = subprocess.Popen(command, text=True, **pipes, **where)

    def turn(self, kind: str) -> dict:
        """One stretch: `warm`, or measured as `time`, `flops` or `memory`."""
        try:
            print(kind, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.log.seek(0)
            raise RuntimeError("a worker failed:\n" + self.log.read()[-3000:]) from None


def measure(shape: str, lengths: str, rounds: int, before: Path | None) -> dict:
    """{variant: costs}: reference pass, two counted steps, then `rounds` timed ones in turn."""
    places = {name: (name, HERE) for name in VARIANTS}
    places |= {BEFORE: (OURS, before)} if before else {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        workers = {n: Worker([folder, shape, lengths], *place) for n, place in places.items()}
        rows, timed = {}, {name: [] for name in workers}
        for name, worker in workers.items():  # "best" and "ours" score the reference once
            once = worker.turn("time")[CLOCK] if "best" in name or "ours" in name else 0.0
            first = worker.turn("memory")  # its loss is compared: all adapters are still the same
            rows[name] = {"reference_s": once, **worker.turn("flops"), **first}
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.turn("warm")
                timed[name].append(worker.turn("time")[CLOCK])
        for worker in workers.values():
            worker.process.communicate()  # no more turns: it leaves
    pairs = STEP[lengths]["pairs"]
    for name, row in rows.items():
        row["step_s"] = step = statistics.median(timed[name])
        row["pairs/s"] = pairs / step
        for title, epochs in (("1 epoch", 1), ("3 epochs", 3)):
            row[title] = epochs * pairs / (row["reference_s"] + epochs * step)
        row |= {"GFLOP": row["flops"] / 1e9, "peak MB": row["peak_bytes"] / 2**20}
    return rows


def floor_gflop(shape: str, lengths: str) -> float:
    """What a step needs at least: each distinct token once, scores and head only where they count.

    Forward, and backward to the activations alone: weights are frozen, nothing is needed before the
    first layer's adapters, and what LoRA itself adds is left out.
    """
    model = MODELS[shape]
    width, inner = model["hidden_size"], model["intermediate_size"]
    layers = model["num_hidden_layers"]
    linear = 2 * layers * (4 * width**2 + 2 * width * inner)  # a token, forward
    first = 2 * (3 * width**2 + width * inner)  # q, k, v, fc1 of the first layer: no input gradient
    total = 0
    for p, c, r in pair_lengths(lengths, STEP[lengths]["pairs"]):
        seen = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in (c, r))
        head = 2 * width * model["vocab_size"] * (c + r)
        total += (2 * linear - first) * (p + c + r) + 3.5 * 4 * width * layers * seen + 2 * head
    return total / 1e9


def case(shape: str, lengths: str, rows: dict) -> dict:
    """The rows with ratios and where they were measured: `--add` puts several runs together."""
    ratios = {other: {} for other in RIVALS if other in rows}
    for other, over in ratios.items():  # more is better for pairs, less for the rest
        over |= {name: rows[OURS][name] / rows[other][name] for name in COLUMNS}
        over["peak with checkpointing"] = rows[LEAN]["peak MB"] / rows[other]["peak MB"]
    machine = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    where = {"machine": machine, "dtype": "NF4, bfloat16" if shape in QUANTISED else "float32"}
    floor = floor_gflop(shape, lengths)
    return {"rows": rows, "ours_over": ratios, "floor_gflop": floor, **where, **versions}


def report(title: str, case: dict) -> str:
    """The table as text, with ours against the others under it."""
    lines = [f"{title:36s}" + "".join(f"{name:>10s}" for name in (*COLUMNS, "loss"))]
    for name, row in case["rows"].items():
        numbers = "".join(f"{row[column]:10{form}}" for column, form in COLUMNS.items())
        lines.append(f"{name:36s}{numbers}{row['loss']:10.6f}")
    for other, over in case["ours_over"].items():
        lines.append(f"ours / {other}: " + ", ".join(f"{n} {v:.2f}" for n, v in over.items()))
    times = case["rows"][OURS]["GFLOP"] / case["floor_gflop"]
    return "\n".join([*lines, f"ours / floor: GFLOP {times:.2f}", ""])


def figure(cases: dict):
    """Pairs a second, one panel a case, one bar a variant."""
    size = (3.1 * len(cases) + 1.6, 3.2)
    drawn, axes = plt.subplots(1, len(cases), squeeze=False, figsize=size, layout="constrained")
    for ax, (title, case) in zip(axes[0], cases.items(), strict=True):
        names, rates = list(case["rows"])[::-1], [row["pairs/s"] for row in case["rows"].values()]
        colours = [BLUE if "ours" in name else ORANGE if "TRL" in name else GREY for name in names]
        bars = ax.barh(names, rates[::-1], color=colours, alpha=0.8)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        ax.set_xlabel("pairs a second" if GPU else "pairs a CPU second")
        ax.set_title(title.replace(", ", "\n", 1), fontsize=10)
        ax.margins(x=0.18)
        ax.label_outer()
    return drawn


def main() -> None:
    """Measure, print as it goes, write figures/bench_cpu.png and .json (bench_gpu on a GPU)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["C", "A"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=["truthy", "hh"], choices=list(STEP))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each variant")
    parser.add_argument("--before", type=Path, help="a checkout whose train_dpo takes turns too")
    parser.add_argument("--add", action="store_true", help="keep the cases in the JSON already")
    args = parser.parse_args()
    known = Path(os.environ.get("DPO_FIGURES") or runs_directory() / "figures") / f"{NAME}.json"
    cases = json.loads(known.read_text(encoding="utf-8"))["cases"] if args.add else {}
    for shape in args.shapes:
        for lengths in args.lengths:
            title = f"model {shape}, {lengths}-like, {STEP[lengths]['pairs']} pairs a step"
            before = args.before and args.before.resolve()
            rows = measure(shape, lengths, args.rounds, before)
            cases[title] = case(shape, lengths, rows)
            print(report(title, cases[title]), flush=True)
    print("written:", save_figure(figure(cases), NAME, {"cases": cases}))


if __name__ == "__main__":
    main()
