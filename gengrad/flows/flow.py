"""The flow: the artefact that training leaves behind, to sample, to look at on its way, to save and to load."""

from __future__ import annotations

import hashlib
import os
import time
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor, nn

from gengrad.data.base import Distribution
from gengrad.data.draws import Keyed, draw, draw_labels
from gengrad.flows import asked, densities, operator
from gengrad.flows.metering import Samples, counting, solved_by
from gengrad.flows.stored import read_stored, write_stored
from gengrad.flows.transports import Condition, Transport, transport_from
from gengrad.registry import DATASETS, settings_of


class Flow(nn.Module):
    """A source and the transports that carry its mass to the target, in order.

    ``info`` is free JSON that travels with the flow: the method, its settings, training metrics. ``units`` (m, s): the
    transports work on normalised points, and what leaves the flow is m + s x. ``class_weights``: the share of each
    class in the data of a flow whose networks take classes.
    """

    def __init__(
        self,
        source: Distribution,
        transports: list[Transport] | None = None,
        info: dict | None = None,
        units: tuple[Tensor, float] | None = None,
        class_weights: list[float] | None = None,
    ):
        super().__init__()
        self.source, self.info, self.units = source, dict(info or {}), units
        self.class_weights = class_weights
        self.transports = nn.ModuleList(transports or [])

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.source.event_shape)

    @property
    def is_image(self) -> bool:
        return len(self.event_shape) == 3

    @property
    def is_phased(self) -> bool:
        """Whether one can choose how its phases are sampled (``choose``)."""
        return any(hasattr(t, "set_phases") for t in self.transports)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    # ---------------------------------------------------------------- sampling

    def sample(self, n: int, nfe: int | None = None, seed: int = 0, **options) -> Tensor:
        """``n`` samples (n, *event) on the CPU; ``draw_samples`` with the bill left out."""
        return self.draw_samples(n, nfe, seed, **options).x

    def draw_samples(
        self,
        n: int,
        nfe: int | None = None,
        seed: int = 0,
        *,
        first: int = 0,
        chunk: int = 4096,
        solver: str | None = None,
        label: int | None = None,
        guidance: float = 1.0,
        step: int | None = None,
    ) -> Samples:
        """Samples number ``first`` .. ``first + n - 1`` of the sequence keyed by ``seed``, and their counted cost.

        Sample i starts from the same source point whatever ``n``, ``first`` and ``chunk`` are, so that it comes out
        the same up to the rounding of differently shaped matrix products. ``step``: after that many of the flow's
        transports, not all. When a GPU's memory runs out the chunk is halved and the work goes on. Raises
        ``ValueError`` for what is no whole number or out of bounds, and an nfe that the transports cannot spend.

        A flow with classes gives sample i a class drawn like those of the data, or ``label`` to all; ``guidance`` above
        1 pulls towards it at twice the evaluations. Raises ``ValueError`` for either where there are no classes.
        """
        asked.check_sampling(n, nfe, seed, first, chunk)
        y = self._labels(first, first + n, seed, label, guidance)
        started, parts, position = time.perf_counter(), [], first
        with solved_by(self.transports, solver), counting(self.transports) as counted:
            budget = self.allocate(nfe)[: self.steps(step)]
            while position < first + n:
                stop = min(position + chunk, first + n)
                some = None if y is None else Condition(y[position - first : stop - first].to(self.device), guidance)
                try:
                    parts.append(self._push(position, stop, seed, budget, some).cpu())
                except torch.cuda.OutOfMemoryError:
                    if chunk == 1:
                        raise
                    torch.cuda.empty_cache()
                    chunk //= 2
                    continue
                position = stop
        others = {name: count / n for name, count in counted.items() if name}
        x, seconds = self._restore(torch.cat(parts)), time.perf_counter() - started
        return Samples(x, counted[""] / n, seed, seconds, others, y)

    def trajectory(
        self,
        n: int,
        nfe: int | None = None,
        seed: int = 0,
        solver: str | None = None,
        label: int | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """The same samples on their way: (steps + 1, n, *event), source first."""
        asked.check_sampling(n, nfe, seed)
        y = self._labels(0, n, seed, label, guidance)
        condition = {} if y is None else {"condition": Condition(y.to(self.device), guidance)}
        with torch.inference_mode(), solved_by(self.transports, solver):
            states = [draw(self.source, 0, n, seed, "source").to(self.device)]
            for number, (transport, share) in enumerate(zip(self.transports, self.allocate(nfe))):
                noise = Keyed(0, n, seed, f"latent/{number}")
                states += list(transport.path(states[-1], noise, share, **condition))
        return self._restore(torch.stack(states).cpu())

    def phases(self, nfe: int | None = None, solver: str | None = None) -> list[tuple[str, int]]:
        """(name, number of states) of the phases that ``trajectory`` goes through, where the transports have any."""
        with solved_by(self.transports, solver):
            return [phase for t, share in zip(self.transports, self.allocate(nfe)) for phase in t.phases(share)]

    @property
    def classes(self) -> int | None:
        """How many classes the flow's networks take; None where they take none."""
        found = (getattr(n, "classes", None) for t in self.transports for n in t.velocity_networks())
        return next((classes for classes in found if classes), None)

    def choose(self, settings: dict[str, object]) -> None:
        """Sets how phased transports are sampled (``phase_1``, ``fixed_tau``); ``ValueError`` where none is."""
        chosen = [t for t in self.transports if settings and all(hasattr(t, key) for key in settings)]
        if settings and not chosen:
            raise ValueError(f"this flow has no phases, so it takes no {' and no '.join(settings)}")
        for transport in chosen:
            transport.set_phases(**settings)

    def check_class(self, label: int | None, guidance: float) -> None:
        """Raises ``ValueError`` for a class, or a guidance, that the flow does not know."""
        asked.check_class(self.classes, self.class_weights, label, guidance)

    def _labels(self, first: int, stop: int, seed: int, label: int | None, guidance: float) -> Tensor | None:
        """The classes of samples ``first`` .. ``stop - 1``; None for a flow without classes."""
        self.check_class(label, guidance)
        if self.classes is None:
            return None
        if label is not None:
            return torch.full((stop - first,), label)
        return draw_labels(torch.tensor(self.class_weights or [1.0] * self.classes), first, stop, seed)

    def cost(self, nfe: int | None = None, solver: str | None = None) -> int:
        """Network evaluations that ``sample(nfe=nfe, solver=solver)`` spends a sample; ``ValueError`` if it cannot."""
        with solved_by(self.transports, solver):
            return sum(transport.cost(share) for transport, share in zip(self.transports, self.allocate(nfe)))

    def allocate(self, nfe: int | None) -> list[int | None]:
        """The share of ``nfe`` that each transport spends, larger first where it does not divide."""
        asked.check_nfe(nfe)
        count = len(self.transports)
        if nfe is None or count == 0:
            return [None] * count
        if nfe < count:
            raise ValueError(f"nfe={nfe} is less than one network evaluation for each of the flow's {count} transports")
        shares = [nfe // count + (k < nfe % count) for k in range(count)]
        return [transport.cost(share) for transport, share in zip(self.transports, shares)]

    def _push(self, start: int, stop: int, seed: int, budget: list[int | None], condition: Condition | None) -> Tensor:
        given = {} if condition is None else {"condition": condition}
        with torch.inference_mode():
            x = draw(self.source, start, stop, seed, "source").to(self.device)
            for number, (transport, share) in enumerate(zip(self.transports, budget)):
                x = transport.push(x, Keyed(start, stop, seed, f"latent/{number}"), share, **given)
        return x

    def _restore(self, x: Tensor) -> Tensor:
        return x if self.units is None else self.units[0].to(x) + self.units[1] * x

    def fingerprint(self) -> str:
        """SHA-256 of the weights."""
        digest = hashlib.sha256()
        for name, tensor in self.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()

    # ---------------------------------------------------------------- densities

    def log_density(self, x: Tensor, step: int | None = None, chunk: int = 4096) -> Tensor:
        """log density at x (n, *event) -> (n,) float64, after ``step`` of the transports (default: all).

        log rho_k(x) = log rho_0(x_0) - sum_j log det DT_j(x_{j-1}), x_0 .. x_k = x the way back, in float64.
        Raises ``ValueError`` where the source or a transport has no density.
        """
        return densities.log_density(self, x, step, chunk)

    def to_source(self, x: Tensor, step: int | None = None, chunk: int = 4096) -> Tensor:
        """The source points (n, *event), float64, that the first ``step`` transports carry to x; round trip 1e-6.

        Raises ``ValueError`` where a transport has no inverse, or a point lies where the inverse is not found.
        """
        return densities.to_source(self, x, step, chunk)

    def steps(self, step: int | None) -> int:
        """How many transports ``step`` names: itself, or all; ``ValueError`` beyond them."""
        count = len(self.transports)
        if step is not None and (not isinstance(step, Integral) or not 0 <= step <= count):
            raise ValueError(f"step={step} is not a whole number between 0 and the flow's {count} transports")
        return count if step is None else step

    # ---------------------------------------------------------------- clouds of the user's, for a learned operator

    def step(
        self, points: Tensor, tau: float | None = None, weights: dict[str, float] | None = None,
        log_density: object = None,
    ) -> Tensor:  # fmt: skip
        """One step of the learned operator on a cloud (n, d), or on each of many (clouds, n, d), of any n.

        ``tau``, ``weights`` of the energy's terms by their names: where it was trained for several. ``log_density``:
        log rho at the points (..., n), or what has ``log_density(x)``; steps of energies that need a density are
        then corrected towards the optimal map that solves the step's condition, as those of other energies are without,
        and networks that take it know the measure better. Raises ``ValueError`` for what is no cloud of this space, and
        warns of one far outside of the training family.
        """
        return operator.step(self, points, tau, weights, log_density)

    def evolve(self, points: Tensor, n_steps: int, **options) -> operator.Evolution:
        """``n_steps`` steps of the learned operator on a cloud (n, d), with energies and, where given, densities.

        ``log_density``: log rho at the points (n,), or what has ``log_density(x)``; ``energies``: None (where known),
        True (``ValueError`` where not), False; ``tau``, ``weights`` as in ``step``. Raises ``ValueError`` for what is
        no cloud of this space, and warns of one far outside of the training family.
        """
        return operator.evolve(self, points, n_steps, **options)

    # ---------------------------------------------------------------- saving

    def describe(self) -> dict:
        """Plain data from which ``Flow.rebuild`` makes this flow again, weights aside."""
        return {
            "source": settings_of(self.source),
            "event_shape": list(self.event_shape),
            "transports": [transport.describe() for transport in self.transports],
            "units": None if self.units is None else [self.units[0].tolist(), self.units[1]],
            "class_weights": self.class_weights,
            "info": self.info,
        }

    @classmethod
    def rebuild(cls, description: dict, tensors: dict[str, Tensor]) -> Flow:
        """The flow that ``describe`` and ``state_dict`` gave."""
        source = DATASETS.build(description["source"], event_shape=tuple(description["event_shape"]))
        units = description["units"]
        units = None if units is None else (torch.tensor(units[0]), units[1])
        transports = [transport_from(d) for d in description["transports"]]
        # flows from before there were classes have no weights of them
        flow = cls(source, transports, description["info"], units, description.get("class_weights"))
        flow.load_state_dict(tensors, strict=True)
        return flow.eval()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes ``flow.safetensors`` and ``flow.json`` into ``directory``; a kill leaves the old or the new flow.

        Raises ``ValueError`` for weights that are not finite: such a flow is never published.
        """
        write_stored(Path(directory), self.describe(), dict(self.state_dict()))


def load(directory: str | os.PathLike, device: str | torch.device = "cpu") -> Flow:
    """The flow saved in ``directory`` (a run folder), ready to sample.

    Raises ``FileNotFoundError`` where there is none and ``ValueError`` for one that is truncated, altered or newer.
    """
    if not isinstance(directory, (str, os.PathLike)):
        raise ValueError(f"load takes the folder of a run, e.g. gengrad.load('runs/a'); got {directory!r}")
    description, tensors = read_stored(Path(directory).expanduser())
    try:
        return Flow.rebuild(description, tensors).to(device)
    except (KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} does not hold a flow that this version can build: {error}") from None
