"""Where exact implicit steps bring the points of a measure, as far as closed forms and solvers know."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.families import Members
from gengrad.data.family_members import AnnulusMembers, BarenblattMembers, GaussianMembers, ProductMembers
from gengrad.data.gaussians import Gaussian
from gengrad.data.profiles import Barenblatt
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, truth_of_flow
from gengrad.flows.implicit_steps import Reference, State, of_coordinates, of_one_member, of_the_cloud, on_the_line
from gengrad.flows.operator_transport import OperatorTransport
from gengrad.ot import bures_map


def reference_of(transport: OperatorTransport, law: Distribution, x: Tensor, log_rho: Tensor | None) -> Reference:
    """Where exact implicit steps bring the points x (n, d) of ``law``; raises ``ValueError`` where nothing is known.

    Gaussians under quadratic potentials and entropy, profiles that keep their shape: closed forms. Energies of
    particles: the steps of the very cloud. On the line any density under potential and internal energies:
    ``implicit_step``.
    """
    truth = truth_of_flow({"functional": transport.terms, "tau": transport.tau}, law)
    if isinstance(truth, GaussianTruth):
        return partial(_gaussian_steps, truth, x, log_rho)
    if isinstance(truth, RadialTruth):
        eye = torch.eye(x.shape[1], dtype=torch.float64)
        return lambda k: _affine(eye * truth.implicit(k) / truth.implicit(0), torch.zeros(1).double(), x, log_rho)
    functional = transport.functional()
    if not functional.needs_density:
        return of_the_cloud(functional, transport.tau, x)
    if x.shape[1] > 1:
        raise ValueError("no reference is known here: neither a closed form nor a density on the line")
    return on_the_line(functional, transport.tau, law.log_density, x, log_rho)


def reference_of_member(
    transport: OperatorTransport, members: Members, x: Tensor, log_rho: Tensor
) -> Reference | None:  # fmt: skip
    """The same for the one member of a family; none where nothing is known.

    On the line all but annuli, whose density has a gap. In the plane and in space: Gaussians, Barenblatt profiles of
    the same m under an energy that is the same everywhere, and independent coordinates where the functional is a sum
    over them.
    """
    functional, tau, d = transport.functional(), transport.tau, x.shape[1]
    if not functional.needs_density:
        return of_the_cloud(functional, tau, x)
    if d == 1:
        gap = isinstance(members, AnnulusMembers)
        return None if gap else on_the_line(functional, tau, partial(of_one_member, members), x, log_rho)
    with suppress(ValueError):  # nothing is known
        if isinstance(members, ProductMembers):
            return of_coordinates(functional, tau, members, x, log_rho)
        if isinstance(members, BarenblattMembers):
            return _of_profile(transport, members, x, log_rho)
        if isinstance(members, GaussianMembers) and members.means.shape[1] == 1:
            mean, factor = members.means[0, 0], members.factors[0, 0]
            law = Gaussian(mean=mean.tolist(), covariance=(factor @ factor.mT).tolist())
            return reference_of(transport, law, x, log_rho)
    return None


def _of_profile(transport: OperatorTransport, members: BarenblattMembers, x: Tensor, log_rho: Tensor) -> Reference:
    """Around its own centre, where the energy has none."""
    law = Barenblatt(radius=float(members.sizes[0, 0]), m=members.m, dimension=x.shape[1])
    truth = truth_of_flow({"functional": transport.terms, "tau": transport.tau}, law)
    if not isinstance(truth, RadialTruth) or truth.stiffness:
        raise ValueError("no reference is known here: the profile of another equation, or a bowl")
    centre = members.centres[0]
    around = reference_of(transport, law, x - centre, log_rho)

    def state(k: int) -> State:
        moved, logs = around(k)
        return moved + centre, logs

    return state


def _gaussian_steps(truth: GaussianTruth, x: Tensor, log_rho: Tensor | None, k: int) -> State:
    """Step by step: where covariances do not commute, the maps of k steps are not the optimal map from start to end."""
    state = (x, log_rho)
    for step in range(k):
        state = _affine(*bures_map(*truth.implicit(step), *truth.implicit(step + 1)), *state)
    return state


def _affine(q: Tensor, b: Tensor, x: Tensor, log_rho: Tensor | None) -> State:
    log_rho = None if log_rho is None else log_rho.double() - torch.linalg.slogdet(q).logabsdet
    return x.double() @ q.mT + b, log_rho
