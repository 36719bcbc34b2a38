"""The trajectory pool reads straight segments at any time and keeps its memory bound."""

import pytest
import torch

from gengrad.flows.pool import TrajectoryPool

TIMES = torch.tensor([0.0, 0.5, 1.0])


def paths(n, seed=0):
    return torch.randn(3, n, 2, generator=torch.Generator().manual_seed(seed))


def test_between_two_states_a_particle_moves_straight():
    states, pool = paths(4), TrajectoryPool(TIMES, capacity=1, memory_bound=10**6)
    pool.add(states)
    x, w = pool.segments(torch.tensor([2, 2, 0]), torch.tensor([0.0, 0.25, 0.75]))
    assert torch.allclose(x[0], states[0, 2])
    assert torch.allclose(x[1], (states[0, 2] + states[1, 2]) / 2)
    assert torch.allclose(x[2], (states[1, 0] + states[2, 0]) / 2)
    assert torch.allclose(w[2], (states[2, 0] - states[1, 0]) / 0.5)


def test_following_the_velocities_ends_at_the_last_state():
    states, pool = paths(5), TrajectoryPool(TIMES, capacity=1, memory_bound=10**6)
    pool.add(states)
    x, rows, steps = states[0], torch.arange(5), 10
    for step in range(steps):
        x = x + pool.segments(rows, torch.full((5,), step / steps))[1] / steps
    assert torch.allclose(x, states[-1], atol=1e-5)


def test_the_ring_drops_the_oldest_first():
    pool = TrajectoryPool(TIMES, capacity=2, memory_bound=10**6)
    kept = [paths(3, seed) for seed in range(3)]
    for states in kept:
        pool.add(states)
    x, _ = pool.segments(torch.arange(6), torch.zeros(6))
    assert len(pool) == 6
    assert torch.allclose(x, torch.cat([kept[1][0], kept[2][0]]))


def test_the_memory_bound_holds_whatever_the_capacity():
    one = paths(10).nbytes
    pool = TrajectoryPool(TIMES, capacity=100, memory_bound=int(2.5 * one))
    for seed in range(7):
        pool.add(paths(10, seed))
        assert pool.nbytes <= 2.5 * one
    assert len(pool) == 20


def test_a_batch_of_paths_beyond_the_bound_is_refused_with_what_to_change():
    with pytest.raises(ValueError, match=r"method\.ot_batch"):
        TrajectoryPool(TIMES, capacity=1, memory_bound=10).add(paths(10))
