"""Two checks around the first step, for what would otherwise be learnt silently wrong."""

from dataclasses import dataclass

import torch

from dpo_utils.logps import TOLERANCE, all_logps
from dpo_utils.models import as_reference, check_adapter


@dataclass(frozen=True)
class Start:
    """What is remembered of the model before its first step."""

    items: list
    reference: torch.Tensor  # (items, completions) log-probs
    lora_b: dict[str, torch.Tensor]


def lora_b(model) -> dict[str, torch.Tensor]:
    """The second matrices of the policy's adapter, by name: zero in a fresh one."""
    return {name: p for name, p in model.named_parameters() if "lora_B.default" in name}


def before_first_step(model, task, numbers, profile, options) -> Start:
    """The adapter is sound, and policy, reference and cached reference agree on a few items: else raise.

    numbers: item numbers to look at. For a fresh adapter equal log-probs mean margins of exactly 0 and a DPO loss of
    ln 2. Raises RuntimeError, or FloatingPointError, naming the likely causes.
    """
    check_adapter(model, profile)
    items = [task.items[i] for i in numbers]
    with as_reference(model):
        reference = all_logps(model, items, **options)
    policy = all_logps(model, items, **options)
    if not torch.isfinite(reference).all():
        raise FloatingPointError(
            "the reference's log-probs are not finite before the first step. Likely cause: attention scores overflow "
            "in float16; make_plan chooses sdpa_float32 for that."
        )
    if not torch.equal(policy, reference):
        raise RuntimeError(
            f"policy and reference differ by {(policy - reference).abs().max():.3g} nats before the first step, so the "
            "DPO loss would not start at ln 2. Likely causes: dropout is on, the reference is not the model training "
            "starts from (base instead of SFT), or the adapter was trained already: load a fresh policy."
        )
    if task.reference is not None:
        _compare_cached(task.reference[numbers], reference, model.dtype)
    return Start(items, reference, {name: p.detach().clone() for name, p in lora_b(model).items()})


def _compare_cached(cached, reference, dtype) -> None:
    gap = (cached - reference).abs()
    if (gap > TOLERANCE.get(dtype, 2e-2) * (1 + reference.abs())).any():
        raise RuntimeError(
            f"the reference's log-probs are off by {gap.max():.3g} nats from those the model gives now. Likely causes: "
            "dropout was on when they were computed, or they belong to another model: fresh=True computes them again."
        )


def after_first_step(model, start: Start, grad_norm: float, options) -> None:
    """Every adapter moved and the reference stayed, to the bit: else raise RuntimeError naming the likely causes."""
    if not grad_norm > 0:
        raise RuntimeError(
            "the first gradient is zero, so the loss would stay where it is. Likely causes: the adapter was loaded "
            "frozen, gradient checkpointing without input gradients, or chosen and rejected are the same in every pair."
        )
    still = [name for name, p in lora_b(model).items() if torch.equal(p, start.lora_b[name])]
    if still:
        raise RuntimeError(
            f"{len(still)} of {len(start.lora_b)} adapter matrices did not move in the first step, among them "
            f"{still[0]}. Likely causes: they are frozen, or their layer does not reach the loss."
        )
    with as_reference(model):
        now = all_logps(model, start.items, **options)
    if not torch.equal(now, start.reference):
        raise RuntimeError(
            f"the reference's log-probs changed by {(now - start.reference).abs().max():.3g} nats with the first step. "
            "Likely causes: weights outside the adapter are trained, or reference and policy share their adapter."
        )
