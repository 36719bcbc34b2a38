"""A particle flow kept as a transport: new particles follow the velocity field of the cloud that has flowed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gengrad.data.draws import Keyed
from gengrad.flows.transports import KINDS, Noise, Transport
from gengrad.functionals.base import Functional, Sum, VelocityField, terms_of
from gengrad.functionals.expression import build_expression
from gengrad.functionals.internal import Entropy
from gengrad.registry import DATASETS


class ParticleCloud(Transport):
    """x + spread z, then x <- x + tau_k v_k(x) + sqrt(2 T tau_k) z_k, k = 0 .. K - 1; no network is evaluated.

    v_k is the velocity field that the cloud X^k causes under the functional of ``terms``, apart from its entropies: T,
    their weights' sum, becomes the temperature of the noise (unadjusted Langevin). ``states`` (K, N, *event): the
    cloud at the start of each step; ``samples`` (m, *event): the data's points that the terms take, m = 0 for none;
    ``data``: the settings of the data set whose log density they take. ``spread`` tells particles of one atom apart.
    """

    kind = "particle_cloud"

    def __init__(
        self, states: Tensor, samples: Tensor, taus: Sequence[float], terms: list[dict], data: dict | None = None,
        spread: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.register_buffer("states", states)
        self.register_buffer("samples", samples)
        self.taus, self.terms, self.data, self.spread = list(taus), terms, data, spread
        self._solved: tuple[Functional, float, list[VelocityField]] | None = None

    def path(self, x: Tensor, generator: Noise = None, nfe: int | None = None) -> Iterator[Tensor]:
        x = self.start(x, generator)
        for k in range(len(self.taus)):
            with torch.inference_mode(False):  # a functional may take its velocity by autograd
                v = self.field(k)(x.clone())
            x = self.step(x, k, v, generator)
            yield x

    def start(self, x: Tensor, generator: Noise = None) -> Tensor:
        """x with the noise that splits atoms."""
        return x + self.spread * _normal(x, generator, "spread") if self.spread else x

    def step(self, x: Tensor, k: int, v: Tensor, generator: Noise = None) -> Tensor:
        """x after step k with the velocity v."""
        x, temperature = x + self.taus[k] * v, self.forces()[1]
        if temperature:
            x = x + (2 * temperature * self.taus[k]) ** 0.5 * _normal(x, generator, f"step/{k}")
        return x

    def field(self, k: int) -> VelocityField:
        """The velocity field of step k; what it takes to solve is solved once."""
        functional, _, fields = self.forces()
        while len(fields) <= k:
            fields.append(functional.field(self.states[len(fields)]))
        return fields[k]

    def forces(self) -> tuple[Functional, float, list[VelocityField]]:
        """The functional without its entropies, the temperature T, and the fields that were asked for so far."""
        if self._solved is None:
            target = DATASETS.build(self.data) if self.data else None
            whole = build_expression(self.terms, target, self.samples if len(self.samples) else None)
            self._solved = (*without_entropy(whole), [])
        return self._solved

    def _apply(self, *arguments, **named):
        self._solved = None  # it holds the cloud as it was before it moved to another device or precision
        return super()._apply(*arguments, **named)

    def cost(self, nfe: int | None = None) -> int:
        """No network evaluations, whatever the budget."""
        return 0

    def describe(self) -> dict:
        shapes = {"states": list(self.states.shape), "samples": list(self.samples.shape)}
        settings = {"taus": self.taus, "terms": self.terms, "data": self.data, "spread": self.spread}
        return {"kind": self.kind, **shapes, **settings}

    @classmethod
    def rebuild(cls, description: dict) -> ParticleCloud:
        empty = [torch.zeros(description[name]) for name in ("states", "samples")]
        return cls(*empty, *(description[name] for name in ("taus", "terms", "data", "spread")))


KINDS[ParticleCloud.kind] = ParticleCloud


def _normal(x: Tensor, generator: Noise, purpose: str) -> Tensor:
    """Standard normal noise like x; each sample its own, whatever the batch, where the generator is keyed."""
    if isinstance(generator, Keyed):
        return replace(generator, purpose=f"{generator.purpose}/{purpose}").normal(*x.shape[1:]).to(x)
    return torch.randn(x.shape, generator=generator).to(x)


def without_entropy(functional: Functional) -> tuple[Functional, float]:
    """(G, T) with F = G + T Ent, where only G acts on particles by forces; raises ``ValueError`` for other densities.

    The flow of T Ent is the heat equation, which noise of variance 2 T tau a step gives particles.
    """
    terms = terms_of(functional)
    temperature = sum(weight for weight, term in terms if isinstance(term, Entropy))
    rest = Sum([(weight, term) for weight, term in terms if not isinstance(term, Entropy)])
    if rest.needs_density:
        names = ", ".join(type(term).__name__ for _, term in rest.terms if term.needs_density)
        raise ValueError(
            f"{names} needs a density, which particles do not have, and no noise acts like it, as it does for an "
            "entropy: take method.name=jko_icnn, whose maps carry densities"
        )
    if temperature < 0:
        raise ValueError(f"an entropy of weight {temperature:g} concentrates mass: no noise acts like it")
    return rest, float(temperature)


def growing_taus(total: float, steps: int) -> list[float]:
    """Steps between the times total (k / steps)^2: short ones first, where an atom has just burst."""
    return [total * (2 * k + 1) / steps**2 for k in range(steps)]
