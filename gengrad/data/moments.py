"""Points moved to the mean and covariance that they should have."""

from __future__ import annotations

import torch
from torch import Tensor


def moved_to(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """x (..., n, d) moved affinely to ``mean`` (..., d) and ``covariance`` (..., d, d); as it is where n <= 4 d.

    x -> m + L L_x^{-1} (x - mean(x)), L and L_x the lower Cholesky factors of both covariances: means over the cloud
    are far less noisy.
    """
    if x.shape[-2] <= 4 * x.shape[-1]:
        return x
    centred = x - x.mean(-2, keepdim=True)
    own = torch.linalg.cholesky(centred.mT @ centred / x.shape[-2])
    white = torch.linalg.solve_triangular(own, centred.mT, upper=False)
    return mean[..., None, :] + (torch.linalg.cholesky(covariance) @ white).mT
