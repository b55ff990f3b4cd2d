"""Base model, adapters, and the reference: what is loaded, what is trained, what stays."""

import contextlib
import functools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.activations import NewGELUActivation
from transformers.pytorch_utils import Conv1D

from dpo_utils import attention
from dpo_utils.profiles import Profile, make_plan

REFERENCE = "reference"  # name of the frozen adapter that holds the reference, where the base alone is not it


def quantisation_config(dtype):
    """NF4 with double quantisation, as in QLoRA (Dettmers et al. 2023)."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _from_hub(load, source: str, revision: str | None, **options):
    """Call a `from_pretrained`; where the source cannot be had, say in one line what to do."""
    try:
        return load(source, revision=revision, trust_remote_code=False, **options)
    except OSError as problem:
        if Path(source).exists():
            raise
        raise OSError(
            f"cannot get {source!r} (revision {revision or 'latest'}): it is neither a local directory nor cached, and "
            "the hub did not answer. Connect once, set DPO_MODEL to a local directory, or use DPO_PROFILE=tiny."
        ) from problem


def load_tokenizer(profile: Profile):
    """The profile's tokenizer; pad falls back to EOS (safe here: masks come from lengths, never from ids)."""
    tokenizer = _from_hub(AutoTokenizer.from_pretrained, profile.model, profile.revision)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {profile.model} has no EOS token: set tokenizer.eos_token, answers end with it")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(profile: Profile, quantize: bool | None = None):
    """The frozen base model as `make_plan` says; `quantize` overrides the plan. Dropout is off for good."""
    plan = make_plan(profile)
    quantize = plan.quantize if quantize is None else quantize
    model = _from_hub(
        AutoModelForCausalLM.from_pretrained,
        profile.model,
        profile.revision,
        dtype=plan.dtype,
        quantization_config=quantisation_config(plan.dtype) if quantize else None,
        device_map={"": plan.device},
        use_safetensors=True,
    )
    attention.use(model, plan.attention)
    disarm_cpu_repacking(model)
    turn_dropout_off(model)
    fuse_gelu(model)
    model.config.use_cache = True
    return model.requires_grad_(False)


def disarm_cpu_repacking(model) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for CPU inference: gradients are wrong after it (AVX512-BF16)."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def turn_dropout_off(model) -> None:
    """Set every dropout rate to zero, in modules and in the numbers that attention layers keep for themselves."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def fuse_gelu(model) -> int:
    """Replace `gelu_new` by PyTorch's own tanh GELU: the same function in one kernel. Returns how many there were."""
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
                count += 1
    return count


class LeanLora:
    """Mixed into PEFT's LoRA layers: W x + s B A x in one pass over the outputs (`addmm`), where PEFT takes three.

    What is not that sum (the adapter off or merged, several at once, DoRA and the like) goes PEFT's own way.
    """

    def forward(self, x, *args, **kwargs):
        """x: (..., in) -> (..., out), in the base layer's type; the sum in the wider of its and the adapter's."""
        name, *more = self.active_adapters or [None]
        plain = name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
        if args or kwargs or more or not plain or self.disable_adapters or self.merged:
            return super().forward(x, *args, **kwargs)
        a, b = self.lora_A[name].weight, self.lora_B[name].weight  # (r, in), (out, r)
        base = self.base_layer(x)
        low = F.linear(self.lora_dropout[name](x.to(a.dtype)), a) * self.scaling[name]  # (..., r)
        wide = torch.promote_types(base.dtype, a.dtype)
        base_rows, low_rows = (t.reshape(-1, t.shape[-1]).to(wide) for t in (base, low))
        return torch.addmm(base_rows, low_rows, b.T.to(wide)).view(base.shape).to(base.dtype)


@functools.cache
def _lean(kind: type) -> type:
    """One class for all layers of a kind: compiled code is made once for them all."""
    return kind if issubclass(kind, LeanLora) else type(kind.__name__, (LeanLora, kind), {})


def lean_lora(model) -> int:
    """Make the LoRA layers on linear layers lean, in place. Returns how many there are."""
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and isinstance(m.get_base_layer(), (nn.Linear, Conv1D))]
    for layer in layers:
        layer.__class__ = _lean(type(layer))
    return len(layers)


def load_policy(profile: Profile, adapter=None, reference=None, quantize: bool | None = None):
    """(model, tokenizer): the base with a trainable adapter, and the reference it is compared with.

    adapter: directory of a saved adapter to go on from; None starts a fresh one, whose output is the base's.
    reference: directory of the adapter that is the reference; by default `adapter`, as DPO starts from it. Without
    either, the reference is the base itself (adapter off).
    Raises ValueError for adapters that would break "adapter off is the reference" and for targets that match nothing,
    FileNotFoundError for a directory (as a Path) without an adapter.
    """
    reference = reference or adapter
    _require_adapter(adapter)
    _require_adapter(reference)
    base = load_base(profile, quantize)
    if adapter:
        model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    else:
        torch.manual_seed(profile.seed)
        model = get_peft_model(base, lora_config(profile))
    _check_configs(model)
    if reference:
        model.load_adapter(reference, adapter_name=REFERENCE, is_trainable=False)
        model.set_adapter("default")
    turn_dropout_off(model)  # again, for the adapters' own
    lean_lora(model)
    check_adapter(model, profile)
    if profile.gradient_checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if profile.compile_layers:
        for layer in _layers(base):
            layer.compile(dynamic=True)
    return model, load_tokenizer(profile)


def _require_adapter(folder) -> None:
    folder = Path(folder) if folder and Path(folder).is_dir() else folder
    if isinstance(folder, Path) and not (folder / "adapter_config.json").exists():
        inside = (folder / "adapter" / "adapter_config.json").exists()
        remedy = f"did you mean {folder / 'adapter'}?" if inside else "make it first (notebook 02 makes sft, notebook 04 dpo)"
        raise FileNotFoundError(f"no adapter in {folder}: {remedy}")


def lora_config(profile: Profile) -> LoraConfig:
    """Adapters on the profile's target modules; no bias, no dropout, nothing else trained."""
    return LoraConfig(
        r=profile.lora_r,
        lora_alpha=profile.lora_alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(profile.target_modules),
        revision=profile.revision,
    )


def _layers(base):
    return max((m for m in base.modules() if isinstance(m, nn.ModuleList)), key=len)


def _check_configs(model) -> None:
    """Refuse adapters that change more than switching them off takes back: bias or whole modules."""
    for name, config in model.peft_config.items():
        if config.bias != "none":
            raise ValueError(
                f"adapter {name!r} trains bias={config.bias!r}: switching it off would not give the reference. Use bias='none'."
            )
        if config.modules_to_save:
            raise ValueError(
                f"adapter {name!r} saves whole modules {config.modules_to_save}: the reference would change with them."
            )


def check_adapter(model, profile: Profile) -> None:
    """Refuse what would silently break the run: targets that match half, weights trained beside the adapter."""
    _check_configs(model)
    adapted = [n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    layers = len(_layers(model.get_base_model()))
    wanted = dict.fromkeys(profile.target_modules, layers)
    found = {name: adapted.count(name) for name in [*wanted, *adapted]}
    if found != wanted:
        raise ValueError(
            f"LoRA should sit on {wanted} but sits on {found}. The linear layers of {profile.model} are "
            f"{' '.join(_linear_names(model))}: choose among them with setup(target_modules=(...)) or --target-modules, or "
            "DPO_PROFILE=smollm2 for models like Llama."
        )
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".default." not in name or parameter.dtype != torch.float32):
            raise ValueError(f"{name} is trainable as {parameter.dtype}: only the adapter's float32 weights should be")


def _linear_names(model) -> list[str]:
    """Short names of the linear layers in one of the model's blocks, adapted or not."""
    block = _layers(model.get_base_model())[0]
    linear = (nn.Linear, Conv1D, BaseTunerLayer)
    names = [name for name, module in block.named_modules() if isinstance(module, linear)]
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names if "lora_" not in name and "base_layer" not in name))


@contextlib.contextmanager
def as_reference(model):
    """Inside, the model is the reference: its frozen reference adapter if it has one, else the base alone."""
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


def save_adapter(model, directory) -> None:
    """The policy's adapter in PEFT's format (safetensors); the same adapter gives the same bytes."""
    model.save_pretrained(directory, selected_adapters=["default"], save_embedding_layers=False)
    path = Path(directory) / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set: its order changes from run to run
    path.write_text(json.dumps(config, indent=2) + "\n")


def merge_and_save(profile: Profile, adapter, output) -> None:
    """One plain model with the adapter merged in, and its tokenizer, in `output`.

    A 4-bit base is dequantised first and the adapter merged into *that*: merging into the original weights would
    shift the outputs by the quantisation error the adapter was trained around.
    """
    _require_adapter(adapter)
    base = load_base(profile)
    if getattr(base, "is_loaded_in_4bit", False):
        base = base.dequantize()
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(output)
    load_tokenizer(profile).save_pretrained(output)
