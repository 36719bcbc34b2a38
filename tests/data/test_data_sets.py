"""What every registered data set promises; a new one is covered from the moment it is registered."""

import json

import numpy as np
import pytest
import torch

from gengrad.data import FiniteData, generator_for
from gengrad.data.profiles import Radial
from gengrad.registry import DATASETS, settings_of


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """name -> a data set with settings that every registered one can be built from."""
    file = tmp_path_factory.mktemp("arrays") / "points.npy"
    np.save(file, np.random.default_rng(0).normal(size=(50, 3)))
    needed = {"array": {"path": str(file)}}
    return lambda name, **context: DATASETS.build({"name": name, **needed.get(name, {})}, **context)


def builds_by_itself(name: str) -> bool:
    """Whether the settings of ``build`` are enough; data that need files have tests of their own."""
    if hasattr(DATASETS.get(name), "published"):  # torchvision's, which have to be there or to be downloaded
        return False
    if hasattr(DATASETS.get(name), "made_by_a_run"):
        return False
    fields = DATASETS.get(name).Config.model_fields.values()
    return name == "array" or not any(field.is_required() for field in fields)


NAMES = [name for name in DATASETS if builds_by_itself(name) and DATASETS.get(name).has_samples]
FINITE = [name for name in NAMES if issubclass(DATASETS.get(name), FiniteData)]
DENSITIES = [name for name in NAMES if hasattr(DATASETS.get(name), "log_density")]


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_finite_float32_of_the_event_shape(build, name):
    data = build(name)
    x = data.sample(300, generator_for(0, "test"))
    assert x.shape == (300, *data.event_shape) and x.dtype == torch.float32 and x.device.type == "cpu"
    assert x.isfinite().all()
    assert x.flatten(1).std(0).max() > 0  # not one point over and over


@pytest.mark.parametrize("name", NAMES)
def test_equal_generators_give_equal_draws_and_other_seeds_give_others(build, name):
    first = build(name).sample(64, generator_for(3, "test"))
    assert torch.equal(first, build(name).sample(64, generator_for(3, "test")))
    assert not torch.equal(first, build(name).sample(64, generator_for(4, "test")))


@pytest.mark.parametrize("name", NAMES)
def test_building_and_drawing_leave_the_global_generators_alone(build, name):
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()
    build(name).sample(64, generator_for(0, "test"))
    assert torch.equal(torch_before, torch.get_rng_state())
    for before, after in zip(numpy_before, np.random.get_state()):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("name", NAMES)
def test_settings_survive_json_and_build_the_same_distribution(build, name):
    data = build(name)
    again = DATASETS.build(json.loads(json.dumps(settings_of(data))))
    assert again.config == data.config
    assert torch.equal(again.sample(32, generator_for(0, "test")), data.sample(32, generator_for(0, "test")))


@pytest.mark.parametrize("name", NAMES)
def test_an_event_shape_is_taken_by_plain_noise_and_checked_by_the_rest(build, name):
    data = build(name)
    if data.takes_event_shape:
        assert build(name, event_shape=(3, 4, 4)).sample(2, generator_for(0, "test")).shape == (2, 3, 4, 4)
        return
    assert build(name, event_shape=list(data.event_shape)).event_shape == data.event_shape
    with pytest.raises(ValueError, match="same shape"):
        build(name, event_shape=(7, 5))


@pytest.mark.parametrize("name", FINITE)
def test_finite_data_keep_training_and_held_out_points_apart(build, name):
    data = build(name)
    assert len(data) == len(data.points) > 0 and len(data.held_out) > 0
    assert data.held_out.shape[1:] == data.event_shape
    train = {row.numpy().tobytes() for row in data.points}
    assert not any(row.numpy().tobytes() in train for row in data.held_out)


@pytest.mark.parametrize("name", ["8gaussians", "25gaussians", "gaussian_mixture"])
def test_modes_hold_the_share_of_the_mass_that_they_claim(build, name):
    data, n = build(name), 20_000
    distance, nearest = torch.cdist(data.sample(n, generator_for(0, "test")), data.modes).min(dim=1)
    # three standard deviations in the plane hold 1 - exp(-9/2) = .9889; five standard errors are .0037
    assert (distance <= data.mode_radius).double().mean() == pytest.approx(0.9889, abs=0.0037)
    share = torch.bincount(nearest, minlength=len(data.modes)) / n
    for found, weight in zip(share.tolist(), data.mode_weights.tolist()):
        assert found == pytest.approx(weight, abs=5 * (weight * (1 - weight) / n) ** 0.5)


# the radial profiles have an edge that no cell follows, and tests of their own
@pytest.mark.parametrize("name", [name for name in DENSITIES if not issubclass(DATASETS.get(name), Radial)])
def test_a_log_density_integrates_to_one_and_agrees_with_the_draws(build, name):
    """Cells of side 1 on [-8, 8]^2: masses by the midpoint rule, counts of draws against them by chi squared."""
    data, side, n = build(name), 40, 40_000
    line = (torch.arange(16 * side, dtype=torch.float64) + 0.5) / side - 8
    density = data.log_density(torch.cartesian_prod(line, line)).exp().reshape(16, side, 16, side)
    mass = density.sum(dim=(1, 3)) / side**2
    # midpoints: exact on aligned squares, exponentially close on Gaussians; the window misses less than 1e-6
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)

    x = data.sample(n, generator_for(0, "test")).double()
    assert data.log_density(x).isfinite().all()
    counts = torch.histogramdd(x, [16, 16], range=[-8.0, 8.0, -8.0, 8.0]).hist
    cells = mass * n > 5  # the usual rule for the chi-squared approximation
    chi = ((counts - mass * n).square() / (mass * n))[cells].sum().item()
    degrees = cells.sum().item()
    assert chi < degrees + 5 * (2 * degrees) ** 0.5  # five standard deviations above the mean


@pytest.mark.parametrize("name", DENSITIES)
def test_a_log_density_has_one_value_per_event_and_keeps_double_precision(build, name):
    data = build(name)
    x = data.sample(5, generator_for(0, "test"))
    assert data.log_density(x).shape == (5,) and data.log_density(x).dtype == torch.float32
    assert data.log_density(x.double()).dtype == torch.float64
    assert torch.allclose(data.log_density(x), data.log_density(x.double()).float(), atol=1e-4)  # float32 rounding
