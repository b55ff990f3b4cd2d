"""A world small enough to enumerate: X prompts, K responses each, every probability a number in a table.

All tables are float64. A policy is a table (X, K) of probabilities; trained ones are the softmax of a table of logits.
Preferences are a table `wins` (X, K, K): wins[x, i, j] is how often i was preferred to j under prompt x, as counts of
sampled clicks or as exact probabilities. Equation numbers are those of Rafailov et al. 2023.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from dpo_utils.losses import dpo_loss


@dataclass(frozen=True)
class World:
    """What is true: a reference policy pi_ref(y|x) and a reward r(x, y), both (X, K), and the strength beta."""

    ref: torch.Tensor
    reward: torch.Tensor
    beta: float


def make_world(prompts=2, responses=6, beta=0.5, seed=0) -> World:
    """A random world: rewards standard normal, reference the softmax of standard normals."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, prompts, responses, generator=generator, dtype=torch.float64)
    return World(ref=draw[0].softmax(-1), reward=draw[1], beta=beta)


# ---- closed forms


def bradley_terry(reward):
    """p(i preferred to j | x) = sigmoid(r_i - r_j): (X, K) -> (X, K, K). Eq. 1."""
    return torch.sigmoid(reward[:, :, None] - reward[:, None, :])


def log_partition(world: World):
    """log Z(x) = log sum_y pi_ref(y|x) exp(r(x,y) / beta), (X,). Eq. 4."""
    return (world.ref.log() + world.reward / world.beta).logsumexp(-1)


def optimal_policy(world: World):
    """pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x), (X, K). Eq. 4."""
    return (world.ref.log() + world.reward / world.beta - log_partition(world)[:, None]).exp()


def kl(policy, ref):
    """KL(policy || ref) for each prompt in nats, (X, K) -> (X,); a probability of zero adds nothing."""
    return torch.where(policy > 0, policy * (policy.clamp(min=1e-300) / ref).log(), 0.0).sum(-1)


def objective(policy, world: World):
    """J = E_policy[r] - beta KL(policy || ref) for each prompt, (X,). Eq. 3."""
    return (policy * world.reward).sum(-1) - world.beta * kl(policy, world.ref)


def implicit_reward(policy, world: World):
    """beta log(policy / ref), (X, K): the reward whose optimum the policy is, up to beta log Z(x). Eq. 5."""
    return world.beta * (policy / world.ref).log()


def total_variation(p, q):
    """The largest difference in probability the two policies give any event, over prompts: a number in [0, 1]."""
    return 0.5 * (p - q).abs().sum(-1).max().item()


# ---- preferences and what is learnt from them


def expected_wins(reward):
    """Preferences without noise: every pair shown equally often and won with its exact probability, (X, K, K)."""
    return _off_diagonal(bradley_terry(reward))


def sample_wins(reward, n, seed=0):
    """Counts of n sampled clicks, (X, K, K): a prompt and two different responses at random, then a coin by eq. 1."""
    generator = torch.Generator().manual_seed(seed)
    p = bradley_terry(reward)
    shown = _off_diagonal(torch.ones_like(p)).flatten().multinomial(n, replacement=True, generator=generator)
    first_wins = torch.rand(n, generator=generator, dtype=p.dtype) < p.flatten()[shown]
    asked = shown.new_zeros(p.numel()).index_add(0, shown, torch.ones_like(shown)).view(p.shape)
    kept = shown.new_zeros(p.numel()).index_add(0, shown, first_wins.long()).view(p.shape)
    return (kept + (asked - kept).transpose(1, 2)).to(p.dtype)  # a lost click for (i, j) is a win for (j, i)


def _off_diagonal(table):
    return table * (1 - torch.eye(table.shape[-1], dtype=table.dtype))


def reward_model_loss(reward, wins):
    """Mean negative log-likelihood of the preferences under a table of rewards. Eq. 2."""
    return -(wins * logsigmoid(reward[:, :, None] - reward[:, None, :])).sum() / wins.sum()


def policy_loss(logits, wins, world: World, loss=dpo_loss, **options):
    """Mean preference loss of the policy softmax(logits), (X, K); eq. 7 with the default loss. Reads no reward."""
    x, i, j = wins.nonzero(as_tuple=True)
    logp, ref = logits.log_softmax(-1), world.ref.log()
    losses, _, _ = loss(logp[x, i], logp[x, j], ref[x, i], ref[x, j], beta=world.beta, **options)
    return (wins[x, i, j] * losses).sum() / wins.sum()


# ---- two optimisers


def minimise(loss, start):
    """The table that minimises loss(table), by L-BFGS to the end of float64; start is left as it is."""
    table = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [table], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-18, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss(table)
        value.backward()
        return value

    optimiser.step(closure)
    return table.detach()


def descend(loss, start, steps, rate):
    """Plain gradient descent on loss(table); gives every table on the way, (steps + 1, X, K)."""
    path = [start.clone()]
    for _ in range(steps):
        table = path[-1].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(table), table)
        path.append(table.detach() - rate * slope)
    return torch.stack(path)
