"""Many small runs under the same conditions, for comparing methods: same start, same steps, same measure.

A `Lab` holds one loaded model. Every run starts from the SFT adapter, which is also the reference. What a run gave is
kept in a file under a key of all it depends on, so a grid that was stopped goes on where it was.
"""

import dataclasses
import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t

from dpo_utils import world
from dpo_utils.experiments import reinforce
from dpo_utils.checkpoints import write_file
from dpo_utils.divergence import mean_and_error, sampled_kl
from dpo_utils.evaluate import preference_table, sample_ids, shuffled, swap, true_probability, wins
from dpo_utils.models import load_policy
from dpo_utils.profiles import Profile
from dpo_utils.train import train_dpo, train_sft, train_unpaired, training_data

SEEDS = {"reduced": (0,), "full": (0, 1, 2)}
SIZES = {"reduced": (48, 20, 2), "full": (150, 64, 4)}  # held-out pairs, questions, answers to each


def grid() -> str:
    """`reduced`, or what `DPO_GRID` says: `full` takes every setting and three seeds."""
    name = os.environ.get("DPO_GRID", "reduced")
    if name not in SEEDS:
        raise ValueError(f"DPO_GRID is {name!r}: it can be {' or '.join(SEEDS)}")
    return name


@dataclass(frozen=True)
class Recipe:
    """One way to train. `changes` are fields of the profile (beta, loss, steps, learning_rate, ...)."""

    name: str  # as it stands in tables and figures
    changes: dict = field(default_factory=dict)
    method: str = "preferences"  # preferences, chosen (SFT on the chosen side), thumbs (unpaired) or reinforce
    labels: str = "as they are"  # as they are, shuffled or flipped
    noise: float = 0.0  # share of flipped labels
    pairs: int | None = None  # train on this many pairs only: more epochs in the same steps
    options: dict = field(default_factory=dict)  # of the loss, or of the method

    def __post_init__(self):
        for what, value, known in (("method", self.method, METHODS), ("labels", self.labels, LABELS)):
            if value not in known:
                raise ValueError(f"recipe {self.name!r}: {what} is {value!r}, it can be {', '.join(known)}")


LABELS = {"as they are": list, "shuffled": shuffled, "flipped": lambda pairs: [swap(row) for row in pairs]}


# --- the methods: each trains the model in place and returns its history ----------------------------------------------


def _preferences(model, tokenizer, pairs, profile, options, on_step):
    return train_dpo(model, tokenizer, pairs, profile, loss_options=options, on_step=on_step)


def _chosen(model, tokenizer, pairs, profile, options, on_step):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    profile = dataclasses.replace(profile, sft_steps=profile.steps, sft_batch=profile.batch)
    return train_sft(model, tokenizer, rows, profile, on_step=on_step)


def _thumbs(model, tokenizer, pairs, profile, options, on_step):
    options = dict(options)
    rows = thumbs(pairs, options.pop("keep_rejected", 1.0))
    return train_unpaired(model, tokenizer, rows, profile, loss_options=options, on_step=on_step)


def _reinforce(model, tokenizer, pairs, profile, options, on_step):
    reward = reinforce.fit_reward_model(model, tokenizer, pairs, profile)
    prompts = list(dict.fromkeys(row["prompt"] for row in pairs))
    return reinforce.train_reinforce(model, tokenizer, prompts, reward, profile, on_step=on_step, **options)


METHODS = {"preferences": _preferences, "chosen": _chosen, "thumbs": _thumbs, "reinforce": _reinforce}


def thumbs(pairs, keep_rejected: float = 1.0) -> list[dict]:
    """Pairs taken apart into single answers with a thumb: rows of prompt, completion, label (TRL's unpaired format).

    keep_rejected: share of the thumbs down that are kept, spread evenly.
    """
    rows = []
    for i, row in enumerate(pairs):
        rows.append({"prompt": row["prompt"], "completion": row["chosen"], "label": True})
        if int((i + 1) * keep_rejected) > int(i * keep_rejected):
            rows.append({"prompt": row["prompt"], "completion": row["rejected"], "label": False})
    return rows


# --- runs -------------------------------------------------------------------------------------------------------------


class Lab:
    """One loaded model, a start for every run (the SFT adapter), and a folder where results are kept."""

    def __init__(self, profile: Profile, adapter, folder=None):
        self.profile, self.folder = profile, Path(folder) if folder else None
        pairs, questions, self.answers = SIZES[grid()]
        self.model, self.tokenizer = load_policy(profile, adapter=adapter)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
        self.known = profile.dataset == "tiny"
        self.train, held_out = training_data("dpo", profile)
        self.held_out = held_out.select(range(min(pairs, len(held_out))))
        self.questions = list({str(p): p for p in self.held_out["prompt"]}.values())[:questions]

    def measure(self, profile: Profile, seed: int = 0) -> dict:
        """What the model is now: on held-out questions, with some answers sampled to each, and on held-out pairs (`SIZES`).

        kl, kl_error: nats an answer, from the reference. tokens: mean length. accuracy: implicit-reward accuracy, ties
        half. margin, chosen, rejected: means over the held-out pairs, log-ratios in nats. In the tiny world also true
        (probability of a true answer, exact) and fluent (share of the samples).
        """
        drawn = sample_ids(self.model, self.tokenizer, self.questions, self.answers, 1.0, profile.max_new_tokens, seed)
        estimates = sampled_kl(self.model, self.tokenizer, drawn)
        table = preference_table(self.model, self.tokenizer, self.held_out, profile)
        kl, error = mean_and_error(estimates["full"])
        out = {
            "kl": kl, "kl_error": error, "tokens": float(estimates["tokens"].mean()),
            "accuracy": float(wins(table["margins"], 0).mean()),
            "margin": float(table["margins"].mean() / profile.beta),
            "chosen": float(np.mean(table["policy_chosen"] - table["ref_chosen"])),
            "rejected": float(np.mean(table["policy_rejected"] - table["ref_rejected"])),
        }  # fmt: skip
        if self.known:
            texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for _, ids in drawn]
            asked = [question for question in self.questions for _ in range(self.answers)]
            out["true"] = float(true_probability(self.model, self.tokenizer, profile, self.questions).mean())
            out["fluent"] = float(np.mean([world.read(q, text).fluent for q, text in zip(asked, texts, strict=True)]))
        return out

    def pairs(self, recipe: Recipe, seed: int):
        """The training pairs of a recipe; in the tiny world every seed draws its own."""
        rows = (world.preferences("train", seed=seed) if self.known else list(self.train))[: recipe.pairs]
        coin = random.Random(seed)
        rows = [swap(row) if coin.random() < recipe.noise else row for row in rows]
        return LABELS[recipe.labels](rows)

    def reset(self) -> None:
        """Back to the start: the policy is the reference again."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(self.start[name])

    def run(self, recipe: Recipe, seed: int = 0, at=()) -> dict:
        """Train by the recipe, or read what an earlier run gave: its `points` (step and `measure`) and its `history`.

        at: steps at which to measure, beside the last one; None: only the history is wanted, nothing is measured.
        """
        profile = dataclasses.replace(self.profile, seed=seed, **recipe.changes)
        steps = [] if at is None else sorted({*(s for s in at if s < profile.steps), profile.steps})
        path = self._path(recipe, profile, steps)
        if path and path.exists():
            return {**json.loads(path.read_text()), "name": recipe.name}
        self.reset()
        points = []

        def look(history):
            if len(history) in steps:
                points.append({"step": len(history), **self.measure(profile)})

        trainer = METHODS[recipe.method]
        history = trainer(self.model, self.tokenizer, self.pairs(recipe, seed), profile, recipe.options, look)
        result = {"name": recipe.name, "seed": seed, "points": points, "history": history}
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, json.dumps(result).encode())
        return result

    def _path(self, recipe, profile, steps) -> Path | None:
        if self.folder is None:
            return None
        recipe_key = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("name", "changes")}
        weights = hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in self.start.values())).hexdigest()
        parts = [recipe_key, dataclasses.asdict(profile), steps, weights, len(self.held_out), self.answers]
        key = json.dumps(parts, sort_keys=True, default=str)
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.json"

    def run_all(self, recipes, seeds=None, at=()) -> dict[str, list[dict]]:
        """{name of the recipe: its runs, one a seed}; a line a recipe as it goes. Seeds: those of `grid()`."""
        out = {}
        for recipe in recipes:
            out[recipe.name] = [self.run(recipe, seed, at) for seed in (SEEDS[grid()] if seeds is None else seeds)]
            print(f"{recipe.name}: {line(out[recipe.name])}", flush=True)
        return out


# --- reading results --------------------------------------------------------------------------------------------------


def last(runs, key: str) -> list[float]:
    """The value at the end of every run."""
    return [run["points"][-1][key] for run in runs]


def across_seeds(values) -> tuple[float, float, float]:
    """(mean, low, high): mean over seeds with a 95 % t interval; with one seed the interval is the point."""
    values = np.asarray(values, dtype=float)
    mean = float(values.mean())
    if len(values) < 2:
        return mean, mean, mean
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def line(runs) -> str:
    """The end of the runs in a few words."""
    shown = [key for key in ("true", "fluent", "kl", "accuracy", "tokens") if key in runs[0]["points"][-1]]
    return ", ".join(f"{key} {np.mean(last(runs, key)):.3f}" for key in shown)


def table(results: dict, keys=("true", "fluent", "kl", "accuracy", "tokens")) -> str:
    """Mean, and half the interval where there are several seeds, one line a recipe."""
    keys = [key for key in keys if key in next(iter(results.values()))[0]["points"][-1]]
    width = max(map(len, results)) + 2
    lines = [" " * width + "".join(f"{key:>17s}" for key in keys)]
    for name, runs in results.items():
        lines.append(f"{name:{width}s}")
        for mean, _, high in (across_seeds(last(runs, key)) for key in keys):
            lines[-1] += f"{mean:9.3f}" + (f" ±{high - mean:6.3f}" if len(runs) > 1 else " " * 8)
    return "\n".join(lines)
