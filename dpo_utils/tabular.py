"""A world small enough to enumerate: X prompts, K responses each, every probability in a table.

A policy is a float64 table (X, K). Preferences are a table `wins` (X, K, K): how often i was
preferred to j under prompt x. Equation numbers are those of Rafailov et al. 2023.
"""

from collections import namedtuple

import torch
from torch.nn.functional import logsigmoid

from dpo_utils.losses import dpo_loss

# What is true: the reference policy pi_ref(y|x) and the reward r(x, y), both (X, K), and beta.
World = namedtuple("World", "ref reward beta")


def make_world(prompts=2, responses=6, beta=0.5, seed=0) -> World:
    """A random world: rewards standard normal, reference the softmax of standard normals."""
    generator = torch.Generator().manual_seed(seed)
    ref, reward = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return World(ref.softmax(-1), reward, beta)


def optimal_policy(world: World):
    """pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x), (X, K). Eq. 4."""
    return (world.ref.log() + world.reward / world.beta).softmax(-1)


def kl(policy, ref):
    """KL(policy || ref) in nats, (X, K) -> (X,); a policy's zero probability adds nothing."""
    return torch.xlogy(policy, policy / ref).sum(-1)


def objective(policy, world: World):
    """J = E_policy[r] - beta KL(policy || ref) for each prompt, (X,). Eq. 3."""
    return (policy * world.reward).sum(-1) - world.beta * kl(policy, world.ref)


def total_variation(p, q):
    """The largest difference in probability that two policies give any event, over all prompts."""
    return 0.5 * (p - q).abs().sum(-1).max().item()


def bradley_terry(reward):
    """p(i preferred to j | x) = sigmoid(r_i - r_j), `wins` without noise: (X, K, K). Eq. 1."""
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def sample_wins(reward, n, seed=0):
    """Counts of n clicks, (X, K, K): random prompts and pairs of responses, won with eq. 1."""
    p = bradley_terry(reward) * (1 - torch.eye(reward.shape[-1]))  # nothing is shown with itself
    generator = torch.Generator().manual_seed(seed)
    clicks = p.flatten().multinomial(n, replacement=True, generator=generator)
    return clicks.bincount(minlength=p.numel()).view_as(p).to(p)


def reward_model_loss(reward, wins):
    """Mean negative log-likelihood of the preferences under a table of rewards. Eq. 2."""
    return -(wins * logsigmoid(reward[:, :, None] - reward[:, None, :])).sum() / wins.sum()


def policy_loss(logits, wins, world: World, loss=dpo_loss, **options):
    """Mean preference loss of the policy softmax(logits), by default eq. 7. It reads no reward."""
    x, i, j = wins.nonzero(as_tuple=True)
    logp, ref = logits.log_softmax(-1), world.ref.log()
    losses, _, _ = loss(logp[x, i], logp[x, j], ref[x, i], ref[x, j], beta=world.beta, **options)
    return (wins[x, i, j] * losses).sum() / wins.sum()


def minimise(loss, start):
    """The table with the lowest loss(table), by L-BFGS to the end of float64; keeps `start`."""
    table, gradient_and_value = start.clone(), torch.func.grad_and_value(loss)
    exact = {"max_iter": 500, "tolerance_grad": 1e-13, "tolerance_change": 1e-18}

    def closure():
        table.grad, value = gradient_and_value(table)
        return value

    torch.optim.LBFGS([table], line_search_fn="strong_wolfe", **exact).step(closure)
    return table


def descend(loss, start, steps, rate):
    """Plain gradient descent on loss(table): every table on the way, (steps + 1, X, K)."""
    path, gradient = [start], torch.func.grad(loss)
    for _ in range(steps):
        path.append(path[-1] - rate * gradient(path[-1]))
    return torch.stack(path)
