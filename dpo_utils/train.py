"""SFT and DPO, in a notebook or from a shell, on one process or many; the loop they share is `fit`.

python -m dpo_utils.train {sft,dpo} --profile tiny --output DIR [--data FILE] [--steps N] [--beta B] [--seed S]
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

import torch
from datasets import concatenate_datasets

from dpo_utils.audit import audit
from dpo_utils.checkpoints import SettingsChanged, load_cache, save_cache
from dpo_utils.data import column_name, columns_asked_for, load_demonstrations, load_preferences, split_by_prompt
from dpo_utils.fit import engine, fit, options_for, read_history
from dpo_utils.keys import reference_key
from dpo_utils.logps import all_logps
from dpo_utils.losses import kto_loss, needs_reference, preference_loss
from dpo_utils.models import as_reference, load_policy
from dpo_utils.profiles import Profile, describe, load_profile, make_plan
from dpo_utils.step import Task, learning_rate_at, step_items
from dpo_utils.tokens import as_item, tokenize_all, tokenize_demonstration, tokenize_pair

__all__ = [
    "learning_rate_at", "main", "options_for", "read_history", "reference_logps", "step_items", "train_dpo",
    "train_sft", "train_unpaired", "training_data",
]  # fmt: skip

_SCORED = {}  # reference log-probs of this process's runs that keep nothing on disk
ROUNDING = 1e-6  # relative; equal log-probs differ by this much when their rows are batched otherwise


# --- the two tasks ----------------------------------------------------------------------------------------------------


def train_sft(model, tokenizer, demonstrations, profile: Profile, output=None, **options) -> list[dict]:
    """Fine-tune the adapter in place on demonstrations (columns prompt, completion); returns the history.

    Only completion tokens are scored; the loss is the mean over the completion tokens of the whole step, in nats.
    History rows: step, epoch, loss, grad_norm, learning_rate, seconds. Options and what is raised: `fit.fit`.
    """
    rows, items = _items(model, demonstrations, tokenizer, profile, tokenize_demonstration)
    tokens = [len(completions[0]) for _, completions in items]

    def objective(logps, numbers):
        return -logps[:, 0] / logps.new_tensor([tokens[i] for i in numbers]), {}

    task = Task(
        "sft", items, rows, objective, tokens.__getitem__, None,
        profile.sft_steps, profile.sft_batch, profile.sft_learning_rate,
    )  # fmt: skip
    return fit(model, tokenizer, task, profile, output, **options)


def train_dpo(model, tokenizer, pairs, profile: Profile, output=None, *, loss=None, **options) -> list[dict]:
    """Train the adapter in place on preferences (columns prompt, chosen, rejected); returns the history.

    loss: a name in `losses.LOSSES`, by default the profile's; loss_options: its further arguments. The reference is
    what `models.as_reference` gives; its log-probs are computed once and cached in `output`. History rows carry TRL's
    names: loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies (a tie is half), logps/chosen,
    logps/rejected, grad_norm, learning_rate; means over the pairs of the step. Options and what is raised: `fit.fit`.
    """
    profile = dataclasses.replace(profile, loss=loss or profile.loss)
    rows, items = _items(model, pairs, tokenizer, profile, tokenize_pair)
    reference = None
    if needs_reference(profile.loss):
        reference = reference_logps(model, tokenizer, items, profile, output, options.get("fresh", False))
    objective = preference_objective(items, reference, profile, options.get("loss_options"))
    task = Task("dpo", items, rows, objective, lambda _: 1, reference, profile.steps, profile.batch, profile.learning_rate)
    return fit(model, tokenizer, task, profile, output, **options)


def preference_objective(items, reference, profile: Profile, loss_options=None):
    """(log-probs (n, 2), item numbers) -> losses (n,) and TRL's metrics, each (n,), of the profile's loss."""
    lengths = torch.tensor([[len(c) for c in completions] for _, completions in items], dtype=torch.float32)

    def objective(logps, numbers):
        ref_chosen, ref_rejected = (None, None) if reference is None else reference[numbers].to(logps).T
        losses, chosen, rejected = preference_loss(
            profile.loss, *logps.T, ref_chosen, ref_rejected, *lengths[numbers].to(logps).T,
            beta=profile.beta, label_smoothing=profile.label_smoothing, **(loss_options or {}),
        )  # fmt: skip
        margins = chosen - rejected
        tie = margins.abs() <= ROUNDING * profile.beta * logps.detach().abs().sum(-1)
        return losses, {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": torch.where(tie, 0.5, (margins > 0).to(margins)),
            "logps/chosen": logps[:, 0].detach(),
            "logps/rejected": logps[:, 1].detach(),
        }

    return objective


def train_unpaired(model, tokenizer, rows, profile: Profile, output=None, *, loss_options=None, **options) -> list[dict]:
    """Train the adapter in place by KTO on single answers (columns prompt, completion, label); returns the history.

    label: true for a thumb up. `profile.batch` answers a step, in TRL's unpaired format. loss_options:
    desirable_weight and undesirable_weight for unequal numbers of thumbs (Ethayarajh et al. 2024 keep the ratio of
    weight times number between 1 and 4/3), and kl, here a constant, 0 by default. History rows: loss, rewards/chosen and
    rewards/rejected (means over thumbs up and down, in expectation), logps, grad_norm, learning_rate.
    """
    numbers, items = _items(model, rows, tokenizer, profile, tokenize_demonstration)
    wanted = torch.tensor([bool(rows[number - 1]["label"]) for number in numbers])
    reference = reference_logps(model, tokenizer, items, profile, output, options.get("fresh", False))

    def objective(logps, chosen):
        label = wanted[chosen].to(logps.device)
        losses, rewards = kto_loss(logps[:, 0], reference[chosen].to(logps)[:, 0], label, beta=profile.beta, **(loss_options or {}))
        return losses, {
            "rewards/chosen": rewards * label / wanted.float().mean(),
            "rewards/rejected": rewards * ~label / (1 - wanted.float().mean()).clamp(min=1e-9),
            "logps": logps[:, 0].detach(),
        }

    task = Task("kto", items, numbers, objective, lambda _: 1, reference, profile.steps, profile.batch, profile.learning_rate)
    thumbs = "".join("+" if up else "-" for up in wanted)  # part of what the run is known by
    return fit(model, tokenizer, task, profile, output, loss_options={**(loss_options or {}), "thumbs": thumbs}, **options)


def _items(model, data, tokenizer, profile: Profile, tokenize) -> tuple[list[int], list]:
    """Row numbers and items of the usable rows; prints how many were dropped and why."""
    kept, dropped = tokenize_all(data, tokenizer, profile.max_length, tokenize)
    if dropped:
        reasons = [reason for _, reason in dropped]
        counts = ", ".join(f"{reasons.count(r)} x {r}" for r in sorted(set(reasons)))
        engine(model).print(f"{len(kept)} rows kept, {len(dropped)} dropped: {counts}")
    return [row["row"] for row in kept], [as_item(row) for row in kept]


def reference_logps(model, tokenizer, items, profile: Profile, output=None, fresh: bool = False):
    """Log-probs of all items under the reference, (items, completions), on the CPU.

    Cached in `output` under a key of all they depend on; raises SettingsChanged if the key is another. Without
    `output` they are kept in this process, so that many runs on the same pairs score them once. Several processes
    share the work.
    """
    key = reference_key(model, tokenizer, items, profile)
    cache = Path(output) / "reference.safetensors" if output else None
    known_by = str((key, options_for(profile, tokenizer)))  # other rows round otherwise: no run's digits depend on an earlier one
    if cache and not fresh and (cached := load_cache(cache, key)) is not None:
        return cached
    if not cache and (known := _SCORED.get(known_by)) is not None:
        return known.clone()
    accelerator = engine(model)
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    logps = torch.zeros(len(items), len(items[0][1]))
    if mine:
        with as_reference(model):
            logps[mine] = all_logps(model, [items[i] for i in mine], **options_for(profile, tokenizer)).float()
    logps = accelerator.reduce(logps.to(accelerator.device), reduction="sum").cpu()
    if cache and accelerator.is_main_process:
        save_cache(cache, logps, key)
    if not cache:
        _SCORED[known_by] = logps.clone()
    return logps


# --- from a shell -----------------------------------------------------------------------------------------------------


def training_data(stage: str, profile: Profile, **options):
    """(train, held out) of the profile's demonstrations or preferences; the split is by prompt.

    options: columns (by default those of `DPO_COLUMNS`) and on_error of `data.load_preferences`.
    """
    if stage == "sft":
        rows = load_demonstrations(profile.sft_dataset, revision=profile.sft_dataset_revision, **options)
        return rows, None
    if profile.dataset == "tiny":
        return load_preferences("tiny"), load_preferences("tiny", split="test")
    options["columns"] = options.get("columns") or columns_asked_for()
    pairs = load_preferences(profile.dataset, revision=profile.dataset_revision, **options)
    if profile.max_prompts and len(pairs) > profile.max_prompts:
        pairs = pairs.shuffle(seed=0).select(range(profile.max_prompts))
    return split_by_prompt(pairs, profile.held_out)


def _arguments(argv):
    parser = argparse.ArgumentParser(prog="python -m dpo_utils.train", description="Train an adapter: SFT or DPO.")
    parser.add_argument("stage", choices=["sft", "dpo"])
    parser.add_argument("--profile", help="tiny, smollm2 or phi2")
    parser.add_argument("--output", required=True, help="folder for history.jsonl, adapter/ and checkpoints/")
    parser.add_argument("--adapter", help="directory of the adapter to start from; in DPO it is also the reference")
    parser.add_argument("--data", help="preferences or demonstrations: a local file or a hub id")
    named = {"action": "append", "default": [], "type": column_name, "metavar": "OURS=THEIRS"}
    parser.add_argument("--column", **named, help="a column's own name in the file, as in --column prompt=Question")
    parser.add_argument("--on-error", choices=["raise", "skip"], default="raise", help="skip: bad rows are set aside, with reasons")
    parser.add_argument(
        "--target-modules", nargs="+", help="linear layers that get an adapter, for models other than the profile's"
    )
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--beta", type=float)
    parser.add_argument("--loss", help="a name in dpo_utils.losses.LOSSES")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--tracker", help="tensorboard, wandb or trackio")
    parser.add_argument("--fresh", action="store_true", help="delete the run in the output folder and start over")
    return parser.parse_args(argv)


def _profile(args) -> Profile:
    """The profile with the changes that the command line asks for."""
    prefix = "sft_" if args.stage == "sft" else ""
    changes = {prefix + "dataset": args.data, prefix + "steps": args.steps, prefix + "batch": args.batch}
    changes |= {"target_modules": tuple(args.target_modules) if args.target_modules else None}
    changes |= {prefix + "learning_rate": args.learning_rate, "beta": args.beta, "seed": args.seed, "loss": args.loss}
    changes = {name: value for name, value in changes.items() if value is not None}
    return load_profile(args.profile, **changes, **({prefix + "dataset_revision": None} if args.data else {}))


def _train(args) -> None:
    profile = _profile(args)
    options = {"columns": dict(args.column) or None, "on_error": args.on_error}
    train, held_out = training_data(args.stage, profile, **options)  # bad data stops here, before any model is loaded
    accelerator = engine(torch.empty(0, device=make_plan(profile).device))
    accelerator.print(describe(profile, args.stage), make_plan(profile), f"reference: {args.adapter or 'the base model'}", sep="\n")
    accelerator.print(amount(train, held_out))
    model, tokenizer = load_policy(profile, adapter=args.adapter)
    run = train_sft if args.stage == "sft" else train_dpo
    history = run(model, tokenizer, train, profile, args.output, fresh=args.fresh, tracker=args.tracker)
    last = history[-1].get("loss", math.nan)
    accelerator.print(f"{len(history)} steps, last loss {last:.4f}; adapter in {args.output}/adapter")


def amount(train, held_out=None) -> str:
    """How much there is to train on; and, of preferences, how many rows contradict one another."""
    if held_out is None:
        return f"{len(train)} demonstrations"
    line = f"{len(train)} pairs, {len(held_out)} more held out by prompt"
    if conflicts := audit(concatenate_datasets([train, held_out])).noted["conflicting pair"]:
        line += f"\n  {len(conflicts)} rows contradict another: `python -m dpo_utils.data audit` on the file lists them"
    return line


def main(argv=None) -> None:
    """The command line; the same under `accelerate launch` and `torchrun`. Exits with one line on what was foreseen."""
    args = _arguments(argv)
    try:
        _train(args)
    except KeyboardInterrupt as stop:
        print(str(stop) or "interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except (SettingsChanged, FloatingPointError, ValueError, OSError) as problem:
        raise SystemExit(f"{type(problem).__name__}: {problem}") from None
    leave()


def leave() -> None:
    """End a run of several processes together, so that none waits for another that is gone."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
