"""The surrogate: an ensemble that predicts an objective's properties from whitened codes, and its potential."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from gengrad.data.draws import Shuffle, generator_for
from gengrad.flows.stored import read_stored, write_stored
from gengrad.latent.settings import SurrogateSettings
from gengrad.molecules.desirability import FLOOR
from gengrad.molecules.objective import Objective
from gengrad.registry import settings_of
from gengrad.training.schedule import learning_rate

KIND = "surrogate"
EDGE = 1e-3  # properties in [0, 1] are kept this far from both ends before their logit is taken


class Ensemble(nn.Module):
    """``members`` networks of two hidden layers at once: x (n, d) -> (members, n, outputs)."""

    def __init__(self, members: int, d: int, width: int, outputs: int):
        super().__init__()
        sizes = [d, width, width, outputs]
        gains = (1.0, 2.0, 0.1)  # of the variance: silu halves it; the first predictions are near the mean
        self.weights = nn.ParameterList(
            torch.randn(members, a, b) * math.sqrt(gain / a) for a, b, gain in zip(sizes, sizes[1:], gains)
        )
        self.biases = nn.ParameterList(torch.zeros(members, 1, b) for b in sizes[1:])

    def forward(self, x: Tensor) -> Tensor:
        h = x.expand(self.weights[0].shape[0], *x.shape[-2:])
        for layer, (w, b) in enumerate(zip(self.weights, self.biases)):
            h = torch.baddbmm(b, silu(h) if layer else h, w)
        return h


@dataclass(frozen=True)
class Scale:
    """y = (g(p) - mean) / deviation for each property p; g is the logit where p lies in [0, 1], else nothing.

    So a prediction of a share stays within (0, 1) wherever the flow goes, and has a gradient everywhere.
    """

    mean: Tensor
    deviation: Tensor
    unit: Tensor  # bool: the property lies in [0, 1]

    @classmethod
    def of(cls, properties: Tensor, unit: Tensor) -> Scale:
        """Of properties (n, k), NaN left out."""
        bare = cls(torch.zeros(1), torch.ones(1), unit)
        y = bare(properties)
        known = ~y.isnan()
        count = known.sum(0).clamp_min(1)
        mean = y.nan_to_num(0.0).sum(0) / count
        deviation = (((y - mean).nan_to_num(0.0).square().sum(0)) / count).sqrt()
        return cls(mean, torch.where(deviation > 1e-8, deviation, torch.ones_like(deviation)), unit)

    def __call__(self, p: Tensor) -> Tensor:
        y = torch.where(self.unit, torch.logit(p.clamp(EDGE, 1 - EDGE)), p)
        return (y - self.mean) / self.deviation

    def undo(self, y: Tensor) -> Tensor:
        y = y * self.deviation.to(y) + self.mean.to(y)
        return torch.where(self.unit, torch.sigmoid(y), y)


class Surrogate:
    """Predicts the properties that an objective's components need, from whitened codes.

    Raw properties are predicted and not desirabilities: a step or a window has no gradient far from its edge, its
    property has; and another target for the same properties needs no new fit.
    """

    def __init__(self, ensemble: Ensemble, scale: Scale, scorers: list[dict], info: dict):
        self.ensemble, self.scale, self.scorers, self.info = ensemble.eval(), scale, scorers, info

    def predict(self, x: Tensor, spare: bool = False) -> Tensor:
        """Properties (members, n, k) at whitened codes x (n, d), or of the ``spare`` network alone (1, n, k)."""
        if self.scale.unit.device != x.device:  # it follows the points that it is asked about
            s, self.ensemble = self.scale, self.ensemble.to(x.device)
            self.scale = Scale(s.mean.to(x.device), s.deviation.to(x.device), s.unit.to(x.device))
        y = self.ensemble(x.float())
        return self.scale.undo(y[-1:] if spare else y[:-1])

    def columns(self, objective: Objective) -> list[int | None]:
        """Where each scorer of an objective stands here; None for one that only filters ask for.

        Raises ``ValueError`` for a component's property that was not learned.
        """
        known = [json.dumps(s, sort_keys=True) for s in self.scorers]
        keys = [json.dumps(settings_of(s), sort_keys=True) for s in objective.scorers]
        needed = {component.column for component in objective.components}
        missing = [objective.labels[c] for c in sorted(needed) if keys[c] not in known]
        if missing:
            raise ValueError(
                f"the surrogate has not learned {', '.join(missing)} (with these settings); it knows "
                f"{', '.join(s['name'] for s in self.scorers)}. Train one for this objective: gengrad molecules "
                "train-surrogate"
            )
        return [known.index(key) if c in needed else None for c, key in enumerate(keys)]

    def desirabilities(self, objective: Objective, properties: Tensor) -> Tensor:
        """s (n, components) of predicted properties (n, k)."""
        places = self.columns(objective)
        raw = [properties[:, 0] if place is None else properties[:, place] for place in places]
        return objective.desirabilities(torch.stack(raw, dim=1))

    def potential(self, objective: Objective, x: Tensor, spare: bool = False) -> Tensor:
        """V(x) = -log of the objective's mean: -sum_i w_i log s_i(x) / sum_i w_i for the geometric one. (n, d) -> (n,).

        Averaged over the members after the logarithm, so that where they disagree V is higher (Jensen).
        """
        totals = [
            objective.totals(self.desirabilities(objective, p.double())).clamp_min(FLOOR)
            for p in self.predict(x, spare)
        ]
        return -torch.stack(totals).log().mean(0).to(x)

    def scores(self, objective: Objective, x: Tensor, spare: bool = False) -> Tensor:
        """exp(-V): the totals that the surrogate expects, (n,)."""
        with torch.no_grad():
            return torch.exp(-self.potential(objective, x.float(), spare))

    def save(self, folder: str | Path) -> None:
        description = {
            "members": self.ensemble.weights[0].shape[0],
            "d": self.ensemble.weights[0].shape[1],
            "width": self.ensemble.weights[0].shape[2],
            "scorers": self.scorers,
            "info": self.info,
        }
        scale = {f"scale.{name}": getattr(self.scale, name) for name in ("mean", "deviation", "unit")}
        tensors = {f"ensemble.{name}": t for name, t in self.ensemble.state_dict().items()}
        write_stored(Path(folder), description, tensors | scale, KIND)

    @classmethod
    def load(cls, folder: str | Path) -> Surrogate:
        """The surrogate in ``folder``; raises ``FileNotFoundError``, or ``ValueError`` for one truncated or altered."""
        description, tensors = read_stored(Path(folder), KIND)
        try:
            ensemble = Ensemble(*(description[key] for key in ("members", "d", "width")), len(description["scorers"]))
            weights = {k.removeprefix("ensemble."): t for k, t in tensors.items() if k.startswith("ensemble.")}
            ensemble.load_state_dict(weights, strict=True)
            scale = Scale(*(tensors[f"scale.{name}"] for name in ("mean", "deviation", "unit")))
            return cls(ensemble.requires_grad_(False), scale, description["scorers"], description["info"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold a surrogate that this version can build: {error}") from None


def fit_surrogate(
    x: Tensor, properties: Tensor, objective: Objective, settings: SurrogateSettings | None = None
) -> Surrogate:
    """The surrogate of an objective's properties (n, scorers) at whitened codes x (n, d), NaN left out.

    Each member has its own first weights and its own bootstrap of the molecules. What it can be trusted with is in
    ``info``: per property the rank correlation and the R2 on held-out molecules, and ``warnings``.
    """
    settings = settings or SurrogateSettings()
    columns = sorted({component.column for component in objective.components})
    wanted, labels = [objective.scorers[c] for c in columns], [objective.labels[c] for c in columns]
    y, unit = properties[:, columns].float(), torch.tensor([scorer.unit_interval for scorer in wanted])
    for label, values in zip(labels, y.T):
        if values.isnan().all():
            raise ValueError(f"{label} has no value for any molecule: there is nothing to learn")
    order = torch.randperm(len(x), generator=generator_for(settings.seed, "surrogate split"))
    held = order[: max(1, round(settings.held_out * len(x)))].sort().values
    rest = order[len(held) :].sort().values
    if len(rest) < 2:
        raise ValueError(f"{len(x)} molecules are too few to fit a surrogate and hold some out; at least 3 are needed")
    scale = Scale.of(y[rest], unit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator_for(settings.seed, "surrogate init").initial_seed())
        ensemble = Ensemble(settings.members + 1, x.shape[1], settings.width, len(wanted))
    _train(ensemble, x[rest], scale(y[rest]), settings)
    info = {"settings": settings.model_dump(mode="json"), "molecules": len(x), "labels": labels}
    found = Surrogate(ensemble.requires_grad_(False), scale, [settings_of(scorer) for scorer in wanted], info)
    info["held_out"] = _judged(found, x[held], y[held], labels)
    info["warnings"] = out_of_reach(objective, properties)
    return found


def _train(ensemble: Ensemble, x: Tensor, y: Tensor, settings: SurrogateSettings) -> None:
    """Least squares on standardised properties, every member on its own bootstrap, codes blurred by a little noise."""
    members = settings.members + 1
    bootstrap = torch.randint(len(x), (members, len(x)), generator=generator_for(settings.seed, "surrogate bootstrap"))
    size, known = min(settings.batch_size, len(x)), ~y.isnan()
    order = Shuffle(len(x), settings.seed, "surrogate order")
    optimizer = torch.optim.AdamW(ensemble.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    y = y.nan_to_num(0.0)
    for step in range(settings.steps):
        rows = bootstrap[:, order.take(step * size, (step + 1) * size)]
        generator = generator_for(settings.seed, "surrogate noise", step)
        noisy = x[rows] + settings.noise * torch.randn(*rows.shape, x.shape[1], generator=generator)
        error = (ensemble(noisy) - y[rows]).square() * known[rows]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.lr, 50)
        optimizer.zero_grad(set_to_none=True)
        (members * error.mean()).backward()
        optimizer.step()


def _judged(surrogate: Surrogate, x: Tensor, y: Tensor, labels: Sequence[str]) -> dict:
    """{label: {"rank": Spearman's correlation, "r2": ., "error": mean absolute}} of the members' mean."""
    predicted, found = surrogate.predict(x).mean(0), {}
    for k, label in enumerate(labels):
        known = ~y[:, k].isnan()
        a, b = predicted[known, k].double(), y[known, k].double()
        rest = (a - b).square().sum() / (b - b.mean()).square().sum().clamp_min(1e-30)
        figures = {"rank": rank_correlation(a, b), "r2": float(1 - rest), "error": float((a - b).abs().mean())}
        found[label] = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    return found


def out_of_reach(objective: Objective, properties: Tensor) -> list[str]:
    """A warning for every component that no molecule of the data comes near: there the surrogate is a guess."""
    s, found = objective.desirabilities(properties), []
    for component, values in zip(objective.components, s.T):
        best = float(values.nan_to_num(0.0).max())
        if best < 0.5:
            raw = properties[:, component.column]
            raw = raw[~raw.isnan()]
            found.append(
                f"{component.label}: no molecule of the data has a desirability above {best:.2g} (the property runs "
                f"from {raw.min():.4g} to {raw.max():.4g}): the target is out of the data's reach, and there the "
                "surrogate has learned nothing"
            )
    return found


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of two samples (n,): Pearson's of the ranks, ties sharing theirs; NaN without spread."""
    ranks = [_ranks(values) for values in (a, b)]
    centred = [r - r.mean() for r in ranks]
    return float((centred[0] @ centred[1]) / (centred[0].norm() * centred[1].norm()))


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, the mean one for equal values."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    ends = count.cumsum(0).double()
    return (ends - (count + 1) / 2)[place]
