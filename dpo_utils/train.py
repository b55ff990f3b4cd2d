"""SFT, DPO and KTO in one loop.

In a shell: python -m dpo_utils train {sft,dpo} --profile tiny --output DIR [--data FILE] ...
"""

import sys

from dpo_utils import __main__, commands

if __name__ == "__main__":  # before torch is imported
    sys.exit(__main__.main(["train", *sys.argv[1:]]))

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import concatenate_datasets
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from dpo_utils import preflight
from dpo_utils.audit import audit
from dpo_utils.checkpoints import RunFolder, digest, orderly_stop
from dpo_utils.logps import completion_logps, options_for, why_plain
from dpo_utils.losses import kto_loss, needs_reference, preference_loss
from dpo_utils.models import load_policy, trainable
from dpo_utils.profiles import Profile, describe, make_plan
from dpo_utils.reference import reference_logps, run_key
from dpo_utils.schedule import learning_rate_at, step_items
from dpo_utils.schemas import thumb
from dpo_utils.tokens import as_item, tokenize_all, tokenize_demonstration, tokenize_pair

METRICS = [f"{of}/{side}" for of in ("rewards", "logps") for side in ("chosen", "rejected")]
METRICS[2:2] = ["rewards/margins", "rewards/accuracies"]  # TRL's names
ROUNDING = 1e-6  # relative: by how much equal log-probs differ between two batchings


@dataclass(frozen=True)
class Task:
    """What is trained: items, the loss of each, and how much each counts in a step."""

    stage: str  # sft, dpo or kto
    items: list  # (prompt_ids, completions), all with the same number of completions
    rows: list[int]  # 1-based row of each item in the data, for messages
    weights: torch.Tensor  # (items,) how much an item counts: 1 a pair, its tokens in SFT
    reference: torch.Tensor | None  # (items, completions) log-probs that the objective reads
    objective: Callable  # (logps (n, completions), item numbers) -> (losses (n,), {metric: (n,)})
    settings: dict | None = None  # of the loss: part of what a run is known by


def train_sft(model, tokenizer, demonstrations, profile, output=None, **options) -> list[dict]:
    """Fine-tune the adapter in place on demonstrations (prompt, completion); returns the history.

    The loss is the mean over the completion tokens of the whole step, in nats. Options: `fit`.
    """
    rows, items = _items(model, demonstrations, tokenizer, profile, tokenize_demonstration)
    tokens = torch.tensor([float(len(answer)) for _, (answer,) in items])

    def objective(logps, numbers):
        return -logps[:, 0] / tokens[numbers].to(logps), {}

    schedule = {n: getattr(profile, f"sft_{n}") for n in ("steps", "batch", "learning_rate")}
    task, profile = Task("sft", items, rows, tokens, None, objective), replace(profile, **schedule)
    return fit(model, tokenizer, task, profile, output, **options)


def train_dpo(
    model, tokenizer, pairs, profile, output=None, *, loss=None, loss_options=None, **options
) -> list[dict]:
    """Train the adapter in place on preferences (prompt, chosen, rejected); returns the history.

    loss: a name in `losses.LOSSES`, by default the profile's; loss_options: its further arguments.
    The history has `METRICS`, under TRL's names: means over the pairs of a step, where a tie is
    half an accurate pair. Options: `fit`.
    """
    profile = replace(profile, loss=loss or profile.loss)
    rows, items = _items(model, pairs, tokenizer, profile, tokenize_pair)
    lengths = torch.tensor([[float(len(answer)) for answer in answers] for _, answers in items])
    settings, more = {"label_smoothing": profile.label_smoothing}, loss_options or {}
    reference, how = None, {name: options.get(name) for name in ("fresh", "plain")}
    if needs_reference(profile.loss):
        reference = reference_logps(model, tokenizer, items, profile, output, **how)

    def objective(logps, numbers):
        refs = (None, None) if reference is None else reference[numbers].to(logps).T
        sides = *logps.T, *refs, *lengths[numbers].to(logps).T
        losses, chosen, rejected = preference_loss(
            profile.loss, *sides, profile.beta, **settings, **more
        )
        margins = chosen - rejected
        tie = margins.abs() <= ROUNDING * profile.beta * logps.detach().abs().sum(-1)
        accuracies = torch.where(tie, 0.5, (margins > 0).to(margins))
        metrics = chosen, rejected, margins, accuracies, *logps.detach().T
        return losses, dict(zip(METRICS, metrics, strict=True))

    ones = torch.ones(len(items))
    task = Task("dpo", items, rows, ones, reference, objective, loss_options)
    return fit(model, tokenizer, task, profile, output, **options)


def train_unpaired(
    model, tokenizer, answers, profile, output=None, *, loss_options=None, **options
) -> list[dict]:
    """Train the adapter in place by KTO on single answers (prompt, completion, label: is it good).

    loss_options: of `losses.kto_loss`; kl is a constant, 0 by default. The history's rewards are
    means over good and over bad answers, in expectation. Options: `fit`.
    """
    rows, items = _items(model, answers, tokenizer, profile, tokenize_demonstration)
    good = torch.tensor([thumb(answers[row - 1]["label"]) for row in rows])
    share, settings = good.float().mean(), loss_options or {}
    how = {name: options.get(name) for name in ("fresh", "plain")}
    reference = reference_logps(model, tokenizer, items, profile, output, **how)

    def objective(logps, numbers):
        label, ref = good[numbers].to(logps.device), reference[numbers].to(logps)[:, 0]
        losses, rewards = kto_loss(logps[:, 0], ref, label, beta=profile.beta, **settings)
        metrics = {"rewards/chosen": rewards * label / share, "logps": logps[:, 0].detach()}
        metrics["rewards/rejected"] = rewards * ~label / (1 - share).clamp(min=1e-9)
        return losses, metrics

    known_by, ones = settings | {"labels": digest(good.tolist())}, torch.ones(len(items))
    task = Task("kto", items, rows, ones, reference, objective, known_by)
    return fit(model, tokenizer, task, profile, output, **options)


def _items(model, rows, tokenizer, profile: Profile, tokenize) -> tuple[list[int], list]:
    """Row numbers and items of the usable rows; prints how many were dropped and why."""
    kept, dropped = tokenize_all(rows, tokenizer, profile.max_length, tokenize)
    if dropped:
        counts = sorted(Counter(reason for _, reason in dropped).items())
        reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
        say = Accelerator(cpu=model.device.type == "cpu").print  # once, not from every process
        say(f"{len(kept)} rows kept, {len(dropped)} dropped: {reasons}")
    return [row["row"] for row in kept], [as_item(row) for row in kept]


@dataclass
class Run:
    """A task under way."""

    model: torch.nn.Module
    task: Task
    profile: Profile
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    options: dict  # of completion_logps; micro_tokens shrinks when memory runs out
    history: list[dict] = field(default_factory=list)


def fit(
    model, tokenizer, task, profile, output, *, fresh=False, tracker=None, on_step=None, plain=None
) -> list[dict]:
    """Train the adapter in place and return the history, one dict a step.

    output: folder for history, adapter, checkpoints; run again with the same settings it resumes,
    and a finished run is loaded, not repeated. fresh: start over. tracker: one of Accelerate's.
    on_step: called with the history after every step. plain: force (True) or forbid (False) the
    plain form of the log-probs. Raises SettingsChanged if `output` was made with other settings,
    the errors of `preflight`, BlockingIOError while another process trains into `output`, and
    KeyboardInterrupt after a signal, once a checkpoint is saved.
    """
    if not trainable(model):
        raise RuntimeError("nothing is trainable: load the adapter with is_trainable=True")
    accelerator = Accelerator(cpu=model.device.type == "cpu", log_with=tracker, project_dir=output)
    if tracker and not accelerator.log_with:
        raise ValueError(f"{tracker} is not installed: pip install {tracker}")
    reason = why_plain(model) if plain is None else None
    if reason:
        accelerator.print(f"log-probs in the plain form, since {reason}")
    options = {**options_for(profile, tokenizer), "plain": bool(plain or reason)}
    optimizer = torch.optim.AdamW(trainable(model), weight_decay=0.0)
    run = Run(model, task, profile, accelerator, optimizer, options)
    folder = RunFolder(run, output, run_key(run, tokenizer))
    with folder.alone():
        folder.open(fresh)
        _steps(run, folder, tracker, on_step)
        folder.close()
    return run.history


def _steps(run: Run, folder: RunFolder, tracker, on_step) -> None:
    """The steps that are still to be taken, with all that is kept and said of them."""
    accelerator, profile, task = run.accelerator, run.profile, run.task
    run.model.train()
    steps = range(len(run.history) + 1, profile.steps + 1)
    start = preflight.before_first_step(run) if steps and not run.history else None
    silent = None if accelerator.is_main_process else True  # None: TQDM_DISABLE decides
    if tracker:
        config = {k: x for k, x in folder.key.items() if isinstance(x, int | float | str)}
        accelerator.init_trackers("dpo_utils", config=config)
    with orderly_stop(accelerator) as caught:
        for step in tqdm(steps, task.stage, profile.steps, initial=steps.start - 1, disable=silent):
            numbers = step_items(step, len(task.items), profile.batch, profile.seed)
            row = take_step(run, step, numbers)
            if start and "nonfinite" not in row:
                start = preflight.after_first_step(run, start, row["grad_norm"])
            run.history.append(row)
            folder.append(row)
            accelerator.log({k: x for k, x in row.items() if isinstance(x, float)}, step=step)
            if on_step:
                on_step(run.history)
            preflight.after_every_step(run, numbers)
            stopping = any(gather_object([bool(caught)]))
            if stopping or step == profile.steps or step % profile.checkpoint_every == 0:
                folder.save()
            if stopping:
                raise KeyboardInterrupt(f"stopped after step {step}: run again to resume")


def take_step(run: Run, step: int, numbers: list[int]) -> dict:
    """One optimizer step on items, in place; returns its row. What is not finite is not applied."""
    start, profile = time.perf_counter(), run.profile
    rate = learning_rate_at(step, profile.steps, profile.learning_rate, profile.warmup)
    epoch = round(step * profile.batch / len(run.task.items), 4)
    means = _gradient(run, numbers)
    norm = float(torch.nn.utils.clip_grad_norm_(trainable(run.model), profile.max_grad_norm))
    finite = math.isfinite(means["loss"]) and math.isfinite(norm)
    if finite:
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
    run.optimizer.zero_grad()
    result = {**means, "grad_norm": norm} if finite else {"nonfinite": True}
    seconds = round(time.perf_counter() - start, 4)
    return {"step": step, "epoch": epoch, "learning_rate": rate, **result, "seconds": seconds}


def _gradient(run: Run, numbers: list[int]) -> dict:
    """The gradient of a step, in place, and the means of its metrics.

    They do not depend on how the items are cut into micro-batches or shared by processes. Where
    memory runs out, half the micro-batch is tried.
    """
    accelerator, options, weights = run.accelerator, run.options, trainable(run.model)
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    scale = make_plan(run.profile, run.model.device.type).loss_scale
    while (sums := _backward(run, mine, run.task.weights[numbers].sum(), scale)) is None:
        run.optimizer.zero_grad()
        clear_device_cache(garbage_collection=True)
        options["micro_tokens"] //= 2
        options["row_tokens"] = min(options["row_tokens"], options["micro_tokens"])
        print(f"out of memory: micro_tokens is now {options['micro_tokens']}, same gradient")
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad / scale
    if accelerator.num_processes > 1:  # in one message
        grads = [weight.grad for weight in weights]
        vector_to_parameters(accelerator.reduce(parameters_to_vector(grads), "sum"), grads)
    shares = gather_object([sums])
    names = dict.fromkeys(name for share in shares for name in share)
    totals = {name: sum(share.get(name, 0.0) for share in shares) for name in names}
    return {name: x if name == "loss" else x / len(numbers) for name, x in totals.items()}


def _backward(run: Run, numbers: list[int], total, scale: float) -> dict | None:
    """Backward through this process's items: sums of loss and metrics; None if out of memory."""
    task, sums, items = run.task, {}, [run.task.items[i] for i in numbers]
    try:
        for places, logps in completion_logps(run.model, items, **run.options) if items else ():
            chosen = [numbers[place] for place in places]
            losses, metrics = task.objective(logps, chosen)
            loss = (losses * task.weights[chosen].to(losses)).sum() / total
            (loss * scale).backward()
            for name, value in {"loss": loss.detach(), **metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value.sum())
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem) or run.options["micro_tokens"] <= 1:
            raise
        return None
    return sums


def main(argv=None) -> None:
    """`python -m dpo_utils train` for callers in Python."""
    with commands.one_line():
        command(*commands.train(argv))


def command(args, profile: Profile, rows, held_out) -> None:
    """Train as the command line says, also under torchrun."""
    plan, reference = make_plan(profile), f"reference: {args.adapter or 'the base model'}"
    say = Accelerator(cpu=plan.device == "cpu").print
    say(describe(profile, args.stage), plan, reference, sep="\n")
    say(f"{len(rows)} rows, {len(held_out or ())} more held out by prompt")
    both = concatenate_datasets([rows, held_out]) if held_out else None
    if both and (found := audit(both).noted["conflicting pair"]):
        say(f"  {len(found)} rows contradict another: see `python -m dpo_utils audit FILE`")
    model, tokenizer = load_policy(profile, adapter=args.adapter)
    options = {"fresh": args.fresh, "tracker": args.tracker}
    train = {"sft": train_sft, "dpo": train_dpo}[args.stage]
    history = train(model, tokenizer, rows, profile, args.output, **options)
    last = history[-1].get("loss", math.nan)
    say(f"{len(history)} steps, last loss {last:.4f}; adapter in {args.output}/adapter")
    PartialState().destroy_process_group()  # `fit` has waited for every process
