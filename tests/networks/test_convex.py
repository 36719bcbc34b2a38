"""Convex potentials against automatic differentiation, and their convexity whatever the weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gengrad.data import GaussianMixture
from gengrad.networks import ICNN, LogSumExp
from gengrad.networks.curvature import (
    NotConvexError,
    conjugate_gradients,
    log_det,
    log_det_lanczos,
    log_det_surrogate,
)
from gengrad.registry import NETWORKS, settings_of

SMALL = {"width": 12}
CASES = [  # network, dimension, settings
    (ICNN, 1, SMALL | {"depth": 1}),
    (ICNN, 2, SMALL),
    (ICNN, 3, SMALL | {"depth": 3, "rank": 1}),
    (ICNN, 5, SMALL | {"rank": 0}),
    (ICNN, 64, SMALL | {"rank": 1}),
    (LogSumExp, 1, {"groups": 3, "pieces": 2}),
    (LogSumExp, 5, {"groups": 4, "pieces": 6}),
]
BOTH = [(ICNN, SMALL), (LogSumExp, {"groups": 4})]


def shaken(make, d, seed=0, **settings):
    """A network whose every weight is away from its start, in float64."""
    torch.manual_seed(seed)
    network = make(event_shape=(d,), **settings).double()
    network.whiten(2 * torch.randn(100, d).double() + 1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        network.scales.add_(0.3)
    return network


def points(n, d, seed=1):
    return 2 * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("make", "d", "settings"), CASES)
def test_gradient_hessian_and_log_det_are_those_of_the_potential(make, d, settings):
    network, x = shaken(make, d, **settings), points(6, d)
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(network.potential(leaf).sum(), leaf)
    hessian = torch.stack([torch.autograd.functional.hessian(lambda z: network.potential(z[None])[0], p) for p in x])
    assert torch.allclose(network(x), gradient, atol=1e-10)
    assert torch.allclose(network.hessian(x), hessian, atol=1e-10)
    assert torch.allclose(network(x, log_det=True)[1], torch.linalg.slogdet(hessian).logabsdet, atol=1e-10)
    v = points(6, d, 2)
    assert torch.allclose(network.hessian_product(x, v), torch.einsum("nij,nj->ni", hessian, v), atol=1e-10)


@pytest.mark.parametrize(("make", "d", "settings"), CASES)
def test_the_log_det_has_the_gradient_of_automatic_differentiation_in_every_weight(make, d, settings):
    network, x = shaken(make, d, **settings), points(5, d)
    ours = torch.autograd.grad(network(x, log_det=True)[1].sum(), list(network.parameters()), allow_unused=True)
    reference = torch.linalg.slogdet(network.hessian(x)).logabsdet.sum()
    theirs = torch.autograd.grad(reference, list(network.parameters()), allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize(("make", "settings"), BOTH)
@given(seed=st.integers(0, 10_000), size=st.floats(0.1, 5))
def test_it_is_convex_whatever_the_weights(make, settings, seed, size):
    network = shaken(make, 3, seed, **settings)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(size)
    x, y = points(20, 3, seed), points(20, 3, seed + 1)
    middle = network.potential((x + y) / 2)
    ends = (network.potential(x) + network.potential(y)) / 2
    assert (middle <= ends + 1e-9 * ends.abs().max()).all()  # rounding of values of that size
    values = torch.linalg.eigvalsh(network.hessian(x))
    assert (values >= network.config.floor - 1e-12 * values.max()).all()


@pytest.mark.parametrize("make", [ICNN, LogSumExp])
def test_it_starts_at_the_identity(make):
    network = make(event_shape=(4,))
    x = torch.randn(50, 4)
    y, volume = network(x, log_det=True)
    # fp32: the quadratic's root is rounded once
    assert torch.allclose(y, x, atol=1e-6) and volume.abs().max() < 1e-6
    assert network.is_affine


@pytest.mark.parametrize(("make", "d", "settings"), CASES)
def test_every_weight_has_a_gradient_for_several_processes(make, d, settings):
    network = make(event_shape=(d,), **settings)
    y, volume = network(torch.randn(8, d), log_det=True)
    (y.square().sum() + volume.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    network(torch.randn(8, d)).sum().backward()


@pytest.mark.parametrize(("make", "settings"), BOTH)
def test_half_precision_around_it_changes_nothing(make, settings):
    network, x = shaken(make, 3, **settings).float(), torch.randn(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, volume = network(x, log_det=True)
    assert torch.equal(y, network(x)) and torch.equal(volume, network(x, log_det=True)[1])


def test_every_gaussian_map_is_in_reach():
    m = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, b = m @ m.mT + 0.1 * torch.eye(4), torch.arange(4).double()
    network = ICNN(event_shape=(4,)).double()
    network.set_affine(q, b)
    x = points(10, 4)
    assert torch.allclose(network(x), x @ q + b)


@pytest.mark.parametrize("make", [ICNN, LogSumExp])
def test_a_unit_at_rest_still_learns(make):
    network = make(event_shape=(2,))
    with torch.no_grad():
        network.scales.fill_(-0.1)
    network(torch.randn(8, 2)).square().sum().backward()
    assert (network.scales.grad != 0).all() and network.is_affine


def test_whitened_points_have_no_mean_and_unit_covariance():
    network, x = ICNN(event_shape=(3,)).double(), points(500, 3) @ points(3, 3, 5) + 7
    network.whiten(x)
    white = (x - network.centre) @ network.whitening
    assert torch.allclose(white.mT @ white / 500, torch.eye(3).double(), atol=1e-8)


@pytest.mark.parametrize(("make", "settings"), BOTH)
def test_it_is_rebuilt_from_its_settings_and_state(make, settings):
    network = shaken(make, 3, **settings).float()
    again = NETWORKS.build(settings_of(network), event_shape=(3,))
    again.load_state_dict(network.state_dict())
    x = torch.randn(5, 3)
    assert torch.equal(again(x), network(x))


def test_one_soft_maximum_is_the_score_of_a_mixture_of_equal_covariances():
    """grad log pi = m(x) - x, m the mean of the means m_k under their responsibilities: a soft maximum of m_k . x."""
    means, weights = points(4, 3, 3), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    mixture = GaussianMixture(means=means.tolist(), weights=weights.tolist(), scales=[1.0] * 4)
    network = LogSumExp(event_shape=(3,), groups=1, pieces=4).double()
    with torch.no_grad():
        network.scales.fill_(1 / 3)  # kappa d / G = 3
        network.weights.copy_(means[None])
        network.offsets.copy_((weights.log() - means.square().sum(1) / 2)[None])
    x = points(20, 3).requires_grad_(True)
    (score,) = torch.autograd.grad(mixture.log_density(x).sum(), x)
    assert torch.allclose(network.correction(x.detach())[0], score + x, atol=1e-6)  # the mixture is made in fp32


# ------------------------------------------------------------------ above d = 64: probes


def spectrum(d):
    q = torch.linalg.qr(points(d, d)).Q
    return (q * torch.linspace(0.5, 4, d).double()) @ q.mT


def test_lanczos_comes_within_its_standard_error():
    h = spectrum(80)
    x = points(40, 80)
    found = log_det_lanczos(lambda v: v @ h, x, torch.Generator().manual_seed(0), probes=16)
    exact = torch.linalg.slogdet(h).logabsdet
    # Var z'Bz = 2 sum_{i != j} B_ij^2 for signs z, B = log H; four standard errors of the mean over 40 x 16 probes
    values, vectors = torch.linalg.eigh(h)
    b = (vectors * values.log()) @ vectors.mT
    deviation = (2 * (b.square().sum() - b.diagonal().square().sum())).sqrt()
    assert (found.mean() - exact).abs() < 4 * deviation / (40 * 16) ** 0.5
    assert (found - exact).abs().max() < 4 * deviation / 16**0.5


def test_the_surrogate_has_the_mean_gradient_of_the_log_det():
    scale = torch.ones(70, dtype=torch.float64, requires_grad=True)
    h, x = spectrum(70), points(400, 70)
    value = log_det_surrogate(lambda v: (v * scale) @ h * scale, x, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(value.mean(), scale)
    # log det(D H D) = 2 sum log d_i + log det H: the gradient is 2 in every coordinate; 400 probes leave about 5 %
    assert (gradient - 2).abs().max() < 0.4 and (gradient.mean() - 2).abs() < 0.02


def test_conjugate_gradients_solve():
    h, b = spectrum(30), points(5, 30)
    assert torch.allclose(conjugate_gradients(lambda v: v @ h, b, 60, tol=1e-12) @ h, b, atol=1e-9)


def test_a_network_of_eighty_dimensions_gives_probes_and_values():
    network, x = shaken(ICNN, 80, width=16), points(4, 80)
    y, surrogate = network(x, log_det=True, generator=torch.Generator().manual_seed(0))
    surrogate.sum().backward()
    assert y.shape == x.shape and network.factor.grad.isfinite().all()
    exact = torch.linalg.slogdet(network.hessian(x)).logabsdet
    found = network.log_det(x, torch.Generator().manual_seed(0))
    # 16 probes; the spread of the spectrum of these weights leaves a few units of 80 x log
    assert (found - exact).abs().max() < 0.1 * exact.abs().max() + 8


def test_above_sixty_four_dimensions_value_and_mean_gradient_are_those_of_automatic_differentiation():
    torch.manual_seed(0)
    d, network = 66, ICNN(event_shape=(66,), width=8).double()
    with torch.no_grad():
        network.scales.uniform_(0.2, 0.5)
    x, parameters = points(2, d), list(network.parameters())
    hessians = [
        torch.autograd.functional.hessian(lambda z: network.potential(z[None])[0], p, create_graph=True) for p in x
    ]
    exact = torch.linalg.slogdet(torch.stack(hessians)).logabsdet
    theirs = torch.autograd.grad(exact.mean(), parameters, allow_unused=True)
    surrogate = network(x.repeat(500, 1), log_det=True, generator=torch.Generator().manual_seed(0))[1]
    ours = torch.autograd.grad(surrogate.mean(), parameters, allow_unused=True)
    for name, a, b in zip(dict(network.named_parameters()), ours, theirs):
        if b is not None and b.norm() > 0:
            # 1,000 probes z: noise of about sqrt(d / 1000) = 0.26 of the norm where a weight meets one direction z
            assert (a - b).norm() < (0.4 if name in ("factor", "skips") else 0.2) * b.norm(), name
    values, vectors = torch.linalg.eigh(torch.stack(hessians).detach())
    logs = (vectors * values.log()[:, None]) @ vectors.mT  # Var z'Bz = 2 sum_{i != j} B_ij^2, over 16 probes
    deviation = (2 * (logs.square().sum((1, 2)) - logs.diagonal(dim1=1, dim2=2).square().sum(1)) / 16).sqrt()
    assert ((network.log_det(x, torch.Generator().manual_seed(0)) - exact).abs() < 4 * deviation).all()


def test_a_matrix_that_is_not_positive_definite_is_refused():
    with pytest.raises(NotConvexError, match="not positive definite"):
        log_det(torch.diag(torch.tensor([1.0, -1.0]))[None])
