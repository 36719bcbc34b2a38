"""Distances against closed forms and independent implementations; the protocol against its promises."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from gengrad.data import Array, Digits, EightGaussians, Gaussian, generator_for
from gengrad.evaluation import (
    Reference,
    energy_distance,
    evaluate_transport,
    mode_coverage,
    sliced_w2_squared,
    wasserstein2,
)
from gengrad.evaluation.transport import _distance_sum, slicing_directions
from gengrad.ot.gaussian import bures_map, gaussian_w2

MEANS = torch.tensor([0.0, 0.0]).double(), torch.tensor([3.0, -1.0]).double()
COVARIANCES = torch.tensor([[[1.0, 0.3], [0.3, 0.5]], [[2.0, -0.7], [-0.7, 1.0]]]).double()


def normal(n, d=2, seed=0):
    return torch.randn(n, d, generator=generator_for(seed, "test"), dtype=torch.float64)


def gaussian(k, n, seed):
    data = Gaussian(mean=MEANS[k].tolist(), covariance=COVARIANCES[k].tolist())
    return data.sample(n, generator_for(seed, "test")).double()


# ------------------------------------------------------------------ W2


def test_w2_of_a_cloud_and_its_image_under_the_optimal_map_is_that_maps_cost():
    # the gradient of a convex function is optimal for the cloud it is applied to, so this holds to rounding ...
    x = gaussian(0, 800, 0)
    k, offset = bures_map(MEANS[0], COVARIANCES[0], MEANS[1], COVARIANCES[1])
    moved = x @ k.T + offset
    cost = (x - moved).square().sum(1)
    assert wasserstein2(x, moved) ** 2 == pytest.approx(cost.mean().item(), rel=1e-9)
    # ... and the cost is Bures' within five standard errors of its mean
    exact = gaussian_w2(MEANS[0], COVARIANCES[0], MEANS[1], COVARIANCES[1]).item() ** 2
    assert cost.mean().item() == pytest.approx(exact, abs=5 * cost.std().item() / 800**0.5)


def test_w2_of_independent_clouds_of_gaussians_is_bures_within_their_floors():
    n = 800
    exact = gaussian_w2(MEANS[0], COVARIANCES[0], MEANS[1], COVARIANCES[1]).item()
    x, y = gaussian(0, n, 0), gaussian(1, n, 1)
    # triangle inequality: each cloud is about one floor from its law
    floors = wasserstein2(x, gaussian(0, n, 2)) + wasserstein2(y, gaussian(1, n, 3))
    assert abs(wasserstein2(x, y) - exact) < floors < 0.25 * exact


def test_w2_of_equal_sizes_is_scipys_assignment():
    x, y = normal(40, 3), normal(40, 3, seed=1) + 1
    cost = torch.cdist(x, y).square().numpy()
    assert wasserstein2(x, y) ** 2 == pytest.approx(cost[linear_sum_assignment(cost)].mean(), rel=1e-9)


def test_w2_of_unequal_sizes_is_that_of_the_clouds_repeated_to_one_size():
    x, y = normal(6, 2), normal(4, 2, seed=1)
    assert wasserstein2(x, y) == pytest.approx(wasserstein2(x.repeat(2, 1), y.repeat(3, 1)), rel=1e-9)


# ------------------------------------------------------------------ sliced W2


@pytest.mark.parametrize(("d", "directions"), [(1, 128), (2, 128), (3, 126), (64, 128)])
def test_sliced_w2_squared_of_a_translation_is_its_square_over_the_dimension(d, directions):
    x, shift = normal(50, d), normal(1, d, seed=1)
    assert sliced_w2_squared(x, x + shift, directions) == pytest.approx(shift.square().sum().item() / d, rel=1e-9)


def test_sliced_w2_squared_of_a_dilation_is_the_mean_square_over_the_dimension():
    x = normal(50, 2)
    expected = x.square().sum(1).mean().item() / 2  # along every line, points keep their order
    assert sliced_w2_squared(x, 2 * x) == pytest.approx(expected, rel=1e-9)


def test_sliced_w2_squared_ignores_the_order_of_points_and_the_sides():
    x, y = normal(50), normal(70, seed=1)
    assert sliced_w2_squared(x, x.flip(0)) == pytest.approx(0, abs=1e-20)
    assert sliced_w2_squared(x, y) == pytest.approx(sliced_w2_squared(y, x), rel=1e-12)


@pytest.mark.parametrize("d", [1, 2, 5])
def test_sliced_w2_squared_of_unequal_sizes_is_that_of_the_clouds_repeated(d):
    x, y = normal(6, d), normal(4, d, seed=1)
    repeated = sliced_w2_squared(x.repeat(2, 1), y.repeat(3, 1))
    assert sliced_w2_squared(x, y) == pytest.approx(repeated, rel=1e-12)


def test_sliced_w2_squared_is_at_most_w2_squared_over_the_dimension():
    # the projected optimal plan is a plan, and its cost averages to the whole over d
    x, y = normal(60), normal(60, seed=1) * 0.3 + 1
    assert 0 < sliced_w2_squared(x, y) <= wasserstein2(x, y) ** 2 / 2


def test_in_one_dimension_sliced_and_exact_agree():
    x, y = normal(60, 1), normal(45, 1, seed=1) + 0.5
    assert sliced_w2_squared(x, y) == pytest.approx(wasserstein2(x, y) ** 2, rel=1e-9)


@pytest.mark.parametrize("d", [2, 3, 64, 200])
def test_directions_are_unit_vectors_in_orthonormal_blocks_and_always_the_same(d):
    u = slicing_directions(d, 130)
    assert u.shape == (d, 130) and torch.equal(u, slicing_directions(d, 130))
    assert torch.allclose(u.norm(dim=0), torch.ones(130).double())
    if d > 2:
        block = u[:, : min(d, 130)]
        assert torch.allclose(block.T @ block, torch.eye(block.shape[1]).double(), atol=1e-10)


# ------------------------------------------------------------------ energy distance


def test_the_energy_distance_of_two_diracs_is_twice_their_distance():
    x, y = torch.zeros(3, 2), torch.tensor([[3.0, 4.0]]).expand(5, 2)
    assert energy_distance(x, y) == pytest.approx(2 * 5.0, abs=1e-6)


def test_the_energy_distance_leaves_out_pairs_of_a_point_with_itself():
    x, y = normal(7), normal(5, seed=1)
    across = np.mean([np.linalg.norm(a - b) for a in x.numpy() for b in y.numpy()])

    def within(z):
        return np.mean([np.linalg.norm(a - b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j])

    expected = 2 * across - within(x.numpy()) - within(y.numpy())
    assert energy_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_energy_distance_of_shifted_normals_has_its_closed_form():
    # E|N(m, 2)| = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2)
    n, m = 3000, 1.0
    folded = 2 / math.sqrt(math.pi) * math.exp(-(m**2) / 4) + m * math.erf(m / 2)
    expected = 2 * folded - 4 / math.sqrt(math.pi)
    # standard error about 2 sd(E|x - Y|) sqrt(2 / n) < 0.03; five of it would be .15, three clouds give .09
    assert energy_distance(normal(n, 1), normal(n, 1, seed=1) + m) == pytest.approx(expected, abs=0.09)


def test_the_energy_distance_is_unbiased_for_equal_distributions():
    pairs = ((normal(20, seed=2 * k), normal(20, seed=2 * k + 1)) for k in range(300))
    values = torch.tensor([energy_distance(x, y) for x, y in pairs])
    assert abs(values.mean()) < 5 * values.std() / 300**0.5
    assert (values < 0).any()  # a biased estimate would never be


def test_tiles_do_not_change_the_sum_of_distances():
    x, y = normal(50, 4), normal(33, 4, seed=1)
    assert _distance_sum(x, y, tile=7) == pytest.approx(_distance_sum(x, y), rel=1e-12)


def test_a_cloud_of_one_point_has_no_energy_distance():
    with pytest.raises(ValueError, match="clouds of 1 and 5"):
        energy_distance(normal(1), normal(5))


# ------------------------------------------------------------------ modes

SQUARE = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])


def test_a_missed_mode_is_seen_in_hits_and_in_mass():
    coverage = mode_coverage(SQUARE[:3].repeat(4, 1), SQUARE, radius=1.0)
    assert coverage == pytest.approx((3 / 4, 1.0, 1 / 4))  # masses 1/3, 1/3, 1/3, 0 against 1/4 each


def test_samples_between_modes_lower_only_the_share_within_the_radius():
    offset = torch.tensor([0.0, 2.0])
    coverage = mode_coverage(torch.cat([SQUARE, SQUARE + offset]), SQUARE, radius=1.0)
    assert coverage == pytest.approx((1.0, 1 / 2, 0.0))


def test_masses_are_compared_with_the_modes_own_weights():
    x = torch.cat([SQUARE[:1].repeat(7, 1), SQUARE[1:]])
    weights = torch.tensor([7.0, 1.0, 1.0, 1.0])
    assert mode_coverage(x, SQUARE, 1.0, weights).mass_error == pytest.approx(0, abs=1e-12)
    assert mode_coverage(x, SQUARE, 1.0).mass_error == pytest.approx(0.7 - 0.25)


def test_a_mode_with_less_than_a_tenth_of_its_due_is_not_hit():
    x = torch.cat([SQUARE[:3].repeat(100, 1), SQUARE[3:].repeat(7, 1)])  # 7 of 307, where 76.75 are due
    assert mode_coverage(x, SQUARE, 1.0).modes_hit == 3 / 4
    assert mode_coverage(torch.cat([x, SQUARE[3:]]), SQUARE, 1.0).modes_hit == 1.0  # 8 of 308, 7.7 needed


# ------------------------------------------------------------------ the protocol

SMALL = {"n": 200, "draws": 3, "sliced_n": 1000, "directions": 16}


def sampler_of(distribution, shift=0.0):
    return lambda n, seed: distribution.sample(n, generator_for(seed, "sampler")) + shift


def test_a_perfect_sampler_is_at_the_floor_and_a_shifted_one_is_off_by_its_shift():
    target = Gaussian()
    perfect = evaluate_transport(sampler_of(target), target, **SMALL)
    shifted = evaluate_transport(sampler_of(target, shift=2.0), target, **SMALL)
    excess, spread = (perfect["w2_squared_minus_floor_squared"][key] for key in ("mean", "std"))
    assert abs(excess) < 5 * spread
    # |shift|^2 = 8, half of it along a line; clouds of 200 and 1,000 points move their means by about .1 and .04
    assert shifted["w2"]["mean"] == pytest.approx(8**0.5, abs=0.3)
    assert shifted["sw2_squared"]["mean"] == pytest.approx(4, abs=0.5)
    assert shifted["energy_distance"]["mean"] > 10 * abs(perfect["energy_distance"]["mean"])


def test_a_result_is_plain_json_with_its_protocol():
    target = EightGaussians()
    result = evaluate_transport(sampler_of(target), target, nfe=5, **SMALL)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    protocol = result["protocol"]
    assert (protocol["n"], protocol["sliced_n"], protocol["draws"], protocol["directions"]) == (200, 1000, 3, 16)
    assert len(set(protocol["sampling_seeds"])) == 3 and "POT 0" in protocol["w2"] and protocol["seconds"] >= 0
    for metric in ("w2", "sw2_squared", "energy_distance", "modes_hit", "within_radius", "mass_error"):
        summary = result[metric]
        assert len(summary["values"]) == len(summary["floor"]["values"]) == 3
        assert summary["mean"] == pytest.approx(np.mean(summary["values"]))
        assert summary["std"] == pytest.approx(np.std(summary["values"], ddof=1))
    pairs = zip(result["w2"]["values"], result["w2"]["floor"]["values"])
    assert result["w2_squared_minus_floor_squared"]["values"] == [w**2 - f**2 for w, f in pairs]


def test_a_reused_reference_changes_nothing_but_the_time():
    target = EightGaussians()
    reference = Reference(target, **SMALL)
    first = evaluate_transport(sampler_of(target), target, reference=reference)
    second = evaluate_transport(sampler_of(target), target, **SMALL)
    first["protocol"].pop("seconds"), second["protocol"].pop("seconds")
    assert first == second


def test_the_sampler_is_asked_once_a_draw_with_seeds_of_its_own():
    target, asked = Gaussian(), []

    def sample(n, seed):
        asked.append((n, seed))
        return target.sample(n, generator_for(seed, "sampler"))

    evaluate_transport(sample, target, **SMALL)
    evaluate_transport(sample, target, **{**SMALL, "seed": 1})
    assert [n for n, _ in asked] == [1000] * 6 and len({seed for _, seed in asked}) == 6


def test_evaluating_leaves_the_global_generators_alone():
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    evaluate_transport(sampler_of(Gaussian()), Gaussian(), **SMALL)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_images_are_judged_by_their_held_out_part_and_sizes_are_recorded():
    digits = Digits()
    result = evaluate_transport(sampler_of(digits), digits, n=400, draws=2, directions=64)
    protocol = result["protocol"]
    assert (protocol["n"], protocol["reference_n"], protocol["sliced_n"]) == (400, 300, 400)
    assert "held-out" in protocol["reference"] and "training points" in protocol["floor"]
    # draws of the training points are as close to the held-out ones as the floor's subsets are: within 10 %
    assert result["w2"]["mean"] == pytest.approx(result["w2"]["floor"]["mean"], rel=0.1)
    black = evaluate_transport(lambda n, seed: -torch.ones(n, 1, 8, 8), digits, n=400, draws=2, directions=64)
    assert black["w2"]["mean"] > 2 * result["w2"]["mean"]


def test_finite_data_are_judged_by_different_held_out_points_and_floored_by_different_training_points():
    digits = Digits()
    reference = Reference(digits, n=250)
    for points, pool in ((reference.points(0), digits.held_out), (reference.others(0), digits.points)):
        rows = {row.numpy().tobytes() for row in points}
        assert len(rows) == 250 and rows <= {row.numpy().tobytes() for row in pool.flatten(1)}
    assert not torch.equal(reference.points(0), reference.points(1))


def test_one_draw_has_no_standard_deviation():
    result = evaluate_transport(sampler_of(Gaussian()), Gaussian(), **{**SMALL, "draws": 1})
    assert result["w2"]["std"] is None and result["w2"]["floor"]["std"] is None


def poisoned(n, seed):
    x = torch.zeros(n, 2)
    x[3, 1], x[5, 0] = math.nan, math.inf
    return x


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        (poisoned, "2 of 1000 samples are not finite.*the first is number 3"),
        (lambda n, seed: torch.zeros(n, 3), r"\(1000, 3\) where \(1000, 2\)"),
        (lambda n, seed: torch.zeros(n - 1, 2), r"\(999, 2\)"),
    ],
)
def test_samples_that_cannot_be_judged_are_refused(sample, words):
    with pytest.raises(ValueError, match=words):
        evaluate_transport(sample, Gaussian(), **SMALL)


def test_data_without_held_out_points_cannot_judge(tmp_path):
    np.save(tmp_path / "points.npy", np.random.default_rng(0).normal(size=(20, 2)))
    data = Array(path=str(tmp_path / "points.npy"), held_out=0.0)
    with pytest.raises(ValueError, match="larger held_out"):
        Reference(data)


@pytest.mark.parametrize("settings", [{"n": 1}, {"draws": 0}])
def test_too_few_points_or_draws_are_refused(settings):
    with pytest.raises(ValueError, match="n >= 2"):
        Reference(Gaussian(), **settings)
