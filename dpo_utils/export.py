"""The way out: an adapter with its model card, one plain model, and either of them on the hub."""

import json
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from dpo_utils.profiles import ASSETS, PINS, Profile, require_adapter

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
LICENCES = {"microsoft/phi-2": "mit", "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0"}
LICENCES[str(ASSETS / "tiny")] = "apache-2.0"
GOES = "README.md *config.json *model*.safetensors *.index.json tokenizer* chat_template.jinja"
PATH = re.compile(r"(?<![\w/.<])(/[\w.~-]+){2,}|(?<!\w)[A-Z]:[\\/]+\w|~/\w")  # absolute, any system


def save_adapter(model, folder: Path) -> None:
    """The policy's adapter in PEFT's format, written aside; the same adapter, the same bytes."""
    aside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside, selected_adapters=["default"], save_embedding_layers=False)
    path = aside / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config["target_modules"], list):  # a set in PEFT: without an order
        config["target_modules"].sort()
    if Path(base := config["base_model_name_or_path"]).exists():
        config["base_model_name_or_path"] = str(Path(base).resolve())  # found from anywhere
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    folder.mkdir(exist_ok=True)
    for path in aside.iterdir():
        os.replace(path, folder / path.name)
    aside.rmdir()


def write_card(run, key: dict, folder: Path) -> None:
    """README.md of a `train.Run` known by `key`: local models and data by their last name only."""
    names, hub, of = [], [], "sft_dataset" if run.task.stage == "sft" else "dataset"
    for field in ("model", of):
        source, commit = getattr(run.profile, field), getattr(run.profile, PINS[field])
        public = HUB_ID.fullmatch(source) and not Path(source).exists()
        hub.append(source if public else None)
        names.append((hub[-1] or Path(source).name) + (f" @ {commit}" if commit else ""))
    options = {"base_model": hub[0], "datasets": hub[1], "tags": [run.task.stage, "lora"]}
    options |= {"library_name": "peft", "license": LICENCES.get(run.profile.model, "unknown")}
    values = {"template_path": ASSETS / "model_card.md", "run": run, "key": key, "names": names}
    ModelCard.from_template(ModelCardData(**options), **values).save(folder / "README.md")


def merge_and_save(profile: Profile, adapter, output) -> None:
    """One plain model with the adapter merged in, its tokenizer and card, in the folder `output`.

    A 4-bit base is dequantised first and the adapter merged into *that*: the original weights would
    shift the outputs by the quantisation error that the adapter was trained around. Raises
    FileNotFoundError without an adapter, ValueError if it does not fit the profile's model.
    """
    require_adapter(adapter)
    from peft import PeftModel  # here, since a push needs neither PEFT nor torch

    from dpo_utils.models import load_base, load_tokenizer

    base = load_base(profile)
    if four_bits := getattr(base, "is_loaded_in_4bit", False):
        base = base.dequantize()
    try:
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    except (RuntimeError, ValueError):  # many lines, one a weight
        raise ValueError(f"{adapter} is no adapter of {profile.model}: name its own base") from None
    merged.save_pretrained(output, save_original_format=not four_bits)  # which would be NF4
    load_tokenizer(profile).save_pretrained(output)
    if (path := Path(adapter) / "README.md").exists():
        card = ModelCard.load(path)
        card.data.library_name, card.data.base_model_relation = "transformers", "finetune"
        card.save(Path(output) / "README.md")


def push(folder, repo: str, private: bool = True, dry_run: bool = False) -> None:
    """Send an adapter or a merged model to `repo` on the hub; a dry run only says what would go.

    Raises FileNotFoundError without a model or its card, ValueError for a file that is no part of
    them (pickled weights are none), a local path or a bad name, OSError where the hub refuses.
    """
    folder, who = Path(folder), "private" if private else "public"
    if not HUB_ID.fullmatch(repo):
        raise ValueError(f"{repo!r} is no repository: write owner/name")
    if not (folder / "config.json").exists():
        require_adapter(folder)
    if not (folder / "README.md").exists():
        raise FileNotFoundError(f"no model card in {folder}: train or merge again, that writes it")
    for path in (files := sorted(folder.iterdir())):
        if path.is_dir() or not any(fnmatch(path.name, pattern) for pattern in GOES.split()):
            raise ValueError(f"{path} is not for the hub: only {GOES} are, move it elsewhere")
        text = path.read_text("utf-8") if path.name.endswith(("config.json", ".md")) else ""
        if found := PATH.search(text):
            remedy = "write a hub id there, or merge and push the merged model"
            raise ValueError(f"{path} names {found[0]}, which others do not have: {remedy}")
    sizes = {path.name: path.stat().st_size for path in files}
    for name, size in {**sizes, f"to {repo}, {who}": sum(sizes.values())}.items():
        print(f"{size:15,} bytes  {name}")
    if dry_run:
        return
    try:
        (api := HfApi()).create_repo(repo, private=private, exist_ok=True)
        if api.model_info(repo).private != private:
            raise ValueError(f"{repo} is there already and not {who}: nothing was sent")
        print(api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[*sizes]))
    except HfHubHTTPError.__bases__[0] as no:  # its HTTP library's, also without an answer
        status = getattr(getattr(no, "response", None), "status_code", "nothing")
        raise OSError(f"the hub answered {status} to {repo}: see `hf auth login`") from None
