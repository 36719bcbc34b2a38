"""The run's schema: YAML plus dotted overrides, read strictly, every mistake reported at once."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field

import gengrad.data
import gengrad.latent
import gengrad.methods
import gengrad.networks  # noqa: F401 - the four imports fill the registries
from gengrad.registry import DATASETS, METHODS, NETWORKS, Registry, Settings
from gengrad.strict_yaml import ConfigError, Loader, check, parse_yaml
from gengrad.training.fitter import TrainSettings


class EvaluateSettings(Settings):
    """The ``evaluate:`` section. ``nfe``: the numbers of network evaluations to judge, ``n`` the points a draw."""

    nfe: list[Annotated[int, Field(ge=1)]] = Field([5, 10], min_length=1)
    n: int = Field(4096, ge=2)
    draws: int = Field(3, ge=1)
    seed: int = Field(0, ge=0)


class General(Settings):
    """The keys that stand outside of any section."""

    seed: int = Field(0, ge=0)
    out: str = Field("runs/run", min_length=1)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    init_from: str | None = None  # a run whose weights to start from, optimiser fresh


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
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"no config file {path}.{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config {path}: {error}") from None
    raw = parse_yaml(text, str(path))
    origins: dict[str, str] = {}
    # names first: another name drops the settings of the class before, whatever the order they were typed in
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].strip().endswith(".name")):
        _override(raw, override, origins)
    return read_config(raw, str(path), origins)


def _override(raw: dict, override: str, origins: dict[str, str]) -> None:
    key, sign, value = override.partition("=")
    parts = key.strip().split(".")
    if not sign or not all(parts):
        raise ConfigError(f"override {override!r} is not of the form key=value, e.g. train.lr=1e-3")
    place = raw
    for depth, part in enumerate(parts[:-1]):
        if place.get(part) is None:
            place[part] = {}
        elif depth == 0 and part in NAMED and isinstance(place[part], str):
            place[part] = {"name": place[part]}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigError(f"override {override!r}: {part!r} is a value, it has no keys below it")
    try:
        parsed = yaml.load(value, Loader=Loader) if value else None
    except yaml.YAMLError:
        raise ConfigError(
            f"override {override!r}: the value {value!r} is not valid YAML; quote it, e.g. '{key}=\"{value}\"'"
        ) from None
    if key.strip() in ("out", "init_from"):
        parsed = None if parsed is None else value  # a path stays as it was typed, also when it looks like a number
    if parts[-1] == "name" and isinstance(place.get("name"), str) and place["name"] != parsed:
        place.clear()  # another class: the old one's settings do not belong to it
    place[parts[-1]] = parsed
    origins[key.strip()] = "the command line"


def read_config(raw: dict, where: str = "the config", origins: dict[str, str] | None = None) -> RunConfig:
    """Plain data as a ``RunConfig``; raises ``ConfigError`` with all mistakes, their file and key, one a line."""
    problems: list[tuple[str, str]] = []
    fields, general = {}, {k: v for k, v in raw.items() if k not in NAMED and k not in PLAIN}
    top = list(General.model_fields) + list(NAMED) + list(PLAIN)
    fields["general"] = check(General, general, "", top, problems)
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


def _fitting_network(network: str, method: str, problems: list) -> None:
    """Refuses a network that learns another thing than the method asks for, a velocity for a plan say."""
    wanted = METHODS.get(method).learns
    learns = {name: getattr(NETWORKS.get(name), "learns", "velocity") for name in NETWORKS}
    if wanted not in ("nothing", learns[network]):
        fitting = ", ".join(name for name in learns if learns[name] == wanted)
        problems.append(
            (
                "network.name",
                f"{network!r} is a {learns[network]}, method {method!r} learns a {wanted}; take one of: {fitting}",
            )
        )


def _origin(key: str, origins: dict[str, str], where: str) -> str:
    """Where a key's value came from: also where the override gave the list or mapping that holds it."""
    parts = key.split(".")
    above = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((origins[name] for name in above if name in origins), where)


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
        problems.append((f"{section}.name", f"missing; one of: {', '.join(registry)}"))
        return None
    try:
        schema = registry.get(raw["name"]).Config
    except ValueError as error:
        problems.append((f"{section}.name", str(error)))
        return None
    rest = {key: value for key, value in raw.items() if key != "name"}
    checked = check(schema, rest, section, list(schema.model_fields), problems)
    return None if checked is None else {"name": raw["name"], **checked.model_dump(mode="json")}


def _section(section: str, raw: object, schema: type[Settings], problems: list) -> Settings | None:
    if raw is not None and not isinstance(raw, dict):
        problems.append((section, f"expected a mapping, found {raw!r}"))
        return None
    return check(schema, raw or {}, section, list(schema.model_fields), problems)
