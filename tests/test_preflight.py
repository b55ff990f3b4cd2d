"""What is noticed before and after the first step, each with the likely cause in its message."""

from unittest.mock import Mock

import pytest
import torch
from small_runs import demonstrations, dpo, pairs, policy, profile, sft

from dpo_utils import preflight, train
from dpo_utils.models import trainable
from dpo_utils.train import train_dpo, train_sft


@pytest.fixture(autouse=True)
def nothing_scored(monkeypatch):
    """No reference log-probs from another test."""
    monkeypatch.setattr("dpo_utils.reference._SCORED", {})


def refuses(message, model, tokenizer, error=RuntimeError):
    with pytest.raises(error, match=message):
        train_dpo(model, tokenizer, pairs(), profile(steps=2))


def test_dropout_is_noticed():
    model, tokenizer = policy()
    next(m for m in model.modules() if isinstance(m, torch.nn.Dropout)).p = 0.3
    message = "policy and reference differ by .* nats before the first step.*dropout is on"
    refuses(message, model.train(), tokenizer)


def test_an_adapter_that_was_trained_already_is_noticed():
    model, tokenizer = policy()
    train_dpo(model, tokenizer, pairs(), profile(steps=1))
    refuses("the adapter was trained already", model, tokenizer)


def test_the_base_as_reference_of_a_run_that_starts_from_sft_is_noticed(tmp_path):
    sft(tmp_path)
    model, tokenizer = policy(adapter=tmp_path / "adapter")
    model.delete_adapter("reference")
    refuses("base instead of SFT", model, tokenizer)


def test_a_cached_reference_that_belongs_to_something_else_is_noticed(monkeypatch):
    model, tokenizer = policy()
    real = train.reference_logps
    monkeypatch.setattr(train, "reference_logps", lambda *args, **how: real(*args, **how) + 0.1)
    refuses("log-probs are off by 0.1 nats", model, tokenizer)


@pytest.mark.parametrize("run, data", [(train_dpo, pairs), (train_sft, demonstrations)])
def test_a_frozen_adapter_is_noticed(monkeypatch, run, data):
    model, tokenizer = policy()
    monkeypatch.setattr(
        train, "reference_logps", lambda *_, **__: torch.zeros(10, 2)
    )  # it would thaw it
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        run(model, tokenizer, data(), profile())


def test_weights_outside_the_adapter_that_train_are_noticed():
    model, tokenizer = policy()
    next(p for n, p in model.named_parameters() if "layernorm" in n).requires_grad_(True)
    refuses("layernorm.* is trainable", model, tokenizer, error=ValueError)


def test_adapters_in_half_precision_are_noticed():
    model, tokenizer = policy()
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.data = weight.data.half()
    refuses("is trainable as torch.float16", model, tokenizer, error=ValueError)


def test_a_matrix_that_does_not_move_is_noticed():
    model, tokenizer = policy()
    weight = next(p for n, p in model.named_parameters() if "lora_B" in n)
    weight.register_hook(torch.zeros_like)
    refuses("1 of 24 adapter matrices did not move", model, tokenizer)


def test_a_zero_gradient_is_noticed():
    model, tokenizer = policy()
    for weight in trainable(model):
        weight.register_hook(torch.zeros_like)
    refuses("the first gradient is zero.*frozen.*input gradients", model, tokenizer)


def test_a_reference_that_moves_is_noticed(monkeypatch):
    model, tokenizer = policy()
    real = train.take_step

    def also_moves_the_base(run, *rest):
        row = real(run, *rest)
        next(p for n, p in run.model.named_parameters() if "layernorm.bias" in n).data += 1e-3
        return row

    monkeypatch.setattr(train, "take_step", also_moves_the_base)
    refuses("reference's log-probs changed by .* with the first step", model, tokenizer)


def test_a_reference_that_is_not_finite_is_noticed(monkeypatch):
    model, tokenizer = policy()
    monkeypatch.setattr(train, "reference_logps", lambda *_, **__: torch.zeros(10, 2))
    bias = next(p for n, p in model.named_parameters() if "layernorm.bias" in n)
    bias.data += float("inf")
    message = "not finite before the first step.*float16"
    refuses(message, model, tokenizer, error=FloatingPointError)


def test_a_first_step_that_is_not_finite_leaves_the_check_to_the_next(monkeypatch):
    real, steps = train._backward, []

    def poisoned(*arguments):
        steps.append(1)
        return real(*arguments) | ({"loss": float("nan")} if len(steps) == 1 else {})

    monkeypatch.setattr(train, "_backward", poisoned)
    checked = Mock(wraps=preflight.after_first_step)
    monkeypatch.setattr(preflight, "after_first_step", checked)
    history, _ = dpo()
    assert history[0]["nonfinite"] and checked.call_count == 1
    assert checked.call_args.args[2] == history[1]["grad_norm"]
