"""NSGF++ at sampling time: a few Sinkhorn steps, a guess of the time reached, then straight to the target."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from gengrad.flows.solvers import EVALUATIONS, SOLVERS, integrate
from gengrad.flows.transports import KINDS, Condition, Transport, conditioned
from gengrad.networks.time_predictor import TimePredictor
from gengrad.registry import NETWORKS, settings_of


class PhasedTransport(Transport):
    """Two phases on one clock (arXiv 2401.14069, algorithm 4); a part is None until its stage is trained.

    1. dx/dt = network(x, t) from 0 to ``until``, at most ``most`` Euler steps;
    2. tau = predictor(x), one for each sample, within [``earliest``, 1); ``fixed_tau`` for all where it is given, and
       ``until`` for all where there is no predictor;
    3. dx/dt = straight(x, t) from tau to 1 by ``solver``. ``shared``: ``network`` serves this phase as well.

    ``phase_1``: how many of the evaluations the first phase gets; None shares them out (``split``). A flow without a
    straight phase, which an unfinished training leaves, stops after the first.
    """

    kind = "phased"
    default_nfe = 10

    def __init__(
        self,
        network: nn.Module,
        until: float,
        *,
        predictor: TimePredictor | None = None,
        straight: nn.Module | None = None,
        shared: bool = False,
        fixed_tau: float | None = None,
        earliest: float = 0.0,
        most: int = 5,
        phase_1: int | None = None,
        solver: str = "euler",
    ):
        super().__init__()
        if not 0 < until < 1 or not 0 <= earliest <= until:
            raise ValueError(f"the phases need 0 <= earliest <= until < 1, 0 < until; got {earliest} and {until}")
        if solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        if fixed_tau is not None and not 0 <= fixed_tau < 1:
            raise ValueError(f"tau, where the straight phase starts, is in [0, 1); got {fixed_tau}")
        self.network, self.predictor, self.straight = network, predictor, straight
        self.until, self.earliest, self.most, self.shared = until, earliest, most, shared
        self.fixed_tau, self.phase_1, self.solver = fixed_tau, None, solver
        self.set_phases(phase_1)

    @property
    def second(self) -> nn.Module | None:
        """The network of the straight phase."""
        return self.network if self.shared else self.straight

    def set_phases(self, phase_1: int | None = None, fixed_tau: float | None = None) -> None:
        """Another share of the budget for phase 1, another start of the straight phase; ``ValueError`` if amiss."""
        if phase_1 is not None and not 0 <= phase_1 <= self.most:
            raise ValueError(f"the Sinkhorn phase has 0 to {self.most} steps; got {phase_1}")
        if fixed_tau is not None and not self.earliest <= fixed_tau < 1:
            start = f"{self.earliest:g}"
            raise ValueError(f"the straight flow was trained from {start} on; tau is in [{start}, 1), got {fixed_tau}")
        self.phase_1 = self.phase_1 if phase_1 is None else phase_1
        self.fixed_tau = self.fixed_tau if fixed_tau is None else fixed_tau

    def path(
        self,
        x: Tensor,
        generator: torch.Generator | None = None,
        nfe: int | None = None,
        condition: Condition | None = None,
    ) -> Iterator[Tensor]:
        first, rest = self.split(nfe)
        end = self.until if rest or self.second is None else 1.0
        for state in integrate(conditioned(self.network, condition), x, 0.0, end, first, "euler"):
            x = state
            yield x
        if rest:
            yield from self._straight(x, self.tau(x), rest, condition)

    def tau(self, x: Tensor) -> Tensor:
        """Where on the clock each of x (batch, *event) enters the straight phase, (batch,)."""
        if self.predictor is None or self.fixed_tau is not None:
            fixed = self.until if self.fixed_tau is None else self.fixed_tau
            return torch.full((len(x),), fixed, device=x.device)
        return self.predictor(x).clamp(self.earliest, 0.999)

    def _straight(self, x: Tensor, tau: Tensor, nfe: int, condition: Condition | None) -> Iterator[Tensor]:
        """Each sample from its own tau to 1: with t = tau + s (1 - tau), dx/ds = (1 - tau) u(x, t), s from 0 to 1."""
        u, left = conditioned(self.second, condition), 1 - tau
        wide = left.view(-1, *[1] * (x.dim() - 1))
        steps = nfe // EVALUATIONS[self.solver]
        yield from integrate(lambda z, s: wide * u(z, tau + s * left), x, 0.0, 1.0, steps, self.solver)

    def split(self, nfe: int | None) -> tuple[int, int]:
        """(evaluations of phase 1, of the straight phase) for a budget ``nfe``.

        Phase 1 gets half of it, at least one step and at most ``most``: the start of the way, where a sample takes its
        decisions, asks for the shorter steps. The rest must be steps of the solver. A budget of 1 is one Euler step of
        phase 1's network over the whole clock. Raises ``ValueError`` for a budget that cannot be spent so.
        """
        each = EVALUATIONS[self.solver]
        nfe = self.most + 5 * each if nfe is None else nfe
        if nfe < 1:
            raise ValueError(f"nfe is the number of network evaluations per sample, at least 1; got {nfe}")
        if self.second is None:
            return min(nfe, self.most), 0
        if self.phase_1 is not None:
            return self._asked(nfe, each)
        if nfe == 1:
            return 1, 0
        most = min(self.most, nfe - each)
        fitting = [k for k in range(1, most + 1) if (nfe - k) % each == 0]
        if not fitting:
            raise ValueError(
                f"nfe={nfe} leaves no room for a step of {self.solver!r} ({each} evaluations) after at least one of "
                f"the Sinkhorn phase; use nfe >= {each + 1} or --solver euler"
            )
        first = min(fitting, key=lambda k: abs(k - nfe / 2))
        return first, nfe - first

    def _asked(self, nfe: int, each: int) -> tuple[int, int]:
        """The split with ``phase_1`` evaluations in the first phase; ``ValueError`` where the rest cannot be spent."""
        rest = nfe - self.phase_1
        if rest < each or rest % each:
            raise ValueError(
                f"nfe={nfe} with {self.phase_1} steps of the Sinkhorn phase leaves {max(rest, 0)} evaluations for the "
                f"straight phase, which spends them in steps of {each}; raise nfe or lower the phase's steps"
            )
        return self.phase_1, rest

    def cost(self, nfe: int | None = None) -> int:
        return sum(self.split(nfe))

    def phases(self, nfe: int | None = None) -> list[tuple[str, int]]:
        first, rest = self.split(nfe)
        return [("Sinkhorn phase", first), ("straight phase", rest // EVALUATIONS[self.solver])]

    def velocity_networks(self) -> list[nn.Module]:
        return [self.network] + ([self.straight] if self.straight is not None else [])

    def other_networks(self) -> dict[str, nn.Module]:
        return {} if self.predictor is None else {"time predictor": self.predictor}

    def describe(self) -> dict:
        return {
            "kind": self.kind,
            "network": settings_of(self.network),
            "event_shape": list(self.network.event_shape),
            "predictor": None if self.predictor is None else self.predictor.config.model_dump(mode="json"),
            "straight": None if self.straight is None else settings_of(self.straight),
            **{key: getattr(self, key) for key in SETTINGS},
        }

    @classmethod
    def rebuild(cls, description: dict) -> PhasedTransport:
        shape = tuple(description["event_shape"])
        settings, straight = description["predictor"], description["straight"]
        return cls(
            NETWORKS.build(description["network"], event_shape=shape),
            predictor=None if settings is None else TimePredictor(event_shape=shape, **settings),
            straight=None if straight is None else NETWORKS.build(straight, event_shape=shape),
            **{key: description[key] for key in SETTINGS},
        )


SETTINGS = ("until", "earliest", "most", "shared", "fixed_tau", "phase_1", "solver")
KINDS[PhasedTransport.kind] = PhasedTransport
