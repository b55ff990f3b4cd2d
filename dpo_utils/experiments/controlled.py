"""DPO on SmolLM2 with a known reward: python -m dpo_utils.experiments.controlled {pairs,run}

Controlled sentiment as in Rafailov et al. 2023 (arXiv 2305.18290), section 6.1: answers of the
model itself, labelled by Bradley-Terry in the reward. The reference is the model as published.
"""

import json
import random
import sys
import time

import numpy as np
from scipy.special import expit
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo_utils import evaluate, plots
from dpo_utils.data import training_data
from dpo_utils.models import load_policy
from dpo_utils.profiles import ASSETS, load_profile
from dpo_utils.train import train_dpo, train_sft

PROMPT = "Give the {} {} a good or a bad review in one sentence."
KINDS = "new old small cheap modern local famous Italian"
NOUNS = "hotel film soup bus museum cake train novel restaurant concert phone park coffee game shop"
TEMPERATURE, TOKENS = 0.7, 28  # of sampled answers; the KL alone is measured at temperature 1
SHARPNESS = 5.0  # of the labels: where rewards differ by 0.5, 92 % name the better answer
PAIRS = ASSETS / "controlled.jsonl"
SETTINGS = {"dataset": str(PAIRS), "dtype": "float32", "steps": 36}
SETTINGS |= {"learning_rate": 5e-4, "sft_steps": 36, "sft_learning_rate": 2e-4}
ARMS = {"as published": None, "SFT on chosen": "sft", "DPO, beta 1": 1.0, "DPO, beta 0.1": 0.1}
_sentiment = SentimentIntensityAnalyzer().polarity_scores


def reward(answer: str) -> float:
    """How positive a text is, from -1 to 1: VADER's compound score (Hutto and Gilbert 2014)."""
    return _sentiment(answer)["compound"]


def label(prompt: str, first: str, second: str, rng: random.Random) -> dict:
    """A pair with its rewards; first is chosen with probability sigmoid(SHARPNESS (r1 - r2))."""
    won = rng.random() < expit(SHARPNESS * (reward(first) - reward(second)))
    chosen, rejected = (first, second) if won else (second, first)
    rewards = {"chosen_reward": reward(chosen), "rejected_reward": reward(rejected)}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **rewards}


def make_pairs(seed: int = 0) -> list[dict]:
    """Three pairs for each prompt, of answers drawn from the model; equal answers make no pair."""
    prompts = [PROMPT.format(kind, noun) for noun in NOUNS.split() for kind in KINDS.split()] * 3
    how = {"n": 2, "temperature": TEMPERATURE, "max_new_tokens": TOKENS, "seed": seed}
    drawn = evaluate.sample(*load_policy(load_profile("smollm2", **SETTINGS)), prompts, **how)
    rng, rows = random.Random(seed), zip(prompts, drawn, strict=True)
    return [label(p, a, b, rng) for p, (a, b) in rows if a and b and a != b]


def measure(ours, prompts) -> tuple[list[str], dict]:
    """Four answers to each prompt, their reward and tokens; kl (nats) of one at temperature 1."""
    ids = [a for _, a in evaluate.sample_ids(*ours, prompts, 4, TEMPERATURE, TOKENS, seed=1)]
    texts = [text.strip() for text in ours[1].batch_decode(ids, skip_special_tokens=True)]
    kl = evaluate.sampled_kl(*ours, evaluate.sample_ids(*ours, prompts, 1, 1.0, TOKENS))["full"]
    return texts, {"reward": list(map(reward, texts)), "tokens": list(map(len, ids)), "kl": kl}


def run(arms: dict) -> dict:
    """Train each arm from the model as published: {arm: means with intervals, first answers}.

    reward, wins (share better than the first arm's answers, ties half), kl (nats per answer) and
    tokens are (mean, low, high), prompts resampled; distinct is the share of different answers.
    """
    base, results, before = load_profile("smollm2", **SETTINGS), {}, None
    train, held_out = training_data("dpo", base)
    prompts = list(dict.fromkeys(held_out["prompt"]))
    for name, beta in arms.items():
        began, ours = time.perf_counter(), load_policy(base)
        if beta == "sft":
            train_sft(*ours, train.rename_column("chosen", "completion"), base)
        elif beta:
            train_dpo(*ours, train, load_profile("smollm2", **SETTINGS, beta=beta))
        seconds, (texts, x) = time.perf_counter() - began, measure(ours, prompts)
        x["wins"] = evaluate.wins(x["reward"], before := before or x["reward"])
        groups = {key: np.repeat(prompts, len(row) // len(prompts)) for key, row in x.items()}
        results[name] = {k: evaluate.bootstrap(row, groups=groups[k]) for k, row in x.items()}
        results[name] |= {"distinct": len(set(texts)) / len(texts), "seconds": seconds}
        results[name]["answers"] = [*zip(prompts, texts[::4], x["reward"][::4], strict=True)]
    return results


def report(results) -> None:
    """Draw reward against KL; print the table, and ten first answers before and after."""
    ax = plots.plt.subplots(figsize=(6.4, 3.8), layout="constrained")[1]
    print("| | reward | wins | KL (nats) | tokens | distinct | seconds |\n|" + "---|" * 7)
    for i, (name, x) in enumerate(results.items()):
        (kl, *_), (y, *ends) = x["kl"], x["reward"]
        ax.errorbar(kl, y, np.abs(np.array([ends]).T - y), fmt="o", capsize=3)
        ax.annotate(name, (kl, y), xytext=(6, (4, -14)[i % 2]), textcoords="offset points")
        cells = ["{:.2f} ({:.2f} to {:.2f})".format(*x[key]) for key in ("reward", "wins", "kl")]
        rest = f"{x['tokens'][0]:.0f} | {x['distinct']:.2f} | {x['seconds']:.0f}"
        print("|", " | ".join([name, *cells, rest]), "|")
    ax.set(xlabel="KL from the published model (nats per answer)", ylabel="reward (VADER)")
    ax.set(title="A smaller beta buys more praise for more KL", xmargin=0.3)
    first, *_, last = (x["answers"] for x in results.values())
    for (prompt, *old), (_, *new) in zip(first[:10], last[:10], strict=True):
        print("\n" + prompt, *("  {} [{:+.2f}]".format(*side) for side in (old, new)), sep="\n")
    plots.save_figure(ax, "smollm2_controlled", results)


if __name__ == "__main__":
    if sys.argv[1:] == ["pairs"]:
        PAIRS.write_text("".join(json.dumps(row) + "\n" for row in make_pairs()), encoding="utf-8")
    else:
        report(run(ARMS))
