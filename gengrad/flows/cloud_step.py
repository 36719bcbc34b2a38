"""Exact implicit steps of a cloud, particle by particle, for energies of particles: a reference in any dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gengrad.functionals.base import Functional

RESIDUAL = 1e-6  # of the cloud's deviation, where the search ends
ALLOWED = 2e-4  # the same, as what is taken for a minimum; or five times that of the way
MOST = 2000  # iterations of the minimiser
ROUNDS = 10  # searches, each from the last one's particles in order
KEPT = 30  # pairs of steps and gradients that stand for its Hessian


def implicit_cloud_step(functional: Functional, x: Tensor, tau: float) -> Tensor:
    """argmin over y (n, d) of mean |y_i - x_i|^2 / 2 + tau F(y), the JKO step of the very cloud x (n, d); float64.

    L-BFGS from x (scipy), for residuals y_i - x_i + tau n dF/dy_i of 1e-6 of the cloud's deviation; taken where they
    are at most 2e-4 of it or a thousandth of the way in root mean square (Sinkhorn has its tolerance). Where F is not
    convex, the minimum next to x. On the line the particles keep their order, as they do in every step of W2: where the
    search has exchanged some (a singular W is no wall for it), they are put in order, which leaves F and shortens the
    way, and it goes on from there. Raises ``ValueError`` for energies with a density, and where it does not converge,
    as where F has a kink at the minimum.
    """
    from scipy.optimize import minimize

    if functional.needs_density:
        raise ValueError("the implicit step of a cloud is solved for energies of particles, without a density")
    start = x.detach().double()
    deviation = float((start - start.mean(0)).square().mean().sqrt())

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        y = torch.from_numpy(flat).view_as(start).requires_grad_(True)
        value = (y - start).square().sum() / 2 + tau * len(start) * functional(y, None)
        (gradient,) = torch.autograd.grad(value, y)
        return float(value.detach()), gradient.flatten().numpy()

    options = {"maxiter": MOST, "maxfun": 4 * MOST, "maxcor": KEPT, "gtol": RESIDUAL * deviation, "ftol": 0.0}
    y, order = start, start[:, 0].argsort()
    for _ in range(ROUNDS):
        found = minimize(objective, y.flatten().numpy(), jac=True, method="L-BFGS-B", options=options)
        y = torch.from_numpy(found.x).view_as(start)
        if start.shape[1] > 1 or bool((y[order, 0].diff() >= 0).all()):
            break
        y = y.clone()
        y[order, 0] = y[:, 0].sort().values
    else:
        raise ValueError(f"the implicit step of the cloud exchanges particles after {ROUNDS} rounds")
    left, way = float(np.square(found.jac).mean()) ** 0.5, float((y - start).square().mean().sqrt())
    if not left <= ALLOWED * max(deviation, 5 * way):
        raise ValueError(f"the implicit step of the cloud did not converge: residual {left:.3g} of a way of {way:.3g}")
    return y
