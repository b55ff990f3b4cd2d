"""What the phi2 profile takes on its model's true shape with random weights: seconds, memory, and whether the loss falls.

python -m bench.memory [--tokens 512 1024] [--steps 3] [--pairs 16], every setting in a process of its own; pairs fill
their length, as the worst would. On a CPU it takes 12 GiB and many minutes a setting: --tokens 128 --pairs 4 then.
With --notebook, notebook 04 runs from end to end on that model and on random pairs.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench.meter import GPU
from bench.shapes import MODELS, random_text, save_model

from dpo_utils.models import load_policy
from dpo_utils.profiles import load_profile, run_directory
from dpo_utils.train import train_dpo

CARDS = (6, 8, 12, 16)  # GiB by name; a desktop on the same card takes some of it
SETTINGS = {  # how a step is cut
    "as the profile": {},
    "a pair at a time": {"micro_tokens": 1},
    "a pair at a time, checkpointing": {"micro_tokens": 1, "gradient_checkpointing": True},
}


def peak_gib() -> float:
    """The most memory so far: on a GPU all that is in use there, the library's own included; else what the process holds."""
    if not GPU:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    free, total = torch.cuda.mem_get_info()
    library = total - free - torch.cuda.memory_reserved()
    return (torch.cuda.max_memory_reserved() + library) / 2**30


def full_pairs(shape: str, tokens: int, count: int) -> list[dict]:
    """Pairs whose prompt with either answer is just `tokens` long, half of it the prompt."""
    return random_text(shape, [(tokens // 2, tokens - tokens // 2, tokens - tokens // 2)] * count)


def one(folder: str, shape: str, setting: str, tokens: int, steps: int, count: int) -> dict:
    """Load and train: seconds, peak memory of both, losses."""
    profile = load_profile(
        "phi2", model=folder, revision=None, max_length=tokens, steps=steps, batch=count, warmup=0.0, **SETTINGS[setting]
    )
    start = time.perf_counter()
    model, tokenizer = load_policy(profile)
    row = {"load_s": time.perf_counter() - start, "load_gib": peak_gib()}
    history = train_dpo(model, tokenizer, full_pairs(shape, tokens, count), profile)
    row |= {"step_s": history[-1]["seconds"], "peak_gib": peak_gib(), "losses": [round(step["loss"], 4) for step in history]}
    return row | {"fits": [card for card in CARDS if row["peak_gib"] < card] if GPU else None}


def measure(folder: str, args) -> None:
    """Print a line a setting."""
    for tokens in args.tokens:
        for setting in SETTINGS:
            command = [sys.executable, "-m", "bench.memory", "--one", folder, setting, "--tokens", str(tokens)]
            command += ["--shape", args.shape, "--steps", str(args.steps), "--pairs", str(args.pairs)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{setting}, {tokens} tokens:\n{done.stderr[-3000:]}")
            print(f"{tokens} tokens, {setting}:", done.stdout.splitlines()[-1], flush=True)


def notebook(folder: str, shape: str) -> None:
    """Notebook 04 after two steps of SFT, both on random words, in a folder that is thrown away."""
    work = Path(folder).parent
    pairs = full_pairs(shape, 64, 80)
    (work / "words.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    demonstrations = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (work / "demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demonstrations))
    places = {"DPO_MODEL": folder, "DPO_DATASET": work / "words.jsonl", "DPO_RUNS": work / "runs", "DPO_FIGURES": work}
    os.environ.update({name: str(place) for name, place in places.items()})
    sft = run_directory(load_profile("phi2")) / "sft"
    shell = [sys.executable, "-m", "dpo_utils.train", "sft", "--profile", "phi2", "--steps", "2", "--output", str(sft)]
    subprocess.run([*shell, "--data", str(work / "demonstrations.jsonl")], check=True)
    subprocess.run([sys.executable, "-m", "dpo_utils.workbook", "04", "--profile", "phi2"], check=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="phi2", choices=list(MODELS), help="another one, to try the script itself")
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 1024], help="max_length, filled")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=16, help="pairs a step")
    parser.add_argument("--notebook", action="store_true", help="run notebook 04 instead")
    parser.add_argument("--one", nargs=2, metavar=("FOLDER", "SETTING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(args.one[0], args.shape, args.one[1], args.tokens[0], args.steps, args.pairs)))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = str(Path(work) / "phi2-random")
        save_model(args.shape, folder)
        notebook(folder, args.shape) if args.notebook else measure(folder, args)


if __name__ == "__main__":
    main()
