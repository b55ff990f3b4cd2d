"""The fast form gives the definition's numbers, or says why not; without it everything runs."""

import inspect
import json
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
import torch.nn.functional as F
from bench.meter import COUNTS, Meter
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from small import CONFIGS, logps_and_gradients, random_items, random_model, small_model
from small_runs import demonstrations, pairs, policy, profile
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dpo_utils import fast
from dpo_utils.evaluate import preference_table
from dpo_utils.fast import HeadLogps, LeanLora, item_length, lean_layers, pack_rows, shared_logps
from dpo_utils.logps import all_logps, plain_logps, why_plain
from dpo_utils.models import SDPA_MODELS, unwrap
from dpo_utils.train import train_dpo, train_sft

OPTIONS = {"pad_id": 2, "micro_tokens": 400, "row_tokens": 100}
LONG = random_items(4, seed=1, head=9) + random_items(2, seed=2, prompt=(30, 40))
WORDS = [3], [3, 4], [4, 3, 4]
CASES = {
    "random lengths": random_items(6, seed=1),
    "prompts that begin alike": random_items(6, seed=2, head=9),
    "answers that begin alike": [(p, [[9, 8, *c], [9, 8, *r]]) for p, (c, r) in random_items(5)],
    "uneven": random_items(2, seed=6, completion=(1, 2)) + random_items(2, completion=(60, 70)),
    "answers that dominate": random_items(2, seed=3, prompt=(1, 2), completion=(60, 61)),
    "few words": [(p, [c, r]) for p, c, r in product(WORDS, repeat=3) if c != r],
}


@pytest.fixture
def calls(monkeypatch):
    """(queries, keys, dtype) of every call of PyTorch's attention, in blocks of 7 queries."""
    seen, real = [], F.scaled_dot_product_attention

    def spy(query, key, *rest, **options):
        seen.append((query.shape[2], key.shape[2], query.dtype))
        return real(query, key, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(fast, "BLOCK", 7)
    return seen


def largest_gap(some, others) -> float:
    """The largest difference between two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_log_probs_and_gradients_equal_the_plain_forms_in_float64(kind, case, calls):
    """Against an untouched twin: PEFT's own layers, attention over whole padded rows."""
    wanted, wanted_gradients = logps_and_gradients(small_model(kind), CASES[case], plain=True)
    got, gradients = logps_and_gradients(small_model(kind), CASES[case], plain=False)
    assert largest_gap([got, *gradients], [wanted, *wanted_gradients]) < 1e-10
    assert max(gradient.abs().max() for gradient in gradients) > 1e-6


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_gradient_reaches_the_tokens_of_a_completions_own_sequence_and_no_other(kind):
    """Elsewhere it is exactly zero. All ids differ, so that an id names its place in the row."""
    items = [([3, 4, 5, 6], [[7, 8, 9], [10, 11]]), ([3, 4, 12], [[13, 14, 15], [13, 16]])]
    model, rows, kept = unwrap(small_model(kind)), pack_rows([items]), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, __, out: kept.append(out.requires_grad_()))
    logps = shared_logps(model, rows)
    sequences = [(prompt + answer)[:-1] for prompt, answers in items for answer in answers]
    for value, sequence in zip(logps, sequences, strict=True):
        (slope,) = torch.autograd.grad(value, kept[0], retain_graph=True)
        assert rows.input_ids[slope.norm(dim=-1) > 0].tolist() == sequence


def test_on_a_t4_attention_runs_in_float32_and_log_probs_stay_close(calls):
    model = small_model("phi", torch.float16, "sdpa_float32")
    exact, got = plain_logps(small_model("phi"), LONG, 2), all_logps(model, LONG, **OPTIONS)
    assert (7, 14, torch.float32) in calls and not any(torch.float16 in call for call in calls)
    assert torch.allclose(got.double(), exact.view(-1, 2), rtol=0.01)


@pytest.mark.parametrize("what, share", [("flops", 0.6), ("peak_bytes", 0.37)])
def test_a_step_takes_six_tenths_of_the_operations_and_less_of_the_memory(what, share):
    """On pairs as long as TruthfulQA's and a body under a head of ordinary proportions."""
    items, spent = random_items(8, prompt=(60, 100), completion=(55, 90)), []
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 2560}
    for plain in (True, False):
        model = small_model("phi", torch.float32, **sizes)
        with Meter(what.replace("peak_bytes", "memory")) as meter:
            logps_and_gradients(model, items, plain, 10_000, 384)
        spent.append(meter.result[what])
        assert any(isinstance(module, LeanLora) for module in model.modules()) != plain
    assert 0.9 * share < spent[1] / spent[0] < share
    assert COUNTS[torch.ops.aten.addmm](None, (8, 4), (4, 3), torch.float32, out_shape=()) == 192


HEAD = type("Head", (nn.Linear,), {})  # whose forward may do anything
OBJECTIONS = [
    ("phi", lambda model: model.set_attn_implementation("eager"), "attention is eager"),
    ("phi", lambda model: setattr(model.config, "sliding_window", 8), "slides over 8 tokens"),
    ("phi", lambda model: setattr(model.config, "logit_scale", 0.5), "rescaled (logit_scale)"),
    ("phi", lambda model: model.lm_head.requires_grad_(), "head is trained"),
    ("phi", lambda model: setattr(model.lm_head, "__class__", HEAD), "head is a Head, not"),
    ("falcon_h1", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}, "ignore the mask"),
    ("bert", {"is_decoder": True}, "differ from plain ones"),  # a transform before the head
    ("llama4_text", {"num_local_experts": 2, "head_dim": 8}, "fails on shared rows"),
]


@pytest.mark.parametrize("kind, change, reason", OBJECTIONS)
def test_a_model_that_it_is_not_for_runs_in_the_plain_form_and_says_why(kind, change, reason):
    twin, model = (random_model(kind, **({} if callable(change) else change)) for _ in range(2))
    if callable(change):
        change(twin), change(model)
    wanted = plain_logps(twin, LONG, 2).view(-1, 2)
    assert reason in why_plain(model)
    assert torch.allclose(all_logps(model, LONG, **OPTIONS), wanted, atol=1e-4)


def test_running_out_of_memory_in_the_trial_says_nothing_about_the_model():
    model = small_model("phi")
    full = torch.OutOfMemoryError("CUDA out of memory.")
    with patch.object(fast, "shared_logps", side_effect=full), pytest.raises(type(full)):
        why_plain(model)
    assert why_plain(model) is None


def test_a_shared_row_by_hand():
    # Prompts [1 2 3] and [1 2 4 5]; the answers [6 7] and [6 8] begin alike, [9] and [10] do not.
    rows = pack_rows([[([1, 2, 3], [[6, 7], [6, 8]]), ([1, 2, 4, 5], [[9], [10]])]])
    assert rows.input_ids.tolist() == [[1, 2, 3, 6, 7, 8, 4, 5, 9, 10]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 2, 3, 4, 4]]
    assert rows.labels.tolist() == [6, 7, 8, 9, 10] and rows.predictors.tolist() == [2, 3, 3, 7, 7]
    assert rows.label_index.tolist() == [0, 1, 0, 2, 3, 4] and rows.counts == [2, 2, 1, 1]
    seen = [rows.mask[0, 0, i].nonzero().flatten().tolist() for i in (5, 7, 9)]
    assert seen == [[0, 1, 2, 3, 5], [0, 1, 6, 7], [0, 1, 6, 7, 9]]


def test_a_lone_item_whose_answers_dominate_runs_as_a_row_for_each():
    """Not where one is much longer, which padding would make two of, and not where a prompt is."""
    for sizes, n in (((1, 40, 40), 2), ((1, 40, 30), 1), ((9, 40, 40), 1)):
        prompt, *answers = ([i] * size for i, size in enumerate(sizes))
        assert len(fast.split_row([(prompt, answers)])) == n
        assert len(fast.split_row([(prompt, answers)] * 2)) == 1


BUDGET = st.integers(1, 200)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), BUDGET, BUDGET)
def test_every_item_is_in_one_row_and_rows_and_micro_batches_keep_their_budgets(sizes, row, micro):
    """Only an item, or a row, that is longer than a budget alone is over it."""
    items = [([i + 3], [[4] * n, [5]]) for i, n in enumerate(sizes)]
    plan = fast.plan_rows(items, row, micro)
    assert sorted(i for batch in plan for numbers in batch for i in numbers) == [*range(len(items))]
    for batch in plan:
        rows = [[item_length(items[i]) for i in numbers] for numbers in batch]
        assert all(len(lengths) == 1 or sum(lengths) <= row for lengths in rows)
        assert len(batch) == 1 or len(batch) * max(map(sum, rows)) <= micro


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 1e-2)])
def test_head_logps_are_one_log_softmax_in_value_and_gradient(dtype, tolerance, chunk, monkeypatch):
    """Of half-precision logits the values are still exact: the softmax is in float32."""
    monkeypatch.setattr(fast, "HEAD_LOGITS", 19 * chunk + 1)
    draw = torch.Generator().manual_seed(0)
    shapes = (11, 8), (19, 8), (19,)
    hidden, weight, bias = (torch.randn(shape, generator=draw).to(dtype) for shape in shapes)
    logits = F.linear(hidden.requires_grad_(), weight, bias)
    wide, labels = logits.to(torch.promote_types(dtype, torch.float32)), torch.arange(11)
    wanted = wide.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    got = HeadLogps.apply(hidden, weight, bias, labels)
    assert got.dtype == wide.dtype and largest_gap([got], [wanted]) < min(tolerance, 1e-5)
    a, b = (torch.autograd.grad((logps * labels).sum(), hidden)[0] for logps in (got, wanted))
    assert (a - b).norm() < tolerance * b.norm()


CAUSAL = torch.ones(2, 1, 23, 23, dtype=torch.bool).tril()
MASKS = {
    "causal": CAUSAL,
    "a last block of one token": CAUSAL[..., :15, :15],
    "one mask a head": torch.rand(2, 4, 23, 23, generator=torch.Generator().manual_seed(0)) > 0.97,
    "a block that sees nothing": CAUSAL & (torch.arange(23) > 8)[:, None],
    "trees": pack_rows([LONG[:3], LONG[3:]]).mask,
    "whole: no mask": None,
    "whole: a short row": CAUSAL[..., :7, :7],
    "whole: all is seen": CAUSAL | True,
    "whole: numbers": torch.zeros(CAUSAL.shape).double().masked_fill(~CAUSAL, -1e9),
    "whole: a cache": CAUSAL[..., 3:, :],
}


@pytest.mark.parametrize("case", MASKS)
def test_blocks_leave_out_no_key_that_is_seen(case, calls):
    """Against Transformers' own, with two query heads for each key head; on CUDA it runs whole."""
    mask, layer = MASKS[case], Mock(is_causal=True, num_key_value_groups=2)
    queries, keys = (23, 23) if mask is None else mask.shape[-2:]
    query = torch.randn(2, 4, queries, 8).double()
    key, value = torch.randn(2, 2, 2, keys, 8).double()
    got, _ = fast.sdpa_blocks(layer, query, key, value, mask, scaling=0.3)
    work = sum(q * k for q, k, _ in calls) / (queries * keys)
    assert work == 1 if "whole" in case else work < {"trees": 0.7}.get(case, 1) and len(calls) > 1
    wanted, _ = sdpa_attention_forward(layer, query, key, value, mask, scaling=0.3)
    assert torch.allclose(got, wanted, rtol=0, atol=1e-14, equal_nan=True)
    assert fast._blocks(mask, *[Mock(is_cuda=True, shape=query.shape)] * 2) is None


@pytest.mark.parametrize("kind", SDPA_MODELS)
def test_the_name_of_the_attention_changes_nothing_but_the_arithmetic(kind, calls):
    """Every type of model that is switched; some others do something else under another name."""
    model = random_model(kind, sliding_window=None)
    wanted = plain_logps(model, LONG, 2)
    assert why_plain(model) is None and model.config._attn_implementation == "sdpa_blocks"
    calls.clear()
    for got in (plain_logps(model, LONG, 2), all_logps(model, LONG, **OPTIONS).flatten()):
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-4)
    assert (7, 14, torch.float32) in calls and wanted.std() > 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_left_padded_prompts_are_continued_alike(kind, calls):
    """Generation with a cache: the prompts in blocks, the new tokens one by one."""
    model, ids = unwrap(small_model(kind)).eval(), torch.arange(3, 41).view(2, 19)
    mask = torch.arange(19) >= torch.tensor([[5], [0]])
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 2}
    wanted = model.generate(ids, **options)
    model.set_attn_implementation("sdpa_blocks")
    calls.clear()
    assert torch.equal(model.generate(ids, **options), wanted)
    assert (7, 14, torch.float64) in calls and any(keys > 19 for _, keys, _ in calls)


@pytest.mark.parametrize("case", ["plain", "off", "merged", "two", "dora", "bias", "named", "half"])
def test_a_lean_layer_gives_what_pefts_own_gives(case):
    more = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}.get(case, {})
    lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **more)
    net = get_peft_model(nn.Sequential(nn.Linear(6, 5)), lora).eval()
    net.add_adapter("second", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    lean_layers(net)
    layer, x = net.base_model.model[0], torch.randn(2, 6)
    if case == "half":  # the base alone, as in training: adapters stay in float32
        x, layer.base_layer = x.bfloat16(), layer.base_layer.bfloat16()
    layer.set_adapter(["default", "second"] if case == "two" else ["default"])
    layer.enable_adapters(case != "off")
    if case == "merged":
        layer.merge()
    options = {"adapter_names": ["second", "__base__"]} if case == "named" else {}
    got, wanted = layer(x, **options), super(LeanLora, layer).forward(x, **options)
    assert got.dtype == wanted.dtype
    assert torch.allclose(got, wanted, atol=3e-2 if case == "half" else 1e-6)
    assert torch.allclose(got, layer.base_layer(x)) == (case in ("off", "merged"))


def whole_path(folder) -> list[float]:
    """Losses of a short SFT and of DPO from it, then margins of pairs, on the tiny profile."""
    settings = profile(sft_steps=3, steps=3)
    history = train_sft(*policy(settings), demonstrations(), settings, folder)
    model, tokenizer = policy(settings, adapter=folder / "adapter")
    history = history + train_dpo(model, tokenizer, pairs(), settings)
    margins = preference_table(model, tokenizer, pairs(), settings)["margins"]
    return [row["loss"] for row in history] + margins.tolist()


def test_the_package_copied_without_fast_runs_the_whole_path_and_says_so(tmp_path):
    ours, tests = Path(fast.__file__).parent, str(Path(__file__).parent)
    copy = tmp_path / "dpo_utils"
    shutil.copytree(ours, copy, ignore=shutil.ignore_patterns("fast.py", "__pycache__"))
    code = f"""
import json, pathlib, sys
finders = [x for x in sys.meta_path if "editable" not in getattr(x, "__module__", "")]
sys.meta_path[:], sys.path[:0] = finders, [{str(tmp_path)!r}, {tests!r}]  # not the installed one
from small_runs import demonstrations, pairs, policy, profile, train_dpo, train_sft
from dpo_utils.evaluate import preference_table
assert preference_table.__code__.co_filename.startswith({str(copy)!r})
{inspect.getsource(whole_path)}
print(json.dumps(whole_path(pathlib.Path({str(tmp_path / "plain")!r}))))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert "in the plain form, since dpo_utils/fast.py cannot be used" in done.stdout, done.stderr
    wanted = pytest.approx(whole_path(tmp_path / "fast"), abs=1e-4)
    assert json.loads(done.stdout.splitlines()[-1]) == wanted
