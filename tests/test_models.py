"""The reference stays what DPO starts from, adapters are what they say, gradients are right."""

import dataclasses
import gc
import json
import math
import shutil
import subprocess
import sys
import weakref
from unittest.mock import Mock, patch

import bitsandbytes
import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model, get_peft_model_state_dict
from small import logps_and_gradients, moved, random_items, random_model
from small_runs import pairs, policy, profile
from transformers import AttentionInterface, AutoModelForCausalLM, AutoModelForImageTextToText

from dpo_utils import models
from dpo_utils.adapters import check_adapter, lora_config
from dpo_utils.export import merge_and_save, save_adapter
from dpo_utils.logps import all_logps, plain_logps
from dpo_utils.models import as_reference, load_base, load_policy, load_tokenizer, trainable
from dpo_utils.profiles import make_plan
from dpo_utils.tokens import as_item, tokenize_all
from dpo_utils.train import train_dpo

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
    lora = dataclasses.replace(lora_config(settings), lora_dropout=0.3)
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
    config = dataclasses.replace(lora_config(settings), **change)
    model = get_peft_model(load_base(settings), config)
    with pytest.raises(ValueError, match=message):
        check_adapter(model, settings)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match="bias to 'none'|no modules_to_save"):
        load_policy(settings, adapter=tmp_path)


def saved(kind, folder, load=AutoModelForCausalLM, **sizes):
    """A small random model of a kind, saved with the tiny tokenizer, as changes of a profile."""
    tokenizer = load_tokenizer(profile())
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, **sizes}
    with patch("small.AutoModelForCausalLM", load):
        random_model(kind, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {"model": str(folder), "quantize": False}


JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "num_experts": 2}
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "vocab_size": 1536}
SEES = {"load": AutoModelForImageTextToText, "text_config": {"model_type": "llama", **SMALL}}
SEES["vision_config"] = {"model_type": "clip_vision_model", "image_size": 28, **SMALL}
FITS = [  # kind, sizes, targets, the adapted layers
    ("gpt2", {}, ["c_attn", "c_proj"], 6),
    ("gpt2", {}, ["attn.c_proj"], 2),
    ("llama", {}, ["all-linear"], 14),
    ("llama", {}, [r".*layers\.1\..*\.(q|v)_proj"], 2),
    ("jamba", JAMBA, ["q_proj", "v_proj"], 2),
    ("mixtral", {"num_local_experts": 2}, ["q_proj"], 2),
    ("llava", SEES, ["q_proj", "v_proj"], 4),
    ("llava", SEES, ["all-linear"], 14),
]


@pytest.mark.parametrize("kind, sizes, targets, n", FITS)
def test_targets_sit_on_their_layers_of_the_language_model_and_load_in_plain_peft(
    kind, sizes, targets, n, tmp_path
):
    settings = profile(**saved(kind, tmp_path / "base", **sizes), target_modules=targets)
    model = moved(load_policy(settings)[0])
    save_adapter(model, tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_base(settings), tmp_path / "adapter")
    wanted, found = (get_peft_model_state_dict(m) for m in (model, again))
    assert len(wanted) == 2 * n and not [name for name in wanted if "vision" in name]
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize(
    "kind, sizes",
    [
        ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.5}),
        ("falcon", {"hidden_dropout": 0.3}),
        ("bloom", {"hidden_dropout": 0.3}),
        ("mixtral", {"num_local_experts": 4, "router_jitter_noise": 0.3}),
        ("phimoe", {"num_local_experts": 4, "sliding_window": None, "router_jitter_noise": 0.3}),
    ],
)
def test_noise_of_train_mode_is_off_whatever_its_name_and_eval_mode_is_as_it_was(kind, sizes):
    with patch("small.turn_dropout_off"):
        model = random_model(kind, attention="eager" if kind == "bloom" else "sdpa", **sizes).eval()
    wanted = plain_logps(model, ITEMS, 0)
    assert not torch.equal(plain_logps(model.train(), ITEMS, 0), wanted)
    models.turn_dropout_off(model.eval())
    for mode in (True, False):
        assert torch.equal(plain_logps(model.train(mode), ITEMS, 0), wanted)


@pytest.mark.parametrize("tokenizer", [False, True])
def test_an_adapter_as_the_model_is_its_base_and_the_adapter_and_the_reference(tmp_path, tokenizer):
    start = logps_of(policy(adapter=saved_sft(tmp_path / "sft"))[0])
    if tokenizer:
        load_tokenizer(profile()).save_pretrained(tmp_path / "sft")
    settings = profile(model=str(tmp_path / "sft"))
    model, own = policy(settings)
    assert torch.equal(logps_of(model), start) and len(own) == 1536
    with as_reference(moved(model)):
        assert torch.equal(logps_of(model), start)
    assert torch.equal(logps_of(load_base(settings)), logps_of(load_base(profile())))


@pytest.mark.parametrize("change", [{"layers_to_transform": [1]}, {"exclude_modules": ["fc2"]}])
def test_an_adapter_of_some_layers_only_that_says_so_is_gone_on_with(tmp_path, change):
    config = dataclasses.replace(lora_config(profile()), **change)
    if "exclude_modules" in change:
        config.exclude_modules = r".*layers\.0\..*"
    save_adapter(moved(get_peft_model(load_base(profile()), config)), tmp_path)
    assert 12 <= len(trainable(policy(adapter=tmp_path)[0])) < 48


def pickled(folder):
    """A fresh adapter as old PEFT saved it."""
    policy()[0].save_pretrained(folder, safe_serialization=False, save_embedding_layers=False)


def of_another_kind(folder):
    config = IA3Config(target_modules=["fc1"], feedforward_modules=["fc1"], task_type="CAUSAL_LM")
    get_peft_model(load_base(profile()), config).save_pretrained(folder)


def of_another_model(folder):
    settings = profile(**saved("phi", folder / "base", num_key_value_heads=4))
    save_adapter(load_policy(settings)[0], folder)


@pytest.mark.parametrize(
    "make, message",
    [
        (pickled, "only adapter_model.safetensors is read.* convert it once: .*save_pretrained"),
        (of_another_kind, "LoRA should be on .* but is on"),
        (of_another_model, "is not an adapter of .*tiny"),
    ],
)
def test_an_adapter_that_cannot_be_gone_on_with_is_refused_in_one_line(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message) as problem:
        policy(adapter=tmp_path)
    assert "\n" not in str(problem.value)


def test_a_base_saved_in_4_bits_trains_and_merges(tmp_path):
    for part in (load_base(profile()), load_tokenizer(profile())):
        part.save_pretrained(tmp_path / "bnb")
    settings = profile(model=str(tmp_path / "bnb"), quantize=False, steps=1)
    model, tokenizer = policy(settings)
    assert torch.equal(logps_of(model), logps_of(load_base(profile())))
    loss = train_dpo(model, tokenizer, pairs(), settings, tmp_path / "dpo")[0]["loss"]
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    merge_and_save(settings, tmp_path / "dpo" / "adapter", tmp_path / "merged")
    merged = load_base(profile(model=str(tmp_path / "merged"), quantize=False))
    assert (logps_of(merged) - logps_of(model)).abs().max() < 1e-2


def test_what_goes_beyond_the_model_is_refused_with_both_numbers(tmp_path):
    base = saved("gpt2", tmp_path, max_position_embeddings=100) | {"target_modules": ["c_attn"]}
    with pytest.raises(ValueError, match="max_length is 128, but .* has 100 positions: set"):
        load_policy(profile(**base))
    tokenizer = load_tokenizer(profile())
    tokenizer.add_tokens(["<|unused|>"])
    tokenizer.save_pretrained(tmp_path)
    load_policy(profile(**base, max_length=100))  # as with Gemma 3, whose last token is an image
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|endoftext|>", "<|end|>")
    for pad in ("<|end|>", "<|unused|>"):
        tokenizer.pad_token = pad
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="the tokenizer has 1538 tokens, .* only 1536"):
            load_policy(profile(**base, max_length=100))
        tokenizer.chat_template = None


@pytest.mark.parametrize("kind", ["t5", "unheard_of"])
def test_a_model_that_is_no_language_model_is_refused_in_one_line(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=f"cannot load {tmp_path}: [^\n]*$"):
        load_base(profile(model=str(tmp_path)))


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
        check_adapter(policy()[0], profile(target_modules=("q_proj", "v_proj")))


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
    plain = moved(PeftModel(base, lora_config(profile())))
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
