"""A map that sees the measure it moves: a cloud becomes a context of a few tokens, and any point asks that context."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from gengrad.networks.kernels import Marks, smoothed
from gengrad.networks.local_fit import coefficients, fitted, moments
from gengrad.networks.mlp import perceptron
from gengrad.registry import NETWORKS, Configured, Settings

LARGEST_JACOBIAN = 3  # dimensions up to which log det DT is written out
SHORT = 0.25  # of sqrt(tau), what a step of an entropy makes of a point: no cloud counts as narrower than that
WIDEST = 0.5  # of the scale, at most the unit in which scores and Hessians are seen
FOLD = 0.05  # det DT below which log det is continued by its tangent, down through zero


@dataclass(frozen=True)
class Context:
    """What a map knows of a measure; leading dimensions (...) are those of the clouds, none or (sets,).

    ``mean`` (..., 1, d), ``scale`` (..., 1, 1): of the cloud; ``known`` (..., 1, f): its moments and, where asked for,
    log tau and the logarithms of the energy's weights; ``away`` (..., N, d): the particles, shifted and scaled by mean
    and scale, ``marks`` what they know of the log density, if it is known; ``keys``, ``values`` (..., heads, tokens,
    width / heads); ``linear`` (..., d, d), ``shift`` (..., 1, d), ``ascent`` (..., 1, kernels, or twice as many with
    marks): coefficients.
    """

    mean: Tensor
    scale: Tensor
    known: Tensor
    away: Tensor
    keys: Tensor
    values: Tensor
    linear: Tensor
    shift: Tensor
    ascent: Tensor
    tau: float
    marks: Marks | None = None


class Attention(nn.Module):
    """h <- h + W softmax(Q K' / sqrt(c)) V, then h <- h + perceptron(h): softmax weights are a mean over what is seen,

    so that a particle that comes twice weighs twice, and a cloud that comes twice weighs the same.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.then = perceptron(width, width, 1, width, "silu")

    def seen(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of z (..., m, width), each (..., heads, m, width / heads)."""
        return self._split(self.key(z)), self._split(self.value(z))

    def forward(self, h: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        query = self._split(self.query(h)) / math.sqrt(keys.shape[-1])
        h = h + self.out(self._joined(_weights(query, keys) @ values))
        return h + self.then(h)

    def dual(self, h: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """``forward`` and its derivative along v (directions, *h.shape), keys and values held fixed."""
        query = self._split(self.query(h)) / math.sqrt(keys.shape[-1])
        slope = self._split(v @ self.query.weight.mT) / math.sqrt(keys.shape[-1])
        weights = _weights(query, keys)
        change = slope @ keys.mT
        change = weights * (change - (weights * change).sum(-1, keepdim=True))
        h = h + self.out(self._joined(weights @ values))
        v = v + self._joined(change @ values) @ self.out.weight.mT
        then, slope = dual(self.then, h, v)
        return h + then, v + slope

    def _split(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def _joined(self, z: Tensor) -> Tensor:
        return z.transpose(-3, -2).flatten(-2)


def _weights(query: Tensor, keys: Tensor) -> Tensor:
    """softmax over the keys of query keys', (..., n, m); along the longer axis, where a CPU is several times faster."""
    if keys.shape[-2] < query.shape[-2]:
        return torch.softmax(keys @ query.mT, dim=-2).mT
    return torch.softmax(query @ keys.mT, dim=-1)


def dual(layers: nn.Sequential, h: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """A perceptron of linear layers and SiLU at h, and its derivative along v (directions, *h.shape)."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            h, v = layer(h), v @ layer.weight.mT
        else:
            share = torch.sigmoid(h)
            h, v = h * share, v * (share * (1 + h * (1 - share)))
    return h, v


@NETWORKS.register("set_operator")
class SetOperator(nn.Module, Configured):
    """T(x; mu) = x + tau g(x, context(mu)), with g = 0 at the start: x (..., n, d), mu a cloud (..., N, d) of any N.

    Context: a perceptron of each particle and the cloud's mean and covariance; ``blocks`` of induced set attention
    (``tokens`` learned queries gather from the particles, which then ask the tokens; Set Transformer, arXiv
    1810.00825); a last gathering. g: an affine map with coefficients from the tokens, plus a perceptron of what the
    point finds by attention to them and of the density around it, ``smoothed`` by ``kernels`` widths, plus the slopes
    of these by coefficients from the tokens: what a step of an internal energy depends on most. ``scaled``: the affine
    map and the last perceptron are sums of two, one of them in units of 1 / scale of the cloud. Equivariant under
    permutations of the cloud, unchanged when all of it comes twice; x need not be in the cloud. ``on_tau``: the context
    takes log tau too, so that one network serves many tau; ``on_weights``: so many weights of the energy, by their
    logarithms; ``log_density``: it takes log rho at the particles and sees at x the scores and Hessians that are
    ``fitted`` to it, over the same widths as the density; clouds of which it is not known are moved by a network of
    their own inside, ``blind``. ``translation_equivariant``: T(x + a; mu shifted by a) = T(x; mu) + a. Differentiable
    in its weights, and once in x; not in the cloud where ``kernels`` see it.
    """

    learns = "operator"

    class Config(Settings):
        width: int = Field(64, ge=4)
        depth: int = Field(2, ge=1)  # hidden layers of the last perceptron
        heads: int = Field(4, ge=1)
        tokens: int = Field(16, ge=1)
        blocks: int = Field(2, ge=1)
        on_tau: bool = False
        on_weights: int = Field(0, ge=0)
        kernels: int = Field(4, ge=0, le=8)  # widths sqrt(8 tau) / 2^k at which a point sees the density around it
        log_density: bool = False  # sees log rho at the particles of the cloud too, where it is given
        translation_equivariant: bool = False  # blind to where the cloud is: for energies that are the same everywhere
        scaled: bool = True  # g has parts in units of 1 / scale too, as the velocity of an internal energy has

        @model_validator(mode="after")
        def _divides(self):
            if self.width % self.heads:
                raise ValueError(f"width={self.width} does not divide into heads={self.heads}")
            if self.log_density and not self.kernels:
                raise ValueError("log_density is seen through kernels; kernels=0 leaves none")
            return self

    def __init__(self, config: Settings | None = None, *, event_shape: tuple[int, ...], **settings):
        nn.Module.__init__(self)
        Configured.__init__(self, config, **settings)
        if len(event_shape) != 1:
            raise ValueError(f"network 'set_operator' moves clouds of points (d,), not events {tuple(event_shape)}")
        self.event_shape, (self.d,) = tuple(event_shape), event_shape
        c, d, parts = self.config, self.d, 1 + self.config.scaled
        self.located = 0 if c.translation_equivariant else d  # coordinates that say where: of x, and of the mean
        marks = d * (d + 3) // 2 if c.log_density else 0  # of a particle: its score, half of its Hessian
        known = self.located + 1 + d * (d + 1) // 2 + c.on_tau + c.on_weights
        vectors = c.kernels * (1 + c.log_density)  # at each point
        self.local = c.kernels * (1 + d + marks)
        self.particle = perceptron(self.located + d + known + marks, c.width, 1, c.width, "silu")
        self.induced = nn.Parameter(torch.randn(c.blocks + 1, c.tokens, c.width))
        self.gather = nn.ModuleList(Attention(c.width, c.heads) for _ in range(c.blocks + 1))
        self.scatter = nn.ModuleList(Attention(c.width, c.heads) for _ in range(c.blocks))
        self.affine = nn.Linear(c.width, parts * d * (d + 1) + vectors)
        self.point = perceptron(self.located + d + known + self.local, c.width, 1, c.width, "silu")
        self.ask = Attention(c.width, c.heads)
        self.head = perceptron(c.width, c.width, c.depth, parts * d, "silu")
        with torch.no_grad():
            for parameter in (*self.affine.parameters(), *self.head[-1].parameters()):
                parameter.zero_()
        self.blind = None
        if c.log_density:  # what it takes to see a score in a cloud's noise is of no use to who is told the score
            self.blind = SetOperator(c.model_copy(update={"log_density": False}), event_shape=self.event_shape)

    def context(
        self, particles: Tensor, tau: float, weights: Sequence[float] = (), log_density: Tensor | Marks | None = None
    ) -> Context:
        """The context of clouds (..., N, d) for a step of length ``tau`` of an energy with these ``weights``.

        ``log_density`` (..., N): log rho at the particles, NaN where it is not known, or the ``marks`` of it, for
        networks that take it; others ignore it. Without, or where there are no marks, the context is that of ``blind``.
        Raises ``ValueError`` where tau is none, for other weights than so many as ``on_weights``, and where log
        densities are known of some of the clouds alone.
        """
        if tau is None or not 0 < tau < math.inf:
            raise ValueError(f"a step of an operator has a length tau > 0; got {tau}")
        if len(weights) != self.config.on_weights:
            raise ValueError(
                f"this operator is told {self.config.on_weights} weights of the energy; got {len(weights)}"
            )
        marks, own = log_density if self.blind is not None else None, []
        if isinstance(marks, Tensor):
            marks = self.marks(particles, tau, marks)
        if self.blind is not None and marks is None:
            return self.blind.context(particles, tau, weights)
        mean, scale = moments(particles)
        away = (particles - mean) / scale
        rows, columns = torch.triu_indices(self.d, self.d)
        covariance = (away.mT @ away / away.shape[-2])[..., rows, columns].unsqueeze(-2)
        known = [mean[..., : self.located], scale.log(), covariance]
        if self.config.on_tau:
            known.append(torch.full_like(scale, math.log(tau)))
        known += [torch.full_like(scale, math.log(weight)) for weight in weights]
        known = torch.cat(known, -1)
        if marks is not None:
            own.append(marks.at(away))
        h = self.particle(self._beside(particles, away, known, *own))
        for level, gather in enumerate(self.gather):
            tokens = gather(self.induced[level].expand(*h.shape[:-2], -1, -1), *gather.seen(h))
            if level < len(self.scatter):
                h = self.scatter[level](h, *self.scatter[level].seen(tokens))
        coefficients = self.affine(tokens.mean(-2))
        cut = coefficients.shape[-1] - self.config.kernels * (1 + self.config.log_density)
        affine, ascent = self._whole(coefficients[..., :cut], scale[..., 0], tau), coefficients[..., None, cut:]
        affine = affine.unflatten(-1, (self.d, self.d + 1))
        linear, shift = affine[..., : self.d], affine[..., None, :, self.d]
        return Context(mean, scale, known, away, *self.ask.seen(tokens), linear, shift, ascent, tau, marks)

    def columns(self, particles: Tensor, log_density: Tensor) -> Tensor:
        """``Marks.columns`` of particles (..., N, d) by log rho (..., N) there, zero where none is known."""
        mean, scale = moments(particles)
        return fitted((particles - mean) / scale, log_density, scale).columns

    def marks(
        self, particles: Tensor, tau: float, log_density: Tensor, columns: Tensor | None = None
    ) -> Marks | None:  # fmt: skip
        """What the particles (..., N, d) know of log rho (..., N): none where it is known at fewer of them than a cubic

        has coefficients. ``columns`` of marks that were found of these particles before: neither tau nor a weight is in
        them. Raises ``ValueError`` where it is none for some of the clouds alone.
        """
        told = log_density.isfinite().sum(-1) > len(coefficients(self.d))
        if not told.any():
            return None
        if not told.all():
            raise ValueError(
                f"log densities are known of {int(told.sum())} of {told.numel()} clouds: move the others by themselves"
            )
        columns = self.columns(particles, log_density) if columns is None else columns
        return Marks(columns, (math.sqrt(2 * tau) / moments(particles)[1]).clamp_max(WIDEST))

    def forward(
        self, x: Tensor, measure: Context | Tensor, tau: float | None = None, weights: Sequence[float] = (),
        jacobian: bool = False, log_density: Tensor | Marks | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        """T(x; mu), like x (..., n, d); with ``jacobian`` also DT (..., n, d, d). ``measure``: mu as a context, or as

        a cloud (..., N, d) with what ``context`` takes. DT comes of d forward-mode derivatives with the context held
        fixed; raises ``ValueError`` above d = 3, where its determinant is not written out.
        """
        context = measure if isinstance(measure, Context) else self.context(measure, tau, weights, log_density)
        network = self if self.blind is None or context.marks is not None else self.blind
        return network._jacobian(x, context) if jacobian else network._moved(x, context)

    def _density(self, away: Tensor, context: Context, along: Tensor | None = None) -> tuple:
        """``smoothed`` in the cloud's scale, from twice the width by which the heat flow smooths in a time tau."""
        widest = math.sqrt(8 * context.tau) / context.scale
        return smoothed(away, context.away, widest, self.config.kernels, along, context.marks)

    def _moved(self, x: Tensor, context: Context) -> Tensor:
        c = context
        away, local, pushed = (x - c.mean) / c.scale, [], 0.0
        if self.config.kernels:
            logs, slopes, *_ = self._density(away, c)
            local, pushed = [logs, slopes.flatten(-2)], (c.ascent[..., None, :] @ slopes)[..., 0, :]
        h = self.ask(self.point(self._beside(x, away, c.known, *local)), c.keys, c.values)
        return x + c.tau * (away @ c.linear.mT + c.shift + pushed + self._whole(self.head(h), c.scale, c.tau))

    def _jacobian(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        if self.d > LARGEST_JACOBIAN:
            raise ValueError(f"log det DT is written out up to d = {LARGEST_JACOBIAN}; this operator has d = {self.d}")
        c, d = context, self.d
        away, local, pushed, turned = (x - c.mean) / c.scale, [], 0.0, 0.0
        along = torch.eye(d, dtype=x.dtype, device=x.device).view(d, *[1] * (x.dim() - 1), d)  # of x, of away
        weight = self.point[0].weight
        ahead = weight[:, self.located : self.located + d] / c.scale
        v = along @ (ahead + weight[:, :d] if self.located else ahead).mT
        if self.config.kernels:
            logs, slopes, rises, turns = self._density(away, c, along / c.scale)
            local, pushed = [logs, slopes.flatten(-2)], (c.ascent[..., None, :] @ slopes)[..., 0, :]
            turned = (c.ascent[..., None, :] @ turns)[..., 0, :]
            v = v + torch.cat([rises, turns.flatten(-2)], -1) @ weight[:, -self.local :].mT
        h = self.point[0](self._beside(x, away, c.known, *local))
        h, v = dual(self.point[1:], h, v.expand(d, *h.shape))
        h, v = dual(self.head, *self.ask.dual(h, v, c.keys, c.values))
        h, v = (self._whole(parts, c.scale, c.tau) for parts in (h, v))
        moved = x + c.tau * (away @ c.linear.mT + c.shift + pushed + h)
        columns = along + c.tau * (along @ c.linear.mT / c.scale + turned + v)
        return moved, columns.movedim(0, -1)

    def _whole(self, parts: Tensor, scale: Tensor, tau: float) -> Tensor:
        """A displacement of its parts, the second one in units of 1 / scale, of the cloud or a part of a step."""
        if not self.config.scaled:
            return parts
        one, other = parts.chunk(2, -1)
        return one + other / scale.clamp_min(SHORT * math.sqrt(tau))

    def _beside(self, x: Tensor, away: Tensor, known: Tensor, *local: Tensor) -> Tensor:
        return torch.cat([x[..., : self.located], away, known.expand(*x.shape[:-1], -1), *local], -1)


def determinant(jacobian: Tensor) -> Tensor:
    """det of (..., d, d), d <= 3, written out."""
    a = jacobian.unbind(-1)
    if len(a) == 1:
        return a[0][..., 0]
    if len(a) == 2:
        return a[0][..., 0] * a[1][..., 1] - a[0][..., 1] * a[1][..., 0]
    return (torch.linalg.cross(a[0], a[1]) * a[2]).sum(-1)


def log_without_folds(det: Tensor, fold: float = FOLD) -> Tensor:
    """log det where det > ``fold``; below, its tangent there, log fold + (det - fold) / fold.

    So a map that folds (det <= 0) has a finite loss, a large one: the tangent is the penalty that drives it out.
    """
    return torch.where(det > fold, det.clamp_min(fold).log(), math.log(fold) + (det - fold) / fold)
