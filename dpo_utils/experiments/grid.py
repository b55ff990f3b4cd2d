"""Many small runs in the tiny world under equal conditions: same start, same steps, same measures.

`DPO_SEEDS=3` repeats every run with three seeds; `make study` does that and keeps the tables.
"""

import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
import pandas as pd
import torch
import transformers
from scipy.stats import t

from dpo_utils import evaluate, exact, world
from dpo_utils.checkpoints import digest, write_file
from dpo_utils.experiments.reinforce import train_reinforce
from dpo_utils.models import load_policy
from dpo_utils.train import train_dpo, train_sft, train_unpaired

METHODS = {"preferences": train_dpo, "chosen": train_sft, "thumbs": train_unpaired}
METHODS["reinforce"] = train_reinforce
SHOWN = ["reward", "true", "fluent", "kl", "accuracy", "tokens"]  # in `table`


def seeds() -> range:
    """The seeds of every recipe: 0 alone, or as many as `DPO_SEEDS` says."""
    return range(int(os.environ.get("DPO_SEEDS") or 1))


def draw_pairs(seed: int) -> list[dict]:
    """The world's pairs of a seed, as many as 20 steps of 16 read in one epoch."""
    return world.preferences(n=320, seed=seed)


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    name: str  # in tables and figures
    changes: dict = field(default_factory=dict)  # fields of the profile: beta, loss, steps, ...
    data: Callable[[int], list[dict]] = draw_pairs  # seed -> the rows that it trains on
    method: str = "preferences"  # or chosen (SFT on the chosen answers), thumbs, reinforce
    options: dict = field(default_factory=dict)  # of what trains, as loss_options
    at: tuple[int, ...] = ()  # steps at which to measure, next to the last one
    mass: bool = False  # measure also where the probability goes on the first 24 questions


class Lab:
    """One loaded model, the SFT adapter from which every run starts, and a folder of results."""

    def __init__(self, profile, adapter, folder):
        self.profile, self.folder = profile, Path(folder)
        self.pool = ProcessPoolExecutor(  # a process a core; each loads the model at its first run
            os.cpu_count(), get_context("spawn"), _open, (profile, adapter, folder)
        )
        self.model, self.tokenizer = self.ours = load_policy(profile, adapter=adapter)
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.start = {name: p.detach().clone() for name, p in trained}
        self.questions = [fact.question for fact in world.facts("test")][::3]
        self.reward, self.true = exact.rewards(self.questions), exact.truths(self.questions)
        self.tokens = exact.lengths(self.questions, self.tokenizer)
        self.ref = self.probabilities(self.questions)
        self.pairs = exact.labelled(self.ref, self.reward)

    def probabilities(self, questions) -> np.ndarray:
        """(questions, 37): of the policy as it is now, see `exact`."""
        return exact.probabilities(*self.ours, self.profile, questions)

    def measure(self) -> dict[str, float]:
        """What is exact, over held-out questions and the listed answers, see `exact`.

        reward; true and fluent (probabilities); kl (nats per answer, from the reference); tokens
        of a fluent answer; accuracy of the implicit reward on pairs that the reference draws and
        the world labels.
        """
        p = self.probabilities(self.questions)
        ratio = np.log(np.maximum(p, 1e-300) / self.ref)
        found = {"reward": exact.expected(p, self.reward), "true": exact.expected(p, self.true)}
        found |= {"fluent": 1 - p[:, -1].mean(), "kl": exact.kl(p, self.ref)}
        found["tokens"] = ((p * self.tokens).sum(1) / (1 - p[:, -1])).mean()
        found["accuracy"] = exact.accuracy(self.pairs, ratio)
        return {name: float(value) for name, value in found.items()}

    def run(self, recipe: Recipe, seed: int = 0, rows=None) -> dict:
        """Train by the recipe, or read what an earlier run gave: its `points` and `history`.

        A point is what `measure` gives, at the last step and at the steps in `at`. Results are kept
        under a key of all that they depend on, so a grid that was stopped goes on where it was.
        rows: what the recipe's data gives, where that is known.
        """
        rows, points = rows or recipe.data(seed), []
        asked = list({row["prompt"]: row for row in rows}.values())[:24]
        profile = replace(self.profile, seed=seed, **recipe.changes)
        steps = sorted({*recipe.at, profile.steps})
        settings = repr((recipe.method, recipe.options, recipe.mass, profile, steps, rows))
        path = self.folder / f"{digest(settings, self.start)}.json"
        if path.exists():
            return {**json.loads(path.read_text(encoding="utf-8")), "name": recipe.name}
        if recipe.method not in METHODS:
            raise ValueError(f"recipe {recipe.name!r}: there is no method {recipe.method!r}")

        def look(history):
            if len(history) in steps:
                points.append({"step": len(history), **self.measure()})
                if recipe.mass:
                    p = self.probabilities([row["prompt"] for row in asked])
                    points[-1] |= exact.masses(p, asked)

        self.model.load_state_dict(self.start, strict=False)  # the policy is the reference again
        equal = replace(profile, sft_steps=profile.steps, sft_batch=profile.batch)
        equal = replace(equal, sft_learning_rate=profile.learning_rate)
        if recipe.method == "chosen":
            rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        look([])
        train = METHODS[recipe.method]
        history = train(*self.ours, rows, equal, on_step=look, **recipe.options)
        result = {"name": recipe.name, "seed": seed, "points": points, "history": history}
        write_file(path, json.dumps(result).encode())
        return result

    def run_all(self, recipes, title="", over=None) -> dict[str, list[dict]]:
        """{recipe's name: its runs, one per seed}, several at a time; shows how they ended.

        over: the seeds, if not those of `seeds`.
        """
        jobs = [(r, seed, r.data(seed)) for r in recipes for seed in over or seeds()]
        jobs = [(replace(recipe, data=None), seed, rows) for recipe, seed, rows in jobs]
        results = {}
        for run in self.pool.map(_run, *zip(*jobs, strict=True)):
            results.setdefault(run["name"], []).append(run)
        show(table(results, title))
        return results


def show(shown: str) -> None:
    """Print a table, and add it to the file that `DPO_TABLES` names, if it names one."""
    if path := os.environ.get("DPO_TABLES"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"\n```\n{shown}\n```\n")
    print(shown)


def _open(*given):
    global LAB  # of a worker process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for the notebook's own process,
    Thread(target=_end_with_parent, daemon=True).start()  # and no worker outlives it
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    LAB = Lab(*given)


def _end_with_parent():
    parent_process().join()
    os._exit(0)


def _run(*job):
    return LAB.run(*job)


def thumbs(pairs, downs: float = 1.0) -> list[dict]:
    """Thumbs up and an evenly spread share of thumbs down, as rows of prompt, completion, label."""
    rows = []
    for i, pair in enumerate(pairs):
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        if int((i + 1) * downs) > int(i * downs):
            rows.append({**rows[-1], "completion": pair["rejected"], "label": False})
    return rows


def last(runs, key: str) -> list[float]:
    """The value at the end of every run."""
    return [run["points"][-1][key] for run in runs]


def across_seeds(values) -> tuple[float, float, float]:
    """(mean, low, high): mean over seeds with a 95 % t interval; with one seed the mean itself."""
    mean, error = evaluate.mean_and_error(values)  # the error of one value is 0
    half = error * float(t.ppf(0.975, max(len(values) - 1, 1)))
    return mean, mean - half, mean + half


def table(results: dict, title="", columns=SHOWN) -> str:
    """How runs ended, one line per recipe: means, and half the interval over several seeds."""

    def cell(values):
        mean, _, high = across_seeds(values)
        return f"{mean:.2f}±{high - mean:.2f}" if len(values) > 1 else f"{mean:.3f}"

    ends = [{"recipe": n, **run["points"][-1]} for n, runs in results.items() for run in runs]
    measured = pd.DataFrame(ends).groupby("recipe", sort=False)
    return measured[columns].agg(cell).rename_axis(title or None).to_string()
