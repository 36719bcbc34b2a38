"""The posterior of a Bayesian logistic regression on the user's table: a density without samples of its own."""

from __future__ import annotations

import copy
import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from gengrad.data.arrays import read_array
from gengrad.data.base import Distribution
from gengrad.data.draws import generator_for
from gengrad.registry import DATASETS, Settings


@DATASETS.register("logistic_posterior")
class LogisticPosterior(Distribution):
    """p(w, log alpha | table), unnormalised: events (features + 2,) hold the weights, the intercept, and log alpha.

    y_i = +-1 with P(y_i | w) = sigma(y_i w.x_i); w | alpha ~ N(0, I / alpha), alpha ~ Gamma(1, rate 0.01), so

        log p = sum_i log sigma(y_i w.x_i) + (k/2) log alpha - alpha |w|^2 / 2 + log alpha - 0.01 alpha,  w in R^k

    (Liu and Wang 2016, section 5; the model of arXiv 2106.00736). The table: a .csv with the label in its ``last`` or
    ``first`` column, or an .npz whose arrays ``features`` and ``labels`` name. Features are standardised by the
    training rows. Raises ``ValueError`` for text in a column, missing numbers, and labels of other than two kinds.
    """

    has_samples = False

    class Config(Settings):
        path: str
        features: str | None = None  # names of the arrays of an .npz
        labels: str | None = None
        label: Literal["first", "last"] = "last"  # column of a .csv
        held_out: Annotated[float, Field(ge=0, lt=1)] = 0.2
        split_seed: int = 0
        rate: float = Field(0.01, gt=0)
        minibatch: int | None = Field(None, ge=1)  # training rows, drawn afresh, in each optimiser step; none: all

    def prepare(self) -> None:
        x, y = self._table()
        order = torch.randperm(len(x), generator=generator_for(self.config.split_seed, "table split"))
        held = round(self.config.held_out * len(x))
        rows = order[held:]
        mean, scale = x[rows].mean(0), x[rows].std(0)
        scale[scale == 0] = 1.0  # a constant column says nothing, and stays at zero
        x = torch.cat([(x - mean) / scale, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
        self.x, self.y, self.factor = x[rows], y[rows], 1.0
        self.mean, self.scale = mean, scale
        self.x_held_out, self.y_held_out = x[order[:held]], y[order[:held]]
        if len(self.y.unique()) < 2:
            raise ValueError(f"{self.config.path!r}: the training rows are of one class only; change split_seed")
        self.event_shape = (self.x.shape[1] + 1,)

    def _table(self) -> tuple[Tensor, Tensor]:
        c = self.config
        if c.path.lower().endswith(".npz"):
            if c.features is None or c.labels is None:
                raise ValueError(f"{c.path!r}: name its arrays, data.features=... and data.labels=...")
            x, y = read_array(c.path, c.features), read_array(c.path, c.labels)
        else:
            table = read_array(c.path)
            if table.ndim != 2 or table.shape[1] < 2:
                raise ValueError(f"{c.path!r}: a table has rows and at least two columns; found shape {table.shape}")
            column = -1 if c.label == "last" else 0
            x, y = np.delete(table, column, axis=1), table[:, column]
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{c.path!r}: features {x.shape} and labels {y.shape} must be (rows, columns) and (rows,)")
        if x.dtype.kind not in "fiub" or not np.isfinite(x.astype(np.float64)).all():
            raise ValueError(f"{c.path!r}: the features must be finite numbers; encode text and fill what is missing")
        kinds = np.unique(y)
        if len(kinds) != 2:
            raise ValueError(
                f"{c.path!r}: the labels must be of two kinds; found {len(kinds)}: {kinds[:5].tolist()}"
                + (" ..." if len(kinds) > 5 else "")
                + (". Is the label in another column? data.label=first" if c.label == "last" else "")
            )
        return torch.from_numpy(x.astype(np.float64)), torch.from_numpy(np.where(y == kinds[1], 1.0, -1.0))

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        raise ValueError("a posterior has no samples of its own; train a flow to draw them")

    def log_density(self, theta: Tensor) -> Tensor:
        """log p up to a constant, (n, features + 2) -> (n,), over all training rows."""
        return self.factor * self.log_likelihood(theta, self.x, self.y) + self.log_prior(theta)

    def estimate(self, generator: torch.Generator) -> LogisticPosterior:
        """N / B times the likelihood of a ``minibatch`` of B of the N rows, drawn with replacement: unbiased."""
        size, n = self.config.minibatch, len(self.x)
        if size is None or size >= n:
            return self
        part, rows = copy.copy(self), torch.randint(n, (size,), generator=generator)
        part.x, part.y, part.factor = self.x[rows], self.y[rows], n / size
        return part

    def table_of(self, theta: Tensor) -> tuple[list[str], Tensor]:
        """Weights of the features as they stand in the table, the intercept, and the precision alpha; float64."""
        theta = theta.double()
        w = theta[:, :-2] / self.scale
        intercept = theta[:, -2] - w @ self.mean
        names = [f"w{k + 1}" for k in range(w.shape[1])]
        return [*names, "intercept", "alpha"], torch.cat([w, intercept[:, None], theta[:, -1:].exp()], dim=1)

    def log_prior(self, theta: Tensor) -> Tensor:
        w, log_alpha = theta[:, :-1], theta[:, -1]
        alpha = log_alpha.clamp_max(60).exp()
        return (w.shape[1] / 2 + 1) * log_alpha - alpha * w.square().sum(1) / 2 - self.config.rate * alpha

    @staticmethod
    def log_likelihood(theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """sum_i log sigma(y_i w.x_i), (n, features + 2) -> (n,)."""
        return logsigmoid(theta[:, :-1] @ (x * y[:, None]).to(theta).mT).sum(1)

    def score_samples(self, theta: Tensor) -> dict[str, float]:
        """Accuracy and mean log likelihood of the posterior predictive, mean over theta, on the held-out rows."""
        if not len(self.y_held_out):
            return {}
        logits = theta[:, :-1].double() @ (self.x_held_out * self.y_held_out[:, None]).mT
        right = torch.sigmoid(logits).mean(0)
        log_likelihood = torch.logsumexp(logsigmoid(logits), dim=0) - math.log(len(theta))
        return {"accuracy": float((right > 0.5).double().mean()), "log_likelihood": float(log_likelihood.mean())}
