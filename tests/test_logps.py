"""The fast log-probs equal the definition, in value and in every gradient."""

import math

import pytest
import torch
from small import CONFIGS, IDS, SHAPE, random_items, small_model
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_utils import logps as L
from dpo_utils.exercises.checks import check_sequence_logps
from dpo_utils.models import turn_dropout_off
from dpo_utils.tokens import collate, pack_rows

CASES = {
    "random lengths": random_items(6, seed=1),
    "a shared head": random_items(6, seed=2, head=9),
    "one-token completions": random_items(5, seed=3, completion=(1, 1)),
    "equal prompts": [(random_items(1, seed=4)[0][0], item[1]) for item in random_items(5, seed=5)],
    "very uneven": random_items(2, seed=6, completion=(1, 2)) + random_items(2, seed=7, completion=(60, 70)),
    "one prompt begins another": [([5, 6, 7], [[8, 9], [10]]), ([5, 6, 7, 11], [[8], [12, 13, 2]])],
    "answers that begin alike": [(p, [[20, 21, *c], [20, 21, *r]]) for p, (c, r) in random_items(5, seed=13)],
    "one answer in two pairs": [([5, 6, 7], [[8, 9], other]) for other in ([8, 9, 10], [11, 9], [9, 8])],
    "an answer goes on another prompt": [([5, 6], [[7, 8, 9], [10]]), ([5, 6, 7], [[8, 9], [11, 2]])],
}


def loss_and_gradients(model, items, plain, micro_tokens=300, row_tokens=60):
    """A DPO-like scalar of all log-probs, and the gradient of every adapter weight."""
    model.zero_grad()
    out = torch.zeros(len(items), 2, dtype=torch.float64)
    for numbers, values in L.completion_logps(
        model, items, pad_id=2, micro_tokens=micro_tokens, row_tokens=row_tokens, plain=plain
    ):
        (-torch.nn.functional.logsigmoid(0.1 * (values[:, 0] - values[:, 1])).sum() / len(items)).backward()
        out[numbers] = values.detach().double()
    return out, [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_fast_equals_definition_in_float64(kind, case):
    model = small_model(kind)
    plain, plain_grads = loss_and_gradients(model, CASES[case], plain=True)
    fast, fast_grads = loss_and_gradients(model, CASES[case], plain=False)
    assert (plain - fast).abs().max() < 1e-10
    assert max((a - b).abs().max() for a, b in zip(plain_grads, fast_grads, strict=True)) < 1e-10
    assert max(g.abs().max() for g in fast_grads) > 1e-6


def test_log_probs_do_not_depend_on_the_micro_batch():
    model, items = small_model("phi", torch.float32), random_items(6, seed=8, prompt=(30, 60), completion=(20, 60))
    reference, reference_grads = loss_and_gradients(model, items, False)
    for micro, row in ((1, 1), (400, 1), (10_000, 1), (10_000, 10_000)):
        values, grads = loss_and_gradients(model, items, False, micro, row)
        assert ((values - reference) / reference).abs().max() < 1e-6
        for a, b in zip(grads, reference_grads, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_row_alone_equals_the_row_in_a_batch_and_padding_does_not_matter():
    model, items = small_model("llama", torch.float32), random_items(4, seed=9)
    together = L.plain_logps(model, items, pad_id=2)
    alone = torch.cat([L.plain_logps(model, [item], pad_id=2) for item in items])
    other_padding = L.plain_logps(model, items, pad_id=50)
    assert torch.allclose(together, alone, rtol=1e-6, atol=1e-5)
    assert torch.equal(together, other_padding)


def test_head_chunks_agree_with_one_log_softmax(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(11, 8, dtype=torch.float64, requires_grad=True),
        torch.randn(19, 8).double(),
        torch.randn(19).double(),
    )
    labels = torch.randint(19, (11,))
    expected = (hidden @ weight.T + bias).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    (wanted,) = torch.autograd.grad((expected * torch.arange(11)).sum(), hidden)
    for rows in (1, 4, 11, 100):
        monkeypatch.setattr(L, "HEAD_LOGITS", 19 * rows + 1)
        got = L.HeadLogps.apply(hidden, weight, bias, labels)
        (grad,) = torch.autograd.grad((got * torch.arange(11)).sum(), hidden)
        assert torch.allclose(got, expected, atol=1e-12) and torch.allclose(grad, wanted, atol=1e-12)


def test_sequence_logps_by_hand():
    # one row, tokens [0, 1, 0], scored: the last two. Logits at t-1 give p(1) = 1/4 and p(0) = 2/3.
    logits = torch.tensor([[[math.log(3), 0.0], [math.log(2), 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[False, True, True]])
    value = L.sequence_logps(logits, torch.tensor([[0, 1, 0]]), mask)
    assert value.item() == pytest.approx(math.log(1 / 4) + math.log(2 / 3), abs=1e-6)


def test_sequence_logps_passes_the_learners_check():
    check_sequence_logps(L.sequence_logps)


def test_half_precision_logits_are_scored_in_float32():
    logits = torch.randn(1, 200, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids, mask = torch.randint(50, (1, 200)), torch.ones(1, 200, dtype=torch.bool)
    value = L.sequence_logps(logits, ids, mask)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(L.sequence_logps(logits.double(), ids, mask).item(), rel=1e-5)


def test_plain_form_is_sequence_logps_of_the_collated_pairs():
    model, items = small_model("phi", torch.float32), random_items(3, seed=10)
    pairs = [{"prompt_ids": p, "chosen_ids": c[0], "rejected_ids": c[1]} for p, c in items]
    batch = collate(pairs, pad_id=2)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    values = L.sequence_logps(logits, batch["input_ids"], batch["completion_mask"]).view(2, -1).T
    assert torch.allclose(values, L.plain_logps(model, items, 2).view(-1, 2), atol=1e-4)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda m: m.set_attn_implementation("eager"), "eager"),
        (lambda m: setattr(m.config, "sliding_window", 8), "slides"),
        (lambda m: setattr(m.config, "final_logit_softcapping", 30.0), "rescaled"),
        (lambda m: m.get_output_embeddings().requires_grad_(True), "trained"),
    ],
)
def test_models_that_fall_under_the_plain_form_say_why(change, reason):
    model = small_model("phi", torch.float32)
    assert L.why_plain(model) is None
    change(L.unwrap(model))
    assert reason in L.why_plain(model)
    numbers, values = next(L.completion_logps(model, random_items(2), pad_id=2, micro_tokens=999, row_tokens=99))
    assert torch.allclose(values.flatten(), L.plain_logps(model, [random_items(2)[i] for i in numbers], 2))


def test_the_rejected_half_does_not_see_the_chosen_half():
    model, (prompt, (chosen, rejected)) = small_model("phi"), random_items(1, seed=11)[0]
    one = L.shared_logps(model, pack_rows([[(prompt, [chosen, rejected])]], 2))
    other = L.shared_logps(model, pack_rows([[(prompt, [[7] * len(chosen), rejected])]], 2))
    assert one[1] == other[1] and one[0] != other[0]


# --- models whose settings do not say that shared rows are not for them -----------------------------------------------

HYBRIDS = {  # recurrent or convolutional layers go through a row token by token, whatever the mask says
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_ff_dim": 64},
    "bert": {"is_decoder": True},  # a transform of its own before the head
    "llama4_text": {"num_local_experts": 2},  # no base model to ask for hidden states
}
WORDS = {
    "falcon_h1": "pass over the mask",
    "lfm2": "pass over the mask",
    "bert": "part from plain",
    "llama4_text": "fails on shared",
}


@pytest.fixture
def hybrid():
    """A function that makes a small random model of a type in HYBRIDS."""

    def make(kind):
        torch.manual_seed(0)
        shape = {**SHAPE, **IDS, "num_key_value_heads": 2, "head_dim": 8, **HYBRIDS[kind]}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape), attn_implementation="sdpa")
        for parameter in model.parameters():
            parameter.data *= 4 if parameter.dim() > 1 else 1
        return turn_dropout_off(model) or model.requires_grad_(False)

    return make


@pytest.mark.parametrize("kind", HYBRIDS)
def test_models_that_hear_other_completions_fall_under_the_plain_form(kind, hybrid):
    model, items = hybrid(kind), random_items(3, seed=12)
    model.train()
    assert WORDS[kind] in L.why_plain(model) and all(module.training for module in model.modules())
    if kind != "llama4_text":  # that one cannot run at all
        assert (L.shared_logps(model, pack_rows([items], 2)) - L.plain_logps(model, items, 2)).abs().max() > 1e-3
    values = L.all_logps(model, items, pad_id=2, micro_tokens=999, row_tokens=99)
    assert torch.allclose(values.flatten(), L.plain_logps(model, items, 2), atol=1e-4)


def test_a_model_is_tried_once_for_each_attention(monkeypatch):
    model, tries = small_model("phi"), []
    monkeypatch.setattr(L, "_trial", lambda model: tries.append(model.config._attn_implementation))
    for name in ("sdpa", "sdpa", "sdpa_blocks", "sdpa"):
        L.unwrap(model).set_attn_implementation(name)
        assert L.why_plain(model) is None
    assert tries == ["sdpa", "sdpa_blocks"]


def test_running_out_of_memory_says_nothing_about_the_model(monkeypatch):
    model = small_model("phi")

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(L, "shared_logps", full)
    with pytest.raises(torch.OutOfMemoryError):
        L.why_plain(model)
    monkeypatch.undo()
    assert L.why_plain(model) is None


def test_a_model_whose_numbers_are_not_finite_is_left_to_the_check_before_the_first_step():
    model = small_model("phi")
    with torch.no_grad():
        L.unwrap(model).get_input_embeddings().weight.fill_(float("nan"))
    assert L.why_plain(model) is None
