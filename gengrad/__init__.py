"""gengrad: train, sample and steer generative models by Wasserstein gradient flows.

The public names, imported when they are first used:

- ``load(run)``: the trained ``Flow`` of a run folder, with ``sample`` and ``trajectory``
- ``train(config)``: one training run from a ``RunConfig`` (``load_config(path, overrides)`` makes one)
- ``sinkhorn``, ``sinkhorn_velocity``, ``sinkhorn_divergence``: the optimal transport below it all
- ``SinkhornDivergence``, ``EnergyDistance``, ``RieszMMD`` or ``MMD``: functionals; ``particle_flow`` descends them
- ``PotentialEnergy``, ``InteractionEnergy``, ``Entropy``, ``PowerEntropy``, ``KL``, ``Density``: energies
"""

from __future__ import annotations

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "load": "gengrad.run",  # which knows every data set that a flow may have started from
    "Flow": "gengrad.flows.flow",
    "train": "gengrad.run",
    "load_config": "gengrad.config",
    "sinkhorn": "gengrad.ot",
    "sinkhorn_velocity": "gengrad.ot",
    "sinkhorn_divergence": "gengrad.ot",
    "SinkhornDivergence": "gengrad.functionals.divergence",
    "PotentialEnergy": "gengrad.functionals",
    "InteractionEnergy": "gengrad.functionals",
    "Entropy": "gengrad.functionals",
    "PowerEntropy": "gengrad.functionals",
    "KL": "gengrad.functionals",
    "Density": "gengrad.functionals",
    "EnergyDistance": "gengrad.functionals.riesz",
    "RieszMMD": "gengrad.functionals.riesz",
    "MMD": "gengrad.functionals.riesz",
    "particle_flow": "gengrad.flows.particles",
}
__all__ = [*_PUBLIC, "__version__"]
_ROOMS = {"data", "ot", "networks", "functionals", "flows", "methods", "molecules", "training", "evaluation"}
_ROOMS |= {"plotting"}


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _ROOMS:
        return import_module(f"gengrad.{name}")
    raise AttributeError(f"module 'gengrad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
