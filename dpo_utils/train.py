"""SFT and DPO by one loop on Accelerate, in a notebook or from a shell, on one process or many.

python -m dpo_utils.train {sft,dpo} --profile tiny --output DIR [--data FILE] [--steps N] [--beta B] [--seed S]
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import shutil
import signal
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from peft import set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from dpo_utils import checkpoints
from dpo_utils.data import load_demonstrations, load_preferences, split_by_prompt
from dpo_utils.logps import all_logps, completion_logps, why_plain
from dpo_utils.losses import needs_reference, preference_loss
from dpo_utils.models import as_reference, load_policy, save_adapter, trainable
from dpo_utils.profiles import Profile, describe, load_profile, make_plan
from dpo_utils.tokens import as_item, tokenize_all, tokenize_demonstration, tokenize_pair

KEY_FIELDS = (
    "model revision quantize dtype target_modules lora_r lora_alpha max_length beta loss label_smoothing warmup "
    "max_grad_norm seed"
).split()
PATIENCE = 3  # non-finite steps in a row before the run stops


@dataclasses.dataclass(frozen=True)
class Task:
    """What is trained: items, the loss of each, and how much each counts in a step."""

    stage: str  # sft or dpo
    items: list  # (prompt_ids, completions), all with the same number of completions
    rows: list[int]  # 1-based row of each item in the data, for messages
    objective: object  # (log-probs (n, completions), item numbers) -> (losses (n,), {metric: (n,)})
    weight: object  # item number -> how much it counts: 1 a pair in DPO, its tokens in SFT
    steps: int
    batch: int
    learning_rate: float


# --- the two tasks ----------------------------------------------------------------------------------------------------


def train_sft(model, tokenizer, demonstrations, profile: Profile, output=None, **options) -> list[dict]:
    """Fine-tune the adapter in place on demonstrations (columns prompt, completion); returns the history.

    Only completion tokens are scored; the loss is the mean over the completion tokens of the whole step, in nats.
    History rows: step, loss, grad_norm, learning_rate. Options as in `fit`.
    """
    rows, dropped = tokenize_all(demonstrations, tokenizer, profile.max_length, tokenize_demonstration)
    _report(dropped, len(rows))
    items = [as_item(row) for row in rows]
    tokens = [len(completions[0]) for _, completions in items]

    def objective(logps, numbers):
        return -logps[:, 0] / logps.new_tensor([tokens[i] for i in numbers]), {}

    task = Task(
        "sft", items, [r["row"] for r in rows], objective, tokens.__getitem__,
        profile.sft_steps, profile.sft_batch, profile.sft_learning_rate,
    )  # fmt: skip
    return fit(model, tokenizer, task, profile, output, **options)


def train_dpo(model, tokenizer, pairs, profile: Profile, output=None, *, loss=None, loss_options=None, **options):
    """Train the adapter in place on preferences (columns prompt, chosen, rejected); returns the history.

    loss: a name in `losses.LOSSES`, by default the profile's; loss_options: its further arguments. The reference is
    what `models.as_reference` gives; its log-probs are computed once and cached in `output`. History rows carry TRL's
    names: loss, rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies (a tie is half), logps/chosen,
    logps/rejected, grad_norm, learning_rate; means over the pairs of the step. Options as in `fit`.
    """
    profile = dataclasses.replace(profile, loss=loss or profile.loss)
    rows, dropped = tokenize_all(pairs, tokenizer, profile.max_length, tokenize_pair)
    _report(dropped, len(rows))
    items = [as_item(row) for row in rows]
    lengths = torch.tensor([[len(c) for c in completions] for _, completions in items], dtype=torch.float32)
    reference = None
    if needs_reference(profile.loss):
        reference = reference_logps(model, tokenizer, items, profile, output, options.get("fresh", False))

    def objective(logps, numbers):
        ref = reference[numbers].to(logps) if reference is not None else (None, None)
        ref_chosen, ref_rejected = ref.T if reference is not None else ref
        losses, chosen, rejected = preference_loss(
            profile.loss, *logps.T, ref_chosen, ref_rejected, *lengths[numbers].to(logps).T,
            beta=profile.beta, label_smoothing=profile.label_smoothing, **(loss_options or {}),
        )  # fmt: skip
        margins = chosen - rejected
        return losses, {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": margins,
            "rewards/accuracies": (margins > 0) + 0.5 * (margins == 0),
            "logps/chosen": logps[:, 0].detach(),
            "logps/rejected": logps[:, 1].detach(),
        }

    task = Task(
        "dpo", items, [r["row"] for r in rows], objective, lambda _: 1,
        profile.steps, profile.batch, profile.learning_rate,
    )  # fmt: skip
    if loss_options:
        options["key"] = {**options.get("key", {}), "loss_options": loss_options}
    return fit(model, tokenizer, task, profile, output, **options)


def _report(dropped, kept: int) -> None:
    if dropped:
        reasons = [reason for _, reason in dropped]
        counts = ", ".join(f"{reasons.count(r)} x {r}" for r in sorted(set(reasons)))
        print(f"{kept} rows kept, {len(dropped)} dropped: {counts}")


def options_for(profile: Profile, tokenizer) -> dict:
    """The arguments of `completion_logps` that a profile sets."""
    pad_id = tokenizer.pad_token_id
    return {"pad_id": pad_id, "micro_tokens": profile.micro_tokens, "row_tokens": profile.row_tokens}


def reference_logps(model, tokenizer, items, profile: Profile, output=None, fresh: bool = False):
    """Log-probs of all items under the reference, (items, completions); cached in `output` under a key of all they depend on."""
    key = reference_key(model, tokenizer, items, profile)
    cache = Path(output) / "reference.safetensors" if output else None
    if cache and cache.exists() and not fresh:
        checkpoints.require_same(json.loads(cache.with_suffix(".json").read_text()), key, cache)
        return load_file(cache)["logps"]
    with as_reference(model):
        logps = all_logps(model, items, **options_for(profile, tokenizer))
    if cache and Accelerator().is_main_process:
        cache.parent.mkdir(parents=True, exist_ok=True)
        checkpoints.write_json(cache.with_suffix(".json"), key)
        save_file({"logps": logps}, cache.with_suffix(".tmp"))
        cache.with_suffix(".tmp").replace(cache)
    return logps


# --- what a run is known by -------------------------------------------------------------------------------------------


def _hash(*parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()[:16]


def _weights_hash(named) -> str:
    """Names, shapes and a sample of the values: enough to tell two sets of weights apart, in milliseconds."""
    parts = []
    for name, value in named:
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].cpu().contiguous()
        parts += [name, list(value.shape), sample.view(torch.uint8).numpy().tobytes()]
    return _hash(*parts)


def reference_key(model, tokenizer, items, profile: Profile) -> dict:
    """Everything the reference's log-probs depend on."""
    named = [(n, p) for n, p in model.named_parameters() if ".default." not in n]
    return {
        "data": _hash(items),
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "template": _hash(tokenizer.chat_template or "plain"),
        "model": profile.model,
        "revision": profile.revision,
        "weights": _weights_hash(named),
        "max_length": profile.max_length,
    }


def run_key(model, tokenizer, task: Task, profile: Profile) -> dict:
    """Everything a run's numbers depend on; written beside its results and compared before it is resumed."""
    settings = {name: getattr(profile, name) for name in KEY_FIELDS}
    start = [(n, p) for n, p in model.named_parameters() if ".default." in n]
    return json.loads(
        json.dumps(
            {
                **settings,
                **reference_key(model, tokenizer, task.items, profile),
                "start": _weights_hash(start),
                "stage": task.stage,
                "steps": task.steps,
                "batch": task.batch,
                "learning_rate": task.learning_rate,
            }
        )
    )


# --- the loop ---------------------------------------------------------------------------------------------------------


def step_items(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Item numbers of a step (from 1): epochs of seeded permutations, read on end, a batch at a time."""
    numbers = []
    for place in range((step - 1) * batch, step * batch):
        epoch = place // count
        if not numbers or place % count == 0:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        numbers.append(order[place % count])
    return numbers


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then a cosine to zero after the last. `step` counts from 1."""
    warm = math.ceil(warmup * steps)
    if step <= warm:
        return peak * step / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - 1 - warm) / max(1, steps - warm)))


def fit(
    model, tokenizer, task: Task, profile: Profile, output=None, *,
    fresh=False, keep=2, tracker=None, on_step=None, plain=None, key=None,
) -> list[dict]:  # fmt: skip
    """Train the adapter in place and return one dict a step.

    output: folder for history.jsonl, adapter/ and checkpoints; run again with the same settings it resumes, and a
    finished run is loaded, not repeated. fresh: delete what is there and start over. keep: checkpoints kept. tracker:
    an Accelerate tracker (tensorboard, wandb, trackio). on_step: called with the history after every step. plain:
    force (True) or forbid (False) the plain form of the log-probs.
    Raises SettingsChanged if `output` was made with other settings, FloatingPointError after three non-finite steps.
    """
    accelerator = Accelerator(cpu=model.device.type == "cpu", log_with=tracker, project_dir=output)
    folder = Path(output) if output else None
    if fresh and folder and accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    accelerator.wait_for_everyone()
    key = {**run_key(model, tokenizer, task, profile), **(key or {})}
    if folder and (folder / "settings.json").exists():
        return _load_finished(model, folder, key)
    optimizer = torch.optim.AdamW(trainable(model), lr=task.learning_rate, weight_decay=0.0)
    history = _resume(model, optimizer, folder, key)
    if not history and plain is None:
        accelerator.print(
            f"log-probs: plain rows, since {reason}" if (reason := why_plain(model)) else "log-probs: shared rows"
        )
    if tracker:
        accelerator.init_trackers(
            "dpo_utils", config={k: v for k, v in key.items() if isinstance(v, (int, float, str))}
        )
    _loop(model, tokenizer, task, profile, optimizer, history, accelerator, folder, key, keep, on_step, plain)
    if folder and accelerator.is_main_process:
        save_adapter(model, folder / "adapter")
        checkpoints.write_json(folder / "settings.json", key)
    accelerator.wait_for_everyone()
    if tracker:
        accelerator.end_training()
    return history


def _load_finished(model, folder: Path, key: dict) -> list[dict]:
    checkpoints.require_same(json.loads((folder / "settings.json").read_text()), key, folder)
    set_peft_model_state_dict(model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    print(f"{folder.name}: this run is finished, its adapter is loaded (fresh=True trains again)")
    return read_history(folder)


def read_history(folder) -> list[dict]:
    """The rows of a run's history.jsonl."""
    return [json.loads(line) for line in (Path(folder) / "history.jsonl").read_text().splitlines()]


def _resume(model, optimizer, folder, key) -> list[dict]:
    """Load the newest whole checkpoint into model and optimiser; returns its history, or [] for a fresh start."""
    checkpoint = checkpoints.newest(folder / "checkpoints") if folder else None
    if checkpoint is None:
        return []
    step, old_key, weights, optimizer_state, history = checkpoints.load(checkpoint)
    checkpoints.require_same(old_key, key, folder)
    own = _adapter(model)
    with torch.no_grad():
        for name, value in weights.items():
            own[name].copy_(value)
    optimizer.load_state_dict(optimizer_state)
    print(f"resumed after step {step} from {checkpoint.name}")
    return history


def _adapter(model) -> dict:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _loop(model, tokenizer, task, profile, optimizer, history, accelerator, folder, key, keep, on_step, plain):
    options = {**options_for(profile, tokenizer), "plain": plain}
    scale = make_plan(profile, model.device.type).loss_scale
    main = accelerator.is_main_process
    if folder and main:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_lines(folder / "history.jsonl", history)
    model.train()
    unchecked = _preflight(model, task, profile, options) if not history else None
    bar = tqdm(total=task.steps, initial=len(history), desc=task.stage, disable=None if main else True)
    with bar, _signals() as stop:
        for step in range(len(history) + 1, task.steps + 1):
            row = _step(model, task, step, profile, optimizer, options, accelerator, scale)
            if unchecked and "nonfinite" not in row:
                unchecked = _after_first_step(model, row, unchecked, options)
            history.append(row)
            if folder and main:
                with open(folder / "history.jsonl", "a") as file:
                    file.write(json.dumps(row) + "\n")
            _show(row, bar, accelerator, on_step, history)
            stopping = _any_process(stop.signal is not None, accelerator)
            if folder and main and (step % profile.checkpoint_every == 0 or step == task.steps or stopping):
                checkpoints.save(
                    folder / "checkpoints", step, _adapter(model), optimizer.state_dict(), history, key, keep
                )
            _stop_if_hopeless(history, task, profile)
            if stopping and step < task.steps:
                accelerator.wait_for_everyone()
                raise KeyboardInterrupt(f"stopped by {stop.signal} after step {step}; run again to resume")


def _step(model, task, step, profile, optimizer, options, accelerator, scale) -> dict:
    """One optimiser step in place; returns its row. Nothing is changed where the loss or a gradient is not finite."""
    start = time.perf_counter()
    numbers = step_items(step, len(task.items), task.batch, profile.seed)
    rate = learning_rate_at(step, task.steps, task.learning_rate, profile.warmup)
    row = {"step": step, "epoch": round(step * task.batch / len(task.items), 4), "learning_rate": rate}
    means = _gradients(model, task, numbers, options, accelerator, scale)
    norm = float(torch.nn.utils.clip_grad_norm_(trainable(model), profile.max_grad_norm))
    if math.isfinite(means["loss"]) and math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        row = {**row, **means, "grad_norm": norm}
    else:
        row["nonfinite"] = True
    optimizer.zero_grad(set_to_none=True)
    return row | {"seconds": round(time.perf_counter() - start, 4)}


def _show(row, bar, accelerator, on_step, history) -> None:
    accelerator.log({name: value for name, value in row.items() if isinstance(value, float)}, step=row["step"])
    bar.set_postfix({name: f"{row[name]:.3f}" for name in ("loss", "rewards/margins") if name in row}, refresh=False)
    bar.update()
    if on_step:
        on_step(history)


def _stop_if_hopeless(history, task, profile) -> None:
    last = history[-PATIENCE:]
    if len(last) == PATIENCE and all(row.get("nonfinite") for row in last):
        rows = sorted(task.rows[i] for i in step_items(len(history), len(task.items), task.batch, profile.seed))
        raise FloatingPointError(
            f"the loss or its gradient was NaN or infinite {PATIENCE} steps in a row, last at step {len(history)} on data "
            f"rows {rows}. They changed no parameter. Lower the learning rate, or look at these rows."
        )


def _any_process(flag: bool, accelerator) -> bool:
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), reduction="sum"))


def _gradients(model, task, numbers, options, accelerator, scale) -> dict:
    """Gradient of the step's loss, every item weighed the same however it is cut into micro-batches or processes.

    Runs out of memory at one size, tries again at half: the gradient is the same. Returns the step's mean metrics.
    """
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    total_weight = sum(task.weight(i) for i in numbers)
    while True:
        try:
            sums = _accumulate(model, task, mine, options, total_weight, scale)
            break
        except RuntimeError as problem:
            if not should_reduce_batch_size(problem) or options["micro_tokens"] <= 1:
                raise
        for parameter in trainable(model):
            parameter.grad = None
        clear_device_cache(garbage_collection=True)
        options["micro_tokens"] //= 2
        print(f"out of memory: micro_tokens is now {options['micro_tokens']}; the gradient stays the same")
    for parameter in trainable(model):
        grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        parameter.grad = (
            accelerator.reduce(grad, reduction="sum") / scale if accelerator.num_processes > 1 else grad / scale
        )
    return _mean_over_processes(sums, len(numbers), accelerator)


def _accumulate(model, task, numbers, options, total_weight, scale) -> dict:
    """Backward through one process's share of the step; returns sums: the loss as a part of the step's, metrics as sums."""
    sums = {}
    items = [task.items[i] for i in numbers]
    for places, logps in completion_logps(model, items, **options) if items else ():
        chosen = [numbers[p] for p in places]
        losses, metrics = task.objective(logps, chosen)
        weights = losses.new_tensor([task.weight(i) for i in chosen])
        loss = (losses * weights).sum() / total_weight
        (loss * scale).backward()
        metrics = {"loss": loss.detach()} | {name: value.sum() for name, value in metrics.items()}
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _mean_over_processes(sums: dict, count: int, accelerator) -> dict:
    names = sorted(sums)
    if accelerator.num_processes > 1:
        holder = [names]
        broadcast_object_list(holder)  # a process without items has no metrics of its own
        names = holder[0]
        values = torch.tensor([sums.get(n, 0.0) for n in names], dtype=torch.float64, device=accelerator.device)
        sums = dict(zip(names, accelerator.reduce(values, reduction="sum").tolist(), strict=True))
    return {name: sums[name] / (1 if name == "loss" else count) for name in names}


# --- checks before and after the first step ---------------------------------------------------------------------------


def _preflight(model, task, profile, options):
    """Policy and reference on the same rows: equal to the bit at the start of DPO. Returns (items, log-probs) or True."""
    if not trainable(model):
        raise RuntimeError("nothing is trainable: load the adapter with is_trainable=True (load_policy does)")
    if task.stage != "dpo":
        return True
    items = [task.items[i] for i in step_items(1, len(task.items), task.batch, profile.seed)[:2]]
    with as_reference(model):
        reference = all_logps(model, items, **options)
    policy = all_logps(model, items, **options)
    if not torch.equal(policy, reference):
        raise RuntimeError(
            f"policy and reference differ by {(policy - reference).abs().max():.3g} nats before the first step, so the loss "
            "would not start at ln 2. Likely causes: dropout is on, the reference is not the model DPO starts from "
            "(base instead of SFT), or the adapter was trained already: load a fresh policy."
        )
    return items, reference


def _after_first_step(model, row, unchecked, options) -> None:
    """Something was learnt and the reference stayed: else say what is likely wrong. Returns None: checked."""
    if not row["grad_norm"] > 0:
        raise RuntimeError(
            "the first gradient is zero. Likely causes: the adapter was loaded frozen, gradient checkpointing without "
            "input gradients, or chosen and rejected are the same in every pair."
        )
    still = [name for name, p in _adapter(model).items() if "lora_B" in name and not p.any()]
    if still:
        raise RuntimeError(f"{len(still)} adapter matrices did not move in the first step, among them {still[0]}")
    if unchecked is not True:
        items, before = unchecked
        with as_reference(model):
            after = all_logps(model, items, **options)
        if not torch.equal(after, before):
            raise RuntimeError("the reference's log-probs changed with the first step: its weights are being trained")


class _Stop:
    signal = None


@contextlib.contextmanager
def _signals():
    """Turn SIGTERM and SIGINT into a request to stop after the running step, with a checkpoint."""
    stop = _Stop()

    def request(number, _frame):
        if stop.signal:
            raise KeyboardInterrupt("stopped at once, without a checkpoint of the running step")
        stop.signal = signal.Signals(number).name

    try:
        old = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread: leave signals to whoever owns them
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# --- from a shell -----------------------------------------------------------------------------------------------------


def training_data(stage: str, profile: Profile):
    """(train, held out) of the profile's demonstrations or preferences; the split is by prompt."""
    if stage == "sft":
        rows = load_demonstrations(profile.sft_dataset, revision=profile.sft_dataset_revision)
        return rows, None
    if profile.dataset == "tiny":
        return load_preferences("tiny"), load_preferences("tiny", split="test")
    pairs = load_preferences(profile.dataset, revision=profile.dataset_revision)
    if profile.max_prompts and len(pairs) > profile.max_prompts:
        pairs = pairs.shuffle(seed=0).select(range(profile.max_prompts))
    return split_by_prompt(pairs, profile.held_out)


def main(argv=None) -> None:
    """The command line; the same under `accelerate launch` and `torchrun`."""
    parser = argparse.ArgumentParser(prog="python -m dpo_utils.train", description="Train an adapter: SFT or DPO.")
    parser.add_argument("stage", choices=["sft", "dpo"])
    parser.add_argument("--profile", default=None, help="tiny, smollm2 or phi2")
    parser.add_argument("--output", required=True, help="folder for history.jsonl, adapter/ and checkpoints")
    parser.add_argument(
        "--adapter", help="directory of the adapter to start from (for DPO: the SFT adapter, the reference)"
    )
    parser.add_argument("--data", help="preferences or demonstrations: a local file or a hub id")
    for name, kind in {
        "steps": int,
        "batch": int,
        "beta": float,
        "learning-rate": float,
        "seed": int,
        "loss": str,
    }.items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--tracker", help="tensorboard, wandb or trackio")
    parser.add_argument("--fresh", action="store_true", help="delete what is in the output folder and start over")
    args = parser.parse_args(argv)

    prefix = "sft_" if args.stage == "sft" else ""
    changes = {prefix + "dataset": args.data, prefix + "steps": args.steps, prefix + "batch": args.batch}
    changes |= {prefix + "learning_rate": args.learning_rate, "beta": args.beta, "seed": args.seed, "loss": args.loss}
    if args.data:
        changes[prefix + "dataset_revision"] = None
    profile = load_profile(args.profile, **{k: v for k, v in changes.items() if v is not None})
    train, _ = training_data(args.stage, profile)  # bad data stops here, before any model is loaded
    accelerator = Accelerator(cpu=make_plan(profile).device == "cpu")
    accelerator.print(describe(profile), make_plan(profile), f"reference: {args.adapter or 'the base model'}", sep="\n")
    model, tokenizer = load_policy(profile, adapter=args.adapter)
    run = train_sft if args.stage == "sft" else train_dpo
    history = run(model, tokenizer, train, profile, args.output, fresh=args.fresh, tracker=args.tracker)
    accelerator.print(
        f"{len(history)} steps, last loss {history[-1].get('loss', math.nan):.4f}; adapter in {args.output}/adapter"
    )
    leave(accelerator)


def leave(accelerator) -> None:
    """End a run of several processes together, so that none waits for another that is gone."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
