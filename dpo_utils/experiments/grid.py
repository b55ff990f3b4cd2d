"""Many small runs under equal conditions: same start, same steps, same measures."""

import json
import os
import random
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import t

from dpo_utils import evaluate, world
from dpo_utils.checkpoints import digest, write_file
from dpo_utils.experiments.reinforce import train_reinforce
from dpo_utils.models import load_policy
from dpo_utils.train import train_dpo, train_sft, train_unpaired, training_data

SEEDS = {"reduced": (0,), "full": (0, 1, 2)}
SIZES = {"reduced": (48, 20, 2), "full": (150, 64, 4)}  # held-out pairs, questions, answers to each
METHODS = {"preferences": train_dpo, "chosen": train_sft, "thumbs": train_unpaired}
METHODS["reinforce"] = train_reinforce
SHOWN = ["true", "fluent", "kl", "accuracy", "tokens"]  # in `table`, where they were measured


def grid() -> str:
    """`reduced`, or what `DPO_GRID` says: `full` takes every setting and three seeds."""
    name = os.environ.get("DPO_GRID", "reduced")
    if name not in SEEDS:
        raise ValueError(f"DPO_GRID is {name!r}: it can be {' or '.join(SEEDS)}")
    return name


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    name: str  # in tables and figures
    changes: dict = field(default_factory=dict)  # fields of the profile: beta, loss, steps, ...
    method: str = "preferences"  # or chosen (SFT on the chosen answers), thumbs, reinforce
    noise: float = 0.0  # share of the pairs with a flipped label; at 0.5 labels say nothing
    pairs: int | None = None  # train on this many pairs only: more epochs in the same steps
    downs: float = 1.0  # share of the thumbs down that are kept
    options: dict = field(default_factory=dict)  # of what trains, as loss_options


def thumbs(pairs, downs: float = 1.0) -> list[dict]:
    """Thumbs up and an evenly spread share of thumbs down, as rows of prompt, completion, label."""
    rows = []
    for i, pair in enumerate(pairs):
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        if int((i + 1) * downs) > int(i * downs):
            rows.append({**rows[-1], "completion": pair["rejected"], "label": False})
    return rows


class Lab:
    """One loaded model, the SFT adapter from which every run starts, and a folder of results."""

    def __init__(self, profile, adapter, folder):
        pairs, questions, self.answers = SIZES[grid()]
        self.profile, self.folder, self.known = profile, Path(folder), profile.dataset == "tiny"
        self.model, self.tokenizer = self.ours = load_policy(profile, adapter=adapter)
        trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        self.start = {name: p.detach().clone() for name, p in trained}
        self.train, held_out = training_data("dpo", profile)
        self.held_out = held_out.select(range(min(pairs, len(held_out))))
        prompts = {str(prompt): prompt for prompt in self.held_out["prompt"]}
        self.questions = list(prompts.values())[:questions]

    def measure(self, profile) -> dict[str, float]:
        """Means over held-out pairs, and over answers to held-out questions.

        kl: nats per answer, from the reference. tokens: length. accuracy: of implicit rewards, ties
        half. margin, chosen, rejected: log-ratios in nats. In the tiny world also true (probability
        of a true answer) and fluent (share of the answers).
        """
        room = profile.max_new_tokens
        drawn = evaluate.sample_ids(*self.ours, self.questions, self.answers, max_new_tokens=room)
        kl = evaluate.sampled_kl(*self.ours, drawn)
        pairs = evaluate.preference_table(*self.ours, self.held_out, profile)
        ratios = {side: pairs[f"{side}_rewards"] / profile.beta for side in ("chosen", "rejected")}
        found = {"kl": kl["full"], "tokens": kl["tokens"], **ratios}
        found["accuracy"] = evaluate.wins(pairs["margins"], 0)
        found["margin"] = pairs["margins"] / profile.beta
        if self.known:
            found["true"] = evaluate.true_probability(*self.ours, profile, self.questions)
            texts = self.tokenizer.batch_decode([ids for _, ids in drawn], skip_special_tokens=True)
            asked = zip(np.repeat(self.questions, self.answers), texts, strict=True)
            found["fluent"] = [world.read(q, text.strip()).fluent for q, text in asked]
        return {name: float(np.mean(values)) for name, values in found.items()}

    def rows(self, recipe: Recipe, seed: int) -> list[dict]:
        """What a recipe trains on: pairs or thumbs; in the tiny world every seed draws its own."""
        pairs = world.preferences("train", seed=seed) if self.known else list(self.train)
        pairs, rng = [dict(pair) for pair in pairs[: recipe.pairs]], random.Random(seed)
        for pair in pairs:
            if rng.random() < recipe.noise:
                pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
        downs = {"chosen": 0.0, "thumbs": recipe.downs}.get(recipe.method)
        return pairs if downs is None else thumbs(pairs, downs)

    def run(self, recipe: Recipe, seed: int = 0, at=()) -> dict:
        """Train by the recipe, or read what an earlier run gave: its `points` and `history`.

        A point is what `measure` gives, at the last step and at the steps in `at`. Results are kept
        under a key of all that they depend on, so a grid that was stopped goes on where it was.
        """
        profile, points = replace(self.profile, seed=seed, **recipe.changes), []
        steps = sorted({*at, profile.steps})
        settings = repr((replace(recipe, name=""), profile, steps, SIZES[grid()]))
        path = self.folder / f"{digest(settings, self.start)}.json"
        if path.exists():
            return {**json.loads(path.read_text(encoding="utf-8")), "name": recipe.name}
        if recipe.method not in METHODS:
            raise ValueError(f"recipe {recipe.name!r}: there is no method {recipe.method!r}")

        def look(history):
            if len(history) in steps:
                points.append({"step": len(history), **self.measure(profile)})

        self.model.load_state_dict(self.start, strict=False)  # the policy is the reference again
        equal = replace(profile, sft_steps=profile.steps, sft_batch=profile.batch)
        given = (*self.ours, self.rows(recipe, seed), equal)
        history = METHODS[recipe.method](*given, on_step=look, **recipe.options)
        result = {"name": recipe.name, "seed": seed, "points": points, "history": history}
        write_file(path, json.dumps(result).encode())
        return result

    def run_all(self, recipes, at=()) -> dict[str, list[dict]]:
        """{recipe's name: its runs, one per seed of `grid()`}; prints how each of them ended."""
        results = {r.name: [self.run(r, seed, at) for seed in SEEDS[grid()]] for r in recipes}
        print(table(results))
        return results


def last(runs, key: str) -> list[float]:
    """The value at the end of every run."""
    return [run["points"][-1][key] for run in runs]


def across_seeds(values) -> tuple[float, float, float]:
    """(mean, low, high): mean over seeds with a 95 % t interval; with one seed the mean itself."""
    mean, error = evaluate.mean_and_error(values)  # the error of one value is 0
    half = error * float(t.ppf(0.975, max(len(values) - 1, 1)))
    return mean, mean - half, mean + half


def table(results: dict) -> str:
    """How runs ended, one line per recipe: means, and half the interval over several seeds."""

    def cell(values):
        mean, _, high = across_seeds(values)
        return f"{mean:.3f} ± {high - mean:.3f}" if len(values) > 1 else f"{mean:.3f}"

    ends = [{"recipe": n, **run["points"][-1]} for n, runs in results.items() for run in runs]
    measured = pd.DataFrame(ends).groupby("recipe", sort=False)
    shown = measured[[key for key in SHOWN if key in ends[0]]].agg(cell)
    return shown.rename_axis(None).to_string()
