"""Before and after, over seeds: SFT, DPO and held-out accuracy beside the baselines, as one table and one figure.

python -m dpo_utils.experiments.report --profile smollm2 --name misconceptions [--data FILE] [--column prompt=Question ...]
                           [--benchmark TruthfulQA.csv --limit 80]
"""

import argparse
import dataclasses
import json
import random
import resource
import time

import matplotlib.pyplot as plt
import numpy as np
import torch

from dpo_utils import plots
from dpo_utils.experiments.truthfulqa import multiple_choice, overlap, read_truthfulqa
from dpo_utils.data import column_name, load_preferences, plain_text, split_by_prompt
from dpo_utils.divergence import calibration, sampled_kl
from dpo_utils.evaluate import bootstrap, preference_table, sample, sample_ids, surface_baselines, wins
from dpo_utils.models import as_reference, load_policy
from dpo_utils.profiles import describe, load_profile, make_plan, run_directory
from dpo_utils.train import train_dpo, train_sft, training_data

UNITS = {
    "margins": " (beta × nats)", "chosen log-ratio": " (nats)", "rejected log-ratio": " (nats)",
    "KL to the reference": " (nats an answer)", "tokens of a sample, SFT": "", "tokens of a sample, DPO": "",
}  # fmt: skip


def run_once(profile, pairs, folder, fresh: bool, benchmark=None, limit=None) -> dict:
    """One seed: split by prompt, SFT, DPO, measure. Arrays are per held-out pair or per sampled answer.

    benchmark: rows of `read_truthfulqa` to answer before and after, those near a training pair left out.
    """
    start = time.perf_counter()
    train, held_out = split_by_prompt(pairs, profile.held_out, seed=profile.seed)
    model, tokenizer = load_policy(profile)
    train_sft(model, tokenizer, training_data("sft", profile)[0], profile, folder / "sft", fresh=fresh)
    model, tokenizer = load_policy(profile, adapter=folder / "sft" / "adapter")
    history = train_dpo(model, tokenizer, train, profile, folder / "dpo", fresh=fresh)
    seconds = time.perf_counter() - start
    table = preference_table(model, tokenizer, held_out, profile)
    with model.disable_adapter():
        base = preference_table(model, tokenizer, held_out, profile)
    usable = held_out.select(table["row"] - 1)
    hits = {
        "DPO, implicit reward": wins(table["margins"], 0),
        "DPO, raw log-prob": wins(table["policy_chosen"], table["policy_rejected"]),
        "SFT, raw log-prob": wins(table["ref_chosen"], table["ref_rejected"]),
        "base, raw log-prob": wins(base["policy_chosen"], base["policy_rejected"]),
        **surface_baselines(train, usable),
    }
    drawn = sample_ids(model, tokenizer, usable["prompt"][:64], max_new_tokens=profile.max_new_tokens, seed=profile.seed)
    with as_reference(model):
        before = sample_ids(model, tokenizer, usable["prompt"][:64], max_new_tokens=profile.max_new_tokens, seed=profile.seed)
    return {
        "drawn prompts": [plain_text(p) for p in usable["prompt"][:64]],
        "KL to the reference": sampled_kl(model, tokenizer, drawn, batch=4)["full"],
        "tokens of a sample, SFT": [len(ids) for _, ids in before],
        "tokens of a sample, DPO": [len(ids) for _, ids in drawn],
        "multiple choice": choices(model, tokenizer, train, benchmark, limit) if benchmark else None,
        "prompts": [plain_text(p) for p in usable["prompt"]],
        "hits": hits,
        "margins": table["margins"],
        "chosen log-ratio": table["chosen_rewards"] / profile.beta,
        "rejected log-ratio": table["rejected_rewards"] / profile.beta,
        "seconds": seconds,
        "history": history,
        "samples": before_and_after(model, tokenizer, usable, profile),
    }


def choices(model, tokenizer, train, benchmark, limit: int | None) -> dict:
    """TruthfulQA's mc1 and mc2 of base, SFT and DPO on the questions that no training pair is near to."""
    trained = [f"{plain_text(row['prompt'])} {plain_text(row['chosen'])}" for row in train]
    near = {row["benchmark"] - 1 for row in overlap(trained, [f"{row['question']} {row['best']}" for row in benchmark])}
    rows = [row for i, row in enumerate(benchmark) if i not in near]
    rows = random.Random(0).sample(rows, min(limit or len(rows), len(rows)))
    out = {"questions": len(rows), "left out": len(near), "DPO": multiple_choice(model, tokenizer, rows)}
    with as_reference(model):
        out["SFT"] = multiple_choice(model, tokenizer, rows)
    with model.disable_adapter():
        out["base"] = multiple_choice(model, tokenizer, rows)
    return out


def before_and_after(model, tokenizer, held_out, profile, n: int = 5) -> list[dict]:
    """Greedy answers of base and DPO to the first n held-out prompts."""
    prompts = held_out["prompt"][:n]
    options = {"temperature": 0, "max_new_tokens": profile.max_new_tokens}
    after = sample(model, tokenizer, prompts, **options)
    with model.disable_adapter():
        before = sample(model, tokenizer, prompts, **options)
    rows = zip(prompts, before, after, strict=True)
    return [{"prompt": plain_text(p), "base": b[0], "DPO": a[0]} for p, b, a in rows]


def pooled(runs, values, prompts: str = "prompts") -> tuple[float, float, float]:
    """(mean, low, high) over all seeds; a prompt held out by several seeds is resampled as one."""
    return bootstrap(np.concatenate([values(run) for run in runs]), groups=[prompt for run in runs for prompt in run[prompts]])


def summarise(runs) -> dict:
    """Accuracies, margins and log-ratios with 95 % intervals, and what a run costs."""
    accuracies = {name: pooled(runs, lambda run, name=name: run["hits"][name]) for name in runs[0]["hits"]}
    nats = {name: pooled(runs, lambda run, name=name: run[name]) for name in ("margins", "chosen log-ratio", "rejected log-ratio")}
    drawn = ("KL to the reference", "tokens of a sample, SFT", "tokens of a sample, DPO")
    honest = calibration(np.concatenate([run["margins"] for run in runs]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "accuracies": accuracies,
        "nats": nats,
        "samples drawn": {name: pooled(runs, lambda run, name=name: run[name], "drawn prompts") for name in drawn},
        "calibration": honest,
        "multiple choice": runs[0]["multiple choice"],
        "accuracy by seed": [float(np.mean(run["hits"]["DPO, implicit reward"])) for run in runs],
        "held-out pairs by seed": [len(run["prompts"]) for run in runs],
        "seconds by seed": [run["seconds"] for run in runs],
        "peak memory GiB": peak,
        "samples": runs[0]["samples"],
    }


def markdown(summary) -> str:
    """The table as Markdown."""
    lines = ["| held-out pairs, pooled over seeds | estimate | 95 % interval |", "|---|---|---|"]
    for name, (value, low, high) in (summary["accuracies"] | summary["nats"] | summary["samples drawn"]).items():
        unit = UNITS.get(name, ", accuracy")
        lines.append(f"| {name}{unit} | {value:.3f} | {low:.3f} to {high:.3f} |")
    honest, choice = summary["calibration"], summary["multiple choice"]
    lines.append(f"\nCalibration of σ(margin): Brier {honest['brier']:.3f}, expected calibration error {honest['ece']:.3f}.")
    if choice:
        cells = [(who, task, *choice[who][task]) for who in ("base", "SFT", "DPO") for task in ("mc1", "mc2")]
        scores = ", ".join(f"{who} {task} {mean:.3f} ± {error:.3f}" for who, task, mean, error in cells)
        asked = f"{choice['questions']} questions, after {choice['left out']} near a training pair were left out"
        lines.append(f"\nTruthfulQA ({asked}; ± one standard error): {scores}.")
    seconds = ", ".join(f"{s:.0f}" for s in summary["seconds by seed"])
    lines.append(f"\nSeconds a seed: {seconds}; peak memory {summary['peak memory GiB']:.1f} GiB.")
    return "\n".join(lines)


def figure(summary, runs, title: str):
    """Accuracies with intervals; margins of single held-out pairs."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.4), layout="constrained", width_ratios=(1.4, 1))
    plots.interval_bars(summary["accuracies"], left, "held-out accuracy", marks=[(0.5, "a coin")])
    plots.margin_histogram(np.concatenate([run["margins"] for run in runs]), right)
    fig.suptitle(title)
    return fig


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--name", default="misconceptions", help="names the figure: figures/<profile>_<name>.png")
    parser.add_argument("--data", help="preferences: a local file or a hub id; by default the profile's")
    named = {"action": "append", "default": [], "type": column_name, "metavar": "OURS=THEIRS"}
    parser.add_argument("--column", **named, help="a column's name in the file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--benchmark", help="TruthfulQA's CSV: mc1 and mc2 before and after, for the first seed")
    parser.add_argument("--limit", type=int, help="only so many questions of the benchmark, drawn with a seed")
    parser.add_argument("--fresh", action="store_true", help="train again what is already under runs/")
    args = parser.parse_args(argv)
    base = load_profile(args.profile, **({"dataset": args.data, "dataset_revision": None} if args.data else {}))
    pairs = load_preferences(base.dataset, columns=dict(args.column) or None, revision=base.dataset_revision)
    print(describe(base), make_plan(base), f"{len(pairs)} pairs", sep="\n")
    benchmark = read_truthfulqa(args.benchmark) if args.benchmark else []
    runs = []
    for seed in range(args.seeds):
        folder = run_directory(base) / args.name / f"seed{seed}"
        asked = benchmark if seed == 0 else None
        runs.append(run_once(dataclasses.replace(base, seed=seed), pairs, folder, args.fresh, asked, args.limit))
        print(
            f"seed {seed}: accuracy {np.mean(runs[-1]['hits']['DPO, implicit reward']):.3f}, {runs[-1]['seconds']:.0f} s",
            flush=True,
        )
    summary = summarise(runs)
    plots.save_figure(figure(summary, runs, f"{base.name}: {args.name}"), f"{base.name}_{args.name}", summary)
    print(markdown(summary), json.dumps(summary["samples"], indent=1, ensure_ascii=False), sep="\n\n")


if __name__ == "__main__":
    main()
