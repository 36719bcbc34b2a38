"""The JKO scheme with convex potentials: exact on Gaussians, falling energies, the same after a resume, refusals."""

import pytest
import torch
import yaml

import gengrad
from gengrad.cli import main
from gengrad.data import Gaussian, GaussianMixture, Moons, StandardNormal
from gengrad.data.draws import generator_for
from gengrad.data.space import Space
from gengrad.flows import Flow
from gengrad.flows.density_cloud import Cloud
from gengrad.functionals.potential import random_spd
from gengrad.methods import JKOICNN, Part, Problem
from gengrad.methods.jko_affine import JKOProblem, solve_affine
from gengrad.methods.jko_stage import JKOStage, is_better, steps_of
from gengrad.networks import ICNN, LogSumExp
from gengrad.ot import gaussian_jko_step

MIXTURE = {"name": "gaussian_mixture", "means": [[-2.0, 0.0], [2.0, 0.0]], "scales": [0.8, 0.8]}


def problem(source, target, steps=30, batch=128, network=ICNN, **settings):
    settings = settings or {"width": 16}
    make = lambda: network(event_shape=tuple(target.event_shape), **settings)  # noqa: E731
    return Problem(source, target, make, 0, steps, batch, torch.device("cpu"))


def trained(method, asked, lr=2e-2):
    """The flow after plain Adam steps on every stage, without the loop."""
    flow = Flow(asked.source)
    for stage in method.stages(asked, flow):
        optimizer = torch.optim.Adam(stage.networks["potential"].parameters(), lr=lr)
        for step in range(stage.steps):
            loss, _ = stage.objective(stage.networks, Part(step, asked.batch_size), generator_for(0, "test", step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        flow.transports.append(stage.transport(stage.networks))
    return flow


def test_on_gaussians_every_step_is_the_exact_implicit_step():
    d, tau = 3, 0.2
    a, b = random_spd(d, 5.0, 1)
    terms = [
        {"name": "potential", "potential": {"name": "quadratic", "seed": 1, "dimension": d, "condition": 5.0}},
        {"name": "entropy", "weight": 0.5},
    ]
    method = JKOICNN(functional=terms, tau=tau, jko_steps=3, cloud=4096)
    flow = trained(method, problem(StandardNormal(event_shape=(d,)), Space(dimension=d)))
    mean, cov = torch.zeros(d).double(), torch.eye(d).double()
    ours = mean, cov
    for transport in flow.transports:
        mean, cov = gaussian_jko_step(mean, cov, a, b, 0.5, tau)
        q, shift = transport.network.double().quadratic.detach(), transport.network.shift.detach()
        ours = q @ ours[0] + shift, q @ ours[1] @ q
        assert torch.allclose(ours[0], mean, atol=1e-5) and torch.allclose(ours[1], cov, atol=1e-5)  # fp32 weights
        assert transport.record["residual"] < 1e-6 and not transport.record["trained"]


def test_the_affine_start_beats_every_affine_map_nearby():
    target, source = GaussianMixture(**{k: v for k, v in MIXTURE.items() if k != "name"}), Gaussian()
    stage = next(iter(JKOICNN(tau=0.5, jko_steps=1, cloud=2048).stages(problem(source, target), Flow(source))))
    network, cloud = stage.initial.double(), stage.cloud
    jko = JKOProblem(stage.jko.functional, 0.5)

    def objective(q, b):
        volume = torch.linalg.slogdet(q).logabsdet.expand(len(cloud.x))
        return float(jko.objective(cloud.x, cloud.x @ q + b, cloud.log_rho, volume))

    q, b = solve_affine(jko, network, cloud)
    for seed in range(5):
        e = torch.randn(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert objective(q, b) < objective(q + 1e-3 * (e + e.mT), b) and objective(q, b) < objective(q, b + 1e-3 * e[0])


@pytest.mark.parametrize(("network", "settings"), [(ICNN, {"width": 16}), (LogSumExp, {"groups": 8, "pieces": 4})])
def test_training_lowers_objective_and_residual_and_the_energy_falls_by_more_than_the_way(network, settings):
    target = GaussianMixture(**{k: v for k, v in MIXTURE.items() if k != "name"})
    source = Gaussian(covariance=[[4.0, 0.0], [0.0, 4.0]])
    method = JKOICNN(tau=0.2, jko_steps=2, cloud=8192)
    stage = next(iter(method.stages(problem(source, target), Flow(source))))
    flow = trained(method, problem(source, target, steps=240, network=network, **settings))
    first = flow.transports[0].record
    assert first["trained"] and first["residual"] < 0.5 * stage.at_start["residual"]
    for transport in flow.transports:
        r = transport.record
        assert r["energy"] + r["move"] / (2 * 0.2) < r["energy_before"]  # O8, up to the noise of the same particles


def test_the_mean_over_two_processes_is_the_loss_of_one():
    target = GaussianMixture(**{k: v for k, v in MIXTURE.items() if k != "name"})
    source = StandardNormal(event_shape=(2,))
    stage = next(iter(JKOICNN(tau=0.2, jko_steps=1, cloud=512).stages(problem(source, target), Flow(source))))
    losses = [
        stage.objective(stage.networks, Part(3, 64, rank, world), generator_for(0, "t"))[0]
        for rank, world in ((0, 2), (1, 2), (0, 1))
    ]
    assert torch.allclose((losses[0] + losses[1]) / 2, losses[2], rtol=1e-5)


def gradient(stage, size, scored):
    stage.scored = scored
    network = stage.networks["potential"]
    network.zero_grad()
    stage.objective(stage.networks, Part(0, size), generator_for(0, "t"))[0].backward()
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


@pytest.mark.parametrize("functional", ["kl", [{"name": "power_entropy", "m": 2.0}, "kl"]])
def test_the_gradient_by_scores_is_that_through_log_det_on_average(functional):
    target = GaussianMixture(**{k: v for k, v in MIXTURE.items() if k != "name"})
    source = StandardNormal(event_shape=(2,))
    method = JKOICNN(functional=functional, tau=0.5, jko_steps=1, cloud=32_768, start="identity")
    stage = next(iter(method.stages(problem(source, target, width=8), Flow(source))))
    with torch.no_grad():
        stage.networks["potential"].scales.fill_(0.02)
    through, by_score = gradient(stage, 32_768, False), gradient(stage, 32_768, True)
    # two means over the same particles with noise of their own: 1 / sqrt(32,768) of a few
    assert (through - by_score).norm() < 0.05 * through.norm()


def test_at_the_exact_step_gradients_by_scores_vanish_particle_by_particle():
    source = Gaussian(mean=[1.0, 0.0], covariance=[[2.0, 0.3], [0.3, 1.0]])
    terms = [{"name": "potential", "potential": "quadratic"}, {"name": "entropy"}]
    method = JKOICNN(functional=terms, tau=0.5, jko_steps=1, cloud=4096)
    stage = next(iter(method.stages(problem(source, Space(dimension=2), width=8), Flow(source))))
    assert gradient(stage, 16, True).norm() < 1e-4 < 1e-2 < gradient(stage, 16, False).norm()


def test_at_the_exact_step_the_gradient_vanishes_at_outposts_too():
    terms = [{"name": "potential", "potential": "quadratic"}, "entropy"]
    asked = problem(Gaussian(mean=[1.0, 0.0], covariance=[[2.0, 0.3], [0.3, 1.0]]), Space(dimension=2))
    alone, among = (
        next(
            iter(
                JKOICNN(functional=terms, tau=0.5, jko_steps=1, cloud=64, outposts=n).stages(asked, Flow(asked.source))
            )
        )
        for n in (0, 64)
    )
    assert len(among.train.x) == 128 and among.own == 64
    exact = gradient(among, 128, scored=True).norm()
    # energies are logged of the particles that are draws of the source
    energies = [
        s.objective(s.networks, Part(0, len(s.train.x)), generator_for(0, "t"))[1]["energy"] for s in (alone, among)
    ]
    assert energies[0] == pytest.approx(energies[1], rel=1e-5)
    among.networks["potential"].load_state_dict(ICNN(event_shape=(2,), width=16).state_dict())  # the identity
    assert exact < 1e-4 * gradient(among, 128, scored=True).norm()


def test_bends_that_would_raise_the_energy_give_way_to_an_affine_map():
    terms = [{"name": "potential", "potential": "quadratic"}, "entropy"]
    asked = problem(StandardNormal(event_shape=(2,)), Space(dimension=2))  # at equilibrium already
    method, before = JKOICNN(functional=terms, tau=0.5, jko_steps=2, cloud=2048), asked.make_network()
    with torch.no_grad():
        before.scales.fill_(0.5)
    cloud = Cloud.of(asked.source, 2048, 0, 2048, asked.device)
    stage = JKOStage(asked, method.config, method._functional_of(asked), cloud, 1, before)
    assert stage.initial.is_affine and not stage.networks["potential"].is_affine
    assert stage.at_start["parts"].mean() < stage.at_rest["parts"].mean() + 1e-6


def test_a_trained_map_is_kept_where_it_is_better_beyond_noise_and_else_by_its_residual():
    blocks = torch.tensor([1.0, 1.2, 0.8, 1.1])
    start = {"parts": blocks, "residual": 0.1}
    assert is_better({"parts": blocks - 0.5, "residual": 0.2}, start)
    assert not is_better({"parts": blocks + 0.5, "residual": 0.0}, start)
    noisy = blocks + torch.tensor([0.3, -0.3, 0.2, -0.25])
    assert is_better({"parts": noisy, "residual": 0.05}, start)
    assert not is_better({"parts": noisy, "residual": 0.2}, start)
    assert not is_better({"parts": noisy, "residual": None}, start)
    wave = torch.tensor([1.0, -1.0] * 4)
    better = torch.ones(8) - 3 * wave.std() / 8**0.5 + wave  # by three errors
    even = {"parts": torch.ones(8), "residual": 0.1}
    assert is_better({"parts": better, "residual": 0.2}, even)
    assert not is_better({"parts": better, "residual": None}, even)


@pytest.fixture
def config(tmp_path):
    def write(name, **changes):
        raw = {
            "out": str(tmp_path / name),
            "source": {"name": "normal"},
            "data": MIXTURE,
            "network": {"name": "icnn", "width": 8},
            "method": {"name": "jko_icnn", "jko_steps": 3, "tau": 0.2, "cloud": 512},
            "train": {"steps": 50, "batch_size": 32, "checkpoint_every": 4, "log_every": 2, "lr": 0.02},
            "evaluate": {"nfe": [3]},
        }
        for key, value in changes.items():
            raw[key] = {**raw[key], **value} if isinstance(value, dict) and key in raw else value
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return path

    return write


@pytest.mark.parametrize("stop_after", [14, 33])  # within the first step, within the second
def test_a_run_that_was_cut_goes_on_to_the_same_weights(config, tmp_path, stop_after, monkeypatch):
    from gengrad.training import loop

    assert main(["train", str(config("whole"))]) == 0
    taken, step = [], loop.Fitter.step

    def cut(self, progress):
        taken.append(1)
        if len(taken) > stop_after:
            raise KeyboardInterrupt
        return step(self, progress)

    monkeypatch.setattr(loop.Fitter, "step", cut)
    assert main(["train", str(config("cut"))]) == 130
    monkeypatch.setattr(loop.Fitter, "step", step)
    assert main(["train", str(config("cut"))]) == 0
    whole, again = gengrad.load(tmp_path / "whole"), gengrad.load(tmp_path / "cut")
    for (name, a), (_, b) in zip(whole.state_dict().items(), again.state_dict().items()):
        assert torch.equal(a, b), name
    assert [t.record for t in whole.transports] == [t.record for t in again.transports]


def test_functionals_of_samples_are_descended_without_densities():
    method = JKOICNN(functional="energy_distance", tau=0.5, jko_steps=2, cloud=512, target_samples=256)
    flow = trained(method, problem(StandardNormal(event_shape=(2,)), Moons(), steps=40, batch=64))
    energies = [flow.transports[0].record["energy_before"]] + [t.record["energy"] for t in flow.transports]
    assert energies[0] > energies[1] > energies[2]


# ------------------------------------------------------------------ what is refused


def test_an_entropy_of_a_source_without_density_is_refused():
    method = JKOICNN(functional="entropy", jko_steps=1)
    assert "source 'moons' has none" in method.objections(Moons(), Space(dimension=2))[0]
    assert not method.objections(StandardNormal(event_shape=(2,)), Space(dimension=2))


def test_kl_to_data_without_a_density_is_refused_with_what_would_do():
    source = StandardNormal(event_shape=(2,))
    assert "sinkhorn_divergence and energy_distance" in JKOICNN(jko_steps=1).objections(source, Moons())[0]


def test_a_rising_energy_ends_the_run_with_the_step_and_what_to_do():
    target, source = Space(dimension=1), StandardNormal(event_shape=(1,))
    stage = next(
        iter(
            JKOICNN(functional="entropy", tau=0.1, jko_steps=1, cloud=512).stages(problem(source, target), Flow(source))
        )
    )
    with torch.no_grad():  # a step that shrinks the cloud, which the entropy of all things never does
        stage.initial.factor.mul_(0.5)
    stage.at_start = stage._judge(stage.initial)
    with pytest.raises(ValueError, match=r"step_1: the energy rose .* smaller tau"):
        stage.transport({"potential": stage.initial})


def test_a_velocity_network_is_refused_before_training(config, capsys):
    assert main(["train", str(config("wrong", network={"name": "mlp", "width": 8}))]) == 2
    assert "learns a potential; take one of: icnn" in capsys.readouterr().err


def test_fewer_evaluations_than_steps_are_refused_before_training(config, capsys):
    assert main(["train", str(config("few", evaluate={"nfe": [2]}))]) == 2
    assert "give evaluate.nfe=[3]" in capsys.readouterr().err


def test_the_optimiser_steps_are_shared_out_with_three_shares_for_the_first():
    shares = [steps_of(k, 5, 700) for k in range(5)]
    assert shares == [300, 100, 100, 100, 100]
    assert [steps_of(k, 20, 2) for k in range(3)] == [1, 1, 1]
