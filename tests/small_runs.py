"""Small whole runs on the bundled model: ten pairs, a few steps, milliseconds each."""

from functools import cache

from datasets import Dataset

from dpo_utils import models
from dpo_utils.data import training_data
from dpo_utils.models import trainable
from dpo_utils.profiles import load_profile
from dpo_utils.train import train_dpo, train_sft

# Whatever the tiny profile says. 4 pairs a step out of 10: no epoch ends with a step.
SHORT = {"beta": 0.1, "learning_rate": 1e-3, "batch": 4, "steps": 7, "checkpoint_every": 3}
SHORT |= {"sft_batch": 4, "sft_steps": 5, "warmup": 0.3}


def profile(**changes):
    """The tiny profile, shortened."""
    return load_profile("tiny", **{**SHORT, **changes})


@cache
def pairs(n: int = 10) -> Dataset:
    """The first n training pairs."""
    return training_data("dpo", profile())[0].select(range(n))


@cache
def demonstrations(n: int = 10) -> Dataset:
    """The first n demonstrations."""
    return training_data("sft", profile())[0].select(range(n))


def policy(settings=None, **options):
    """(model, tokenizer), freshly loaded."""
    return models.load_policy(settings or profile(), **options)


def dpo(output=None, settings=None, data=None, train=train_dpo, **options):
    """(history, adapter weights) of a DPO run on a fresh policy."""
    settings = settings or profile()
    model, tokenizer = policy(settings)
    history = train(model, tokenizer, data or pairs(), settings, output, **options)
    return history, [p.detach().clone() for p in trainable(model)]


def sft(output=None, settings=None, **options):
    """As `dpo`, for SFT."""
    return dpo(output, settings, demonstrations(), train_sft, **options)


def numbers(history) -> list[dict]:
    """The history without wall times."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in history]


def adapter_bytes(output) -> bytes:
    """The weights as saved for others."""
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()
