"""One variant in a process of its own, which waits for its turn before every step.

python -m bench.worker MODEL_FOLDER SHAPE LENGTHS VARIANT; a turn is a line on standard input,
`warm`, `time`, `flops` or `memory`; the reply is JSON: what the step cost.
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
from bench.shapes import STEP, pair_lengths, profile_for, random_text
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from dpo_utils import fast, logps, models, train
from dpo_utils.profiles import make_plan
from dpo_utils.tokens import as_item, tokenize_all

REPLIES = os.fdopen(os.dup(1), "w")  # trainers print what they like: only turns go to the parent


class Turns:
    """The worker's side of the alternation: `begin` waits for a turn, `end` says what it cost."""

    def begin(self):
        """Wait; leave when there are no more turns."""
        self.turn = sys.stdin.readline().strip()
        if not self.turn:
            os._exit(0)
        self.meter = Meter(self.turn).__enter__()

    def end(self, loss=None):
        """Reply, and give freed memory back: all variants together would fill any machine."""
        self.meter.__exit__(None, None, None)
        if self.turn != "warm":  # a timed step finds what its warm one left
            torch.cuda.empty_cache()
        with contextlib.suppress(OSError, AttributeError):  # other C libraries do it by themselves
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        print(json.dumps({"loss": loss, **self.meter.result}), file=REPLIES, flush=True)

    @contextlib.contextmanager
    def around(self):
        """A turn of its own, for the pass over the reference: decorates it."""
        self.begin()
        yield
        self.end()


def move_adapter(model) -> None:
    """Seeded values that are not zero: with B = 0 every loss is ln 2, right or wrong."""
    generator = torch.Generator().manual_seed(7)
    for name, weight in sorted(model.named_parameters()):
        if ".default." in name and "lora_" in name:
            scale = 0.02 if "lora_B" in name else 0.05
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * scale)


def raw_model(profile):
    """The base as Hugging Face loads it, but for a switch without which 4 bits fail on CPUs."""
    plan = make_plan(profile)
    options = {"dtype": plan.dtype, "device_map": {"": plan.device}}
    if plan.quantize:
        options["quantization_config"] = models.quantisation_config(plan.dtype)
    model = AutoModelForCausalLM.from_pretrained(profile.model, **options)
    models.disarm_cpu_repacking(model)
    return model


def ours(turns, profile, pairs, _):
    """`train_dpo` as readers call it; its first step, before the adapter moves, is not measured."""
    model, tokenizer = models.load_policy(profile)
    mock.patch.object(train, "reference_logps", turns.around()(train.reference_logps)).start()

    def after_step(history):
        if len(history) == 1:
            move_adapter(model)
        else:
            turns.end(history[-1]["loss"])
        turns.begin()

    train.train_dpo(model, tokenizer, pairs, profile, on_step=after_step)


def trl(turns, profile, pairs, micro, best=False, same=False):
    """TRL's DPOTrainer. best: cached reference, no checkpointing, head on completions alone.

    same: sorted by length, with PyTorch's own tanh GELU.
    """
    import trl.trainer.utils
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class Alternate(TrainerCallback):
        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_log(self, *_, logs, **__):
            if "loss" in logs:
                turns.end(logs["loss"])
                turns.begin()

    model, gpu, options = raw_model(profile), torch.cuda.is_available(), {}
    if best:
        # off GPUs TRL would score every position (on them this changes nothing)
        mock.patch.object(trl.trainer.utils, "_use_triton", lambda device: True).start()
        reference = turns.around()(DPOTrainer._precompute_ref_logps)
        mock.patch.object(DPOTrainer, "_precompute_ref_logps", reference).start()
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    if same:
        fast.lean_layers(model)
        pairs = sorted(pairs, key=lambda p: max(len(p["prompt"] + p[s]) for s in list(p)[1:]))
    options |= {"per_device_train_batch_size": micro, "train_sampling_strategy": "sequential"}
    options |= {"gradient_accumulation_steps": len(pairs) // micro, "max_steps": profile.steps}
    options |= {"learning_rate": profile.learning_rate, "lr_scheduler_type": "constant"}
    options |= {"beta": profile.beta, "max_length": None, "weight_decay": 0.0}
    options |= {"use_cpu": not gpu, "bf16": gpu and profile.dtype == "bfloat16"}
    options |= {"logging_steps": 1, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(output_dir=tempfile.mkdtemp(), **options),
        train_dataset=Dataset.from_list(pairs),
        peft_config=models.lora_config(profile),
        processing_class=AutoTokenizer.from_pretrained(profile.model),
        callbacks=[Alternate()],
    )
    move_adapter(trainer.model)
    trainer.train()


def loop(turns, profile, pairs, micro, score):
    """The textbook loop: policy and reference scored in every step, in the data's order."""
    base = raw_model(profile).requires_grad_(False)
    model = get_peft_model(base, models.lora_config(profile)).train()
    move_adapter(model)
    tokenizer = AutoTokenizer.from_pretrained(profile.model)
    rows, _ = tokenize_all(pairs, tokenizer, profile.max_length)
    items, weights = [as_item(row) for row in rows], models.trainable(model)
    optimizer = torch.optim.AdamW(weights, lr=profile.learning_rate, weight_decay=0.0)
    for _ in range(profile.steps):
        turns.begin()
        total = 0.0
        for start in range(0, len(items), micro):
            part = items[start : start + micro]
            policy = score(model, part)
            with torch.no_grad(), models.as_reference(model):
                reference = score(model, part)
            margins = profile.beta * (policy.float() - reference.float()).view(-1, 2)
            loss = -F.logsigmoid(margins[:, 0] - margins[:, 1]).sum() / len(items)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(weights, profile.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        turns.end(total)


def shared_score(model, items):
    """One row a pair, in which the prompt is shared, and all logits."""
    rows = fast.pack_rows([[item] for item in items])
    inputs = {"input_ids": rows.input_ids, "attention_mask": rows.mask}
    inputs |= {"position_ids": rows.position_ids}
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    token_logps = model(**inputs, use_cache=False).logits.flatten(0, 1).log_softmax(-1)
    scored = token_logps[rows.predictors, rows.labels][rows.label_index]
    return torch.stack([part.sum() for part in scored.split(rows.counts)])


VARIANTS = {
    "plain loop": partial(loop, score=partial(logps.plain_logps, pad_id=0)),
    "TRL default": trl,
    "TRL best": partial(trl, best=True),
    "TRL best, sorted, same GELU": partial(trl, best=True, same=True),
    "TRL best, pair by pair, same GELU": lambda *a: trl(*a[:3], 1, best=True, same=True),
    "plain loop, shared prompts": partial(loop, score=shared_score),
    "ours": ours,
    "ours, checkpointing": ours,
}

if __name__ == "__main__":
    folder, shape, lengths, variant = sys.argv[1:]
    sys.stdout = sys.stderr
    torch.set_num_threads(1)
    changes = {"gradient_checkpointing": variant == "ours, checkpointing"}
    if tokens := os.environ.get("BENCH_MICRO_TOKENS"):
        changes["micro_tokens"] = int(tokens)
    micro = int(os.environ.get("BENCH_MICRO_PAIRS", STEP[lengths]["micro_pairs"]))
    pairs = random_text(shape, pair_lengths(lengths, STEP[lengths]["pairs"]))
    profile = profile_for(folder, shape, lengths, **changes)
    VARIANTS[variant](Turns(), profile, pairs, micro)
