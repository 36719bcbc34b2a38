"""The run's schema: YAML plus dotted overrides, read strictly, every mistake reported at once."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

import gengrad.data
import gengrad.latent
import gengrad.methods
import gengrad.networks  # noqa: F401 - the four imports fill the registries
from gengrad.registry import DATASETS, METHODS, NETWORKS, Registry, Seed, Settings
from gengrad.strict_yaml import ConfigError, Loader, check, parse_yaml
from gengrad.training.fitter import TrainSettings


class EvaluateSettings(Settings):
    """The ``evaluate:`` section. ``nfe``: the numbers of network evaluations to judge, ``n`` the points a draw."""

    nfe: list[Annotated[int, Field(ge=1)]] = Field([5, 10], min_length=1)
    n: int = Field(4096, ge=2)
    draws: int = Field(3, ge=1)
    seed: Seed = 0


class General(Settings):
    """The keys that stand outside of any section."""

    seed: Seed = 0
    out: str = Field("runs/run", min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init_from: str | None = None  # a run whose weights to start from, optimiser fresh

    @field_validator("out", "init_from")
    @classmethod
    def _at_home(cls, path: str | None) -> str | None:
        """~/runs/a: no shell puts the user's folder in where the path is a part of a word."""
        return path if path is None else os.path.expanduser(path)


# section -> registry that its `name` is looked up in, and the name it has when the config leaves it out
NAMED: dict[str, tuple[Registry, str | None]] = {
    "source": (DATASETS, "normal"),
    "data": (DATASETS, None),
    "network": (NETWORKS, None),
    "method": (METHODS, None),
}
PLAIN: dict[str, type[Settings]] = {"train": TrainSettings, "evaluate": EvaluateSettings}


@dataclass(frozen=True)
class RunConfig:
    """One run: the general keys and one mapping per section, all defaults filled in and checked."""

    general: General
    source: dict
    data: dict
    network: dict
    method: dict
    train: TrainSettings
    evaluate: EvaluateSettings

    def resolved(self) -> dict:
        """The whole config as plain data; ``read_config`` of it gives this config again."""
        sections = {name: getattr(self, name) for name in (*NAMED, *PLAIN)}
        plain = {k: v.model_dump(mode="json") if isinstance(v, Settings) else v for k, v in sections.items()}
        return {**self.general.model_dump(mode="json"), **plain}

    def digest(self) -> str:
        """A hash of everything that decides the trained weights."""
        return sha256(json.dumps(deciding(self.resolved()), sort_keys=True).encode()).hexdigest()


def deciding(resolved: dict) -> dict:
    """A resolved config without the keys that may change between two calls of one run."""
    kept = {key: value for key, value in resolved.items() if key not in ("out", "evaluate", "device")}
    free = ("checkpoint_every", "keep_checkpoints", "log_every", "preview_every")
    return {**kept, "train": {key: value for key, value in kept["train"].items() if key not in free}}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a YAML file with ``a.b=value`` overrides; raises ``ConfigError`` listing every mistake."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"no config file {path}.{_similar_config(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    raw = parse_yaml(text, str(path))
    origins: dict[str, str] = {}
    for override in sorted(overrides, key=_order):
        _override(raw, override, origins)
    return read_config(raw, str(path), origins)


def _similar_config(path: Path) -> str:
    """The config whose name is nearest: beside ``path``, or among those shipped in ``configs``."""
    folders = [Path(__file__).parents[1] / "configs", Path("configs")]
    known = [*(file for folder in folders for file in folder.rglob("*.yaml")), *path.parent.glob("*.y*ml")]
    found = {file.stem: file for file in known}
    near = difflib.get_close_matches(path.stem if path.suffix in (".yaml", ".yml") else path.name, found, n=1)
    return f" Did you mean {found[near[0]]}?" if near else ""


def _order(override: str) -> tuple[int, bool]:
    """The whole before its parts, and names first: another name drops the settings of the class before."""
    key = override.partition("=")[0].strip()
    return key.count("."), not key.endswith(".name")


def _override(raw: dict, override: str, origins: dict[str, str]) -> None:
    key, sign, value = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value, e.g. train.lr=1e-3")
    place: dict | list = raw
    for depth, part in enumerate(parts[:-1]):
        part = _place(place, part, override)
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        elif isinstance(place[part], str) and (isinstance(place, list) or (depth == 0 and part in NAMED)):
            place[part] = {"name": place[part]}
        place = place[part]
        if not isinstance(place, dict | list):
            raise ConfigError(f"override {override!r}: {part!r} is a value, it has no keys below it")
    last = _place(place, parts[-1], override)
    try:
        parsed = yaml.load(value, Loader=Loader) if value else None
    except yaml.YAMLError:
        raise ConfigError(
            f"override {override!r}: the value {value!r} is not valid YAML; quote it, e.g. '{key}=\"{value}\"'"
        ) from None
    if key.strip() in ("out", "init_from"):
        parsed = None if parsed is None else value  # a path stays as it was typed, also when it looks like a number
    if last == "name" and isinstance(place.get("name"), str) and place["name"] != parsed:
        place.clear()  # another class: the old one's settings do not belong to it
    place[last] = parsed
    origins[key.strip()] = "the command line"


def _place(holder: dict | list, part: str, override: str) -> str | int:
    """A key of a mapping as it is; of a list the number of an entry that is there, 0 the first."""
    if isinstance(holder, dict):
        return part
    if not holder:
        raise ConfigError(f"override {override!r}: the list is empty, it has no entry {part!r}")
    if not part.isdecimal() or int(part) >= len(holder):
        raise ConfigError(f"override {override!r}: {part!r} is none of the entries 0 to {len(holder) - 1} of a list")
    return int(part)


def read_config(raw: dict, where: str = "the config", origins: dict[str, str] | None = None) -> RunConfig:
    """Plain data as a ``RunConfig``; raises ``ConfigError`` with all mistakes, their file and key, one a line."""
    problems: list[tuple[str, str]] = []
    fields, general = {}, {k: v for k, v in raw.items() if k not in NAMED and k not in PLAIN}
    top = list(General.model_fields) + list(NAMED) + list(PLAIN)
    homes = {key: section for section, schema in _schemas(raw).items() for key in schema.model_fields}
    fields["general"] = check(General, general, "", top, problems, lambda key: _at(homes.get(key), key))
    for section, (registry, default) in NAMED.items():
        fields[section] = _named(section, raw.get(section), registry, default, problems)
    for section, schema in PLAIN.items():
        fields[section] = _section(section, raw.get(section), schema, problems)
    if fields["network"] and fields["method"]:
        _fitting_network(fields["network"]["name"], fields["method"]["name"], problems)
    if problems:
        origin = origins or {}
        lines = [f"  {key} ({_origin(key, origin, where)}): {text}" for key, text in problems]
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError("\n".join([f"{count} in the config; nothing was started.", *lines]))
    return RunConfig(**fields)


def _schemas(raw: dict) -> dict[str, type[Settings]]:
    """The schema of each section, of the class that it names where it names one."""
    found = dict(PLAIN)
    for section, (registry, default) in NAMED.items():
        given = raw.get(section)
        name = given.get("name", default) if isinstance(given, dict) else given or default
        if isinstance(name, str) and name in registry:
            found[section] = registry.get(name).Config
    return found


def _at(section: str | None, key: str) -> str:
    return f"did you mean {section}.{key}? " if section else ""


def _takers(registry: Registry, given: dict) -> list[str]:
    """The names whose classes know all the keys of ``given`` and find nothing wrong with their values."""

    def takes(schema: type[Settings]) -> bool:
        try:
            schema.model_validate(given)
        except ValidationError as error:
            return not any(item["loc"][:1] and item["loc"][0] in given for item in error.errors())
        return True

    return [name for name in registry if given and takes(registry.get(name).Config)]


def _of_another(section: str, registry: Registry, key: str, value: object) -> str:
    """The classes that an unknown ``key`` would be a setting of, in words."""
    names = _takers(registry, {key: value})
    return f"it is a setting of {section}.name={', '.join(names[:4])}. " if names else ""


def _fitting_network(network: str, method: str, problems: list) -> None:
    """Refuses a network that learns another thing than the method asks for, a velocity for a plan say."""
    wanted = METHODS.get(method).learns
    learns = {name: getattr(NETWORKS.get(name), "learns", "velocity") for name in NETWORKS}
    if wanted not in ("nothing", learns[network]):
        fitting = ", ".join(name for name in learns if learns[name] == wanted)
        problems.append(
            (
                "network.name",
                f"{network!r} is {_article(learns[network])} {learns[network]}, method {method!r} learns "
                f"{_article(wanted)} {wanted}; take one of: {fitting}",
            )
        )


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _origin(key: str, origins: dict[str, str], where: str) -> str:
    """Where a key's value came from: also where an override gave what holds it, or a part of it."""
    parts = key.split(".")
    near = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    near += [name for name in origins if name.startswith(f"{key}.")]  # an entry of the list that the key is
    return next((origins[name] for name in near if name in origins), where)


def _named(section: str, raw: object, registry: Registry, default: str | None, problems: list) -> dict | None:
    """The settings of a class looked up by name, defaults filled in, as a plain mapping."""
    raw = {"name": default} if raw is None and default else raw
    if isinstance(raw, str):
        raw = {"name": raw}  # `data: moons` is short for `data: {name: moons}`
    if not isinstance(raw, dict):
        problems.append(
            (
                section,
                f"missing; give a name, one of: {', '.join(registry)}"
                if raw is None
                else f"expected a mapping with a name, found {raw!r}",
            )
        )
        return None
    if raw.get("name") is None and default:
        raw = {"name": default, **{k: v for k, v in raw.items() if k != "name"}}
    if raw.get("name") is None:
        takers = _takers(registry, {key: value for key, value in raw.items() if key != "name"})[:4]
        hint = f"with these settings: {', '.join(takers)}; known: " if takers else "one of: "
        problems.append((f"{section}.name", f"missing; {hint}{', '.join(registry)}"))
        return None
    try:
        schema = registry.get(raw["name"]).Config
    except ValueError as error:
        problems.append((f"{section}.name", str(error)))
        return None
    rest = {key: value for key, value in raw.items() if key != "name"}
    checked = check(
        schema,
        rest,
        section,
        list(schema.model_fields),
        problems,
        lambda key: _of_another(section, registry, key, rest[key]),
    )
    return None if checked is None else {"name": raw["name"], **checked.model_dump(mode="json")}


def _section(section: str, raw: object, schema: type[Settings], problems: list) -> Settings | None:
    if raw is not None and not isinstance(raw, dict):
        problems.append((section, f"expected a mapping, found {raw!r}"))
        return None
    return check(schema, raw or {}, section, list(schema.model_fields), problems)
