"""Profiles: one frozen dataclass for each size of run, and the plan for the machine at hand.

torch is imported only where a plan is made: the command line's refusals come before it.
"""

import dataclasses
import functools
import importlib.util
import os
import timeit
import tomllib
from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
# a source -> the field of its revision
PINS = {"model": "revision"} | {name: f"{name}_revision" for name in ("dataset", "sft_dataset")}
POSITIVE = [f"{of}{name}" for of in ("", "sft_") for name in ("steps", "batch", "learning_rate")]


@dataclasses.dataclass(frozen=True)
class Profile:
    """Everything that a run depends on; `load_profile(name, beta=0.3)` makes a variant."""

    name: str  # tiny, smollm2 or phi2
    model: str  # hub id or local directory of the base model
    dataset: str  # preference data: a bundled name, a local file or a hub id
    sft_dataset: str  # demonstrations for SFT, likewise
    quantize: bool  # load the base weights as NF4 (4 bits a weight, double quantisation)
    dtype: str  # float32 or bfloat16; a machine that is slow in bfloat16 gets another
    cost: str  # time and memory of SFT and DPO, and where they come from
    target_modules: tuple[str, ...]  # linear layers that get a LoRA adapter
    revision: str | None = None  # 40-hex commit of a hub model
    dataset_revision: str | None = None  # 40-hex commit of a hub data set
    sft_dataset_revision: str | None = None  # likewise
    lora_r: int = 16  # rank of the adapters
    lora_alpha: int = 32  # adapters are scaled by lora_alpha / lora_r
    max_length: int = 512  # tokens; longer completions are cut, longer prompts dropped
    on_error: str = "raise"  # a bad row stops the load; skip: it is set aside and counted
    quarantine: str | None = None  # file for the rows that are set aside; None: next to the data
    max_prompts: int | None = None  # at most this many pairs are used; None for all
    held_out: float = 0.2  # share of the prompts kept for evaluation
    sft_steps: int = 60  # optimizer steps of SFT
    sft_batch: int = 16  # demonstrations a step
    sft_learning_rate: float = 2e-4  # highest learning rate of SFT
    steps: int = 100  # optimizer steps of DPO
    batch: int = 8  # pairs a step
    learning_rate: float = 5e-5  # highest learning rate of DPO
    beta: float = 0.1  # strength of the pull to the reference: a larger beta stays closer
    loss: str = "dpo"  # a name in dpo_utils.losses
    label_smoothing: float = 0.0  # assumed share of flipped labels
    warmup: float = 0.1  # share of the steps with a rising learning rate; then a cosine to zero
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    micro_tokens: int = 2048  # tokens of a micro-batch: costs memory, leaves the gradient the same
    row_tokens: int = 512  # tokens of a shared row before the next pair starts another
    gradient_checkpointing: bool = False  # a quarter of the memory for two thirds of the speed
    checkpoint_every: int = 50  # steps between checkpoints
    max_new_tokens: int = 48  # length of sampled answers
    seed: int = 0  # data order, initial adapters, sampling


def _read_profiles() -> dict[str, Profile]:
    tables = tomllib.loads((ASSETS / "profiles.toml").read_text(encoding="utf-8"))
    tables["tiny"]["model"] = str(ASSETS / "tiny")
    for table in tables.values():
        table["target_modules"] = tuple(table["target_modules"])
    return {name: Profile(name=name, **table) for name, table in tables.items()}


PROFILES = _read_profiles()  # tiny, smollm2, phi2


def load_profile(name: str | None = None, **changes) -> Profile:
    """The profile called `name`, else `DPO_PROFILE`, else tiny.

    `DPO_MODEL` and `DPO_DATASET` (hub id or local path) replace its model and data; `changes`
    replace any field and win over both. Another source is not pinned to a revision unless one is
    given. Raises ValueError for an unknown profile or field and for a value out of range.
    """
    name = name or os.environ.get("DPO_PROFILE") or "tiny"
    if name not in PROFILES:
        known = ", ".join(PROFILES)
        raise ValueError(
            f"unknown profile {name!r}: choose one of {known} (argument or DPO_PROFILE)"
        )
    for field in ("model", "dataset"):
        if (source := os.environ.get(f"DPO_{field.upper()}")) and field not in changes:
            elsewhere = repository_root() / source  # a path as seen from the clone, where make runs
            found = elsewhere.exists() and not Path(source).exists()
            changes[field] = str(elsewhere) if found else source
    if {"model", "dataset"} & {*changes}:
        changes = {"cost": "time and memory: not known for your model and data"} | changes
    changes = {PINS[field]: None for field in PINS if field in changes} | changes
    fields = [field.name for field in dataclasses.fields(Profile)]
    if unknown := set(changes) - set(fields):
        names = ", ".join(sorted(fields))
        raise ValueError(f"a profile has no field {min(unknown)!r}; its fields are {names}")
    if "target_modules" in changes:
        named = changes["target_modules"]
        changes["target_modules"] = (named,) if isinstance(named, str) else tuple(named)
    profile = dataclasses.replace(PROFILES[name], **changes)
    for field in ("beta", "micro_tokens", *POSITIVE):
        if not getattr(profile, field) > 0:
            raise ValueError(f"{field} must be greater than 0, got {getattr(profile, field)}")
    if not 0 <= profile.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {profile.label_smoothing}")
    return profile


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a profile runs on this machine; `notes` say what differs from a recent GPU and why."""

    device: str  # cuda, mps or cpu
    dtype: "torch.dtype"  # noqa: F821 - what the model computes in
    quantize: bool  # base weights as NF4
    attention: str  # sdpa, or sdpa_float32 where scores would overflow
    loss_scale: float  # of the loss, so that small float16 gradients survive
    notes: tuple[str, ...]

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        weights = "NF4" if self.quantize else "no quantisation"
        what = f"plan: {self.device}, {dtype}, {weights}, attention {self.attention}"
        return "\n  ".join([what, *self.notes])


@functools.cache
def bfloat16_slowdown() -> float:
    """How many times as long as in float32 a linear layer takes in bfloat16 on this CPU.

    Timed, in a fraction of a second: 8 to 10 where the processor has no instructions for it.
    """
    import torch

    def seconds(dtype):
        x, weight = torch.ones(256, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        product = functools.partial(torch.nn.functional.linear, x, weight)
        return min(timeit.repeat(product, number=1, repeat=5))

    return seconds(torch.bfloat16) / seconds(torch.float32)


def make_plan(profile: Profile, device: str | None = None, capability=None) -> Plan:
    """What this machine can do for the profile; device and capability stand in for it in tests.

    bfloat16 needs compute capability 8: `torch.cuda.is_bf16_supported()` also says yes where it is
    only emulated. Older cards get float16, with attention in float32, since Phi-2's scores
    overflow. A CPU computes in whatever it is faster in. The tiny profile stays on the CPU: it is
    as fast there, and its numbers are the same on every machine.
    """
    import torch

    if not device:
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        found = [name for name, available in there.items() if available and profile.name != "tiny"]
        device = (found or ["cpu"])[0]
    dtype, attention, scale, notes = getattr(torch, profile.dtype), "sdpa", 1.0, []
    if device == "cpu":
        slow = ", which takes days for phi2" if profile.name == "phi2" else ""
        tiny = profile.name == "tiny"
        notes.append("tiny stays on the CPU" if tiny else f"no GPU: all runs on the CPU{slow}")
        if dtype == torch.bfloat16 and (slowdown := bfloat16_slowdown()) > 1:
            dtype = torch.float32
            notes.append(f"bfloat16 takes {slowdown:.1f} times as long on this CPU: float32")
    elif dtype == torch.bfloat16 and device == "cuda":
        major, minor = capability or torch.cuda.get_device_capability()
        if major < 8:
            dtype, attention, scale = torch.float16, "sdpa_float32", 1024.0
            notes.append(
                f"compute capability {major}.{minor} has no bfloat16: float16, with attention in "
                "float32 and the loss scaled by 1024 so that small gradients survive"
            )
    quantize = profile.quantize and device != "mps"
    if profile.quantize and not quantize:
        notes.append("4 bits are for CUDA and CPUs: NOT quantised, about four times the memory")
    elif quantize and importlib.util.find_spec("bitsandbytes") is None:
        quantize, remedy = False, "about four times the memory; `pip install bitsandbytes`"
        notes.append(f"bitsandbytes is not installed: NOT quantised, {remedy}")
    return Plan(device, dtype, quantize, attention, scale, tuple(notes))


def repository_root() -> Path:
    """The folder that holds `runs/` and `figures/`: the clone if there is one, else the current."""
    clone = Path(__file__).resolve().parent.parent
    return clone if (clone / "pyproject.toml").exists() else Path.cwd()


def runs_directory() -> Path:
    """Where everything goes that running the workbook makes: `runs/`, or `DPO_RUNS`."""
    return Path(os.environ.get("DPO_RUNS") or repository_root() / "runs")


def run_directory(profile: Profile) -> Path:
    """Where adapters, histories and caches of a profile go: `runs/<profile>`.

    With a model or data of your own their names are added, so that no run is taken for another's.
    """
    usual = PROFILES.get(profile.name, profile)
    name = [profile.name]
    name += [Path(profile.model).name] if profile.model != usual.model else []
    name += [Path(profile.dataset).stem] if profile.dataset != usual.dataset else []
    return runs_directory() / "-".join(name)


def require_adapter(folder) -> None:
    """A folder must hold an adapter, in safetensors; a string that is no folder may be a hub id."""
    is_folder = isinstance(folder, Path) or folder and Path(folder).is_dir()
    if is_folder and not (Path(folder) / "adapter_config.json").exists():
        remedy = "make it first (notebook 02 makes sft, notebook 04 dpo)"
        if (Path(folder) / "adapter" / "adapter_config.json").exists():
            remedy = f"did you mean {Path(folder) / 'adapter'}?"
        raise FileNotFoundError(f"no adapter in {folder}: {remedy}")
    if is_folder and not (Path(folder) / "adapter_model.safetensors").exists():
        remedy = "PeftModel.from_pretrained(base, FOLDER).save_pretrained(FOLDER)"
        what = "only adapter_model.safetensors is read, since a pickle (.bin) can run code"
        raise ValueError(f"{folder}: {what}. If you trust it, convert it once: {remedy}")


def describe(profile: Profile, stage: str = "dpo") -> str:
    """The profile in a few lines: model, data, revisions, what is trained, and how far in
    `stage`.
    """
    p = profile
    sources = {
        f"profile {p.name}:": (p.model, p.revision),
        "preferences": (p.dataset, p.dataset_revision),
        "demonstrations": (p.sft_dataset, p.sft_dataset_revision),
    }
    lines = []
    for name, (source, pin) in sources.items():
        on_hub = "/" in source and not Path(source).exists()
        lines.append(f"{name} {source}" + (f" @ {pin[:12]}" if pin else " (not pinned)" * on_hub))
    lines.append(f"LoRA r={p.lora_r} on {' '.join(p.target_modules)}")
    dpo = f"DPO: {p.steps} steps of {p.batch} pairs, learning rate {p.learning_rate:g}"
    sft = f"SFT: {p.sft_steps} steps of {p.sft_batch} demonstrations"
    sft += f", learning rate {p.sft_learning_rate:g}"
    lines += [sft if stage == "sft" else f"{dpo}, beta {p.beta:g}", p.cost]
    return "\n  ".join(lines).replace(str(ASSETS) + os.sep, "dpo_utils/assets/")
