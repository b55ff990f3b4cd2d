"""What is measured on: models of two head shares, pairs of two length shapes, random but seeded."""

import math
import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PhiConfig, PreTrainedTokenizerFast

from dpo_utils.profiles import Profile, load_profile


def _body(hidden: int, layers: int, vocabulary: int, **more) -> dict:
    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "vocab_size": vocabulary}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": 8, **more}


MODELS = {
    "C": _body(512, 8, 2560),  # the head's share of the work is Phi-2's
    "A": _body(512, 8, 51200),  # Phi-2's vocabulary on the same body: a head too large for it
    "phi2": _body(2560, 32, 51200, num_attention_heads=32, partial_rotary_factor=0.4),  # for a GPU
    "small": _body(512, 1, 1024),  # to try the script itself
}
# Pairs a step, and pairs a micro-batch for those who cut by pairs (ours cuts by tokens).
STEP = {"truthy": {"pairs": 16, "micro_pairs": 4}, "hh": {"pairs": 4, "micro_pairs": 2}}
STEP["full"] = {"pairs": 16, "micro_pairs": 1}  # each row fills 1024 tokens, half of it the prompt
QUANTISED = {"phi2"}  # as its profile runs it: NF4, bfloat16; the others in float32
SEED = 5  # an ordinary draw: short pairs of 82, 70, 77 tokens on average, long of 602, 321, 277


def save_model(shape: str, folder) -> None:
    """A Phi with random weights, without dropout (peers leave it on); a tokenizer of words."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    fixed = {"hidden_act": "gelu_new", "resid_pdrop": 0.0, "max_position_embeddings": 2048}
    config = PhiConfig(**MODELS[shape], **ids, **fixed)
    dtype = torch.bfloat16 if shape in QUANTISED else torch.float32
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # Phi-2's size takes minutes
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # log-probs that differ from word to word
    model.save_pretrained(folder)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{i}" for i in range(3, config.vocab_size))]
    ids = {word: i for i, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(ids, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)


def profile_for(folder, shape: str, lengths: str, **changes) -> Profile:
    """The phi2 profile's LoRA on the saved model, in float32 or as `QUANTISED` says."""
    quantised = shape in QUANTISED
    fields = {"model": str(folder), "revision": None, "quantize": quantised, "warmup": 0.0}
    fields |= {"dtype": "bfloat16" if quantised else "float32", "batch": STEP[lengths]["pairs"]}
    fields |= {"max_length": 2048, "steps": 1000, "learning_rate": 1e-4}
    fields |= {"micro_tokens": 512, "row_tokens": 256, "gradient_checkpointing": False}
    return load_profile("phi2", **fields | changes)


def pair_lengths(lengths: str, count: int, seed: int = SEED) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) tokens: 89, 69, 70 (truthy) or 489, 248, 246 (hh) on average."""
    if lengths == "full":
        return [(512, 512, 512)] * count
    rng = random.Random(seed)

    def lognormal(mean: float, deviation: float) -> float:
        variance = math.log(1 + (deviation / mean) ** 2)
        return rng.lognormvariate(math.log(mean) - variance / 2, math.sqrt(variance))

    mean, deviation, low, high = {"truthy": (70, 35, 12, 260), "hh": (250, 110, 40, 700)}[lengths]
    out = []
    for _ in range(count):
        short = lengths == "truthy"
        prompt = min(max(lognormal(90, 30), 40), 220) if short else rng.uniform(300, 700)
        about = lognormal(mean, deviation)  # the two answers to a question are about as long
        answers = [min(max(about * rng.uniform(0.7, 1.3), low), high) for _ in range(2)]
        out.append((int(prompt), *map(int, answers)))
    return out


def random_text(shape: str, sizes: list[tuple[int, int, int]], seed: int = SEED) -> list[dict]:
    """Pairs of random words of (prompt, chosen, rejected) tokens; an answer's last is its EOS."""
    rng = random.Random(seed)

    def words(count):
        return " ".join(f"w{rng.randrange(3, MODELS[shape]['vocab_size'])}" for _ in range(count))

    names = ("prompt", "chosen", "rejected")
    counts = ((p, c - 1, r - 1) for p, c, r in sizes)
    texts = ([words(p), " " + words(c), " " + words(r)] for p, c, r in counts)
    return [dict(zip(names, text, strict=True)) for text in texts]
