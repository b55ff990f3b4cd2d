"""One optimiser step: which items, at which rate, with which gradient, on one process or many."""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from dpo_utils.logps import completion_logps
from dpo_utils.models import trainable
from dpo_utils.profiles import Profile


@dataclass(frozen=True)
class Task:
    """What is trained: items, the loss of each, and how much each counts in a step."""

    stage: str  # sft, dpo or kto
    items: list  # (prompt_ids, completions), all with the same number of completions
    rows: list[int]  # 1-based row of each item in the data, for messages
    objective: object  # (log-probs (n, completions), item numbers) -> (losses (n,), {metric: (n,)})
    weight: object  # item number -> how much it counts: 1 a pair in DPO, its tokens in SFT
    reference: torch.Tensor | None  # (items, completions) log-probs the objective reads, if any
    steps: int
    batch: int
    learning_rate: float


@dataclass
class Run:
    """A task under way."""

    model: object
    task: Task
    profile: Profile
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    options: dict  # arguments of completion_logps; micro_tokens shrinks when memory runs out
    scale: float  # of the loss, for float16 gradients
    folder: Path | None
    key: dict
    keep: int
    history: list[dict]

    @property
    def writes(self) -> bool:
        """Whether this process writes files."""
        return self.folder is not None and self.accelerator.is_main_process

    def numbers(self, step: int) -> list[int]:
        """Item numbers of a step."""
        return step_items(step, len(self.task.items), self.task.batch, self.profile.seed)


# --- the schedule -----------------------------------------------------------------------------------------------------


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


# --- one step ---------------------------------------------------------------------------------------------------------


def take_step(run: Run, step: int) -> dict:
    """One optimiser step in place; returns its row. Nothing is changed where the loss or a gradient is not finite."""
    start, task = time.perf_counter(), run.task
    rate = learning_rate_at(step, task.steps, task.learning_rate, run.profile.warmup)
    row = {"step": step, "epoch": round(step * task.batch / len(task.items), 4), "learning_rate": rate}
    means = _gradients(run, run.numbers(step))
    norm = float(torch.nn.utils.clip_grad_norm_(trainable(run.model), run.profile.max_grad_norm))
    if math.isfinite(means["loss"]) and math.isfinite(norm):
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        row |= {**means, "grad_norm": norm}
    else:
        row["nonfinite"] = True
    run.optimizer.zero_grad(set_to_none=True)
    return row | {"seconds": round(time.perf_counter() - start, 4)}


def _gradients(run: Run, numbers: list[int]) -> dict:
    """Gradient of the step's loss, every item weighed the same however it is cut into micro-batches or processes.

    Where memory runs out at one size, half the size is tried: the gradient is the same. Returns the step's means.
    """
    accelerator, options = run.accelerator, run.options
    mine = numbers[accelerator.process_index :: accelerator.num_processes]
    total_weight = sum(run.task.weight(i) for i in numbers)
    while (sums := _try_to_accumulate(run, mine, total_weight)) is None:
        for parameter in trainable(run.model):
            parameter.grad = None
        clear_device_cache(garbage_collection=True)
        options["micro_tokens"] //= 2
        options["row_tokens"] = min(options["row_tokens"], options["micro_tokens"])
        print(f"out of memory: micro_tokens is now {options['micro_tokens']}; the gradient stays the same")
    _sum_over_processes(trainable(run.model), accelerator, run.scale)
    return _means(sums, len(numbers), accelerator)


def _try_to_accumulate(run: Run, numbers, total_weight) -> dict | None:
    """`_accumulate`, or None where memory ran out and a smaller micro-batch can be tried."""
    try:
        return _accumulate(run, numbers, total_weight)
    except RuntimeError as problem:
        if not should_reduce_batch_size(problem) or run.options["micro_tokens"] <= 1:
            raise
        return None


def _accumulate(run: Run, numbers, total_weight) -> dict:
    """Backward through one process's share of the step; returns its part of the loss and sums of metrics."""
    sums, items = {}, [run.task.items[i] for i in numbers]
    for places, logps in completion_logps(run.model, items, **run.options) if items else ():
        chosen = [numbers[p] for p in places]
        losses, metrics = run.task.objective(logps, chosen)
        weights = losses.new_tensor([run.task.weight(i) for i in chosen])
        loss = (losses * weights).sum() / total_weight
        (loss * run.scale).backward()
        for name, value in {"loss": loss.detach(), **{n: v.sum() for n, v in metrics.items()}}.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _sum_over_processes(parameters, accelerator, scale: float) -> None:
    """Gradients in place: added up over the processes in one message, and without the loss scale."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    if accelerator.num_processes > 1:
        total = accelerator.reduce(torch.cat([g.flatten() for g in grads]), reduction="sum")
        grads = [part.view_as(g) for part, g in zip(total.split([g.numel() for g in grads]), grads, strict=True)]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad / scale


def _means(sums: dict, count: int, accelerator) -> dict:
    """The step's loss and the means of its metrics, over all processes."""
    names = sorted(sums)
    if accelerator.num_processes > 1:
        holder = [names]
        broadcast_object_list(holder)  # a process without items has no metrics of its own
        names = holder[0]
        values = torch.tensor([sums.get(n, 0.0) for n in names], dtype=torch.float64, device=accelerator.device)
        sums = dict(zip(names, accelerator.reduce(values, reduction="sum").tolist(), strict=True))
    return {name: sums[name] / (1 if name == "loss" else count) for name in names}
