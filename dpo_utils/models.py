"""The frozen base model, the LoRA adapter that is trained, and the reference it is compared
with.
"""

import contextlib
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.pytorch_utils import Conv1D

from dpo_utils.profiles import Profile, make_plan, require_adapter

REFERENCE = "reference"  # the frozen adapter that holds the reference, where the base is not it
LINEAR = (nn.Linear, Conv1D)
# Model types of which a test shows that another name of the attention changes only the arithmetic.
SDPA_MODELS = "gpt2 gpt_neox llama mistral olmo2 phi phi3 qwen2 qwen3 smollm3".split()


def in_float32(attend):
    """An attention function with its scores in float32: Phi-2's overflow in float16."""

    def attend_in_float32(module, query, key, value, mask, **options):
        out, weights = attend(module, query.float(), key.float(), value.float(), mask, **options)
        return out.to(query.dtype), weights

    return attend_in_float32


AttentionInterface.register("sdpa_float32", in_float32(sdpa_attention_forward))
AttentionMaskInterface.register("sdpa_float32", sdpa_mask)


def tolerance(dtype) -> float:
    """By how much two batchings of the same log-probs may differ, relative to 1 + their size."""
    return 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2


def quantisation_config(dtype) -> BitsAndBytesConfig:
    """NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023)."""
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    return BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)


def _from_hub(load, profile: Profile, **options):
    """Call a `from_pretrained`; if the model cannot be had, say in one line what to do."""
    try:
        return load(profile.model, revision=profile.revision, trust_remote_code=False, **options)
    except OSError as problem:
        if Path(profile.model).exists():
            raise
        raise OSError(
            f"cannot get {profile.model!r} (revision {profile.revision or 'latest'}): no such "
            "local directory, not cached, and the hub did not answer. Connect once, set DPO_MODEL "
            "to a local directory, or use DPO_PROFILE=tiny."
        ) from problem


def load_tokenizer(profile: Profile):
    """The profile's tokenizer. Without a pad token it pads with EOS: masks never come from ids."""
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, profile)
    if tokenizer.eos_token_id is None:
        remedy = "set tokenizer.eos_token, with which answers end"
        raise ValueError(f"the tokenizer of {profile.model} has no EOS token: {remedy}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(profile: Profile, quantize: bool | None = None):
    """The frozen base model without dropout, as `make_plan` says; `quantize` overrides it."""
    plan = make_plan(profile)
    quantize = plan.quantize if quantize is None else quantize
    options = {"quantization_config": quantisation_config(plan.dtype)} if quantize else {}
    options |= {"dtype": plan.dtype, "device_map": {"": plan.device}, "use_safetensors": True}
    model = _from_hub(AutoModelForCausalLM.from_pretrained, profile, **options)
    config = model.config.get_text_config()
    if config.model_type in SDPA_MODELS and config._attn_implementation == "sdpa":
        model.set_attn_implementation(plan.attention)
    elif plan.attention != "sdpa":
        own = f"{config.model_type} keeps its own attention ({config._attn_implementation})"
        warnings.warn(f"{own}: its scores are in float16 and may overflow", stacklevel=2)
    disarm_cpu_repacking(model)
    turn_dropout_off(model)
    return model.requires_grad_(False)


def disarm_cpu_repacking(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on CPUs: later gradients would be wrong."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def turn_dropout_off(model) -> None:
    """Set every dropout rate to zero, in modules and in the numbers that attention layers keep."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def load_policy(profile: Profile, adapter=None, reference=None, quantize: bool | None = None):
    """(model, tokenizer): the base with a trainable adapter, and the reference inside it.

    adapter: folder of a saved adapter to go on from; None starts a fresh one, with the base's
    output. reference: folder of the adapter that is the reference, by default `adapter`, as DPO
    starts from it; without either it is the base itself. Raises ValueError for an adapter that
    `check_adapter` refuses, FileNotFoundError for a folder without one.
    """
    reference = reference or adapter
    require_adapter(adapter)
    require_adapter(reference)
    base = load_base(profile, quantize)
    if adapter:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        torch.manual_seed(profile.seed)
        model = get_peft_model(base, lora_config(profile))
    check_adapter(model, profile)
    if reference:
        model.load_adapter(reference, adapter_name=REFERENCE, is_trainable=False)
        model.set_adapter("default")
        check_adapter(model, profile)
    turn_dropout_off(model)  # again, for the adapters' own
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, load_tokenizer(profile)


def lora_config(profile: Profile) -> LoraConfig:
    """Adapters on the profile's target modules; no bias, no dropout, nothing else trained."""
    shape = {"r": profile.lora_r, "lora_alpha": profile.lora_alpha, "revision": profile.revision}
    nothing_else = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    return LoraConfig(target_modules=list(profile.target_modules), **shape, **nothing_else)


def _layers(base) -> nn.ModuleList:
    return max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len)


def check_adapter(model, profile: Profile) -> None:
    """Refuse with ValueError what would silently break the run.

    That is an adapter that switching off does not take back, a target that some layers lack, and a
    weight that is trained next to the adapter.
    """
    for name, config in model.peft_config.items():
        if config.bias != "none" or config.modules_to_save:
            more = f"bias={config.bias!r} and modules_to_save={config.modules_to_save}"
            what = f"adapter {name!r} trains {more}: switched off, it would not give the reference"
            raise ValueError(f"{what}. Use bias='none' and no modules_to_save.")
    modules = [(name.rsplit(".", 1)[-1], module) for name, module in model.named_modules()]
    adapted = [name for name, module in modules if "default" in getattr(module, "lora_A", ())]
    layers = _layers(model.get_base_model())
    wanted = dict.fromkeys(profile.target_modules, len(layers))
    found = {name: adapted.count(name) for name in [*wanted, *adapted]}
    if found != wanted:
        kinds, block = (*LINEAR, BaseTunerLayer), layers[0].named_modules()
        linear = (name.split(".lora_")[0] for name, module in block if isinstance(module, kinds))
        linear = (name.removesuffix(".base_layer").rsplit(".", 1)[-1] for name in linear)
        names = " ".join(dict.fromkeys(linear))
        raise ValueError(
            f"LoRA should be on {wanted} but is on {found}. The linear layers of {profile.model} "
            f"are {names}: choose with setup(target_modules=(...)) or --target-modules."
        )
    for name, weight in model.named_parameters():
        if weight.requires_grad and (".default." not in name or weight.dtype != torch.float32):
            only = "only the adapter's float32 weights should be"
            raise ValueError(f"{name} is trainable as {weight.dtype}: {only}")


@contextlib.contextmanager
def as_reference(model):
    """Inside, the model is the reference: its reference adapter if it has one, else the base."""
    if REFERENCE not in model.peft_config:
        with model.disable_adapter():
            yield model
        return
    model.base_model.set_adapter(REFERENCE, inference_mode=True)
    try:
        yield model
    finally:
        model.base_model.set_adapter("default")


def unwrap(model):
    """The Hugging Face model inside a PEFT model, adapters still in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trainable(model) -> list[nn.Parameter]:
    """The parameters that are trained, in the model's order."""
    return [p for p in model.parameters() if p.requires_grad]
