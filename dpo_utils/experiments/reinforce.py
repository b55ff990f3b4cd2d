"""The way round that DPO avoids: a reward model, then a policy gradient with a KL penalty."""

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from dpo_utils.evaluate import sample_ids
from dpo_utils.logps import all_logps, completion_logps, options_for
from dpo_utils.models import as_reference, trainable, unwrap
from dpo_utils.tokens import as_item, collate_rows, tokenize_all
from dpo_utils.train import learning_rate_at


def fit_reward_model(model, tokenizer, pairs, profile):
    """A Bradley-Terry reward: a function of rows (prompt ids, answer ids) that gives (N,).

    It is linear in the reference's last hidden states, averaged over the answer. Its loss is the
    mean of -log s(r(chosen) - r(rejected)), plus 0.001 times the squared weights.
    """

    @torch.no_grad()
    def features(rows):  # (N, H)
        out = []
        for start in range(0, len(rows), 64):
            batch = collate_rows(rows[start : start + 64], tokenizer.pad_token_id)
            batch = {name: x.to(model.device) for name, x in batch.items()}
            mask = batch.pop("completion_mask")[..., None]
            with as_reference(model):
                hidden = unwrap(model).base_model(**batch, use_cache=False).last_hidden_state
            out.append((hidden.float() * mask).sum(1) / mask.sum(1))
        return torch.cat(out)

    items = [as_item(row) for row in tokenize_all(pairs, tokenizer, profile.max_length)[0]]
    chosen, rejected = (features([(x, answers[i]) for x, answers in items]) for i in (0, 1))
    difference = (chosen - rejected).cpu().numpy()  # (pairs, H)
    both_ways, labels = np.concatenate([difference, -difference]), np.repeat([1, 0], len(items))
    fit = LogisticRegression(C=250 / len(items), fit_intercept=False, max_iter=1000)
    head = torch.tensor(fit.fit(both_ways, labels).coef_[0]).to(chosen)
    return lambda rows: features(rows) @ head


def train_reinforce(model, tokenizer, pairs, profile, reward=None, on_step=None):
    """Train the adapter in place on its own answers; gives rows of step, reward, kl, grad_norm.

    reward: by default `fit_reward_model` of the pairs. A step draws 4 answers to each of batch / 2
    prompts, as many as DPO reads. Each earns r(x, y) - beta log(pi/ref), less the mean of its
    prompt's others (Ahmadian et al. 2024, arXiv 2402.14740): the weight of grad log pi(y|x).
    """
    reward = reward or fit_reward_model(model, tokenizer, pairs, profile)
    prompts = list({str(pair["prompt"]): pair["prompt"] for pair in pairs}.values())
    rng, options, history = np.random.default_rng(profile.seed), options_for(profile, tokenizer), []
    optimizer = torch.optim.AdamW(trainable(model), lr=profile.learning_rate, weight_decay=0.0)
    model.train()
    for step in range(1, profile.steps + 1):
        asked = [prompts[i] for i in rng.choice(len(prompts), profile.batch // 2, replace=False)]
        how = {"max_new_tokens": profile.max_new_tokens, "seed": profile.seed * 100_003 + step}
        drawn = sample_ids(model, tokenizer, asked, n=4, **how)
        items = [(prompt, [answer]) for prompt, answer in drawn]
        kl = all_logps(model, items, **options)[:, 0].float()
        with as_reference(model):
            kl -= all_logps(model, items, **options)[:, 0].float()
        earned = reward(drawn).cpu() - profile.beta * kl
        groups = earned.view(-1, 4)  # (prompts, answers)
        advantages = (groups - groups.mean(1, keepdim=True)).flatten() * 4 / 3
        for numbers, logps in completion_logps(model, items, **options):
            (-(advantages[numbers].to(logps) * logps[:, 0]).sum() / len(items)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(model), profile.max_grad_norm)
        rate = learning_rate_at(step, profile.steps, profile.learning_rate, profile.warmup)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        means = {"reward": earned.mean(), "kl": kl.mean(), "grad_norm": norm}
        history.append({"step": step} | {name: x.item() for name, x in means.items()})
        if on_step:
            on_step(history)
    return history
