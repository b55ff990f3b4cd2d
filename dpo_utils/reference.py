"""The reference's log-probs: computed once, and kept under a key of all that they depend on."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from dpo_utils.checkpoints import (
    digest,
    newest_checkpoint,
    read_tensors,
    require_same,
    write_tensors,
)
from dpo_utils.logps import all_logps, options_for
from dpo_utils.models import as_reference

SETTINGS = "steps batch learning_rate warmup max_grad_norm seed target_modules lora_r lora_alpha"
DPO_SETTINGS = " beta loss label_smoothing"
_SCORED = {}  # log-probs of this process for runs without a folder


def reference_key(model, tokenizer, items, profile) -> dict:
    """Everything that the reference's log-probs depend on; the weights take a second a gigabyte."""
    fixed = {}
    for name, value in model.named_parameters():
        if ".default." not in name:  # the policy's adapter is what training changes
            scales = value.quant_state.as_dict(packed=True) if hasattr(value, "quant_state") else {}
            fixed |= {name: value} | {f"{name} {part}": scale for part, scale in scales.items()}
    return {
        "data": digest(items),
        "tokenizer": digest(sorted(tokenizer.get_vocab().items())),
        "template": digest(tokenizer.chat_template or "plain"),
        "model": Path(profile.model).name if Path(profile.model).is_dir() else profile.model,
        "revision": profile.revision,
        "dtype": str(model.dtype),
        "quantised": bool(getattr(model, "is_loaded_in_4bit", False)),
        "weights": digest(fixed),
        "max_length": profile.max_length,
    }


def reference_logps(model, tokenizer, items, profile, output=None, fresh=False, plain=None):
    """Log-probs of all items under the reference, (items, completions), on the CPU.

    Cached in `output`, or in this process without one, under a key of all that they depend on;
    raises SettingsChanged if the file has another key. Several processes share the work. plain: as
    in `completion_logps`.
    """
    options = options_for(profile, tokenizer) | {"plain": plain}
    key = reference_key(model, tokenizer, items, profile)
    path, known_by = output and Path(output) / "reference.safetensors", str((key, options))
    if path and not fresh and (cached := read_tensors(path)):
        require_same(cached[1], key, path)
        return cached[0]["logps"]
    if not path and not fresh and known_by in _SCORED:
        return _SCORED[known_by].clone()
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    mine = range(accelerator.process_index, len(items), accelerator.num_processes)
    logps = torch.zeros(len(items), len(items[0][1]), dtype=torch.float64)
    if mine:
        with as_reference(model):
            logps[mine] = all_logps(model, [items[i] for i in mine], **options)
    logps = accelerator.reduce(logps.to(accelerator.device), reduction="sum").cpu()
    if path is None:
        _SCORED[known_by] = logps.clone()
    elif accelerator.is_main_process:
        write_tensors(path, {"logps": logps}, key)
    return logps


def run_key(run, tokenizer) -> dict:
    """Everything that the numbers of a `train.Run` depend on, as JSON gives it back."""
    names = (SETTINGS + ("" if run.task.stage == "sft" else DPO_SETTINGS)).split()
    settings = {name: getattr(run.profile, name) for name in names}
    settings |= {"stage": run.task.stage, "loss_options": run.task.settings}
    reference = reference_key(run.model, tokenizer, run.task.items, run.profile)
    return json.loads(json.dumps(settings | reference))


def require_settings(folder, profile) -> None:
    """Raise SettingsChanged if the run in `folder` has other settings than the profile's.

    Only what the profile says is compared: data and weights are when the run is opened.
    """
    if saved := newest_checkpoint(folder):
        key, ours = saved[1]["key"], vars(profile)
        if key["stage"] == "sft":
            ours = ours | {n: ours[f"sft_{n}"] for n in ("steps", "batch", "learning_rate")}
        names = [name for name in SETTINGS.split() + DPO_SETTINGS.split() if name in key]
        ours = json.loads(json.dumps({name: ours[name] for name in names}))
        require_same({name: key[name] for name in names}, ours, folder)
