"""A flow with densities, judged after each of its steps: energies, divergences from the truth, radii."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from gengrad.data.base import Distribution
from gengrad.data.draws import draw
from gengrad.evaluation.grid import GridTruth
from gengrad.evaluation.truth import GaussianTruth, RadialTruth, RingTruth, symmetric_gaussian_kl
from gengrad.flows.densities import doubled
from gengrad.flows.flow import Flow

Pairs = list[tuple[Tensor, Tensor]]  # states: points and log rho at them; Gaussians: mean and covariance


def forward_densities(flow: Flow, n: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """(x, log rho(x)) after each step, the source first: n draws pushed forward in float64, no inverse needed."""
    x = draw(flow.source, 0, n, seed, "source").double()
    log_rho, states = flow.source.log_density(x).double(), []
    states.append((x, log_rho))
    with torch.no_grad():
        for transport in doubled(flow):
            log_rho = log_rho - transport.log_det(x)
            x = transport.push(x)
            states.append((x, log_rho))
    return states


def affine_gaussians(flow: Flow) -> list[tuple[Tensor, Tensor]] | None:
    """Mean and covariance after each step, where the source is Gaussian and every map affine; else None."""
    moments = flow.source.moments()
    affine = all(hasattr(t, "network") and t.network.is_affine for t in flow.transports)
    if moments is None or not affine:
        return None
    states = [moments]
    for transport in doubled(flow):
        q, b = transport.network.quadratic.detach(), transport.network.shift.detach()
        mean, cov = states[-1]
        states.append((q @ mean + b, q @ cov @ q))
    return states


def divergences(
    flow: Flow, law: Distribution, step: int, state: tuple[Tensor, Tensor], seed: int
) -> tuple[float, float]:
    """(KL(flow | law), KL(law | flow)) by means over the flow's particles and over as many draws of the law.

    Their standard errors are about sqrt(2 KL / n) each.
    """
    x, log_rho = state
    forward = float((log_rho - law.log_density(x)).mean())
    y = law.sample(len(x), torch.Generator().manual_seed(seed)).double()
    backward = float((law.log_density(y) - flow.log_density(y, step=step)).mean())
    return forward, backward


def judge_steps(
    flow: Flow,
    truth: GridTruth | GaussianTruth | RadialTruth | RingTruth | None,
    *,
    n: int,
    seed: int,
    chosen: list[int] | None = None,
) -> list[dict]:
    """One row per step: the record of its training, and what the ``truth`` (or None) says of it.

    Symmetric KL is exact where flow and truth are Gaussian, and else a mean over n points at the ``chosen`` steps
    (default: four and the last).
    """
    count = len(flow.transports)
    chosen = chosen or sorted({math.ceil(count * share / 4) for share in range(1, 5)})
    states, gaussians, rows = forward_densities(flow, n, seed), affine_gaussians(flow), []
    for k in range(1, count + 1):
        row = dict(flow.transports[k - 1].record)
        if "step" not in row:
            continue  # an observation
        if isinstance(truth, GridTruth):
            row["energy_exact"] = truth.energy(row["step"])
            row["symmetric_kl"] = truth.symmetric_kl(row["step"], partial(flow.log_density, step=k))
        elif isinstance(truth, GaussianTruth):
            row |= _gaussian_row(flow, truth, k, states, gaussians, seed, k in chosen)
        elif isinstance(truth, RadialTruth):
            row |= _radial_row(truth, k, states[k])
        elif isinstance(truth, RingTruth):
            row |= {"radius": truth.radius_of(states[k][0]), "radius_at_rest": truth.radius}
            row["energy_at_rest"] = truth.energy
        rows.append(row)
    return rows


def judge_end(flow: Flow, target: Distribution, *, n: int, seed: int, step: int | None = None) -> dict[str, float]:
    """KL both ways between the flow at its end (or ``step``) and a target with samples and a density."""
    step = len(flow.transports) if step is None else step
    states = forward_densities(flow, n, seed)
    forward, backward = divergences(flow, target, step, states[step], seed)
    return {"kl": forward, "kl_back": backward, "symmetric_kl": forward + backward, "n": n}


def _gaussian_row(
    flow: Flow, truth: GaussianTruth, k: int, states: Pairs, gaussians: Pairs | None, seed: int, chosen: bool
) -> dict:
    row = {
        "energy_exact": truth.energy(k),
        "energy_implicit": truth.energy(k, "implicit"),
        "symmetric_kl_implicit": truth.floor(k),
    }
    if gaussians is not None:
        row["symmetric_kl"] = symmetric_gaussian_kl(*gaussians[k], *truth.exact(k))
        row["symmetric_kl_to_implicit"] = symmetric_gaussian_kl(*gaussians[k], *truth.implicit(k))
    elif chosen:
        row["symmetric_kl"] = sum(divergences(flow, truth.law(k), k, states[k], seed))
        row["symmetric_kl_to_implicit"] = sum(divergences(flow, truth.law(k, "implicit"), k, states[k], seed))
    return row


def _radial_row(truth: RadialTruth, k: int, state: tuple[Tensor, Tensor]) -> dict:
    x, log_rho = state
    return {
        "radius": truth.radius_of(x),
        "radius_exact": truth.exact(k),
        "radius_implicit": truth.implicit(k),
        "energy_exact": truth.energy(k),
        "energy_implicit": truth.energy(k, "implicit"),
        "density_error": _l1(x, log_rho, truth.law(k, "implicit")),
        "density_error_exact": _l1(x, log_rho, truth.law(k)),
    }


def _l1(x: Tensor, log_rho: Tensor, law: Distribution) -> float:
    """int |rho - rho*| = 2 E max(0, 1 - rho* / rho) over particles x of rho, also where the supports differ."""
    return 2 * float((1 - (law.log_density(x) - log_rho).exp()).clamp_min(0.0).mean())


COLUMNS = (
    "time", "energy", "energy_implicit", "energy_exact", "energy_at_rest", "move", "residual", "radius",
    "radius_implicit", "radius_exact", "radius_at_rest", "density_error", "density_error_exact", "symmetric_kl",
    "symmetric_kl_to_implicit", "symmetric_kl_implicit", "gap", "w2", "moved", "share",
)  # fmt: skip


def steps_table(rows: list[dict], most: int = 12) -> str:
    """Markdown: at most about ``most`` of the rows, the last among them, and the columns that any row has."""
    keep = rows[:: max(1, math.ceil(len(rows) / most))]
    keep = keep if keep[-1] is rows[-1] else [*keep, rows[-1]]
    columns = [name for name in COLUMNS if any(row.get(name) is not None for row in rows)]
    lines = ["| step | " + " | ".join(name.replace("_", " ") for name in columns) + " |", "| --- " * (len(columns) + 1)]
    for row in keep:
        cells = ["" if row.get(name) is None else f"{row[name]:.4g}" for name in columns]
        lines.append(f"| {row['step']} | " + " | ".join(cells) + " |")
    return "\n".join([lines[0], lines[1] + "|", *lines[2:]])


ERRORS = (  # what is judged, then the columns: learned, of the exact implicit steps, of the continuous flow
    ("energy, of its range", "energy", "energy_implicit", "energy_exact"),
    ("radius, relative", "radius", "radius_implicit", "radius_exact"),
)
DISTANCES = (
    ("density in L1", "density_error", "density_error_exact"),
    ("symmetric KL", "symmetric_kl_to_implicit", "symmetric_kl"),
)


def errors_table(rows: list[dict]) -> str:
    """Markdown: the largest errors over all steps against exact implicit steps and the continuous flow, or ""."""
    lines = []
    for label, key, *truths in ERRORS:
        worst = [_worst(rows, key, truth) for truth in truths]
        lines += _line(label, worst)
    for label, *keys in DISTANCES:
        worst = [max((row[key] for row in rows if row.get(key) is not None), default=None) for key in keys]
        lines += _line(label, worst)
    head = "| largest error over the steps | against exact implicit steps | against the continuous flow |"
    return "\n".join([head, "| --- | --- | --- |", *lines]) if lines else ""


def _worst(rows: list[dict], key: str, truth: str) -> float | None:
    """The largest |row[key] - row[truth]|: for energies in units of the truth's range, else relative to the truth."""
    known = [row for row in rows if row.get(key) is not None and row.get(truth) is not None]
    if not known:
        return None
    passed = [row[truth] for row in known] + [rows[0]["energy_before"]]
    unit = max(passed) - min(passed)  # an energy's zero says nothing
    return max(abs(row[key] - row[truth]) / max(unit if key == "energy" else row[truth], 1e-12) for row in known)


def _line(label: str, worst: list[float | None]) -> list[str]:
    cells = ["" if value is None else f"{value:.2g}" for value in worst]
    return [f"| {label} | {' | '.join(cells)} |"] if any(cells) else []
