"""An objective as chemists write it: properties, transforms to [0, 1], weights, one mean; hard filters before it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

import gengrad.molecules.scorers  # noqa: F401 - registers the scorers
from gengrad.molecules.desirability import MEANS, Bounds, Transform
from gengrad.molecules.properties import Scorer
from gengrad.registry import SCORERS, TRANSFORMS, Registry, Settings, settings_of
from gengrad.strict_yaml import ConfigError, check, parse_yaml


def _named(value: object) -> object:
    """``qed`` is short for ``{name: qed}``."""
    return {"name": value} if isinstance(value, str) else value


class ComponentSettings(Settings):
    """One property: its scorer, what is wished of it, its weight; ``label`` heads its columns (default: the name)."""

    scorer: dict
    transform: dict = {"name": "identity"}
    weight: float = Field(1.0, gt=0)
    label: str | None = None

    _names = field_validator("scorer", "transform", mode="before")(_named)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, given):
        """``- qed`` is short for ``- {scorer: qed}``."""
        return {"scorer": given} if isinstance(given, str) else given


class FilterSettings(Bounds):
    """A molecule passes when ``at_least`` <= property <= ``at_most``; one of the two may be left out."""

    scorer: dict
    label: str | None = None

    _names = field_validator("scorer", mode="before")(_named)


class ObjectiveSettings(Settings):
    """The file. ``per_scaffold``: at most so many molecules, the best ones, of each Murcko scaffold pass."""

    components: list[ComponentSettings] = Field(min_length=1)
    filters: list[FilterSettings] = []
    mean: Literal["geometric_mean", "arithmetic_mean"] = "geometric_mean"
    per_scaffold: int | None = Field(None, ge=1)


@dataclass(frozen=True)
class Component:
    label: str
    column: int  # of the scorer among ``Objective.scorers``
    transform: Transform
    weight: float


@dataclass(frozen=True)
class Filter:
    label: str
    column: int
    bounds: FilterSettings

    def __str__(self) -> str:
        return f"{self.label} {self.bounds}"


class Objective:
    """An objective with its scorers, each of them once however often it is named; ``labels`` heads their columns."""

    def __init__(self, settings: ObjectiveSettings, parts: list[tuple[Scorer, Transform | None]]):
        self.settings = settings
        self.scorers: list[Scorer] = []
        self.labels: list[str] = []
        self.components: list[Component] = []
        self.filters: list[Filter] = []
        for given, (scorer, transform) in zip([*settings.components, *settings.filters], parts):
            column = self._column(scorer, given.label)
            if transform is not None:
                label = given.label or self.labels[column]
                label += "" if all(c.label != label for c in self.components) else f"_{len(self.components) + 1}"
                self.components.append(Component(label, column, transform, given.weight))
            else:
                label = given.label or self.labels[column]
                self.filters.append(Filter(label, column, given))
        self.weights = torch.tensor([c.weight for c in self.components], dtype=torch.float64)

    def _column(self, scorer: Scorer, label: str | None) -> int:
        key = json.dumps(settings_of(scorer), sort_keys=True)
        keys = [json.dumps(settings_of(known), sort_keys=True) for known in self.scorers]
        if key not in keys:
            label = label or scorer.name
            self.scorers.append(scorer)
            self.labels.append(label if label not in self.labels else f"{label}_{len(self.labels) + 1}")
            return len(keys)
        return keys.index(key)

    def desirabilities(self, properties: Tensor) -> Tensor:
        """Raw properties (n, scorers) -> s (n, components), in the dtype given; NaN stays NaN, with gradient 0."""
        known = ~properties.isnan()
        x = torch.where(known, properties, torch.zeros_like(properties))  # NaN would come back in the gradient
        s = torch.stack([c.transform(x[:, c.column]) for c in self.components], dim=1)
        return torch.where(known[:, [c.column for c in self.components]], s, torch.full_like(s, math.nan))

    def totals(self, s: Tensor) -> Tensor:
        """The weighted mean (n,) of desirabilities (n, components)."""
        return MEANS[self.settings.mean](s, self.weights.to(s))

    def passes(self, properties: Tensor) -> Tensor:
        """Which filters hold, bool (n, filters); a property that is NaN does not pass."""
        held = [f.bounds.hold(properties[:, f.column]) for f in self.filters]
        return torch.stack(held, dim=1) if held else torch.ones(len(properties), 0, dtype=torch.bool)


def load_objective(path: str | Path) -> Objective:
    """The objective of a YAML file; raises ``ConfigError`` with every mistake in it."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no objective file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the objective {path}: {error}") from None
    return read_objective(parse_yaml(text, str(path)), str(path))


def read_objective(raw: dict, where: str = "the objective") -> Objective:
    """Plain data as an objective; raises ``ConfigError`` with every mistake, its key and how to mend it."""
    problems: list[tuple[str, str]] = []
    settings = check(ObjectiveSettings, raw, "", list(ObjectiveSettings.model_fields), problems)
    parts = []
    for section in ("components", "filters") if settings is not None else ():
        for i, given in enumerate(getattr(settings, section)):
            scorer = _built(SCORERS, given.scorer, f"{section}.{i}.scorer", problems)
            if section == "filters":
                parts.append((scorer, None))
                continue
            transform = _built(TRANSFORMS, given.transform, f"{section}.{i}.transform", problems)
            parts.append((scorer, transform))
            if transform and scorer and transform.name == "identity" and not scorer.unit_interval:
                wanted = ", ".join(name for name in TRANSFORMS if name != "identity")
                problems.append(
                    (
                        f"{section}.{i}.transform",
                        f"the values of {scorer.name!r} do not lie in [0, 1]: give a transform, one of: {wanted}",
                    )
                )
    if problems:
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        lines = [f"  {key}: {text}" for key, text in problems]
        raise ConfigError("\n".join([f"{count} in {where}; nothing was scored.", *lines]))
    return Objective(settings, parts)


def _built(registry: Registry, given: dict, key: str, problems: list):
    """The thing named by ``given``, or None and a problem more."""
    try:
        cls = registry.get(given.get("name"))
    except ValueError as error:
        problems.append((f"{key}.name", str(error)))
        return None
    rest = {name: value for name, value in given.items() if name != "name"}
    config = check(cls.Config, rest, key, list(cls.Config.model_fields), problems)
    if config is None:
        return None
    try:
        return cls(config)
    except ValueError as error:
        problems.append((key, str(error)))
        return None
