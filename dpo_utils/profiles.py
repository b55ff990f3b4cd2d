"""Profiles: one frozen dataclass a size, and the plan for the machine at hand."""

import dataclasses
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

ASSETS = Path(__file__).parent / "assets"
PHI_TARGETS = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")
PHI2_GIB = 5.5  # GPU memory the phi2 profile wants free: 1.7 of weights, the rest for the step and the library


@dataclass(frozen=True)
class Profile:
    """Everything a run depends on. `dataclasses.replace` (or `load_profile(name, beta=0.3)`) makes a variant."""

    name: str  # tiny, smollm2 or phi2
    model: str  # hub id or local directory of the base model
    revision: str | None  # 40-hex commit of a hub model; None for a local directory
    dataset: str  # preference data: a bundled name, a local file or a hub id
    dataset_revision: str | None  # 40-hex commit of a hub data set; None otherwise
    sft_dataset: str  # demonstrations for SFT: a bundled name, a local file or a hub id
    sft_dataset_revision: str | None  # 40-hex commit of a hub data set; None otherwise
    quantize: bool  # load the base weights as NF4 (4 bits a weight, double quantisation)
    dtype: str  # what the model computes in on the CPU or a recent GPU: float32 or bfloat16
    target_modules: tuple[str, ...]  # linear layers that get a LoRA adapter; "attention only" leaves the MLP out
    lora_r: int = 16  # rank of the adapters
    lora_alpha: int = 32  # adapters are scaled by lora_alpha / lora_r
    max_length: int = 512  # tokens of prompt + completion; longer completions are cut, longer prompts dropped
    max_prompts: int | None = None  # at most this many pairs are used; None for all
    held_out: float = 0.2  # share of the prompts kept for evaluation
    sft_steps: int = 60  # optimiser steps of SFT
    sft_batch: int = 16  # demonstrations a step
    sft_learning_rate: float = 2e-4  # highest learning rate of SFT
    steps: int = 100  # optimiser steps of DPO
    batch: int = 8  # pairs a step
    learning_rate: float = 5e-5  # highest learning rate of DPO
    beta: float = 0.1  # strength of the pull to the reference: larger stays closer
    loss: str = "dpo"  # a name in dpo_utils.losses
    label_smoothing: float = 0.0  # assumed share of flipped labels
    warmup: float = 0.1  # share of the steps with a rising learning rate; a cosine to zero follows
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    micro_tokens: int = 2048  # tokens of one micro-batch: the memory knob; the gradient does not depend on it
    row_tokens: int = 512  # tokens a shared row may hold before the next pair starts a row of its own
    gradient_checkpointing: bool = False  # recompute activations: about a quarter of the memory, two thirds of the speed
    compile_layers: bool = False  # torch.compile every layer: pays on long GPU runs only
    checkpoint_every: int = 50  # steps between checkpoints
    max_new_tokens: int = 48  # length of sampled answers
    seed: int = 0  # data order, adapters' start, sampling


PROFILES = {
    "tiny": Profile(
        name="tiny",
        model=str(ASSETS / "tiny"),
        revision=None,
        dataset="tiny",
        dataset_revision=None,
        sft_dataset="tiny",
        sft_dataset_revision=None,
        quantize=True,
        dtype="float32",
        target_modules=PHI_TARGETS,
        max_length=128,
        sft_steps=60,
        sft_batch=32,
        sft_learning_rate=1e-3,
        steps=60,
        batch=16,
        learning_rate=1.5e-4,
        beta=1.0,
        row_tokens=64,
        max_new_tokens=32,
        checkpoint_every=20,
    ),
    "smollm2": Profile(
        name="smollm2",
        model="HuggingFaceTB/SmolLM2-135M-Instruct",
        revision="12fd25f77366fa6b3b4b768ec3050bf629380bac",
        dataset="misconceptions",
        dataset_revision=None,
        sft_dataset="instructions",
        sft_dataset_revision=None,
        quantize=False,
        dtype="bfloat16",
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
        max_length=256,
        sft_steps=20,
        sft_batch=8,
        sft_learning_rate=1e-4,
        steps=100,
        batch=8,
        learning_rate=2e-4,
    ),
    "phi2": Profile(
        name="phi2",
        model="microsoft/phi-2",
        revision="ef382358ec9e382308935a992d908de099b64c23",
        dataset="Anthropic/hh-rlhf",
        dataset_revision="09be8c5bbc57cb3887f3a9732ad6aa7ec602a1fa",
        max_prompts=4000,
        sft_dataset="databricks/databricks-dolly-15k",
        sft_dataset_revision="bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a",
        quantize=True,
        dtype="bfloat16",
        target_modules=PHI_TARGETS,
        max_length=1024,
        sft_steps=100,
        steps=200,
        batch=16,
        learning_rate=2e-5,
        micro_tokens=4096,
        max_new_tokens=128,
    ),
}


def default_profile() -> str:
    """`phi2` where a CUDA device has the memory for it, else `tiny`."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > PHI2_GIB * 2**30:
        return "phi2"
    return "tiny"


def load_profile(name: str | None = None, **changes) -> Profile:
    """The profile called `name`, else `DPO_PROFILE`, else what fits the machine.

    `DPO_MODEL` and `DPO_DATASET` (hub id or local path) replace its model and data; `changes` replace any field and
    win over both. A hub id given this way is not pinned to a revision, and `describe` says so.
    Raises ValueError for an unknown profile or field.
    """
    name = name or os.environ.get("DPO_PROFILE") or default_profile()
    if name not in PROFILES:
        raise ValueError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)} (argument or DPO_PROFILE)")
    if model := os.environ.get("DPO_MODEL"):
        changes = {"model": _found(model), "revision": None} | changes
    if data := os.environ.get("DPO_DATASET"):
        changes = {"dataset": _found(data), "dataset_revision": None} | changes
    fields = {field.name for field in dataclasses.fields(Profile)}
    if unknown := set(changes) - fields:
        raise ValueError(f"a profile has no field {sorted(unknown)[0]!r}; its fields are {', '.join(sorted(fields))}")
    profile = dataclasses.replace(PROFILES[name], **changes)
    _check(profile)
    return profile


def _found(source: str) -> str:
    """A local path that only exists as seen from the repository, where `make` runs, as an absolute one."""
    elsewhere = repository_root() / source
    return str(elsewhere) if not Path(source).exists() and elsewhere.exists() else source


def _check(profile: Profile) -> None:
    for field in ("beta", "learning_rate", "sft_learning_rate", "batch", "sft_batch", "steps", "micro_tokens"):
        if not getattr(profile, field) > 0:
            raise ValueError(f"{field} must be greater than 0, got {getattr(profile, field)}")
    if not 0 <= profile.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {profile.label_smoothing}")


@dataclass(frozen=True)
class Plan:
    """How a profile runs on this machine; `notes` say in words what differs from a recent GPU and why."""

    device: str  # cuda or cpu
    dtype: torch.dtype  # what the model computes in
    quantize: bool  # base weights as NF4
    attention: str  # sdpa_blocks, or sdpa_float32 where scores would overflow
    loss_scale: float  # the loss is multiplied by this for float16 gradients, the gradients divided by it
    notes: tuple[str, ...]

    def __str__(self):
        what = f"{self.device}, {str(self.dtype).removeprefix('torch.')}, {'NF4' if self.quantize else 'no quantisation'}"
        return "\n  ".join([f"plan: {what}, attention {self.attention}", *self.notes])


def make_plan(profile: Profile, device: str | None = None, capability: tuple[int, int] | None = None) -> Plan:
    """What this machine can do for the profile. `device` and `capability` stand in for the machine in tests.

    bfloat16 needs compute capability 8 or more: `torch.cuda.is_bf16_supported()` also says yes where it is only
    emulated. On older cards the model runs in float16 with attention in float32, since Phi-2's scores overflow.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, attention, scale, notes = getattr(torch, profile.dtype), "sdpa_blocks", 1.0, []
    if device == "cpu":
        notes.append("no GPU: everything runs on the CPU" + (", which takes days for phi2" if profile.name == "phi2" else ""))
    else:
        capability = capability or torch.cuda.get_device_capability()
        if capability < (8, 0) and dtype == torch.bfloat16:
            dtype, attention, scale = torch.float16, "sdpa_float32", 1024.0
            notes.append(
                f"compute capability {capability[0]}.{capability[1]} has no bfloat16: float16, with attention in float32 "
                "and the loss scaled by 1024 so that small gradients survive"
            )
    quantize = profile.quantize and importlib.util.find_spec("bitsandbytes") is not None
    if profile.quantize and not quantize:
        notes.append("bitsandbytes is not installed: NOT quantised, about four times the memory; `pip install bitsandbytes`")
    return Plan(device, dtype, quantize, attention, scale, tuple(notes))


def repository_root() -> Path:
    """The folder that holds `runs/` and `figures/`: the clone if there is one, else the current folder."""
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").exists() else Path.cwd()


def run_directory(profile: Profile) -> Path:
    """Where adapters, histories and caches go: `runs/<profile>`, or `DPO_RUNS/<profile>`.

    With a model or data of your own their names are added, so that nothing of one run is taken for another's.
    """
    usual = PROFILES.get(profile.name, profile)
    name = [profile.name]
    name += [Path(profile.model).name] if profile.model != usual.model else []
    name += [Path(profile.dataset).stem] if profile.dataset != usual.dataset else []
    return Path(os.environ.get("DPO_RUNS") or repository_root() / "runs") / "-".join(name)


def describe(profile: Profile, stage: str = "dpo") -> str:
    """The profile in a few lines: model, data, revisions, what is trained, and how far in `stage` (sft or dpo)."""

    def where(source, revision):
        return f"{source} @ {revision[:12]}" if revision else f"{source}"

    lines = [
        f"profile {profile.name}: {where(profile.model, profile.revision)}",
        f"preferences {where(profile.dataset, profile.dataset_revision)}",
        f"demonstrations {where(profile.sft_dataset, profile.sft_dataset_revision)}",
        f"LoRA r={profile.lora_r} on {' '.join(profile.target_modules)}",
        f"DPO: {profile.steps} steps of {profile.batch} pairs, learning rate {profile.learning_rate:g}, beta {profile.beta:g}"
        if stage == "dpo"
        else f"SFT: {profile.sft_steps} steps of {profile.sft_batch} demonstrations, learning rate {profile.sft_learning_rate:g}",
    ]
    return "\n  ".join(lines).replace(str(ASSETS) + os.sep, "dpo_utils/assets/")
