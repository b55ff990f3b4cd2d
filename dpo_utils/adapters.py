"""LoRA adapters: where they sit in a model, and which are refused before anything is trained."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils.peft_utils import find_adapter_config_file

from dpo_utils.profiles import Profile
from dpo_utils.tokens import encode_completion, encode_prompt

LINEAR = (nn.Linear, Conv1D)
# A target module that is no name: PEFT's own.
PATTERN = re.compile(r"^all-linear$|[*+?|()\[\]\\^$]")


def base_of(profile: Profile) -> tuple[Profile, str | None]:
    """The profile with its base model, and the adapter: its model, where that is an adapter."""
    found = find_adapter_config_file(profile.model, revision=profile.revision)
    if not found:
        return profile, None
    config = json.loads(Path(found).read_text(encoding="utf-8"))
    base = {"model": config["base_model_name_or_path"], "revision": config.get("revision")}
    return replace(profile, **base), profile.model


def lora_config(profile: Profile, base=None) -> LoraConfig:
    """Adapters on the profile's target modules; no bias, no dropout, nothing else trained.

    base: the model, to leave alone what is not its language model, such as a vision tower.
    """
    targets = list(profile.target_modules)
    shape = {"r": profile.lora_r, "lora_alpha": profile.lora_alpha, "revision": profile.revision}
    nothing_else = {"task_type": "CAUSAL_LM", "lora_dropout": 0.0, "bias": "none"}
    if base is not None and base.config.get_text_config() is not base.config:
        nothing_else["exclude_modules"] = f"(?!{re.escape(_language_model(base))}).*"
    targets = targets[0] if PATTERN.search(targets[0]) else targets
    return LoraConfig(target_modules=targets, **shape, **nothing_else)


def _language_model(base) -> str:
    decoder = base.get_decoder()
    return next(n and n + "." for n, module in base.named_modules() if module is decoder)


def check_adapter(model, profile: Profile) -> None:
    """Refuse with ValueError what would silently break the run.

    That is an adapter that switching off does not take back, a target without layers, layers of a
    target that are left out without the adapter's saying so, others than the targets, and a weight
    that is trained next to the adapter.
    """
    for name, config in model.peft_config.items():
        bias, saved = getattr(config, "bias", "none"), getattr(config, "modules_to_save", None)
        if bias != "none" or saved:
            more = f"bias={bias!r} and modules_to_save={saved}"
            what = f"adapter {name!r} trains {more}: switched off, it would not give the reference"
            raise ValueError(f"{what}. Use bias='none' and no modules_to_save.")
    base = model.get_base_model()
    kinds, start = (*LINEAR, BaseTunerLayer), _language_model(base)
    inside = re.compile(r"\.(base_layer|lora_\w+)(\.|$)")
    named = [(n, module) for n, module in base.named_modules() if not inside.search(n)]
    linear = [n for n, module in named if isinstance(module, kinds) and n.startswith(start)]
    adapted = {n for n, module in named if "default" in getattr(module, "lora_A", ())}
    targets = {t: {n for n in linear if _fits(t, n)} for t in profile.target_modules}
    others, config = adapted.difference(*targets.values()), model.peft_config["default"]
    some = [getattr(config, name, None) for name in ("layers_to_transform", "exclude_modules")]
    some = some != [None, None] or isinstance(config.target_modules, str)  # as its maker chose
    whole = all(names <= adapted or some for names in targets.values())
    if others or not whole or not all(names & adapted for names in targets.values()):
        wanted = {target: len(names) or 1 for target, names in targets.items()}
        found = {target: len(names & adapted) for target, names in targets.items()}
        found |= Counter(n.rpartition(".")[2] for n in others)
        names = " ".join(dict.fromkeys(n.rpartition(".")[2] for n in linear))
        raise ValueError(
            f"LoRA should be on {wanted} but is on {found}. The linear layers of {profile.model} "
            f"are {names}: choose with setup(target_modules=(...)) or --target-modules."
        )
    for name, weight in model.named_parameters():
        if weight.requires_grad and (".default." not in name or weight.dtype != torch.float32):
            only = "only the adapter's float32 weights should be"
            raise ValueError(f"{name} is trainable as {weight.dtype}: {only}")


def _fits(target: str, name: str) -> bool:
    """Whether a layer is a target's; the name of a single one stands for those of all layers."""
    if target == "all-linear" or PATTERN.search(target):
        return target == "all-linear" or bool(re.fullmatch(target, name))
    return f".{name}".endswith("." + re.sub(r".*\b\d+\.", "", target))


def check_sizes(base, tokenizer, profile: Profile) -> None:
    """Refuse with ValueError tokens without an embedding, and max_length above the positions."""
    rows, places = base.get_input_embeddings().num_embeddings, base.config.get_text_config()
    places = getattr(places, "max_position_embeddings", None) or profile.max_length
    ids = [*encode_prompt("?", tokenizer), *encode_completion("!", tokenizer)]
    if max(*ids, tokenizer.pad_token_id) >= rows:
        sizes = f"the tokenizer has {len(tokenizer)} tokens, {profile.model} only {rows}"
        raise ValueError(f"{sizes}: save it after model.resize_token_embeddings(len(tokenizer))")
    if profile.max_length > places:
        sizes = f"max_length is {profile.max_length}, but {profile.model} has {places} positions"
        raise ValueError(f"{sizes}: set max_length to {places} or less")
