"""Before and after, over seeds: SFT and DPO next to the baselines, as a table and a figure.

python -m dpo_utils report --profile smollm2 --name misconceptions [--data FILE]
                          [--column prompt=Question ...] [--benchmark TruthfulQA.csv --limit 80]
"""

import json
import sys
import time
from dataclasses import replace
from functools import partial

import pandas as pd
import torch

from dpo_utils import commands, evaluate, plots
from dpo_utils.data import bad_rows, load_preferences, plain_text, split_by_prompt, training_data
from dpo_utils.experiments.truthfulqa import multiple_choice, read_truthfulqa, unseen
from dpo_utils.models import as_reference, load_policy
from dpo_utils.profiles import describe, make_plan, run_directory
from dpo_utils.train import train_dpo, train_sft

MARGINS, ACCURACY = "margins (beta × nats)", ", accuracy"


def run_once(profile, pairs, folder, fresh: bool, benchmark: list[dict], limit) -> dict:
    """One seed: split by prompt, SFT, DPO, measure. `measured`: columns, indexed by the prompt."""
    start = time.perf_counter()
    train, held_out = split_by_prompt(pairs, profile.held_out, seed=profile.seed)
    demonstrations, _ = training_data("sft", profile)
    train_sft(*load_policy(profile), demonstrations, profile, folder / "sft", fresh=fresh)
    model, tokenizer = ours = load_policy(profile, adapter=folder / "sft" / "adapter")
    train_dpo(*ours, train, profile, folder / "dpo", fresh=fresh)
    seconds = time.perf_counter() - start

    logps = evaluate.preference_table(*ours, held_out, profile)
    usable = held_out.select(logps["row"] - 1)
    prompts, room = usable["prompt"], {"max_new_tokens": profile.max_new_tokens}
    draw = partial(evaluate.sample_ids, *ours, prompts[:64], seed=profile.seed, **room)
    answer = partial(evaluate.sample, *ours, prompts[:5], temperature=0, **room)
    rows, near = unseen(benchmark, train, limit) if benchmark else ([], [])
    choose = partial(multiple_choice, *ours, rows) if rows else dict
    drawn, after, choices = {"DPO": draw()}, answer(), {"DPO": choose()}
    with as_reference(model):
        drawn["SFT"], choices["SFT"] = draw(), choose()
    with model.disable_adapter():
        base = evaluate.preference_table(*ours, held_out, profile)
        before, choices["base"] = answer(), choose()

    hits = {"DPO, implicit reward": evaluate.wins(logps["margins"], 0)}
    sides = {"DPO": (logps, "policy"), "SFT": (logps, "ref"), "base": (base, "policy")}
    for who, (x, of) in sides.items():
        hits[f"{who}, raw log-prob"] = evaluate.wins(x[f"{of}_chosen"], x[f"{of}_rejected"])
    hits |= evaluate.surface_baselines(train, usable)
    found = {name + ACCURACY: values for name, values in hits.items()}
    found[MARGINS] = logps["margins"]
    for side in ("chosen", "rejected"):
        found[f"{side} log-ratio (nats)"] = logps[f"{side}_rewards"] / profile.beta
    kl = evaluate.sampled_kl(*ours, drawn["DPO"], batch=4)
    found["KL to the reference (nats per answer)"] = kl["full"]
    for who in ("SFT", "DPO"):
        found[f"tokens of a sample, {who}"] = [len(ids) for _, ids in drawn[who]]
    names = [plain_text(prompt) for prompt in prompts]
    measured = {name: pd.Series(x, names[: len(x)]) for name, x in found.items()}
    for who, scores in choices.items():
        measured |= {f"TruthfulQA {task}, {who}": pd.Series(x) for task, x in scores.items()}
    texts = zip(names, before, after, strict=False)
    return {
        "measured": measured,
        "questions": {"asked": len(rows), "near a training pair, left out": len(near)},
        "seconds": seconds,
        "samples": [{"prompt": p, "base": b, "DPO": a} for p, (b,), (a,) in texts],
    }


def peak_memory() -> float:
    """GiB at most until now, of the GPU or else of the process; 0 on Windows without a GPU."""
    if torch.cuda.is_available() or sys.platform == "win32":
        return torch.cuda.max_memory_allocated() / 2**30
    from resource import RUSAGE_SELF, getrusage  # not there on Windows

    return getrusage(RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def summarise(runs) -> dict:
    """Means with 95 % intervals, pooled over the seeds, and what a run costs.

    A prompt that several seeds held out is resampled as one.
    """
    tables = [run["measured"] for run in runs]  # the first has all columns
    pooled = {name: pd.concat([t[name] for t in tables if name in t]) for name in tables[0]}
    return runs[0] | {
        "measured": {n: evaluate.bootstrap(x, groups=x.index) for n, x in pooled.items()},
        "calibration": evaluate.calibration(pooled[MARGINS]),
        "seconds": [round(run["seconds"], 1) for run in runs],
        "peak memory GiB": round(peak_memory(), 2),
    }


def markdown(summary) -> str:
    """The table, and what else was measured, as Markdown."""
    lines = ["| held-out pairs, pooled over seeds | estimate | 95 % interval |", "|---|---|---|"]
    for name, (value, low, high) in summary["measured"].items():
        lines.append(f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |")
    lines.append(
        "\nBrier {brier:.3f}, calibration error {ece:.3f}".format(**summary["calibration"])
    )
    lines += [f"{key}: {summary[key]}" for key in ("questions", "seconds", "peak memory GiB")]
    return "\n".join(lines)


def main(argv=None) -> None:
    """`python -m dpo_utils report` for callers in Python."""
    with commands.one_line():
        command(*commands.report(argv))


def command(args, base) -> None:
    """Train and measure every seed; print the table and draw the figure."""
    columns, pin = dict(args.column) or None, base.dataset_revision
    aside = bad_rows(base, args.on_error, args.quarantine)
    pairs = load_preferences(base.dataset, columns=columns, revision=pin, **aside)
    print(describe(base), make_plan(base), f"{len(pairs)} pairs", sep="\n")
    benchmark, runs = read_truthfulqa(args.benchmark) if args.benchmark else [], []
    for seed in range(args.seeds):
        profile, folder = replace(base, seed=seed), run_directory(base) / args.name / f"seed{seed}"
        runs.append(run_once(profile, pairs, folder, args.fresh, benchmark, args.limit))
        benchmark = []  # the first seed alone answers it
    summary, shape = summarise(runs), {"figsize": (10.5, 3.4), "width_ratios": (1.4, 1)}
    bars = {n.removesuffix(ACCURACY): x for n, x in summary["measured"].items() if ACCURACY in n}
    figure, (left, right) = plots.plt.subplots(1, 2, layout="constrained", **shape)
    plots.interval_bars(bars, left, "held-out accuracy", marks=[(0.5, "chance")])
    right.hist(pd.concat([run["measured"][MARGINS] for run in runs]), bins=30, color=plots.MARGIN)
    right.axvline(0, color="black", linewidth=1)  # to its left the rejected answer is preferred
    right.set(xlabel="reward margin of a pair (beta × nats)", ylabel="pairs")
    figure.suptitle(f"{base.name}: {args.name}")
    plots.save_figure(figure, f"{base.name}_{args.name}", summary)
    samples = json.dumps(summary["samples"], indent=1, ensure_ascii=False)
    print(markdown(summary), samples, sep="\n\n")
