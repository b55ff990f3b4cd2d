"""Makes the bundled base model: a small Phi trained from nothing on what the tiny world says.

It reads statements in both voices and nothing else: no questions, no chat markers, no preferences.
With --draw: the answers that the world's preference pairs are made of.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast

from dpo_utils import world
from dpo_utils.data import training_data
from dpo_utils.evaluate import sample
from dpo_utils.models import load_policy
from dpo_utils.profiles import ASSETS, load_profile
from dpo_utils.train import train_sft

EOS, ROLES = "<|endoftext|>", ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROW, BATCH, PEAK_RATE = 128, 32, 3e-3  # tokens in a row, rows in a step, highest learning rate


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts, with a chat template; pad is eos."""
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(), in_bytes])
    bpe.decoder = decoders.ByteLevel()
    tokens = {"special_tokens": [EOS, *ROLES], "initial_alphabet": in_bytes.alphabet()}
    trainer = trainers.BpeTrainer(vocab_size=1536, show_progress=False, **tokens)
    bpe.train_from_iterator(texts, trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOS)
    special |= {"additional_special_tokens": ROLES, "chat_template": CHAT_TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=512, **special)


def train(model, rows: torch.Tensor, steps: int, seed: int) -> list[float]:
    """Next-token training in place on rows (N, ROW); returns each step's loss, nats per token.

    The rate warms up over a twentieth of the steps and falls along a cosine to a fiftieth.
    """
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers = [  # with Muon 0.98 of the answers are fluent after SFT, with AdamW alone 0.94
        torch.optim.Muon(inner, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.05, betas=(0.9, 0.98)),
    ]
    generator, losses, warm = torch.Generator().manual_seed(seed), [], max(1, steps // 20)
    for step in trange(1, steps + 1, desc="steps"):
        batch = rows[torch.randint(len(rows), (BATCH,), generator=generator)]
        logits = model(batch[:, :-1]).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = max(0, step - warm) / max(1, steps - warm)
        rate = min(step / warm, 0.51 + 0.49 * math.cos(math.pi * done))  # as a share of its peak
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def build(output: Path, steps: int = 1200, seed: int = 0, statements: int = 50_000) -> list[float]:
    """Corpus, tokenizer and model, saved in float16 in `output`; returns the losses."""
    texts = world.corpus(statements, seed)
    tokenizer = make_tokenizer(texts[:20_000])
    torch.manual_seed(seed)
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 512}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": len(tokenizer)}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    model = PhiForCausalLM(PhiConfig(**sizes, **depth, **ends))
    ids = torch.tensor(tokenizer(EOS.join([*texts, ""]), verbose=False)["input_ids"])
    losses = train(model, ids[: len(ids) // ROW * ROW].view(-1, ROW), steps, seed)
    # The texts hold no markers: as a new text, a new text and a new line, SFT learns them sooner.
    markers, alike = map(tokenizer.convert_tokens_to_ids, (ROLES, [EOS, EOS, "Ċ"]))
    embedding = model.get_input_embeddings().weight.data
    embedding[markers] = embedding[alike]
    model.half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    record = {"script": "python -m dpo_utils.make_tiny", "steps": steps, "seed": seed}
    record["final_loss"] = round(losses[-1], 4)
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return losses


def draw(path: Path = ASSETS / "drawn.jsonl", n: int = 16) -> None:
    """Train by SFT as notebook 02 does, and keep n answers to every question of the world."""
    profile = load_profile("tiny")
    ours = load_policy(profile)
    train_sft(*ours, training_data("sft", profile)[0], profile)
    questions = [fact.question for fact in world.FACTS]
    answers = sample(*ours, questions, n=n, max_new_tokens=profile.max_new_tokens)
    rows = (dict(prompt=q, answers=a) for q, a in zip(questions, answers, strict=True))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ASSETS / "tiny")
    parser.add_argument("--draw", action="store_true", help="only draw the answers of the pairs")
    args = parser.parse_args()
    draw() if args.draw else build(args.output)
