"""Samples and their bill: for the time of one call another solver, and a count of the evaluations that happen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor, nn

from gengrad.flows.solvers import SOLVERS
from gengrad.flows.transports import Transport


@dataclass(frozen=True)
class Samples:
    """Samples (n, *event) with what they cost: ``nfe`` network evaluations per sample, counted, and ``seconds``.

    ``others``: evaluations per sample of networks that are no velocities, by name. ``y``: the classes (n,) asked for.
    """

    x: Tensor
    nfe: float
    seed: int
    seconds: float
    others: dict[str, float] = field(default_factory=dict)
    y: Tensor | None = None

    @property
    def bill(self) -> str:
        """What each sample cost, in words."""
        apart = "".join(f", and {count:g} of the {name}" for name, count in self.others.items())
        return f"{self.nfe:g} network evaluations each (counted){apart}"


@contextmanager
def solved_by(transports: Iterable[Transport], solver: str | None) -> Iterator[None]:
    """Another solver, where a transport has one; ``ValueError`` for one that is not known."""
    if solver is not None and solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
    chosen = [t for t in transports if solver is not None and hasattr(t, "solver")]
    before = [t.solver for t in chosen]
    for transport in chosen:
        transport.solver = solver
    try:
        yield
    finally:
        for transport, old in zip(chosen, before):
            transport.solver = old


@contextmanager
def counting(transports: Iterable[Transport]) -> Iterator[dict[str, int]]:
    """Evaluations times samples, counted as they happen: of velocities under "", of other networks by their name."""
    counted = {"": 0}

    def count_as(name: str) -> Callable[[nn.Module, tuple], None]:
        def count(module: nn.Module, inputs: tuple) -> None:
            counted[name] = counted.get(name, 0) + len(inputs[0])

        return count

    hooks = []
    for transport in transports:
        hooks += [net.register_forward_pre_hook(count_as("")) for net in transport.velocity_networks()]
        hooks += [net.register_forward_pre_hook(count_as(name)) for name, net in transport.other_networks().items()]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()
