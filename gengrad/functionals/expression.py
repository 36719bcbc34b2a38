"""Functionals as the YAML writes them: a name, a mapping, or a list of these that are added with weights.

functional: entropy
functional: {name: kl}
functional: [{name: potential, potential: {name: quadratic}}, {name: entropy, weight: 0.5}]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, ValidationError
from torch import Tensor

from gengrad.functionals.base import Density, Functional, Sum, terms_of, velocity_of
from gengrad.functionals.interaction import InteractionEnergy
from gengrad.functionals.internal import InternalEnergy
from gengrad.registry import FUNCTIONALS


def read_expression(given: Any) -> list[dict]:
    """The terms as plain mappings with name, weight and every setting; raises ``ValueError`` naming the wrong term."""
    terms = given if isinstance(given, list) else [given]
    if not terms:
        raise ValueError("a functional is a sum of at least one term")
    return [_read_term(term, f"term {k + 1}: " if len(terms) > 1 else "") for k, term in enumerate(terms)]


def _read_term(term: Any, where: str) -> dict:
    term = {"name": term} if isinstance(term, str) else term
    if not isinstance(term, dict) or "name" not in term:
        raise ValueError(f"{where}expected a functional's name, one of: {', '.join(FUNCTIONALS)}")
    weight = term.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < abs(weight) < float("inf"):
        raise ValueError(f"{where}weight must be a finite number other than 0; found {weight!r}")
    settings = {key: value for key, value in term.items() if key not in ("name", "weight")}
    try:
        checked = FUNCTIONALS.get(term["name"]).Config(**settings)
    except ValidationError as error:
        lines = [
            f"{'.'.join(map(str, item['loc'])) or term['name']}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors()
        ]
        raise ValueError(f"{where}{term['name']}: {'; '.join(lines)}") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    return {"name": term["name"], "weight": float(weight), **checked.model_dump(mode="json")}


def read_particle_expression(given: Any) -> list[dict]:
    """``read_expression`` for methods of particles or plans; raises ``ValueError`` for a term that needs a density."""
    terms = read_expression(given)
    for term in terms:
        if needs_density([term]):
            raise ValueError(
                f"{term['name']!r} needs a density, which neither particles have nor a plan y = T(x, z), whose latent "
                "variable has been integrated out. Take a functional of samples (riesz_mmd, energy_distance, "
                "sinkhorn_divergence, potential, interaction), or a method with maps that have a log det (jko_icnn)"
            )
    return terms


def refuse_unbounded(terms: list[dict]) -> None:
    """Raises ``ValueError`` for a density's term of negative weight, of which no JKO step has a minimum."""
    for term in terms:
        if term["weight"] < 0 and needs_density([term]):
            raise ValueError(
                f"{term['name']} of weight {term['weight']:g} falls without bound as mass concentrates: no step has a "
                "minimum, whatever tau; give it a positive weight"
            )


Expression = Annotated[list[dict], BeforeValidator(read_expression)]
ParticleExpression = Annotated[list[dict], BeforeValidator(read_particle_expression)]


def build_expression(terms: list[dict], target: object = None, samples: Tensor | None = None) -> Functional:
    """The functional that the ``terms`` of ``read_expression`` describe.

    ``target`` has the log density that terms such as ``kl`` take, ``samples`` are the points that divergences take,
    None for what they are ``alone``; raises ``ValueError`` where a term takes what is not given.
    """
    built: list[tuple[float, Functional]] = []
    for term in terms:
        cls = FUNCTIONALS.get(term["name"])
        config = cls.Config(**{key: value for key, value in term.items() if key not in ("name", "weight")})
        if cls.takes == "density" and not hasattr(target, "log_density"):
            raise ValueError(
                f"functional {term['name']!r} needs the log density of the data, which data set "
                f"{getattr(target, 'name', None)!r} does not have; take sinkhorn_divergence or energy_distance, which "
                "need its samples alone"
            )
        if cls.takes == "samples" and samples is None and not cls.alone:
            raise ValueError(f"functional {term['name']!r} compares with samples of the data, and there are none")
        given = {"density": target, "samples": samples, "nothing": None}[cls.takes]
        functional = cls(config=config) if given is None else cls(given, config=config)
        built += [(term["weight"] * weight, part) for weight, part in terms_of(functional)]
    return built[0][1] if len(built) == 1 and built[0][0] == 1.0 else Sum(built)


def reweighted(terms: list[dict], weights: Mapping[str, float]) -> list[dict]:
    """The terms with other weights of those that are named."""
    return [{**term, "weight": float(weights.get(term["name"], term["weight"]))} for term in terms]


def told(terms: list[dict], names: Iterable[str] | None) -> tuple[float, ...]:
    """The weights of the named terms, in the order of the names."""
    weights = {term["name"]: term["weight"] for term in terms}
    return tuple(weights[name] for name in names or ())


def takes(terms: list[dict], what: str) -> bool:
    """Whether a term takes the target's ``samples`` or its ``density``."""
    return any(FUNCTIONALS.get(term["name"]).takes == what for term in terms)


def lacks(terms: list[dict], target: Any) -> list[str]:
    """What the data do not have that a term takes of them: a log density, or samples."""
    found = []
    if takes(terms, "density") and not hasattr(target, "log_density"):
        found.append(
            f"the functional needs the log density of the data, which {target.name!r} does not have; "
            "sinkhorn_divergence and energy_distance need samples alone"
        )
    if takes(terms, "samples") and not target.has_samples:
        found.append(f"the functional compares with samples of the data, and {target.name!r} has none")
    return found


def needs_density(terms: list[dict]) -> bool:
    """Whether a term is defined for measures with a density alone."""
    return any(getattr(FUNCTIONALS.get(term["name"]), "needs_density", False) for term in terms) or takes(
        terms, "density"
    )


def has_pairs(functional: Functional) -> bool:
    """Whether the functional's cost grows with the square of the number of particles."""
    kinds = [isinstance(term, InteractionEnergy) or term.takes == "samples" for _, term in terms_of(functional)]
    return any(kinds)


def is_translation_invariant(terms: Iterable[Mapping]) -> bool:
    """Whether F is the same wherever the measure is: internal and interaction energies are, and their sums."""
    return all(issubclass(FUNCTIONALS.get(term["name"]), InternalEnergy | InteractionEnergy) for term in terms)


def gradient_of(functional: Functional, x: Tensor, density: Density | None) -> Tensor:
    """grad dF/drho at the particles, minus the velocity, detached."""
    with torch.enable_grad():
        return -velocity_of(functional, x.detach(), None, density).detach()
