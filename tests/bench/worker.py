"""One variant in a process of its own. It waits for its turn before every step and prints what the step cost as JSON.

python -m bench.worker MODEL_FOLDER SHAPE LENGTHS VARIANT; a turn is a line on standard input:
`warm` (a step that is not measured), `time`, `flops` or `memory`.
"""

import contextlib
import ctypes
import json
import os
import sys
import tempfile
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from bench.meter import Meter
from bench.shapes import STEP, profile_for, text_pairs
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_utils import fit, logps, train
from dpo_utils.models import (
    as_reference,
    disarm_cpu_repacking,
    fuse_gelu,
    load_policy,
    lora_config,
    quantisation_config,
    trainable,
)
from dpo_utils.profiles import make_plan
from dpo_utils.tokens import as_item, pack_rows, tokenize_all

REPLIES = os.fdopen(os.dup(1), "w")  # trainers print what they like: only turns go to the parent


def give_memory_back() -> None:
    """Return freed memory to the system while others have their turn: together they would fill 24 GiB."""
    with contextlib.suppress(OSError, AttributeError):  # other C libraries do it by themselves
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Turns:
    """The worker's side of the alternation: `begin` waits for a turn, `end` replies with what it cost."""

    def begin(self):
        """Wait; leave when there are no more turns."""
        self.turn = sys.stdin.readline().strip()
        if not self.turn:
            os._exit(0)
        self.meter = Meter(self.turn).__enter__()

    def end(self, loss=None):
        """Reply with what the turn cost."""
        self.meter.__exit__(None, None, None)
        if self.turn != "warm":
            give_memory_back()
        print(json.dumps({"loss": loss, **self.meter.result}), file=REPLIES, flush=True)

    def around(self, function):
        """The function, measured as the pass over the reference."""

        def measured(*args, **kwargs):
            self.begin()
            out = function(*args, **kwargs)
            self.end()
            return out

        return measured


def move_adapter(model) -> None:
    """Give the adapter seeded values that are not zero: with B = 0 every loss is ln 2, right or wrong."""
    generator = torch.Generator().manual_seed(7)
    named = {n: p for n, p in model.named_parameters() if ".default." in n and "lora_" in n}
    for name in sorted(named):
        scale = 0.02 if "lora_B" in name else 0.05
        named[name].data.copy_(torch.randn(named[name].shape, generator=generator) * scale)


def raw_model(profile):
    """The base as Hugging Face loads it, with none of ours but the switch without which 4-bit gradients are wrong on CPU."""
    plan = make_plan(profile)
    quantisation = {"quantization_config": quantisation_config(plan.dtype)} if plan.quantize else {}
    model = AutoModelForCausalLM.from_pretrained(profile.model, dtype=plan.dtype, device_map={"": plan.device}, **quantisation)
    disarm_cpu_repacking(model)
    return model


def ours(turns, profile, pairs, _):
    """`train_dpo` as readers call it."""
    model, tokenizer = load_policy(profile)
    move_adapter(model)
    # policy and reference start apart here, so that losses can be compared: the check that refuses this makes way
    mock.patch.object(fit, "before_first_step", lambda *_: turns.begin()).start()
    mock.patch.object(train, "reference_logps", turns.around(train.reference_logps)).start()

    def after_step(history):
        turns.end(history[-1]["loss"])
        turns.begin()

    train.train_dpo(model, tokenizer, pairs, profile, on_step=after_step)


def trl(turns, profile, pairs, micro, best=False, same=False):
    """TRL's DPOTrainer, whole. best: cached reference, no checkpointing, head on completions. same: sorted, tanh GELU."""
    import trl.trainer.utils
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Alternate(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                turns.end(logs["loss"])
                turns.begin()

    if best:
        # off GPUs TRL would score every position (on them this changes nothing)
        mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True).start()
        mock.patch.object(DPOTrainer, "_precompute_ref_logps", turns.around(DPOTrainer._precompute_ref_logps)).start()
    model, gpu = raw_model(profile), torch.cuda.is_available()
    if same:
        fuse_gelu(model)
        pairs = sorted(pairs, key=lambda p: max(len(p["prompt"] + p[side]) for side in ("chosen", "rejected")))
    args = DPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=micro, max_steps=profile.steps, max_length=None,
        gradient_accumulation_steps=len(pairs) // micro, beta=profile.beta, learning_rate=profile.learning_rate,
        lr_scheduler_type="constant", weight_decay=0.0, use_cpu=not gpu, report_to=[], logging_steps=1,
        bf16=gpu and profile.dtype == "bfloat16",
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
        **({"gradient_checkpointing": False, "precompute_ref_log_probs": True} if best else {}),
    )  # fmt: skip
    trainer = DPOTrainer(
        model, args=args, train_dataset=Dataset.from_list(pairs), peft_config=lora_config(profile),
        processing_class=AutoTokenizer.from_pretrained(profile.model), callbacks=[Alternate()],
    )  # fmt: skip
    move_adapter(trainer.model)
    trainer.train()


def loop(turns, profile, pairs, micro, score):
    """The textbook loop on the model as it comes: policy and reference scored in every step, in the data's order."""
    model = get_peft_model(raw_model(profile).requires_grad_(False), lora_config(profile)).train()
    move_adapter(model)
    rows, _ = tokenize_all(pairs, AutoTokenizer.from_pretrained(profile.model), profile.max_length)
    items = [as_item(row) for row in rows]
    optimizer = torch.optim.AdamW(trainable(model), lr=profile.learning_rate, weight_decay=0.0)
    for _ in range(profile.steps):
        turns.begin()
        total = 0.0
        for start in range(0, len(items), micro):
            part = items[start : start + micro]
            policy = score(model, part)
            with torch.no_grad(), as_reference(model):
                reference = score(model, part)
            margins = profile.beta * (policy.float() - reference.float()).view(-1, 2)
            loss = -F.logsigmoid(margins[:, 0] - margins[:, 1]).sum() / len(items)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trainable(model), profile.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(total)


def prefix_score(model, items):
    """One row a pair that shares the prompt, all logits."""
    rows = pack_rows([[item] for item in items], pad_id=0).to(model.device)
    out = model(input_ids=rows.input_ids, attention_mask=rows.mask, position_ids=rows.position_ids, use_cache=False)
    token_logps = out.logits.flatten(0, 1).log_softmax(-1)[rows.predictors, rows.labels]
    return torch.stack([part.sum() for part in token_logps[rows.label_index].split(rows.counts)])


VARIANTS = {
    "plain loop": lambda *a: loop(*a, partial(logps.plain_logps, pad_id=0)),
    "TRL default": trl,
    "TRL best": lambda *a: trl(*a, best=True),
    "TRL best, sorted, same GELU": lambda *a: trl(*a, best=True, same=True),
    "TRL best, pair by pair, same GELU": lambda *a: trl(*a[:3], 1, best=True, same=True),
    "prefix rows, all logits": lambda *a: loop(*a, prefix_score),
    "ours": ours,
    "ours, checkpointing": ours,
}

if __name__ == "__main__":
    folder, shape, lengths, variant = sys.argv[1:]
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    changes = {"micro_tokens": int(os.environ["BENCH_MICRO_TOKENS"])} if "BENCH_MICRO_TOKENS" in os.environ else {}
    chosen = profile_for(folder, shape, lengths, gradient_checkpointing=variant == "ours, checkpointing", **changes)
    micro = int(os.environ.get("BENCH_MICRO_PAIRS", STEP[lengths]["micro_pairs"]))
    VARIANTS[variant](Turns(), chosen, text_pairs(shape, lengths), micro)
