"""Batches, blocks, memory, sampling, skipping, degenerate and bad input, and the divergence's gradient."""

import os
import subprocess
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import references
from references import BACKENDS, clouds, relative

import gengrad.ot as ot

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [30, 200])  # below and above the size at which a CPU solves one problem after another
def test_a_batch_gives_what_its_problems_give_alone_each_at_its_own_epsilon(backend, n):
    pairs = [clouds(n, n - 5, 3, seed, torch.float32) for seed in range(3)]
    x, y = (torch.stack(t) for t in zip(*pairs))
    x = x * torch.tensor([1.0, 3.0, 0.1])[:, None, None]
    options = {"tol": 1e-4, "backend": backend}
    together = ot.sinkhorn_velocity(x, y, **options)
    alone = [ot.sinkhorn_velocity(p, q, **options) for p, q in zip(x, y)]
    for i, r in enumerate(alone):
        assert float(together.epsilon[i]) == pytest.approx(float(r.epsilon), rel=1e-5)  # fp32 sums
        assert relative(together.velocity[i], r.velocity) < 2e-4  # two solves, each to 1e-4
    given = ot.sinkhorn_velocity(x, y, epsilon=together.epsilon, **options)
    assert relative(given.velocity, together.velocity) < 2e-4


def test_shapes_follow_the_input_and_every_field_is_there_per_problem():
    x, y = clouds(12, 9, 3)
    one, many = (
        ot.sinkhorn_velocity(x, y),
        ot.sinkhorn_velocity(x[None].repeat(2, 1, 1), y[None].repeat(2, 1, 1)),
    )
    shapes = {
        "f": (12,),
        "g": (9,),
        "target": (12, 3),
        "velocity": (12, 3),
        "self_target": (12, 3),
        "converged": (),
    }
    shapes |= dict.fromkeys(
        ("iterations", "marginal_error", "effective_neighbours", "epsilon", "self_mass", "value"), ()
    )
    for name, shape in shapes.items():
        assert getattr(one, name).shape == shape and getattr(many, name).shape == (2, *shape), name


@pytest.mark.parametrize("d", [2, 7])
def test_blocks_of_rows_give_what_the_whole_kernel_gives(d):
    x, y = clouds(120, 90, d)
    whole = ot.sinkhorn_velocity(x, y, tol=1e-5, backend="torch")
    blocked = ot.sinkhorn_velocity(x, y, tol=1e-5, max_memory=20 * 16 * 90)  # 20 rows at a time
    assert relative(blocked.velocity, whole.velocity) < 2e-5  # two solves
    assert float(blocked.value) == pytest.approx(float(whole.value), rel=1e-8)
    assert float(blocked.self_mass) == pytest.approx(float(whole.self_mass), rel=1e-4)


def peak_gigabytes(n: int, bound: float) -> tuple[float, float]:
    """Peak resident memory of a fresh process before and after it solves n x n points in the plane.

    Before: with PyTorch, and a small problem solved, so that no compiler's memory is counted.
    """
    code = f"""
        import resource, sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        torch.set_num_threads(2)
        import gengrad.ot as ot
        g = torch.Generator().manual_seed(0)
        for n in (200, {n}):
            x, y = torch.randn(n, 2, generator=g), torch.randn(n, 2, generator=g) * 0.5 + 1
            r = ot.sinkhorn_velocity(x, y, epsilon_rel=0.1, max_memory={bound}, tol=0.05)
            assert bool(r.converged)
            r.sample_targets()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    before, after = map(float, out.stdout.split())
    return before, after


def test_memory_follows_its_bound():
    # one 5000 x 5000 buffer is 0.1 GB: four of them unbounded, and with 0.05 GB for all of them almost nothing
    before, after = peak_gigabytes(5000, 5e7)
    assert after < before + 0.2


@pytest.mark.slow
def test_twenty_thousand_points_fit_in_four_gigabytes():
    assert peak_gigabytes(20_000, ot.MAX_MEMORY)[1] < 4.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_are_drawn_with_the_frequencies_of_the_plans_rows(backend):
    x, y = clouds(8, 6, dtype=torch.float32)
    r = ot.sinkhorn(x, y, epsilon_rel=0.3, tol=1e-5, backend=backend)
    p = torch.tensor(references.plan(x, y, float(r.epsilon))[0]) * 8
    g = torch.Generator().manual_seed(0)
    drawn = torch.stack([r.sample_targets(g) for _ in range(1000)])
    frequency = torch.nn.functional.one_hot(drawn, 6).double().mean(0)
    assert float((frequency - p).abs().max()) < 4.5 * 0.5 / 1000**0.5  # 4.5 deviations of the worst of 48 cells
    assert torch.allclose((p @ y.double()), r.target.double(), atol=1e-4)


def test_drawn_targets_do_not_depend_on_the_block_and_follow_the_generator():
    x, y = clouds(70, 60, 3)
    r = ot.sinkhorn(x[None].repeat(2, 1, 1), y[None].repeat(2, 1, 1))
    a, b = (r.sample_targets(torch.Generator().manual_seed(1), block=k) for k in (2**22, 500))
    assert torch.equal(a, b) and a.shape == (2, 70) and int(a.max()) < 60
    assert not torch.equal(a, r.sample_targets(torch.Generator().manual_seed(2)))


def test_drawing_after_moving_the_points_in_place_is_refused():
    x, y = clouds(10, 10)
    r = ot.sinkhorn(x, y)
    x += 1
    with pytest.raises(RuntimeError, match="in place"):
        r.sample_targets()


@pytest.mark.parametrize("backend", BACKENDS)
def test_where_the_self_map_is_the_identity_it_is_not_solved_and_nothing_changes(backend, monkeypatch):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 500, generator=g), torch.tanh(torch.randn(100, 500, generator=g).cumsum(1) / 10)
    options = {"epsilon_rel": 0.01, "backend": backend, "tol": 1e-2}
    solved = ot.sinkhorn_velocity(x, y, skip_self_mass=2.0, **options)
    solver = {
        "torch": "gengrad.ot.sinkhorn_self.solve_self",
        "numba": "gengrad.ot.sinkhorn_numba_self.solve_self",
    }
    monkeypatch.setattr(solver[backend], None)  # calling it now fails
    skipped = ot.sinkhorn_velocity(x, y, **options)
    with pytest.raises(TypeError):
        ot.sinkhorn_velocity(x, y, skip_self_mass=2.0, **options)
    assert torch.equal(skipped.self_target, x)
    assert 0.99 <= float(skipped.self_mass) <= float(solved.self_mass) + 1e-4  # a lower bound, up to rounding
    assert relative(skipped.velocity, solved.velocity) < 2e-3  # the self map's share of tol


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_crowded_cloud_is_never_skipped(backend):
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(100, 500, generator=g), torch.randn(100, 500, generator=g)
    x[1] = x[0] + 1e-3  # one pair of near twins: their self mass is one half
    r = ot.sinkhorn_velocity(x, y, epsilon_rel=0.01, backend=backend)
    middle = (x[0] + x[1]) / 2
    assert torch.allclose(r.self_target[0], middle, atol=1e-5)  # rounding of coordinates of size one


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_point_identical_points_and_no_spread_give_finite_correct_results(backend):
    one, same = torch.randn(1, 3), torch.ones(5, 3)
    for x, y in ((one, one), (same, same), (same, same + 1), (one, same), (same, one)):
        r = ot.sinkhorn_velocity(x, y, backend=backend)
        assert torch.allclose(r.velocity, y.mean(0) - x, atol=1e-5) and bool(r.converged)
    assert float(ot.sinkhorn_velocity(same, same, epsilon_rel=0.07).epsilon) == pytest.approx(0.07)  # as documented
    y = torch.randn(40, 3)
    r = ot.sinkhorn_velocity(one, y, backend=backend)
    assert torch.allclose(r.target, y.mean(0)[None], atol=1e-5)  # a single point goes to the mean


def test_half_precision_is_read_as_float32_and_bf16_products_err_by_a_few_percent():
    x, y = clouds(150, 150, 64, dtype=torch.float32)
    v = ot.sinkhorn_velocity(x, y, tol=1e-3).velocity
    half = ot.sinkhorn_velocity(x.half(), y.half(), tol=1e-3).velocity
    assert half.dtype == torch.float32 and relative(half, v) < 5e-3  # rounding of the points to 11 bits
    rough = relative(ot.sinkhorn_velocity(x, y, tol=1e-3, products="bf16").velocity, v)
    assert 1e-5 < rough < 3e-2  # rounding of the factors to 8 bits; it must not be the exact path in disguise


def bad(**change):
    x, y = clouds(6, 5, 2, dtype=torch.float32)
    return {"x": x, "y": y, **change}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.tensor([[0.0, 1.0], [float("nan"), 1.0]])}, ["x[1, 0]", "nan", "drop"]),
        ({"y": torch.tensor([[0.0, float("inf")]])}, ["y[0, 1]", "inf"]),
        ({"x": torch.randn(4)}, ["(4,)", "(n, d)"]),
        ({"x": torch.randn(4, 1, 2, 2)}, ["(4, 1, 2, 2)", "flatten"]),
        ({"x": torch.randn(3, 7)}, ["7 coordinates", "2"]),
        ({"x": torch.randn(2, 3, 2)}, ["batch"]),
        ({"x": torch.randn(0, 2)}, ["empty"]),
        ({"x": torch.ones(3, 2, dtype=torch.int64)}, ["int64", "float()"]),
        ({"x": torch.randn(3, 2).double()}, ["float64", "y.to(x)"]),
        ({"x": [[0.0, 1.0]]}, ["list", "as_tensor"]),
        ({"epsilon": 0.0}, ["epsilon is 0.0", "exact_plan"]),
        ({"epsilon": -1.0}, ["positive"]),
        ({"epsilon": torch.ones(3)}, ["shape (3,)"]),
        ({"epsilon": 1e-9}, ["resolves", ".double()"]),
        ({"epsilon_rel": 0.0}, ["epsilon_rel"]),
        ({"tol": 0.0}, ["tol"]),
        ({"max_iter": 0}, ["max_iter"]),
        ({"a": torch.tensor([1.0, -0.2, 0.1, 0.1, 0.0, 0.0])}, ["weights a", "non-negative", "-0.2"]),
        ({"b": torch.ones(5)}, ["weights b", "sum to 5", "b / b.sum"]),
        ({"b": torch.ones(4) / 4}, ["weights b", "(4,)", "(5,)"]),
        ({"backend": "cuda"}, ["backend", "auto, torch, numba"]),
        ({"products": "fp8"}, ["products", "bf16"]),
    ],
)
def test_bad_input_is_refused_saying_what_was_found_and_what_to_do(change, words):
    with pytest.raises(ValueError) as caught:
        ot.sinkhorn_velocity(**bad(**change))
    for word in words:
        assert word in str(caught.value)


def test_a_warm_start_of_other_targets_is_refused():
    x, y = clouds(6, 5)
    with pytest.raises(ValueError, match="warm_start"):
        ot.sinkhorn_velocity(x, y[:4], warm_start=ot.sinkhorn_velocity(x, y))


@pytest.mark.skipif("numba" not in BACKENDS, reason="needs numba")
def test_the_fused_path_refuses_what_it_cannot_do_and_auto_takes_it_where_it_can():
    x, y = clouds(6, 5)
    with pytest.raises(ValueError, match="float64"):
        ot.sinkhorn_velocity(x, y, backend="numba")
    assert ot.sinkhorn_velocity(x, y).backend == "torch"
    assert ot.sinkhorn_velocity(x.float(), y.float()).backend == "numba"


@pytest.mark.parametrize("d", [2, 40])
def test_both_paths_give_the_same_numbers(d):
    x, y = clouds(90, 80, d, dtype=torch.float32)
    results = [ot.sinkhorn_velocity(x + 20, y + 20, tol=1e-4, backend=b) for b in BACKENDS]
    for name in (
        "f",
        "g",
        "target",
        "self_target",
        "self_potential",
        "value",
        "self_value",
        "effective_neighbours",
    ):
        one, other = getattr(results[0], name), getattr(results[-1], name)
        assert torch.allclose(one, other, rtol=1e-3, atol=2e-3), name  # two solves, each to 1e-4 in the velocity


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_velocity_is_minus_n_times_the_gradient_of_the_divergence(backend):
    x, y = clouds(30, 25, 3, dtype=torch.float32)
    x.requires_grad_()
    ot.sinkhorn_divergence(x, y, epsilon=0.3, backend=backend).backward()
    v = ot.sinkhorn_velocity(x.detach(), y, epsilon=0.3, tol=1e-4, backend=backend).velocity
    assert relative(-30 * x.grad, v) < 2e-3  # the divergence solves to 1e-3


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_is_that_of_finite_differences(weighted):
    x, y = clouds(20, 25, 3)
    a = torch.rand(20, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.2
    options = {"epsilon": 0.3, "tol": 1e-8, "a": a / a.sum() if weighted else None}
    x.requires_grad_()
    (grad,) = torch.autograd.grad(ot.sinkhorn_divergence(x, y, **options), x)
    direction = torch.randn(20, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        up, down = (float(ot.sinkhorn_divergence(x + h * direction, y, **options)) for h in (1e-4, -1e-4))
    # central differences err by h^2 = 1e-8 and by the values' rounding over h
    assert (up - down) / 2e-4 == pytest.approx(float((grad * direction).sum()), rel=1e-6)


def test_a_batched_divergence_differentiates_each_problem():
    x, y = torch.randn(2, 3, 15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x.requires_grad_()
    s = ot.sinkhorn_divergence(x, y, epsilon=0.5, tol=1e-6)
    (grad,) = torch.autograd.grad((s * torch.tensor([1.0, 2.0, 0.0])).sum(), x)
    assert s.shape == (3,) and float(grad[2].abs().max()) == 0
    v = ot.sinkhorn_velocity(x.detach(), y, epsilon=0.5, tol=1e-6).velocity
    assert relative(grad[1], -2 * v[1] / 15) < 1e-5


def test_a_gradient_in_the_target_is_refused_with_the_way_around():
    x, y = clouds(5, 5)
    with pytest.raises(ValueError, match="symmetric"):
        ot.sinkhorn_divergence(x, y.requires_grad_())


def test_the_divergence_falls_at_every_step_of_the_flow_and_to_a_hundredth():
    x, y = clouds(120, 100, 2)
    values, warm = [], None
    for _ in range(15):
        warm = ot.sinkhorn_velocity(x, y, epsilon=0.1, warm_start=warm)
        values.append(float(ot.sinkhorn_divergence(x, y, epsilon=0.1)))
        x = x + 0.3 * warm.velocity
    assert all(later < earlier for earlier, later in pairwise(values))
    assert 0 <= values[-1] < 0.01 * values[0]


@pytest.mark.slow
def test_kernels_just_compiled_and_kernels_from_the_cache_give_the_same_bits(tmp_path):
    pytest.importorskip("numba")
    code = f"""
        import hashlib, sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        import gengrad.ot as ot
        digest, g = hashlib.sha256(), torch.Generator().manual_seed(0)
        for epsilon_rel in (0.002, 0.02, 0.2):
            x, y = torch.randn(256, 2, generator=g), torch.randn(256, 2, generator=g) * 2 + 1
            digest.update(ot.sinkhorn_velocity(x, y, epsilon_rel=epsilon_rel).velocity.numpy().tobytes())
        print(digest.hexdigest())
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc"))  # the first run has filled the cache
    assert runs[0] == runs[1]
