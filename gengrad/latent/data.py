"""The data set ``latents``: the molecules of a file, or of the library, as whitened codes of an autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from gengrad.data.base import FiniteData
from gengrad.data.draws import generator_for
from gengrad.flows.stored import read_stored, write_stored
from gengrad.latent.settings import AutoencoderSettings, SurrogateSettings
from gengrad.molecules.desirability import Bounds, in_order
from gengrad.registry import DATASETS, Settings

KIND = "latents"


@dataclass(frozen=True)
class Cloud:
    """Molecules with whitened codes x (n, d), raw properties (n, scorers) and true totals (n,) of an objective."""

    ids: list[str]
    smiles: list[str]
    x: Tensor
    properties: Tensor
    total: Tensor
    info: dict

    def save(self, folder: Path) -> None:
        description = {"ids": self.ids, "smiles": self.smiles, "info": self.info}
        # a property without a value is NaN, which no stored weight may be
        known = ~self.properties.isnan()
        tensors = {"x": self.x, "properties": self.properties.nan_to_num(0.0), "known": known}
        write_stored(folder, description, tensors | {"total": self.total.nan_to_num(-1.0)}, KIND)

    @classmethod
    def load(cls, folder: str | Path) -> Cloud:
        """Raises ``FileNotFoundError``, or ``ValueError`` for one truncated or altered."""
        description, t = read_stored(Path(folder), KIND)
        try:
            properties = torch.where(t["known"], t["properties"], torch.nan)
            total = torch.where(t["total"] < 0, torch.nan, t["total"])
            return cls(description["ids"], description["smiles"], t["x"], properties, total, description["info"])
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{folder} does not hold latents that this version can read: {error!r}") from None


@DATASETS.register("latents")
class Latents(FiniteData):
    """Whitened codes (n, latent) of molecules: of a file (``path``) or, without one, of the enumerated ``library``.

    A run on them makes first what it needs, in its own folder, and keeps what is there: the molecules standardised, the
    autoencoder (or that of ``autoencoder_from``), their true scores by ``objective`` (a mapping, or the path of an
    objective file), their codes, the surrogate. Where a source is ``latents`` too, it takes from the data all that it
    does not say itself. ``at_least`` and ``at_most`` choose molecules by their true total, ``where`` by raw properties
    among those that the objective scores: ``{sa: {at_most: 2.6}}``; ``take`` so many of them.
    """

    made_by_a_run = True  # so that nothing but a run's folder holds it

    class Config(Settings):
        path: str | None = None
        column: str | None = None
        library: int = Field(20_000, ge=20, le=1_000_000)  # molecules of the library, where there is no file
        limit: int | None = Field(None, ge=20)  # at most so many molecules of the file, drawn by ``seed``
        seed: int = Field(0, ge=0)
        objective: dict = Field({"components": ["qed"]}, validate_default=True)
        autoencoder: AutoencoderSettings = AutoencoderSettings()
        autoencoder_from: str | None = None
        surrogate: SurrogateSettings = SurrogateSettings()
        at_least: float | None = None
        at_most: float | None = None
        where: dict[str, Bounds] = {}
        take: int | None = Field(None, ge=2)  # at most so many of those within the bounds, drawn by ``seed``
        folder: str | None = None  # of the run that has made them; filled in by that run

        @field_validator("objective", mode="before")
        @classmethod
        def _read(cls, given):
            """Plain data, whether it came as a mapping or as a file: the config then says everything."""
            from gengrad.molecules.objective import load_objective, read_objective

            objective = load_objective(given) if isinstance(given, str) else None
            if objective is None and isinstance(given, dict):
                objective = read_objective(given)
            return given if objective is None else objective.settings.model_dump(mode="json")

        @model_validator(mode="after")
        def _some_left(self):
            in_order(self.at_least, self.at_most)
            if self.path is None and (self.column is not None or self.limit is not None):
                raise ValueError("column and limit are for a file: give path, or set the size of the library")
            return self

        def columns(self, objective: dict) -> dict[str, int]:
            """Of the properties that ``where`` names; ``ValueError`` for one that the objective does not score."""
            from gengrad.molecules.objective import read_objective

            labels = read_objective(objective).labels
            if unknown := [label for label in self.where if label not in labels]:
                raise ValueError(
                    f"where chooses by {', '.join(unknown)}, which the objective does not score; it scores "
                    f"{', '.join(labels)}. A filter of the objective is scored too"
                )
            return {label: labels.index(label) for label in self.where}

        def chosen(self, total: Tensor, properties: Tensor, objective: dict) -> Tensor:
            """Which molecules lie within the bounds, bool (n,); totals (n,) and properties (n, k) by ``objective``."""
            keep = torch.ones(len(total), dtype=torch.bool)
            if self.at_least is not None:
                keep &= total >= self.at_least
            if self.at_most is not None:
                keep &= total <= self.at_most
            for label, column in self.columns(objective).items():
                keep &= self.where[label].hold(properties[:, column])
            return keep

    def prepare(self) -> None:
        c = self.config
        if c.folder is None:
            raise ValueError(
                "data set 'latents' is made by a run on it, in its folder: python train.py "
                "configs/molecules/qed_jko_icnn.yaml out=RUN; afterwards data.folder=RUN"
            )
        cloud = Cloud.load(Path(c.folder) / KIND)
        keep = c.chosen(cloud.total, cloud.properties, cloud.info["objective"])
        if keep.sum() < 2:
            known = cloud.total[~cloud.total.isnan()]
            reach = f"from {known.min():.4g} to {known.max():.4g}" if len(known) else "nowhere: they have no total"
            given = {"at_least": c.at_least, "at_most": c.at_most}
            bounds = [f"a total {key.replace('_', ' ')} {value:g}" for key, value in given.items() if value is not None]
            bounds += [f"{label} {bound}" for label, bound in c.where.items()]
            raise ValueError(
                f"{int(keep.sum())} of {len(keep)} molecules have {', '.join(bounds) or 'no bounds'}; the totals go "
                f"{reach}. At least 2 are needed: move the bounds"
            )
        self.numbers = keep.nonzero().flatten()
        if c.take is not None and c.take < len(self.numbers):
            order = torch.randperm(len(self.numbers), generator=generator_for(c.seed, "latents/take"))
            self.numbers = self.numbers[order[: c.take]].sort()[0]
        self.points, self.held_out = cloud.x[self.numbers], cloud.x[:0]
        self.cloud = cloud
        self.notes = (f"{len(self.numbers):,} of {len(keep):,} molecules",)
