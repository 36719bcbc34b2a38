"""Exact (unregularised) transport: thin, checked doors to POT, and assignments that start from Sinkhorn's duals."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .sinkhorn_problem import has_numba, read_problem
from .sinkhorn_solve import Options, solve

GUESSED = 1000  # from so many points on a Sinkhorn solve first is worth its time


def _solve(x: Tensor, y: Tensor, a, b, max_iter: int) -> tuple[np.ndarray, float, torch.Tensor]:
    """The optimal plan, and its mean squared distance, in float64 on the CPU."""
    import ot  # imported here: it takes a second, and nothing else of gengrad.ot needs it

    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"exact: x has shape {tuple(x.shape)} and y {tuple(y.shape)}; allowed are (n, d) and (m, d).")
    p = read_problem(x.detach().cpu().double(), y.detach().cpu().double(), a=a, b=b)
    cost = torch.cdist(p.x[0], p.y[0]).square().numpy()
    plan, log = ot.emd(p.a[0].numpy(), p.b[0].numpy(), cost, numItermax=max_iter, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact: the network simplex stopped early ({log['warning']}); raise max_iter={max_iter}.")
    return plan, float(log["cost"]), p.a


def exact_plan(x: Tensor, y: Tensor, a=None, b=None, max_iter: int = 10_000_000) -> Tensor:
    """Optimal plan (n, m) for the cost |x - y|^2 / 2, on x's dtype and device; O(n^3), comfortable up to n = 5000.

    ValueError for bad clouds or weights (as `gengrad.ot.sinkhorn`), RuntimeError if `max_iter` pivots do not suffice.
    """
    plan, _, _ = _solve(x, y, a, b, max_iter)
    return torch.as_tensor(plan).to(x)


def exact_assignment(x: Tensor, y: Tensor, potential: Tensor | None = None, max_iter: int = 10_000_000) -> Tensor:
    """The permutation j(i) that minimises sum_i |x_i - y_j(i)|^2, int64 (n,), for clouds of equal size.

    ``potential``: a guess (n,) of the dual potential of y, as `gengrad.ot.sinkhorn` leaves it in `g`. Subtracting it
    from the costs changes the cost of every permutation alike, so the answer is exact whatever the guess is; with that
    of a loose Sinkhorn solve most points take their cheapest partner at once, and shortest augmenting paths find the
    rest (Jonker and Volgenant 1987; compiled where numba is installed, else scipy's).
    """
    if x.shape[:1] != y.shape[:1]:
        raise ValueError(
            f"exact_assignment: x has {x.shape[0]} points and y {y.shape[0]}; they must be as many: use exact_plan."
        )
    if potential is not None:
        return _from_potential(x, y, potential)
    plan, _, _ = _solve(x, y, None, None, max_iter)
    return torch.as_tensor(plan.argmax(1)).to(x.device)


def _from_potential(x: Tensor, y: Tensor, potential: Tensor) -> Tensor:
    if potential.shape != y.shape[:1]:
        raise ValueError(
            f"exact_assignment: a potential of shape {tuple(potential.shape)} for {y.shape[0]} points y; give one each."
        )
    points, others, centre = x.double(), y.double(), y.double().mean(0)
    others = others - centre  # no digits are lost in the products
    # |x - y|^2 / 2 up to a constant of each row, which no permutation sees
    cost = others.square().sum(1) / 2 - (points - centre) @ others.T
    if has_numba():
        from .assignment_numba import assign  # compiles at first use

        found = assign(cost.cpu().numpy(), potential.double().cpu().numpy().copy())
    else:
        from scipy.optimize import linear_sum_assignment

        reduced = cost - potential.double()
        found = linear_sum_assignment((reduced - reduced.amin(1, keepdim=True)).cpu().numpy())[1]
    return torch.as_tensor(found).to(x.device)


def wasserstein2(x: Tensor, y: Tensor, a=None, b=None, max_iter: int = 10_000_000) -> float:
    """W_2 between clouds, the root of the least mean |x - y|^2 (no half), exact up to float64.

    Large clouds of equal size and weights are assigned from the potential of a loose Sinkhorn solve, which at 4096
    points takes a quarter of the time of the network simplex that all others go to.
    """
    if a is None and b is None and x.shape == y.shape and x.ndim == 2 and len(x) >= GUESSED and has_numba():
        matched = y[exact_assignment(x, y, _loose_potential(x, y))]
        return float((x.double() - matched.double()).square().sum(1).mean()) ** 0.5
    return max(_solve(x, y, a, b, max_iter)[1], 0.0) ** 0.5


def _loose_potential(x: Tensor, y: Tensor) -> Tensor:
    """The dual potential of y (n,) after a bounded effort, converged or not."""
    p = read_problem(x.detach().cpu().float(), y.detach().cpu().float(), epsilon_rel=0.002)
    options = Options(0.5, 60, debias=False, skip_self_mass=1.0, max_memory=2e9, products="same", backend="auto")
    solution, _ = solve(p, options, None, None)
    return solution.g.to(x.device)
