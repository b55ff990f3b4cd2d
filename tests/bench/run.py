"""How fast is a DPO step? The variants of `worker.py`, one process each, taking turns. `make bench`.

python -m bench.run [--shapes C A] [--lengths truthy hh] [--rounds 3]; on a CPU in float32, one thread a process.
On a GPU: --shapes phi2 (NF4, bfloat16, random weights), each side at the micro-batch that suits it best there, for
instance BENCH_MICRO_TOKENS=16384 BENCH_MICRO_PAIRS=16.
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

import matplotlib.pyplot as plt
import torch
from bench.meter import GPU
from bench.shapes import MODELS, QUANTISED, STEP, pair_lengths, save_model
from bench.worker import VARIANTS

from dpo_utils.plots import BLUE, GREY, ORANGE, save_figure
from dpo_utils.profiles import repository_root

CLOCK, NAME = ("wall", "bench_gpu") if GPU else ("cpu", "bench_cpu")  # a CPU second forgives a busy neighbour
DEFAULT, BEST, FAIREST = "TRL default", "TRL best", "TRL best, pair by pair, same GELU"
OURS, CHECKPOINTING = "ours", "ours, checkpointing"
CACHED = [name for name in VARIANTS if "best" in name or "ours" in name]  # these score the reference once, beforehand


class Worker:
    """A variant's process, asked for one step at a time."""

    def __init__(self, folder, shape, lengths, variant):
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self.log = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.worker", folder, shape, lengths, variant],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=os.environ | quiet,
        )  # fmt: skip

    def turn(self, kind: str) -> dict:
        """One stretch: `warm`, or measured as `time`, `flops` or `memory`."""
        try:
            print(kind, file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            self.log.seek(0)
            raise RuntimeError("a worker failed:\n" + self.log.read()[-3000:]) from None


def measure(shape: str, lengths: str, rounds: int) -> dict:
    """{variant: its costs}: the reference pass once, then two counted steps and `rounds` timed ones, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        workers = {name: Worker(folder, shape, lengths, name) for name in VARIANTS}
        reference = {name: workers[name].turn("time") if name in CACHED else None for name in VARIANTS}
        counted = {name: worker.turn("flops") | worker.turn("memory") for name, worker in workers.items()}
        timed = {name: [] for name in VARIANTS}
        for _ in range(rounds):
            for name, worker in workers.items():
                worker.turn("warm")
                timed[name].append(worker.turn("time"))
        for worker in workers.values():
            worker.process.communicate()  # no more turns: it leaves
    return {name: summary(counted[name], timed[name], reference[name], lengths) for name in VARIANTS}


def summary(counted: dict, timed: list[dict], reference: dict | None, lengths: str) -> dict:
    """One variant's row: medians over the rounds, and what an epoch costs with the reference pass."""
    sizes = pair_lengths(lengths, STEP[lengths]["pairs"])
    row = {"loss": counted["loss"], "gflop": counted["flops"] / 1e9, "peak_mb": counted["peak_bytes"] / 2**20}
    row["attention_gflop"] = counted["attention_flops"] / 1e9
    for clock in ("cpu", "wall"):
        step = statistics.median(t[clock] for t in timed)
        once = reference[clock] if reference else 0.0
        row[f"step_{clock}_s"], row[f"reference_{clock}_s"] = step, once
        row[f"pairs_per_{clock}_s"] = len(sizes) / step
        for epochs in (1, 3):
            row[f"pairs_per_{clock}_s_{epochs}_epochs"] = epochs * len(sizes) / (once + epochs * step)
        row[f"tokens_per_{clock}_s"] = sum(2 * p + c + r for p, c, r in sizes) / step
    return row | {"rounds": [{clock: t[clock] for clock in ("cpu", "wall")} for t in timed]}


def floor_gflop(shape: str, lengths: str) -> float:
    """What a step needs at least: every distinct token once, scores only where a token looks, the head where it is scored.

    Forward, and backward to the activations alone: the weights are frozen, nothing is needed before the first layer's
    adapters, and what LoRA itself adds is left out.
    """
    model = MODELS[shape]
    width, inner, layers = model["hidden_size"], model["intermediate_size"], model["num_hidden_layers"]
    linear = 2 * layers * (4 * width**2 + 2 * width * inner)  # a token, forward
    first = 2 * (3 * width**2 + width * inner)  # q, k, v and fc1 of the first layer: no gradient to their input
    total = 0
    for p, c, r in pair_lengths(lengths, STEP[lengths]["pairs"]):
        seen = p * (p + 1) / 2 + sum(n * p + n * (n + 1) / 2 for n in (c, r))
        head = 2 * width * model["vocab_size"] * (c + r)
        total += (2 * linear - first) * (p + c + r) + (1 + 2.5) * 4 * width * layers * seen + 2 * head
    return total / 1e9


def settings(shape: str) -> dict:
    """Where and how a case was measured; kept with it, since `--add` puts cases of several runs together."""
    machine = torch.cuda.get_device_name() if GPU else platform.processor() or platform.machine()
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "trl")}
    dtype = "NF4, bfloat16" if shape in QUANTISED else "float32"
    return {"machine": machine, "dtype": dtype, "threads": 1, **versions}


COLUMNS = {
    "pairs/s": (f"pairs_per_{CLOCK}_s", ".2f"), "wall": ("pairs_per_wall_s", ".2f"),
    "1 epoch": (f"pairs_per_{CLOCK}_s_1_epochs", ".2f"), "3 epochs": (f"pairs_per_{CLOCK}_s_3_epochs", ".2f"),
    "tokens/s": (f"tokens_per_{CLOCK}_s", ".0f"), "GFLOP": ("gflop", ".0f"), "peak MB": ("peak_mb", ".0f"),
    "loss": ("loss", ".6f"),
}  # fmt: skip


def report(title: str, case: dict) -> str:
    """The table as text, with ours against TRL under it."""
    rows, floor = case["rows"], case["floor_gflop"]
    lines = [title, f"{'':34s}" + "".join(f"{name:>10s}" for name in COLUMNS)]
    for name, row in rows.items():
        lines.append(f"{name:34s}" + "".join(f"{row[key]:10{form}}" for key, form in COLUMNS.values()))
    for other, ratios in case["ours_over"].items():
        lines.append(f"ours / {other}: " + ", ".join(f"{name} {value:.2f}" for name, value in ratios.items()))
    return "\n".join([*lines, f"floor {floor:.0f} GFLOP: ours does {rows[OURS]['gflop'] / floor:.2f} times that", ""])


def ratios(rows: dict, other: str) -> dict:
    """Ours over another: more is better for pairs, less for the rest."""
    names = {name: key for name, (key, _) in COLUMNS.items() if name not in ("tokens/s", "loss")}
    out = {name: rows[OURS][key] / rows[other][key] for name, key in names.items()}
    return out | {"peak with checkpointing": rows[CHECKPOINTING]["peak_mb"] / rows[other]["peak_mb"]}


def figure(cases: dict):
    """Pairs a second, one panel a case, one bar a variant."""
    shape = {"figsize": (3.1 * len(cases) + 1.6, 3.2), "layout": "constrained"}
    drawn, panels = plt.subplots(1, len(cases), sharey=True, squeeze=False, **shape)
    for ax, (title, case) in zip(panels[0], cases.items(), strict=True):
        rows = case["rows"]
        colours = [BLUE if "ours" in name else ORANGE if "TRL" in name else GREY for name in rows]
        bars = ax.barh(list(rows), [row[f"pairs_per_{CLOCK}_s"] for row in rows.values()], color=colours, alpha=0.8)
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        ax.set(xlabel="pairs a second" if GPU else "pairs a CPU second")
        ax.set_title(title.replace(", ", "\n", 1), fontsize=10)
        ax.margins(x=0.18)
        ax.grid(axis="y", visible=False)
    panels[0][0].invert_yaxis()
    return drawn


def main() -> None:
    """Measure, print as it goes, write figures/bench_cpu.png and .json (bench_gpu on a GPU)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["C", "A"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=list(STEP), choices=list(STEP))
    parser.add_argument("--rounds", type=int, default=3, help="timed steps a variant")
    parser.add_argument("--add", action="store_true", help="keep the other cases that are in the JSON already")
    args = parser.parse_args()
    known = repository_root() / "figures" / f"{NAME}.json"
    cases = json.loads(known.read_text())["cases"] if args.add and known.exists() else {}
    for shape in args.shapes:
        for lengths in args.lengths:
            title = f"model {shape}, {lengths}-like, {STEP[lengths]['pairs']} pairs a step"
            rows = measure(shape, lengths, args.rounds)
            against = {other: ratios(rows, other) for other in (DEFAULT, BEST, FAIREST)}
            cases[title] = {"rows": rows, "ours_over": against, "floor_gflop": floor_gflop(shape, lengths)} | settings(shape)
            print(report(title, cases[title]), flush=True)
    print("written:", save_figure(figure(cases), NAME, {"cases": cases}))


if __name__ == "__main__":
    main()
