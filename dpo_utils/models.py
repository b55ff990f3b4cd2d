"""The frozen base model, the LoRA adapter that is trained, and the reference."""

import contextlib
import functools
import warnings
from pathlib import Path

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from dpo_utils.adapters import base_of, check_adapter, check_sizes, lora_config
from dpo_utils.profiles import Profile, make_plan, require_adapter

REFERENCE = "reference"  # the frozen adapter that holds the reference, where the base is not it
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
    except (ImportError, ValueError) as problem:  # of a kind or a quantisation that is not known
        raise ValueError(f"cannot load {profile.model}: {str(problem).splitlines()[0]}") from None
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
    own = (Path(profile.model) / "tokenizer_config.json").exists()
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, profile if own else base_of(profile)[0])
    if tokenizer.eos_token_id is None:
        remedy = "set tokenizer.eos_token, with which answers end"
        raise ValueError(f"the tokenizer of {profile.model} has no EOS token: {remedy}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(profile: Profile, quantize: bool | None = None):
    """The frozen base model without dropout, as `make_plan` says; `quantize` overrides it.

    Weights that were saved quantised stay so. Of an adapter, this is the base.
    """
    profile, plan = base_of(profile)[0], make_plan(profile)
    config = _from_hub(AutoConfig.from_pretrained, profile)
    quantize = plan.quantize if quantize is None else quantize
    quantize = quantize and not hasattr(config, "quantization_config")
    options = {"quantization_config": quantisation_config(plan.dtype)} if quantize else {}
    options |= {"dtype": plan.dtype, "device_map": {"": plan.device}, "use_safetensors": True}
    sees = type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING  # and reads and writes
    kind = f"AutoModelFor{'ImageTextToText' if sees else 'CausalLM'}"
    model = _from_hub(getattr(transformers, kind).from_pretrained, profile, **options)
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
            module.compute_dtype = model.dtype  # not what a saved checkpoint was made with


def turn_dropout_off(model) -> None:
    """Set every dropout rate to zero, in modules and in the numbers that layers and config keep.

    Routers that jitter never leave eval mode: in one of them the number also shapes the routing.
    """
    config = getattr(model, "config", None)
    for part in (*model.modules(), *([config, config.get_text_config()] if config else ())):
        rates = [name for name, x in vars(part).items() if "drop" in name and isinstance(x, float)]
        for name in [*rates, *(["p"] if isinstance(part, _DropoutNd) else [])]:
            setattr(part, name, 0.0)
        if isinstance(part, nn.Module) and any("jitter" in name for name in vars(part)):
            part.__class__ = _calm(type(part))


@functools.cache
def _calm(kind: type) -> type:
    return type(kind.__name__, (kind,), {"training": property(lambda _: False, lambda *_: None)})


def load_policy(profile: Profile, adapter=None, reference=None, quantize: bool | None = None):
    """(model, tokenizer): the base with a trainable adapter, and the reference inside it.

    adapter: folder of a saved adapter to go on from, by default the profile's model where that is
    one; None starts a fresh one, with the base's output. reference: folder of the adapter that is
    the reference, by default `adapter`, as DPO starts from it; without either it is the base
    itself. Raises ValueError for an adapter that `check_adapter` refuses and where tokenizer or
    max_length go beyond the model, FileNotFoundError for a folder without an adapter.
    """
    adapter = adapter or base_of(profile)[1]
    reference = reference or adapter
    require_adapter(adapter)
    require_adapter(reference)
    base, tokenizer = load_base(profile, quantize), load_tokenizer(profile)
    check_sizes(base, tokenizer, profile)
    if adapter:
        try:
            model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        except RuntimeError as problem:  # shapes
            raise ValueError(f"{adapter} is not an adapter of {base.name_or_path}") from problem
    else:
        torch.manual_seed(profile.seed)
        model = get_peft_model(base, lora_config(profile, base))
    check_adapter(model, profile)
    if reference:
        model.load_adapter(reference, adapter_name=REFERENCE, is_trainable=False)
        model.set_adapter("default")
        check_adapter(model, profile)
    turn_dropout_off(model)  # again, for the adapters' own
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, tokenizer


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
