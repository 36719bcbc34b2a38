"""The potential that a functional takes: V of a stored surrogate, under its own objective or another one."""

from __future__ import annotations

from pydantic import field_validator
from torch import Tensor

from gengrad.registry import POTENTIALS, Configured, Settings


@POTENTIALS.register("surrogate")
class SurrogatePotential(Configured):
    """V(x) = -log of the objective's weighted mean of desirabilities, as the surrogate in ``folder`` predicts them.

    x: whitened codes (n, d). ``objective``: as in an objective file; none: the one that the surrogate was fitted for.
    ``folder`` may be left out in the config of a run that makes its own surrogate. Raises ``ValueError`` for a property
    that the surrogate has not learned.
    """

    made_by_a_run = True  # so that nothing but a run's folder holds it

    class Config(Settings):
        folder: str | None = None
        objective: dict | None = None

        @field_validator("objective")
        @classmethod
        def _readable(cls, given):
            from gengrad.molecules.objective import read_objective

            if given is not None:
                read_objective(given)
            return given

    def __init__(self, config: Settings | None = None, **settings):
        super().__init__(config, **settings)
        self._loaded = None

    def __call__(self, x: Tensor) -> Tensor:
        surrogate, objective = self.loaded()
        return surrogate.potential(objective, x.flatten(1))

    def loaded(self):
        """(surrogate, objective), read when they are first needed."""
        if self._loaded is None:
            from gengrad.latent.surrogate import Surrogate
            from gengrad.molecules.objective import read_objective

            if self.config.folder is None:
                raise ValueError("potential 'surrogate' needs the folder of one: gengrad molecules train-surrogate")
            surrogate = Surrogate.load(self.config.folder)
            objective = read_objective(self.config.objective or surrogate.info["objective"])
            surrogate.columns(objective)
            self._loaded = surrogate, objective
        return self._loaded
