"""The objective of a JKO step over many measures at once, and its gradient by scores or through log det."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gengrad.functionals.base import Density
from gengrad.functionals.expression import gradient_of, has_pairs
from gengrad.methods.jko_affine import JKOProblem
from gengrad.networks.kernels import Marks
from gengrad.networks.set_operator import FOLD, Context, determinant, log_without_folds


def scored_push(network: nn.Module, x: Tensor, context: Context, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(T x, det DT, grad log rho'(T x)) for x and score (..., n, d), detached; the context that of the measures.

    log rho'(T x) = log rho(x) - log det DT(x), so that grad log rho'(T x) = DT^{-T} (score - grad log det DT).
    """
    if not bool(score.isfinite().any()):  # no measure is smooth
        with torch.no_grad():
            moved, jacobian = network(x, context, jacobian=True)
        return moved, determinant(jacobian), score
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        moved, jacobian = network(leaf, context, jacobian=True)
        det = determinant(jacobian)
        (slope,) = torch.autograd.grad(det.clamp_min(FOLD).log().sum(), leaf)
    jacobian, det = jacobian.detach(), det.detach()
    # a singular matrix is that of a fold, whose density is not used: anything that can be solved will do
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    safe = torch.where((det.abs() < 1e-6)[..., None, None], eye, jacobian)
    return moved.detach(), det, torch.linalg.solve(safe.mT, (score - slope)[..., None])[..., 0]


def step_loss(
    jko: JKOProblem, x: Tensor, y: Tensor, log_rho: Tensor | None = None, log_det: Tensor | None = None
) -> Tensor:
    """E |y - x|^2 / (2 tau) + F of the particles y = T x, the mean over measures; x, y (measures, n, d).

    ``log_rho``, ``log_det`` (measures, n): log rho(x) and log det DT(x), for functionals with a density.
    """
    if not has_pairs(jko.functional):  # a mean over particles: that over all measures at once
        flat = [None if v is None else v.flatten(0, 1) for v in (x, y, log_rho, log_det)]
        return jko.objective(*flat) / jko.tau
    empty = [None] * len(x)
    rows = zip(x, y, empty if log_rho is None else log_rho, empty if log_det is None else log_det)
    return torch.stack([jko.objective(*row) for row in rows]).mean() / jko.tau


def loss_by_log_det(
    jko: JKOProblem, network: nn.Module, x: Tensor, seen: Tensor, log_rho: Tensor,
    known: Tensor | Marks | None = None,
) -> Tensor:  # fmt: skip
    """``step_loss`` through log det DT: for any density, also one that ends at an edge. ``known``: log rho of ``seen``

    or its marks, for networks that take it.
    """
    y, jacobian = network(x, seen, jko.tau, jko.weights, jacobian=True, log_density=known)
    return step_loss(jko, x, y, log_rho, log_without_folds(determinant(jacobian)))


def loss_by_score(
    jko: JKOProblem, network: nn.Module, x: Tensor, seen: Tensor, log_rho: Tensor, moved: Tensor, det: Tensor,
    after: Tensor, weight: Tensor, known: Tensor | Marks | None = None,
) -> Tensor:  # fmt: skip
    """``step_loss`` with the gradient E <(T x - x) / tau + grad dF/drho'(T x), dT>, internal energies by parts.

    On average that is the gradient through log det, for smooth densities on all of space; but at the minimum it is
    zero particle by particle. ``moved``, ``det``, ``after``: T x, det DT and the score there, of ``scored_push``;
    ``weight`` (measures, n): of the particles in the mean.
    """
    flat = [values.flatten(0, 1) for values in (moved, log_rho - det.log(), after)]
    field = gradient_of(jko.functional, flat[0], Density(flat[1], flat[2])).view_as(x) + (moved - x) / jko.tau
    slope = (weight * (field * network(x, seen, jko.tau, jko.weights, log_density=known)).sum(-1)).mean()
    with torch.no_grad():
        value = step_loss(jko, *(taken(values, evened(weight)) for values in (x, moved, log_rho, det.log())))
    return value + slope - slope.detach()


def evened(weight: Tensor) -> Tensor:
    """Numbers (measures, n) of particles that weigh the same, for those of ``weight`` (measures, n).

    Systematic resampling with the middle of each nth: where all weights are the same, each particle once.
    """
    n = weight.shape[-1]
    shares = weight.double().cumsum(-1)
    places = (torch.arange(n, dtype=torch.float64, device=weight.device) + 0.5) / n
    return torch.searchsorted(shares / shares[..., -1:], places.expand_as(shares).contiguous()).clamp_max(n - 1)


def taken(values: Tensor, numbers: Tensor) -> Tensor:
    """The particles of these numbers (measures, n) of values (measures, n) or (measures, n, d)."""
    return torch.take_along_dim(values, numbers if values.dim() == 2 else numbers[..., None], 1)
