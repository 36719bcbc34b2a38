"""A learned operator as a transport and on clouds of the user's: contracts, carried densities, refusals."""

import math
import warnings

import numpy as np
import pytest
import torch

import gengrad
from gengrad.cli import main
from gengrad.data import Gaussian
from gengrad.flows import Flow, OperatorTransport, VelocityTransport
from gengrad.flows.newton_correction import Correction
from gengrad.flows.operator import rises
from gengrad.flows.operator_family import family_of, features, outside
from gengrad.flows.operator_transport import UNKNOWN, Moved, anchored, push
from gengrad.functionals.expression import read_expression
from gengrad.networks import MLP, SetOperator
from gengrad.networks.local_fit import SmoothMaps, moments

CENTRE, STRETCH, TAU = 1.5, -0.8, 0.1
SPRINGS = {"name": "interaction", "weight": 0.1, "attraction": 2.0, "repulsion": None}
TO_THE_CENTRE = [{"name": "potential", "potential": "quadratic"}]


def operator_flow(d=2, terms="entropy", **changes) -> Flow:
    """T(x; mu) = x + tau (b + a (x - mean) / scale): its densities are known, and it depends on mu."""
    torch.manual_seed(0)
    network = SetOperator(event_shape=(d,), width=8, tokens=2, heads=2, blocks=1)
    with torch.no_grad():
        affine = torch.cat([STRETCH * torch.eye(d), torch.full((d, 1), CENTRE)], dim=1)
        network.affine.bias[: d * (d + 1)].copy_(affine.flatten())
    source = Gaussian(mean=[0.0] * d)
    x = torch.randn(64, d, generator=torch.Generator().manual_seed(0))
    given = (torch.empty(0, d), TAU, read_expression(terms))
    anchors = anchored(OperatorTransport(network, x[None], *given), x, None, 3)[0]
    return Flow(source, [OperatorTransport(network, anchors, *given, **changes)])


def cloud(n=200, d=2, seed=1):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_a_step_is_the_map_of_the_clouds_own_context():
    flow, x = operator_flow(), cloud()
    away = x - x.mean(0)
    scale = away.square().mean().sqrt()
    assert torch.allclose(flow.step(x), x + TAU * (CENTRE + STRETCH * away / scale), atol=1e-6)


def test_clouds_of_a_batch_are_moved_each_by_itself():
    flow, x = operator_flow(), torch.stack([cloud(seed=1), 3 * cloud(seed=2)])
    assert torch.allclose(flow.step(x), torch.stack([flow.step(one) for one in x]), atol=1e-6)


def test_the_carried_density_is_that_of_the_affine_map():
    flow, x = operator_flow(terms=[{"name": "entropy"}, *TO_THE_CENTRE]), cloud()
    found = flow.evolve(x, 2, log_density=flow.source)
    log_rho, now = flow.source.log_density(x), x
    for k in range(2):
        scale = (now - now.mean(0)).square().mean().sqrt()
        log_rho, now = log_rho - 2 * math.log(1 + TAU * STRETCH / scale), flow.step(now)
        assert torch.allclose(found.log_density[k + 1], log_rho, atol=1e-5)
        energy = (log_rho + now.square().sum(1) / 2).mean()
        assert float(found.energies[k + 1]) == pytest.approx(float(energy), abs=1e-5)
    assert torch.equal(found.x, found.states[-1]) and torch.allclose(found.x, now, atol=1e-6)
    assert found.times.tolist() == pytest.approx([0, TAU, 2 * TAU]) and found.folded == 0 and found.nfe == 2


def test_where_the_map_folds_densities_are_nan_and_the_share_is_told():
    flow, x = operator_flow(d=1), cloud(d=1)
    with torch.no_grad():
        flow.transports[0].network.affine.bias.mul_(50.0)  # the slope becomes 1 - 4 / scale
    found = flow.evolve(x, 1, log_density=flow.source.log_density(x))
    assert found.folded == 1 and found.log_density[1].isnan().all()


def test_energies_without_a_density_are_left_out_or_refused():
    flow, x = operator_flow(), cloud()
    assert flow.evolve(x, 2).energies is None
    with pytest.raises(ValueError, match=r"needs a density.*give log_density="):
        flow.evolve(x, 2, energies=True)
    assert operator_flow(terms=TO_THE_CENTRE).evolve(x, 2).energies.shape == (3,)
    assert operator_flow(terms=TO_THE_CENTRE).evolve(x, 2, energies=False).energies is None


def test_a_sample_does_not_depend_on_the_batch_it_comes_in():
    flow = operator_flow()
    x = flow.sample(300, seed=3)
    parts = [flow.draw_samples(100, seed=3, first=first, chunk=17).x for first in (0, 100, 200)]
    assert torch.allclose(x, torch.cat(parts), atol=1e-6)
    assert flow.draw_samples(10).nfe == 3 == flow.cost()
    with pytest.raises(ValueError, match=r"makes 3 steps.*nfe=2 is less"):
        flow.sample(10, nfe=2)


def test_it_is_saved_and_loaded_with_all_that_it_knows(tmp_path):
    flow = operator_flow(terms="energy_distance", family=family_of(torch.stack([cloud() - 1, 2 * cloud() + 1])))
    flow.transports[0].samples = cloud(20)
    flow.save(tmp_path / "run")
    again, x = gengrad.load(tmp_path / "run"), cloud(50)
    assert torch.equal(again.sample(20, seed=1), flow.sample(20, seed=1))
    one, two = again.evolve(x, 3), flow.evolve(x, 3)
    assert torch.equal(one.states, two.states) and torch.equal(one.energies, two.energies)
    assert one.outside == two.outside


def test_units_are_taken_off_and_put_on_again():
    flow, x = operator_flow(), cloud()
    scaled = Flow(flow.source, list(flow.transports), units=(torch.tensor([3.0, -1.0]), 2.0))
    y = torch.tensor([3.0, -1.0]) + 2 * x
    found = scaled.evolve(y, 1, log_density=flow.source.log_density(x) - 2 * math.log(2))
    assert torch.allclose(found.x, torch.tensor([3.0, -1.0]) + 2 * flow.step(x), atol=1e-5)
    plain = flow.evolve(x, 1, log_density=flow.source)
    assert torch.allclose(found.log_density, plain.log_density - 2 * math.log(2), atol=1e-5)
    assert torch.allclose(found.energies, plain.energies, atol=1e-5)


def test_how_far_a_cloud_is_outside_of_the_family_is_measured_in_its_widths():
    clouds = torch.stack([cloud(2000, seed=k) * s + m for k, (s, m) in enumerate([(1, 0), (2, 0), (1, 4)])])
    family = family_of(clouds)
    assert features(clouds).shape == (3, 5)
    for inside in clouds:
        assert outside(family, inside)[0] == 0
    distance, what = outside(family, cloud(2000) + torch.tensor([12.0, 0.0]))
    assert distance == pytest.approx(2.0, abs=0.05) and "mean 1 12" in what  # the means go from 0 to 4
    distance, what = outside(family, 8 * cloud(2000))
    # a factor four in the logarithm, in widths of a factor two
    assert distance == pytest.approx(2.0, abs=0.1) and "standard deviation" in what


def test_a_cloud_far_outside_is_moved_with_a_warning():
    flow = operator_flow(family=family_of(torch.stack([cloud(seed=k) + 0.1 * k for k in range(5)])))
    with pytest.warns(UserWarning, match="widths of the training family outside of it"):
        assert flow.evolve(cloud() + 50, 1).outside > 10
    with pytest.warns(UserWarning, match="widths of the training family outside of it"):
        flow.step(torch.stack([cloud(), cloud() + 50]))  # the farthest of the clouds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert flow.evolve(cloud(seed=2) + 0.2, 1).outside == 0


def test_push_without_a_density_takes_no_determinant():
    network = SetOperator(event_shape=(5,), width=8, tokens=2, heads=2)
    x = cloud(20, 5)
    assert push(network, x, TAU)[1] is None
    with pytest.raises(ValueError, match="up to d = 3"):
        push(network, x, TAU, torch.zeros(20))


ONE = torch.zeros(10, 2)
BAD = {
    "another dimension": (lambda f: f.evolve(cloud(d=3), 2), r"shape \(n, 2\); got \(200, 3\)"),
    "an array": (lambda f: f.step(np.zeros((5, 2))), "got a ndarray"),
    "one point": (lambda f: f.evolve(cloud(1), 2), "1 points are none; give at least 2"),
    "NaN": (lambda f: f.step(cloud() / torch.tensor([1.0, 0.0])), "200 of the points are not finite"),
    "an atom": (lambda f: f.step(ONE), "all points are identical"),
    "no steps": (lambda f: f.evolve(cloud(), 0), "n_steps is the number of JKO steps.*at least 1; got 0"),
    "half a step": (lambda f: f.evolve(cloud(), 1.5), "got 1.5"),
    "another tau": (lambda f: f.step(cloud(), tau=0.2), "tau=0.1 alone, not 0.2"),
    "many clouds": (lambda f: f.evolve(cloud()[None], 2), "takes one cloud"),
    "no clouds": (lambda f: f.step(torch.empty(0, 10, 2)), r"no clouds at all: points of shape \(0, 10, 2\)"),
    "complex points": (lambda f: f.step(cloud().to(torch.complex64)), "real numbers are wanted; got torch.complex64"),
    "points that overflow": (lambda f: f.step(1e20 * cloud()), "overflow in the network"),
    "an atom as float32": (lambda f: f.step(1e6 + 1e-3 * torch.eye(2).double()), "all points are identical"),
    "a tau of letters": (lambda f: f.step(cloud(), tau="0.1"), "tau is a number, the length of a step; got '0.1'"),
    "a density of another cloud": (
        lambda f: f.evolve(cloud(), 2, log_density=torch.zeros(3)), r"shape \(200,\).*got \(3,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_cloud_is_refused(name):
    call, says = BAD[name]
    with pytest.raises(ValueError, match=says):
        call(operator_flow())


def test_other_taus_are_taken_where_they_were_trained():
    flow = operator_flow(taus=[0.05, 0.4])
    x = cloud()
    assert torch.allclose(flow.step(x, tau=0.2) - x, 2 * (flow.step(x) - x), atol=1e-6)
    with pytest.raises(ValueError, match=r"outside of 0.05 to 0.4"):
        flow.step(x, tau=0.5)


def test_other_weights_of_the_energy_are_taken_where_they_were_trained(tmp_path):
    flow, x = operator_flow(terms=[{"name": "entropy"}, {"name": "potential", "potential": "quadratic"}]), cloud()
    transport = flow.transports[0]
    transport.weights = {"potential": [0.5, 2.0]}
    transport.network = SetOperator(event_shape=(2,), width=8, tokens=2, heads=2, blocks=1, on_weights=1)
    with torch.no_grad():
        transport.network.particle[0].weight[:, -1] += 1.0
        transport.network.affine.weight.normal_(std=0.1)  # no folds
    flow.save(tmp_path / "run")
    again = gengrad.load(tmp_path / "run")
    assert torch.equal(again.step(x, weights={"potential": 2.0}), flow.step(x, weights={"potential": 2.0}))
    assert not torch.allclose(flow.step(x), flow.step(x, weights={"potential": 2.0}))
    assert torch.equal(flow.step(x), flow.step(x, weights={"potential": 1.0}))  # its own
    # both energies at the start are mean log rho + weight mean |x|^2 / 2
    ways = [flow.evolve(x, 1, log_density=torch.zeros(len(x)), weights={"potential": w}) for w in (1.0, 2.0)]
    found = float(ways[1].energies[0] - ways[0].energies[0])
    assert found == pytest.approx(float(x.square().sum(1).mean() / 2), rel=1e-5)
    assert [term["weight"] for term in transport.terms] == [1.0, 1.0]  # nothing is left behind
    with pytest.raises(ValueError, match=r"the weight 3 of 'potential' is outside of 0.5 to 2"):
        flow.step(x, weights={"potential": 3.0})
    with pytest.raises(ValueError, match=r"one weight of 'entropy'; method.weights had potential"):
        flow.step(x, weights={"entropy": 0.5})


def test_a_flow_without_an_operator_says_so():
    flow = Flow(Gaussian(mean=[0.0, 0.0]), [VelocityTransport(MLP(event_shape=(2,)))])
    for call in (lambda: flow.step(cloud()), lambda: flow.evolve(cloud(), 2)):
        with pytest.raises(ValueError, match="holds no operator"):
            call()


# ---------------------------------------------------------------- the command


def test_the_command_moves_a_cloud_and_says_its_energy(tmp_path, capsys):
    flow, x = operator_flow(terms=TO_THE_CENTRE), cloud(40)
    flow.save(tmp_path / "run")
    np.save(tmp_path / "points.npy", x.double().numpy())
    out = tmp_path / "evolved.npy"
    command = ["sample", str(tmp_path / "run"), "--source", str(tmp_path / "points.npy"), "--steps", "4"]
    assert main([*command, "--out", str(out), "--trajectory", str(tmp_path / "way.gif")]) == 0
    assert np.allclose(np.load(out), flow.evolve(x, 4).x.numpy(), atol=1e-6)
    told = capsys.readouterr().out
    assert "40 points, 4 steps, 4 network evaluations each" in told and "energy: " in told
    assert (tmp_path / "way.gif").stat().st_size > 0


def test_the_command_takes_other_steps_and_weights_where_they_were_trained(tmp_path, capsys):
    flow, x = operator_flow(terms=TO_THE_CENTRE, taus=[0.05, 0.4]), cloud(40)
    flow.transports[0].weights = {"potential": [0.5, 4.0]}
    network = SetOperator(event_shape=(2,), width=8, tokens=2, heads=2, blocks=1, on_weights=1)
    network.affine.load_state_dict(flow.transports[0].network.affine.state_dict())
    flow.transports[0].network = network
    flow.save(tmp_path / "run")
    np.save(tmp_path / "points.npy", x.numpy())
    command = ["sample", str(tmp_path / "run"), "--source", str(tmp_path / "points.npy"), "--steps", "2"]
    assert main([*command, "--tau", "0.2", "--weights", "potential=2", "--out", str(tmp_path / "a.npy")]) == 0
    found = flow.evolve(x, 2, tau=0.2, weights={"potential": 2.0})
    assert np.allclose(np.load(tmp_path / "a.npy"), found.x.numpy(), atol=1e-6)
    assert f"energy: {float(found.energies[0]):.6g}" in capsys.readouterr().out
    assert float(found.energies[0]) == pytest.approx(2 * float(flow.evolve(x, 2).energies[0]))


def test_the_command_takes_the_log_density_of_the_points(tmp_path, capsys):
    flow, x = operator_flow(), cloud(40)
    flow.save(tmp_path / "run")
    known = flow.source.log_density(x)
    np.save(tmp_path / "points.npy", x.numpy()), np.save(tmp_path / "logs.npy", known.double().numpy())
    command = ["sample", str(tmp_path / "run"), "--source", str(tmp_path / "points.npy"), "--steps", "2"]
    assert main(command) == 0 and "energies: not known" in capsys.readouterr().out
    assert main([*command, "--log-density", str(tmp_path / "logs.npy")]) == 0
    found = flow.evolve(x, 2, log_density=known)
    assert f"energy: {float(found.energies[0]):.6g} to {float(found.energies[-1]):.6g}" in capsys.readouterr().out


def told_flow() -> Flow:
    """One whose network takes log densities, its anchors moved with theirs."""
    flow = operator_flow()
    network = SetOperator(event_shape=(2,), width=8, tokens=2, heads=2, blocks=1, log_density=True)
    with torch.no_grad():
        network.affine.bias.normal_(0, 0.1), network.affine.weight.normal_(0, 0.1)
        network.blind.affine.bias.fill_(3.0)  # by the points alone: far off
    x = cloud(64)
    given = (flow.transports[0].samples, TAU, flow.transports[0].terms)
    anchors, known, _ = anchored(OperatorTransport(network, x[None], *given), x, flow.source.log_density(x), 3)
    assert known.shape == (3, 64) and known.isfinite().all()
    return Flow(flow.source, [OperatorTransport(network, anchors, *given, known=known)])


def test_a_network_that_takes_log_densities_is_told_them_in_every_step():
    flow, x = told_flow(), cloud()
    network, known = flow.transports[0].network, flow.source.log_density(x)
    with torch.no_grad():
        one = network(x, x, TAU, log_density=known)
    assert torch.allclose(flow.step(x, log_density=known), one, atol=1e-6)
    assert torch.allclose(flow.step(x, log_density=flow.source), one, atol=1e-6)
    assert (flow.step(x) - one).abs().max() > 1e-3  # by the points alone it goes elsewhere
    both = torch.stack([x, 2 * x])
    logs = torch.stack([known, known - 2 * math.log(2)])
    assert torch.allclose(flow.step(both, log_density=logs)[0], one, atol=1e-6)
    assert torch.allclose(flow.step(both, log_density=flow.source)[0], one, atol=1e-6)
    logs[0, 3] = math.nan
    with pytest.raises(ValueError, match="1 of the log densities are not finite"):
        flow.step(both, log_density=logs)
    way = flow.evolve(x, 2, log_density=known)
    with torch.no_grad():
        assert torch.allclose(way.x, network(one, one, TAU, log_density=way.log_density[1]), atol=1e-5)
    with pytest.raises(ValueError, match=r"shape \(2, 200\)"):
        flow.step(both, log_density=known)


def test_its_samples_follow_anchors_that_are_told_theirs(tmp_path):
    flow = told_flow()
    flow.save(tmp_path / "run")
    again = gengrad.load(tmp_path / "run")
    assert torch.equal(again.transports[0].known, flow.transports[0].known)
    assert torch.equal(again.sample(20, seed=1), flow.sample(20, seed=1))
    flow.transports[0].known[1, 5] = UNKNOWN  # as where the map has folded at an anchor
    flow.save(tmp_path / "folded")
    assert torch.equal(gengrad.load(tmp_path / "folded").sample(20, seed=1), flow.sample(20, seed=1))
    network, none = flow.transports[0].network, torch.full((1, 64), math.nan)
    holed = OperatorTransport(network, cloud(64)[None], torch.empty(0, 2), TAU, [], known=none)
    assert holed.known.isfinite().all()  # what is not cannot be saved
    x = cloud(9)
    assert torch.equal(next(holed.path(x)), holed.network(x, cloud(64), TAU))
    flow.transports[0].known = None  # as of a source without a density
    assert (flow.sample(20, seed=1) - again.sample(20, seed=1)).abs().max() > 1e-4
    flow.save(tmp_path / "other")
    assert gengrad.load(tmp_path / "other").transports[0].known is None


COMMANDS = {
    "weights of samples": (["--n", "5", "--weights", "potential=2"], "--weights are those of an operator's energy"),
    "the length of steps of samples": (["--n", "5", "--tau", "0.2"], "an operator takes it with --source"),
    "a pull of a cloud": (["--source", "points.npy", "--steps", "2", "--guidance", "3"], "leave out --guidance"),
    "weights out of reach": (
        ["--source", "points.npy", "--steps", "2", "--weights", "entropy=2"], "one weight of 'entropy'",
    ),
    "no file": (["--source", "none.npy", "--steps", "2"], "no such file"),
    "a text": (["--source", "text.npy", "--steps", "2"], "is no .npy file of numbers"),
    "a table": (["--source", "points.csv", "--steps", "2"], "a .npy file of shape (n, d)"),
    "densities of samples": (["--n", "5", "--log-density", "logs.npy"], "--log-density is that of points"),
    "densities of a table": (["--source", "points.npy", "--steps", "2", "--log-density", "points.npy"],
                             "--log-density points.npy: numbers of shape (n,) are wanted; found float64 of (2, 2)"),
    "densities of other points": (["--source", "points.npy", "--steps", "2", "--log-density", "line.npy"],
                                  "log_density must be of shape (2,), one number for each point; got (5,)"),
    "a line of numbers": (["--source", "line.npy", "--steps", "2"], "shape (n, d) are wanted"),
    "words": (["--source", "words.npy", "--steps", "2"], "numbers of shape"),
    "another dimension": (["--source", "space.npy", "--steps", "2"], "shape (n, 2); got (5, 3)"),
    "no number of steps": (["--source", "points.npy"], "--source POINTS.npy and --steps K go together"),
    "a number of samples as well": (["--source", "points.npy", "--steps", "2", "--n", "5"], "leave out --n"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_with_the_command_is_one_message(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    operator_flow().save(tmp_path / "run")
    (tmp_path / "text.npy").write_text("no array")
    np.save("points.npy", np.eye(2))
    np.save("line.npy", np.arange(5.0))
    np.save("words.npy", np.array([["a", "b"]]))
    np.save("space.npy", np.eye(5, 3))
    arguments, says = COMMANDS[name]
    assert main(["sample", "run", *arguments]) == 2
    told = capsys.readouterr().err
    assert says in told and "Traceback" not in told


@pytest.mark.parametrize(
    "weights, says", [("entropy", "'entropy': a term's name and its weight are wanted"), ("a=1,a=2", "two weights")]
)
def test_weights_that_are_none_are_refused_by_the_command(weights, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path), "--source", "x.npy", "--steps", "2", "--weights", weights])
    assert says in capsys.readouterr().err


def test_steps_of_nothing_are_refused_by_the_command(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["sample", str(tmp_path), "--source", "x.npy", "--steps", "0"])
    assert "at least 1; got 0" in capsys.readouterr().err


def test_densities_are_those_of_the_smooth_map_that_moves_the_points():
    """Points farther apart than the kernels are wide: mass between neighbours, rho dx, is kept; by the derivative at

    the points themselves, each at the middle of its own kernels, it is not.
    """
    torch.manual_seed(0)
    tau = 2e-4  # kernels of 0.04 and narrower; neighbours are 0.02 to 0.4 from each other
    network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1).double()
    with torch.no_grad():
        network.affine.bias[-network.config.kernels :] = 10.0
    u = (torch.arange(128, dtype=torch.float64) + 0.5) / 128
    x = (2**0.5 * torch.erfinv(2 * u - 1))[:, None]
    log_rho = -x[:, 0].square() / 2 - math.log(2 * math.pi) / 2
    y, logs = push(network, x, tau, log_rho)
    bare = push(network, x, tau, log_rho, x.clone())[1]
    middle = lambda v: (v[1:] * v[:-1]).sqrt()  # noqa: E731
    mass = middle(log_rho.exp()) * x[:, 0].diff()
    still = (mass / (middle(log_rho.exp()) * y[:, 0].diff()) - 1).abs().mean()  # how much there is to know
    off, other = ((middle(v.exp()) * y[:, 0].diff() / mass - 1).abs().mean() for v in (logs, bare))
    assert still > 1e-4 and off < 0.3 * still and other > 3 * still


def corrected_flow() -> Flow:
    """N(0, I) moved by about its exact step, 1.092 x, by a network that takes log densities, and corrected."""
    torch.manual_seed(0)
    network = SetOperator(event_shape=(2,), width=8, tokens=2, heads=2, blocks=1, log_density=True)
    with torch.no_grad():
        network.affine.bias[:6] = torch.tensor([0.85, 0.1, 0.0, -0.1, 0.85, 0.05])
    x, given, source = cloud(400), (torch.empty(0, 2), TAU, read_expression("entropy")), Gaussian(mean=[0.0, 0.0])
    made = OperatorTransport(network, x[None], *given, correction=2)
    anchors, known, corrected = anchored(made, x, source.log_density(x), 3)
    return Flow(source, [OperatorTransport(network, anchors, *given, None, None, None, None, 2, known, corrected)])


def test_where_log_densities_are_known_steps_are_corrected():
    """Towards the exact step of the Gaussian, by independent points: only the network's own bend stays."""
    flow, x = corrected_flow(), cloud(2000)
    exact = (1 + math.sqrt(1 + 4 * TAU)) / 2 * x
    one, bare = flow.step(x, log_density=flow.source), flow.step(x)
    network = flow.transports[0].network
    with torch.no_grad():
        plain = network(x, x, TAU, log_density=flow.source.log_density(x))
    assert (one - exact).norm() < 0.15 * (plain - exact).norm()
    way = flow.evolve(x, 2, log_density=flow.source)
    assert torch.allclose(way.states[1], one, atol=1e-6) and way.folded == 0
    assert torch.allclose(flow.evolve(x, 2).states[1], bare, atol=1e-6)
    with torch.inference_mode():
        assert torch.allclose(flow.step(x, log_density=flow.source), one, atol=1e-6)
    leaf = x.clone().requires_grad_(True)
    assert not flow.evolve(leaf, 1, log_density=flow.source).states.requires_grad
    volume = flow.source.log_density(x) - way.log_density[1]  # log det: of 1.092 in both directions
    assert volume.mean() == pytest.approx(2 * math.log((1 + math.sqrt(1 + 4 * TAU)) / 2), abs=0.01)
    both = flow.step(torch.stack([x, x + 1]), log_density=flow.source.log_density(x).expand(2, -1))
    assert torch.allclose(both[0], one, atol=1e-5) and both.shape == (2, 2000, 2)


def test_where_log_densities_mislead_the_network_the_points_alone_move_it():
    torch.manual_seed(0)
    network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1, log_density=True)
    source, x = Gaussian(mean=[0.0]), cloud(400)[:, :1]
    away = (x - x.mean(0)) / moments(x)[1]
    made = OperatorTransport(network, x[None], torch.empty(0, 1), TAU, read_expression("entropy"))
    with torch.no_grad():
        network.affine.bias[0], network.blind.affine.bias[0] = -20.0, 0.9  # T x = -x around the mean, and 1.09 x
    points, known, _ = anchored(made, x, source.log_density(x), 2)  # samples go by the points alone there, too
    assert known[0].isnan().all() and torch.allclose(points[1], x + 0.09 * away, atol=1e-5)
    moved, logs, *_ = made.moved(x, source.log_density(x))
    assert torch.allclose(moved, x + 0.09 * away, atol=1e-5) and logs.isfinite().all()
    for told, blind, taken in ((-20.0, -20.0, -20.0), (0.1, 0.9, 0.9), (0.1, 12.0, 0.1), (0.8, 0.9, 0.8)):
        with torch.no_grad():  # both fold; one is far too short; both are wrong; one is nearly right
            network.affine.bias[0], network.blind.affine.bias[0] = told, blind
        moved, logs, _, by = made.moved(x, source.log_density(x))
        assert torch.allclose(moved, x + taken * TAU * away, atol=1e-5) and bool(logs.isnan().all()) == (told < 0)
        assert (by is None) == (taken != told)


@pytest.mark.parametrize("seed", range(6))
def test_where_some_points_fold_by_log_densities_the_points_alone_move_them(seed, monkeypatch):
    """An entropy's residual is finite at a fold, and may be the smaller one."""
    torch.manual_seed(seed)
    network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1, log_density=True)
    source, x = Gaussian(mean=[0.0]), torch.randn(400, 1, generator=torch.Generator().manual_seed(seed))
    made, plain = OperatorTransport(network, x[None], torch.empty(0, 1), TAU, read_expression("entropy")), push
    with torch.no_grad():
        network.affine.bias[0], network.blind.affine.bias[0] = 0.91, 0.5

    def some_fold(net, x, tau, log_rho, particles, weights, known, maps):
        y, logs = plain(net, x, tau, log_rho, particles, weights, known, maps)
        return y, logs if known is None else torch.where(x[:, 0] > 2.0, math.nan, logs)

    monkeypatch.setattr("gengrad.flows.operator_transport.push", some_fold)
    step = made.moved(x, source.log_density(x))
    assert step.told is None and step.log_rho.isfinite().all()
    lost = torch.where(x[:, 0] > 2.0, math.nan, source.log_density(x))  # as of a fold before: it is not held against it
    assert made.moved(x, lost).told is not None
    with torch.no_grad():
        network.affine.bias[0] = 0.02  # far too short: nor does what was lost keep the points from being asked
    assert made.moved(x, lost).told is None


def test_what_the_residual_cannot_be_taken_of_is_moved_by_what_is_known():
    """Points that come twice, and an interaction that is infinite there."""
    torch.manual_seed(0)
    network = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1, log_density=True)
    x = torch.cat([cloud(200)[:, :1]] * 2)
    terms = read_expression(["entropy", {"name": "interaction", "attraction": 2.0, "repulsion": 0.0}])
    made = OperatorTransport(network, x[None], torch.empty(0, 1), TAU, terms, correction=1)
    step = made.moved(x, Gaussian(mean=[0.0]).log_density(x))
    assert step.correction is None and step.told is not None and step.x.isfinite().all()


def test_where_the_smooth_map_folds_densities_go_by_the_networks_own_derivative(monkeypatch):
    """As of an outermost point, whose neighbours lie on one side of it: no fold of the network's."""
    flow, x = operator_flow(), cloud(400)
    log_rho, plain, transport = flow.source.log_density(x), SmoothMaps.jacobians, flow.transports[0]
    found = transport.moved(x, log_rho).log_rho

    def folded(self, x, y):
        jacobian = plain(self, x, y)
        jacobian[3, 0] = -jacobian[3, 0]
        return jacobian

    monkeypatch.setattr(SmoothMaps, "jacobians", folded)
    logs = transport.moved(x, log_rho).log_rho
    own = push(transport.network, x, TAU, log_rho, particles=x.clone())[1]
    others = torch.arange(400) != 3
    assert torch.equal(logs[others], found[others]) and logs[3] == pytest.approx(float(own[3]), abs=1e-6)
    assert push(transport.network, x, TAU, log_rho)[1][3].isnan()  # in training, where such states are left


def test_energies_of_particles_are_corrected_in_steps_batches_rollouts_and_samples(tmp_path):
    """W = |z|^2 / 2: x -> m + (x - m) / (1 + tau). The network stays where it is, nearly; no log density is asked."""
    terms = read_expression({"name": "interaction", "attraction": 2.0, "repulsion": None})
    flow, x = operator_flow(terms=terms), cloud(300)
    network, source = flow.transports[0].network, flow.source
    with torch.no_grad():
        network.affine.weight.zero_(), network.affine.bias.zero_()
        network.affine.bias[0] = -0.6  # of -0.91, and that along one axis
    made = OperatorTransport(network, x[None], torch.empty(0, 2), TAU, terms, correction=1)
    states, known, corrected = anchored(made, x, None, 2)
    assert known is None and corrected.shape == (2, 3 + 3, 2)
    flow = Flow(
        source,
        [OperatorTransport(network, states, made.samples, TAU, terms, None, None, None, None, 1, None, corrected)],
    )

    def exact(x):
        mean = x.mean(-2, keepdim=True)
        return mean + (x - mean) / (1 + TAU)

    def near(y, truth, before):
        return float((y - truth).norm() / (before - truth).norm()) < 0.05

    both = torch.stack([x, x.flip(1) + 1])
    assert near(flow.step(x), exact(x), x) and near(flow.step(both), exact(both), both)
    assert torch.allclose(flow.step(both)[0], flow.step(x), atol=1e-6)
    way = flow.evolve(x, 2)
    assert near(way.states[1], exact(x), x) and near(way.x, exact(exact(x)), x)
    (_, end) = flow.transports[0].path(x)
    assert torch.allclose(end, way.x, atol=1e-5)
    flow.save(tmp_path)
    assert torch.equal(gengrad.load(tmp_path).sample(7, seed=3), flow.sample(7, seed=3))


def test_a_correction_is_taken_if_the_residual_is_no_larger_after_it(monkeypatch):
    """Else one of a lower degree, at last none."""
    flow, x = corrected_flow(), cloud(400)
    transport, log_rho = flow.transports[0], flow.source.log_density(x)
    good = transport.moved(x, log_rho)
    transport.correction = 0
    plain = transport.moved(x, log_rho)
    transport.correction = 2
    bad = Correction(0.3 * torch.eye(3, 2).double(), torch.zeros(2).double(), torch.ones(()).double(), torch.ones(2))
    for offered, taken in (([bad, good.correction], good), ([bad], plain)):
        monkeypatch.setattr("gengrad.flows.operator_transport.corrections_of", lambda *_, o=offered: iter(o))
        moved = transport.moved(x, log_rho)
        assert torch.allclose(moved.x, taken.x, atol=1e-6) and torch.allclose(moved.log_rho, taken.log_rho, atol=1e-6)
        assert moved.correction is taken.correction
    assert flow.evolve(x, 1, log_density=log_rho).corrected == (0,)
    monkeypatch.undo()
    assert flow.evolve(x, 2, log_density=log_rho).corrected == (2, 2) and flow.evolve(x, 1).corrected == (0,)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_anchors_of_which_some_steps_are_corrected_are_packed_to_the_highest_degree(device, monkeypatch):
    made, x = operator_flow().transports[0], cloud(50).to(device)
    coefficients = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).double()
    found = Correction(*(v.to(device) for v in (coefficients, torch.zeros(2), torch.ones(()), torch.full((2,), 9.0))))
    every = iter([None, found, None])
    monkeypatch.setattr(made, "moved", lambda x, log_rho: Moved(x, None, next(every), None))
    made.correction = 7
    corrected = anchored(made, x, None, 3)[2]
    assert corrected.shape == (3, 3 + 3, 2) and corrected.dtype == x.dtype and corrected.device == x.device
    if device == "cpu":
        assert torch.equal(Correction.unpacked(corrected[0])(x), x)
        assert torch.allclose(Correction.unpacked(corrected[1])(x), found(x.double()).float(), atol=1e-5)
        assert float((found(x.double()) - x).norm()) > 0.1 * float(coefficients.norm())


def test_energies_of_pairs_are_taken_of_particles_spread_over_the_cloud(monkeypatch):
    """Not of the first rows of the user's array, which may be sorted."""
    flow, x = operator_flow(terms=SPRINGS), cloud(400)
    ordered, whole = x[x[:, 0].argsort()], flow.evolve(x, 2).energies
    monkeypatch.setattr("gengrad.flows.operator.PAIRS", 100)
    one, other = (flow.evolve(points, 2).energies for points in (x, ordered))
    assert torch.allclose(one, other) and torch.allclose(one, whole, rtol=0.15) and not torch.equal(one, whole)


def test_energies_that_are_infinite_are_left_out_unless_they_are_asked_for(tmp_path, capsys):
    flow, x = operator_flow(terms={"name": "interaction", "attraction": 2.0, "repulsion": 0.0}), cloud(40)
    twice = torch.cat([x, x])
    assert flow.evolve(twice, 2).energies is None and flow.evolve(x, 2).energies is not None
    with pytest.raises(ValueError, match="coincide"):
        flow.evolve(twice, 2, energies=True)
    flow.save(tmp_path / "run")
    np.save(tmp_path / "twice.npy", twice.numpy())
    assert main(["sample", str(tmp_path / "run"), "--source", str(tmp_path / "twice.npy"), "--steps", "2"]) == 0
    assert "energies: not known, the energy is infinite of this cloud" in capsys.readouterr().out


def test_a_rise_counts_if_it_is_more_than_a_thousandth_of_the_fall():
    assert rises([1.0, 0.5, 0.5004, 0.502]) == [False, False, True]
    assert rises([1.0, 1.0 + 1e-7, 1.0 + 1e-4, math.nan]) == [False, True, True]


BOWL = {"name": "potential", "weight": 0.1, "potential": {"name": "quadratic"}}


@pytest.mark.parametrize("terms", [["entropy"], [BOWL, "entropy"], [SPRINGS, "entropy"]])
def test_every_energy_is_corrected_in_inference_mode_too(terms):
    transport = corrected_flow().transports[0]
    transport.terms, x = read_expression(terms), cloud(300)
    log_rho = Gaussian(mean=[0.0, 0.0]).log_density(x)
    plain = transport.moved(x, log_rho)
    with torch.inference_mode():
        again = transport.moved(x.clone(), log_rho.clone())
    assert plain.correction is not None and torch.allclose(again.x, plain.x, atol=1e-6)


def test_what_circulates_in_a_step_is_taken_out_and_densities_are_those_of_where_the_points_went(monkeypatch):
    """A network of vortices between the polynomials: DT is nearer to symmetric matrices, log rho is by its det."""
    flow, x = corrected_flow(), cloud(1000)
    transport, source = flow.transports[0].double(), flow.source
    x, log_rho, whirl = x.double(), source.log_density(x.double()), lambda z: 0.004 * torch.sin(4 * z.flip(-1))
    plain = transport.network.forward

    def forward(z, *given, **named):  # sin(4 y), -sin(4 x) has no divergence, and is no gradient
        moved = plain(z, *given, **named)
        return moved + whirl(z) * torch.tensor([1.0, -1.0]).double()

    monkeypatch.setattr(transport.network, "forward", forward)
    maps, found = SmoothMaps(x), transport.moved(x, log_rho)
    monkeypatch.setattr("gengrad.flows.operator_transport.circulation", lambda *_: None)
    left = transport.moved(x, log_rho)
    turns = [maps.jacobians(x, step.x) for step in (found, left)]
    one, other = (((j - j.mT)[:, 0, 1]).square().mean().sqrt() for j in turns)
    assert one < 0.5 * other
    assert torch.allclose(found.log_rho, log_rho - torch.linalg.det(turns[0]).log(), atol=1e-9)
    assert (found.log_rho - left.log_rho).abs().median() < 0.02  # in places that are a little apart
    monkeypatch.setattr(
        "gengrad.flows.operator_transport.circulation", lambda _, x, y, *__: y * torch.tensor([-1.5, 0.0])
    )  # folds
    assert torch.equal(transport.moved(x, log_rho).x, left.x)


def test_samples_are_corrected_as_the_anchors_are_but_for_what_circulates(tmp_path):
    flow = corrected_flow()
    transport = flow.transports[0]
    assert transport.corrected.shape == (3, 9, 2) and transport.known.shape == (3, 400)
    states = list(transport.path(transport.anchors[0]))
    for before, state, after in zip(transport.anchors, states, transport.anchors[1:]):
        way = (after - before).norm()  # polynomials take out what turns here
        assert (state - after).norm() < 5e-3 * way
    flow.save(tmp_path)
    again = gengrad.load(tmp_path)
    assert again.transports[0].correction == 2
    assert torch.equal(again.sample(7, seed=3), flow.sample(7, seed=3))
    assert torch.equal(again.step(cloud(), log_density=flow.source), flow.step(cloud(), log_density=flow.source))
