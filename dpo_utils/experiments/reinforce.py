"""The road DPO cuts short: an explicit reward model, then a policy gradient with a KL penalty (REINFORCE, no PPO)."""

import numpy as np
import torch
import torch.nn.functional as F

from dpo_utils.evaluate import sample_ids
from dpo_utils.logps import completion_logps, unwrap
from dpo_utils.models import as_reference, trainable
from dpo_utils.step import learning_rate_at
from dpo_utils.tokens import as_item, collate_rows, tokenize_all
from dpo_utils.train import options_for


class RewardModel:
    """A linear head on the reference's own last hidden states, averaged over the answer's tokens."""

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.head = model, tokenizer, None

    @torch.no_grad()
    def features(self, rows, batch: int = 64) -> torch.Tensor:
        """rows: (prompt ids, answer ids) -> (N, H), float32."""
        out = []
        for start in range(0, len(rows), batch):
            part = collate_rows(rows[start : start + batch], self.tokenizer.pad_token_id)
            part = {name: x.to(self.model.device) for name, x in part.items()}
            with as_reference(self.model):
                hidden = unwrap(self.model).base_model(
                    input_ids=part["input_ids"], attention_mask=part["attention_mask"], use_cache=False
                ).last_hidden_state.float()  # fmt: skip
            mask = part["completion_mask"][..., None]
            out.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(out)

    def __call__(self, rows) -> torch.Tensor:
        """Rewards (N,) of (prompt ids, answer ids)."""
        return self.features(rows) @ self.head


def fit_reward_model(model, tokenizer, pairs, profile, decay: float = 1e-3) -> RewardModel:
    """Maximum likelihood under Bradley-Terry, -log s(r(chosen) - r(rejected)), plus `decay` times the squared head."""
    rows, _ = tokenize_all(pairs, tokenizer, profile.max_length)
    items, reward = [as_item(row) for row in rows], RewardModel(model, tokenizer)
    sides = [reward.features([(prompt, answers[side]) for prompt, answers in items]) for side in (0, 1)]
    difference = sides[0] - sides[1]  # (pairs, H)
    reward.head = torch.zeros(difference.shape[1], device=difference.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([reward.head], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -F.logsigmoid(difference @ reward.head).mean() + decay * reward.head.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    reward.head = reward.head.detach()
    return reward


def train_reinforce(model, tokenizer, prompts, reward, profile, *, answers: int = 4, on_step=None) -> list[dict]:
    """Train the adapter in place on its own answers; returns a history (step, reward, kl, grad_norm).

    A step draws `answers` answers to 2 batch / answers prompts: as many as DPO reads. What an answer earns is
    r(x, y) - beta log(pi/ref); from it the mean of the prompt's other answers is taken away (leave-one-out, Ahmadian et
    al. 2024, arXiv 2402.14740), and the rest weighs grad log pi(y|x).
    """
    rng = np.random.default_rng(profile.seed)
    optimizer = torch.optim.AdamW(trainable(model), lr=profile.learning_rate, weight_decay=0.0)
    history, options = [], options_for(profile, tokenizer)
    model.train()
    for step in range(1, profile.steps + 1):
        asked = [prompts[i] for i in rng.choice(len(prompts), 2 * profile.batch // answers, replace=False)]
        drawn = sample_ids(model, tokenizer, asked, answers, 1.0, profile.max_new_tokens, seed=profile.seed * 100_003 + step)
        items = [(prompt, [answer]) for prompt, answer in drawn]
        earned, log_ratios = _earnings(model, reward, drawn, items, profile.beta, options)
        groups = earned.view(-1, answers)
        advantages = (groups - (groups.sum(1, keepdim=True) - groups) / (answers - 1)).flatten()
        for numbers, logps in completion_logps(model, items, **options):
            (-(advantages[numbers].to(logps) * logps[:, 0]).sum() / len(items)).backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable(model), profile.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, profile.steps, profile.learning_rate, profile.warmup)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        history.append({"step": step, "reward": float(earned.mean()), "kl": float(log_ratios.mean()), "grad_norm": float(norm)})
        if on_step:
            on_step(history)
    return history


@torch.no_grad()
def _earnings(model, reward, drawn, items, beta, options):
    """(r - beta log-ratio, log-ratio), each (N,), on the CPU."""
    policy, reference = torch.empty(len(items)), torch.empty(len(items))
    for numbers, logps in completion_logps(model, items, **options):
        policy[numbers] = logps[:, 0].float().cpu()
    with as_reference(model):
        for numbers, logps in completion_logps(model, items, **options):
            reference[numbers] = logps[:, 0].float().cpu()
    return reward(drawn).cpu() - beta * (policy - reference), policy - reference
