"""Before and after, over seeds: SFT and DPO next to the baselines, as a table and a figure.

python -m dpo_utils.report --profile smollm2 --name misconceptions [--data FILE]
                           [--column prompt=Question ...] [--benchmark TruthfulQA.csv --limit 80]
"""

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from huggingface_hub import ModelCard, ModelCardData

from dpo_utils import evaluate, plots
from dpo_utils.checkpoints import write_file
from dpo_utils.data import column_name, load_preferences, plain_text, split_by_prompt
from dpo_utils.experiments.truthfulqa import multiple_choice, read_truthfulqa, unseen
from dpo_utils.models import as_reference, load_policy
from dpo_utils.profiles import ASSETS, PINS, describe, load_profile, make_plan, run_directory
from dpo_utils.train import train_dpo, train_sft, training_data

MARGINS = "margins (beta × nats)"


def write_card(folder, profile, pairs: int, held_out: int, metrics: dict, drift: dict) -> Path:
    """Write README.md in `folder`, a Hugging Face model card without local paths; gives its path.

    pairs, held_out: numbers of preference pairs. metrics: {name: (estimate, low, high)}. drift:
    {what against what: {"mean": nats, "largest": nats}}. Raises ValueError without metrics.
    """
    if not metrics:
        raise ValueError("a model card needs a measurement: run the evaluation, give its metrics")
    values = {"profile": profile, "pairs": pairs, "held_out": held_out}
    for field, pin in PINS.items():
        source, revision = getattr(profile, field), getattr(profile, pin)
        on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not Path(source).exists()
        unpinned = source if on_hub else Path(source).name
        values[field] = f"{source} @ {revision}" if revision else unpinned
    head = ModelCardData(
        library_name="peft",
        tags=["dpo", "lora"],
        base_model=profile.model if profile.revision else None,
        datasets=profile.dataset if profile.dataset_revision else None,
    )
    values |= {"metrics": metrics, "drift": drift, "template_path": ASSETS / "model_card.md"}
    path = Path(folder) / "README.md"
    write_file(path, str(ModelCard.from_template(head, **values)).encode())
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

    table = evaluate.preference_table(*ours, held_out, profile)
    usable = held_out.select(table["row"] - 1)
    prompts, size = usable["prompt"], {"max_new_tokens": profile.max_new_tokens}
    draw = partial(evaluate.sample_ids, *ours, prompts[:64], seed=profile.seed, **size)
    answer = partial(evaluate.sample, *ours, prompts[:5], temperature=0, **size)
    rows, near = unseen(benchmark, train, limit) if benchmark else ([], [])
    choose = partial(multiple_choice, *ours, rows) if rows else dict
    drawn, answers, choices = draw(), answer(), {"DPO": choose()}
    with as_reference(model):
        drawn_by_sft, choices["SFT"] = draw(), choose()
    with model.disable_adapter():
        base = evaluate.preference_table(*ours, held_out, profile)
        base_answers, choices["base"] = answer(), choose()

    accuracies = {
        "DPO, implicit reward": evaluate.wins(table["margins"], 0),
        "DPO, raw log-prob": evaluate.wins(table["policy_chosen"], table["policy_rejected"]),
        "SFT, raw log-prob": evaluate.wins(table["ref_chosen"], table["ref_rejected"]),
        "base, raw log-prob": evaluate.wins(base["policy_chosen"], base["policy_rejected"]),
    } | evaluate.surface_baselines(train, usable)
    nats = {
        MARGINS: table["margins"],
        "chosen log-ratio (nats)": table["chosen_rewards"] / profile.beta,
        "rejected log-ratio (nats)": table["rejected_rewards"] / profile.beta,
    }
    samples = {
        "KL to the reference (nats per answer)": evaluate.sampled_kl(*ours, drawn, batch=4)["full"],
        "tokens of a sample, SFT": [len(ids) for _, ids in drawn_by_sft],
        "tokens of a sample, DPO": [len(ids) for _, ids in drawn],
    }
    names, counts = [*map(plain_text, prompts)], {"questions": len(rows), "left out": len(near)}
    texts = zip(names, base_answers, answers, strict=False)
    return {
        "accuracies": pd.DataFrame(accuracies, names),
        "nats": pd.DataFrame(nats, names),
        "samples drawn": pd.DataFrame(samples, names[:64]),
        "multiple choice": counts | choices if rows else None,
        "seconds": seconds,
        "samples": [{"prompt": p, "base": b, "DPO": a} for p, (b,), (a,) in texts],
    }


def peak_memory() -> float | None:
    """GiB at most, of the GPU if there is one, else of the process; None on Windows."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "win32":
        return None
    from resource import RUSAGE_SELF, getrusage  # Windows does not have it

    return getrusage(RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)


def summarise(runs) -> dict:
    """Means with 95 % intervals, pooled over the seeds, and what a run costs.

    A prompt that several seeds held out is resampled as one.
    """
    kinds = ("accuracies", "nats", "samples drawn")
    pooled = {kind: pd.concat([run[kind] for run in runs]) for kind in kinds}
    return {
        kind: {name: evaluate.bootstrap(x, groups=table.index) for name, x in table.items()}
        for kind, table in pooled.items()
    } | {
        "calibration": evaluate.calibration(pooled["nats"][MARGINS]),
        "multiple choice": runs[0]["multiple choice"],
        "seconds by seed": [run["seconds"] for run in runs],
        "peak memory GiB": peak_memory(),
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
    if found := summary["multiple choice"]:
        cells = [(who, task) for who in ("base", "SFT", "DPO") for task in ("mc1", "mc2")]
        shown = ", ".join("{} {} {:.3f} ± {:.3f}".format(*c, *found[c[0]][c[1]]) for c in cells)
        left_out = f"after {found['left out']} near a training pair were left out"
        what = f"TruthfulQA ({found['questions']} questions, {left_out}; ± one standard error)"
        lines.append(f"\n{what}: {shown}.")
    seconds, memory = summary["seconds by seed"], summary["peak memory GiB"]
    peak = f"{memory:.1f} GiB" if memory else "not measured on Windows"
    costs = f"Seconds per seed: {', '.join(f'{s:.0f}' for s in seconds)}; peak memory {peak}."
    return "\n".join([*lines, f"\n{costs}"])


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
    columns, pin = dict(args.column) or None, base.dataset_revision
    pairs = load_preferences(base.dataset, columns=columns, revision=pin)
    print(describe(base), make_plan(base), f"{len(pairs)} pairs", sep="\n")
    benchmark, runs = read_truthfulqa(args.benchmark) if args.benchmark else [], []
    for seed in range(args.seeds):
        profile, folder = replace(base, seed=seed), run_directory(base) / args.name / f"seed{seed}"
        runs.append(run_once(profile, pairs, folder, args.fresh, benchmark, args.limit))
        benchmark = []
    summary, shape = summarise(runs), {"figsize": (10.5, 3.4), "width_ratios": (1.4, 1)}
    figure, (left, right) = plots.plt.subplots(1, 2, layout="constrained", **shape)
    plots.interval_bars(summary["accuracies"], left, "held-out accuracy", marks=[(0.5, "chance")])
    plots.margin_histogram(pd.concat([run["nats"][MARGINS] for run in runs]), right)
    figure.suptitle(f"{base.name}: {args.name}")
    plots.save_figure(figure, f"{base.name}_{args.name}", summary)
    samples = json.dumps(summary["samples"], indent=1, ensure_ascii=False)
    print(markdown(summary), samples, sep="\n\n")


if __name__ == "__main__":
    main()
