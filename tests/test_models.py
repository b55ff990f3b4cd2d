"""The base stays what it was, adapters are what they say, and 4-bit gradients are right."""

import dataclasses
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from small import CONFIGS, IDS, SHAPE, random_items, small_model
from small_runs import pairs, policy, profile
from transformers import AutoModelForCausalLM, PhiConfig
from transformers.activations import NewGELUActivation

from dpo_utils import attention, models, profiles
from dpo_utils.logps import all_logps, completion_logps
from dpo_utils.models import as_reference, check_adapter, load_base, load_policy, save_adapter, trainable
from dpo_utils.profiles import PHI_TARGETS, load_profile, make_plan
from dpo_utils.tokens import as_item, tokenize_all
from dpo_utils.train import options_for

ITEMS = random_items(4, seed=1)
OPTIONS = {"pad_id": 0, "micro_tokens": 400, "row_tokens": 100}


def move(model, scale=0.05):
    """An adapter as after training: B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trainable(model):
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def backward(model, items=ITEMS, **options):
    """Gradients of the summed log-probs."""
    model.zero_grad()
    for _, logps in completion_logps(model, items, **{**OPTIONS, **options}):
        logps.sum().backward()
    return [p.grad.clone() for p in trainable(model)]


# --- adapter off is the base ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("with_reference", [False, True])
def test_the_reference_is_the_model_it_was_to_the_bit(tmp_path, checkpointing, quantize, with_reference):
    settings = profile(gradient_checkpointing=checkpointing, quantize=quantize)
    adapter = None
    if with_reference:
        adapter = tmp_path / "sft"
        save_adapter(move(policy(settings)[0]), adapter)
    pristine = all_logps(load_base(settings), ITEMS, **OPTIONS)
    model, _ = policy(settings, adapter=adapter)
    if with_reference:
        pristine = all_logps(model, ITEMS, **OPTIONS)
    move(model.train())
    with as_reference(model):
        assert torch.equal(all_logps(model, ITEMS, **OPTIONS), pristine)
    backward(model)  # a step of training in between
    with pytest.raises(KeyboardInterrupt), as_reference(model):
        raise KeyboardInterrupt
    assert (all_logps(model, ITEMS, **OPTIONS) - pristine).abs().max() > 1  # the policy is back
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, _ in model.named_parameters() if ".default." in n
    }
    with as_reference(model):
        assert torch.equal(all_logps(model, ITEMS, **OPTIONS), pristine)


def test_no_gradient_reaches_the_reference_adapter(tmp_path):
    save_adapter(move(policy()[0]), tmp_path)
    model, _ = policy(adapter=tmp_path)
    frozen = {n: p.clone() for n, p in model.named_parameters() if ".reference." in n}
    assert len(frozen) == 48
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    backward(model)
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) and now[n].grad is None for n, p in frozen.items())


def test_gradient_checkpointing_gives_the_same_gradients():
    plain, saved = (backward(move(policy(profile(gradient_checkpointing=c))[0]).train()) for c in (False, True))
    assert all((a - b).norm() <= 1e-6 * a.norm() for a, b in zip(plain, saved, strict=True))


def test_dropout_of_a_loaded_adapter_is_turned_off(tmp_path):
    model = get_peft_model(load_base(profile()), dataclasses.replace(models.lora_config(profile()), lora_dropout=0.3))
    save_adapter(move(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["lora_dropout"] == 0.3
    loaded, _ = policy(adapter=tmp_path)
    loaded.train()
    with as_reference(loaded):
        reference = all_logps(loaded, ITEMS, **OPTIONS)
    assert torch.equal(all_logps(loaded, ITEMS, **OPTIONS), reference)


# --- the same functions, faster ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, value, slope", [(torch.float32, 1e-6, 2e-6), (torch.float64, 1e-14, 1e-14)])
def test_the_fused_gelu_is_gelu_new(dtype, value, slope):
    """From -12 to 12, where it turns and where it is flat."""
    layer = torch.nn.Sequential(NewGELUActivation())
    x = torch.linspace(-12, 12, 100_001, dtype=dtype, requires_grad=True)
    wanted = layer(x)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), x)
    assert models.fuse_gelu(layer) == 1 and type(layer[0]) is torch.nn.GELU
    got = layer(x)
    (got_slope,) = torch.autograd.grad(got.sum(), x)
    assert (got - wanted).abs().max() < value and (got_slope - wanted_slope).abs().max() < slope
    assert (torch.nn.GELU()(x) - wanted).abs().max() > 1e-4  # the exact one is another function


def usual(model):
    """The model with PEFT's own LoRA layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models.LeanLora, "forward", lambda self, x, *a, **k: super(models.LeanLora, self).forward(x, *a, **k))
        return backward(model), all_logps(model, ITEMS, **OPTIONS)


@pytest.fixture
def passes(monkeypatch):
    """Types of the sums that lean layers have made: calls of `torch.addmm` with a product of low rank."""
    seen, real = [], torch.addmm

    def spy(base, low, b):
        seen.extend([base.dtype] if low.shape[1] <= 16 else [])
        return real(base, low, b)

    monkeypatch.setattr(torch, "addmm", spy)
    return seen


@pytest.mark.parametrize("kind", CONFIGS)
def test_lean_lora_is_pefts_sum(kind, passes):
    model = small_model(kind)
    wanted, logps = usual(model)
    assert not passes
    layers = sum("lora_A" in name for name, _ in model.named_parameters())
    assert models.lean_lora(model) == layers
    got = backward(model)
    assert len(passes) >= layers and max((a - b).abs().max() for a, b in zip(got, wanted, strict=True)) < 1e-10
    assert (all_logps(model, ITEMS, **OPTIONS) - logps).abs().max() < 1e-10


@pytest.mark.parametrize(
    "quantize, dtype, tolerance",
    [(True, "float32", 1e-5), (False, "float32", 1e-5), (False, "bfloat16", 3e-2), (True, "bfloat16", 3e-2)],
)
def test_a_loaded_policy_has_lean_layers(quantize, dtype, tolerance, passes):
    """In 4 bits, and in bfloat16, where the sum is float32 as PEFT's is."""
    model = move(policy(profile(quantize=quantize, dtype=dtype))[0])
    got, logps = backward(model), all_logps(model, ITEMS, **OPTIONS)
    assert set(passes) == {torch.float32}
    wanted, usual_logps = usual(model)
    assert all((a - b).norm() <= tolerance * b.norm() for a, b in zip(got, wanted, strict=True))
    assert torch.allclose(logps, usual_logps, rtol=tolerance, atol=tolerance)


def test_an_adapter_narrower_than_its_base_does_not_round_the_base():
    """As TRL leaves them: bfloat16 adapters on a 4-bit base that computes in float32."""
    _, layer = lora_layer()
    for adapter in (layer.lora_A, layer.lora_B):
        adapter.bfloat16()
    x = torch.randn(50, 6)
    got, wanted = layer(x), usual_layer(layer, x)
    assert got.dtype == torch.float32 and (got - wanted).abs().max() < 2e-2
    layer.lora_B["default"].weight.data.zero_()
    assert torch.equal(layer(x), layer.base_layer(x))


def test_one_vector_and_a_second_call_change_nothing(passes):
    net, layer = lora_layer()
    kind, x = type(layer), torch.randn(6)
    assert models.lean_lora(net) == 1 and type(layer) is kind
    assert torch.allclose(layer(x), usual_layer(layer, x), atol=1e-6) and passes


def test_compiled_layers_share_their_code():
    """Ten layers, as many graphs as under PEFT's own classes: Dynamo gives up at eight."""
    from torch._dynamo.testing import CompileCounter

    graphs = []
    for lean in (False, True):
        torch._dynamo.reset()
        counter, config = CompileCounter(), PhiConfig(**{**SHAPE, "num_hidden_layers": 10}, **IDS)
        model = get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(r=2, target_modules=["q_proj", "fc1"]))
        assert not lean or models.lean_lora(model) == 20
        for layer in model.get_base_model().model.layers:
            layer.compile(backend=counter, dynamic=True)
        model(input_ids=torch.arange(5)[None], use_cache=False)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] < 8


def usual_layer(layer, x):
    """What PEFT's own class makes of x."""
    return type(layer).__mro__[2].forward(layer, x)


def lora_layer(**options):
    """One lean layer under an adapter that is not zero, and the model around it."""
    torch.manual_seed(0)
    net = get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(6, 5)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **options)
    )
    assert models.lean_lora(net) == 1
    return net, net.base_model.model[0]


@pytest.mark.parametrize("case", ["off", "merged", "two", "dora", "bias", "another"])
def test_what_is_not_the_plain_sum_goes_pefts_way(case, passes):
    net, layer = lora_layer(**({"use_dora": True} if case == "dora" else {"lora_bias": True} if case == "bias" else {}))
    x = torch.randn(3, 6)
    if case in ("two", "another"):
        net.add_adapter("second", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False))
    if case == "two":
        layer.set_adapter(["default", "second"])
    elif case == "merged":
        layer.merge()
    elif case == "off":
        layer.enable_adapters(False)
    elif case == "another":
        layer.set_adapter("second")
    got = layer(x)
    assert bool(passes) == (case == "another")
    assert torch.allclose(got, usual_layer(layer, x), atol=1e-6)
    assert torch.allclose(got, layer.base_layer(x)) == (case in ("off", "merged"))


def test_rows_that_name_their_adapters_are_pefts_too(passes):
    _, layer = lora_layer()
    x = torch.randn(2, 6)
    got = layer.eval()(x, adapter_names=["default", "__base__"])
    assert not passes and torch.equal(got[1], layer.base_layer(x)[1]) and torch.allclose(got[0], layer(x)[0])
    assert not torch.allclose(got[0], layer.base_layer(x)[0])


def test_dropout_is_not_passed_over(passes):
    net, layer = lora_layer(lora_dropout=0.5)
    x = torch.ones(1, 6)
    assert len({tuple(layer.train()(x)[0].tolist()) for _ in range(20)}) > 5 and passes
    assert len({tuple(layer.eval()(x)[0].tolist()) for _ in range(20)}) == 1


def test_a_policy_is_gone_with_its_last_name():
    """No cycle keeps it in memory until Python happens to look."""
    model, _ = policy()
    gc.collect()
    gc.disable()
    try:
        weight = weakref.ref(trainable(model)[0])
        del model
        assert weight() is None
    finally:
        gc.enable()


# --- what is refused --------------------------------------------------------------------------------------------------


REFUSED = [
    ({"bias": "lora_only"}, "trains bias='lora_only'.*Use bias='none'"),
    ({"modules_to_save": ["lm_head"]}, "saves whole modules.*lm_head"),
]


@pytest.mark.parametrize("change, message", REFUSED)
def test_adapters_that_change_the_reference_are_refused(tmp_path, change, message):
    config = dataclasses.replace(models.lora_config(profile()), **change)
    base = load_base(profile(quantize=False))
    get_peft_model(base, config).save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.raises(ValueError, match=message):
        load_policy(profile(quantize=False), adapter=tmp_path)


@pytest.mark.parametrize("targets", [[*PHI_TARGETS, "Wqkv"], ["fc1", "Wqkv", "out_proj"], ["0.self_attn.q_proj"]])
def test_targets_that_match_half_are_refused(targets):
    with pytest.raises(
        ValueError, match="LoRA should sit on .* but sits on .*layers of .* are q_proj k_proj v_proj dense fc1 fc2: choose"
    ):
        load_policy(profile(target_modules=tuple(targets)))


def test_an_adapter_on_other_modules_than_the_profile_says_is_refused(tmp_path):
    save_adapter(policy(profile(target_modules=("q_proj", "v_proj")))[0], tmp_path)
    with pytest.raises(ValueError, match="should sit on .*'fc1': 4.* but sits on .*'fc1': 0"):
        policy(adapter=tmp_path)
    model, _ = policy()
    with pytest.raises(ValueError, match="'fc1': 4"):
        check_adapter(model, profile(target_modules=("q_proj", "v_proj")))


def test_phi_gets_adapters_on_exactly_its_six_layers():
    model, _ = policy()
    adapted = {n.split(".")[-1] for n, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}
    assert {p.dtype for p in trainable(model)} == {torch.float32} and len(trainable(model)) == 2 * 6 * 4


# --- four bits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluated_before", [False, True])
def test_four_bit_gradients_are_those_of_the_dequantised_model(evaluated_before):
    """Also after an evaluation: CPUs with AVX512-BF16 would repack the weights in it, and gradients would be wrong."""
    model = move(policy()[0])
    if evaluated_before:
        model.eval()
        all_logps(model, ITEMS, **OPTIONS)
    gradients = backward(model.train())
    plain = PeftModel(load_base(profile()).dequantize().requires_grad_(False), models.lora_config(profile()))
    assert not any(isinstance(m, bitsandbytes.nn.Linear4bit) for m in plain.modules())
    with torch.no_grad():
        for ours, theirs in zip(trainable(plain), trainable(model), strict=True):
            ours.copy_(theirs)
    assert all((a - b).norm() <= 1e-5 * b.norm() > 0 for a, b in zip(gradients, backward(plain), strict=True))


def test_the_repacking_of_four_bit_weights_is_disarmed():
    layers = [m for m in policy()[0].modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 6 * 4 and not any(m.support_avx512bf16_for_cpu for m in layers)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_the_plan_for_a_t4_is_stated():
    plan = make_plan(load_profile("phi2"), device="cuda", capability=(7, 5))
    assert (plan.dtype, plan.attention, plan.loss_scale) == (torch.float16, "sdpa_float32", 1024.0)
    assert "compute capability 7.5 has no bfloat16: float16, with attention in float32" in str(plan)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
def test_newer_gpus_run_in_bfloat16_without_a_scale(capability):
    plan = make_plan(load_profile("phi2"), device="cuda", capability=capability)
    assert (plan.dtype, plan.attention, plan.loss_scale, plan.notes) == (torch.bfloat16, "sdpa_blocks", 1.0, ())


def test_without_bitsandbytes_the_plan_says_not_quantised(monkeypatch):
    monkeypatch.setattr(profiles.importlib.util, "find_spec", lambda name: None)
    plan = make_plan(profile())
    assert not plan.quantize and "bitsandbytes is not installed: NOT quantised" in str(plan)
    assert not hasattr(load_base(profile()), "hf_quantizer")


def test_no_gpu_is_stated():
    assert "no GPU: everything runs on the CPU" in str(make_plan(load_profile("phi2"), device="cpu"))


def test_own_model_and_data_get_a_folder_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_RUNS", str(tmp_path))
    assert profiles.run_directory(load_profile("tiny")) == tmp_path / "tiny"
    monkeypatch.setenv("DPO_DATASET", "data/pairs.v2.jsonl")
    assert profiles.run_directory(load_profile("tiny")) == tmp_path / "tiny-pairs.v2"
    monkeypatch.setenv("DPO_MODEL", "org/Phi-1.5")
    assert profiles.run_directory(load_profile("tiny")) == tmp_path / "tiny-Phi-1.5-pairs.v2"


def test_a_path_seen_from_the_repository_is_found_from_its_notebooks(monkeypatch):
    monkeypatch.chdir(profiles.repository_root() / "notebooks")
    monkeypatch.setenv("DPO_DATASET", "dpo_utils/assets/misconceptions.jsonl")
    found = load_profile("tiny").dataset
    assert Path(found).is_absolute() and Path(found).exists()
    for source in ("01_data_prep.ipynb", "org/name", "misconceptions", "nowhere.jsonl"):  # here, or nowhere: as given
        monkeypatch.setenv("DPO_DATASET", source)
        assert load_profile("tiny").dataset == source


def test_the_t4_plan_gives_the_log_probs_of_float32():
    """float16 with attention in float32: what a T4 runs, here on the CPU."""
    half, full = small_model("phi", torch.float16, "sdpa_float32"), small_model("phi", torch.float32)
    ours, theirs = (all_logps(m, ITEMS, pad_id=2, micro_tokens=400, row_tokens=100) for m in (half, full))
    assert torch.isfinite(ours).all() and (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


def test_scores_that_overflow_in_float16_do_not_in_the_t4_plan(monkeypatch):
    """Queries and keys of about 300, as Phi-2's late layers have them: 32 * 300 * 300 is past 65,504."""
    query = torch.full((1, 1, 3, 32), 300.0, dtype=torch.float16)
    value = torch.arange(3.0).half().view(1, 1, 3, 1).expand(1, 1, 3, 32)
    seen, real = [], attention.sdpa_attention_forward
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda m, *qkv, **o: (seen.extend(qkv), real(m, *qkv, **o))[1])
    module = torch.nn.Module()
    module.is_causal, module.training, module.num_key_value_groups = True, False, 1
    out, _ = attention.sdpa_float32(module, query, query, value, None, scaling=1.0)
    assert out.dtype == torch.float16 and out[0, :, 0, 0].tolist() == [0.0, 0.5, 1.0]
    assert {tensor.dtype for tensor in seen[:3]} == {torch.float32}  # some kernels are wide inside, not all
    assert not torch.isfinite(query @ query.mT).any()


# --- saved, loaded, merged --------------------------------------------------------------------------------------------

FRESH = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
model_path, adapter, out = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                            bnb_4bit_compute_dtype=torch.float32)
base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, quantization_config=config,
                                            device_map="cpu")
model = PeftModel.from_pretrained(base, adapter)
assert "dpo_utils" not in sys.modules
for m in model.modules():
    if hasattr(m, "support_avx512bf16_for_cpu"): m.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(model_path)
row = torch.tensor(json.loads(sys.stdin.read()))
with torch.no_grad():
    torch.save(model(input_ids=row).logits, out)
ids = model.generate(input_ids=row[:, :6], max_new_tokens=5, do_sample=False)
print(tokenizer.decode(ids[0]))
"""


def test_a_fresh_process_with_plain_peft_gives_the_same_bits(tmp_path):
    torch.set_num_threads(1)
    model = move(policy()[0])
    save_adapter(model, tmp_path / "adapter")
    row = [[5, 9, 13, 21, 34, 55, 89, 144]]
    command = [sys.executable, "-c", FRESH, profile().model, str(tmp_path / "adapter"), str(tmp_path / "out.pt")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        command, input=json.dumps(row), capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    unfused = policy_without_fused_gelu(tmp_path / "adapter")
    with torch.no_grad():
        ours = unfused(input_ids=torch.tensor(row)).logits
        fused = model(input_ids=torch.tensor(row)).logits
    theirs = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(ours, theirs) and done.stdout.strip()
    assert (fused - theirs).abs().max() < 1e-4


def policy_without_fused_gelu(adapter):
    """The fresh process has transformers' own GELU; `fuse_gelu` changes the last bits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "fuse_gelu", lambda model: 0)
        return load_policy(profile(), adapter=adapter)[0]


def test_a_reloaded_adapter_gives_the_same_log_probs_to_the_bit(tmp_path):
    model = move(policy()[0])
    save_adapter(model, tmp_path)
    again, _ = policy(adapter=tmp_path)
    assert torch.equal(all_logps(again, ITEMS, **OPTIONS), all_logps(model, ITEMS, **OPTIONS))
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.safetensors"}


def test_the_same_adapter_is_the_same_files_whatever_the_hash_seed(tmp_path):
    save_adapter(policy()[0], tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(PHI_TARGETS)


def test_a_merged_model_stays_close(tmp_path):
    model, tokenizer = policy()
    save_adapter(move(model), tmp_path / "adapter")
    models.merge_and_save(profile(), tmp_path / "adapter", tmp_path / "merged")
    merged = load_base(profile(model=str(tmp_path / "merged"), quantize=False))
    rows, _ = tokenize_all(pairs(), tokenizer, 128)
    items = [as_item(row) for row in rows]
    ours, theirs = (all_logps(m, items, **options_for(profile(), tokenizer)) for m in (model, merged))
    assert (ours - theirs).abs().max() < 1e-3


# --- loading ----------------------------------------------------------------------------------------------------------


def resident() -> int:
    """Bytes this process holds in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_loading_three_times_does_not_grow_memory():
    sizes = []
    for _ in range(4):
        model, tokenizer = policy()
        del model, tokenizer
        gc.collect()
        sizes.append(resident())
    assert sizes[-1] < 1.05 * sizes[0]


def test_a_model_that_is_not_there_is_one_line_with_the_remedy():
    with pytest.raises(OSError) as problem:
        load_policy(profile(model="nobody/nothing", revision="a" * 40))
    message = str(problem.value)
    assert "cannot get 'nobody/nothing'" in message and "DPO_PROFILE=tiny" in message and "\n" not in message


def test_only_safetensors_are_loaded(tmp_path):
    folder = shutil.copytree(profile().model, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_base(profile(model=str(folder)))


def test_a_missing_adapter_says_which_notebook_makes_it(tiny, tmp_path):
    for call in (lambda: models.load_policy(tiny, adapter=tmp_path), lambda: models.merge_and_save(tiny, tmp_path, tmp_path)):
        with pytest.raises(FileNotFoundError, match="notebook 02 makes sft"):
            call()
