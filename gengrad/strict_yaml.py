"""YAML read strictly: no tags, no doubled keys, 1e-4 is a number; and a schema's complaints in plain words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import yaml
from pydantic import ValidationError

from gengrad.registry import Settings


class ConfigError(ValueError):
    """A config that cannot be run; the message lists every mistake with its file and key."""


def parse_yaml(text: str, where: str) -> dict:
    """YAML as plain data: no tags, no doubled keys, 1e-4 is a number; raises ``ConfigError``."""
    try:
        raw = yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must hold sections such as 'data:' and 'method:'; found a {type(raw).__name__}")
    return raw


def check(
    schema: type[Settings],
    raw: dict,
    section: str,
    known: list[str],
    problems: list,
    elsewhere: Callable[[str], str] = lambda key: "",
) -> Settings | None:
    """``raw`` as a ``schema``; None when it is wrong, and ``problems`` grows by one (key, text) for each mistake.

    ``elsewhere`` says in words where an unknown key would be at home.
    """
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            key = ".".join(str(part) for part in (section, *item["loc"]) if str(part))
            problems.append((key or section, explain(item, known, elsewhere)))
    return None


def explain(item: dict, known: list[str], elsewhere: Callable[[str], str] = lambda key: "") -> str:
    """One pydantic error as: what was found, what is allowed."""
    if item["type"] == "extra_forbidden":
        key = str(item["loc"][-1])
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        guess = elsewhere(key) if len(item["loc"]) == 1 else ""
        guess = guess or (f"did you mean {near[0]!r}? " if near else "")
        return f"unknown key; {guess}Known here: {', '.join(known) or 'no keys'}"
    if item["type"] == "missing":
        return "missing"
    message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{message}; found {item['input']!r}"


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers (1e-4 is one), no tags of any kind, no key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a word", node.start_mark)
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith(":null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF")
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$", re.IGNORECASE),
    list("-+0123456789."),
)
