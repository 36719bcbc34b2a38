"""A learned operator as the start of the per-step solver: the fit, that a worse start is not taken, the refusals."""

import pytest
import torch
import yaml

from gengrad.cli import main
from gengrad.data import Gaussian, GaussianMixture
from gengrad.data.space import Space
from gengrad.flows import Flow, OperatorTransport
from gengrad.flows.operator_transport import push
from gengrad.functionals.expression import read_expression
from gengrad.methods import JKOICNN, Problem
from gengrad.methods.jko_warm import fitted, objections, told_for
from gengrad.networks import ICNN, SetOperator

TAU = 0.1


def operator(d=1, terms="entropy", bend=0.0, tau=TAU, seed=0, **settings) -> OperatorTransport:
    torch.manual_seed(seed)
    network = SetOperator(event_shape=(d,), width=8, tokens=2, heads=2, blocks=1, **settings)
    torch.nn.init.normal_(network.head[-1].weight, std=bend)
    return OperatorTransport(network, torch.randn(2, 16, d), torch.empty(0, d), tau, read_expression(terms))


def saved(folder, made: OperatorTransport) -> str:
    Flow(Gaussian(mean=[0.0] * made.network.d), [made]).save(folder)
    return str(folder)


def test_the_potential_is_fitted_to_the_operators_map():
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    made = operator(bend=2.0)
    y = push(made.network, x, TAU)[0]
    torch.manual_seed(1)
    network = ICNN(event_shape=(1,), width=16)
    network.whiten(x.double())
    found = fitted(network, made, x, TAU, 200)
    left = (found(x) - y).square().mean() / (y - x).square().mean()
    lines = torch.cat([x, torch.ones_like(x)], 1)
    straight = (lines @ torch.linalg.lstsq(lines, y).solution - y).square().mean() / (y - x).square().mean()
    assert left < 1e-2 and left < straight / 3  # better than any straight map


def test_an_operator_that_takes_log_densities_is_told_those_of_the_cloud():
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    made, log_rho = operator(bend=2.0, log_density=True), -2 * x[:, 0].square()
    network = ICNN(event_shape=(1,), width=16)
    network.whiten(x.double())
    off = []
    for known in (log_rho, None):
        found = fitted(network, made, x, TAU, 200, known)
        off.append(float((found(x) - push(made.network, x, TAU, log_rho)[0]).square().mean().detach()))
    assert off[0] < 0.2 * off[1]


def test_the_potential_is_fitted_to_the_corrected_map():
    """T x = 1.08 x, where the exact step of N(0, 1) is 1.0916 x."""
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    made, log_rho = operator(log_density=True), -x[:, 0].square() / 2
    with torch.no_grad():
        made.network.affine.bias[0] = 0.8
    network, slopes = ICNN(event_shape=(1,), width=16), []
    network.whiten(x.double())
    for made.correction in (0, 1):
        y = fitted(network, made, x, TAU, 300, log_rho)(x).detach()
        slopes.append(float((x * y).mean() / x.square().mean()))
    assert slopes == pytest.approx([1.08, (1 + (1 + 4 * TAU) ** 0.5) / 2], abs=2e-3)


def test_the_potential_is_fitted_to_the_step_by_the_points_alone_where_that_is_taken():
    """Told log densities, T x = -x, which folds; by the points alone 1.08 x."""
    x = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0))
    made, log_rho = operator(log_density=True), -x[:, 0].square() / 2
    with torch.no_grad():
        made.network.affine.bias[0], made.network.blind.affine.bias[0] = -20.0, 0.8
    network = ICNN(event_shape=(1,), width=16)
    network.whiten(x.double())
    y = fitted(network, made, x, TAU, 300, log_rho)(x).detach()
    assert float((x * y).mean() / x.square().mean()) == pytest.approx(1.08, abs=2e-3)


def test_an_operator_for_several_weights_starts_one_of_them(tmp_path):
    made = operator(terms=[{"name": "entropy", "weight": 0.5}])
    made.weights = {"entropy": [0.25, 1.0]}
    start = saved(tmp_path / "run", made)
    for weight, says in ((0.3, None), (2.0, "the weight 2 of 'entropy' is outside of 0.25 to 1")):
        functional = [{"name": "entropy", "weight": weight}]
        found = objections(JKOICNN(functional=functional, tau=TAU, init_from_operator=start).config, (1,))
        assert found == [] if says is None else says in found[0]
    assert told_for(made, read_expression([{"name": "entropy", "weight": 0.3}])).told() == (0.3,)


def test_a_start_that_is_worse_is_not_taken(tmp_path):
    """On a Gaussian the affine start is exact; an operator that bends the map cannot be better."""
    start = saved(tmp_path / "run", operator(bend=5.0))
    method = JKOICNN(functional="entropy", tau=TAU, jko_steps=1, cloud=2048, init_from_operator=start, fit=20)
    source = Gaussian(mean=[0.0])
    make = lambda: ICNN(event_shape=(1,), width=8)  # noqa: E731
    problem = Problem(source, Space(dimension=1), make, 0, 4, 64, torch.device("cpu"))
    (stage,) = method.stages(problem, Flow(source))
    assert stage.initial.is_affine and stage.solved


def test_a_good_operator_starts_the_step_better_than_the_best_affine_map(tmp_path, monkeypatch):
    """The operator's map is put in as the exact step of a mixture on the line, solved on nodes."""
    from gengrad.flows.line import Line, carried, implicit_step
    from gengrad.functionals import Entropy
    from gengrad.methods import jko_warm

    law = GaussianMixture(means=[[-1.0], [1.0]], scales=[0.4, 0.4])
    line = Line.of(law.log_density, -6, 6)
    after = implicit_step(Entropy(), line, TAU)
    exact = lambda network, x, tau, **named: (carried(line, after, x, x[:, 0])[0].float(), None)  # noqa: E731
    monkeypatch.setattr(jko_warm, "push", exact)
    start = saved(tmp_path / "run", operator())
    stages = []
    for changes in ({}, {"init_from_operator": start, "fit": 300}):
        method = JKOICNN(functional="entropy", tau=TAU, jko_steps=1, cloud=4096, **changes)
        make = lambda: ICNN(event_shape=(1,), width=16)  # noqa: E731
        problem = Problem(law, Space(dimension=1), make, 0, 4, 64, torch.device("cpu"))
        stages += list(method.stages(problem, Flow(law)))
    plain, warm = (stage.at_start["residual"] for stage in stages)
    assert warm < plain / 3 and not stages[1].initial.is_affine


BASE = {
    "source": {"name": "gaussian", "mean": [0.0]},
    "data": {"name": "space", "dimension": 1},
    "network": {"name": "icnn", "width": 8},
    "method": {"name": "jko_icnn", "functional": "entropy", "jko_steps": 1, "tau": TAU, "cloud": 128},
    "train": {"steps": 2, "batch_size": 16},
    "evaluate": {"nfe": [1]},
}
BAD = {
    "another tau": ({"tau": 0.2}, operator(), "was trained for tau=0.1; here tau=0.2"),
    "another space": ({}, operator(d=2), "moves points of shape (2,), not (1,)"),
    "another energy": ({}, operator(terms={"name": "power_entropy"}), "descends another functional"),
    "no operator": ({}, None, "holds no operator"),
    "no run": ({"init_from_operator": "nowhere"}, None, "nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_operator_that_does_not_fit_is_refused(name, tmp_path, capsys):
    changes, made, says = BAD[name]
    if made is None:
        Flow(Gaussian(mean=[0.0])).save(tmp_path / "start")
    else:
        saved(tmp_path / "start", made)
    raw = {key: dict(value) for key, value in BASE.items()} | {"out": str(tmp_path / "run")}
    raw["method"] |= {"init_from_operator": str(tmp_path / "start"), **changes}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    assert main(["train", str(tmp_path / "run.yaml")]) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told
