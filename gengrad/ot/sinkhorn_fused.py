"""One fp32 problem on a CPU, solved through the fused kernels of `sinkhorn_numba`; mirrors `sinkhorn_solve.solve_torch`."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch
from torch import Tensor

from . import sinkhorn_core as core
from . import sinkhorn_numba as fused
from .sinkhorn_problem import Problem
from .sinkhorn_solve import FIRST_SELF_GOAL, SELF_SHARE, Options, SelfMap, Solution, resolution, stages

F = np.float32
EMPTY = np.empty((0, 0), F)
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
    n = x.shape[0]
    size = max(128, -(-n // blocks))
    for i in range(0, n, size):
        torch.mm(x[i : i + size], x[i:].T, out=out[i : i + size, i:])


class FusedSelfMap(SelfMap):
    """`SelfMap` on the fused kernels: the symmetric scaling u with P_ij = K_ij u_i u_j, K of unit diagonal."""

    def reach(self, goal: Tensor) -> bool:
        """See `SelfMap.reach`."""
        if bool((self.error <= goal).all()):
            return False
        p, x, n = self.problem, self.problem.x[0], self.problem.x.shape[1]
        half = x.square().sum(-1) / 2
        offset = half / p.eps[0]  # log u = s + |x|^2 / (2 eps)
        if self.kernel is None:
            self.kernel, dot = workspace("self", n, n), EMPTY
            if x.shape[1] > fused.DIRECT:
                products = workspace("products", n, n)
                symmetric_product(x, products)
                dot = products.numpy()
            self.xt = np.ascontiguousarray(x.numpy().T)
            fused.self_kernel(
                dot, x.numpy(), self.xt, half.numpy(), F(1.0) / F(p.eps[0]), self.kernel.numpy()
            )
        u = torch.exp(self.s[0] + offset).numpy()
        ku, _, error, total = fused.solve_self(
            self.kernel.numpy(), u, p.a[0].numpy(), float(self.spread), float(goal),
            min(0.05, max(5 * self.options.tol, 1e-5)), min(self.options.max_iter, 200),
        )  # fmt: skip
        self.error, self.total, self.skipped = (
            torch.full_like(p.eps, error),
            torch.full_like(p.eps, total),
            False,
        )
        scaling, row = torch.from_numpy(u), torch.from_numpy(ku)
        self.s = (torch.log(scaling).clamp_min(-1e4) - offset)[None]
        self.mass = (p.a[0] * scaling / row).sum()[None]
        self.target = self._target(scaling, row, x)[None]
        return True

    def _target(self, u: Tensor, ku: Tensor, x: Tensor) -> Tensor:
        if x.shape[1] <= 16:
            out = np.empty(x.shape, F)
            fused.symmetric_averages(self.kernel.numpy(), u.numpy(), ku.numpy(), self.xt, out)
            return torch.from_numpy(out)
        fused.mirror(self.kernel.numpy())
        return (self.kernel @ (u[:, None] * x)) / ku[:, None]


def solve_fused(problem: Problem, options: Options, s: Tensor | None, s_self: Tensor | None) -> Solution:
    """Solve one problem (a batch of one); the arguments are those of `solve_torch`."""
    p, o, x, y = problem, options, problem.x[0], problem.y[0]
    n, m, eps = x.shape[0], y.shape[0], float(p.eps[0])
    own = FusedSelfMap(p, o, s_self) if o.debias else None
    if own is not None and not own.skipped:
        own.reach(FIRST_SELF_GOAL * o.tol * torch.sqrt(p.mean_cost))
    dot, kernel = EMPTY, workspace("kernel", n, m)
    if x.shape[1] > fused.DIRECT:
        products = workspace("products", n, m)
        dot = torch.mm(x, y.T, out=products).numpy()
    xn, yt, k, a, b = (
        x.numpy(),
        np.ascontiguousarray(y.numpy().T),
        kernel.numpy(),
        p.a[0].numpy(),
        p.b[0].numpy(),
    )
    log_b = torch.log(p.b[0]).clamp_min(-1e4)
    if s is None:
        levels = stages(p)
        psi = core.gaussian_start(p.x, p.y, p.a, p.b, p.eps * core.STAGE_RATIO**levels)[0]
        fused.anneal(dot, xn, yt, psi.numpy(), log_b.numpy(), eps, a, b, np.empty((1, m), F), levels)
        s, sweeps = psi / eps + log_b, levels
    else:
        s, sweeps = s[0].clone(), 0
    zt, log_row = np.ascontiguousarray(core.seen(y).numpy().T), np.empty(n, F)
    floor = float(resolution(p))
    share = (1 - SELF_SHARE) * o.tol
    plain, fast = (float(r) for r in core.accelerated_rate(p.x, p.y, p.eps))
    while True:
        base = core.seen(x if own is None else own.target[0]).contiguous()
        v, more, marginal, error, shot = fused.solve_pair(
            dot, xn, yt, s.numpy(), F(1.0 / eps), a, b, zt, base.numpy(), share, 0.5 * floor,
            max(o.max_iter - sweeps, 1), plain, fast, k, log_row,
        )  # fmt: skip
        sweeps += more
        if own is None or sweeps >= o.max_iter or own.settle(torch.from_numpy(shot)[None], error, floor):
            break
    z = torch.cat([y, s[:, None]], 1)
    if z.shape[1] <= 16:
        average = np.empty((n, z.shape[1]), F)
        fused.averages(k, v, np.ascontiguousarray(z.numpy().T), average)
        average = torch.from_numpy(average)
    else:
        v = torch.from_numpy(v)
        average = kernel @ (v[:, None] * z)
        average /= (kernel @ v)[:, None]
    target, mean_s = average[:, :-1], average[:, -1]
    speed = float(core.rms((target - (x if own is None else own.target[0]))[None], p.a))
    error = error + (0.0 if own is None else float(own.error))
    one = torch.ones_like(p.eps)
    return Solution(
        s[None], torch.from_numpy(log_row)[None], target[None], mean_s[None],
        None if own is None else own.target, None if own is None else own.s, None if own is None else own.mass,
        (one * sweeps).long(), one * marginal, one * ((error + floor) / max(speed, 1e-37)),
        torch.tensor([error <= max(o.tol * speed, floor) and math.isfinite(error)]),
        None if own is None else own.value(),
    )  # fmt: skip
