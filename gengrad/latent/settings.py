"""The settings of the stages before a flow: the autoencoder and the surrogate."""

from __future__ import annotations

from pydantic import Field, field_validator

from gengrad.molecules.autoencoder import Autoencoder
from gengrad.registry import SCORERS, Settings


class AutoencoderSettings(Settings):
    """How an autoencoder is trained: for ``minutes`` of the wall clock, or for ``steps``, which repeat exactly."""

    minutes: float = Field(10.0, gt=0)
    steps: int | None = Field(None, ge=1)  # counts instead of the minutes where it is given
    network: Autoencoder.Config = Autoencoder.Config()
    batch_size: int = Field(128, ge=2)
    lr: float = Field(2e-3, gt=0)
    warmup: int = Field(100, ge=0)
    noise: float = Field(0.35, ge=0)  # standard deviation of what is added to the codes, whose coordinates have about 1
    properties: list[str] = []  # scorers whose values the codes shall tell, such as qed, logp, sa
    property_weight: float = Field(0.1, ge=0)  # of their squared error, beside the cross-entropy of a token
    labelled: int = Field(50_000, ge=1)  # molecules that are scored for it at most, drawn by ``seed``
    held_out: int = Field(1000, ge=1)  # molecules kept for the report; at most a tenth
    seed: int = Field(0, ge=0)

    @field_validator("properties")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        import gengrad.molecules.scorers  # noqa: F401 - registers the scorers

        for name in names:
            scorer = SCORERS.get(name)
            if scorer.outside or any(field.is_required() for field in scorer.Config.model_fields.values()):
                raise ValueError(
                    f"{name} needs settings of its own; an autoencoder learns plain properties: qed, logp, sa"
                )
        return names


class SurrogateSettings(Settings):
    """``members`` networks make the potential; one more, which no flow ever sees, measures how they are exploited."""

    members: int = Field(4, ge=1)
    width: int = Field(128, ge=1)
    steps: int = Field(2000, ge=1)
    batch_size: int = Field(256, ge=2)
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    noise: float = Field(0.1, ge=0)  # standard deviation of what is added to the whitened codes in training
    held_out: float = Field(0.1, gt=0, lt=1)
    explored: int = Field(10_000, ge=0)  # points beside the molecules' codes that are decoded and scored for the fit
    seed: int = Field(0, ge=0)
