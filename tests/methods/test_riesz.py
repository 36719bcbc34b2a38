"""The schemes with plans: what they minimise, what they refuse, and a Dirac that bursts as the closed form says."""

import pytest
import torch

import gengrad
from gengrad.cli import main
from gengrad.data import Diracs, RieszProfile, generator_for
from gengrad.evaluation.riesz import radius_error
from gengrad.flows import Flow
from gengrad.functionals import Functional, RieszMMD
from gengrad.methods import Part, Problem, RieszBackward, RieszForward
from gengrad.methods.plan_stages import pushed
from gengrad.networks import Plan
from gengrad.registry import FUNCTIONALS, METHODS

DIRAC = {"name": "diracs", "points": [[0.0]]}
PROFILE = {"name": "riesz_profile", "d": 2, "time": 0.4}
METHOD = {"towards": "nothing", "tau": 0.2, "flow_steps": 2, "pool": 512}


def problem(source=None, **changes):
    torch.manual_seed(0)
    settings = {"seed": 0, "steps": 4, "batch_size": 64, "device": torch.device("cpu"), **changes}
    source = source or Diracs(points=[[0.0, 0.0]])
    return Problem(source, RieszProfile(), lambda: Plan(event_shape=(2,), width=16, depth=2), **settings)


def stages_of(method, **changes):
    asked = problem(**changes)
    flow = Flow(asked.source)
    return flow, method.stages(asked, flow)


def loss_at(stage, step=0, rank=0, world=1, size=64):
    return stage.objective(stage.networks, Part(step, size, rank, world), generator_for(0, "test", step))


def test_the_backward_loss_is_the_transport_cost_and_tau_times_the_functional():
    _, stages = stages_of(RieszBackward(**METHOD))
    x, v = torch.randn(30, 2), torch.randn(30, 2)
    loss, logs = next(stages).loss(x, v, RieszMMD())
    assert torch.allclose(loss, v.square().sum(1).mean() / 2 + 0.2 * RieszMMD().of_draws(x + v))
    assert logs["transport_cost"] == pytest.approx(float(v.square().sum(1).mean() / 2))


def test_the_forward_loss_is_the_slope_by_length_and_the_step_descends_by_it():
    _, stages = stages_of(RieszForward(**METHOD))
    stage = next(stages)
    x, v = torch.zeros(30, 2), torch.randn(30, 2)
    loss, _ = stage.loss(x, v, RieszMMD())
    slope = RieszMMD().directional_derivative(x, v, of_draws=True)
    assert torch.allclose(loss, slope / (v.square().sum(1).mean().sqrt() + 1e-2))
    # whatever the network's length, the step is tau times minus the slope along the unit direction
    short, network = stage.length(stage.networks["plan"]), stage.networks["plan"]
    with torch.no_grad():
        for parameter in (*network.layers[-1].parameters(), network.linear.weight):
            parameter.mul_(10)
    assert stage.length(network) == pytest.approx(short / 10, rel=1e-4) and short > 0


def test_each_stage_starts_from_the_cloud_that_the_ones_before_have_pushed():
    flow, stages = stages_of(RieszBackward(**METHOD))
    first = next(stages)
    assert (first.cloud == 0).all() and first.steps == 2
    flow.transports.append(first.transport(first.networks))
    second = next(stages)
    assert len(torch.unique(second.cloud, dim=0)) == 512
    assert torch.equal(second.cloud, pushed(flow.transports[0], first.cloud, 0, 0))
    assert torch.allclose(second.cloud, pushed(flow.transports[0], first.cloud, 0, 0, chunk=100), atol=1e-6)


def test_networks_go_on_from_the_step_before_but_not_from_the_burst():
    flow, stages = stages_of(RieszBackward(**{**METHOD, "flow_steps": 3}))
    same = []
    for stage in stages:
        if flow.transports:
            before = flow.transports[-1].network.state_dict()
            same.append(all(torch.equal(w, before[k]) for k, w in stage.networks["plan"].state_dict().items()))
        flow.transports.append(stage.transport(stage.networks))
    assert same == [False, True]


def test_a_step_without_progress_ends_early_and_says_so_in_its_state():
    _, stages = stages_of(RieszBackward(**{**METHOD, "patience": 2}), steps=2000)
    stage = next(stages)
    for step in range(0, 200, 50):
        assert stage.steps == 1000
        if step:
            assert stage.state()["since"] == step // 50 - 1
        loss_at(stage, step)  # no optimiser moves the network, so no look sees progress
        if stage.steps < 1000:
            break
    assert step == 100 and stage.steps == 150
    again = next(stages_of(RieszBackward(**{**METHOD, "patience": 2}), steps=2000)[1])
    again.load_state(stage.state())
    assert again.steps == 150 and again.state() == stage.state()


def test_a_run_with_plateaus_resumes_as_it_would_have_gone_on(small, tmp_path):
    def asked(name):
        return small(
            name,
            source=DIRAC,
            data=PROFILE,
            method={"name": "riesz_backward", **METHOD, "patience": 1},
            network={"name": "plan", "width": 16, "depth": 2},
            train={"steps": 1200, "batch_size": 32, "lr": 0.05, "checkpoint_every": 70},
        )

    from gengrad.training import loop

    assert main(["train", str(asked("whole"))]) == 0
    real, calls = loop._commit, []

    def dies(*arguments):
        real(*arguments)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    loop._commit = dies
    try:
        assert main(["train", str(asked("cut"))]) == 130
    finally:
        loop._commit = real
    assert main(["train", str(asked("cut"))]) == 0
    whole, cut = (gengrad.load(tmp_path / name) for name in ("whole", "cut"))
    assert whole.info["progress"] == cut.info["progress"]
    assert whole.info["progress"]["total"] < 1200  # a step has ended early
    assert torch.equal(whole.sample(20), cut.sample(20))


def test_the_mean_over_processes_is_nearly_the_loss_of_one():
    """Each process pairs its own draws: the same expectation, other pairs."""
    _, stages = stages_of(RieszBackward(**METHOD), batch_size=2048)
    stage = next(stages)
    parts = [loss_at(stage, 0, rank, 2, size=2048)[0] for rank in range(2)]
    assert torch.allclose(torch.stack(parts).mean(), loss_at(stage, 0, size=2048)[0], rtol=0.05)


@pytest.mark.parametrize("name", ["riesz_backward", "riesz_forward"])
def test_a_dirac_bursts_to_the_radius_of_the_closed_form(name, small, tmp_path):
    method = {"name": name, **METHOD, "pool": 4096}
    path = small(
        "run",
        source=DIRAC,
        data=PROFILE,
        method=method,
        network={"name": "plan", "width": 64, "depth": 2},
        train={"steps": 800, "batch_size": 256, "lr": 5.0e-3, "checkpoint_every": 1000},
    )
    assert main(["train", str(path)]) == 0
    flow, profile = gengrad.load(tmp_path / "run"), RieszProfile(time=0.4)
    # a twentieth of the shipped config's work; 4000 samples know their radius to 0.4 %
    assert abs(radius_error(flow.sample(4000), profile)) < 0.04
    half = flow.trajectory(4000)[1]
    assert abs(radius_error(half, RieszProfile(time=0.2))) < 0.04  # at r = 1 the schemes meet the flow at every step


def test_particles_burst_to_the_radius_of_the_closed_form(small, tmp_path):
    method = {
        "name": "particles",
        "functional": "riesz_mmd",
        "towards": "nothing",
        "tau": 0.05,
        "flow_steps": 8,
        "particles": 1000,
    }
    path = small("run", source=DIRAC, data=PROFILE, method=method)
    assert main(["train", str(path)]) == 0
    flow = gengrad.load(tmp_path / "run")
    # new particles in a cloud of a thousand: 0.8 %, and 0.4 % of sampling error
    assert abs(radius_error(flow.sample(4000), RieszProfile(time=0.4))) < 0.02
    assert flow.draw_samples(10).nfe == 0


def test_with_r_above_one_the_forward_scheme_stays_at_the_dirac_and_warns():
    method = RieszForward(**METHOD, functional={"name": "riesz_mmd", "r": 1.5})
    with pytest.warns(UserWarning, match="do not split"):
        _, stages = stages_of(method)
        stage = next(stages)
    loss, _ = loss_at(stage)
    assert float(loss.detach()) == 0 and stage.length(stage.networks["plan"]) == 0.0


def test_the_forward_scheme_refuses_r_below_one_at_atoms_only():
    method = RieszForward(functional={"name": "riesz_mmd", "r": 0.5})
    assert "minus infinity" in method.objections(Diracs(), RieszProfile())[0]
    assert method.objections(RieszProfile(), RieszProfile()) == []


def test_a_functional_that_needs_a_density_is_refused_when_the_config_is_read(small, capsys):
    @FUNCTIONALS.register("entropy_for_a_test")
    class Entropy(Functional):
        needs_density = True

        def value(self, x):
            raise NotImplementedError

    try:
        for name in ("riesz_backward", "riesz_forward"):
            with pytest.raises(ValueError, match="needs a density"):
                METHODS.get(name)(functional={"name": "entropy_for_a_test"})
        path = small("run", method={"name": "riesz_backward", "functional": {"name": "entropy_for_a_test"}})
        assert main(["train", str(path)]) == 2
        assert "needs a density" in capsys.readouterr().err
    finally:
        del FUNCTIONALS._classes["entropy_for_a_test"]


def test_the_backward_scheme_descends_other_functionals_of_samples():
    method = RieszBackward(functional={"name": "sinkhorn_divergence", "epsilon": 0.5}, tau=0.2, flow_steps=1, pool=64)
    _, stages = stages_of(method)
    loss, _ = loss_at(next(stages))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("method", "settings", "says"),
    [
        (RieszBackward, {"functional": {"name": "riesz_mmd", "r": 2.5}}, "r: Input should be less than 2"),
        (RieszBackward, {"functional": {"name": "riesz_mdm"}}, "Did you mean 'riesz_mmd'"),
        (RieszForward, {"functional": {"name": "sinkhorn_divergence"}}, "one-sided derivative"),
        (RieszForward, {"functional": {"name": "riesz_mmd", "weight": 2.0}}, "alone, with weight 1"),
        (RieszBackward, {"functional": {"name": "sinkhorn_divergence"}, "towards": "nothing"}, "without a target"),
    ],
)
def test_settings_that_make_no_sense_are_refused(method, settings, says):
    with pytest.raises(ValueError, match=says):
        method(**settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"network": {"name": "mlp"}}, "take one of: plan"),
        ({"evaluate": {"nfe": [5]}}, "give evaluate.nfe=[12]"),
        ({"data": {"name": "diracs", "points": [[1.0, 1.0]]}}, "all points are identical"),
        ({"source": {"name": "diracs", "points": [[0.0, 0.0, 0.0]]}}, "give 2 coordinates"),
        ({"method": {"name": "riesz_forward", "functional": {"name": "riesz_mmd", "r": 0.5}}}, "minus infinity"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_it_starts(changes, says, small, tmp_path, capsys):
    network = {"name": "plan", "width": 16}
    asked = {"source": DIRAC, "data": PROFILE, "method": {"name": "riesz_backward"}, "evaluate": {"nfe": [12]}}
    asked = {**asked, "network": network, **changes}
    assert main(["train", str(small("run", **asked))]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "flow.json").exists()
