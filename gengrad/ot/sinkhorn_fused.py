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
from .sinkhorn_problem import Problem
from .sinkhorn_solve import FIRST_SELF_GOAL, SELF_SHARE, Options, Solution, bound_coordinates, residual_goal

F = np.float32
EMPTY, NONE = np.empty((0, 0), F), np.empty(0, F)
NARROW = 16  # up to so many dimensions row averages are taken without a matrix product
KEEP = 2**28  # bytes of workspace kept between calls, per thread and buffer
_workspaces = threading.local()


def workspace(name: str, n: int, m: int) -> Tensor:
    """An (n, m) buffer reused between calls of this thread: a fresh large one costs more than filling it."""
    held = getattr(_workspaces, name, None)
    if held is None or held.numel() < n * m:
        held = torch.empty(n * m)
        if n * m * 4 <= KEEP:
            setattr(_workspaces, name, held)
    return held[: n * m].view(n, m)


def symmetric_product(x: Tensor, out: Tensor, blocks: int = 8) -> None:
    """The upper triangle of x x' (and some of the lower), by row blocks: 9/16 of the full product's work."""
    size = max(128, -(-len(x) // blocks))
    for i in range(0, len(x), size):
        torch.mm(x[i : i + size], x[i:].T, out=out[i : i + size, i:])


class OwnMap:
    """The barycentric map of x onto itself, by the symmetric scaling u, P_ij = K_ij u_i u_j, K of unit diagonal."""

    def __init__(self, problem: Problem, options: Options, half: np.ndarray, eps: float, spread: float, warm):
        self.x, self.half, self.eps, self.spread, self.options = problem.x[0], half, eps, spread, options
        self.a, self.target = problem.a[0].numpy(), problem.x[0].numpy()
        self.error, self.mass, self.total, self.kernel = math.inf, 1.0, 1.0, None
        self.u = np.sqrt(self.a) if warm is None else np.exp(warm[0].numpy() + half / F(eps))
        if coordinates := bound_coordinates(problem, options):
            mass, bound = core.skip_bound(problem.x, problem.a, problem.eps, coordinates)
            if float(mass) >= options.skip_self_mass:
                self.mass, self.error = float(mass), float(bound)
        self.skipped = self.error < math.inf

    def reach(self, goal: float) -> bool:
        """Bring the rms error below `goal` if it is not; True when the map changed."""
        if self.error <= goal:
            return False
        x, n = self.x, len(self.x)
        if self.kernel is None:
            self.kernel, dot, self.xt = workspace("self", n, n), EMPTY, _columns(x.numpy())
            if x.shape[1] > fused.DIRECT:
                products = workspace("products", n, n)
                symmetric_product(x, products)
                dot = products.numpy()
            fused.self_kernel(dot, x.numpy(), self.xt, self.half, F(1.0 / self.eps), self.kernel.numpy())
        kernel = self.kernel.numpy()
        limit = min(self.options.max_iter, 200)
        ku, _, self.error, self.total = fused.solve_self(
            kernel, self.u, self.a, self.spread, goal, residual_goal(self.options.tol), limit
        )
        self.mass, self.skipped = float((self.a * self.u / ku).sum()), False
        self.target = self._target(kernel, ku)
        return True

    def _target(self, kernel: np.ndarray, ku: np.ndarray) -> np.ndarray:
        x = self.x.numpy()
        out = np.empty(x.shape, F)
        if x.shape[1] <= NARROW:
            fused.symmetric_averages(kernel, self.u, ku, self.xt, out)
            return out
        plan = workspace("products", *kernel.shape)
        fused.symmetric_plan(kernel, self.u, ku, plan.numpy())
        torch.mm(plan, self.x, out=torch.from_numpy(out))
        return out

    def potential(self) -> tuple[np.ndarray, float]:
        """h, and OT(x, x) as its dual value 2 <a, h> - eps (sum P - 1)."""
        log_a = np.log(np.maximum(self.a, F(1e-37)))
        h = F(self.eps) * (np.log(np.maximum(self.u, F(1e-37))) - log_a)
        return h, 2 * float(np.dot(self.a, h)) - self.eps * (self.total - 1)


def _columns(points: np.ndarray) -> np.ndarray:
    """The coordinates as contiguous rows, where a kernel reads them so."""
    return np.ascontiguousarray(points.T) if points.shape[1] <= NARROW else EMPTY


def _seen(points: np.ndarray) -> np.ndarray:
    """The points through the probe directions of `sinkhorn_core`."""
    omega = core.probes(points.shape[1], torch.float32, torch.device("cpu"))
    return points if omega is None else torch.mm(torch.from_numpy(points), omega).numpy()


def _rms(gap: np.ndarray, a: np.ndarray) -> float:
    return math.sqrt(float(np.dot(a, np.einsum("ij,ij->i", gap, gap))))


def solve_fused(problem: Problem, options: Options, s: Tensor | None, s_self: Tensor | None) -> Solution:
    """Solve one problem (a batch of one); the arguments are those of `solve_torch`."""
    p, o, x, y = problem, options, problem.x[0].contiguous(), problem.y[0].contiguous()
    n, m, d, eps, cost = len(x), len(y), x.shape[1], float(p.eps[0]), float(p.mean_cost[0])
    xn, yn, a, b = x.numpy(), y.numpy(), p.a[0].contiguous().numpy(), p.b[0].contiguous().numpy()
    half_x, half_y = p.half_x[0].numpy(), p.half_y[0].numpy()
    mean_x, mean_y = p.mean_x[0].numpy(), p.mean_y[0].numpy()
    log_b, var_x, var_y, plain, fast = fused.prepare(xn, yn, half_x, half_y, mean_x, mean_y, a, b, eps)
    spread, rounding = math.sqrt(min(d * eps, 2 * cost)), float(torch.finfo(torch.float32).eps)
    floor = (2 * rounding * (1 + cost / eps) * spread + rounding * math.sqrt(cost)) / (1 - fast)
    own = OwnMap(p, o, half_x, eps, spread, s_self) if o.debias else None
    if own is not None and not own.skipped:
        own.reach(FIRST_SELF_GOAL * o.tol * math.sqrt(cost))
    dot, kernel, yt = EMPTY, workspace("kernel", n, m), _columns(yn)
    if d > fused.DIRECT:
        products = workspace("products", n, m)
        dot = torch.mm(x, y.T, out=products).numpy()
    k, sweeps = kernel.numpy(), 0
    if s is None:
        sweeps = max(0, math.floor(math.log(max(cost / eps, 1.0), core.STAGE_RATIO)))
        psi = fused.gaussian_start(yn, half_y, mean_x, mean_y, var_x, var_y, eps * core.STAGE_RATIO**sweeps)
        fused.anneal(dot, xn, yt, psi, log_b, eps, a, b, np.empty((1, m), F), sweeps)
        s = psi / F(eps) + log_b
    else:
        s = s[0].numpy().copy()
    zt, log_row, share = np.ascontiguousarray(_seen(yn).T), np.empty(n, F), (1 - SELF_SHARE) * o.tol
    base = _seen(xn if own is None else own.target)
    while True:
        v, more, marginal, error, shot = fused.solve_pair(
            dot, xn, yt, s, F(1.0 / eps), a, b, zt, base, share, 0.5 * floor,
            max(o.max_iter - sweeps, 1), plain, fast, k, log_row,
        )  # fmt: skip
        sweeps += more
        if own is None or not own.reach(max(SELF_SHARE * o.tol * _rms(shot - base, a), 0.5 * floor)):
            break
        base = _seen(
            own.target
        )  # refined for a speed that turned out small, which changes the speed a little
        if sweeps >= o.max_iter or error <= max(share * _rms(shot - base, a), 0.5 * floor):
            break
    target, mean_s = _averages(kernel, v, y, yt, s)
    solved = own is not None and not own.skipped
    velocity, f, g, speed, value, neighbours = fused.finish(
        xn, target, own.target if solved else xn, solved, NONE if p.centre is None else p.centre[0, 0].numpy(),
        a, b, s, log_b, log_row, mean_s, half_x, half_y, eps,
    )  # fmt: skip
    error += 0.0 if own is None else own.error
    good = error <= max(o.tol * speed, floor) and math.isfinite(speed)
    numbers = [(error + floor) / max(speed, 1e-37), marginal, neighbours, value]
    extra = ()
    if own is not None:
        h, own_value = own.potential()
        own_target = torch.from_numpy(own.target)[None] if solved else p.back(p.x)
        numbers, extra = [*numbers, own.mass, own_value], (own_target, torch.from_numpy(h)[None])
    numbers = torch.tensor(numbers)[:, None].unbind(0)
    return Solution(
        *(torch.from_numpy(part)[None] for part in (f, g, target, velocity)),
        torch.tensor([good]), numbers[0], torch.tensor([sweeps]), *numbers[1:4], *extra, *numbers[4:],
    )  # fmt: skip


def _averages(kernel: Tensor, v: np.ndarray, y: Tensor, yt: np.ndarray, s: np.ndarray):
    """Barycentric map (n, d) and row averages of s under the kernel with columns scaled by v; spends the kernel."""
    k, target = kernel.numpy(), np.empty((len(kernel), y.shape[1]), F)
    mean_s = fused.row_means(k, v, s)
    if y.shape[1] <= NARROW:
        fused.averages(k, v, yt, target)
    else:
        fused.normalise(k, v)
        torch.mm(kernel, y, out=torch.from_numpy(target))
    return target, mean_s
