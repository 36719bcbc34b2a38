"""From a checked problem to its maps: which solves are needed, at which accuracy, in which order."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from . import sinkhorn_core as core
from . import sinkhorn_self as symmetric
from .sinkhorn_kernels import make_kernel
from .sinkhorn_problem import Problem, has_numba

SELF_SHARE = 0.2  # part of the tolerance that the self map's error may use
FIRST_SELF_GOAL = 0.006  # its first goal, times tol and the clouds' size, before the speed is known


@dataclass(frozen=True)
class Options:
    """How to solve; see `gengrad.ot.sinkhorn` for the meaning."""

    tol: float
    max_iter: int
    debias: bool
    skip_self_mass: float
    max_memory: float
    products: str
    backend: str


@dataclass
class Solution:
    """Answers for a batch, in centred coordinates, named as in `SinkhornResult`; the last four need debiasing."""

    f: Tensor
    g: Tensor
    target: Tensor
    velocity: Tensor
    converged: Tensor
    velocity_error: Tensor
    iterations: Tensor
    marginal_error: Tensor
    effective_neighbours: Tensor
    value: Tensor
    self_target: Tensor | None = None
    self_potential: Tensor | None = None
    self_mass: Tensor | None = None
    self_value: Tensor | None = None


def join(parts: list[Solution], how) -> Solution:
    """Solutions as one, `how` being what makes one tensor of a list of them (torch.cat of batches)."""
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Solution)}
    return Solution(**{k: None if v[0] is None else how(v) for k, v in columns.items()})


def stages(problem: Problem) -> int:
    """Epsilon stages before the last: from about the mean cost down, a factor 4 apart."""
    ratio = float((problem.mean_cost / problem.eps).max())
    return max(0, math.floor(math.log(max(ratio, 1.0), core.STAGE_RATIO)))


def self_start(problem: Problem, h: Tensor | None) -> Tensor:
    """The self problem's state at its potential h (B, n), or at the scalings that isolated points have, u = 1."""
    p, eps = problem, problem.eps[:, None]
    log_a = torch.log(p.a).clamp_min(-1e4)
    return (0.5 * log_a if h is None else log_a + h / eps) - p.half_x / eps


def row_radius(problem: Problem) -> Tensor:
    """About the rms radius of a row of a plan: no wider than the kernel, nor than the clouds; shape (B,)."""
    return torch.sqrt(torch.minimum(problem.x.shape[-1] * problem.eps, 2 * problem.mean_cost))


def self_modes(problem: Problem) -> tuple[Tensor, Tensor]:
    """The deviation of a row of the self plan along one direction, and the rate of its slowest mode; both (B,).

    An error delta of the potential moves the map of a row by Cov(delta, x), at most the deviation of delta times that
    of x along its widest direction; averaged over rows the latter is at most the cloud's own.
    """
    rate = core.slowest_rate(problem.x, problem.x, problem.eps)
    return torch.minimum(row_radius(problem), torch.sqrt(core.top_variance(problem.x))), torch.sqrt(rate)


def resolution(problem: Problem) -> Tensor:
    """Rms velocity below which rounding in x . y / eps hides it, (B,); in fp64 about 1e-13 of the clouds' size."""
    rounding = torch.finfo(problem.x.dtype).eps * (1 + problem.mean_cost / problem.eps)
    return 2 * rounding * row_radius(problem) + torch.finfo(problem.x.dtype).eps * torch.sqrt(problem.mean_cost)


def residual_goal(tol: float) -> float:
    """Rms error of the self potential, in units of epsilon, whatever the velocity asks: the value needs it."""
    return min(0.05, max(5 * tol, 1e-5))


def bound_coordinates(far: float, n: int, d: int, options: Options) -> int:
    """Coordinates after which `skip_bound` should succeed; 0 if it is not worth trying.

    `far` is the mean of |x_i - x_j|^2 / (2 eps); among k of d coordinates about k / d of it, of which the nearest
    of n points keep, say, two thirds; the bound wants e^15 beyond n neighbours.
    """
    if options.skip_self_mass > 1 or d < 16:
        return 0
    count = math.ceil(d * 1.5 * (math.log(n) + 15) / max(far, 1e-30))
    return min(max(count, 64), d) if count <= d // 2 else 0


class SelfMap:
    """The barycentric map of x onto itself: skipped where provably the identity, otherwise solved, and refined."""

    def __init__(self, problem: Problem, options: Options, h: Tensor | None):
        self.problem, self.options, self.kernel = problem, options, None
        self.s = self_start(problem, h)
        self.spread, self.rate = self_modes(problem)
        self.target, self.mass = problem.x, torch.ones_like(problem.eps)
        self.error = torch.full_like(problem.eps, math.inf)
        variance = 2 * (problem.a * problem.half_x).sum(-1) - problem.mean_x.square().sum(-1)
        far = float((variance / problem.eps).min())
        if coordinates := bound_coordinates(far, *problem.x.shape[1:], options):
            mass, bound = symmetric.skip_bound(problem.x, problem.a, problem.eps, coordinates)
            if bool((mass >= options.skip_self_mass).all()):
                self.mass, self.error = mass, bound
        self.skipped = bool(torch.isfinite(self.error).all())

    def reach(self, goal: Tensor) -> bool:
        """Bring the rms error below `goal` (B,) if it is not; True when the map changed."""
        if bool((self.error <= goal).all()):
            return False
        p, o = self.problem, self.options
        if self.kernel is None:
            self.kernel = make_kernel(p.x, p.x, o.max_memory, o.products)
        solved = symmetric.solve_self(
            self.kernel,
            self.s,
            p.a,
            p.eps,
            self.spread,
            self.rate,
            goal,
            residual_goal(o.tol),
            min(o.max_iter, 200),
        )
        self.s, self.error, self.skipped = solved.s, solved.error, False
        self.target = self.kernel.average(solved.s, p.x)
        log_mass = 2 * p.half_x / p.eps[:, None] + solved.s - solved.log_row
        self.mass = (p.a * torch.exp(log_mass)).sum(-1)
        return True

    def settle(self, shot: Tensor, error: Tensor | float, floor: Tensor | float) -> bool:
        """Refine for the speed that the pair's probes `shot` (B, n, p) show; True if the pair's error suits it still.

        The first goal cannot know how small the velocity turns out; a refined self map changes the speed a little.
        """
        p, tol = self.problem, self.options.tol
        speed = core.rms(shot - core.seen(self.target), p.a)
        if not self.reach((SELF_SHARE * tol * speed).clamp_min(0.5 * floor)):
            return True
        speed = core.rms(shot - core.seen(self.target), p.a)
        return bool((error <= ((1 - SELF_SHARE) * tol * speed).clamp_min(0.5 * floor)).all())

    def value(self) -> Tensor:
        """OT_eps(x, x) as its dual value 2 <a, h>, of a plan of mass one: it errs in the second order; shape (B,)."""
        return 2 * (self.problem.a * self.potential()).sum(-1)

    def potential(self) -> Tensor:
        """h (B, n), with P_ij = a_i a_j exp((h_i + h_j - |x_i - x_j|^2 / 2) / eps)."""
        p = self.problem
        return p.eps[:, None] * (self.s - torch.log(p.a).clamp_min(-1e4)) + p.half_x


def solve_torch(problem: Problem, options: Options, g: Tensor | None, h: Tensor | None) -> Solution:
    """Solve a batch together, from the potentials g (B, m) of the pair and h (B, n) of the self problem if given."""
    p, o = problem, options
    kernel = make_kernel(p.x, p.y, o.max_memory, o.products)
    log_b = torch.log(p.b).clamp_min(-1e4)
    own = SelfMap(p, o, h) if o.debias else None
    if own is not None and not own.skipped:
        own.reach(FIRST_SELF_GOAL * o.tol * torch.sqrt(p.mean_cost))
    levels, sweeps = stages(p), 0
    psi = core.gaussian_start(p, p.eps * core.STAGE_RATIO**levels)
    if g is not None:
        levels, psi = 0, g - p.half_y
    z, rate = core.seen(p.y), core.slowest_rate(p.x, p.y, p.eps)
    root = torch.sqrt(1 - rate)
    floor = resolution(p) * (1 + root) / (2 * root)  # slow modes amplify rounding
    while True:
        base = core.seen(p.x if own is None else own.target)
        pair = core.solve_pair(
            kernel, psi, p.a, p.b, p.eps, z, base, (1 - SELF_SHARE) * o.tol, 0.5 * floor,
            max(o.max_iter - sweeps, 1), levels, rate,
        )  # fmt: skip
        sweeps, levels, psi = sweeps + pair.iterations, 0, (pair.s - log_b) * p.eps[:, None]
        rate = pair.rate
        if own is None or sweeps >= o.max_iter or own.settle(pair.shot, pair.error, floor):
            break
    return finish(p, o, kernel, pair, own, sweeps, floor)


def finish(
    p: Problem, o: Options, kernel, pair: core.PairSolution, own: SelfMap | None, sweeps: int, floor
) -> Solution:
    """Potentials, maps and diagnosis from the solver's state.

    A row's entropy comes from its own averages: with p_j = exp(x . y_j / eps + s_j - log_row), -sum p log p is
    log_row - x . target / eps - sum p s.
    """
    eps = p.eps[:, None]
    average = kernel.average(pair.s, torch.cat([p.y, pair.s[..., None]], -1))
    target, mean_s = average[..., :-1], average[..., -1]
    velocity = target - (p.x if own is None else own.target)
    speed, error = core.rms(velocity, p.a), pair.error + (0 if own is None else own.error)
    f = p.half_x - eps * pair.log_row
    g = eps * (pair.s - torch.log(p.b).clamp_min(-1e4)) + p.half_y
    sum_f, sum_g = (p.a * f).sum(-1), (p.b * g).sum(-1)
    gauge = (sum_f - sum_g)[:, None] / 2
    entropy = pair.log_row - (p.x * target).sum(-1) / eps - mean_s
    solution = Solution(
        f - gauge, g + gauge, target, velocity, error <= torch.maximum(o.tol * speed, floor),
        (error + floor) / speed.clamp_min(torch.finfo(speed.dtype).tiny), torch.full_like(p.eps, sweeps).long(),
        pair.marginal_error, (p.a * torch.exp(entropy.clamp_min(0.0))).sum(-1), sum_f + sum_g,
    )  # fmt: skip
    if own is not None:
        solution.self_target, solution.self_mass = own.target, own.mass
        solution.self_potential, solution.self_value = own.potential(), own.value()
    return solution


def choose_backend(problem: Problem, options: Options) -> str:
    """The fused path for fp32 on a CPU where numba is installed and the kernel fits the memory bound."""
    p, o = problem, options
    n, m = p.x.shape[1], p.y.shape[1]
    reasons = []
    if not has_numba():
        reasons.append("numba is not installed (pip install gengrad[fast])")
    if p.x.device.type != "cpu" or p.x.dtype != torch.float32:
        reasons.append(f"it takes float32 on a CPU, not {p.x.dtype} on {p.x.device}")
    if 4 * max(n, m) * max(n, m) * 2 > o.max_memory:
        reasons.append(f"its buffers for {n} x {m} points exceed max_memory")
    if o.products != "same":
        reasons.append(f"it has no products={o.products!r}")
    if o.backend == "numba" and reasons:
        raise ValueError(f'sinkhorn: backend="numba" cannot run: {"; ".join(reasons)}. Use "auto" or "torch".')
    return "torch" if reasons or o.backend == "torch" else "numba"


def solve(problem: Problem, options: Options, g: Tensor | None, h: Tensor | None) -> tuple[Solution, str]:
    """Solve with the chosen backend, from the potentials g and h if given; results are batched if the clouds are.

    On a CPU problems of some size go one at a time: same work, faster products.
    """
    backend = choose_backend(problem, options)
    n, m, batch = problem.x.shape[1], problem.y.shape[1], problem.x.shape[0]
    if backend == "numba":
        from .sinkhorn_fused import solve_fused  # compiles at first use

        return solve_fused(problem, options, g, h), backend

    def part(i: int):
        return problem.part(i), options, *(None if t is None else t[i : i + 1] for t in (g, h))

    if batch > 1 and problem.x.device.type == "cpu" and n * m >= 2**14:
        return join([solve_torch(*part(i)) for i in range(batch)], torch.cat), backend
    solution = solve_torch(problem, options, g, h)
    return join([solution], lambda v: v[0][0]) if problem.single else solution, backend
