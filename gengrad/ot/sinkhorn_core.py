"""The Sinkhorn iterations in plain batched PyTorch, for any device; `sinkhorn.py` is the public face.

Letters. Cost c = |x - y|^2 / 2, strength eps, weights a (n), b (m). The plan is

    P_ij = exp(x_i . y_j / eps + s_j - log_row_i) a_i,     s_j = (g_j - |y_j|^2 / 2) / eps + log b_j,

with g the column potential. Rows are normalised exactly in every sweep, so the state is s alone. A sweep returns
the column masses c_j(s) of that plan; Sinkhorn's iteration is s <- s + log(b / c(s)). Between epsilon stages the
state is psi = eps (s - log b), which is g up to |y|^2 / 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .sinkhorn_kernels import BlockedKernel, DenseKernel, matvec
from .sinkhorn_problem import Problem

STAGE_RATIO = 4.0  # epsilon stages are this factor apart
WINDOW = 8  # differences that Anderson acceleration keeps
CHECK_EVERY = 3  # accelerated iterations between two error estimates
SAFETY = 1.5  # factor on the error estimate, held to account by tests/ot/test_sinkhorn_convergence.py
LIMIT = 40.0  # largest move of one entry of s in one iteration (starved columns)
NEWTON_AFTER, NEWTON_SIZE = 50, 4096  # fp64: Newton steps after so many sweeps, up to so many targets
REACH = 16.0  # first and largest bound on what acceleration or Newton may move an entry of s by
PROBATION = 15  # iterations before the error estimate trusts a problem with slow modes
PATIENCE = 40  # checks without progress after which a solve gives up
PROBES = 4  # directions through which the velocity is watched in high dimension


def shorten(step: Tensor, reach: Tensor) -> Tensor:
    """The step (B, m), scaled down where an entry exceeds `reach` (B,): far clusters exchange mass like e^s."""
    largest = step.abs().amax(-1).clamp_min(torch.finfo(step.dtype).tiny)
    return step * (reach / largest).clamp_max(1.0)[:, None]


class Anderson:
    """Anderson acceleration (type II) of s <- s + r(s), residuals weighted by the column masses.

    Minimises |sqrt(c) (r - dR gamma)| over the window and moves to s + r - (dS + dR) gamma (Walker and Ni, SIAM J.
    Numer. Anal. 49, 2011, in the difference form). Memory 2 x WINDOW x (B, m).
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget the window: the next step is a plain Sinkhorn iteration."""
        self.last, self.ds, self.dr = None, [], []

    def step(self, s: Tensor, r: Tensor, c: Tensor, reach: Tensor) -> Tensor:
        """The accelerated successor of s, given its residual r = log(b / c) and the reach (B,) of the extrapolation."""
        if self.last is not None:
            self.ds = [*self.ds, s - self.last[0]][-WINDOW:]
            self.dr = [*self.dr, r - self.last[1]][-WINDOW:]
        self.last = (s, r)
        if not self.dr:
            return s + r
        ds, dr = torch.stack(self.ds, 1), torch.stack(self.dr, 1)  # (B, w, m)
        weighted = dr * c[:, None, :]
        gram = torch.bmm(weighted, dr.mT)
        ridge = 1e-6 if s.dtype == torch.float32 else 1e-12
        trace = gram.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(1e-30)
        gram = gram + ridge * trace[:, None, None] * torch.eye(gram.shape[1], dtype=s.dtype, device=s.device)
        gamma = torch.linalg.solve(gram, torch.bmm(weighted, r[..., None]))
        return s + r - shorten(torch.bmm(gamma.mT, ds + dr)[:, 0], reach)


def gaussian_start(p: Problem, eps: Tensor) -> Tensor:
    """psi (B, m) of entropic transport between isotropic Gaussians with the clouds' means and mean variances.

    psi(y) = -mean_x . y - |y - mean_y|^2 / 2 (var_x / q - eps / var_y), where q is the cross-covariance
    sqrt(var_x var_y + eps^2 / 4) - eps / 2 (Janati et al. 2020, theorem 1, in one direction).
    """
    d, tiny = p.x.shape[-1], torch.finfo(p.x.dtype).tiny
    var_x = (2 * (p.a * p.half_x).sum(1) - p.mean_x.square().sum(-1)).div(d).clamp_min(tiny)
    var_y = (2 * (p.b * p.half_y).sum(1) - p.mean_y.square().sum(-1)).div(d).clamp_min(tiny)
    q = var_x * var_y / (torch.sqrt(var_x * var_y + eps**2 / 4) + eps / 2)  # the root, without cancellation
    slope = (var_x / q.clamp_min(tiny) - eps / var_y).clamp(0.0, 1e6)[:, None]
    return -matvec(p.y, p.mean_x - slope * p.mean_y) - slope * p.half_y


def residual(b: Tensor, c: Tensor) -> Tensor:
    """log(b / c), with starved columns moved at most e^40 and columns of no weight left alone."""
    r = torch.log(b / c.clamp_min(1e-30)).clamp(-LIMIT, LIMIT)
    return torch.where(b > 0, r, torch.zeros_like(r))


@lru_cache(maxsize=16)
def probes(d: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(d, PROBES) Gaussian directions with E |v Omega|^2 = |v|^2, the same in every call; None in low dimension."""
    if d <= PROBES:
        return None
    omega = torch.randn(d, PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (omega / math.sqrt(PROBES)).to(device, dtype)


def seen(points: Tensor) -> Tensor:
    """The points through the probe directions."""
    omega = probes(points.shape[-1], points.dtype, points.device)
    return points if omega is None else points @ omega


def rms(v: Tensor, w: Tensor) -> Tensor:
    """Root of the mean square of the rows of v (B, n, p) under the weights w (B, n), shape (B,)."""
    return torch.sqrt((w * v.square().sum(-1)).sum(-1))


def top_variance(x: Tensor, points: int = 64, rounds: int = 3) -> Tensor:
    """About the largest eigenvalue of each cloud's covariance (B,), by power iteration on at most `points` points."""
    x = x[:, :: max(1, x.shape[1] // points)]
    x = x - x.mean(1, keepdim=True)
    v = x[:, :1].mT + x.std(1, correction=0)[..., None]  # (B, d, 1): any start that no cloud is orthogonal to
    for _ in range(rounds):
        w = x.mT @ (x @ v)
        norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        v = w / norm.clamp_min(torch.finfo(x.dtype).tiny)
    return (x @ v).square().mean((1, 2))


def slowest_rate(x: Tensor, y: Tensor, eps: Tensor) -> Tensor:
    """The rate lambda (B,) per iteration that Sinkhorn's slowest mode would have between Gaussians.

    Along a direction of deviations s, t it is (sqrt(1 + k^2) - k)^2, k = eps / (2 s t).
    """
    k = eps / (2 * torch.sqrt(top_variance(x) * top_variance(y))).clamp_min(torch.finfo(eps.dtype).tiny)
    return 1 / (torch.sqrt(1 + k.square()) + k).square()


def krylov_ratio(rate: Tensor, before: int, now: int) -> Tensor:
    """At best, what iterations `before` to `now` of an acceleration leave of the slowest mode: T_before / T_now.

    T_k is the Chebyshev polynomial at 2 / rate - 1: the optimum over polynomials of degree k on spectra in [0, rate].
    """
    angle = torch.acosh((2 / rate.clamp(1e-6, 1 - 1e-9) - 1).clamp_min(1.0))
    # cosh(p a) / cosh(q a) without overflow
    top = torch.exp(-(now - before) * angle) + torch.exp(-(now + before) * angle)
    return top / (1 + torch.exp(-2 * now * angle))


@dataclass
class PairSolution:
    """A solved pair of clouds; all tensors carry the batch dimension."""

    s: Tensor  # (B, m), includes log b
    log_row: Tensor  # (B, n)
    shot: Tensor  # (B, n, p) the barycentric map through the probes
    iterations: int  # sweeps over the kernel, annealing included
    marginal_error: Tensor  # (B,) sum_j |c_j - b_j|
    error: Tensor  # (B,) estimated rms error of the barycentric map, in the units of x
    rate: Tensor  # (B,) of the slowest mode seen


def solve_pair(
    kernel: DenseKernel | BlockedKernel,
    psi: Tensor,
    a: Tensor,
    b: Tensor,
    eps: Tensor,
    z: Tensor,
    z_base: Tensor,
    tol: float,
    floor: Tensor,
    max_iter: int,
    stages: int,
    rate: Tensor,
) -> PairSolution:
    """Anneal from eps 4^stages, then iterate at eps to a velocity error of `tol` relative, or `floor` (B,) absolute.

    z (B, m, p) are the targets through the probes, z_base (B, n, p) what the velocity subtracts (x, or the self map).
    Every iteration must increase the semi-dual <b, s> - <a, log_row>, as Sinkhorn's own does; one that does not is
    taken back for the plain iteration, and the reach of acceleration shrinks.
    """
    log_b = torch.log(b).clamp_min(-1e4)
    for k in range(stages, 0, -1):
        e = eps * STAGE_RATIO**k
        c, _ = kernel.at(e).sweep(psi / e[:, None] + log_b, a)
        psi = psi + e[:, None] * residual(b, c)
    kernel.at(eps)
    s, sweeps, since = psi / eps[:, None] + log_b, stages, 0
    slack = 1e-5 if s.dtype == torch.float32 else 1e-12
    direct = s.dtype == torch.float64 and isinstance(kernel, DenseKernel) and s.shape[1] <= NEWTON_SIZE
    anderson, progress, reach = Anderson(), Progress(rate), torch.full_like(eps, REACH)
    before, newton = None, False
    while True:
        c, log_row = kernel.sweep(s, a)
        sweeps += 1
        r = residual(b, c)
        value, size = (b * s).sum(-1) - (a * log_row).sum(-1), torch.sqrt((b * r.square()).sum(-1))
        if before is not None:
            wrong = value < before[1] - slack * (1 + before[1].abs())
            reach = torch.where(wrong, reach / 4, (2 * reach).clamp_max(REACH))
            if bool(wrong.any()):
                s, before, newton = torch.where(wrong[:, None], before[0] + before[2], s), None, False
                anderson.restart()
                progress.depth = 0
                continue
            progress.watch(s - before[0], r - before[2], c)
        progress.depth, progress.age = progress.depth + 1, progress.age + 1
        # within the probation no estimate of a slow problem would be trusted
        blind = 3 < progress.age < PROBATION - CHECK_EVERY and bool((progress.rate > 0.8).all())
        if sweeps - stages <= 3 or newton or (since >= CHECK_EVERY and not blind) or sweeps >= max_iter:
            shot, gap = kernel.average(s, z), torch.linalg.vector_norm(matvec(z.mT, c - b), dim=-1)
            error = progress.error(shot, size, a, gap, newton)
            good = error <= torch.maximum(tol * rms(shot - z_base, a), floor)
            good &= (c - b).abs().sum(-1) <= max(2 * tol, 100 * slack)
            if bool(good.all()) or sweeps >= max_iter or progress.idle > PATIENCE:
                break
            since = 0
        since += 1
        before = (s, value, r)
        step = (
            kernel.newton(s, a, b, c) if direct and sweeps >= stages + NEWTON_AFTER and bool((size < 1).all()) else None
        )
        newton = step is not None and bool((step.abs().amax(-1) <= reach).all())
        s = anderson.step(s, r, c, reach) if step is None else s + shorten(step, reach)
    return PairSolution(s, log_row, shot, sweeps, (c - b).abs().sum(-1), error, progress.rate)


class Progress:
    """The error estimate, from one look at the velocity to the next, and how long it has not improved."""

    def __init__(self, rate: Tensor) -> None:
        self.rate, self.shot, self.idle = rate, None, 0
        self.age, self.depth, self.seen_at = 0, 0, 0  # iterations in all, since the last restart, at the last look
        self.best = self.best_size = torch.full_like(rate, math.inf)

    def watch(self, step: Tensor, change: Tensor, c: Tensor) -> None:
        """Learn the slowest rate: a step d changes the residual by -(1 - M) d, so 1 + <d, change> / <d, d> is one.

        A Rayleigh quotient never exceeds the slowest rate, and accelerated steps lie mostly along that mode. Steps too
        long for the linearisation, or too short for the rounding, say nothing.
        """
        total = c.sum(-1, keepdim=True)
        step = step - (c * step).sum(-1, keepdim=True) / total
        square = (c * step.square()).sum(-1)
        rate = 1 + (c * step * change).sum(-1) / square.clamp_min(1e-30)
        short, most = (1e-3, 1 - 1e-4) if step.dtype == torch.float32 else (1e-7, 1 - 1e-8)
        told = (square > short**2) & (square < 1) & (rate < 1)
        self.rate = torch.where(told, torch.maximum(self.rate, rate.clamp_max(most)), self.rate)

    def error(self, shot: Tensor, size: Tensor, a: Tensor, gap: Tensor, newton: bool) -> Tensor:
        """Estimated rms error (B,) of the barycentric map seen as `shot` (B, n, p), at a residual of rms `size`.

        Since the last look the map moved by D while the residual fell by a factor q: what is left is taken as
        D q / (1 - q). Slow modes hide from residuals, so q is at least what the iterations can have left of the
        slowest one (but for Newton steps, to which all modes are alike); and the error is no less than four times
        its mean over the cloud, known exactly as `gap` = |sum_j (c_j - b_j) y_j|: mass still in the wrong cluster.
        """
        if self.shot is None:
            error = torch.full_like(size, math.inf)
        else:
            if newton:
                least = torch.full_like(size, 0.01)
            elif self.age < PROBATION:  # too early to have met the slow modes of a problem that has some
                least = torch.where(self.rate > 0.8, 0.9999, self.rate.clamp_min(0.25))
            elif self.depth - self.seen_at < 2:
                least = self.rate.clamp_min(0.25)
            else:
                least = krylov_ratio(self.rate, max(self.seen_at, 0), self.depth).clamp_min(0.5)
            q = torch.maximum(size / self.size.clamp_min(1e-30), least).clamp_max(0.9999)
            error = torch.maximum(SAFETY * rms(shot - self.shot, a) * q / (1 - q), 4 * gap)
        better = (error < 0.9 * self.best) | (size < 0.9 * self.best_size)
        self.idle = 0 if bool(better.any()) else self.idle + 1
        self.best, self.best_size = torch.minimum(error, self.best), torch.minimum(size, self.best_size)
        self.shot, self.size, self.seen_at = shot, size, self.depth
        return error
