"""The reference stays what DPO starts from, adapters are what they say, gradients are right."""

import dataclasses
import gc
import json
import shutil
import subprocess
import sys
import weakref
from unittest.mock import Mock, patch

import bitsandbytes
import pytest
import torch
from peft import PeftModel, get_peft_model
from small import logps_and_gradients, moved, random_items, random_model
from small_runs import pairs, policy, profile
from transformers import AttentionInterface

from dpo_utils import models
from dpo_utils.export import merge_and_save, save_adapter
from dpo_utils.logps import all_logps
from dpo_utils.models import as_reference, load_base, load_policy, load_tokenizer, trainable
from dpo_utils.profiles import make_plan
from dpo_utils.tokens import as_item, tokenize_all

ITEMS = random_items(4, seed=1)
OPTIONS = {"pad_id": 0, "micro_tokens": 400, "row_tokens": 100}
PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")


def logps_of(model):
    """Log-probs of the items."""
    return all_logps(model, ITEMS, **OPTIONS)


def saved_sft(folder, **changes):
    """A folder with an adapter as SFT leaves it."""
    save_adapter(moved(policy(profile(**changes))[0]), folder)
    return folder


def relative_gap(gradients, wanted) -> float:
    """The largest difference of two lists of gradients, as a share of their size."""
    both = zip(gradients, wanted, strict=True)
    return max(((a - b).norm() / b.norm()).item() for a, b in both)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("sft", [False, True])
def test_the_reference_is_what_training_starts_from_and_stays_it_to_the_bit(
    tmp_path, checkpointing, quantize, sft
):
    """The base for a fresh adapter, after SFT the adapter of SFT; also after a step and a stop."""
    settings = profile(gradient_checkpointing=checkpointing, quantize=quantize)
    model = policy(settings, adapter=saved_sft(tmp_path) if sft else None)[0].train()
    start, base = logps_of(model), logps_of(load_base(settings))
    assert torch.equal(start, base) == (not sft)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    logps_and_gradients(moved(model), ITEMS)
    optimizer.step()
    with pytest.raises(KeyboardInterrupt), as_reference(model):
        raise KeyboardInterrupt
    assert (logps_of(model) - start).abs().max() > 1  # the policy is back, and has moved
    with as_reference(model):
        assert torch.equal(logps_of(model), start)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".default." in name}


def test_another_adapter_can_be_the_reference(tmp_path):
    sft = saved_sft(tmp_path)
    start, model = logps_of(policy(adapter=sft)[0]), policy(reference=sft)[0]
    assert torch.equal(logps_of(model), logps_of(load_base(profile())))  # a fresh policy
    with as_reference(model):
        assert torch.equal(logps_of(model), start)


def test_gradient_checkpointing_gives_the_same_gradients():
    settings = (profile(gradient_checkpointing=value) for value in (False, True))
    plain, saved = (logps_and_gradients(moved(policy(s)[0]).train(), ITEMS)[1] for s in settings)
    assert relative_gap(saved, plain) < 1e-6


def test_dropout_is_off_in_the_base_and_in_a_loaded_adapter(tmp_path):
    """Phi-2 has some: switched on, it would make margins of nats before the first step."""
    folder = shutil.copytree(profile().model, tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), 0.1)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = profile(model=str(folder))
    lora = dataclasses.replace(models.lora_config(settings), lora_dropout=0.3)
    save_adapter(moved(get_peft_model(load_base(settings), lora)), tmp_path / "adapter")
    model = policy(settings, adapter=tmp_path / "adapter")[0].train()
    for plain in (True, None):
        first, second = (all_logps(model, ITEMS, **OPTIONS, plain=plain) for _ in range(2))
        assert torch.equal(first, second)


def test_a_policy_is_gone_with_its_last_name():
    """No cycle keeps it in memory until Python happens to look."""
    model, _ = policy()
    logps_of(model)
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(trainable(model)[0])
        del model
        assert weight() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bias": "lora_only"}, "trains bias='lora_only'.*Use bias='none'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\].*no modules_to_save"),
    ],
)
def test_an_adapter_that_switching_off_does_not_take_back_is_refused(tmp_path, change, message):
    settings = profile(quantize=False)
    config = dataclasses.replace(models.lora_config(settings), **change)
    model = get_peft_model(load_base(settings), config)
    with pytest.raises(ValueError, match=message):
        models.check_adapter(model, settings)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="bias to 'none'|no modules_to_save"):
        load_policy(settings, adapter=tmp_path)


@pytest.mark.parametrize(
    "targets", [[*PHI_TARGETS, "Wqkv"], ["fc1", "Wqkv", "out_proj"], ["0.self_attn.q_proj"]]
)
def test_targets_that_match_half_are_refused_with_the_names_there_are(targets):
    names = "The linear layers of .* are q_proj k_proj v_proj dense fc1 fc2: choose"
    with pytest.raises(ValueError, match=f"LoRA should be on .* but is on .*{names}"):
        load_policy(profile(target_modules=tuple(targets)))


def test_an_adapter_on_other_layers_than_the_profile_says_is_refused(tmp_path):
    saved_sft(tmp_path, target_modules=("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="should be on .*'fc1': 4.* but is on .*'fc1': 0"):
        policy(adapter=tmp_path)
    with pytest.raises(ValueError, match="but is on .*'fc1': 4"):
        models.check_adapter(policy()[0], profile(target_modules=("q_proj", "v_proj")))


def test_phi_gets_adapters_in_float32_on_exactly_its_six_layers():
    model, _ = policy()
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == set(PHI_TARGETS) and len(trainable(model)) == 2 * 6 * 4
    assert {p.dtype for p in trainable(model)} == {torch.float32}


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_four_bit_gradients_are_those_of_the_dequantised_model(evaluated_before):
    """Also after an evaluation, in which CPUs with AVX512-BF16 would repack the weights."""
    with patch("bitsandbytes.nn.modules.has_avx512bf16", return_value=True):
        model = moved(policy()[0])
    layers = [m for m in model.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 6 * 4 and not any(m.support_avx512bf16_for_cpu for m in layers)
    if evaluated_before:
        logps_of(model.eval())
    base = load_base(profile()).dequantize().requires_grad_(False)
    plain = moved(PeftModel(base, models.lora_config(profile())))
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in plain.modules())
    for ours, theirs in zip(trainable(plain), trainable(model), strict=True):
        ours.data.copy_(theirs)
    gradients = (logps_and_gradients(m.train(), ITEMS)[1] for m in (model, plain))
    assert relative_gap(*gradients) < 1e-5


def test_scores_that_overflow_in_float16_do_not_in_the_t4_plan():
    """Queries and keys of about 300, as in Phi-2's late layers: 32 * 300 * 300 is past 65,504."""
    query = torch.full((1, 1, 3, 32), 300.0, dtype=torch.float16)
    value = torch.arange(3.0).half().view(1, 1, 3, 1).expand(1, 1, 3, 32)
    layer = Mock(is_causal=True, num_key_value_groups=1)
    attend = AttentionInterface()["sdpa_float32"]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with patch("torch.nn.functional.scaled_dot_product_attention", wraps=sdpa) as spy:
        out, _ = attend(layer, query, query, value, None, scaling=1.0)
    assert {x.dtype for x in spy.call_args.args[:3]} == {torch.float32}  # not every kernel is wide
    assert out.dtype == torch.float16 and out[0, :, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert not torch.isfinite(query @ query.mT).any()


# Falcon does something else under another name of the attention, GPT-Neo has none but eager.
NEO = {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}


@pytest.mark.parametrize(
    "kind, sizes, own", [("falcon", {"alibi": False}, "sdpa"), ("gpt_neo", NEO, "eager")]
)
def test_a_model_that_is_not_tested_keeps_its_attention_and_a_t4_is_warned(
    kind, sizes, own, tmp_path, monkeypatch
):
    random_model(kind, attention=own, **sizes).save_pretrained(tmp_path)
    settings = profile(model=str(tmp_path), quantize=False)
    assert load_base(settings).config._attn_implementation == own
    plan = dataclasses.replace(make_plan(settings), attention="sdpa_float32")
    monkeypatch.setattr(models, "make_plan", lambda _: plan)
    with pytest.warns(UserWarning, match=f"{kind}.* keeps its own attention .{own}."):
        load_base(settings)
    assert load_base(profile()).config._attn_implementation == "sdpa_float32"


FRESH = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
model, adapter, out = sys.argv[1:]
nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
nf4 = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=nf4)
model = PeftModel.from_pretrained(base, adapter)
assert "dpo_utils" not in sys.modules
for module in model.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"): module.support_avx512bf16_for_cpu = False
with torch.no_grad():
    torch.save(model(input_ids=torch.tensor([[5, 9, 13, 21, 34, 55, 89, 144]])).logits, out)
"""


def test_a_fresh_process_with_plain_peft_gives_the_same_bits(tmp_path):
    adapter, out = saved_sft(tmp_path / "sft"), tmp_path / "logits.pt"
    command = [sys.executable, "-c", FRESH, profile().model, str(adapter), str(out)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model, _ = policy(adapter=adapter)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[5, 9, 13, 21, 34, 55, 89, 144]])).logits
    assert torch.equal(logits, torch.load(out, weights_only=True))


def test_a_reloaded_adapter_gives_the_same_log_probs_and_the_same_files(tmp_path):
    """To the bit, and in whatever order PEFT's set of target modules comes."""
    model = moved(policy()[0])
    save_adapter(model, tmp_path / "one")
    again, _ = policy(adapter=tmp_path / "one")
    assert torch.equal(logps_of(again), logps_of(model))
    again.peft_config["default"].target_modules = list(PHI_TARGETS)
    save_adapter(again, tmp_path / "two")
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("one", "two")]
    config = json.loads(files[0]["adapter_config.json"])
    assert files[0] == files[1] and config["target_modules"] == sorted(PHI_TARGETS)
    assert set(files[0]) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_a_merged_model_stays_close(tmp_path):
    model, tokenizer = policy(adapter=saved_sft(tmp_path / "sft"))
    merge_and_save(profile(), tmp_path / "sft", tmp_path / "merged")
    merged = load_base(profile(model=str(tmp_path / "merged"), quantize=False))
    rows, _ = tokenize_all(pairs(), tokenizer, 128)
    items = [as_item(row) for row in rows]
    ours, theirs = (all_logps(m, items, **OPTIONS) for m in (model, merged))
    assert (ours - theirs).abs().max() < 1e-3


def test_a_model_that_is_not_there_is_one_line_with_the_remedy():
    with pytest.raises(OSError) as problem:
        load_policy(profile(model="nobody/nothing", revision="a" * 40))
    message = str(problem.value)
    assert message.startswith("cannot get 'nobody/nothing' (revision aaaa") and "\n" not in message
    assert "set DPO_MODEL to a local directory, or use DPO_PROFILE=tiny" in message


def test_only_safetensors_are_loaded(tmp_path):
    folder = shutil.copytree(profile().model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_base(profile(model=str(folder)))


def test_a_missing_adapter_says_which_notebook_makes_it_or_where_it_is(tmp_path):
    saved_sft(tmp_path / "run" / "adapter")
    for load in (policy, lambda adapter: merge_and_save(profile(), adapter, tmp_path)):
        with pytest.raises(FileNotFoundError, match="no adapter in .*notebook 02 makes sft"):
            load(adapter=tmp_path / "none")
        with pytest.raises(FileNotFoundError, match="did you mean .*adapter?"):
            load(adapter=tmp_path / "run")


def test_a_tokenizer_without_eos_is_refused_and_one_without_pad_pads_with_eos(tmp_path):
    """A pad that is the EOS is safe, since masks never come from ids."""
    folder = shutil.copytree(profile().model, tmp_path / "base")
    tokenizer = load_tokenizer(profile())
    for name in ("pad_token", "eos_token"):
        setattr(tokenizer, name, None)
        tokenizer.save_pretrained(folder)
        if name == "pad_token":
            assert load_tokenizer(profile(model=str(folder))).pad_token_id == tokenizer.eos_token_id
    with pytest.raises(ValueError, match="has no EOS token: set tokenizer.eos_token"):
        load_tokenizer(profile(model=str(folder)))
