"""The learned JKO operator: its loss against closed forms, its training, its resume bit for bit, its flow."""

import math
import signal

import pytest
import torch
import yaml

import gengrad
from gengrad.cli import main
from gengrad.config import read_config
from gengrad.data import Gaussian
from gengrad.data.draws import generator_for
from gengrad.evaluation.operators import judge_rollout
from gengrad.evaluation.references import reference_of
from gengrad.flows.density_cloud import matched
from gengrad.flows.operator_transport import push
from gengrad.functionals import Entropy, InteractionEnergy, PotentialEnergy, PowerEntropy
from gengrad.methods import JKOOperator, Part, Problem
from gengrad.methods.jko_affine import JKOProblem
from gengrad.methods.operator_loss import evened, loss_by_log_det, loss_by_score, scored_push, step_loss, taken
from gengrad.methods.operator_stage import OperatorStage
from gengrad.networks import SetOperator
from gengrad.registry import DATASETS

SMALL = {
    "source": {"name": "gaussian", "mean": [0.3], "covariance": [[0.5]]},
    "data": {"name": "space", "dimension": 1},
    "network": {"name": "set_operator", "width": 8, "tokens": 2, "heads": 2, "blocks": 1},
    "method": {"name": "jko_operator", "functional": "entropy", "jko_steps": 3, "particles": 16, "anchors": 32,
               "buffer": 8},
    "train": {"steps": 40, "batch_size": 4, "checkpoint_every": 10, "log_every": 5, "lr": 3e-3},
    "evaluate": {"nfe": [3]},
}  # fmt: skip


def config(out, **changes):
    raw = {key: dict(value) for key, value in SMALL.items()} | {"out": str(out), "device": "cpu"}
    for key, value in changes.items():
        raw[key] = {**raw.get(key, {}), **value}
    return raw


def written(tmp_path, raw):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def stage(d=1, functional="entropy", steps=100, size=8, log_density=False, **method):
    data = DATASETS.build({"name": "space", "dimension": d})
    source = Gaussian(mean=[0.0] * d)
    method = JKOOperator(functional=functional, particles=32, buffer=16, **method)
    torch.manual_seed(0)
    settings = {"width": 8, "tokens": 2, "heads": 2, "blocks": 1, "log_density": log_density}
    network = lambda: SetOperator(event_shape=(d,), **settings)  # noqa: E731
    problem = Problem(source, data, network, seed=0, steps=steps, batch_size=size, device=torch.device("cpu"))
    return OperatorStage(problem, method.config)


# ---------------------------------------------------------------- the loss


def gaussian_clouds(variances, n=4096):
    x = matched(torch.randn(n, 1, dtype=torch.float64, generator=generator_for(0, "test")), _unit())
    scales = torch.tensor(variances, dtype=torch.float64).sqrt().view(-1, 1, 1)
    return scales * x, -x.square()[..., 0] / 2 - (scales[..., 0].square() * 2 * math.pi).log() / 2


def _unit():
    return torch.zeros(1, dtype=torch.float64), torch.eye(1, dtype=torch.float64)


def test_the_loss_of_dilations_of_gaussians_is_its_closed_form():
    """E|Kx - x|^2 / (2 tau) + E log rho - log K, E log rho = -(1 + log 2 pi S) / 2 for a cloud with moments 0 and S."""
    tau, k, variances = 0.1, 1.2, [0.5, 2.0]
    x, log_rho = gaussian_clouds(variances)
    loss = step_loss(JKOProblem(Entropy(), tau), x, k * x, log_rho, torch.full(x.shape[:2], math.log(k), dtype=x.dtype))
    closed = [(k - 1) ** 2 * s / (2 * tau) - (1 + math.log(2 * math.pi * s)) / 2 - math.log(k) for s in variances]
    assert float(loss) == pytest.approx(sum(closed) / 2, abs=1e-10)


def test_the_loss_is_least_at_the_exact_step():
    """K^2 - K = tau / S for the heat equation; there the slope in K vanishes."""
    tau, s = 0.1, 0.7
    x, log_rho = gaussian_clouds([s])
    k = torch.tensor((1 + math.sqrt(1 + 4 * tau / s)) / 2, dtype=torch.float64, requires_grad=True)
    loss = step_loss(JKOProblem(Entropy(), tau), x, k * x, log_rho, k.log().expand(1, x.shape[1]))
    assert abs(float(torch.autograd.grad(loss, k)[0])) < 1e-10


def test_functionals_of_pairs_are_taken_of_each_measure_by_itself():
    """Two measures far apart: pairs across would attract each other."""
    x = torch.randn(2, 40, 2, dtype=torch.float64) + torch.tensor([0.0, 50.0]).view(2, 1, 1)
    jko = JKOProblem(InteractionEnergy(), 0.5)
    alone = [jko.functional(1.1 * one) + (0.1 * one).square().sum(1).mean() / 1.0 for one in x]
    assert float(step_loss(jko, x, 1.1 * x)) == pytest.approx(float(sum(alone)) / 2, rel=1e-12)


def bent_operator(d):
    torch.manual_seed(3)
    network = SetOperator(event_shape=(d,), width=8, tokens=2, heads=2, blocks=1).double()
    torch.nn.init.normal_(network.head[-1].weight, std=0.5)
    torch.nn.init.normal_(network.affine.weight, std=0.5)
    torch.nn.init.normal_(network.affine.weight[d * (d + 1) :], std=0.05)  # the kernels' slopes, which soon fold a map
    return network


@pytest.mark.parametrize("d", [1, 2, 3])
def test_the_pushed_score_is_the_gradient_of_the_scored_push(d):
    """grad_y log rho'(y) = DT^{-T} grad_x [log rho(x) - log det DT(x)]; for a Gaussian, by autograd of the whole."""
    network, x = bent_operator(d), torch.randn(1, 6, d, dtype=torch.float64)
    context = network.context(x, 0.3)
    moved, det, after = scored_push(network, x, context, -x)
    for k in range(6):
        point = x[0, k]
        jacobian = torch.autograd.functional.jacobian(lambda z: network(z[None], _single(context))[0], point)
        log_rho = lambda z: -z.square().sum() / 2 - _log_det(network, _single(context), z)  # noqa: E731
        slope = torch.autograd.functional.jacobian(log_rho, point)
        assert torch.allclose(after[0, k], torch.linalg.solve(jacobian.T, slope), atol=1e-8)
        assert float(det[0, k]) == pytest.approx(float(torch.linalg.det(jacobian)))
    assert torch.allclose(moved, network(x, x, 0.3), atol=1e-12)


def _single(context):
    """The context of the first of many clouds."""
    parts = {name: value[0] if isinstance(value, torch.Tensor) else value for name, value in vars(context).items()}
    return type(context)(**parts)


def _log_det(network, context, z):
    return torch.linalg.det(network(z[None], context, jacobian=True)[1][0]).log()


@pytest.mark.parametrize("wide", [False, True])
def test_the_gradient_by_scores_is_that_through_log_det_on_average(wide):
    """With particles of a Gaussian half as wide again, weighed by the ratio of the densities, too."""
    functional = PotentialEnergy(potential={"name": "double_well"}) + 0.5 * Entropy() + PowerEntropy(m=2.0)
    network, jko = bent_operator(1), JKOProblem(functional, 0.1)
    # quantiles of a standard normal: means over them are integrals up to 1e-4
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    x = (2**0.5 * torch.erfinv(2 * u - 1)).view(1, -1, 1)
    log_rho, seen, weight = -x[..., 0].square() / 2 - math.log(2 * math.pi) / 2, x[:, ::40], torch.ones(1, 20_000)
    through = loss_by_log_det(jko, network, x, seen, log_rho)
    if wide:
        x, weight = 1.5 * x, 1.5 * (-(1.5**2 - 1) / 2 * x[..., 0].square()).exp()
        log_rho = -x[..., 0].square() / 2 - math.log(2 * math.pi) / 2
    pushed = scored_push(network, x, network.context(seen, 0.1), -x)
    losses = (through, loss_by_score(jko, network, x, seen, log_rho, *pushed, weight))
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-3 if wide else 1e-10)
    one, two = (
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(network.parameters()))]) for loss in losses
    )
    assert (one - two).norm() < 5e-3 * one.norm()


def test_at_the_exact_step_the_gradient_by_scores_vanishes_particle_by_particle():
    """Few and uneven particles: the gradient through log det is noise there, this one is zero."""
    tau, s = 0.1, 0.7
    k = (1 + math.sqrt(1 + 4 * tau / s)) / 2
    x = torch.randn(1, 5, 1, dtype=torch.float64)
    network = bent_operator(1)
    exact = (k * x, torch.full((1, 5), k, dtype=torch.float64), -x / (k * s))
    weight = torch.rand(1, 5)
    loss = loss_by_score(JKOProblem(Entropy(), tau), network, x, x, -x[..., 0].square() / (2 * s), *exact, weight)
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    assert max(float(g.abs().max()) for g in gradients) < 1e-12


def test_particles_that_weigh_the_same_stand_for_weighed_ones():
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0], [2.0, 0.1, 1.9, 0.0]])
    assert evened(weight).tolist() == [[0, 1, 2, 3], [0, 0, 2, 2]]
    x = torch.arange(8.0).view(2, 4, 1)
    assert taken(x, evened(weight))[..., 0].tolist() == [[0, 1, 2, 3], [4, 4, 6, 6]]


# ---------------------------------------------------------------- the stage


def test_particles_reach_into_the_tails_where_a_density_is_needed_and_means_are_over_single_particles():
    interaction = {"name": "interaction", "attraction": 2.0, "repulsion": None}
    cases = (("entropy", {}, True), ("entropy", {"tails": 1.0}, False), (interaction, {}, False))
    for functional, settings, weighed in cases:
        states = stage(functional=functional, initial="gaussians", seen=64, **settings).states
        assert bool((states.weight[:, 64:].std() > 0.1).all() if weighed else (states.weight == 1).all())
        assert (states.weight[:, :64] == 1).all()  # of the context


def test_a_quarter_of_every_batch_is_fresh_and_the_horizon_grows():
    training = stage(steps=100, jko_steps=5, curriculum=0.5)
    training.states.age[:] = 7  # so that what comes from the buffer can be told
    for step in range(1, 6):
        ages = training._batch(Part(step, 8), generator_for(0, "test", step))[-1]
        assert (ages == 0).sum() == 2 and (ages == 7).sum() == 6
    assert [training._horizon(step) for step in (0, 12, 13, 25, 49, 50, 99)] == [1, 1, 2, 3, 4, 5, 5]


def test_fresh_measures_come_in_as_many_batches_as_is_asked_for():
    """Three on average, from blocks that stay for nine steps; a batch has none of them twice."""
    training, seen = stage(reuse=3, rollout=False), []
    for step in range(60):
        x, *_, found, ages = training._batch(Part(step, 4), generator_for(0, "test", step))
        assert found.shape == (4, 0) and ages.tolist() == [0] * 4
        seen.append([float(cloud.sum()) for cloud in x])
        assert len(set(seen[-1])) == 4
    times = [sum(one in batch for batch in seen) for one in {one for batch in seen for one in batch}]
    assert len(times) < 0.45 * 60 * 4 and max(times) > 3
    first = {one: step for step, batch in reversed(list(enumerate(seen))) for one in batch}
    assert max(step - first[one] for step, batch in enumerate(seen) for one in batch) < 9


def test_what_a_network_looks_up_is_that_of_its_clouds():
    """Marks that were kept are those that the network would find itself, for fresh and for older measures."""
    training = stage(log_density=True, reuse=2, curriculum=0.0, d=2)
    for step in (0, 8):
        training.objective(training.networks, Part(step, 8), generator_for(0, "test", step))
        x, log_rho, *_, found, _ = training._batch(Part(step + 1, 8), generator_for(0, "test", step + 1))
        anew = training.networks["operator"].marks(x[:, : training.seen], 0.1, log_rho[:, : training.seen])
        assert torch.equal(found, anew.columns) and found.abs().sum() > 0


def test_initial_measures_alone_where_there_is_no_rollout():
    training = stage(rollout=False)
    for step in range(20):
        assert training._batch(Part(step, 8), generator_for(0, "test", step))[-1].tolist() == [0] * 8
        training.objective(training.networks, Part(step, 8), generator_for(0, "test", step))
    assert training.states.advanced == 0


def test_states_are_moved_by_the_averaged_network_unless_the_current_one_is_asked_for():
    for average in (True, False):
        training = stage(average=average, jko_steps=5, curriculum=0.0)
        training.states.share.fill_(1.0)
        moving = SetOperator(event_shape=(1,), width=8, tokens=2, heads=2, blocks=1)
        with torch.no_grad():
            moving.affine.bias[1] = 3.0  # a translation by 3 tau: no change of the entropy
        training.averages = {"operator": moving}
        before = training.states.x.clone()
        training.objective(training.networks, Part(8, 8), generator_for(0, "test"))
        shift = training.states.x[:4] - before[:4]
        assert torch.allclose(shift, torch.full_like(shift, 0.3 if average else 0.0), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"log_density": True, "untold": 0.5, "independent": 0.5}])
def test_the_objective_of_the_share_of_two_processes_is_that_of_one(settings):
    training = stage(**settings)
    parts = [training.objective(training.networks, Part(3, 8, rank, 2), generator_for(0, "t", 3))[0] for rank in (0, 1)]
    whole = training.objective(training.networks, Part(3, 8), generator_for(0, "t", 3))[0]
    assert float(sum(parts).detach()) / 2 == pytest.approx(float(whole.detach()), rel=1e-5)


def test_a_share_of_the_measures_is_told_to_a_network_that_takes_log_densities():
    training, asked = stage(log_density=True, untold=0.25), []
    network = training.networks["operator"]

    def heard(module, given, named):
        if "log_density" in named:
            asked.append((len(given[0]), named["log_density"] is not None))

    network.register_forward_pre_hook(heard, with_kwargs=True)
    for step in range(40):
        training.objective(training.networks, Part(step, 8), generator_for(0, "test", step))
    assert sum(count for count, _ in asked) == 40 * 8
    assert 0.65 < sum(count for count, told in asked if told) / (40 * 8) < 0.85
    training = stage()  # others are told nothing
    assert not training._told(8, generator_for(0, "test")).any()


def test_every_parameter_has_a_gradient_whoever_is_told():
    """Several processes wait for all of them, also where a batch has no measure for one half of the network."""
    for untold in (0.01, 0.99):
        training = stage(log_density=True, untold=untold)
        training._told = lambda count, _, told=untold < 0.5: torch.full((count,), told)
        network = training.networks["operator"]
        training.objective(training.networks, Part(0, 8), generator_for(0, "test"))[0].backward()
        assert all(p.grad is not None for p in network.parameters())
        told = [
            bool(p.grad.any()) for name, p in network.named_parameters() if "head.4" in name and "blind" not in name
        ]
        assert all(told) == (untold < 0.5) and any(told) == (untold < 0.5)


def test_the_context_of_a_network_that_takes_log_densities_carries_its_own():
    """What the buffer makes of a state is what the network makes of its cloud, when told the log densities of that."""
    training = stage(log_density=True, jko_steps=5, curriculum=0.0)
    training._told = lambda count, _: torch.ones(count, dtype=torch.bool)
    training.states.share.fill_(1.0)
    network = training.networks["operator"]
    with torch.no_grad():
        network.affine.weight.normal_(0, 0.1), network.head[-1].weight.normal_(0, 0.1)
    x, log_rho = training.states.x[:4].clone(), training.states.log_rho[:4].clone()
    advance, flat = training.states.advance, lambda x, *_: torch.zeros(len(x)).double()  # no state is dropped
    training.states.advance = lambda move, count, horizon, _: advance(move, count, horizon, flat)
    training.objective(training.networks, Part(8, 8), generator_for(0, "test"))
    moved, after = push(network, x, 0.1, log_rho, x[:, :32], known=log_rho[:, :32])
    after[:, :32] = push(network, x[:, :32], 0.1, log_rho[:, :32])[1]  # of the context's own particles
    assert torch.allclose(training.states.x[:4], moved, atol=1e-5)
    assert torch.allclose(training.states.log_rho[:4], after, atol=1e-4)
    assert (push(network, x, 0.1, particles=x[:, :32])[0] - moved).abs().max() > 1e-3


class Wrapped(torch.nn.Module):
    """As what several processes make of a network: nothing but forward and the parameters passes."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *given, **named):
        return self.inside(*given, **named)


@pytest.mark.parametrize("log_density", [False, True])
def test_the_objective_goes_through_what_wraps_the_network(log_density):
    training = stage(log_density=log_density)
    wrapped = {"operator": Wrapped(training.networks["operator"])}
    values = [float(training.objective(given, Part(3, 8), generator_for(0, "t", 3))[0].detach())
              for given in (wrapped, training.networks)]  # fmt: skip
    assert values[0] == values[1]


def test_training_comes_near_the_exact_steps_of_heat(tmp_path):
    """200 steps of a network of 16 channels: far nearer than the identity, which is 100 % off."""
    raw = config(tmp_path / "run", train={"steps": 200, "lr": 1e-2, "batch_size": 8, "checkpoint_every": 200},
                 method={"initial": {"name": "gaussians"}, "particles": 32}, network={"width": 16})  # fmt: skip
    gengrad.train(read_config(raw), quiet=True)
    flow = gengrad.load(tmp_path / "run")
    x = matched(flow.source.sample(2048, generator_for(0, "test")).double(), flow.source.moments())
    log_rho = flow.source.log_density(x)
    transport = flow.transports[0].double()
    rows = judge_rollout(transport, x, log_rho, 3, reference_of(transport, flow.source, x, log_rho))
    assert not any(row["rose"] for row in rows)
    assert max(row["share"] for row in rows) < 0.25 and max(abs(row["gap"]) for row in rows) < 0.25


# ---------------------------------------------------------------- a family of energies

SEVERAL = {"method.weights": {"entropy": [0.5, 2.0]}, "network.on_weights": 1}


def test_one_operator_serves_the_weights_that_it_was_trained_for(tmp_path):
    """w |x|^2 / 2 alone: the exact step is x / (1 + tau w); an operator for one w is wrong at both ends."""
    ends, tau, errors = (0.5, 4.0), 0.5, {}
    for name, changes in (("one", {}), ("several", {"weights": {"potential": list(ends)}})):
        raw = config(
            tmp_path / name, data={"dimension": 1}, network={"on_weights": len(changes), "kernels": 0},
            method={"functional": {"name": "potential", "potential": "quadratic", "weight": 1.4}, "tau": tau,
                    "jko_steps": 2, **changes}, train={"steps": 600, "lr": 1e-2, "optimizer": "soap"},
        )  # fmt: skip
        assert main(["train", str(written(tmp_path, raw))]) == 0
        flow = gengrad.load(tmp_path / name)
        x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(1))
        for weight in ends:
            moved = flow.step(x, weights={"potential": weight} if changes else None)
            truth = x / (1 + tau * weight)
            errors[name, weight] = float((moved - truth).norm() / (x - truth).norm())
    assert max(errors["several", w] for w in ends) < 0.1 and min(errors["one", w] for w in ends) > 0.3, errors


def test_the_order_of_the_weights_is_that_of_the_terms(tmp_path):
    """The network is told them by place, and a run goes on whatever the order in its file."""
    terms, ranges = ["potential", "entropy"], {"entropy": [0.5, 2.0], "potential": [0.2, 3.0]}
    functional = [{"name": "potential", "potential": "quadratic"}, "entropy"]
    for order in (terms, terms[::-1]):
        weights = {name: ranges[name] for name in order}
        raw = config(tmp_path, method={"functional": functional, "weights": weights}, network={"on_weights": 2})
        assert list(read_config(raw).method["weights"]) == terms


WRONG = {
    "no such term": ({"weights": {"potential": [0.5, 2.0]}}, {"on_weights": 1}, "the functional has 0 terms"),
    "not around its own": ({"weights": {"entropy": [2.0, 4.0]}}, {"on_weights": 1}, "around its own, 1; got"),
    "not told": ({"weights": {"entropy": [0.5, 2.0]}}, {}, "on_weights=1"),
    "nothing to tell": ({}, {"on_weights": 1}, "on_weights=0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_cannot_be_are_refused(name, tmp_path, capsys):
    method, network, says = WRONG[name]
    path = written(tmp_path, config(tmp_path / "run", method=method, network=network))
    assert main(["train", str(path)]) == 2
    assert says in capsys.readouterr().err


# ---------------------------------------------------------------- resume


TOLD = {"network.log_density": True, "method.independent": 0.3}
REUSED = {"network.log_density": True, "method.reuse": 4}  # stopped in the middle of a block's life


@pytest.mark.parametrize(
    "changes",
    [{}, {"train.optimizer": "soap"}, SEVERAL, TOLD, REUSED],
    ids=["adamw", "soap", "weights", "densities", "reuse"],
)
def test_a_run_that_is_stopped_goes_on_bit_for_bit_with_its_buffer(changes, tmp_path, monkeypatch):
    whole = trained(tmp_path, monkeypatch, "whole", **changes)
    cut = trained(tmp_path, monkeypatch, "cut", stop=21, **changes)
    assert whole["filled"] > 2 and whole["advanced"] > 0  # lives have ended, or nothing is shown
    for key, value in whole.items():
        assert torch.equal(value, cut[key]) if isinstance(value, torch.Tensor) else value == cut[key]
    assert flow_of(tmp_path / "whole") == flow_of(tmp_path / "cut")


def test_without_the_buffer_a_run_goes_on_otherwise(tmp_path, monkeypatch):
    trained(tmp_path, monkeypatch, "whole")
    monkeypatch.setattr(OperatorStage, "load_state", lambda self, state: None)
    trained(tmp_path, monkeypatch, "cut", stop=21)
    assert flow_of(tmp_path / "whole") != flow_of(tmp_path / "cut")


def trained(tmp_path, monkeypatch, name, stop=None, **changes) -> dict:
    """The state of the buffer at the end of a run, which Ctrl-C cuts at step ``stop`` and the same command resumes."""
    from gengrad.training import loop

    raw = config(tmp_path / name, method={"jko_steps": 2, "curriculum": 0.2})
    for key, value in changes.items():
        section, _, setting = key.partition(".")
        raw[section][setting] = value
    path = written(tmp_path, raw)
    step, done, ends = loop.Fitter.step, [], []

    def counted(self, progress):
        done.append(1)
        if len(done) == stop:
            signal.raise_signal(signal.SIGINT)
        return step(self, progress)

    def summary(self):
        ends.append(self.states.state())
        return {}

    with monkeypatch.context() as patch:
        patch.setattr(OperatorStage, "summary", summary)
        patch.setattr(loop.Fitter, "step", counted)
        if stop:
            assert main(["train", str(path)]) == 130
        assert main(["train", str(path)]) == 0
    return ends[-1]


def flow_of(folder) -> bytes:
    return (folder / "flow.safetensors").read_bytes()
