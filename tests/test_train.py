"""What training computes, what it refuses, and what it does when a step goes wrong."""

import dataclasses
import math
import shutil

import pytest
import torch
from accelerate.tracking import GeneralTracker
from small_runs import demonstrations, dpo, numbers, pairs, policy, profile, sft

from dpo_utils import fit, step, train
from dpo_utils.checkpoints import SettingsChanged
from dpo_utils.logps import all_logps
from dpo_utils.losses import LOSSES, dpo_loss
from dpo_utils.models import as_reference, trainable
from dpo_utils.train import (
    learning_rate_at,
    options_for,
    read_history,
    reference_logps,
    step_items,
    train_dpo,
    train_sft,
)

LN_2 = math.log(2)
TRL_NAMES = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
    "logps/rejected", "grad_norm", "learning_rate",
}  # fmt: skip


def items(settings, tokenizer, n=10):
    rows, _ = train.tokenize_all(pairs(n), tokenizer, settings.max_length, train.tokenize_pair)
    return [train.as_item(row) for row in rows]


# --- what a run gives -------------------------------------------------------------------------------------------------


def test_a_dpo_run_starts_at_ln_2_and_learns(tmp_path):
    seen = []
    history, _ = dpo(tmp_path, profile(steps=12), on_step=lambda rows: seen.append(len(rows)))
    assert all(TRL_NAMES <= set(row) for row in history)
    assert abs(history[0]["loss"] - LN_2) < 1e-6 and abs(history[0]["rewards/margins"]) < 1e-6
    assert history[0]["rewards/accuracies"] == 0.5  # all are ties
    assert history[-1]["loss"] < 0.6 and history[-1]["rewards/margins"] > 0.1
    assert read_history(tmp_path) == history and len(history) == 12
    assert seen == list(range(1, 13))
    for row in history:
        assert row["rewards/margins"] == pytest.approx(row["rewards/chosen"] - row["rewards/rejected"], abs=1e-6)


def test_before_the_first_step_the_loss_is_ln_2_and_margins_are_zero_to_the_bit():
    model, tokenizer = policy()
    options = options_for(profile(), tokenizer)
    values = all_logps(model, items(profile(), tokenizer), **options)
    with as_reference(model):
        reference = all_logps(model, items(profile(), tokenizer), **options)
    losses, chosen, rejected = dpo_loss(*values.T, *reference.T)
    assert losses.dtype == torch.float32 and (losses == torch.tensor(LN_2)).all()
    assert (chosen - rejected == 0).all()


def test_an_sft_loss_is_the_mean_over_the_tokens_of_the_step():
    history, _ = sft()
    model, tokenizer = policy()
    rows, _ = train.tokenize_all(demonstrations(), tokenizer, 128, train.tokenize_demonstration)
    first = [train.as_item(rows[i]) for i in step_items(1, len(rows), 4, 0)]
    logps = all_logps(model, first, **options_for(profile(), tokenizer))
    assert history[0]["loss"] == pytest.approx(-float(logps.sum()) / sum(len(c[0]) for _, c in first), rel=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_trains(name):
    history, _ = dpo(None, profile(steps=3), loss=name, plain=True)
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in history)
    assert history[2]["loss"] < history[0]["loss"]


def test_options_of_a_loss_reach_it():
    runs = [dpo(None, profile(steps=1), loss="simpo", loss_options={"gamma": gamma})[0] for gamma in (0.0, 9.0)]
    assert runs[1][0]["loss"] > runs[0][0]["loss"] + 5


def test_dropped_rows_are_counted_aloud(capsys):
    data = [*pairs(), {"prompt": "Why?", "chosen": "same", "rejected": "same"}]
    dpo(None, profile(steps=1), data)
    assert "10 rows kept, 1 dropped: 1 x chosen and rejected are the same tokens" in capsys.readouterr().out


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_every_item_comes_once_an_epoch_in_a_new_seeded_order():
    order = [i for step in range(1, 11) for i in step_items(step, 10, 4, seed=3)]
    epochs = [order[n : n + 10] for n in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert step_items(1, 10, 4, seed=4) != order[:4]
    assert len(step_items(1, 3, 8, seed=0)) == 8  # a step may be longer than an epoch


def test_warm_up_and_cosine_by_hand():
    rates = [learning_rate_at(step, 10, 1.0, 0.2) for step in range(1, 11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)  # half way down the cosine of 8 steps
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))
    assert learning_rate_at(1, 10, 1.0, 0.0) == 1.0


# --- numbers that do not depend on the batch --------------------------------------------------------------------------


def one_step(micro_tokens, order=None, row_tokens=1, plain=False):
    """Gradient and metrics of one step on six pairs, of an adapter that is not zero."""
    settings = profile(batch=6, steps=1, micro_tokens=micro_tokens, row_tokens=row_tokens)
    model, tokenizer = policy(settings)
    generator = torch.Generator().manual_seed(0)
    data = items(settings, tokenizer, 6)
    reference = reference_logps(model, tokenizer, data, settings)
    for parameter in trainable(model):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    objective = train.preference_objective(data, reference, settings)
    task = step.Task("dpo", data, [], objective, lambda _: 1, reference, 1, 6, 1e-3)
    options = {**options_for(settings, tokenizer), "plain": plain}
    run = step.Run(model, task, settings, fit.engine(model), None, options, 1.0, None, {}, 2, [])
    means = step._gradients(run, order or list(range(6)))
    return torch.cat([p.grad.flatten() for p in trainable(model)]), means


@pytest.fixture(scope="module")
def whole():
    """One micro-batch of six."""
    return one_step(10_000)


@pytest.mark.parametrize("sizes", [[6], [4, 2], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("plain", [False, True])
def test_micro_batches_leave_gradient_and_metrics_the_same(monkeypatch, whole, sizes, plain):
    def plan(data, *_):
        numbers = iter(range(len(data)))
        return [[[next(numbers)] for _ in range(size)] for size in sizes]

    monkeypatch.setattr("dpo_utils.logps.plan_rows", plan)
    same(one_step(10_000, plain=plain), whole)


@pytest.mark.parametrize("change", [{"order": [3, 0, 5, 1, 4, 2]}, {"row_tokens": 512}, {"micro_tokens": 60}])
def test_order_and_packing_leave_gradient_and_metrics_the_same(whole, change):
    same(one_step(**{"micro_tokens": 10_000, **change}), whole)


def same(found, wanted):
    (gradient, means), (expected, expected_means) = found, wanted
    assert (gradient - expected).norm() <= 1e-5 * expected.norm() > 0
    assert means == {name: pytest.approx(value, rel=1e-4, abs=1e-5) for name, value in expected_means.items()}


# --- checks before and after the first step ---------------------------------------------------------------------------


def refuses(message, model, tokenizer, settings=None, error=RuntimeError, **options):
    with pytest.raises(error, match=message):
        train_dpo(model, tokenizer, pairs(), settings or profile(steps=2), **options)


def test_dropout_is_noticed_before_the_first_step():
    model, tokenizer = policy()
    next(m for m in model.modules() if isinstance(m, torch.nn.Dropout)).p = 0.3
    refuses("policy and reference differ by .* nats before the first step.*dropout is on", model.train(), tokenizer)


def test_an_adapter_that_was_trained_already_is_noticed():
    model, tokenizer = policy()
    train_dpo(model, tokenizer, pairs(), profile(steps=1))
    refuses("the adapter was trained already", model, tokenizer)


def test_the_base_as_reference_of_a_run_that_starts_from_sft_is_noticed(tmp_path):
    sft(tmp_path)
    model, tokenizer = policy(adapter=tmp_path / "adapter")
    model.delete_adapter("reference")
    refuses("base instead of SFT", model, tokenizer)


def test_a_cache_that_belongs_to_something_else_is_noticed(monkeypatch):
    model, tokenizer = policy()
    real = train.reference_logps
    monkeypatch.setattr(train, "reference_logps", lambda *args: real(*args) + 0.1)
    refuses("log-probs are off by 0.1 nats", model, tokenizer)


@pytest.mark.parametrize("run, data", [(train_dpo, pairs), (train_sft, demonstrations)])
def test_a_frozen_adapter_is_noticed(monkeypatch, run, data):
    model, tokenizer = policy()
    monkeypatch.setattr(train, "reference_logps", lambda *_: torch.zeros(10, 2))  # as_reference would thaw it
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="nothing is trainable"):
        run(model, tokenizer, data(), profile())


def test_weights_outside_the_adapter_that_train_are_noticed():
    model, tokenizer = policy()
    next(p for n, p in model.named_parameters() if "layernorm" in n).requires_grad_(True)
    refuses("layernorm.* is trainable", model, tokenizer, error=ValueError)


def test_adapters_in_half_precision_are_noticed():
    model, tokenizer = policy()
    next(p for n, p in model.named_parameters() if "lora_B" in n).data = torch.zeros(384, 16, dtype=torch.float16)
    refuses("is trainable as torch.float16", model, tokenizer, error=ValueError)


def test_a_matrix_that_does_not_move_is_noticed(monkeypatch):
    model, tokenizer = policy()
    frozen = next(p for n, p in model.named_parameters() if "lora_B" in n)
    frozen.register_hook(torch.zeros_like)
    refuses("1 of 24 adapter matrices did not move", model, tokenizer)


def test_a_zero_gradient_is_noticed(monkeypatch):
    model, tokenizer = policy()
    for parameter in trainable(model):
        parameter.register_hook(torch.zeros_like)
    refuses("the first gradient is zero.*frozen.*input gradients", model, tokenizer)


def test_a_reference_that_moves_is_noticed(monkeypatch):
    model, tokenizer = policy()
    real = fit.take_step

    def also_moves_the_base(run, number):
        row = real(run, number)
        next(p for n, p in run.model.named_parameters() if "layernorm.bias" in n).data += 1e-3
        return row

    monkeypatch.setattr(fit, "take_step", also_moves_the_base)
    refuses("reference's log-probs changed by .* with the first step", model, tokenizer)


def test_a_reference_that_is_not_finite_is_noticed(monkeypatch):
    model, tokenizer = policy()
    monkeypatch.setattr(train, "reference_logps", lambda *_: torch.zeros(10, 2))
    next(p for n, p in model.named_parameters() if "layernorm.bias" in n).data += float("inf")
    refuses("not finite before the first step.*float16", model, tokenizer, error=FloatingPointError)


# --- steps that go wrong ----------------------------------------------------------------------------------------------


def poison(monkeypatch, steps, value=float("nan"), where="loss"):
    """Make the loss, or one gradient, of some steps not finite."""
    real, seen = step._accumulate, []

    def poisoned(run, numbers, total):
        seen.append(1)
        sums = real(run, numbers, total)
        if len(seen) in steps:
            if where == "loss":
                sums["loss"] = value
            else:
                trainable(run.model)[5].grad[0, 0] = value
        return sums

    monkeypatch.setattr(step, "_accumulate", poisoned)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_logged(monkeypatch, tmp_path, value, where):
    poison(monkeypatch, {2, 3, 5}, value, where)
    weights = []
    model, tokenizer = policy()

    def remember(history):
        weights.append(torch.cat([p.detach().flatten() for p in trainable(model)]))

    history = train_dpo(model, tokenizer, pairs(), profile(), tmp_path, on_step=remember)
    assert [row["step"] for row in history if row.get("nonfinite")] == [2, 3, 5]
    assert not {"loss", "grad_norm"} & set(history[1])
    for n in range(1, 7):
        assert torch.equal(weights[n], weights[n - 1]) == (n + 1 in {2, 3, 5})
    assert torch.isfinite(weights[-1]).all() and "NaN" not in (tmp_path / "history.jsonl").read_text()


def test_the_third_in_a_row_stops_the_run_and_names_the_rows(monkeypatch, tmp_path):
    poison(monkeypatch, {3, 4, 5})
    with pytest.raises(FloatingPointError, match="3 steps in a row, last at step 5 on data rows") as problem:
        dpo(tmp_path)
    rows = sorted(i + 1 for i in step_items(5, 10, 4, 0))
    assert f"data rows {rows}" in str(problem.value)
    assert [row["step"] for row in read_history(tmp_path)] == [1, 2, 3, 4, 5]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_first_step_that_is_not_finite_does_not_skip_the_check_after_it(monkeypatch):
    poison(monkeypatch, {1})
    looked = []
    real = fit.after_first_step
    monkeypatch.setattr(fit, "after_first_step", lambda *a: (looked.append(1), real(*a))[1])
    history, _ = dpo()
    assert history[0]["nonfinite"] and looked == [1]


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_gradient(monkeypatch, capsys):
    settings = profile(micro_tokens=128, row_tokens=1)
    expected, _ = dpo(None, settings)
    real = step.completion_logps

    def greedy(model, data, *, micro_tokens, **options):
        for n, part in enumerate(real(model, data, micro_tokens=micro_tokens, **options)):
            if micro_tokens > 64 and n == 1:  # the first micro-batch has left its gradient
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield part

    monkeypatch.setattr(step, "completion_logps", greedy)
    history, _ = dpo(None, settings)
    assert "out of memory: micro_tokens is now 64;" in capsys.readouterr().out
    for row, wanted in zip(history, expected, strict=True):
        assert row["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)


def test_out_of_memory_at_the_smallest_size_is_an_error(monkeypatch):
    def never(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(step, "completion_logps", never)
    with pytest.raises(torch.OutOfMemoryError):
        dpo(None, profile(micro_tokens=8))


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(step, "completion_logps", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        dpo()


def test_a_scaled_loss_gives_the_same_step(monkeypatch):
    expected, weights = dpo(None, profile(steps=2))
    real = fit.make_plan
    monkeypatch.setattr(fit, "make_plan", lambda *a: dataclasses.replace(real(*a), loss_scale=1024.0))
    history, scaled = dpo(None, profile(steps=2))
    assert history[1]["loss"] == pytest.approx(expected[1]["loss"], rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(expected[0]["grad_norm"], rel=1e-5)


# --- run again --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", [dpo, sft])
def test_a_finished_run_is_loaded_not_repeated(tmp_path, monkeypatch, capsys, run):
    history, weights = run(tmp_path)
    monkeypatch.setattr(fit, "take_step", None)
    again, same_weights = run(tmp_path)
    assert again == history and all(torch.equal(a, b) for a, b in zip(weights, same_weights, strict=True))
    assert "this run is finished" in capsys.readouterr().out


def test_an_adapter_that_was_lost_is_written_again(tmp_path):
    dpo(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    dpo(tmp_path)
    assert path.read_bytes() == whole and not (tmp_path / "adapter.tmp").exists()


def test_fresh_starts_over_and_deletes_only_what_a_run_writes(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    history, _ = dpo(tmp_path)
    steps = []
    again, _ = dpo(tmp_path, fresh=True, on_step=lambda rows: steps.append(len(rows)))
    assert numbers(again) == numbers(history) and steps == [1, 2, 3, 4, 5, 6, 7]
    assert (tmp_path / "thesis.txt").read_text() == "mine"


OTHER_PAIRS = [{**row, "chosen": row["chosen"].replace(".", "!")} for row in pairs()]
CHANGES = {
    "beta": ({"beta": 0.3}, None, "beta: was 0.1, is 0.3"),
    "seed": ({"seed": 1}, None, "seed: was 0, is 1"),
    "learning rate": ({"learning_rate": 2e-3}, None, "learning_rate: was 0.001, is 0.002"),
    "steps": ({"steps": 9}, None, "steps: was 7, is 9"),
    "loss": ({"loss": "ipo"}, None, "loss: was 'dpo', is 'ipo'"),
    "rank": ({"lora_r": 8}, None, "lora_r: was 16, is 8"),
    "quantisation": ({"quantize": False}, None, "quantised: was True, is False"),
    "revision": ({"revision": "a" * 40}, None, f"revision: was None, is '{'a' * 40}'"),
    "data": ({}, OTHER_PAIRS, "data: was '[0-9a-f]{16}', is '[0-9a-f]{16}'"),
    "length": ({"max_length": 64}, None, "max_length: was 128, is 64"),
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished")
    dpo(folder)
    return folder


@pytest.mark.parametrize("change", CHANGES)
def test_changed_settings_refuse_and_print_the_difference(finished, change):
    settings, data, line = CHANGES[change]
    before = (finished / "history.jsonl").read_bytes()
    with pytest.raises(SettingsChanged, match=rf"made with other settings; pass fresh=True[\s\S]*\n  {line}"):
        dpo(finished, profile(**settings), data)
    assert (finished / "history.jsonl").read_bytes() == before


def changed_weight(model, tokenizer):
    next(p for n, p in model.named_parameters() if "layernorm.weight" in n).data[1] *= 1.01


def changed_scales(model, tokenizer):
    next(p for p in model.parameters() if hasattr(p, "quant_state")).quant_state.absmax[1] += 1


def changed_template(model, tokenizer):
    tokenizer.chat_template += "{# another #}"


def changed_vocabulary(model, tokenizer):
    tokenizer.add_tokens(["zyzzyva"])


@pytest.mark.parametrize("cached", [False, True], ids=["run", "cached reference"])
@pytest.mark.parametrize(
    "change, line",
    [(changed_weight, "weights"), (changed_scales, "weights"), (changed_template, "template"), (changed_vocabulary, "tokenizer")],
)
def test_another_model_tokenizer_or_template_refuses(finished, monkeypatch, change, line, cached):
    model, tokenizer = policy()
    change(model, tokenizer)
    if not cached:
        monkeypatch.setattr(train, "load_cache", lambda *_: None)
        monkeypatch.setattr(train, "save_cache", lambda *_: None)
    with pytest.raises(SettingsChanged, match=f"\n  {line}: was") as problem:
        train_dpo(model, tokenizer, pairs(), profile(), finished)
    assert ("reference.safetensors was made" in str(problem.value)) == cached


def test_another_model_directory_refuses(finished, tmp_path):
    copy = shutil.copytree(profile().model, tmp_path / "copy")
    with pytest.raises(SettingsChanged, match="\n  model: was"):
        dpo(finished, profile(model=str(copy)))


def test_sft_does_not_mind_settings_of_dpo(tmp_path):
    sft(tmp_path)
    sft(tmp_path, profile(beta=0.5, loss="ipo"))


def test_the_reference_is_computed_once(finished, monkeypatch):
    monkeypatch.setattr(train, "all_logps", None)
    assert len(dpo(finished)[0]) == 7


def test_the_reference_is_the_model_dpo_starts_from(tmp_path):
    sft(tmp_path)
    model, tokenizer = policy(adapter=tmp_path / "adapter")
    start = all_logps(model, items(profile(), tokenizer), **options_for(profile(), tokenizer))
    history = train_dpo(model, tokenizer, pairs(), profile())
    assert abs(history[0]["loss"] - LN_2) < 1e-6
    reference = reference_logps(model, tokenizer, items(profile(), tokenizer), profile())
    assert torch.equal(reference, start)


# --- trackers ---------------------------------------------------------------------------------------------------------


class Notebook(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "notebook", False

    def __init__(self):
        super().__init__()
        self.rows, self.config, self.finished = [], None, False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.rows.append({"step": step, **values})

    def finish(self):
        self.finished = True


def test_a_tracker_gets_every_step_and_is_finished():
    tracker = Notebook()
    history, _ = dpo(tracker=tracker)
    assert [row["step"] for row in tracker.rows] == list(range(1, 8)) and tracker.finished
    assert [row["loss"] for row in tracker.rows] == [row["loss"] for row in history]
    assert tracker.config["beta"] == 0.1 and "learning_rate" in tracker.rows[0]


def test_a_run_does_not_take_the_digits_of_one_with_other_rows(monkeypatch):
    """Reference log-probs are kept for runs without a folder, each for its own cut into rows."""
    monkeypatch.setattr(train, "_SCORED", {})
    scored, real = [], train.all_logps
    monkeypatch.setattr(train, "all_logps", lambda *a, **o: (scored.append(o["row_tokens"]), real(*a, **o))[1])
    for row_tokens in (60, 60, 200, 60, 200):
        dpo(None, profile(steps=1, row_tokens=row_tokens))
    assert scored == [60, 200]


def test_compiled_layers_give_the_same_run(monkeypatch):
    """The switch `compile_layers`, traced as for a GPU but run as it stands, so that no compiler is needed."""
    compiled, real = [], torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m, **o: (compiled.append(o), real(m, backend="eager", **o)))
    wanted = dpo(None, profile(steps=2))[0]
    assert not compiled
    got = dpo(None, profile(steps=2, compile_layers=True))[0]
    assert compiled == [{"dynamic": True}] * 4
    assert [row["loss"] for row in got] == pytest.approx([row["loss"] for row in wanted], rel=1e-5)
