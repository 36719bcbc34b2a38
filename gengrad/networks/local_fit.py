"""The score and the Hessian of a log density that is known at the points of a cloud, by local quadratic regression."""

from __future__ import annotations

import torch
from torch import Tensor

from gengrad.kernel_moments import KernelMoments
from gengrad.networks.kernels import Marks, whole

# what a squared slope over a width, and a squared second derivative over its square, weigh beside a squared error: the
# values have no noise, but where few particles are near a fit would turn wildly
SLOPE, BEND = 1e-3, 1e-2
NOBODY = 1e-9  # added to the share of a kernel's particles whose log density is known, and the price of the constant


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # powers of coordinates that cancel each other need double precision
@torch.autocast("cuda", enabled=False)
def fitted(particles: Tensor, log_density: Tensor, h: Tensor) -> Marks:
    """The marks of particles (..., N, d) of which log rho (..., N) is known; NaN and infinite where it is not.

    At each particle x_i the polynomial p(z) = c + s'z + z'Hz / 2 of z = x_j - x_i that minimises
    E[k_h(z) (p(z) - log rho(x_j))^2] over the particles of which it is known, plus E[k_h] (``SLOPE`` |h s|^2 + ``BEND``
    times the squares of the coefficients of z_a z_b / h^2): local quadratic regression (Fan and Gijbels, *Local
    Polynomial Modelling and Its Applications*, 1996, section 3.1) of values without noise, so that it matters little
    how the points lie. ``h`` (..., 1, 1) is the width of the Gaussian kernel and the unit of the marks, which are zero
    where nothing is known, and where the fit is not finite.
    """
    d, dtype = particles.shape[-1], particles.dtype
    x, known = particles.double(), log_density.isfinite()[..., None].double()
    h, told = h.double().expand(*x.shape[:-2], 1, 1), known.mean(-2, keepdim=True)
    if not known.any():
        columns = torch.zeros(*x.shape[:-1], d * (d + 3) // 2, dtype=dtype, device=x.device)
        return Marks(columns, h.to(dtype), told.to(dtype))
    values = torch.where(known > 0, log_density.double()[..., None], 0.0)
    values = values - values.mean(-2, keepdim=True) / told.clamp_min(NOBODY)  # a constant says nothing and costs digits
    basis = _basis(x)
    terms = basis.shape[-1]
    rows, columns = torch.triu_indices(terms, terms, device=x.device)
    sums = known * torch.cat([basis[..., rows] * basis[..., columns], basis * values], -1)
    flat = [z.reshape(-1, *z.shape[-2:]) for z in (x, h, sums)]
    found = KernelMoments.apply(flat[0], flat[0], flat[1], 1, 1, flat[2])[0, ..., 1 + d :]
    found = found.reshape(*x.shape[:-1], -1)
    normal = found.new_empty(*x.shape[:-1], terms, terms)
    normal[..., rows, columns] = normal[..., columns, rows] = found[..., : len(rows)]
    to_own = _shift(x, h)  # the basis around each particle, in units of h
    normal, right = to_own @ normal @ to_own.mT, (to_own @ found[..., len(rows) :, None])[..., 0]
    count = normal[..., :1, 0] + NOBODY
    right = right - normal[..., 0] * right[..., :1] / count  # about the mean of the values: the constant has no price
    price = torch.full((terms,), BEND, dtype=x.dtype, device=x.device)
    price[0], price[1 : 1 + d] = NOBODY, SLOPE
    # a cloud that is far wider than h is singular up to rounding; no error then, for training passes over such states
    found = torch.linalg.solve_ex(normal / count[..., None] + torch.diag(price), right / count)[0]
    score = found[..., 1 : 1 + d] / h
    rows, columns = torch.triu_indices(d, d, device=x.device)
    hessian = found[..., 1 + d :] * (1 + (rows == columns).to(found)) / h**2  # z_a^2 has the coefficient H_aa / 2
    start = score - (whole(hessian, d) @ x[..., None])[..., 0]
    return Marks(torch.cat([start, hessian], -1).nan_to_num(0.0, 0.0, 0.0).to(dtype), h.to(dtype), told.to(dtype))


def _basis(x: Tensor) -> Tensor:
    """1, the coordinates, their products: (..., 1 + d + d (d + 1) / 2)."""
    rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1])
    return torch.cat([torch.ones_like(x[..., :1]), x, x[..., rows] * x[..., columns]], -1)


def _shift(x: Tensor, h: Tensor) -> Tensor:
    """(..., N, terms, terms) that takes the basis at s to the one at (s - x) / h."""
    d = x.shape[-1]
    pairs = torch.triu_indices(d, d).T.tolist()
    shift = torch.zeros(*x.shape[:-1], *[1 + d + len(pairs)] * 2, dtype=x.dtype, device=x.device)
    h = h[..., 0]
    shift[..., 0, 0] = 1
    for a in range(d):
        shift[..., 1 + a, 1 + a] = 1 / h
        shift[..., 1 + a, 0] = -x[..., a] / h
    for row, (a, b) in enumerate(pairs, 1 + d):
        shift[..., row, row] = 1 / h**2
        shift[..., row, 1 + a] -= x[..., b] / h**2
        shift[..., row, 1 + b] -= x[..., a] / h**2
        shift[..., row, 0] = x[..., a] * x[..., b] / h**2
    return shift
