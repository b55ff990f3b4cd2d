"""The model card: what was trained on what, how it measured, and what nobody has checked."""

import re
from pathlib import Path

from dpo_utils.checkpoints import write_file
from dpo_utils.profiles import Profile

LIMITS = (
    "Trained to prefer answers like the chosen ones in its data. It was not made safe, and it was not taught new facts.",
    "The measures above are on held-out prompts of the same data set; other data, other numbers.",
)


def write_card(folder, profile: Profile, pairs: int, held_out: int, metrics: dict, drift: dict, limits=()) -> Path:
    """Write README.md in `folder`, a Hugging Face model card; returns its path.

    pairs, held_out: counts of the preference pairs trained and measured on. metrics: {name: (estimate, low, high)},
    95 % intervals. drift: {what against what: {"mean": nats, "largest": nats}}, of log-probs of held-out answers.
    limits: further sentences. Raises ValueError without metrics: a card that claims nothing measured is not written.
    """
    if not metrics:
        raise ValueError("a model card without a measurement: run the evaluation first and give its metrics")
    hub = {"base_model": (profile.model, profile.revision), "datasets": (profile.dataset, profile.dataset_revision)}
    head = ["---", "library_name: peft", "tags: [dpo, lora]", *(f"{k}: {v}" for k, (v, pinned) in hub.items() if pinned), "---"]
    settings = {
        "base model": _where(profile.model, profile.revision),
        "base weights": "NF4, double quantisation" if profile.quantize else profile.dtype,
        "adapter": f"LoRA, r={profile.lora_r}, alpha={profile.lora_alpha}, on {' '.join(profile.target_modules)}",
        "SFT data": _where(profile.sft_dataset, profile.sft_dataset_revision),
        "preference data": _where(profile.dataset, profile.dataset_revision)
        + f": {pairs} pairs, {held_out} more held out by prompt",
        "loss": f"{profile.loss}, beta {profile.beta:g}, label smoothing {profile.label_smoothing:g}",
        "steps": f"{profile.steps} of {profile.batch} pairs, learning rate {profile.learning_rate:g}, seed {profile.seed}",
    }
    body = [
        f"# {profile.name}: DPO", "", "## Data and settings", "", "| | |", "|---|---|",
        *(f"| {name} | {value} |" for name, value in settings.items()),
        "", "## Measured", "", "| | estimate | 95 % interval |", "|---|---|---|",
        *(f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |" for name, (value, low, high) in metrics.items()),
        "", "## Drift between forms of the same weights", "",
        "Differences of log-probs on the held-out answers, in nats an answer.", "", "| | mean | largest |", "|---|---|---|",
        *(f"| {name} | {row['mean']:.2g} | {row['largest']:.2g} |" for name, row in drift.items()),
        "", "## Limits", "", *(f"- {sentence}" for sentence in (*LIMITS, *limits)), "",
    ]  # fmt: skip
    path = Path(folder) / "README.md"
    write_file(path, "\n".join([*head, "", *body]).encode())
    return path


def _where(source: str, revision: str | None) -> str:
    if revision:
        return f"{source} @ {revision}"
    on_hub = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) and not Path(source).exists()
    return source if on_hub else Path(source).name  # no local paths, not of files that are gone either
