"""One table per kind of thing: name -> class, whose ``Config`` is its YAML schema.

A method, functional, data set, network or scorer is added by one file with one class and one ``register`` line;
nothing else in gengrad needs to know its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every config: strict types, unknown keys refused, frozen once read, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Configured:
    """A thing built from its own ``Config``: ``Thing(width=64)`` and ``Thing(Thing.Config(width=64))`` are the same.

    Raises pydantic's ``ValidationError`` (a ``ValueError``) that lists every wrong key at once.
    """

    name: ClassVar[str] = ""  # set by Registry.register

    class Config(Settings):
        """No settings of its own."""

    def __init__(self, config: Settings | None = None, **settings):
        self.config = config if config is not None else self.Config(**settings)


T = TypeVar("T", bound=type)


class Registry:
    """The table of one kind. ``kind`` is the noun used in error messages, e.g. ``"method"``."""

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that enters ``name``; raises ``ValueError`` when the name is taken."""

        def enter(cls: T) -> T:
            if name in self._classes:
                raise ValueError(f"{self.kind} {name!r} is registered already, by {self._classes[name].__qualname__}")
            if not issubclass(getattr(cls, "Config", object), Settings):
                raise TypeError(f"{self.kind} {name!r}: its class needs a Config that derives from Settings")
            self._classes[name] = cls
            cls.name = name
            return cls

        return enter

    def get(self, name: object) -> type:
        """The class registered as ``name``; raises ``ValueError`` naming the nearest known names."""
        if not isinstance(name, str) or name not in self._classes:
            raise ValueError(unknown(self.kind, name, self._classes))
        return self._classes[name]

    def build(self, settings: dict, **context):
        """Instance from a plain mapping with a ``name`` (as stored in ``flow.json``) and runtime ``context``."""
        rest = {key: value for key, value in settings.items() if key != "name"}
        cls = self.get(settings.get("name"))
        return cls(config=cls.Config(**rest), **context)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in self._classes


def settings_of(thing: Configured) -> dict:
    """The plain mapping that ``Registry.build`` takes: the registered name and every setting."""
    return {"name": thing.name, **thing.config.model_dump(mode="json")}


def unknown(kind: str, given: object, known) -> str:
    """The message for a name that is not in ``known``, with the nearest one first."""
    names = sorted(str(k) for k in known)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {given!r}.{guess} Known: {', '.join(names)}."


METHODS = Registry("method")
FUNCTIONALS = Registry("functional")
DATASETS = Registry("data set")
NETWORKS = Registry("network")
POTENTIALS = Registry("potential")
SCORERS = Registry("scorer")
TRANSFORMS = Registry("transform")
METRICS = Registry("metric")
PROPOSERS = Registry("proposer")
