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

    Transformers' schedule, but for the warm-up, which is a step ahead: no step has a rate of zero.
    """
    warm, unused = math.ceil(warmup * steps), torch.optim.SGD([torch.zeros(1)], lr=peak)
    rate = get_cosine_schedule_with_warmup(unused, warm, steps).lr_lambdas[0]
    return peak * rate(step if step <= warm else step - 1)
