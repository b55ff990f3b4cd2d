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
from dpo_utils.experiments.reinforce import fit_reward_model, train_reinforce
from dpo_utils.models import load_policy
from dpo_utils.train import train_dpo, train_sft, train_unpaired, training_data

SEEDS = {"reduced": (0,), "full": (0, 1, 2)}
SIZES = {"reduced": (48, 20, 2), "full": (150, 64, 4)}  # held-out pairs, questions, answers to each
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
    options: dict = field(default_factory=dict)  # of the loss or method, as keep_rejected


def swap(row) -> dict:
    """The pair with its label flipped."""
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def thumbs(pairs, keep_rejected: float = 1.0) -> list[dict]:
    """Thumbs up and an evenly spread share of thumbs down, as rows of prompt, completion, label."""
    rows = []
    for i, pair in enumerate(pairs):
        down = int((i + 1) * keep_rejected) > int(i * keep_rejected)
        for side, up in (("chosen", True), ("rejected", False))[: 1 + down]:
            rows.append({"prompt": pair["prompt"], "completion": pair[side], "label": up})
    return rows


class Lab:
    """One loaded model, the SFT adapter from which every run starts, and a folder of results."""

    def __init__(self, profile, adapter, folder):
        pairs, questions, self.answers = SIZES[grid()]
        self.profile, self.folder, self.known = profile, Path(folder), profile.dataset == "tiny"
        self.model, self.tokenizer = load_policy(profile, adapter=adapter)
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
        ours, questions, room = (self.model, self.tokenizer), self.questions, profile.max_new_tokens
        drawn = evaluate.sample_ids(*ours, questions, self.answers, max_new_tokens=room)
        kl = evaluate.sampled_kl(*ours, drawn)
        pairs = evaluate.preference_table(*ours, self.held_out, profile)
        ratios = {side: pairs[f"{side}_rewards"] / profile.beta for side in ("chosen", "rejected")}
        found = {"kl": kl["full"], "tokens": kl["tokens"], **ratios}
        found["accuracy"] = evaluate.wins(pairs["margins"], 0)
        found["margin"] = pairs["margins"] / profile.beta
        if self.known:
            found["true"] = evaluate.true_probability(*ours, profile, questions)
            texts = self.tokenizer.batch_decode([ids for _, ids in drawn], skip_special_tokens=True)
            asked = zip(np.repeat(questions, self.answers), texts, strict=True)
            found["fluent"] = [world.read(q, text.strip()).fluent for q, text in asked]
        return {name: float(np.mean(values)) for name, values in found.items()}

    def pairs(self, recipe: Recipe, seed: int) -> list[dict]:
        """The training pairs of a recipe; in the tiny world every seed draws its own."""
        rows = world.preferences("train", seed=seed) if self.known else list(self.train)
        rng = random.Random(seed)
        return [swap(row) if rng.random() < recipe.noise else row for row in rows[: recipe.pairs]]

    def run(self, recipe: Recipe, seed: int = 0, at=()) -> dict:
        """Train by the recipe, or read what an earlier run gave: its `points` and `history`.

        A point is what `measure` gives, at the last step and at the steps in `at`. Results are kept
        under a key of all that they depend on, so a grid that was stopped goes on where it was.
        """
        profile, points = replace(self.profile, seed=seed, **recipe.changes), []
        steps = sorted({*(step for step in at if step < profile.steps), profile.steps})
        settings = repr((replace(recipe, name=""), profile, steps, SIZES[grid()]))
        path = self.folder / f"{digest(settings, self.start)}.json"
        if path.exists():
            return {**json.loads(path.read_text(encoding="utf-8")), "name": recipe.name}

        def look(history):
            if len(history) in steps:
                points.append({"step": len(history), **self.measure(profile)})

        history = self._train(recipe, profile, look)
        result = {"name": recipe.name, "seed": seed, "points": points, "history": history}
        write_file(path, json.dumps(result).encode())
        return result

    def _train(self, recipe, profile, on_step) -> list[dict]:
        self.model.load_state_dict(self.start, strict=False)  # the policy is the reference again
        ours, pairs = (self.model, self.tokenizer), self.pairs(recipe, profile.seed)
        options = dict(recipe.options)
        if recipe.method == "preferences":
            return train_dpo(*ours, pairs, profile, loss_options=options, on_step=on_step)
        if recipe.method == "chosen":
            profile = replace(profile, sft_steps=profile.steps, sft_batch=profile.batch)
            return train_sft(*ours, thumbs(pairs, keep_rejected=0), profile, on_step=on_step)
        if recipe.method == "thumbs":
            rows = thumbs(pairs, options.pop("keep_rejected", 1.0))
            return train_unpaired(*ours, rows, profile, loss_options=options, on_step=on_step)
        if recipe.method == "reinforce":
            reward = fit_reward_model(*ours, pairs, profile)
            prompts = list({str(pair["prompt"]): pair["prompt"] for pair in pairs}.values())
            return train_reinforce(*ours, prompts, reward, profile, on_step=on_step, **options)
        raise ValueError(f"recipe {recipe.name!r}: there is no method {recipe.method!r}")

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
    mean, error = evaluate.mean_and_error(values)
    half = t.ppf(0.975, len(values) - 1) * error if len(values) > 1 else 0.0
    return mean, float(mean - half), float(mean + half)


def table(results: dict) -> str:
    """How runs ended, one line per recipe: means, and half the interval over several seeds."""

    def shown(interval):
        mean, _, high = interval
        return f"{mean:.3f} ± {high - mean:.3f}" if high > mean else f"{mean:.3f}"

    keys = [key for key in SHOWN if key in next(iter(results.values()))[0]["points"][-1]]
    ends = {n: [across_seeds(last(runs, key)) for key in keys] for n, runs in results.items()}
    return pd.DataFrame.from_dict(ends, "index", columns=keys).map(shown).to_string()
