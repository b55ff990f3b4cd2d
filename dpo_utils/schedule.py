"""Which items a step trains on, and at which learning rate: functions of the step's number
alone.
"""

import math

import torch
from transformers import get_cosine_schedule_with_warmup


def step_items(step: int, count: int, batch: int, seed: int) -> list[int]:
    """Item numbers of a step (from 1): seeded permutations, one an epoch, read batch by batch."""
    places, orders = range((step - 1) * batch, step * batch), {}
    for epoch in {place // count for place in places}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(count, generator=generator).tolist()
    return [orders[place // count][place % count] for place in places]


def learning_rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first share of the steps, then a cosine; `step` counts from 1.

    Transformers' schedule, moved by a step so that neither the first nor the last has a rate of 0.
    """
    unused = torch.optim.SGD([torch.zeros(1)], lr=peak)
    schedule = get_cosine_schedule_with_warmup(unused, math.ceil(warmup * steps), steps + 1)
    return peak * schedule.lr_lambdas[0](step)
