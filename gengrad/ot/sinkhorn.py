"""Entropic optimal transport between point clouds, and the velocity of the Sinkhorn divergence's gradient flow.

Everywhere the cost is |x - y|^2 / 2 and OT_eps(a, b) = min_P <P, c> + eps KL(P | a x b). Elsewhere: geomloss has the
same cost with blur = sqrt(epsilon); POT and ott-jax have the unhalved cost, so their epsilon is 2 epsilon.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .sinkhorn_kernels import product
from .sinkhorn_problem import Problem, read_problem
from .sinkhorn_solve import Options, Solution, solve

log = logging.getLogger(__name__)

MAX_MEMORY = 2 * 2**30  # bytes for the n x m buffers of one solve


@dataclass(frozen=True)
class SinkhornResult:
    """A solved transport, or a batch of them (then every field has a leading batch dimension).

    The gauge of the potentials is <a, f> = <b, g>. `velocity` is `target - self_target` with debiasing and
    `target - x` without. Pass the whole result as `warm_start` of the next call on a nearby problem.
    """

    f: Tensor  # (n,) row potential, cost units
    g: Tensor  # (m,) column potential
    target: Tensor  # (n, d) barycentric map of x: sum_j P_ij y_j / a_i
    velocity: Tensor  # (n, d) minus the Wasserstein gradient
    converged: Tensor  # bool: the estimated velocity error is below tol, or below what the dtype resolves
    velocity_error: Tensor  # estimated relative error of `velocity` (rms), rounding included
    iterations: Tensor  # sweeps over the x-y kernel, annealing stages included
    marginal_error: Tensor  # sum_j |(P'1)_j - b_j|; the rows are exact
    effective_neighbours: Tensor  # mean over rows of exp(entropy of the row)
    epsilon: Tensor  # absolute
    self_target: Tensor | None  # (n, d) barycentric map of x onto itself; x where that solve was skipped
    self_potential: Tensor | None  # (n,) of OT(x, x); None where not solved
    self_mass: Tensor | None  # mean diagonal of the row-normalised P^{xx}; a lower bound where skipped
    value: Tensor  # OT_eps(x, y), the dual value <a, f> + <b, g>
    self_value: Tensor | None  # OT_eps(x, x)
    backend: str  # "torch" or "numba"
    _problem: Problem = field(repr=False)
    _versions: tuple[int, int] = field(repr=False)

    def sample_targets(self, generator: torch.Generator | None = None, block: int = 2**22) -> Tensor:
        """One target index per point, drawn from its row of the plan: P(j | i) = P_ij / a_i; shape (n,), int64.

        Rows are rebuilt `block` entries at a time and inverted from one uniform number each. The generator must be
        on the device of the points. In a batch indices count within each problem's y. RuntimeError if
        the points have been changed in place since the solve.
        """
        p = self._problem
        if (p.x._version, p.y._version) != self._versions:
            raise RuntimeError(
                "sample_targets: the points were changed in place since the solve, so their plan is gone; draw before "
                "the step, or step with x = x + tau * v."
            )
        x, y, g, eps = p.x, p.y, self.g.reshape(p.b.shape), p.eps
        uniform = torch.rand(x.shape[:2], generator=generator, dtype=x.dtype, device=x.device)
        s = g / eps[:, None] + torch.log(p.b) - y.square().sum(-1) / (2 * eps[:, None])
        rows = max(1, block // (y.shape[1] * len(y)))
        drawn = []
        for i in range(0, x.shape[1], rows):
            logits = product(x[:, i : i + rows] / eps[:, None, None], y) + s[:, None, :]
            cumulative = torch.softmax(logits, -1).cumsum(-1)
            level = uniform[:, i : i + rows, None] * cumulative[..., -1:]
            drawn.append(torch.searchsorted(cumulative, level, right=True)[..., 0].clamp_max(y.shape[1] - 1))
        drawn = torch.cat(drawn, 1)
        return drawn[0] if p.single else drawn


def _options(tol, max_iter, debias, skip_self_mass, max_memory, products, backend) -> Options:
    if not tol > 0:
        raise ValueError(f"sinkhorn: tol is {tol}; it must be positive: the relative error of the velocity (1e-2).")
    if not max_iter >= 1:
        raise ValueError(f"sinkhorn: max_iter is {max_iter}; it must be at least 1.")
    for name, value, allowed in (
        ("products", products, ("same", "bf16")),
        ("backend", backend, ("auto", "torch", "numba")),
    ):
        if value not in allowed:
            raise ValueError(f"sinkhorn: {name} is {value!r}; allowed: {', '.join(allowed)}.")
    return Options(float(tol), int(max_iter), debias, skip_self_mass, max_memory, products, backend)


def _warm(problem: Problem, warm: SinkhornResult | None, debias: bool) -> tuple[Tensor | None, Tensor | None]:
    """The previous potentials g (B, m) and, for the self map, h (B, n): a start at any points and epsilon."""
    if warm is None:
        return None, None
    p, g, h = problem, warm.g.reshape(-1, warm.g.shape[-1]), warm.self_potential
    if g.shape != p.b.shape:
        raise ValueError(
            f"sinkhorn: warm_start has potentials of shape {tuple(warm.g.shape)} for {tuple(p.b.shape)} targets; pass "
            "the result of a call with the same number of problems and targets, or None."
        )
    if not debias or h is None or h.numel() != p.a.numel():
        return g.to(p.x), None
    return g.to(p.x), h.reshape(p.a.shape).to(p.x)


def _result(p: Problem, r: Solution, backend: str) -> SinkhornResult:
    """Back to the caller's coordinates and shapes, with a warning where a tolerance was missed."""
    if not bool(r.converged.all()):
        errors = torch.where(r.converged, 0.0, r.velocity_error).reshape(-1)
        worst = int(errors.argmax())
        log.warning(
            "sinkhorn: %d of %d problems missed the tolerance; the worst (number %d) has an estimated velocity error "
            "of %.2g after %d iterations at epsilon %.3g. Raise max_iter or epsilon, loosen tol, or use float64.",
            int((~r.converged).sum()), len(errors), worst, float(errors[worst]),
            int(r.iterations.reshape(-1)[worst]), float(p.eps[worst]),
        )  # fmt: skip
    named = vars(r)
    if backend == "torch" and p.centre is not None:  # the fused path is back already
        centre = p.centre[0] if p.single else p.centre
        named["target"] = r.target + centre
        named["self_target"] = None if r.self_target is None else r.self_target + centre
    elif r.self_target is not None and r.self_target.data_ptr() == p.x.data_ptr():
        named["self_target"] = r.self_target.clone()  # a skipped self map: no alias of the caller's points
    eps, versions = p.eps[0] if p.single else p.eps, (p.x._version, p.y._version)
    return SinkhornResult(**named, epsilon=eps, backend=backend, _problem=p, _versions=versions)


@torch.no_grad()
def _run(x, y, epsilon, epsilon_rel, a, b, warm_start, options: Options) -> SinkhornResult:
    problem = read_problem(x, y, epsilon, epsilon_rel, a, b)
    return _result(problem, *solve(problem, options, *_warm(problem, warm_start, options.debias)))


def sinkhorn(
    x: Tensor, y: Tensor, epsilon=None, epsilon_rel: float = 0.05, a=None, b=None, tol: float = 1e-2,
    max_iter: int = 2000, warm_start: SinkhornResult | None = None, *,
    max_memory: float = MAX_MEMORY, products: str = "same", backend: str = "auto",
) -> SinkhornResult:  # fmt: skip
    """Entropic transport from x to y: potentials, barycentric map, and the plan's rows to draw from.

        P = argmin <P, |x - y|^2 / 2> + eps KL(P | a x b),    target_i = sum_j P_ij y_j / a_i,   velocity = target - x.

    Shapes: x (n, d), y (m, d), or batches (B, n, d), (B, m, d), which are solved together; weights a (n,) or (B, n)
    and b likewise, non-negative, summing to 1 within 1e-3 (then normalised exactly); None is uniform. The strength is
    `epsilon` (units of |x|^2; a number or one per problem) or, if that is None, `epsilon_rel` times the mean of
    |x_i - y_j|^2 / 2 over all pairs, per problem; if that mean is zero, `epsilon_rel` itself.

    `tol` is the relative rms error of `velocity`, estimated (see docs/sinkhorn.md), not a marginal error.
    `warm_start` is an earlier result for the same y (its g is the start); a poor one costs time, not accuracy.
    `max_memory` bounds the n x m buffers in bytes; beyond it, blocks of rows are recomputed in every sweep.
    `products="bf16"` rounds the factors of x y' and of P y to bfloat16 (velocity errors of 0.2 to 2 %).
    fp32 and fp64 are honoured, half precision is read as fp32. On CUDA the fp32 products follow
    torch.backends.cuda.matmul.allow_tf32, which PyTorch leaves off.

    Raises ValueError for points that are not finite, shapes, dtypes or devices that disagree, and parameters out of
    range. An unmet tolerance is not an error: `converged` is False and a warning is logged.
    Sources: Cuturi 2013; Schmitzer 2019 (scaling, absorption); Walker and Ni 2011 (Anderson acceleration).
    """
    options = _options(tol, max_iter, False, 1.0, max_memory, products, backend)
    return _run(x, y, epsilon, epsilon_rel, a, b, warm_start, options)


def sinkhorn_velocity(
    x: Tensor, y: Tensor, epsilon=None, epsilon_rel: float = 0.05, a=None, b=None, tol: float = 1e-2,
    max_iter: int = 2000, warm_start: SinkhornResult | None = None, *, debias: bool = True,
    skip_self_mass: float = 0.99, max_memory: float = MAX_MEMORY, products: str = "same", backend: str = "auto",
) -> SinkhornResult:  # fmt: skip
    """Velocity of the Wasserstein gradient flow of the Sinkhorn divergence to y, at the points of x.

        v(x_i) = sum_j P^{xy}_ij y_j / a_i - sum_j P^{xx}_ij x_j / a_i      (NSGF, arXiv 2401.14069, section 3)

    which is minus the Wasserstein gradient of S_eps(x, y) = OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2: no derivative
    goes through the iterations, and OT(y, y) is never solved. `debias=False` leaves P^{xx} out (v = target - x),
    which shrinks the cloud. The self solve is skipped, its map being the identity, where a rigorous bound puts the
    self mass at `skip_self_mass` or above and the velocity's error well below `tol`; a value above 1 never skips.
    The other arguments, shapes and errors raised are those of `sinkhorn`.
    """
    options = _options(tol, max_iter, debias, skip_self_mass, max_memory, products, backend)
    return _run(x, y, epsilon, epsilon_rel, a, b, warm_start, options)
