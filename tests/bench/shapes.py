"""What is measured on: models of two head shares and pairs of two length shapes, random but seeded."""

import math
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

from dpo_utils.profiles import PHI_TARGETS, Profile

BODY = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 8}
MODELS = {
    "C": {**BODY, "vocab_size": 2560},  # the head's share of the work is Phi-2's
    "A": {**BODY, "vocab_size": 51200},  # Phi-2's vocabulary on the same body: a head too large for it
    "phi2": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 51200,
        "partial_rotary_factor": 0.4,
    },  # Phi-2's true shape, for a GPU
    "small": {**BODY, "num_hidden_layers": 1, "vocab_size": 1024},  # to try the script itself
}
# Pairs a step, and pairs a micro-batch for those who cut by pairs (ours cuts by tokens).
STEP = {"truthy": {"pairs": 16, "micro_pairs": 4}, "hh": {"pairs": 4, "micro_pairs": 2}}
QUANTISED = {"phi2"}  # as its profile runs it: NF4, bfloat16; the others in float32
SEED = 5  # an ordinary draw: on average 82, 70, 77 tokens in its short pairs, 602, 321, 277 in its long ones


def save_model(shape: str, folder) -> None:
    """A Phi with random weights and a tokenizer of one word an id, in `folder`. Dropout is zero: peers leave it on."""
    torch.manual_seed(0)
    fixed = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "hidden_act": "gelu_new", "resid_pdrop": 0.0}
    config = PhiConfig(**MODELS[shape], **fixed, max_position_embeddings=2048)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if shape in QUANTISED else torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # log-probs that differ from word to word
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, config.vocab_size)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the bare prompt
    tokenizer.save_pretrained(folder)


def profile_for(folder, shape: str, lengths: str, **changes) -> Profile:
    """A profile of dpo_utils for the saved model: LoRA r=16 on all linear layers, float32 or as `QUANTISED` says."""
    quantised = shape in QUANTISED
    nothing = dict.fromkeys(("revision", "dataset", "dataset_revision", "sft_dataset", "sft_dataset_revision"))
    fields = {
        "name": "bench", "model": str(folder), "quantize": quantised, "dtype": "bfloat16" if quantised else "float32",
        "target_modules": PHI_TARGETS, "max_length": 2048, "batch": STEP[lengths]["pairs"], "steps": 1000,
        "learning_rate": 1e-4, "warmup": 0.0, "micro_tokens": 512, "row_tokens": 256,
    }  # fmt: skip
    return Profile(**{**nothing, **fields, **changes})


def _lognormal(rng, mean: float, deviation: float) -> float:
    variance = math.log(1 + (deviation / mean) ** 2)
    return rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))


def pair_lengths(lengths: str, count: int, seed: int = SEED) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) tokens. Over many draws 89, 69, 70 (truthy) and 489, 248, 246 (hh), with long tails."""
    rng = random.Random(seed)
    mean, deviation, low, high = {"truthy": (70, 35, 12, 260), "hh": (250, 110, 40, 700)}[lengths]
    out = []
    for _ in range(count):
        prompt = min(max(_lognormal(rng, 90, 30), 40), 220) if lengths == "truthy" else rng.uniform(300, 700)
        about = _lognormal(rng, mean, deviation)  # the two answers to a question are about as long
        answers = [min(max(about * rng.uniform(0.7, 1.3), low), high) for _ in range(2)]
        out.append((int(prompt), *map(int, answers)))
    return out


def text_pairs(shape: str, lengths: str, seed: int = SEED) -> list[dict]:
    """One step's pairs as text (prompt, chosen, rejected)."""
    return random_text(shape, pair_lengths(lengths, STEP[lengths]["pairs"], seed), seed)


def random_text(shape: str, sizes: list[tuple[int, int, int]], seed: int = SEED) -> list[dict]:
    """Pairs of random words with as many tokens as (prompt, chosen, rejected) say; each answer's last is the EOS it gains."""
    rng = random.Random(seed)
    vocabulary = MODELS[shape]["vocab_size"]

    def words(count):
        return " ".join(f"w{rng.randrange(3, vocabulary)}" for _ in range(count))

    return [{"prompt": words(p), "chosen": " " + words(c - 1), "rejected": " " + words(r - 1)} for p, c, r in sizes]
