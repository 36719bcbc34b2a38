"""What holds for every functional that compares with samples, over the registry, and the closed forms of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gengrad.functionals import EnergyDistance, Functional, InteractionEnergy, PotentialEnergy, SinkhornDivergence
from gengrad.registry import FUNCTIONALS

# settings tight enough that the solver's tolerance does not show, in fp64; another functional has its defaults
TIGHT = {"sinkhorn_divergence": {"epsilon": 0.3, "tol": 1e-6}, "riesz_mmd": {"r": 1.3}}


TO_SAMPLES = [name for name in FUNCTIONALS if FUNCTIONALS.get(name).takes == "samples"]


def cloud(n, d, seed):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(name, target):
    return FUNCTIONALS.get(name)(target, **TIGHT.get(name, {}))


@pytest.mark.parametrize("name", TO_SAMPLES)
@settings(deadline=None, max_examples=8)
@given(seed=st.integers(0, 1000), n=st.integers(2, 9), m=st.integers(1, 9), d=st.integers(1, 3))
def test_the_velocity_is_minus_n_times_the_gradient_of_the_value(name, seed, n, m, d):
    x, functional = cloud(n, d, seed), make(name, cloud(m, d, seed + 1) + 1)
    h, v = 1e-5, functional.velocity(x)
    direction = cloud(n, d, seed + 2)
    slope = (functional(x + h * direction) - functional(x - h * direction)) / (2 * h)
    # central differences of a value solved to 1e-6: its error over 2h leaves about 1e-3 of a slope of size one
    assert abs(float(slope) + float((v * direction).sum() / n)) < 3e-3


@pytest.mark.parametrize("name", TO_SAMPLES)
def test_duplicating_all_particles_changes_neither_value_nor_velocity(name):
    x, functional = cloud(7, 2, 0), make(name, cloud(5, 2, 1))
    twice = torch.cat([x, x])
    assert torch.allclose(functional(twice), functional(x), rtol=1e-5, atol=1e-7)
    assert torch.allclose(functional.velocity(twice)[:7], functional.velocity(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", TO_SAMPLES)
def test_permuting_particles_permutes_velocities(name):
    x, functional, p = cloud(7, 2, 0), make(name, cloud(5, 2, 1)), torch.randperm(7)
    assert torch.allclose(functional.velocity(x[p]), functional.velocity(x)[p], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TO_SAMPLES)
def test_at_the_target_value_and_velocity_vanish(name):
    y = cloud(8, 2, 3)
    functional = make(name, y)
    assert abs(float(functional(y))) < 1e-6
    assert functional.velocity(y).abs().max() < 1e-5


@pytest.mark.parametrize("name", TO_SAMPLES)
def test_images_move_as_images(name):
    x, y = cloud(4, 9, 0).view(4, 1, 3, 3), cloud(5, 9, 1).view(5, 1, 3, 3)
    v = make(name, y).velocity(x)
    assert v.shape == x.shape
    assert torch.allclose(v.flatten(1), make(name, y.flatten(1)).velocity(x.flatten(1)))


def test_sums_add_values_and_velocities():
    x, y = cloud(6, 2, 0), cloud(6, 2, 1)
    f, g = make("sinkhorn_divergence", y), make("energy_distance", y)
    total = 0.5 * f + g * 2
    assert torch.allclose(total(x), 0.5 * f(x) + 2 * g(x))
    assert torch.allclose(total.velocity(x), 0.5 * f.velocity(x) + 2 * g.velocity(x))
    assert not total.needs_density


def test_energy_distance_of_two_diracs_is_their_distance_and_the_velocity_points_there():
    x, y = torch.zeros(1, 3), torch.tensor([[0.0, 3.0, 4.0]])
    functional = EnergyDistance(y)
    assert float(functional(x)) == pytest.approx(5.0)
    assert torch.allclose(functional.velocity(x), torch.tensor([[0.0, 0.6, 0.8]]))


def test_the_metric_of_that_name_is_twice_the_functional():
    from gengrad.evaluation.transport import energy_distance

    x, y = torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [3.0, 4.0]])  # both leave out no pair of distance above zero
    assert energy_distance(x, y) == pytest.approx(2 * float(EnergyDistance(y)(x))) == pytest.approx(10.0)


def test_sinkhorn_divergence_of_two_diracs_is_half_the_squared_distance():
    x, y = torch.zeros(1, 3), torch.tensor([[0.0, 3.0, 4.0]])
    functional = SinkhornDivergence(y, epsilon=0.1)
    assert float(functional(x)) == pytest.approx(12.5)
    assert torch.allclose(functional.velocity(x), y)


def test_a_wrong_setting_is_a_value_error_that_names_it():
    with pytest.raises(ValueError, match="epsilon_rel"):
        SinkhornDivergence(torch.zeros(2, 2), epsilon_rel=-1.0)


FIELDS = [
    *(make(name, cloud(6, 2, 4)) for name in TO_SAMPLES),
    PotentialEnergy(potential="double_well"),
    InteractionEnergy(),
    InteractionEnergy(attraction=4.0, repulsion=2.0),
    InteractionEnergy(lambda z: (1 + z.square().sum(-1)).sqrt()),
    0.5 * PotentialEnergy(potential="double_well") + 2 * InteractionEnergy(),
]


@pytest.mark.parametrize("functional", FIELDS, ids=lambda f: type(f).__name__)
def test_the_field_at_the_particles_is_their_velocity(functional):
    x = cloud(9, 2, 0)
    assert torch.allclose(functional.field(x)(x), functional.velocity(x), rtol=1e-4, atol=1e-5)
    assert functional.field(x)(cloud(4, 2, 7)).shape == (4, 2)


def test_a_functional_without_a_field_of_its_own_has_that_of_one_particle_more():
    class Variance(Functional):
        """F = E |x - E x|^2 / 2, whose velocity at y is E x - y."""

        takes = "nothing"

        def value(self, x):
            return (x - x.mean(0)).square().sum(1).mean() / 2

    x, y = cloud(400, 2, 0), cloud(5, 2, 1)
    assert torch.allclose(Variance().field(x)(y), x.mean(0) - y, atol=2e-2)  # O(1/n)
