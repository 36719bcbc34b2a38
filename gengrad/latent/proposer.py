"""New molecules from the codes of others: a step in the latent space, decoded."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from pydantic import Field, model_validator
from torch import Tensor

from gengrad.files import sha256_of
from gengrad.latent.codec import Codec
from gengrad.latent.surrogate import Surrogate
from gengrad.molecules.objective import read_objective
from gengrad.molecules.proposers import Proposal, Proposer
from gengrad.registry import PROPOSERS, Settings


@PROPOSERS.register("latent")
class Latent(Proposer):
    """x + r u for a parent's whitened code x, decoded; r is uniform in [``nearest``, ``farthest``].

    u is a direction by chance, or towards the code of another parent (a share ``between`` of the proposals); in a share
    ``guided`` minus the gradient of a surrogate's potential is added to it, both of length one: uphill, but not all the
    same way. ``run``: the folder of a run on molecules, or of an autoencoder alone, which guides nothing. A parent that
    the autoencoder cannot take has no proposals. The potential is that of the objective which is searched for; raises
    ``ValueError`` where the surrogate has not learned its properties, ``FileNotFoundError`` without an autoencoder.
    """

    class Config(Settings):
        run: str
        nearest: float = Field(2.0, ge=0)  # in whitened codes, where two molecules of the library are about 11 apart
        farthest: float = Field(6.0, gt=0)
        between: float = Field(0.3, ge=0, le=1)
        guided: float = Field(0.5, ge=0, le=1)

        @model_validator(mode="after")
        def _ordered(self):
            if self.nearest > self.farthest:
                raise ValueError(f"nearest={self.nearest:g} must not lie above farthest={self.farthest:g}")
            return self

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        folder = Path(self.config.run)
        self._codec = Codec.load(_autoencoder(folder))
        self._surrogate = self._objective = None
        if (folder / "surrogate").is_dir() and self.config.guided:
            self._surrogate = Surrogate.load(folder / "surrogate")
            self._objective = read_objective(self._surrogate.info["objective"])
            if self._surrogate.info.get("codec", self._codec.digest()) != self._codec.digest():
                raise ValueError(f"proposer latent: the surrogate in {str(folder)!r} is of another autoencoder")

    @contextmanager
    def ready(self, processes=1, timeout=10.0, objective=None):
        if self._surrogate is not None and objective is not None:
            self._surrogate.columns(objective)  # refuses what it has not learned
            self._objective = objective
        yield self

    def digest(self):
        if self._surrogate is None:
            return self._codec.digest()
        return self._codec.digest() + sha256_of(Path(self.config.run) / "surrogate" / "surrogate.safetensors")

    def propose(self, parents, n, generator):
        c, rows = self.config, self._codec.rows(parents, 0)  # they have been scored: no need for processes to kill
        taken = [i for i, row in enumerate(rows) if not isinstance(row, ValueError)]
        a, b = torch.randint(len(parents), (2, n), generator=generator)
        noise = torch.randn(n, self._codec.latent, generator=generator)
        far, cross, uphill = torch.rand(3, n, 1, generator=generator)
        x = torch.zeros(len(parents), self._codec.latent)
        x[taken] = self._codec.encode([rows[i] for i in taken])
        taken = torch.zeros(len(parents), dtype=torch.bool).index_fill(0, torch.tensor(taken, dtype=torch.long), True)
        other = (cross < c.between) & taken[b][:, None] & (x[a] != x[b]).any(1, keepdim=True)
        u = _unit(torch.where(other, x[b] - x[a], noise))
        if self._surrogate is not None:
            u = _unit(torch.where(uphill < c.guided, u + _unit(self._uphill(x))[a], u))
        found = self._codec.decode(x[a] + (c.nearest + far * (c.farthest - c.nearest)) * u)
        return [Proposal(text if ok and text else None, i) for text, ok, i in zip(found, taken[a].tolist(), a.tolist())]

    def _uphill(self, x: Tensor) -> Tensor:
        """-grad V (n, latent)."""
        with torch.enable_grad():
            leaf = x.clone().requires_grad_(True)
            return -torch.autograd.grad(self._surrogate.potential(self._objective, leaf).sum(), leaf)[0]


def _unit(u: Tensor) -> Tensor:
    return u / u.norm(dim=1, keepdim=True).clamp_min(1e-12)


def _autoencoder(folder: Path) -> Path:
    """Where a folder has its autoencoder: itself, in the run, or the one that the run's config names."""
    config = folder / "config.yaml"
    named = yaml.safe_load(config.read_text()).get("data", {}).get("autoencoder_from") if config.is_file() else None
    for place in (folder, folder / "autoencoder", *([Path(named)] if named else [])):
        if (place / "autoencoder.json").is_file():
            return place
    raise FileNotFoundError(
        f"proposer latent: no autoencoder in {str(folder)!r} (looked in {Path.cwd()}); give the folder of a run on "
        "molecules, or of gengrad molecules train-autoencoder"
    )
