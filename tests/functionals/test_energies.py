"""Potential, interaction and internal energies: closed forms, velocities, changes of variables, and bad input."""

import math

import pytest
import torch

import gengrad
from gengrad.data import Gaussian
from gengrad.data.draws import generator_for
from gengrad.functionals import KL, Density, Entropy, InteractionEnergy, PotentialEnergy, PowerEntropy, build_expression
from gengrad.functionals.expression import read_expression
from gengrad.registry import FUNCTIONALS, POTENTIALS, unknown

SETTINGS = {"gaussian_mixture": {"means": [[0.0, 0.0], [2.0, 1.0]], "scales": [0.5, 1.0]}}


def cloud(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", [name for name in POTENTIALS if not hasattr(POTENTIALS.get(name), "made_by_a_run")])
def test_a_named_potential_gives_one_number_a_point_and_its_energy_the_velocity_minus_its_gradient(name):
    energy = PotentialEnergy(potential={"name": name, **SETTINGS.get(name, {})})
    x, h = cloud(6, 2), 1e-5
    direction = cloud(6, 2, 1)
    slope = (energy.V(x + h * direction) - energy.V(x - h * direction)) / (2 * h)
    # central differences of fourth-order potentials: an error of h^2 times some hundreds
    assert torch.allclose(slope, -(energy.velocity(x) * direction).sum(1), atol=1e-6)


def test_a_quadratic_potential_has_the_energy_of_a_gaussian():
    energy = PotentialEnergy(potential={"name": "quadratic", "matrix": [[2.0, 0.5], [0.5, 1.0]], "centre": [1.0, 0.0]})
    x = cloud(9, 2)
    a, b = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([1.0, 0.0]).double()
    assert torch.allclose(energy(x), ((x - b) * ((x - b) @ a)).sum(1).mean() / 2)
    assert torch.allclose(energy.velocity(x), -(x - b) @ a)


def test_interactions_of_two_particles_are_known():
    x = torch.tensor([[0.0], [2.0]], dtype=torch.float64)
    smooth = InteractionEnergy(attraction=4.0, repulsion=2.0)  # W(2) = 4 - 2, W(0) = 0, half of all four pairs
    assert float(smooth(x)) == pytest.approx((4 - 2) / 4)
    singular = InteractionEnergy(attraction=2.0, repulsion=0.0)  # one pair alone: W(2) = 2 - log 2, halved
    assert float(singular(x)) == pytest.approx((2 - math.log(2)) / 2)


def test_a_smooth_interaction_does_not_see_duplication_and_conserves_the_mean():
    x, energy = cloud(7, 2), InteractionEnergy(attraction=4.0, repulsion=2.0)
    assert torch.allclose(energy(torch.cat([x, x])), energy(x))
    assert energy.velocity(x).mean(0).abs().max() < 1e-12
    custom = InteractionEnergy(lambda z: z.square().sum(-1).square() / 4 - z.square().sum(-1) / 2)
    assert torch.allclose(custom(x), energy(x)) and torch.allclose(custom.velocity(x), energy.velocity(x))


def test_colliding_particles_of_a_singular_interaction_are_refused():
    with pytest.raises(ValueError, match="1 pairs of 2 particles coincide"):
        InteractionEnergy()(torch.zeros(2, 3))


def test_a_pair_that_rounding_brought_together_is_left_out():
    x = cloud(100, 1)
    x[1] = x[0]
    pairs = [(i, j) for i in range(100) for j in range(i) if (i, j) != (1, 0)]
    z = torch.stack([x[i, 0] - x[j, 0] for i, j in pairs])
    energy = InteractionEnergy()
    assert torch.allclose(energy(x), (z.square() / 2 - z.abs().log()).mean() / 2)
    assert energy.velocity(x).isfinite().all()


def test_internal_energies_of_a_gaussian_are_known():
    s = 0.7
    x = s * cloud(200_000, 1)
    log_rho = -x[:, 0].square() / (2 * s**2) - math.log(s * math.sqrt(2 * math.pi))
    density = Density(log_rho, -x / s**2)
    # Ent N(0, s^2) = -(1 + log 2 pi s^2) / 2, int rho^2 = 1 / (2 s sqrt(pi)); standard errors of 200,000 draws: 2e-3
    assert float(Entropy()(x, density)) == pytest.approx(-(1 + math.log(2 * math.pi * s**2)) / 2, abs=8e-3)
    assert float(PowerEntropy(m=2.0)(x, density)) == pytest.approx(1 / (2 * s * math.sqrt(math.pi)), abs=4e-3)
    assert torch.allclose(Entropy().velocity(x, density=density), x / s**2)
    # -grad m/(m-1) rho^{m-1} with m = 2: -2 rho grad log rho
    assert torch.allclose(PowerEntropy(m=2.0).velocity(x, density=density), 2 * log_rho.exp()[:, None] * x / s**2)


@pytest.mark.parametrize("m", [1.5, 2.0, 3.0])
def test_the_derivative_along_a_map_is_the_one_of_the_change_of_variables(m):
    log_rho, energy = cloud(50, 1)[:, 0], PowerEntropy(m=m)
    log_det = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(energy(cloud(50, 2), Density(log_rho - log_det)), log_det)
    # -(f'(r) - f(r) / r) = -r^{m-1}, a mean over 50 particles
    assert torch.allclose(gradient, -((m - 1) * log_rho).exp() / 50)


def test_kl_is_zero_with_zero_velocity_at_its_target_and_known_elsewhere():
    target = Gaussian(mean=[1.0, 0.0], covariance=[[2.0, 0.3], [0.3, 1.0]])
    x = target.sample(500, generator_for(0, "test")).double().requires_grad_(True)
    log_rho = target.log_density(x)
    (score,) = torch.autograd.grad(log_rho.sum(), x)
    density = Density(log_rho.detach(), score)
    kl = KL(target)
    assert abs(float(kl(x.detach(), density))) < 1e-12
    assert kl.velocity(x.detach(), density=density).abs().max() < 1e-12
    assert float(kl(x.detach(), Density(log_rho.detach() + 0.3))) == pytest.approx(0.3)


def test_an_expression_is_the_sum_that_python_writes():
    terms = read_expression(
        [{"name": "potential", "potential": "double_well"}, {"name": "entropy", "weight": 0.5}, "interaction"]
    )
    x, density = cloud(5, 2), Density(cloud(5, 1)[:, 0])
    python = PotentialEnergy(potential="double_well") + 0.5 * Entropy() + InteractionEnergy()
    assert torch.allclose(build_expression(terms)(x, density), python(x, density))
    assert read_expression(terms) == terms


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("entropi", "Did you mean 'entropy'"),
        ([], "at least one term"),
        ([{"name": "entropy"}, {"weight": 2.0}], "term 2: expected a functional's name"),
        ({"name": "entropy", "weight": "much"}, "weight must be a finite number"),
        ({"name": "power_entropy", "m": 0.5}, "m: .*greater than 1"),
        ({"name": "potential", "potential": {"name": "quadratic", "stifness": 1.0}}, "stifness"),
        ({"name": "interaction", "attraction": 1.0, "repulsion": 2.0}, "below attraction"),
        (
            {"name": "potential", "potential": {"name": "gaussian_mixture", "means": [[0.0], [1.0]], "scales": [1.0]}},
            "scales: 1 of them for 2 means",
        ),
        (
            {"name": "potential", "potential": {"name": "gaussian_mixture", "means": [[0.0], [1.0, 2.0]]}},
            "the same number of coordinates",
        ),
    ],
)
def test_a_wrong_expression_is_a_value_error_that_names_the_mistake(given, says):
    with pytest.raises(ValueError, match=says):
        read_expression(given)


def test_every_functional_has_its_name_at_the_top_and_adds_and_subtracts():
    y, x, density = cloud(6, 2, 1), cloud(5, 2), Density(cloud(5, 1)[:, 0], cloud(5, 2, 2))
    parts = [
        gengrad.PotentialEnergy(lambda x: x.square().sum(1)),
        gengrad.InteractionEnergy(lambda z: z.square().sum(-1)),
        gengrad.PowerEntropy(m=2),
        gengrad.KL(Gaussian()),
        gengrad.SinkhornDivergence(y, epsilon=0.1),
        gengrad.MMD(y),
    ]
    values = [float(part(x, density)) for part in parts]
    whole = parts[0] + 0.5 * parts[1] - parts[2] + 2 * parts[3] - 0.5 * parts[4] + -parts[5]
    weights = [1, 0.5, -1, 2, -0.5, -1]
    assert float(whole(x, density)) == pytest.approx(sum(w * v for w, v in zip(weights, values)))
    velocities = [part.velocity(x, density=density) if part.needs_density else part.velocity(x) for part in parts]
    # the divergence's solver stops at a relative error of 1e-2 of its velocity, warm or not
    total = sum(w * v for w, v in zip(weights, velocities))
    assert torch.allclose(whole.velocity(x, density=density), total, atol=2e-2)
    assert "Did you mean 'riesz_mmd'" in unknown("functional", "mmd", FUNCTIONALS)


@pytest.mark.parametrize("given", [Gaussian(), torch.zeros(3), torch.zeros(0, 2)])
@pytest.mark.parametrize("functional", [gengrad.SinkhornDivergence, gengrad.MMD])
def test_a_divergence_of_anything_but_samples_is_refused(functional, given):
    with pytest.raises(ValueError, match=r"takes samples of the target, a tensor|has no points"):
        functional(given)


@pytest.mark.parametrize("given", [torch.zeros(3, 2), lambda x: x.sum(1)])
def test_kl_to_what_has_no_density_is_refused_with_what_to_write_instead(given):
    with pytest.raises(ValueError, match=r"PotentialEnergy\(V\) \+ Entropy\(\)"):
        gengrad.KL(given)


@pytest.mark.parametrize(
    ("potential", "says"),
    [
        (lambda x: x.square(), r"one number a point"),
        (lambda x: x.square().sum(), r"shape \(\) for points"),
        (lambda x: (x[:, 0] - 100).log(), "potential is nan at the point"),
    ],
)
def test_a_potential_of_the_wrong_shape_or_value_is_refused(potential, says):
    with pytest.raises(ValueError, match=says):
        PotentialEnergy(potential)(cloud(4, 2))


@pytest.mark.parametrize(
    "potential",
    [
        {"name": "quadratic", "matrix": [[1.0, 0.0], [0.0, 1.0]]},
        {"name": "quadratic", "centre": [1.0, 0.0]},
        {"name": "quadratic", "seed": 0},
        {"name": "gaussian_mixture", "means": [[1.0]]},
    ],
)
def test_a_named_potential_of_another_dimension_is_refused_with_its_settings(potential):
    with pytest.raises(ValueError, match=r"of [12] coordinates, the points have 3: its settings .*(matrix|means)"):
        PotentialEnergy(potential=potential)(cloud(4, 3))
    with pytest.raises(ValueError, match="centre has 3 entries, the matrix 2 rows"):
        PotentialEnergy(potential={"name": "quadratic", "seed": 0, "centre": [0.0, 0.0, 0.0]})


def test_an_entropy_without_a_density_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="jko_icnn"):
        Entropy()(cloud(4, 2))
    with pytest.raises(ValueError, match="jko_icnn"):
        (PotentialEnergy(potential="quadratic") + Entropy())(cloud(4, 2))
