"""What holds for every method, over the registry; and what each one says it does."""

import pytest
import torch

import gengrad
from gengrad.cli import main
from gengrad.data.draws import generator_for
from gengrad.flows import Flow
from gengrad.methods import NSGF, FlowMatching, Part, Problem
from gengrad.methods.regression import stratified
from gengrad.networks import ICNN, MLP, Plan, SetOperator
from gengrad.registry import DATASETS, METHODS

# what makes a method's trial short; another runs with its defaults
SMALLER = {
    "nsgf": {"ot_batch": 64, "target_batch": 64, "flow_steps": 2},
    "flow_matching": {},
    "riesz_backward": {"flow_steps": 2, "pool": 64},
    "riesz_forward": {"flow_steps": 2, "pool": 64},
    "particles": {"flow_steps": 2, "particles": 64},
}
SMALLER["nsgf_pp"] = SMALLER["nsgf"]
SMALLER["jko_icnn"] = {"jko_steps": 2, "cloud": 128}
SMALLER["jko_operator"] = {"jko_steps": 2, "particles": 32, "anchors": 64, "buffer": 16}
# the network that a method asks for
NETWORK = {"velocity": ("mlp", MLP), "plan": ("plan", Plan), "nothing": ("mlp", MLP), "potential": ("icnn", ICNN)}
NETWORK["operator"] = ("set_operator", SetOperator)
OF_THE_PLANE = [name for name in METHODS if name != "jko_filter"]  # that one is of the line
LEARNED = [name for name in OF_THE_PLANE if METHODS.get(name).learns != "nothing"]


def problem(target="8gaussians", **changes) -> Problem:
    data = DATASETS.build({"name": target})
    source = DATASETS.build({"name": "normal"}, event_shape=data.event_shape)
    network = changes.pop("network", MLP)
    settings = {"seed": 0, "steps": 10, "batch_size": 32, "device": torch.device("cpu"), **changes}
    return Problem(source, data, lambda: network(event_shape=data.event_shape, width=16, depth=2), **settings)


def stage_of(method, **changes):
    asked = problem(network=NETWORK[method.learns][1], **changes)
    return next(iter(method.stages(asked, Flow(asked.source))))


def loss_at(stage, step=0, rank=0, world=1, size=32):
    part = Part(step, size, rank, world)
    return stage.objective(stage.networks, part, generator_for(0, "test", step))[0]


@pytest.mark.parametrize("name", OF_THE_PLANE)
def test_a_method_trains_two_steps_saves_loads_and_samples(name, small, tmp_path):
    network = {"name": NETWORK[METHODS.get(name).learns][0], "width": 16, "depth": 2}
    path = small("run", method={"name": name, **SMALLER.get(name, {})}, network=network, train__steps=2)
    assert main(["train", str(path)]) == 0
    flow = gengrad.load(tmp_path / "run")
    x = flow.sample(6, nfe=4, seed=1)
    assert x.shape == (6, 2) and x.isfinite().all()
    assert torch.equal(flow.trajectory(6, nfe=4, seed=1)[-1], x)


@pytest.mark.parametrize("name", LEARNED)
def test_the_objective_is_a_function_of_seed_and_step_alone(name):
    torch.manual_seed(0)
    one = stage_of(METHODS.get(name)(**SMALLER.get(name, {})))
    two = stage_of(METHODS.get(name)(**SMALLER.get(name, {})))
    for key, network in two.networks.items():
        network.load_state_dict(one.networks[key].state_dict())
    for step in range(6):
        first = loss_at(one, step)
    torch.manual_seed(99)
    assert torch.equal(loss_at(two, 5), first)  # without having seen the steps before


@pytest.mark.parametrize("method", [NSGF(ot_batch=64, target_batch=64, flow_steps=2), FlowMatching()])
def test_the_mean_over_processes_is_the_loss_of_one(method):
    stage = stage_of(method)
    parts = [loss_at(stage, 3, rank, 2) for rank in range(2)]
    assert torch.allclose(torch.stack(parts).mean(), loss_at(stage, 3), rtol=1e-5)


@pytest.mark.parametrize("scope", ["rows", "local"])
def test_processes_with_problems_of_their_own_train_on_their_own_points(scope):
    method = NSGF(ot_batch=64, target_batch=64, flow_steps=2, ot_scope=scope)
    stages = [stage_of(method), stage_of(method)]
    for rank, stage in enumerate(stages):
        loss_at(stage, 0, rank, 2)
    paths = [stage._pool._paths[0] for stage in stages]
    assert all(p.shape[1] == 32 for p in paths)
    together = stage_of(NSGF(ot_batch=64, target_batch=64, flow_steps=2))
    loss_at(together)
    # the source points of one process follow on those of the other
    assert torch.equal(torch.cat([p[0] for p in paths]), together._pool._paths[0][0])


def test_the_euler_pool_follows_the_particle_flow_of_the_sinkhorn_divergence():
    from gengrad.flows.particles import geodesic_taus, geodesic_times, particle_flow
    from gengrad.functionals import SinkhornDivergence

    stage = stage_of(NSGF(ot_batch=64, target_batch=96, flow_steps=3, target="mean", pool="euler", epsilon_rel=0.05))
    loss_at(stage)
    x, y = stage.source.take(0, 64), stage.target.take(0, 96)
    truth = particle_flow(SinkhornDivergence(y, epsilon_rel=0.05), x, geodesic_taus(geodesic_times(3)))
    # the same solver to a velocity error of 1e-2 a step
    assert torch.allclose(stage._pool._paths[0], truth.states, atol=3e-2 * truth.velocities.abs().max())


@pytest.mark.parametrize("pool", ["euler", "geodesic"])
@pytest.mark.parametrize("target", ["mean", "sample", "match"])
def test_images_are_moved_as_images(pool, target):
    stage = stage_of(NSGF(ot_batch=32, pool=pool, target=target, flow_steps=2), target="digits", batch_size=16)
    assert loss_at(stage, size=16).isfinite()
    assert stage._pool._paths[0].shape[1:] == (32, 1, 8, 8)


def test_the_geodesic_pool_solves_once_and_goes_straight():
    stage = stage_of(NSGF(ot_batch=64, target_batch=64, pool="geodesic", flow_steps=5))
    loss_at(stage)
    assert stage._pool._paths[0].shape[0] == 2


def test_drawn_targets_are_target_points_and_average_to_the_barycentric_map():
    method = {"ot_batch": 64, "target_batch": 32, "pool": "geodesic", "epsilon_rel": 0.2}
    drawn = stage_of(NSGF(**method, target="sample"))
    x, y = drawn.source.take(0, 64), drawn.target.take(0, 32)
    generator = torch.Generator().manual_seed(0)
    ends = torch.stack([drawn._flow(x, y, generator)[0][-1] for _ in range(400)])
    nearest = torch.cdist(ends[0], y, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
    assert (nearest.values < 1e-5).all()
    solved = gengrad.sinkhorn(x, y, epsilon_rel=0.2)
    # 400 draws of points spread over about 5: a standard error of 0.25, five of them for the worst of 128 numbers
    assert (ends.mean(0) - solved.target).abs().max() < 1.25


def test_matched_targets_are_the_best_permutation():
    stage = stage_of(NSGF(ot_batch=64, pool="geodesic", target="match", tol=0.3))
    x, y = stage.source.take(0, 64), stage.target.take(0, 64)
    ends = stage._flow(x, y, torch.Generator())[0][-1]
    assert torch.allclose(ends, y[gengrad.ot.exact_assignment(x, y)], atol=1e-5)  # x + (y - x) in fp32


def test_matching_needs_as_many_targets_as_particles():
    for wrong in ({"target_batch": 32}, {"ot_scope": "rows"}):
        with pytest.raises(ValueError, match="one to one"):
            NSGF(ot_batch=64, target="match", **wrong)


def test_each_particle_of_the_pool_is_trained_on_as_often_as_uses_says():
    stage = stage_of(NSGF(ot_batch=64, target_batch=64, flow_steps=1, uses=3), batch_size=32)
    rows = []
    for step in range(stage.period):
        part = Part(step, 32)
        stage._filled(part)
        rows.append(stage._rows(part))
    assert torch.equal(torch.bincount(torch.cat(rows), minlength=64), torch.full((64,), 3))


def test_minibatch_ot_pairs_cost_less_than_independent_ones():
    costs = {}
    for coupling in ("independent", "minibatch_ot"):
        stage = stage_of(FlowMatching(coupling=coupling))
        with torch.no_grad():
            for parameter in stage.networks["velocity"].parameters():
                parameter.zero_()
        costs[coupling] = float(loss_at(stage))  # of a zero network: the mean square of x_1 - x_0
    assert costs["minibatch_ot"] < 0.8 * costs["independent"]


def test_stratified_times_hold_one_in_each_stratum():
    t = stratified(64, torch.Generator().manual_seed(0))
    assert torch.equal((t * 64).long().sort().values, torch.arange(64))
