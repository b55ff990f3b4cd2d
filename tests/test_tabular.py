"""The enumerable world: closed forms against numbers worked by hand, against search, and against training."""

import math

import pytest
import torch

from dpo_utils import tabular
from dpo_utils.tabular import World


@pytest.fixture
def world():
    return tabular.make_world()


@pytest.fixture
def small():
    """One prompt, two responses, even odds, and r/beta = (log 3, 0): so pi* = (3/4, 1/4) and Z = 2."""
    reward = torch.tensor([[math.log(3), 0]], dtype=torch.float64)
    return World(ref=torch.full((1, 2), 0.5, dtype=torch.float64), reward=reward, beta=1.0)


def test_closed_forms_by_hand(small):
    assert tabular.bradley_terry(small.reward)[0, 0, 1].item() == pytest.approx(0.75)
    assert tabular.log_partition(small).exp().tolist() == pytest.approx([2])
    assert tabular.optimal_policy(small)[0].tolist() == pytest.approx([0.75, 0.25])
    divergence = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert tabular.kl(tabular.optimal_policy(small), small.ref).tolist() == pytest.approx([divergence])
    best = tabular.objective(tabular.optimal_policy(small), small)
    assert best.tolist() == pytest.approx([0.75 * math.log(3) - divergence])
    assert best.tolist() == pytest.approx([math.log(2)])  # beta log Z
    assert tabular.objective(small.ref, small).tolist() == pytest.approx([0.5 * math.log(3)])


def test_kl_allows_a_probability_of_zero(small):
    assert tabular.kl(torch.tensor([[1.0, 0.0]]).double(), small.ref).tolist() == pytest.approx([math.log(2)])


def test_tables_are_distributions(world):
    for policy in (world.ref, tabular.optimal_policy(world)):
        assert policy.dtype == torch.float64 and policy.shape == (2, 6)
        assert policy.sum(-1).tolist() == pytest.approx([1, 1], abs=1e-14)
    p = tabular.bradley_terry(world.reward)
    assert (p + p.transpose(1, 2)).sub(1).abs().max() < 1e-15


@pytest.mark.parametrize("beta", [0.05, 0.5, 5.0])
def test_the_optimum_beats_every_random_policy(world, beta):
    world = World(world.ref, world.reward, beta)
    draw = torch.randn(10_000, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rivals = (3 * draw).softmax(-1)
    gap = tabular.objective(tabular.optimal_policy(world), world) - tabular.objective(rivals, world)
    assert gap.shape == (10_000, 2) and gap.min() > 0


def test_the_gap_to_the_optimum_is_beta_kl(world):
    rival = torch.full((2, 6), 1 / 6, dtype=torch.float64)
    best = tabular.optimal_policy(world)
    gap = tabular.objective(best, world) - tabular.objective(rival, world)
    assert gap.tolist() == pytest.approx((world.beta * tabular.kl(rival, best)).tolist(), abs=1e-12)
    assert tabular.objective(best, world).tolist() == pytest.approx((0.5 * tabular.log_partition(world)).tolist())


def test_implicit_reward_is_the_reward_up_to_beta_log_z(world):
    left = world.reward - tabular.implicit_reward(tabular.optimal_policy(world), world)
    assert (left - 0.5 * tabular.log_partition(world)[:, None]).abs().max() < 1e-13


def test_sampled_wins_count_every_click_and_follow_bradley_terry(world):
    wins = tabular.sample_wins(world.reward, 200_000, seed=3)
    assert wins.sum() == 200_000 and wins.diagonal(dim1=1, dim2=2).sum() == 0
    shown = wins + wins.transpose(1, 2)
    off = shown > 0
    error = ((wins / shown) - tabular.bradley_terry(world.reward))[off].abs().max()
    assert error < 5 * 0.5 / math.sqrt(shown[off].min())  # five standard errors of the rarest pair


def test_dpo_recovers_the_optimum_without_the_reward(world):
    wins = tabular.expected_wins(world.reward)
    found = tabular.minimise(lambda z: tabular.policy_loss(z, wins, world), world.ref.log()).softmax(-1)
    assert tabular.total_variation(found, tabular.optimal_policy(world)) < 1e-6


def test_two_roads_meet(world):
    wins = tabular.sample_wins(world.reward, 2_000)
    direct = tabular.minimise(lambda z: tabular.policy_loss(z, wins, world), world.ref.log()).softmax(-1)
    reward = tabular.minimise(lambda r: tabular.reward_model_loss(r, wins), torch.zeros(2, 6).double())
    assert tabular.total_variation(direct, tabular.optimal_policy(World(world.ref, reward, world.beta))) < 1e-6


def test_ascent_on_the_objective_lands_on_the_optimum(world):
    def cost(logits):
        return -tabular.objective(logits.softmax(-1), world).sum()

    best = tabular.optimal_policy(world)
    assert tabular.total_variation(tabular.minimise(cost, world.ref.log()).softmax(-1), best) < 1e-6
    path = tabular.descend(cost, world.ref.log(), steps=1000, rate=2.0)
    assert path.shape == (1001, 2, 6) and torch.equal(path[0], world.ref.log())
    assert tabular.total_variation(path[-1].softmax(-1), best) < 1e-3


def test_total_variation_by_hand():
    assert tabular.total_variation(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]])) == 0.25
