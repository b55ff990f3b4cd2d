"""The enumerable world: closed forms against numbers worked by hand, search, and training."""

import math

import pytest
import torch
from pytest import approx

from dpo_utils import tabular
from dpo_utils.tabular import World


@pytest.fixture
def world():
    return tabular.make_world()


@pytest.fixture
def small():
    """One prompt, two responses, even odds, and r/beta = (log 3, 0): so pi* = (3/4, 1/4)."""
    even, odds = torch.tensor([[[0.5, 0.5]], [[3.0, 1.0]]]).double()
    return World(even, odds.log(), beta=1.0)


def test_closed_forms_by_hand(small):
    best, divergence = tabular.optimal_policy(small), 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert tabular.bradley_terry(small.reward)[0, 0, 1].item() == approx(0.75)
    assert best[0].tolist() == approx([0.75, 0.25])
    assert tabular.kl(best, small.ref).tolist() == approx([divergence])
    assert tabular.kl(torch.tensor([[1.0, 0.0]]), small.ref).tolist() == approx([math.log(2)])
    assert tabular.objective(best, small).tolist() == approx([math.log(2)])  # beta log Z
    assert tabular.objective(small.ref, small).tolist() == approx([0.5 * math.log(3)])
    assert tabular.total_variation(small.ref, best) == approx(0.25)


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_optimum_beats_every_random_policy_by_beta_kl(world, beta):
    world = world._replace(beta=beta)
    draw = torch.randn(10_000, 2, 6, generator=torch.Generator().manual_seed(1)).double()
    rivals, best = (3 * draw).softmax(-1), tabular.optimal_policy(world)
    gap = tabular.objective(best, world) - tabular.objective(rivals, world)
    assert gap.shape == (10_000, 2) and gap.min() > 0
    assert (gap - beta * tabular.kl(rivals, best)).abs().max() < 1e-12


def test_sampled_wins_count_every_click_and_follow_bradley_terry(world):
    wins = tabular.sample_wins(world.reward, 200_000, seed=3)
    assert wins.sum() == 200_000 and wins.diagonal(dim1=1, dim2=2).sum() == 0
    shown = wins + wins.transpose(1, 2)
    off = shown > 0
    error = (wins / shown - tabular.bradley_terry(world.reward))[off].abs().max()
    assert error < 5 * 0.5 / math.sqrt(shown[off].min())  # five standard errors of the rarest pair


def test_dpo_recovers_the_optimum_without_the_reward(world):
    wins = tabular.bradley_terry(world.reward)
    found = tabular.minimise(lambda z: tabular.policy_loss(z, wins, world), world.ref.log())
    assert tabular.total_variation(found.softmax(-1), tabular.optimal_policy(world)) < 1e-6


def test_dpo_and_a_reward_model_lead_to_the_same_policy(world):
    wins = tabular.sample_wins(world.reward, 2_000)
    direct = tabular.minimise(lambda z: tabular.policy_loss(z, wins, world), world.ref.log())
    zeros = torch.zeros_like(world.reward)
    reward = tabular.minimise(lambda r: tabular.reward_model_loss(r, wins), zeros)
    best = tabular.optimal_policy(world._replace(reward=reward))
    assert tabular.total_variation(direct.softmax(-1), best) < 1e-6 and not zeros.any()


def test_ascent_on_the_objective_lands_on_the_optimum(world):
    def cost(logits):
        return -tabular.objective(logits.softmax(-1), world).sum()

    start, best = world.ref.log(), tabular.optimal_policy(world)
    assert tabular.total_variation(tabular.minimise(cost, start).softmax(-1), best) < 1e-6
    path = tabular.descend(cost, start, steps=1000, rate=2.0)
    assert path.shape == (1001, 2, 6) and torch.equal(path[0], start)
    assert tabular.total_variation(path[-1].softmax(-1), best) < 1e-3
