"""NSGF++: what each stage is trained on, that the predictor tells the time, and that a kill repeats nothing."""

import pytest
import torch
from safetensors.torch import load_file

import gengrad
from gengrad.cli import main
from gengrad.data.draws import generator_for
from gengrad.flows import Flow
from gengrad.methods import NSGFPlusPlus, Part, Problem, nsgf
from gengrad.methods.flow_matching import StraightStage
from gengrad.networks import MLP, UNet
from gengrad.registry import DATASETS
from gengrad.training import loop
from gengrad.training.tracking import read_metrics

SMALL = {"ot_batch": 64, "flow_steps": 2}
METHOD = {"name": "nsgf_pp", **SMALL}


def problem(target="8gaussians", classes=None, **changes) -> Problem:
    data = DATASETS.build({"name": target})
    source = DATASETS.build({"name": "normal"}, event_shape=data.event_shape)

    def network():
        if len(data.event_shape) == 3:
            return UNet(event_shape=data.event_shape, channels=4, multipliers=[1], attention=False, classes=classes)
        return MLP(event_shape=data.event_shape, width=16, depth=2)

    settings = {"seed": 0, "steps": 100, "batch_size": 32, "device": torch.device("cpu"), **changes}
    return Problem(source, data, network, classes=classes, **settings)


def stages_of(asked: Problem, **settings) -> list:
    """The stages, each one's transport in the flow before the next is asked for."""
    flow, found = Flow(asked.source), []
    for stage in NSGFPlusPlus(**SMALL, **settings).stages(asked, flow):
        loop._attach(stage, flow, stage.networks)
        found.append(stage)
    return found


@pytest.mark.parametrize("shared", [False, True])
def test_the_stages_share_the_steps_and_leave_one_transport(shared):
    asked = problem()
    stages = stages_of(asked, shared_network=shared)
    names = ["shared_network", "time_predictor"] if shared else ["sinkhorn_phase", "time_predictor", "straight_phase"]
    assert [s.name for s in stages] == names and sum(s.steps for s in stages) == 100
    transport = stages[-1].transport(stages[-1].networks)
    assert transport.predictor is not None and transport.second is not None
    assert len(transport.velocity_networks()) == (1 if shared else 2)


@pytest.mark.parametrize("pool", ["euler", "geodesic"])
def test_the_phases_are_trained_on_their_own_parts_of_the_clock(pool):
    first, _, last = stages_of(problem(), until=0.4, margin=0.1, pool=pool)
    part, generator = Part(0, 32), generator_for(0, "test")
    before, after = first.examples(part, generator), last.lines.examples(part, generator)
    assert before.t.min() >= 0 and before.t.max() <= 0.4 and before.t.max() > 0.35
    assert after.t.min() >= 0.3 and after.t.min() < 0.4 and after.t.max() > 0.9


def test_a_shared_network_sees_sinkhorn_paths_before_the_switch_and_straight_lines_after_it():
    (stage, _) = stages_of(problem(), shared_network=True, until=0.25)
    seen = {}
    stage.networks["velocity"].register_forward_pre_hook(lambda module, inputs: seen.update(t=inputs[1]))
    stage.objective(stage.networks, Part(0, 32), generator_for(0, "test"))
    assert len(seen["t"]) == 32 and (seen["t"][:8] <= 0.25).all() and (seen["t"][8:] >= 0.25).all()


def test_the_predictor_learns_the_time():
    stage = stages_of(problem("digits", batch_size=64), predictor={"width": 16, "depth": 3})[1]
    optimizer = torch.optim.Adam(stage.networks["predictor"].parameters(), lr=5e-3)
    errors = []
    for step in range(60):
        loss, logs = stage.objective(stage.networks, Part(step, 64), generator_for(0, "test", step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(logs["time_error"])
    # telling 1/2 always is off by 1/4 on average
    assert errors[0] > 0.2 and sum(errors[-10:]) / 10 < 0.08


def test_a_shared_network_with_another_tau_is_refused():
    with pytest.raises(ValueError, match="leave out tau"):
        NSGFPlusPlus(shared_network=True, tau=0.7)


@pytest.mark.parametrize("pool", ["euler", "geodesic"])
def test_particles_are_coupled_within_their_class(pool):
    settings = {"pool": pool, "target": "sample", "label_dropout": 0.0}
    stage = stages_of(problem("digits", classes=10), **settings)[0]
    e = stage.examples(Part(0, 32), generator_for(0, "test"))
    states, labels = stage._paths(0, Part(0, 32))
    points, target_labels = stage.target.take(0, 64), stage.target.labels(0, 64)
    # w = y - x on the last segment, so the path's target is its state at t plus what is left of the clock
    ends = states[-2] + (states[-1] - states[-2]) * (1 - stage.times[-2]) / (stage.times[-1] - stage.times[-2])
    nearest = torch.cdist(ends.flatten(1), points.flatten(1)).argmin(1)
    assert torch.equal(target_labels[nearest], labels)
    assert e.y.shape == (32,) and set(e.y.tolist()) <= set(range(10))


def test_some_labels_are_forgotten_and_the_draw_does_not_depend_on_the_sharing_out():
    stage = stages_of(problem("digits", classes=10, batch_size=64), label_dropout=0.5)[2].lines
    whole = stage.examples(Part(0, 64), generator_for(0, "test"))
    halves = [stage.examples(Part(0, 64, rank, 2), generator_for(0, "test")) for rank in range(2)]
    pieces = [stage.examples(Part(0, 64, 0, 1, piece, 2), generator_for(0, "test")) for piece in range(2)]
    forgotten = float((whole.y == 10).float().mean())
    assert 0.25 < forgotten < 0.75  # 64 coins: four standard deviations around one half
    for cut in (halves, pieces):
        assert torch.equal(torch.cat([c.y for c in cut]), whole.y)
        assert torch.equal(torch.cat([c.x for c in cut]), whole.x)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("way", ["processes", "pieces"])
def test_the_mean_over_processes_or_pieces_is_the_loss_of_one(shared, way):
    for stage in stages_of(problem(), shared_network=shared):

        def loss(*place, stage=stage):
            return stage.objective(stage.networks, Part(3, 32, *place), generator_for(0, "test"))[0]

        cut = [loss(k, 2) if way == "processes" else loss(0, 1, k, 2) for k in range(2)]
        assert torch.allclose(torch.stack(cut).mean(), loss(), rtol=1e-5), stage.name


def test_the_straight_phase_goes_on_along_the_plan_where_asked():
    settings = {"pool": "geodesic", "target": "match", "straight_pairs": "plan", "ot_dims": 3}
    first, _, last = stages_of(problem("digits"), **settings)
    part = Part(0, 32)
    (paths, _), (lines, _) = first._paths(0, part), last.lines._paths(0, part)
    # the same noise and the same images, matched alike: the first phase's path is the beginning of the line
    assert torch.equal(paths[0], lines[0])
    assert torch.allclose((paths[-1] - paths[0]) / first.until, lines[-1] - lines[0], atol=1e-5)
    e = last.lines.examples(part, generator_for(0, "test"))
    assert e.t.min() >= first.until - 0.15 and e.t.max() > 0.95


def test_a_shared_network_with_the_plans_pairs_sees_whole_lines_in_every_batch():
    (stage, _) = stages_of(problem(), shared_network=True, straight_pairs="plan", target="match")
    seen = {}
    stage.networks["velocity"].register_forward_pre_hook(lambda module, inputs: seen.update(t=inputs[1]))
    stage.objective(stage.networks, Part(0, 32), generator_for(0, "test"))
    # one time in each of 32 strata of the whole clock
    assert sorted((32 * seen["t"]).int().tolist()) == list(range(32))


def test_the_straight_network_may_start_from_the_first_phase():
    for warm in (False, True):
        first, _, last = stages_of(problem(), warm_start=warm)
        same = [
            torch.equal(a, b)
            for a, b in zip(first.networks["velocity"].parameters(), last.networks["velocity"].parameters())
        ]
        assert all(same) == warm
        assert first.networks["velocity"] is not last.networks["velocity"]


def test_pairs_of_the_plan_need_the_geodesic_pool():
    with pytest.raises(ValueError, match="use pool=geodesic"):
        NSGFPlusPlus(straight_pairs="plan", pool="euler")


def test_the_logs_of_problems_within_classes_are_of_all_classes(monkeypatch):
    solved = iter(range(99))

    def log(result):
        k = float(next(solved))
        return {"epsilon": k, "marginal_error": k, "converged": float(k != 3)}

    monkeypatch.setattr(nsgf, "sinkhorn_log", log)
    stage = stages_of(problem("digits", classes=10), pool="geodesic", target="match")[0]
    _, logs = stage.objective(stage.networks, Part(0, 32), generator_for(0, "test"))
    found = next(solved)  # one solve a class, numbered from 0; ten classes in 64 digits
    assert found == 10 and logs["epsilon"] == 4.5 and logs["marginal_error"] == 9 and logs["converged"] == 0
    assert logs["ot_seconds"] > 0 and stage.logs()["ot_seconds"] == 0


@pytest.mark.parametrize("pieces", [1, 2])
def test_seconds_are_summed_over_the_steps_between_two_lines(small, tmp_path, monkeypatch, pieces):
    objective = StraightStage.objective
    monkeypatch.setattr(StraightStage, "objective", lambda *given: (objective(*given)[0], {"ot_seconds": 1.0}))
    assert main(["train", str(small("run", method={"name": "flow_matching"})), f"train.accumulate={pieces}"]) == 0
    rows = read_metrics(tmp_path / "run")  # 20 steps, a line every 5
    assert [row["ot_seconds"] for row in rows] == [5.0 * pieces] * 4
    assert all("ot_seconds" not in row for row in read_metrics(tmp_path / "run", seconds=False))


def test_targets_of_another_number_cannot_give_their_classes():
    assert "one to one" in NSGFPlusPlus(ot_batch=64, target_batch=32).refusals({"classes": 10})[0]
    assert NSGFPlusPlus(ot_batch=64, target_batch=32).refusals({}) == []


def test_a_kill_in_the_second_or_third_stage_repeats_nothing_of_those_before(small, tmp_path, monkeypatch):
    changes = {"method": METHOD, "train": {"steps": 40, "batch_size": 32, "checkpoint_every": 4, "log_every": 1}}
    whole, cut = small("whole", **changes), small("cut", **changes)
    assert main(["train", str(whole)]) == 0
    step, taken = loop.Fitter.step, []

    def dying(at):
        def counted(self, progress):
            if progress.total == at:
                raise KeyboardInterrupt
            taken.append((self.stage.name, progress.step))
            return step(self, progress)

        return counted

    for at in (20, 31, None):  # stages of 19, 2 and 19 steps: in the second, in the third, to the end
        with monkeypatch.context() as patch:
            patch.setattr(loop.Fitter, "step", dying(at))
            assert main(["train", str(cut)]) == (0 if at is None else 130)
    assert taken[:20] == [("sinkhorn_phase", k) for k in range(19)] + [("time_predictor", 0)]
    assert taken[20][0] == "time_predictor"  # after the first death: from the stage's end, not from before it
    assert all(name != "sinkhorn_phase" for name, _ in taken[20:])
    assert read_metrics(tmp_path / "whole", seconds=False) == read_metrics(tmp_path / "cut", seconds=False)
    a, b = (load_file(tmp_path / name / "flow.safetensors") for name in ("whole", "cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_accumulated_pieces_train_like_the_whole_batch(small, tmp_path):
    changes = {"method": METHOD, "train": {"steps": 20, "batch_size": 32, "log_every": 1}}
    assert main(["train", str(small("whole", **changes))]) == 0
    assert main(["train", str(small("pieces", **changes)), "train.accumulate=4"]) == 0
    a, b = (gengrad.load(tmp_path / name).state_dict() for name in ("whole", "pieces"))
    # sums in another order, twenty steps of Adam on weights of size 1 at a learning rate of 1e-3
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert any(not torch.equal(a[k], b[k]) for k in a)
