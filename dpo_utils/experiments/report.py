"""Before and after, over seeds: SFT and DPO next to the baselines, as a table and a figure.

python -m dpo_utils.report --profile smollm2 --name misconceptions [--data FILE]
                           [--column prompt=Question ...] [--benchmark TruthfulQA.csv --limit 80]
"""

import argparse
import json
import random
import re
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData

from dpo_utils import evaluate, plots
from dpo_utils.checkpoints import write_file
from dpo_utils.data import column_name, load_preferences, plain_text, split_by_prompt
from dpo_utils.experiments.truthfulqa import multiple_choice, overlap, read_truthfulqa
from dpo_utils.models import as_reference, load_policy
from dpo_utils.profiles import ASSETS, PINS, describe, load_profile, make_plan, run_directory
from dpo_utils.train import train_dpo, train_sft, training_data

try:
    import resource
except ImportError:  # Windows does not have it
    resource = None
MARGINS = "margins (beta × nats)"


def write_card(folder, profile, pairs: int, held_out: int, metrics: dict, drift: dict) -> Path:
    """Write README.md in `folder`, a Hugging Face model card without local paths; gives its path.

    pairs, held_out: numbers of preference pairs. metrics: {name: (estimate, low, high)}. drift:
    {what against what: {"mean": nats, "largest": nats}}. Raises ValueError without metrics.
    """
    if not metrics:
        raise ValueError("a model card needs a measurement: run the evaluation, give its metrics")
    values = {"profile": profile, "pairs": pairs, "held_out": held_out}
    head = {"library_name": "peft", "tags": ["dpo", "lora"]}
    hub_names = {"model": "base_model", "dataset": "datasets"}
    for field, pin in PINS.items():
        source, revision = getattr(profile, field), getattr(profile, pin)
        on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not Path(source).exists()
        values[field] = f"{source} @ {revision}" if revision else source
        if not revision and not on_hub:
            values[field] = Path(source).name
        if revision and field in hub_names:
            head[hub_names[field]] = source
    values |= {"card_data": ModelCardData(**head), "metrics": metrics, "drift": drift}
    card = ModelCard.from_template(template_path=ASSETS / "model_card.md", **values)
    path = Path(folder) / "README.md"
    write_file(path, str(card).encode())
    return path


def run_once(profile, pairs, folder, fresh: bool, benchmark: list[dict], limit) -> dict:
    """One seed: split by prompt, SFT, DPO, measure. The tables are indexed by held-out prompt."""
    start = time.perf_counter()
    train, held_out = split_by_prompt(pairs, profile.held_out, seed=profile.seed)
    demonstrations, _ = training_data("sft", profile)
    train_sft(*load_policy(profile), demonstrations, profile, folder / "sft", fresh=fresh)
    model, tokenizer = ours = load_policy(profile, adapter=folder / "sft" / "adapter")
    train_dpo(*ours, train, profile, folder / "dpo", fresh=fresh)
    seconds = time.perf_counter() - start
    states = {
        "DPO": nullcontext,
        "SFT": partial(as_reference, model),
        "base": model.disable_adapter,
    }

    def of_each(measure, *args, **options):
        out = {}
        for who, state in states.items():
            with state():
                out[who] = measure(*ours, *args, **options)
        return out

    tables = of_each(evaluate.preference_table, held_out, profile)
    table, usable = tables["DPO"], held_out.select(tables["DPO"]["row"] - 1)
    hits = {"DPO, implicit reward": evaluate.wins(table["margins"], 0)}
    for who, logps in tables.items():
        sides = logps["policy_chosen"], logps["policy_rejected"]
        hits[f"{who}, raw log-prob"] = evaluate.wins(*sides)
    hits |= evaluate.surface_baselines(train, usable)
    nats = {MARGINS: table["margins"]}
    for side in ("chosen", "rejected"):
        nats[f"{side} log-ratio (nats)"] = table[f"{side}_rewards"] / profile.beta
    prompts, options = usable["prompt"], {"max_new_tokens": profile.max_new_tokens}
    drawn = of_each(evaluate.sample_ids, prompts[:64], seed=profile.seed, **options)
    kl = evaluate.sampled_kl(*ours, drawn["DPO"], batch=4)["full"]
    samples = {"KL to the reference (nats per answer)": kl}
    for who in ("SFT", "DPO"):
        samples[f"tokens of a sample, {who}"] = [len(answer) for _, answer in drawn[who]]
    greedy = of_each(evaluate.sample, prompts[:5], temperature=0, **options)
    names = [plain_text(prompt) for prompt in prompts]
    texts = zip(names, greedy["base"], greedy["DPO"], strict=False)

    rows, counts = unseen(benchmark, train, limit) if benchmark else ([], {})
    return {
        "accuracies": pd.DataFrame(hits, index=names),
        "nats": pd.DataFrame(nats, index=names),
        "samples drawn": pd.DataFrame(samples, index=names[:64]),
        "multiple choice": counts | of_each(multiple_choice, rows) if rows else None,
        "seconds": seconds,
        "samples": [{"prompt": p, "base": b, "DPO": a} for p, (b,), (a,) in texts],
    }


def unseen(benchmark: list[dict], train, limit: int | None) -> tuple[list[dict], dict]:
    """Rows of the benchmark that no training pair is near, at most `limit` of them; and counts."""
    trained = [f"{plain_text(row['prompt'])} {plain_text(row['chosen'])}" for row in train]
    near = overlap(trained, [f"{row['question']} {row['best']}" for row in benchmark])
    seen = {row["benchmark"] for row in near}
    rows = [row for i, row in enumerate(benchmark, start=1) if i not in seen]
    rows = random.Random(0).sample(rows, min(limit or len(rows), len(rows)))
    return rows, {"questions": len(rows), "left out": len(near)}


def summarise(runs) -> dict:
    """Means with 95 % intervals, pooled over the seeds, and what a run costs.

    A prompt that several seeds held out is resampled as one.
    """
    summary, kinds = {}, ("accuracies", "nats", "samples drawn")
    pooled = {kind: pd.concat([run[kind] for run in runs]) for kind in kinds}
    for kind, table in pooled.items():
        columns = table.items()
        summary[kind] = {name: evaluate.bootstrap(x, groups=table.index) for name, x in columns}
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 2**30
    else:
        peak = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return summary | {
        "calibration": evaluate.calibration(pooled["nats"][MARGINS]),
        "multiple choice": runs[0]["multiple choice"],
        "seconds by seed": [run["seconds"] for run in runs],
        "peak memory GiB": peak,
        "samples": runs[0]["samples"],
    }


def markdown(summary) -> str:
    """The table, and what else was measured, as Markdown."""
    lines = ["| held-out pairs, pooled over seeds | estimate | 95 % interval |", "|---|---|---|"]
    rows = {f"{name}, accuracy": interval for name, interval in summary["accuracies"].items()}
    for name, (value, low, high) in (rows | summary["nats"] | summary["samples drawn"]).items():
        lines.append(f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |")
    scores = "Brier {brier:.3f}, expected calibration error {ece:.3f}"
    lines.append(f"\nCalibration of σ(margin): {scores.format(**summary['calibration'])}.")
    if choice := summary["multiple choice"]:
        cells = [(who, task) for who in ("base", "SFT", "DPO") for task in ("mc1", "mc2")]
        shown = ["{} {} {:.3f} ± {:.3f}".format(*cell, *choice[cell[0]][cell[1]]) for cell in cells]
        left_out = f"after {choice['left out']} near a training pair were left out"
        what = f"TruthfulQA ({choice['questions']} questions, {left_out}; ± one standard error)"
        lines.append(f"\n{what}: {', '.join(shown)}.")
    seconds = ", ".join(f"{s:.0f}" for s in summary["seconds by seed"])
    memory = summary["peak memory GiB"]
    peak = f"peak memory {memory:.1f} GiB" if memory else "peak memory not measured on Windows"
    return "\n".join([*lines, f"\nSeconds per seed: {seconds}; {peak}."])


def main(argv=None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m dpo_utils.report", description=__doc__)
    parser.add_argument("--profile", default="smollm2")
    parser.add_argument("--name", default="misconceptions", help="figures/<profile>_<name>.png")
    parser.add_argument("--data", help="preferences: a local file or a hub id")
    parser.add_argument("--column", action="append", default=[], type=column_name)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--benchmark", help="TruthfulQA's CSV, which the first seed answers")
    parser.add_argument("--limit", type=int, help="only so many questions of the benchmark")
    parser.add_argument("--fresh", action="store_true", help="train again what is under runs/")
    args = parser.parse_args(argv)
    base = load_profile(args.profile, **({"dataset": args.data} if args.data else {}))
    columns = dict(args.column) or None
    pairs = load_preferences(base.dataset, columns=columns, revision=base.dataset_revision)
    print(describe(base), make_plan(base), f"{len(pairs)} pairs", sep="\n")
    questions, runs = read_truthfulqa(args.benchmark) if args.benchmark else [], []
    for seed in range(args.seeds):
        profile, folder = replace(base, seed=seed), run_directory(base) / args.name / f"seed{seed}"
        asked = questions if seed == 0 else []
        runs.append(run_once(profile, pairs, folder, args.fresh, asked, args.limit))
    summary = summarise(runs)
    figure, (left, right) = plots.plt.subplots(
        1, 2, figsize=(10.5, 3.4), layout="constrained", width_ratios=(1.4, 1)
    )
    plots.interval_bars(summary["accuracies"], left, "held-out accuracy", marks=[(0.5, "chance")])
    plots.margin_histogram(pd.concat([run["nats"][MARGINS] for run in runs]), right)
    figure.suptitle(f"{base.name}: {args.name}")
    plots.save_figure(figure, f"{base.name}_{args.name}", summary)
    print(
        markdown(summary), json.dumps(summary["samples"], indent=1, ensure_ascii=False), sep="\n\n"
    )


if __name__ == "__main__":
    main()
