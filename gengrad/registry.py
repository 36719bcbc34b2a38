"""One table per kind of thing: name -> class, whose ``Config`` is its YAML schema.

A method, functional, data set, network or scorer is added by one file with one class and one ``register`` line;
nothing else in gengrad needs to know its name.
"""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Annotated, Any, ClassVar, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

SEEDS = 2**63  # seeds are 0 .. SEEDS - 1
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


class Settings(BaseModel):
    """Base of every config: strict types, unknown keys refused, frozen once read, no NaN or infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _whole_floats(cls, given: Any) -> Any:
        """1e3 is a number of steps: a float without a fraction is taken where whole numbers alone are."""
        if not isinstance(given, dict):
            return given
        whole = {name for name, field in cls.model_fields.items() if {int, float} & _types(field.annotation) == {int}}
        aliases = {name: cls.model_fields[name].validation_alias for name in whole}
        whole |= {key for alias in aliases.values() if isinstance(alias, AliasChoices) for key in alias.choices}
        return {key: _as_whole(value) if key in whole else value for key, value in given.items()}


def _types(annotation: Any) -> set:
    """All types that an annotation such as ``list[Annotated[int, ...]] | None`` is made of."""
    parts = get_args(annotation)
    if not parts:
        return {annotation} if isinstance(annotation, type) else set()
    return set().union(*map(_types, parts))


def _as_whole(value: Any) -> Any:
    """A float without a fraction as an int, also within lists; anything else as it is."""
    if isinstance(value, list):
        return [_as_whole(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


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

    def build(self, settings: dict, **context) -> Any:
        """Instance from a plain mapping with a ``name`` (as stored in ``flow.json``) and runtime ``context``."""
        rest = {key: value for key, value in settings.items() if key != "name"}
        cls = self.get(settings.get("name"))
        return cls(config=cls.Config(**rest), **context)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._classes))

    def __contains__(self, name: object) -> bool:
        return name in self._classes


def import_all(package: str, path: Iterable[str]) -> None:
    """Imports every module of a ``package`` (its ``__name__`` and ``__path__``), so that all of them are registered."""
    for module in pkgutil.iter_modules(path):
        import_module(f"{package}.{module.name}")


def settings_of(thing: Configured) -> dict:
    """The plain mapping that ``Registry.build`` takes: the registered name and every setting."""
    return {"name": thing.name, **thing.config.model_dump(mode="json")}


def unknown(kind: str, given: object, known: Iterable) -> str:
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
FAMILIES = Registry("family of densities")
