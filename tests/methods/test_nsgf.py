"""NSGF between two finite clouds: one plan of all points, and a flow that stops on the way."""

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

import gengrad
from gengrad.cli import main
from gengrad.data.draws import generator_for
from gengrad.flows import Flow
from gengrad.methods import NSGF, Part, Problem
from gengrad.networks import MLP
from gengrad.registry import DATASETS


@pytest.fixture
def clouds(tmp_path):
    """Files of 40 and 15 points of the plane."""
    draw = np.random.default_rng(0)
    np.save(tmp_path / "from.npy", draw.normal(size=(40, 2)).astype(np.float32))
    np.save(tmp_path / "to.npy", draw.normal(size=(15, 2)).astype(np.float32) + 6)
    return {name: {"name": "array", "path": str(tmp_path / f"{name}.npy"), "held_out": 0} for name in ("from", "to")}


def config(clouds, **changes) -> dict:
    return {
        "source": clouds["from"],
        "data": clouds["to"],
        "network": {"name": "mlp", "width": 16, "depth": 2},
        "method": {"name": "nsgf", "target": "match", "ot_batch": "all", "uses": 50, "stop": 0.5, **changes},
        "train": {"steps": 60, "batch_size": 10, "checkpoint_every": 60, "lr": 0.01},
        "evaluate": {"n": 15, "nfe": [5]},
    }


def test_all_points_make_one_problem_whose_matching_is_the_best(clouds):
    source, target = (DATASETS.build(clouds[name]) for name in ("from", "to"))
    asked = Problem(
        source,
        target,
        lambda: MLP(event_shape=(2,), width=8),
        seed=0,
        steps=10,
        batch_size=40,
        device=torch.device("cpu"),
    )
    stage = next(iter(NSGF(target="match", ot_batch="all", stop=0.5).stages(asked, Flow(source))))
    seen = stage.examples(Part(0, 40, 0, 1), generator_for(0, "test"))
    assert 0.45 < float(seen.t.max()) <= 0.5
    start = (seen.x - seen.t[:, None] * seen.v).double()
    end = start + seen.v
    assert torch.cdist(start, source.points.double()).min(0).values.max() < 1e-5  # every point of the source, once
    away = torch.cdist(end, target.points.double())
    assert away.min(1).values.max() < 1e-5
    assert set(torch.bincount(away.argmin(1), minlength=15).tolist()) == {2, 3}  # 40 = 2 * 15 + 10
    cost = torch.cdist(start, end).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    assert cost.diagonal().sum() <= cost[rows, columns].sum() * (1 + 1e-6)


def test_the_flow_stops_where_it_is_told(clouds, small, tmp_path):
    path = small("run", **config(clouds))
    assert main(["train", str(path)]) == 0
    flow = gengrad.load(tmp_path / "run")
    assert [t.t1 for t in flow.transports] == [0.5]
    moved = (flow.sample(40, nfe=5) - flow.trajectory(40, nfe=5)[0]).mean(0)
    assert torch.allclose(moved, torch.full((2,), 3.0), atol=0.7)  # half of the way between the clouds' middles


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"ot_scope": "local"}, "ot_batch=all is one problem of all points"),
        ({"name": "nsgf_pp"}, "method.stop"),
        ({"functional": "energy_distance"}, "takes no target, stop"),
        ({"momentum": 0.5}, "another functional"),
        ({"ot_batch": "some"}, "method.ot_batch"),
        ({"ot_batch": 1}, "method.ot_batch"),
        ({"source": {"name": "normal"}}, "needs a source of finitely many points, not 'normal'"),
    ],
)
def test_what_does_not_go_with_it_is_said(clouds, small, capsys, changes, told):
    raw = config(clouds, **{key: value for key, value in changes.items() if key != "source"})
    assert main(["train", str(small("run", **(raw | {k: v for k, v in changes.items() if k == "source"})))]) == 2
    assert told in capsys.readouterr().err


def test_steps_that_grow_beyond_reason_are_refused():
    with pytest.raises(ValueError, match="growth=10 takes tau beyond"):
        NSGF(functional="energy_distance", growth=10.0, flow_steps=20)
