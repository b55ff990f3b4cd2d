"""Is the model better, by how much, how far did it move, and are its margins probabilities?"""

import numpy as np
import torch
from scipy.special import expit
from scipy.stats import sem
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from torch.nn.utils.rnn import pad_sequence

from dpo_utils import world
from dpo_utils.data import plain_text
from dpo_utils.logps import all_logps, options_for
from dpo_utils.models import as_reference, unwrap
from dpo_utils.tokens import as_item, collate_rows, encode_completion, encode_prompt, tokenize_all


def bootstrap(values, statistic=np.mean, resamples: int = 2000, seed: int = 0, groups=None):
    """(estimate, low, high): a statistic of the values and its 95 % percentile bootstrap interval.

    values: (n,) or (n, k), resampled by rows. groups: (n,), for instance the prompts; rows of one
    group are alike, so they are drawn together. Raises ValueError for no values.
    """
    values, rows, rng = np.asarray(values, dtype=float), {}, np.random.default_rng(seed)
    if len(values) == 0:
        raise ValueError("an interval needs at least one value: there are no values")
    for row, group in enumerate(range(len(values)) if groups is None else groups):
        rows.setdefault(str(group), []).append(row)
    rows, draws = list(rows.values()), rng.integers(0, len(rows), (resamples, len(rows)))
    found = [statistic(values[[row for g in draw for row in rows[g]]]) for draw in draws]
    return float(statistic(values)), *map(float, np.quantile(found, [0.025, 0.975]))


def wins(first, second) -> np.ndarray:
    """1 where first > second, 0 where it is less, a half for ties."""
    return np.greater(first, second) + 0.5 * np.equal(first, second)


def preference_table(model, tokenizer, pairs, profile) -> dict[str, np.ndarray]:
    """Log-probs in nats, rewards (beta times log-ratios), lengths of the usable pairs, (n,) each.

    policy_chosen, policy_rejected, ref_chosen, ref_rejected, chosen_rewards, rejected_rewards,
    margins, chosen_tokens, rejected_tokens, and row, the 1-based row in `pairs`.
    """
    rows, _ = tokenize_all(pairs, tokenizer, profile.max_length)
    items, options = [as_item(row) for row in rows], options_for(profile, tokenizer)
    policy = all_logps(model, items, **options).double().numpy()  # (n, 2)
    with as_reference(model):
        ref = all_logps(model, items, **options).double().numpy()
    table = {"row": np.array([row["row"] for row in rows])}
    for i, side in enumerate(("chosen", "rejected")):
        table[f"policy_{side}"], table[f"ref_{side}"] = policy[:, i], ref[:, i]
        table[f"{side}_rewards"] = profile.beta * (policy - ref)[:, i]
        table[f"{side}_tokens"] = np.array([len(row[f"{side}_ids"]) for row in rows])
    return table | {"margins": table["chosen_rewards"] - table["rejected_rewards"]}


def surface_baselines(train, held_out, seed: int = 0) -> dict[str, np.ndarray]:
    """What needs no model: per held-out pair 1 if the chosen answer is picked, a half for ties.

    length: the longer or the shorter answer, whichever the training pairs prefer. bag of words:
    logistic regression on the answers alone, fitted on the training pairs, blind to the question.
    """
    sides = [(pairs, side) for pairs in (train, held_out) for side in ("chosen", "rejected")]
    texts = ([plain_text(row[side]) for row in pairs] for pairs, side in sides)
    chosen, rejected, *held_out = texts
    counts, lengths = CountVectorizer(), np.vectorize(len)
    words = LogisticRegression(max_iter=1000, random_state=seed)
    words.fit(counts.fit_transform(chosen + rejected), np.repeat([1, 0], len(chosen)))
    sign = 1 if wins(lengths(chosen), lengths(rejected)).mean() >= 0.5 else -1
    return {
        "length": wins(*(sign * lengths(side) for side in held_out)),
        "bag of words": wins(*(words.decision_function(counts.transform(s)) for s in held_out)),
    }


def sample(model, tokenizer, prompts, *, n: int = 1, **options) -> list[list[str]]:
    """n answers to every prompt, as a list of n texts per prompt. Options: `sample_ids`."""
    drawn = sample_ids(model, tokenizer, prompts, n, **options)
    texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for _, answer in drawn]
    return [texts[i : i + n] for i in range(0, len(texts), n)]


@torch.no_grad()
def sample_ids(
    model, tokenizer, prompts, n=1, temperature=1.0, max_new_tokens=48, seed=0, batch=256
):
    """Seeded answers as (prompt ids, answer ids), n in a row per prompt; temperature 0 is greedy.

    An answer ends with its stop token (the tokenizer's EOS, the template's end of a turn or one of
    generation_config), or without one where it was cut. batch: answers at a time. Up to rounding,
    answer i depends on the model, its prompt, seed, i and max_new_tokens alone. Raises ValueError
    for logits of NaN.
    """
    prompts = [ids for prompt in prompts for ids in [encode_prompt(prompt, tokenizer)] * n]
    uniforms = np.random.default_rng(seed).random((len(prompts), max_new_tokens))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # so that little is padded
    was_training, answers = model.training, {}
    model.eval()
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        rows = [prompts[i] for i in some], torch.tensor(uniforms[some], device=model.device)
        answers |= zip(some, _draw(unwrap(model), tokenizer, *rows, temperature), strict=True)
    model.train(was_training)
    return [(prompt, answers[i]) for i, prompt in enumerate(prompts)]


def _draw(model, tokenizer, prompts, uniforms, temperature) -> list[list[int]]:
    """Answers to N prompts by inverting the CDF of every next token at the uniforms, (N, T).

    Answers that are the same so far, at first all those to one prompt, share a row of the batch.
    """
    stop = {tokenizer.eos_token_id, *np.ravel(model.generation_config.eos_token_id)}
    stop.add(encode_completion("A", tokenizer)[-1])
    ids = [torch.tensor([ids, [1] * len(ids)]).T for ids in prompts]  # id and mask: (tokens, 2)
    ids = pad_sequence(ids, padding_side="left").permute(2, 1, 0).to(model.device)  # (2, N, L)
    (tokens, mask), rows = ids.unique(dim=1, return_inverse=True)  # (rows, L) each; (N,)
    cache, running = None, torch.arange(len(prompts), device=model.device)
    answers = torch.full_like(uniforms, -1, dtype=torch.long)
    for step in range(uniforms.shape[1]):
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        how = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        out = model(tokens, attention_mask=mask, position_ids=places, **how)
        cache = getattr(out, "past_key_values", None)  # Mamba has none: it reads whole rows again
        logits = out.logits[rows, -1].float()  # (running, V)
        if not logits.amax(-1).isfinite().all():
            raise ValueError("the logits are NaN: the weights diverged, lower the learning rate")
        drawn = logits.argmax(-1)
        if temperature > 0:
            cdf = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
            u = uniforms[running, step, None] * cdf[:, -1:]  # rounding: the last is not quite 1
            drawn = torch.searchsorted(cdf, u, right=True)[:, 0]
        answers[running, step] = drawn
        goes_on = [k for k, token in enumerate(drawn.tolist()) if token not in stop]
        if not goes_on:
            break
        running, drawn = running[goes_on], torch.stack([rows, drawn])[:, goes_on]
        (old_rows, new), rows = drawn.unique(dim=1, return_inverse=True)
        if cache is None:
            tokens = torch.cat([tokens[old_rows], new[:, None]], 1)
        else:
            if old_rows.tolist() != list(range(len(mask))):
                cache.reorder_cache(old_rows)
            tokens = new[:, None]
        mask = torch.cat([mask, mask[:, -1:]], 1)[old_rows]
    return [row[row >= 0].tolist() for row in answers]


def world_scores(model, tokenizer, profile, *, n=4, seeds=(0, 1, 2), temperature=1.0) -> dict:
    """true, fluent, careful, (questions, n * seeds) of 0 and 1: sampled answers to the tiny world's
    held-out questions, judged by its table of facts.
    """
    questions = [fact.question for fact in world.facts("test")]
    options = {"n": n, "temperature": temperature, "max_new_tokens": profile.max_new_tokens}
    drawn = [sample(model, tokenizer, questions, seed=seed, **options) for seed in seeds]
    answers = zip(questions, np.concatenate(drawn, axis=1), strict=True)
    read = [[world.read(question, text) for text in texts] for question, texts in answers]
    judged = [[(r.true, r.fluent, r.voice == world.CAREFUL) for r in row] for row in read]
    return dict(zip(("true", "fluent", "careful"), np.moveaxis(judged, 2, 0) * 1.0, strict=True))


@torch.no_grad()
def sampled_kl(model, tokenizer, answers, batch: int = 16) -> dict[str, np.ndarray]:
    """Three unbiased estimates of KL(policy || reference) in nats, (answers,) each, and `tokens`.

    answers: of `sample_ids` at temperature 1 with the same policy, never those of a data set. With
    d = log pi(token) - log ref(token), `k1` sums d, which is noisy; `k3` sums e^-d - 1 + d, which
    is never negative (Schulman 2020, "Approximating KL divergence"); `full` sums the KL of whole
    next-token distributions. tokens: the lengths of the answers.
    """
    estimates = []
    for start in range(0, len(answers), batch):
        rows = collate_rows(answers[start : start + batch], tokenizer.pad_token_id)
        rows = {name: x.to(model.device) for name, x in rows.items()}
        scored, labels = rows.pop("completion_mask")[:, 1:], rows["input_ids"][:, 1:, None]
        policy = model(**rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        with as_reference(model):
            ref = model(**rows, use_cache=False).logits[:, :-1].float().log_softmax(-1)
        d = (policy - ref).gather(-1, labels)[..., 0]  # (N, T-1)
        k = torch.stack([d, torch.expm1(-d) + d, (policy.exp() * (policy - ref)).sum(-1)])
        estimates.append((k * scored).sum(-1).double().cpu())  # (3, N)
    k1, k3, full = torch.cat(estimates, 1).numpy()
    return {"k1": k1, "k3": k3, "full": full, "tokens": np.array([len(a) for _, a in answers])}


def mean_and_error(values) -> tuple[float, float]:
    """(mean, standard error of the mean); the error of a single value, which is unknown, is 0."""
    return float(np.mean(values)), float(sem(values)) if len(values) > 1 else 0.0


def calibration(margins, bins: int = 8) -> dict:
    """Is sigma(margin) a calibrated probability that the chosen answer is the preferred one?

    A pair is seen from the side the model favours: confidence sigma(|m|), right where that side
    was chosen, a tie half right. Gives brier, the mean of (1 - sigma(m))^2 (0.25 by chance);
    confidence and accuracy of bins of equally many pairs; ece, the mean distance of the two.
    """
    margins = np.asarray(margins, dtype=float)
    if len(margins) == 0:
        raise ValueError("calibration needs at least one pair: there are no margins")
    levels, level = np.unique(expit(np.abs(margins)), return_inverse=True)
    right = np.bincount(level, wins(margins, 0)) / np.bincount(level)  # equally sure pairs share it
    parts = np.array_split(np.sort(level), min(bins, len(margins)))
    confidence, accuracy = (np.array([x[p].mean() for p in parts]) for x in (levels, right))
    ece = np.average(np.abs(confidence - accuracy), weights=[len(part) for part in parts])
    scores = {"brier": float(np.mean(expit(-margins) ** 2)), "ece": float(ece)}
    return scores | {"confidence": confidence, "accuracy": accuracy}
