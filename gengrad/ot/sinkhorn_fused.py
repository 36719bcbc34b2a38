"""fp32 problems on a CPU through the fused kernels of `sinkhorn_numba`; mirrors `sinkhorn_solve.solve_torch`.

At a few hundred points the calls themselves cost more than the arithmetic, so this file speaks NumPy and plain
numbers between few, long kernels: tensors become arrays once on the way in, and arrays tensors once on the way out.
"""

from __future__ import annotations

import math
import threading
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import sinkhorn_core as core
from . import sinkhorn_numba as fused
from . import sinkhorn_numba_ends as ends
from . import sinkhorn_numba_self as own_kernels
from .sinkhorn_problem import Problem
from .sinkhorn_solve import FIRST_SELF_GOAL, SELF_SHARE, Options, Solution, bound_coordinates, residual_goal

F = np.float32
ROUNDING = float(np.finfo(F).eps)
EMPTY, NONE = np.empty((0, 0), F), np.empty(0, F)
CPU = torch.device("cpu")
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


def block_rows(n: int) -> int:
    """Rows of a block, where a symmetric matrix of n rows is worked on by blocks of rows: eight, or fewer of 128."""
    return max(128, -(-n // 8))


def symmetric_product(x: Tensor, out: Tensor) -> None:
    """The upper triangle of x x' (and some of the lower), by row blocks: 9/16 of the full product's work."""
    size = block_rows(len(x))
    for i in range(0, len(x), size):
        torch.mm(x[i : i + size], x[i:].T, out=out[i : i + size, i:])


def symmetric_times(kernel: np.ndarray, w: np.ndarray, out: np.ndarray) -> None:
    """out (n, d) = K w for K symmetric, known in its upper triangle; the lower one of its diagonal blocks is filled."""
    size = block_rows(len(w))
    own_kernels.mirror_blocks(kernel, size)
    k, w, sums = (torch.from_numpy(t) for t in (kernel, w, out))
    torch.mm(k[:size], w, out=sums[:size])
    if size < len(w):
        torch.mm(k[:size, size:].T, w[:size], out=sums[size:])
    for i in range(size, len(w), size):
        j = i + size
        sums[i:j].addmm_(k[i:j, i:], w[i:])
        if j < len(w):
            sums[j:].addmm_(k[i:j, j:].T, w[i:j])


class Clouds(NamedTuple):
    """One problem as arrays and numbers; the letters of `Problem`. A field of the batch is cut where it is read."""

    x: np.ndarray  # (n, d)
    y: np.ndarray  # (m, d)
    a: np.ndarray  # (n,)
    b: np.ndarray  # (m,)
    half_x: np.ndarray  # (n,)
    half_y: np.ndarray  # (m,)
    mean_x: np.ndarray  # (d,)
    mean_y: np.ndarray  # (d,)
    centre: np.ndarray  # (d,), or empty
    eps: float
    cost: float  # mean of |x - y|^2 / 2


class Answers(NamedTuple):
    """The arrays that a solve fills, of one problem or (leading axis) of a batch, as `Solution` has them."""

    f: np.ndarray
    g: np.ndarray
    target: np.ndarray
    velocity: np.ndarray
    self_target: np.ndarray
    self_potential: np.ndarray
    numbers: np.ndarray  # velocity_error, marginal_error, effective_neighbours, value, self_mass, self_value
    converged: np.ndarray
    iterations: np.ndarray


def read_clouds(p: Problem) -> list[Clouds]:
    """Every problem of the batch, without a copy."""
    centres = [NONE] * len(p.x) if p.centre is None else p.centre.numpy()[:, 0]
    return [Clouds(*row) for row in zip(*p.arrays, centres, p.eps.tolist(), p.mean_cost.tolist())]


def room(p: Problem) -> Answers:
    """Unfilled answers, with a batch dimension only if the caller's clouds have one."""
    (batch, n, d), m = p.x.shape, p.y.shape[1]
    lead = () if p.single else (batch,)
    vectors = [np.empty((*lead, size), F) for size in (n, m, n)]
    maps = [np.empty((*lead, n, d), F) for _ in range(3)]
    numbers = np.empty((*lead, 6), F), np.empty(lead, np.bool_), np.empty(lead, np.int64)
    return Answers(*vectors[:2], *maps, vectors[2], *numbers)


def skip_bound(c: Clouds, coordinates: int) -> tuple[float, float]:
    """See `sinkhorn_self.skip_bound`."""
    n, d = c.x.shape
    z = np.ascontiguousarray(c.x[:, :: max(1, d // coordinates)]) / F(math.sqrt(c.eps))
    products, dot = workspace("products", n, n)
    symmetric_product(torch.from_numpy(z), products)
    mass, square = own_kernels.bound_sums(dot, np.einsum("ij,ij->i", z, z) / 2, np.sqrt(c.a))
    return 1 - mass, math.sqrt(square * c.eps)


class OwnMap:
    """The barycentric map of x onto itself, by the symmetric scaling u, P_ij = K_ij u_i u_j, K of unit diagonal."""

    def __init__(self, clouds: Clouds, options: Options, variance: float, top: float, h: np.ndarray | None, out):
        self.clouds, self.options, self.out = clouds, options, out
        self.error, self.mass, self.kernel, self.ku, self.fresh = math.inf, 1.0, None, EMPTY, False
        self.xt, (n, d) = _columns(clouds.x), clouds.x.shape
        self.spread = math.sqrt(min(d * clouds.eps, 2 * clouds.cost, top))  # see `sinkhorn_solve.self_modes`
        slow = clouds.eps / max(2 * top, 1e-37)
        self.rate = 1 / (math.sqrt(1 + slow * slow) + slow)
        self.u = np.sqrt(clouds.a) if h is None else clouds.a * np.exp(h / F(clouds.eps))
        if coordinates := bound_coordinates(variance / clouds.eps, n, d, options):
            mass, bound = skip_bound(clouds, coordinates)
            if mass >= options.skip_self_mass:
                self.mass, self.error = mass, bound
        self.skipped = self.error < math.inf

    def reach(self, goal: float) -> bool:
        """Bring the rms error below `goal` if it is not; True when the map changed. Works in the upper triangle."""
        if self.error <= goal:
            return False
        c, o = self.clouds, self.options
        if self.kernel is None:
            (n, d), dot = c.x.shape, EMPTY
            self.kernel = workspace("self", n, n)[1]
            if d > fused.DIRECT:
                products, dot = workspace("products", n, n)
                symmetric_product(torch.from_numpy(c.x), products)
            own_kernels.self_kernel(dot, c.x, self.xt, c.half_x, F(1.0 / c.eps), self.kernel)
        self.ku, _, self.error, self.mass = own_kernels.solve_self(
            self.kernel, self.u, c.a, self.spread, self.rate, goal, residual_goal(o.tol), min(o.max_iter, 200)
        )
        self.skipped, self.fresh = False, False
        return True

    def seen(self) -> np.ndarray:
        """The map through the probe directions: all that the stopping rule looks at."""
        return _seen(self.target())

    def target(self) -> np.ndarray:
        """The map itself (n, d), from one reading of the kernel's upper triangle; made once for each `reach`."""
        x = self.clouds.x
        if self.kernel is None or self.fresh:
            return x if self.kernel is None else self.out
        if x.shape[1] <= NARROW:
            own_kernels.symmetric_averages(self.kernel, self.u, self.ku, self.xt, self.out)
        else:
            symmetric_times(self.kernel, self.u[:, None] * x, self.out)
            self.out /= self.ku[:, None]
        self.fresh = True
        return self.out

    def potential(self, h: np.ndarray) -> float:
        """Fills in h; returns OT(x, x) as its dual value 2 <a, h>, of a plan of mass one."""
        return 2 * own_kernels.log_ratio(self.u, self.clouds.a, self.clouds.eps, h)


def _columns(points: np.ndarray) -> np.ndarray:
    """The coordinates as contiguous rows, where a kernel reads them so."""
    return np.ascontiguousarray(points.T) if points.shape[1] <= NARROW else EMPTY


def _seen(points: np.ndarray) -> np.ndarray:
    """The points through the probe directions of `sinkhorn_core`."""
    omega = _probes(points.shape[1])
    return points if omega is None else ends.through(points, omega)


@lru_cache(maxsize=8)
def _probes(d: int) -> np.ndarray | None:
    """The directions of `sinkhorn_core.probes` as rows (p, d)."""
    omega = core.probes(d, torch.float32, CPU)
    return None if omega is None else np.ascontiguousarray(omega.T.numpy())


def solve_fused(problem: Problem, options: Options, g: Tensor | None, h: Tensor | None) -> Solution:
    """Solve the problems of a batch in turn; arguments as `solve_torch`, the solution in the caller's coordinates.

    It has a batch dimension only if the caller's clouds have.
    """
    answers, o = room(problem), options
    for i, clouds in enumerate(read_clouds(problem)):
        at = ... if problem.single else i
        warm = (None if t is None else t.numpy()[i] for t in (g, h))
        part = Answers(*(t[at] for t in answers[:7]), None, None)
        answers.converged[at], answers.iterations[at] = solve_one(clouds, o, *warm, part)
    f, g, target, velocity, own, h, numbers, done, sweeps = map(torch.from_numpy, answers)
    error, marginal, neighbours, value, self_mass, self_value = numbers.unbind(-1)
    solution = Solution(f, g, target, velocity, done, error, sweeps, marginal, neighbours, value)
    if o.debias:
        solution.self_target, solution.self_potential = own, h
        solution.self_mass, solution.self_value = self_mass, self_value
    return solution


def solve_one(c: Clouds, o: Options, g: np.ndarray | None, h: np.ndarray | None, out: Answers) -> tuple[bool, int]:
    """One problem into `out`; whether it converged, and its sweeps."""
    (n, d), m, cost, eps = c.x.shape, len(c.y), c.cost, c.eps
    log_b, var_x, var_y, rate, top_x = ends.prepare(c.x, c.y, c.half_x, c.half_y, c.mean_x, c.mean_y, c.a, c.b, eps)
    spread, root = math.sqrt(min(d * eps, 2 * cost)), math.sqrt(1 - rate)
    floor = (2 * ROUNDING * (1 + cost / eps) * spread + ROUNDING * math.sqrt(cost)) * (1 + root) / (2 * root)
    own = OwnMap(c, o, d * var_x, top_x, h, out.self_target) if o.debias else None
    if own is not None and not own.skipped:
        own.reach(FIRST_SELF_GOAL * o.tol * math.sqrt(cost))
    dot, (kernel, k), yt, sweeps = EMPTY, workspace("kernel", n, m), _columns(c.y), 0
    if d > fused.DIRECT:
        products, dot = workspace("products", n, m)
        torch.mm(torch.from_numpy(c.x), torch.from_numpy(c.y).T, out=products)
    if g is None:
        sweeps = max(0, math.floor(math.log(max(cost / eps, 1.0), core.STAGE_RATIO)))
        psi = ends.gaussian_start(c.y, c.half_y, c.mean_x, c.mean_y, var_x, var_y, eps * core.STAGE_RATIO**sweeps)
        s = fused.anneal(dot, c.x, yt, psi, log_b, eps, c.a, c.b, sweeps)
    else:
        s = (g - c.half_y) / F(eps) + log_b
    zt, log_row, share = np.ascontiguousarray(_seen(c.y).T), np.empty(n, F), (1 - SELF_SHARE) * o.tol
    base = _seen(c.x) if own is None else own.seen()
    while True:
        v, more, marginal, error, shot, rate = fused.solve_pair(
            dot, c.x, yt, s, F(1.0 / eps), c.a, c.b, zt, base, share, 0.5 * floor,
            max(o.max_iter - sweeps, 1), rate, k, log_row,
        )  # fmt: skip
        sweeps += more
        if own is None or not own.reach(max(SELF_SHARE * o.tol * fused.rms_gap(shot, base, c.a), 0.5 * floor)):
            break
        base = own.seen()  # refined for a speed that turned out small, which changes the speed a little
        if sweeps >= o.max_iter or error <= max(share * fused.rms_gap(shot, base, c.a), 0.5 * floor):
            break
    return finish(c, o, own, kernel, (v, s, log_b, log_row, shot), (marginal, error, floor), out), sweeps


def finish(c: Clouds, o: Options, own: OwnMap | None, kernel: Tensor, state, errors, out: Answers) -> bool:
    """The maps and numbers of `sinkhorn_solve.finish`; spends the kernel. True if the tolerance is met."""
    (v, s, log_b, log_row, shot), (marginal, error, floor), k = state, errors, kernel.numpy()
    own_target, solved = c.x if own is None else own.target(), own is not None and not own.skipped
    if c.y.shape[1] <= NARROW:
        mean_s = ends.row_means(k, v, s)
        if _probes(c.y.shape[1]) is None:  # few dimensions are their own probes: the map is there
            out.target[:] = shot
        else:
            fused.averages(k, v, _columns(c.y), out.target)
    else:
        mean_s = ends.normalise(k, v, s)
        torch.mm(kernel, torch.from_numpy(c.y), out=torch.from_numpy(out.target))
    speed, value, neighbours = ends.finish(
        c.x, out.target, own_target, solved, out.velocity, c.centre, c.a, c.b, s, log_b, log_row, mean_s,
        c.half_x, c.half_y, c.eps, out.f, out.g,
    )  # fmt: skip
    mass, self_value = 1.0, 0.0
    if own is not None:
        error += own.error
        mass, self_value = own.mass, own.potential(out.self_potential)
        if not solved:  # its own array: no alias of the caller's points
            np.add(c.x, c.centre if len(c.centre) else F(0.0), out=out.self_target)
    relative = (error + floor) / max(speed, 1e-37)
    out.numbers[:] = relative, marginal, neighbours, value, mass, self_value
    return error <= max(o.tol * speed, floor) and math.isfinite(speed)
