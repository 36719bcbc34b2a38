"""The surrogate: what it learns, the potential against the objective's formula, what it refuses."""

import math

import pytest
import torch

from gengrad.functionals import PotentialEnergy
from gengrad.latent.potential import SurrogatePotential
from gengrad.latent.settings import SurrogateSettings
from gengrad.latent.surrogate import Ensemble, Scale, Surrogate, fit_surrogate, rank_correlation
from gengrad.molecules.objective import read_objective
from gengrad.registry import settings_of

WINDOW = {"name": "double_sigmoid", "low": 1.0, "high": 3.0}
OBJECTIVE = {"components": [{"scorer": "qed", "weight": 2.0}, {"scorer": "logp", "transform": WINDOW}]}


def untrained(objective, d=3, seed=0) -> Surrogate:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ensemble = Ensemble(4, d, 8, len(objective.scorers))
    properties = torch.rand(50, len(objective.scorers), generator=generator)
    unit = torch.tensor([scorer.unit_interval for scorer in objective.scorers])
    scorers = [settings_of(scorer) for scorer in objective.scorers]
    return Surrogate(ensemble.requires_grad_(False), Scale.of(properties, unit), scorers, {"objective": OBJECTIVE})


def test_the_potential_is_the_objectives_formula_of_what_each_member_predicts():
    """V = -sum_i w_i log s_i / sum_i w_i, mean over members, written out by hand."""
    objective = read_objective(OBJECTIVE)
    surrogate = untrained(objective)
    x = torch.randn(5, 3)
    by_hand = []
    for qed, logp in (p.T.double() for p in surrogate.predict(x)):
        rise, fall = (1 / (1 + 10 ** (-150 * (logp - edge) / 100)) for edge in (1.0, 3.0))
        by_hand.append(-(2 * qed.log() + (rise - fall).clamp_min(1e-8).log()) / 3)
    assert len(by_hand) == 3  # the fourth is the spare one
    assert torch.allclose(surrogate.potential(objective, x).double(), torch.stack(by_hand).mean(0), atol=1e-5)


def test_the_spare_network_has_no_part_in_the_potential():
    objective = read_objective(OBJECTIVE)
    surrogate, x = untrained(objective), torch.randn(4, 3)
    before, spare = surrogate.potential(objective, x), surrogate.scores(objective, x, spare=True)
    surrogate.ensemble.biases[-1][-1] += 1.0
    assert torch.equal(surrogate.potential(objective, x), before)
    assert not torch.allclose(surrogate.scores(objective, x, spare=True), spare)


def test_members_that_disagree_raise_the_potential():
    """-log is convex: the mean of V over members is at least V of their mean."""
    objective = read_objective({"components": ["qed"]})
    surrogate, x = untrained(objective), torch.randn(20, 3)
    mean = -surrogate.predict(x).mean(0)[:, 0].log()
    assert (surrogate.potential(objective, x) >= mean - 1e-6).all()


def test_the_gradient_of_the_potential_agrees_with_finite_differences():
    objective = read_objective(OBJECTIVE)
    surrogate = untrained(objective)
    x, v, h = torch.randn(6, 3), torch.randn(6, 3), 1e-2
    energy = PotentialEnergy(lambda y: surrogate.potential(objective, y))
    slope = -(energy.velocity(x) * v).sum() / len(x)
    assert abs((energy(x + h * v) - energy(x - h * v)) / (2 * h) - slope) < 2e-3  # float32 and h^2


def test_shares_are_predicted_within_0_and_1_wherever_the_codes_go():
    surrogate = untrained(read_objective({"components": ["qed"]}))
    p = surrogate.predict(torch.randn(100, 3) * 1e3)
    assert (p >= 0).all() and (p <= 1).all() and p.isfinite().all()


def test_the_scale_standardises_and_comes_back():
    p = torch.tensor([[0.2, 5.0], [0.5, math.nan], [0.9, 9.0]])
    scale = Scale.of(p, torch.tensor([True, False]))
    y = scale(p)
    assert torch.allclose(y[:, 0].mean(), torch.zeros(()), atol=1e-6) and y[1, 1].isnan()
    assert torch.allclose(y[[0, 2], 1], torch.tensor([-1.0, 1.0]))  # 5 and 9: mean 7, deviation 2
    assert torch.allclose(scale.undo(y)[:, 0], p[:, 0], atol=1e-5)


def test_a_smooth_property_is_learned_and_the_report_says_so():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 4, generator=generator)
    properties = torch.stack([torch.sigmoid(x[:, 0]), 2 * x[:, 1] + 3], dim=1).double()
    properties[::50, 1] = math.nan  # molecules without a value are left out, not learned as zeros
    objective = read_objective(OBJECTIVE)
    found = fit_surrogate(x, properties, objective, SurrogateSettings(steps=300, width=32, members=2))
    held = found.info["held_out"]
    assert held["qed"]["rank"] > 0.9 and held["logp"]["r2"] > 0.9
    assert found.info["warnings"] == []


def test_a_target_out_of_the_datas_reach_is_flagged():
    far = {"components": [{"scorer": "logp", "transform": {"name": "sigmoid", "low": 50, "high": 60}}]}
    x = torch.randn(60, 2)
    found = fit_surrogate(x, torch.rand(60, 1).double(), read_objective(far), SurrogateSettings(steps=2, width=4))
    assert len(found.info["warnings"]) == 1 and "out of the data's reach" in found.info["warnings"][0]


def test_a_property_that_was_not_learned_is_refused_with_its_name(tmp_path):
    surrogate = untrained(read_objective({"components": ["qed"]}))
    surrogate.save(tmp_path)
    potential = SurrogatePotential(folder=str(tmp_path), objective={"components": ["qed", "fsp3"]})
    with pytest.raises(ValueError, match="not learned fsp3"):
        potential(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="train-surrogate"):
        SurrogatePotential()(torch.zeros(2, 3))


def test_another_target_for_the_same_property_needs_no_new_fit(tmp_path):
    surrogate = untrained(read_objective(OBJECTIVE))
    surrogate.save(tmp_path)
    other = {"components": [{"scorer": "logp", "transform": {"name": "sigmoid", "low": 0, "high": 1}}]}
    x = torch.randn(3, 3)
    found = SurrogatePotential(folder=str(tmp_path), objective=other)(x)
    logp = surrogate.predict(x)[:, :, 1].double()
    assert torch.allclose(found.double(), torch.log1p(10 ** (-5 * (logp - 0.5))).mean(0), atol=1e-5)
    assert torch.equal(SurrogatePotential(folder=str(tmp_path))(x), surrogate.potential(read_objective(OBJECTIVE), x))


def test_filters_need_no_surrogate():
    objective = read_objective({"components": ["qed"], "filters": [{"scorer": "weight", "at_most": 500}]})
    surrogate = untrained(read_objective({"components": ["qed"]}))
    assert surrogate.potential(objective, torch.zeros(2, 3)).isfinite().all()


def test_a_stored_surrogate_predicts_the_same_and_a_damaged_one_is_refused(tmp_path):
    surrogate, x = untrained(read_objective(OBJECTIVE)), torch.randn(5, 3)
    surrogate.save(tmp_path)
    assert torch.equal(Surrogate.load(tmp_path).predict(x), surrogate.predict(x))
    (tmp_path / "surrogate.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="altered"):
        Surrogate.load(tmp_path)


def test_rank_correlations_of_known_samples():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0]).double()
    assert abs(rank_correlation(a, a.exp()) - 1) < 1e-12 and abs(rank_correlation(a, -a) + 1) < 1e-12
    # one swap of neighbours: 1 - 6 * 2 / (4 * 15)
    assert abs(rank_correlation(a, torch.tensor([1.0, 3.0, 2.0, 4.0]).double()) - 0.8) < 1e-12
    assert math.isnan(rank_correlation(a, torch.ones(4).double()))


@pytest.mark.parametrize("wrong", [{"members": 0}, {"noise": -1.0}, {"steps": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        SurrogateSettings(**wrong)
