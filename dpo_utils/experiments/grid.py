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


def thumbs(pairs, keep_rejected: float = 1.0) -> list[dict]:
    """Thumbs up and an evenly spread share of thumbs down, as rows of prompt, completion, label."""
    rows = []
    for i, pair in enumerate(pairs):
        rows.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        if int((i + 1) * keep_rejected) > int(i * keep_rejected):
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
        self.questions = distinct_prompts(self.held_out)[:questions]

    def measure(self, profile) -> dict[str, float]:
        """Means over held-out pairs, and over answers to held-out questions.

        kl: nats per answer, from the reference. tokens: length. accuracy: of implicit rewards, ties
        half. margin, chosen, rejected: log-ratios in nats. In the tiny world also true (probability
        of a true answer) and fluent (share of the answers).
        """
        questions, room = self.questions, profile.max_new_tokens
        drawn = evaluate.sample_ids(*self.ours, questions, self.answers, max_new_tokens=room)
        kl = evaluate.sampled_kl(*self.ours, drawn)
        pairs = evaluate.preference_table(*self.ours, self.held_out, profile)
        found = {"kl": kl["full"], "tokens": kl["tokens"]}
        found["accuracy"] = evaluate.wins(pairs["margins"], 0)
        for name in ("chosen_rewards", "rejected_rewards", "margins"):
            found[name.removesuffix("_rewards").removesuffix("s")] = pairs[name] / profile.beta
        if self.known:
            found["true"] = evaluate.true_probability(*self.ours, profile, questions)
            texts = self.tokenizer.batch_decode([ids for _, ids in drawn], skip_special_tokens=True)
            asked = zip(np.repeat(questions, self.answers), texts, strict=True)
            found["fluent"] = [world.read(q, text.strip()).fluent for q, text in asked]
        return {name: float(np.mean(values)) for name, values in found.items()}

    def pairs(self, recipe: Recipe, seed: int) -> list[dict]:
        """The training pairs of a recipe; in the tiny world every seed draws its own."""
        rows = world.preferences("train", seed=seed) if self.known else list(self.train)
        rows, rng = [dict(row) for row in rows[: recipe.pairs]], random.Random(seed)
        for row in rows:
            if rng.random() < recipe.noise:
                row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
        return rows

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
        pairs, options, how = self.pairs(recipe, profile.seed), dict(recipe.options), {"on_step": on_step}
        match recipe.method:
            case "preferences":
                return train_dpo(*self.ours, pairs, profile, loss_options=options, **how)
            case "chosen":
                profile = replace(profile, sft_steps=profile.steps, sft_batch=profile.batch)
                return train_sft(*self.ours, thumbs(pairs, keep_rejected=0), profile, **how)
            case "thumbs":
                rows = thumbs(pairs, options.pop("keep_rejected", 1.0))
                return train_unpaired(*self.ours, rows, profile, loss_options=options, **how)
            case "reinforce":
                reward = fit_reward_model(*self.ours, pairs, profile)
                return train_reinforce(*self.ours, pairs, reward, profile, **how)
        raise ValueError(f"recipe {recipe.name!r}: there is no method {recipe.method!r}")

    def run_all(self, recipes, at=()) -> dict[str, list[dict]]:
        """{recipe's name: its runs, one per seed of `grid()`}; prints how each of them ended."""
        results = {r.name: [self.run(r, seed, at) for seed in SEEDS[grid()]] for r in recipes}
        print(table(results))
        return results
