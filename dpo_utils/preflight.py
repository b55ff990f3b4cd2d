"""Checks around the first step and after each, for what would be learnt silently wrong."""

import torch

from dpo_utils.adapters import check_adapter
from dpo_utils.logps import all_logps
from dpo_utils.models import as_reference, tolerance

PATIENCE = 3  # steps in a row that are not finite before a run stops


def _lora_b(model) -> dict[str, torch.Tensor]:
    """Copies of the second matrices of the policy's adapter, by name: zero in a fresh one."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if "lora_B.default" in name}


def before_first_step(run):
    """The adapter is sound, and policy, reference and cached reference agree on two items.

    For a fresh adapter that means margins of exactly 0 and a DPO loss of ln 2. Returns what
    `after_first_step` compares with. Raises RuntimeError or FloatingPointError with likely causes.
    """
    check_adapter(run.model, run.profile)
    items, cached = run.task.items[:2], run.task.reference
    with as_reference(run.model):
        reference = all_logps(run.model, items, **run.options)
    policy = all_logps(run.model, items, **run.options)
    if not torch.isfinite(reference).all():
        raise FloatingPointError(
            "the reference's log-probs are not finite before the first step. Likely cause: "
            "attention scores overflow in float16; make_plan chooses sdpa_float32 for that."
        )
    if not torch.equal(policy, reference):
        raise RuntimeError(
            f"policy and reference differ by {(policy - reference).abs().max():.3g} nats before "
            "the first step, so the DPO loss would not start at ln 2. Likely causes: dropout is "
            "on, the reference is not the model that training starts from (base instead of SFT), "
            "or the adapter was trained already: load a fresh policy."
        )
    gap = torch.zeros(1) if cached is None else (cached[:2] - reference).abs()
    if (gap > tolerance(run.model.dtype) * (1 + reference.abs())).any():
        raise RuntimeError(
            f"the reference's log-probs are off by {gap.max():.3g} nats from those that the model "
            "gives now. Likely causes: dropout was on when they were computed, or they belong to "
            "another model: fresh=True computes them again."
        )
    return items, reference, run.options.copy(), _lora_b(run.model)


def after_first_step(run, start, grad_norm: float) -> None:
    """Every adapter moved, and the reference did not: else RuntimeError with the likely causes."""
    items, reference, options, before = start  # memory may have run out since: other batches
    if not grad_norm > 0:
        raise RuntimeError(
            "the first gradient is zero, so the loss would not move. Likely causes: the adapter "
            "was loaded frozen, gradient checkpointing without input gradients, or chosen and "
            "rejected are the same in every pair."
        )
    now = _lora_b(run.model)
    if still := [name for name in before if torch.equal(before[name], now[name])]:
        raise RuntimeError(
            f"{len(still)} of {len(before)} adapter matrices did not move in the first step, among "
            f"them {still[0]}. Likely causes: they are frozen, or do not reach the loss."
        )
    with as_reference(run.model):
        moved = (all_logps(run.model, items, **options) - reference).abs().max()
    if not moved == 0:
        raise RuntimeError(
            f"the reference's log-probs changed by {moved:.3g} nats with the first step. Likely "
            "causes: weights outside the adapter are trained, or it shares the policy's adapter."
        )


def after_every_step(run, numbers: list[int]) -> None:
    """Stop a run whose last steps were not finite: FloatingPointError with the rows of the last."""
    last = run.history[-PATIENCE:]
    if len(last) == PATIENCE and all(row.get("nonfinite") for row in last):
        rows = sorted(run.task.rows[i] for i in numbers)
        raise FloatingPointError(
            f"the loss or its gradient was NaN or infinite {PATIENCE} steps in a row, last at step "
            f"{len(run.history)} on data rows {rows}. They changed no parameter. Lower the "
            "learning rate, or look at these rows."
        )
