"""The entropic map: the plan's barycentric map where it was solved, its formula elsewhere, a flow like any other."""

import math

import numpy as np
import pytest
import torch

import gengrad
from gengrad.config import read_config
from gengrad.flows.entropic_map import EntropicMap
from gengrad.ot import sinkhorn


def solved(x, y, epsilon, **settings):
    plan = sinkhorn(x, y, epsilon, tol=1e-6)
    return plan, EntropicMap(y, plan.g, epsilon, **settings)


def test_at_the_plans_own_points_it_is_the_barycentric_map():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(60, 3, generator=generator).double(), torch.randn(80, 3, generator=generator).double() + 1
    plan, found = solved(x, y, 0.3)
    assert torch.allclose(found.map(x), plan.target, atol=1e-5)


def test_between_gaussians_it_is_the_closed_form_also_at_points_that_the_plan_has_not_seen():
    """N(0, s^2) to N(m, t^2): the plan is Gaussian, of covariance (sqrt(4 s^2 t^2 + epsilon^2) - epsilon) / 2."""
    s, t, mean, epsilon, n = 1.0, 0.5, 2.0, 0.2, 1500
    levels = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    normal = math.sqrt(2) * torch.erfinv(2 * levels - 1)
    _, found = solved(s * normal[:, None], mean + t * normal[:, None], epsilon)
    new = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None]
    slope = (math.sqrt(4 * s**2 * t**2 + epsilon**2) - epsilon) / 2 / s**2
    assert torch.allclose(found.map(new), mean + slope * new, atol=2e-3)


@pytest.mark.parametrize("shift", [0.0, 1e3, 1e5])
def test_it_moves_with_the_origin(shift):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 2, generator=generator), torch.randn(60, 2, generator=generator) + 2
    _, found = solved(x.double(), y.double(), 0.05)
    moved = EntropicMap(y + shift, found.g.float(), 0.05)
    error = (moved.map(x + shift) - shift - found.map(x.double()).float()).abs().max()
    assert error < 1e-4 + 4e-6 * shift  # what float32 resolves there, a few times


def test_it_follows_the_flow_into_float64():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 2, generator=generator), torch.randn(20, 2, generator=generator)
    _, found = solved(x.double(), y.double(), 0.1)
    single = EntropicMap(y, found.g.float(), 0.1)
    assert single.double().map(x.double()).dtype == torch.float64
    assert torch.allclose(single.map(x.double()), found.map(x.double()), atol=1e-5)


def test_it_goes_straight_and_stops_where_it_is_told():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(20, 2, generator=generator), torch.randn(20, 2, generator=generator) + 4
    _, found = solved(x, y, 0.1, stop=0.6, steps=3)
    states = list(found.path(x))
    assert len(states) == 3 and found.cost(5) == 0
    for k, state in enumerate(states, 1):
        assert torch.allclose(state, x + 0.2 * k * (found.map(x) - x), atol=1e-6)


def test_blocks_of_points_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 2, generator=generator), torch.randn(30, 2, generator=generator)
    _, found = solved(x, y, 0.1)
    whole = found.map(x)
    monkeypatch.setattr("gengrad.flows.entropic_map.BLOCK", 100)
    assert torch.allclose(found.map(x), whole, atol=1e-6)


@pytest.fixture
def run(tmp_path):
    raw = {
        "source": {"name": "gaussian", "mean": [0.0, 0.0]}, "data": "8gaussians", "network": "mlp",
        "method": {"name": "entropic_map", "points": 500, "epsilon_rel": 0.005},
        "evaluate": {"nfe": [1], "n": 500}, "out": str(tmp_path / "run"), "device": "cpu",
    }  # fmt: skip
    assert gengrad.train(read_config(raw), quiet=True).finished
    return tmp_path / "run"


def test_as_a_method_it_carries_noise_to_the_modes_and_is_saved_with_all_that_it_knows(run):
    flow = gengrad.load(run)
    x = flow.sample(400, seed=3)
    angle = torch.arange(8) * math.pi / 4
    modes = 5 * torch.stack([angle.cos(), angle.sin()], 1)
    nearest = torch.cdist(x, modes).min(1)
    assert (nearest.values < 2.0).float().mean() > 0.9 and nearest.indices.unique().numel() == 8
    assert torch.equal(gengrad.load(run).sample(400, seed=3), x)
    assert torch.equal(flow.sample(100, seed=3), x[:100])  # a sample does not depend on its batch
    assert len(flow.trajectory(10, seed=3)) == 11


def raw_run(out, data="8gaussians", **changes):
    method = {"name": "entropic_map", "points": 200, **changes}
    raw = {"source": "normal", "data": data, "network": "mlp", "method": method, "out": str(out), "device": "cpu"}
    return raw | {"evaluate": {"nfe": [1], "n": 50}}


def test_what_cannot_be_is_refused_with_the_key(tmp_path):
    with pytest.raises(ValueError, match=r"method\.points"):
        gengrad.train(read_config(raw_run(tmp_path / "a", points=10**7)), quiet=True)
    with pytest.raises(ValueError, match=r"did not converge.*method\.epsilon_rel"):
        gengrad.train(read_config(raw_run(tmp_path / "b", epsilon_rel=2e-6)), quiet=True)
    classes = raw_run(tmp_path / "c", data="digits") | {"network": {"name": "unet", "classes": 10}}
    with pytest.raises(ValueError, match=r"no classes: leave out network\.classes"):
        gengrad.train(read_config(classes), quiet=True)


def test_few_points_and_settings_of_a_training_are_no_obstacle(tmp_path):
    """Fewer points than a batch, a batch that does not divide, and more points asked for than there are."""
    points = tmp_path / "points.npy"
    np.save(points, np.random.default_rng(0).normal(size=(40, 2)).astype("float32"))
    raw = raw_run(tmp_path / "run", data={"name": "array", "path": str(points)}, points=100_000, epsilon_rel=0.1)
    raw["source"] = {"name": "array", "path": str(points)}
    raw["train"] = {"batch_size": 257, "accumulate": 3}
    assert gengrad.train(read_config(raw), quiet=True).finished
    assert gengrad.load(tmp_path / "run").transports[0].targets.shape == (36, 2)  # a tenth is held out
