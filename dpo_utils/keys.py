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
    """Names, shapes and a sample of the values of all weights that are not trained: base and reference adapter.

    Enough to tell two models apart, in milliseconds; a change of a few single values may escape it.
    """
    parts = []
    for name, value in model.named_parameters():
        if ".default." in name:  # the policy's adapter is what training changes
            continue
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 256)].cpu().contiguous()
        parts += [name, list(value.shape), sample.view(torch.uint8).numpy().tobytes()]
    return _hash(*parts)


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
