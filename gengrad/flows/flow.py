"""The flow: the artefact that training leaves behind, to sample, to look at on its way, to save and to load."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor, nn

import gengrad
from gengrad.data.base import Distribution
from gengrad.data.draws import draw
from gengrad.files import sha256_of, write_atomically, write_json
from gengrad.flows.solvers import SOLVERS
from gengrad.flows.transports import Transport, transport_from
from gengrad.registry import DATASETS, settings_of

FORMAT = 1  # of flow.json; raised when an older gengrad could not read a newer file rightly
WEIGHTS, DESCRIPTION = "flow.safetensors", "flow.json"
WAITING = ".next"  # ending of weights whose description is being written


@dataclass(frozen=True)
class Samples:
    """Samples (n, *event) with what they cost: ``nfe`` network evaluations per sample, counted, and ``seconds``."""

    x: Tensor
    nfe: float
    seed: int
    seconds: float


class Flow(nn.Module):
    """A source and the transports that carry its mass to the target, in order.

    ``info`` is free JSON that travels with the flow: the method, its settings, training metrics. ``units`` (m, s): the
    transports work on normalised points, and what leaves the flow is m + s x.
    """

    def __init__(
        self,
        source: Distribution,
        transports: list[Transport] | None = None,
        info: dict | None = None,
        units: tuple[Tensor, float] | None = None,
    ):
        super().__init__()
        self.source, self.info, self.units = source, dict(info or {}), units
        self.transports = nn.ModuleList(transports or [])

    @property
    def event_shape(self) -> tuple[int, ...]:
        return tuple(self.source.event_shape)

    @property
    def is_image(self) -> bool:
        return len(self.event_shape) == 3

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
    ) -> Samples:
        """Samples number ``first`` .. ``first + n - 1`` of the sequence keyed by ``seed``, and their counted cost.

        Sample i starts from the same source point whatever ``n``, ``first`` and ``chunk`` are, so that it comes out
        the same up to the rounding of differently shaped matrix products. When a GPU's memory runs out the chunk is
        halved and the work goes on. Raises ``ValueError`` for n < 1 or an nfe that the transports cannot spend.
        """
        self._check(n, chunk)
        started, parts, position = time.perf_counter(), [], first
        with self._solved_by(solver), self._counting() as counted:
            budget = self.allocate(nfe)
            while position < first + n:
                stop = min(position + chunk, first + n)
                try:
                    parts.append(self._push(position, stop, seed, budget).cpu())
                except torch.cuda.OutOfMemoryError:
                    if chunk == 1:
                        raise
                    torch.cuda.empty_cache()
                    chunk //= 2
                    continue
                position = stop
        return Samples(self._restore(torch.cat(parts)), counted["evaluations"] / n, seed, time.perf_counter() - started)

    def trajectory(self, n: int, nfe: int | None = None, seed: int = 0, solver: str | None = None) -> Tensor:
        """The same samples on their way: (steps + 1, n, *event), source first."""
        self._check(n, 1)
        with torch.inference_mode(), self._solved_by(solver):
            states = [draw(self.source, 0, n, seed, "source").to(self.device)]
            for transport, share in zip(self.transports, self.allocate(nfe)):
                states += list(transport.path(states[-1], nfe=share))
        return self._restore(torch.stack(states).cpu())

    def cost(self, nfe: int | None = None, solver: str | None = None) -> int:
        """Network evaluations that ``sample(nfe=nfe, solver=solver)`` spends a sample; ``ValueError`` if it cannot."""
        with self._solved_by(solver):
            return sum(transport.cost(share) for transport, share in zip(self.transports, self.allocate(nfe)))

    def allocate(self, nfe: int | None) -> list[int | None]:
        """The share of ``nfe`` that each transport spends, larger first where it does not divide."""
        count = len(self.transports)
        if nfe is None or count == 0:
            return [None] * count
        if nfe < count:
            raise ValueError(f"nfe={nfe} is less than one network evaluation for each of the flow's {count} transports")
        shares = [nfe // count + (k < nfe % count) for k in range(count)]
        return [transport.cost(share) for transport, share in zip(self.transports, shares)]

    def _push(self, start: int, stop: int, seed: int, budget: list[int | None]) -> Tensor:
        with torch.inference_mode():
            x = draw(self.source, start, stop, seed, "source").to(self.device)
            for transport, share in zip(self.transports, budget):
                x = transport.push(x, nfe=share)
        return x

    def _restore(self, x: Tensor) -> Tensor:
        return x if self.units is None else self.units[0].to(x) + self.units[1] * x

    @staticmethod
    def _check(n: int, chunk: int) -> None:
        if n < 1:
            raise ValueError(f"n is the number of samples, at least 1; got {n}")
        if chunk < 1:
            raise ValueError(f"chunk is the number of samples moved at once, at least 1; got {chunk}")

    @contextmanager
    def _solved_by(self, solver: str | None) -> Iterator[None]:
        """Another solver for the time of one call."""
        if solver is not None and solver not in SOLVERS:
            raise ValueError(f"unknown solver {solver!r}; known: {', '.join(SOLVERS)}")
        chosen = [t for t in self.transports if solver is not None and hasattr(t, "solver")]
        before = [t.solver for t in chosen]
        for transport in chosen:
            transport.solver = solver
        try:
            yield
        finally:
            for transport, old in zip(chosen, before):
                transport.solver = old

    @contextmanager
    def _counting(self) -> Iterator[dict[str, int]]:
        """Counts the network evaluations that really happen, in samples x evaluations."""
        counted = {"evaluations": 0}

        def count(module, inputs):
            counted["evaluations"] += len(inputs[0])

        hooks = [t.network.register_forward_pre_hook(count) for t in self.transports if hasattr(t, "network")]
        try:
            yield counted
        finally:
            for hook in hooks:
                hook.remove()

    # ---------------------------------------------------------------- saving

    def describe(self) -> dict:
        """Plain data from which ``Flow.rebuild`` makes this flow again, weights aside."""
        return {
            "format": FORMAT,
            "gengrad": gengrad.__version__,
            "source": settings_of(self.source),
            "event_shape": list(self.event_shape),
            "transports": [transport.describe() for transport in self.transports],
            "units": None if self.units is None else [self.units[0].tolist(), self.units[1]],
            "info": self.info,
        }

    @classmethod
    def rebuild(cls, description: dict, tensors: dict[str, Tensor]) -> Flow:
        """The flow that ``describe`` and ``state_dict`` gave."""
        source = DATASETS.build(description["source"], event_shape=tuple(description["event_shape"]))
        units = description["units"]
        units = None if units is None else (torch.tensor(units[0]), units[1])
        flow = cls(source, [transport_from(d) for d in description["transports"]], description["info"], units)
        flow.load_state_dict(tensors, strict=True)
        return flow.eval()

    def save(self, directory: str | os.PathLike) -> None:
        """Writes ``flow.safetensors`` and ``flow.json`` (which holds the weights' SHA-256).

        A kill at any moment leaves either the old or the new flow loadable: the new weights wait under another name
        until the description that names their hash is on the disk. Raises ``ValueError`` for weights that are not
        finite: such a flow is never published.
        """
        directory = Path(directory)
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.state_dict().items()}
        broken = [name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
        if broken:
            raise ValueError(f"the flow's weights are not finite in {', '.join(broken[:3])}; it is not saved")
        directory.mkdir(parents=True, exist_ok=True)
        waiting = directory / (WEIGHTS + WAITING)
        _finish_rename(directory, waiting)
        write_atomically(waiting, tensors_to_bytes(tensors))
        description = {**self.describe(), "sha256": sha256_of(waiting)}
        write_json(directory / DESCRIPTION, {**description, "seal": _seal(description)})
        os.replace(waiting, directory / WEIGHTS)


def load(directory: str | os.PathLike, device: str | torch.device = "cpu") -> Flow:
    """The flow saved in ``directory`` (a run folder), ready to sample.

    Raises ``FileNotFoundError`` where there is none and ``ValueError`` for one that is truncated, altered or newer.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"no run folder {str(directory)!r}; give the folder that train.py wrote (its out=...)")
    if not (directory / DESCRIPTION).is_file():
        raise FileNotFoundError(
            f"{str(directory)!r} holds no {DESCRIPTION}: it is no run folder of gengrad, or its training has not "
            "reached the first checkpoint yet"
        )
    try:
        description = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
        version, digest, seal = description["format"], description["sha256"], description.pop("seal")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{directory / DESCRIPTION} is damaged ({error!r}); train again or restore the file") from None
    if version != FORMAT:
        raise ValueError(
            f"{directory / DESCRIPTION} has format {version}; this gengrad {gengrad.__version__} reads {FORMAT}"
        )
    if seal != _seal(description):
        raise ValueError(f"{directory / DESCRIPTION} is damaged or was edited; train again or restore the file")
    content = _weights(directory, digest)
    try:
        return Flow.rebuild(description, load_tensors(content)).to(device)
    except (SafetensorError, KeyError, RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{directory} does not hold a flow that this version can build: {error}") from None


def _seal(description: dict) -> str:
    """SHA-256 of a description, so that an altered solver or time is seen like an altered weight."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _finish_rename(directory: Path, waiting: Path) -> None:
    """Completes a save that was killed before its last rename, or the weights of the present description would go."""
    if waiting.exists() and (directory / DESCRIPTION).exists():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            described = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))["sha256"]
            if sha256_of(waiting) == described:
                os.replace(waiting, directory / WEIGHTS)


def _weights(directory: Path, digest: str) -> bytes:
    """The weights with the described hash, also when the save that wrote them was killed at its last rename."""
    for name in (WEIGHTS, WEIGHTS + WAITING):
        if (directory / name).is_file() and sha256_of(directory / name) == digest:
            return (directory / name).read_bytes()
    raise ValueError(
        f"{directory / WEIGHTS} is missing, truncated or altered: its SHA-256 is not the one in {DESCRIPTION}. "
        "Resume the training to its next checkpoint to write it again, or restore both files together"
    )
