"""A learned operator judged: an exact one has no gap, references agree with each other, the report is written."""

import json
import math

import pytest
import torch
import yaml

from gengrad.cli import main
from gengrad.data import Gaussian, GaussianMixture
from gengrad.data.draws import generator_for
from gengrad.data.families import read_families
from gengrad.data.profiles import Barenblatt
from gengrad.evaluation import references
from gengrad.evaluation.operators import judge_held_out, judge_rollout, judge_source
from gengrad.evaluation.references import reference_of
from gengrad.flows import Flow, OperatorTransport
from gengrad.flows.density_cloud import matched
from gengrad.flows.implicit_steps import of_the_cloud, on_the_line
from gengrad.functionals.expression import read_expression
from gengrad.networks import SetOperator
from gengrad.networks.local_fit import SmoothMaps
from gengrad.rollouts import independent_coordinates

TAU = 0.1
K = (1 + math.sqrt(1 + 4 * TAU)) / 2  # of the exact heat step from variance 1
HEAT = read_expression("entropy")


def heat(d=1, slope=(K - 1) / TAU, terms=HEAT, tau=TAU) -> OperatorTransport:
    """T x = mean + (1 + tau slope / scale) (x - mean): exact from a standard normal, by default."""
    network = SetOperator(event_shape=(d,), width=8, tokens=2, heads=2)
    with torch.no_grad():
        network.affine.bias[: d * (d + 1)].copy_(torch.cat([slope * torch.eye(d), torch.zeros(d, 1)], 1).flatten())
    return OperatorTransport(network, torch.randn(1, 8, d), torch.empty(0, d), tau, terms).double()


def normal(n=2000, d=1):
    source = Gaussian(mean=[0.0] * d)
    x = matched(source.sample(n, generator_for(0, "test")).double(), source.moments())
    return source, x, source.log_density(x)


@pytest.mark.parametrize("d", [1, 2])
def test_the_exact_step_of_heat_has_no_gap(d):
    source, x, log_rho = normal(d=d)
    (row,) = judge_rollout(heat(d), x, log_rho, 1, reference_of(heat(d), source, x, log_rho))
    # the network's weights are float32
    assert abs(row["gap"]) < 1e-6 and row["share"] < 1e-6 and not row["rose"]
    assert row["energy_before"] - row["energy"] == pytest.approx(d * math.log(K), abs=1e-6)
    assert row["moved"] == pytest.approx((K - 1) * math.sqrt(d), abs=1e-6)


def test_half_the_exact_step_is_half_the_way_off():
    source, x, log_rho = normal()
    operator = heat(slope=(K - 1) / TAU / 2)
    (row,) = judge_rollout(operator, x, log_rho, 1, reference_of(operator, source, x, log_rho))
    assert row["share"] == pytest.approx(0.5, abs=1e-6)
    assert row["gap"] == pytest.approx(1 - math.log((1 + K) / 2) / math.log(K), abs=1e-6)


def test_a_rollout_that_is_not_told_goes_by_its_points():
    operator, source = heat(1), Gaussian(mean=[0.0])
    operator.network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1, log_density=True).double()
    with torch.no_grad():
        operator.network.affine.weight.normal_(0, 0.1), operator.network.affine.bias.normal_(0, 0.1)
        operator.network.blind.affine.bias[1] = 3.0  # by the points alone: a shift, far off
    x = source.sample(128, torch.Generator().manual_seed(0)).double()
    log_rho = source.log_density(x)
    told, untold = (judge_rollout(operator, x, log_rho, 1, told=given)[0]["energy"] for given in (True, False))
    for energy, known in ((told, log_rho), (untold, None)):
        with torch.no_grad():
            moved = operator.network(x, x, operator.tau, log_density=known)
            jacobian = SmoothMaps(x).jacobians(x, moved)[:, 0, 0]
        assert energy == pytest.approx(float((log_rho - jacobian.log()).mean()), abs=1e-9)
    assert told != untold


def test_a_step_that_concentrates_raises_the_entropy_and_is_told():
    _, x, log_rho = normal()
    (row,) = judge_rollout(heat(slope=-1.0), x, log_rho, 1)
    assert row["rose"] and "gap" not in row


def test_the_references_agree_where_two_are_known():
    source, x, log_rho = normal()
    closed = reference_of(heat(), source, x, log_rho)
    solved = on_the_line(heat().functional(), TAU, source.log_density, x, log_rho)
    for k in (0, 1, 4):
        for one, two in zip(closed(k), solved(k)):
            assert torch.allclose(one, two, atol=5e-4)  # 2,000 intervals
    profile = Barenblatt(radius=0.5, m=2.0, dimension=1)
    x = profile.sample(500, generator_for(0, "test")).double() * 0.99  # away from the edge
    log_rho = profile.log_density(x)
    porous = heat(terms=read_expression({"name": "power_entropy"}), tau=0.01)
    closed = reference_of(porous, profile, x, log_rho)
    solved = on_the_line(porous.functional(), 0.01, profile.log_density, x, log_rho)
    assert torch.allclose(closed(2)[0], solved(2)[0], atol=2e-3)


def test_where_nothing_is_known_it_says_so():
    law = GaussianMixture(means=[[0.0, 0.0], [1.0, 1.0]])
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match="no reference is known"):
        reference_of(heat(), law, x, law.log_density(x))


def test_held_out_measures_are_judged_against_the_solver_on_the_line():
    flow = Flow(Gaussian(mean=[0.0]), [heat().float()])
    families = read_families({"name": "gaussians", "reach": 0.0, "smallest": 1.0, "largest": 1.0})
    found = judge_held_out(flow, families, 1, count=2, n=1024, seed=0)
    # a cloud's scale is that of its law up to the net's error of about 1 / n
    assert found["fell"] == 1 and found["worst_share"] < 0.02 and found["worst_gap"] < 0.02
    assert found["share_along"] == [pytest.approx(found["share"])]


def test_held_out_measures_of_an_energy_that_the_solver_does_not_take_have_no_reference():
    both = [{"name": "interaction", "attraction": 2.0, "repulsion": None}, {"name": "entropy", "weight": 0.01}]
    flow = Flow(Gaussian(mean=[0.0]), [heat(terms=read_expression(both), slope=-1.0).float()])
    found = judge_held_out(flow, read_families("gaussians"), 2, count=2, n=64, seed=0)
    assert found["referenced"] == 0 and "gap" not in found and found["fell"] == 1 and found["folded"] == 0


@pytest.mark.parametrize("d", [1, 2])
def test_energies_of_particles_are_judged_by_the_steps_of_the_very_cloud(d):
    """W(z) = |z|^2/2 draws every particle towards the mean: the step is x -> m + (x - m) / (1 + tau)."""
    terms = read_expression({"name": "interaction", "attraction": 2.0, "repulsion": None})
    round_one = {"reach": 0.0, "smallest": 1.0, "largest": 1.0}
    families = read_families([{"name": "gaussians", **round_one}, {"name": "boxes", "reach": 0.0}])
    for step, share in ((-1 / (1 + TAU), 0.0), (-0.5 / (1 + TAU), 0.5)):
        transport = heat(d, slope=step, terms=terms)
        flow = Flow(Gaussian(mean=[0.0] * d), [transport.float()])
        found = judge_held_out(flow, families[:1], 1, count=2, n=512, seed=0)
        assert found["referenced"] == 2 and found["worst_share"] == pytest.approx(share, abs=0.02)
    assert judge_held_out(flow, families[1:], 1, count=1, n=512, seed=0)["referenced"] == 1
    rows, _ = judge_source(flow, 2, n=100, seed=0)
    assert rows[0]["share"] == pytest.approx(0.5, abs=0.05) and rows[0]["gap"] > 0.1


def test_a_reference_that_fails_on_the_way_is_left_out_and_told():
    """W = |z| draws all particles into one point, a kink: the first steps are solved, later ones are not."""
    terms = read_expression({"name": "interaction", "attraction": 1.0, "repulsion": None})
    transport = heat(d=2, slope=-0.5, terms=terms, tau=0.2)
    flow = Flow(Gaussian(mean=[0.0, 0.0]), [transport.float()])
    of_the_cloud(transport.functional(), 0.2, torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))(1)
    with pytest.warns(UserWarning, match="without reference: the implicit step of the cloud did not converge"):
        found = judge_held_out(flow, read_families("gaussians"), 12, count=1, n=64, seed=0)
    assert found["referenced"] == 0 and "gap" not in found


def test_a_rollout_that_folds_is_counted_and_has_no_gap():
    flow = Flow(Gaussian(mean=[0.0]), [heat(slope=-2 / TAU).float()])  # turns the line round
    families = read_families({"name": "gaussians", "reach": 0.0, "smallest": 1.0, "largest": 1.0})
    found = judge_held_out(flow, families, 1, count=2, n=64, seed=0)
    assert found["folded"] == 1 and found["fell"] == 0 and found["referenced"] == 0 and "gap" not in found


def test_where_exact_steps_raise_the_energy_of_a_noisy_cloud_there_is_no_gap():
    """64 draws of N(0, 1.05^2) on their way to N(0, 1): of those of less variance than 1 the energy rises."""
    terms = read_expression([{"name": "potential", "potential": {"name": "quadratic"}}, {"name": "entropy"}])
    flow = Flow(Gaussian(mean=[0.0]), [heat(slope=0.0, terms=terms).float()])  # stays where it is: all of the fall
    families = read_families({"name": "gaussians", "reach": 0.0, "smallest": 1.05, "largest": 1.05})
    found = judge_held_out(flow, families, 1, count=8, n=64, seed=0, even=False)
    assert found["referenced"] == 8 and found["gap"] == found["worst_gap"] == pytest.approx(1)


def test_held_out_gaussians_of_the_plane_are_judged_against_their_closed_form():
    """The heat step of N(0, I) is x -> s x; an operator that makes it exactly has no gap; of mixtures none is known."""
    flow = Flow(Gaussian(mean=[0.0, 0.0]), [heat(d=2).float()])
    round_one = {"reach": 0.0, "smallest": 1.0, "largest": 1.0}
    families = read_families([{"name": "gaussians", **round_one}, {"name": "mixtures", **round_one}])
    found = judge_held_out(flow, families, 1, count=2, n=1024, seed=0)
    assert found["referenced"] == 1 and found["worst_share"] < 0.02 and found["worst_gap"] < 0.02


def test_mixtures_of_the_plane_are_judged_where_their_coordinates_are_independent():
    """Of the potentials' axes, and of the training's reach and sizes; each of them has a reference."""
    bowl = {"name": "potential", "potential": {"name": "quadratic", "matrix": [[1.36, -0.48], [-0.48, 1.64]]}}
    mixtures = {"name": "mixtures", "reach": 0.7, "smallest": 0.5, "components": 5, "oblong": True}

    def flow(terms: object, families: object) -> Flow:
        operator = heat(d=2, terms=read_expression(terms)).float()
        method = {"initial": read_families(families)}
        return Flow(Gaussian(mean=[0.0, 0.0]), [operator], {"config": {"method": method}})

    found = independent_coordinates(flow([bowl, {"name": "entropy"}], ["gaussians", mixtures]))
    assert [(family["name"], family["reach"], family["smallest"]) for family in found] == [("products", 0.7, 0.5)]
    assert abs(abs(found[0]["axes"][0][0]) - 0.8) < 1e-6
    held = judge_held_out(flow([bowl, {"name": "entropy"}], mixtures), found, 1, count=2, n=128, seed=0)
    assert held["referenced"] == 2 and held["share"] > 0.05  # it knows nothing of the bowl
    assert independent_coordinates(flow({"name": "power_entropy"}, mixtures)) is None
    assert independent_coordinates(flow("entropy", "gaussians")) is None


def test_a_held_out_gaussian_is_judged_by_its_own_mean_and_covariance(monkeypatch):
    """The exact step of an oblong one is x -> m + Q (x - m); its reference is asked for with just that law."""
    asked = []
    monkeypatch.setattr(references, "reference_of", lambda transport, law, x, log_rho: asked.append((law, x)) or None)
    families = read_families({"name": "gaussians", "reach": 1.0, "smallest": 0.3, "largest": 1.5})
    judge_held_out(Flow(Gaussian(mean=[0.0, 0.0]), [heat(d=2).float()]), families, 1, count=3, n=2048, seed=0)
    assert len(asked) == 3
    for law, x in asked:
        mean, covariance = law.moments()
        assert torch.allclose(x.mean(0), mean, atol=0.01) and torch.allclose(x.T.cov(), covariance, atol=0.03)


def test_evaluate_writes_the_table_the_energies_and_the_film(tmp_path, capsys, monkeypatch):
    asked = []

    def judged(*given, even=True, told=True, **named):
        asked.append((even, told))
        return judge_held_out(*given, even=even, told=told, **named)

    monkeypatch.setattr("gengrad.rollouts.judge_held_out", judged)
    raw = {
        "source": {"name": "gaussian", "mean": [0.0]},
        "data": {"name": "space", "dimension": 1},
        "network": {"name": "set_operator", "width": 8, "tokens": 2, "heads": 2},
        "method": {"name": "jko_operator", "functional": "entropy", "jko_steps": 1, "particles": 16, "buffer": 4,
                   "initial": "gaussians"},
        "train": {"steps": 2, "batch_size": 4},
        "evaluate": {"nfe": [1], "n": 200},
        "out": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "steps.json").read_text())
    kinds = ["more components", "independent points", "independent points without log densities"]
    assert list(report["held_out"]) == ["as in training", *kinds] and all(f"| {kind} |" in told for kind in kinds)
    assert asked == [(True, True), (True, True), (False, True), (False, False)]
    assert [row["step"] for row in report["steps"]] == [1, 2] and report["held_out"]["as in training"]["steps"] == 2
    for name in ("energy.png", "rollout.gif", "steps.md"):
        assert (tmp_path / "run" / name).stat().st_size > 0
