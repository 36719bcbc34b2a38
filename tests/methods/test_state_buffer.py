"""The buffer of states: ages, ends and drops of states, in cases that can be followed by hand."""

import math

import torch

from gengrad.data.families import clouds, read_families
from gengrad.methods.state_buffer import StateBuffer

FAMILIES = read_families({"name": "gaussians", "reach": 0.5})


def second_moment(x, log_rho, weight):
    return (weight * x.double().square().sum(-1)).mean(-1)


def fresh(count, generator):
    return clouds(FAMILIES, count, 16, 2, generator, first=8, tails=1.5)


def buffer(size=12, seed=0):
    return StateBuffer(fresh, size, second_moment, widest, seed)


def widest(x, log_rho):
    """Stands for what a network looks up."""
    return x.abs().amax((1, 2), keepdim=True) + log_rho.amin(1)[:, None, None]


def shrink(x, log_rho, score, found):
    return x / 2, log_rho + 2 * math.log(2), 2 * score


def test_a_state_moves_and_ages_and_keeps_its_place():
    states = buffer()
    x, energy = states.x.clone(), states.energy.clone()
    states.share.fill_(1.0)
    states.advance(shrink, 5, horizon=3)
    assert torch.equal(states.x[:5], x[:5] / 2) and torch.equal(states.x[5:], x[5:])
    assert torch.allclose(states.energy[:5], energy[:5] / 4) and states.age.tolist() == [1] * 5 + [0] * 7
    states.advance(shrink, 10, horizon=3)  # goes round
    assert states.age.tolist() == [2] * 3 + [1] * 9


def test_what_is_looked_up_in_a_cloud_is_that_of_the_cloud_as_it_is():
    """After moves, ends and fresh measures, and after a state is loaded, which does not hold it."""
    states = buffer()
    given = []

    def seen(*state):
        given.append(state)
        return shrink(*state)

    for k in range(9):
        states.advance(seen, 5, horizon=2)
        assert torch.equal(states.found, widest(states.x, states.log_rho)), k
    assert all(torch.equal(found, widest(x, log_rho)) for x, log_rho, _, found in given)
    other = buffer(seed=1)
    other.load_state(states.state())
    assert "found" not in states.state() and torch.equal(other.found, states.found)


def test_weights_stay_with_their_particles_and_come_anew_with_fresh_ones():
    states = buffer()
    weight = states.weight.clone()
    assert (weight[:, :8] == 1).all() and weight[:, 8:].std() > 0.1
    states.share.fill_(1.0)
    states.advance(shrink, 5, horizon=2)
    assert torch.equal(states.weight, weight)
    states.advance(shrink, 12, horizon=2)  # the next 7 and the first 5, which end
    assert torch.equal(states.weight[5:], weight[5:]) and not torch.equal(states.weight[:5], weight[:5])


def test_a_state_from_before_there_were_weights_has_none():
    states, state = buffer(), buffer().state()
    del state["weight"]
    states.load_state(state)
    assert torch.equal(states.weight, torch.ones(12, 16))


def test_a_life_ends_at_the_horizon_with_a_fresh_measure():
    states = buffer()
    states.share.fill_(1.0)
    for _ in range(3):
        states.advance(shrink, 12, horizon=3)
    assert states.age.tolist() == [0] * 12 and states.filled == 2 and states.dropped == 0
    assert (states.energy > 0.05).all()  # three halvings would have left a 64th


def test_after_the_first_lives_all_ages_are_there_at_once():
    states = buffer(size=60)
    for _ in range(40):
        states.advance(shrink, 60, horizon=6)
    assert (torch.bincount(states.age, minlength=6) >= 6).all()


def test_states_that_are_not_finite_or_whose_energy_rose_are_dropped():
    def bad(x, log_rho, score, found):
        x, log_rho, score = shrink(x, log_rho, score, found)
        x[0, 0], log_rho[1, 0] = math.nan, math.inf
        x[2] *= 4  # twice as large as before
        return x, log_rho, score

    states = buffer()
    states.share.fill_(1.0)
    states.advance(bad, 6, horizon=5)
    assert states.dropped == 3 and states.age.tolist() == [0, 0, 0, 1, 1, 1] + [0] * 6
    assert states.x.isfinite().all() and states.log_rho.isfinite().all() and states.energy.isfinite().all()


def test_ages_are_drawn_equally_often_however_many_states_have_them():
    states = buffer(size=20)
    states.age[:2], states.age[2:] = 4, 1
    rows = states.pick(4000, torch.Generator().manual_seed(0))
    assert abs((states.age[rows] == 4).double().mean() - 0.5) < 0.04  # five standard errors


def test_a_buffer_that_takes_its_state_back_goes_on_bit_for_bit():
    one, two = buffer(), buffer(seed=0)
    for k in range(7):
        one.advance(shrink, 5, horizon=2 + k // 3)
    two.load_state(one.state())
    for states in (one, two):
        for _ in range(9):
            states.advance(shrink, 5, horizon=4)
    a, b = one.state(), two.state()
    assert all(torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a)
    three = buffer()
    state = one.state()
    del state["filled"]  # without it other measures come
    three.load_state(state)
    for states in (one, three):
        for _ in range(9):
            states.advance(shrink, 5, horizon=4)
    assert not torch.equal(one.x, three.x)
