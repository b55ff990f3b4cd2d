"""The way out: an adapter in PEFT's format, or one plain model with the adapter merged in."""

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel

from dpo_utils.adapters import require_adapter
from dpo_utils.models import load_base, load_tokenizer
from dpo_utils.profiles import Profile


def save_adapter(model, folder: Path) -> None:
    """The policy's adapter in PEFT's format (safetensors), written aside and moved file by file.

    The same adapter gives the same bytes.
    """
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, selected_adapters=["default"], save_embedding_layers=False)
    path = aside / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):  # a set in PEFT: without an order
        config["target_modules"].sort()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for path in aside.iterdir():
        os.replace(path, folder / path.name)
    aside.rmdir()


def merge_and_save(profile: Profile, adapter, output) -> None:
    """One plain model with the adapter merged in, and its tokenizer, in the folder `output`.

    A 4-bit base is dequantised first and the adapter merged into *that*: the original weights would
    shift the outputs by the quantisation error that the adapter was trained around.
    """
    require_adapter(adapter)
    base = load_base(profile)
    if four_bits := getattr(base, "is_loaded_in_4bit", False):
        base = base.dequantize()
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    merged.save_pretrained(output, save_original_format=not four_bits)  # which would be NF4
    load_tokenizer(profile).save_pretrained(output)
