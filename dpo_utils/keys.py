"""What a run is known by: everything its numbers depend on, compared before anything on disk is used again."""

import hashlib
import json

import torch

SETTINGS = "target_modules lora_r lora_alpha warmup max_grad_norm seed".split()
DPO_SETTINGS = "beta loss label_smoothing".split()


def _hash(*parts) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()[:16]


def weights_hash(model) -> str:
    """Names, shapes and every byte of all weights that are not trained: base, its NF4 scales, the reference adapter.

    About a second a gigabyte.
    """
    total = hashlib.sha256()
    for name, value in model.named_parameters():
        if ".default." in name:  # the policy's adapter is what training changes
            continue
        scales = value.quant_state.as_dict(packed=True) if getattr(value, "quant_state", None) else {}
        for part, tensor in ({"": value.detach()} | scales).items():
            total.update(f"{name} {part} {list(tensor.shape)}".encode())
            total.update(tensor.flatten().cpu().contiguous().view(torch.uint8).numpy())
    return total.hexdigest()[:16]


def reference_key(model, tokenizer, items, profile) -> dict:
    """Everything the reference's log-probs depend on."""
    return {
        "data": _hash(items),
        "tokenizer": _hash(sorted(tokenizer.get_vocab().items())),
        "template": _hash(tokenizer.chat_template or "plain"),
        "model": profile.model,
        "revision": profile.revision,
        "dtype": str(model.dtype),
        "quantised": bool(getattr(model, "is_loaded_in_4bit", False)),
        "weights": weights_hash(model),
        "max_length": profile.max_length,
    }


def run_key(model, tokenizer, task, profile, **more) -> dict:
    """Everything the numbers of a run of `task` (`step.Task`) depend on, as JSON would give it back."""
    names = SETTINGS + ([] if task.stage == "sft" else DPO_SETTINGS)
    key = {
        **{name: getattr(profile, name) for name in names},
        **reference_key(model, tokenizer, task.items, profile),
        **{name: getattr(task, name) for name in ("stage", "steps", "batch", "learning_rate")},
        **more,
    }
    return json.loads(json.dumps(key))
