"""One fp32 problem on a CPU through the fused kernels of `sinkhorn_numba`; mirrors `sinkhorn_solve.solve_torch`.

At a few hundred points the calls themselves cost more than the arithmetic, so this file speaks NumPy and plain
numbers between few, long kernels.
"""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor

from . import sinkhorn_core as core
from . import sinkhorn_numba as fused
from . import sinkhorn_numba_own as own_kernels
from .sinkhorn_problem import Problem
from .sinkhorn_solve import FIRST_SELF_GOAL, SELF_SHARE, Options, Solution, bound_coordinates, residual_goal

F = np.float32
ROUNDING = float(np.finfo(F).eps)
EMPTY, NONE = np.empty((0, 0), F), np.empty(0, F)
NARROW = 16  # up to so many dimensions row averages are taken without a matrix product
KEEP = 2**28  # bytes of workspace kept between calls, per thread and buffer
_workspaces = threading.local()


def workspace(name: str, n: int, m: int) -> tuple[Tensor, np.ndarray]:
    """An (n, m) buffer of this thread, as tensor and as array: a fresh large one costs more than filling it."""
    held = vars(_workspaces).get(name)
    if held is None or held[0].shape != (n, m):
        flat = torch.empty(n * m) if held is None or held[2].numel() < n * m else held[2]
        tensor = flat[: n * m].view(n, m)
        held = (tensor, tensor.numpy(), flat)
        if flat.numel() * 4 <= KEEP:
            setattr(_workspaces, name, held)
    return held[:2]


def symmetric_product(x: Tensor, out: Tensor, blocks: int = 8) -> None:
    """The upper triangle of x x' (and some of the lower), by row blocks: 9/16 of the full product's work."""
    size = max(128, -(-len(x) // blocks))
    for i in range(0, len(x), size):
        torch.mm(x[i : i + size], x[i:].T, out=out[i : i + size, i:])


class OwnMap:
    """The barycentric map of x onto itself, by the symmetric scaling u, P_ij = K_ij u_i u_j, K of unit diagonal."""

    def __init__(
        self, problem: Problem, options: Options, half: np.ndarray, eps: float, spread: float, warm, out
    ):
        self.x, self.half, self.eps, self.spread, self.options = problem.x[0], half, eps, spread, options
        self.points, self.a = self.x.numpy(), problem.a.numpy()[0]
        self.error, self.mass, self.total, self.kernel, self.ku = math.inf, 1.0, 1.0, None, EMPTY
        self.out, self.u = out, np.sqrt(self.a) if warm is None else np.exp(warm[0].numpy() + half / F(eps))
        if coordinates := bound_coordinates(problem, options):
            mass, bound = core.skip_bound(problem.x, problem.a, problem.eps, coordinates)
            if float(mass) >= options.skip_self_mass:
                self.mass, self.error = float(mass), float(bound)
        self.skipped = self.error < math.inf

    def reach(self, goal: float) -> bool:
        """Bring the rms error below `goal` if it is not; True when the map changed. Works in the upper triangle."""
        if self.error <= goal:
            return False
        if self.kernel is None:
            n, dot, self.xt = len(self.x), EMPTY, _columns(self.points)
            self.kernel = workspace("self", n, n)[1]
            if self.x.shape[1] > fused.DIRECT:
                products, dot = workspace("products", n, n)
                symmetric_product(self.x, products)
            own_kernels.self_kernel(dot, self.points, self.xt, self.half, F(1.0 / self.eps), self.kernel)
        self.ku, _, self.error, self.total, self.mass = own_kernels.solve_self(
            self.kernel,
            self.u,
            self.a,
            self.spread,
            goal,
            residual_goal(self.options.tol),
            min(self.options.max_iter, 200),
        )
        self.skipped = False
        return True

    def seen(self) -> np.ndarray:
        """The map through the probe directions: all that the stopping rule looks at, for a few passes of the kernel."""
        points = _seen(self.points)
        if self.kernel is None:
            return points
        shown = np.empty_like(points)
        own_kernels.symmetric_averages(self.kernel, self.u, self.ku, np.ascontiguousarray(points.T), shown)
        return shown

    def target(self) -> np.ndarray:
        """The map itself (n, d). Overwrites the products."""
        if self.kernel is None:
            return self.points
        if self.x.shape[1] <= NARROW:
            own_kernels.symmetric_averages(self.kernel, self.u, self.ku, self.xt, self.out)
            return self.out
        tensor, plan = workspace("products", *self.kernel.shape)
        own_kernels.symmetric_plan(self.kernel, self.u, self.ku, plan)
        torch.mm(tensor, self.x, out=torch.from_numpy(self.out))
        return self.out

    def potential(self) -> tuple[np.ndarray, float]:
        """h, and OT(x, x) as its dual value 2 <a, h> - eps (sum P - 1)."""
        h, inner = own_kernels.log_ratio(self.u, self.a, self.eps)
        return h, 2 * inner - self.eps * (self.total - 1)


def _columns(points: np.ndarray) -> np.ndarray:
    """The coordinates as contiguous rows, where a kernel reads them so."""
    return np.ascontiguousarray(points.T) if points.shape[1] <= NARROW else EMPTY


def _seen(points: np.ndarray) -> np.ndarray:
    """The points through the probe directions of `sinkhorn_core`."""
    omega = core.probes(points.shape[1], torch.float32, torch.device("cpu"))
    return points if omega is None else torch.mm(torch.from_numpy(points), omega).numpy()


def _rms(gap: np.ndarray, a: np.ndarray) -> float:
    return math.sqrt(float(np.dot(a, np.einsum("ij,ij->i", gap, gap))))


def solve_fused(
    problem: Problem, options: Options, s: Tensor | None, s_self: Tensor | None, maps=None
) -> Solution:
    """Solve one problem (a batch of one); arguments as `solve_torch`, the solution without batch dimension.

    `maps` are (n, d) arrays to hold target, velocity and self map; by default fresh ones.
    """
    maps = [np.empty(problem.x.shape[1:], F) for _ in range(3)] if maps is None else maps
    p, o, x, y = problem, options, problem.x[0], problem.y[0]
    n, m, d, eps, cost = len(x), len(y), x.shape[1], float(p.eps), float(p.mean_cost)
    xn, yn = x.numpy(), y.numpy()
    a, b, half_x, half_y, mean_x, mean_y = (
        t.numpy()[0] for t in (p.a, p.b, p.half_x, p.half_y, p.mean_x, p.mean_y)
    )
    log_b, var_x, var_y, rate = own_kernels.prepare(xn, yn, half_x, half_y, mean_x, mean_y, a, b, eps)
    spread, root = math.sqrt(min(d * eps, 2 * cost)), math.sqrt(1 - rate)
    floor = (2 * ROUNDING * (1 + cost / eps) * spread + ROUNDING * math.sqrt(cost)) * (1 + root) / (2 * root)
    own = OwnMap(p, o, half_x, eps, spread, s_self, maps[2]) if o.debias else None
    if own is not None and not own.skipped:
        own.reach(FIRST_SELF_GOAL * o.tol * math.sqrt(cost))
    dot, (kernel, k), yt, sweeps = EMPTY, workspace("kernel", n, m), _columns(yn), 0
    if d > fused.DIRECT:
        products, dot = workspace("products", n, m)
        torch.mm(x, y.T, out=products)
    if s is None:
        sweeps = max(0, math.floor(math.log(max(cost / eps, 1.0), core.STAGE_RATIO)))
        psi = own_kernels.gaussian_start(
            yn, half_y, mean_x, mean_y, var_x, var_y, eps * core.STAGE_RATIO**sweeps
        )
        s = fused.anneal(dot, xn, yt, psi, log_b, eps, a, b, sweeps)
    else:
        s = s.numpy()[0].copy()
    zt, log_row, share = np.ascontiguousarray(_seen(yn).T), np.empty(n, F), (1 - SELF_SHARE) * o.tol
    base = _seen(xn) if own is None else own.seen()
    while True:
        v, more, marginal, error, shot, rate = fused.solve_pair(
            dot, xn, yt, s, F(1.0 / eps), a, b, zt, base, share, 0.5 * floor,
            max(o.max_iter - sweeps, 1), rate, k, log_row,
        )  # fmt: skip
        sweeps += more
        if own is None or not own.reach(max(SELF_SHARE * o.tol * fused.rms_gap(shot, base, a), 0.5 * floor)):
            break
        base = own.seen()  # refined for a speed that turned out small, which changes the speed a little
        if sweeps >= o.max_iter or error <= max(share * fused.rms_gap(shot, base, a), 0.5 * floor):
            break
    return _finish(p, o, own, kernel, v, s, log_b, log_row, (sweeps, marginal, error, floor), maps)


def _finish(
    p: Problem, o: Options, own: OwnMap | None, kernel: Tensor, v, s, log_b, log_row, state, maps
) -> Solution:
    """The maps and numbers of `sinkhorn_solve.finish`; spends the kernel."""
    x, y, (sweeps, marginal, error, floor) = p.x[0], p.y[0], state
    k, solved, (target, velocity) = kernel.numpy(), own is not None and not own.skipped, maps[:2]
    mean_s, own_target = own_kernels.row_means(k, v, s), x.numpy() if own is None else own.target()
    if y.shape[1] <= NARROW:
        fused.averages(k, v, _columns(y.numpy()), target)
    else:
        own_kernels.normalise(k, v)
        torch.mm(kernel, y, out=torch.from_numpy(target))
    f, g, speed, value, neighbours = own_kernels.finish(
        x.numpy(), target, own_target, solved, velocity,
        NONE if p.centre is None else p.centre.numpy()[0, 0], p.a.numpy()[0], p.b.numpy()[0],
        s, log_b, log_row, mean_s, p.half_x.numpy()[0], p.half_y.numpy()[0], float(p.eps),
    )  # fmt: skip
    error += 0.0 if own is None else own.error
    good = error <= max(o.tol * speed, floor) and math.isfinite(speed)
    solution = Solution(
        *map(torch.from_numpy, (f, g, target, velocity)), torch.tensor(good),
        torch.tensor((error + floor) / max(speed, 1e-37)), torch.tensor(sweeps), torch.tensor(marginal),
        torch.tensor(neighbours), torch.tensor(value),
    )  # fmt: skip
    if own is not None:
        h, own_value = own.potential()
        solution.self_target = torch.from_numpy(own_target) if solved else p.back(p.x)[0]
        solution.self_potential, solution.self_mass = torch.from_numpy(h), torch.tensor(own.mass)
        solution.self_value = torch.tensor(own_value)
    return solution
