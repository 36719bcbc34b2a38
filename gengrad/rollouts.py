"""A learned operator's report: its rollout from the run's source, and from measures that training has not seen."""

from __future__ import annotations

from pathlib import Path

from gengrad import plotting
from gengrad.data.families import read_families
from gengrad.evaluation.operators import judge_held_out, judge_source, law_of
from gengrad.evaluation.steps import steps_table
from gengrad.files import write_atomically, write_json
from gengrad.flows.flow import Flow
from gengrad.flows.implicit_steps import axes_of
from gengrad.flows.operator import operator_of
from gengrad.functionals.expression import has_pairs

ROLLOUTS = 8  # from held-out measures on the line; half as many elsewhere, where a step takes four times as long
PARTICLES = 1024  # of each of them
PAIRS = 1024  # particles of the rollout from the source where every one meets every other; of the others, half of it


def judge_operator(flow: Flow, folder: Path, *, n: int, seed: int) -> dict:
    """Twice the horizon from the source, and from held-out measures; writes ``steps.json``, ``steps.md`` and pictures.

    ``energy.png`` beside exact implicit steps where they are known, ``rollout.gif`` of the density, or of the points.
    """
    transport, config = operator_of(flow), flow.info["config"]["method"]
    pairs = has_pairs(transport.functional())
    steps, n = 2 * config["jko_steps"], min(n, PAIRS) if pairs else n
    rows, way = judge_source(flow, steps, n=n, seed=seed)
    plotting.save(plotting.energy_figure(rows), folder / "energy.png")
    if way.log_density is not None and way.folded == 0 and way.x.shape[1] <= 2:
        states = [(x.double(), log_rho.double()) for x, log_rho in zip(way.states, way.log_density)]
        plotting.density_gif(states, law_of(flow), way.times.tolist(), folder / "rollout.gif")
    else:
        plotting.trajectory_gif(way.states[:, :1000], folder / "rollout.gif")
    initial, apart = config["initial"], independent_coordinates(flow)
    kinds = [("as in training", initial, {}), ("more components", more_components(config), {})]
    if apart is not None:
        kinds.append(("independent coordinates", apart, {}))
    kinds.append(("independent points", apart or initial, {"even": False}))  # what most users have
    if transport.functional().needs_density:
        kinds.append(("independent points without log densities", apart or initial, {"even": False, "told": False}))
    count = ROLLOUTS if flow.event_shape == (1,) else ROLLOUTS // 2
    given = {"count": count, "n": PAIRS // 2 if pairs else PARTICLES, "seed": seed}
    held_out = {name: judge_held_out(flow, families, steps, **given, **how) for name, families, how in kinds}
    lines = [steps_table(rows), "", held_out_table(held_out)]
    table = "\n".join(lines)
    write_atomically(folder / "steps.md", (table + "\n").encode())
    report = {"steps": rows, "held_out": held_out, "table": table, "pictures": "energy.png, rollout.gif"}
    write_json(folder / "steps.json", report)
    return report


def more_components(config: dict) -> list[dict]:
    """Mixtures of more components than training has: at the reach and sizes of its first family."""
    first = config["initial"][0]
    most = max((family.get("components", 0) for family in config["initial"]), default=0)
    wanted = {"name": "mixtures", "components": 2 * max(most, 2)}
    return read_families(wanted | {key: first[key] for key in ("reach", "smallest", "largest")})


def independent_coordinates(flow: Flow) -> list[dict] | None:
    """Mixtures in the plane and in space of which exact steps are known: ``products`` of two components each, of the

    reach and sizes of the training's mixtures, along the axes in which the functional is a sum. None where there are no
    mixtures or no axes.
    """
    families, (d,) = flow.info["config"]["method"]["initial"], flow.event_shape
    mixtures = next((family for family in families if family["name"] == "mixtures"), None)
    if mixtures is None or d not in (2, 3) or (axes := axes_of(operator_of(flow).functional(), d)) is None:
        return None
    kept = {key: mixtures[key] for key in ("reach", "smallest", "largest")}
    return read_families({**kept, "name": "products", "components": 2, "axes": axes.tolist()})


def held_out_table(held_out: dict[str, dict]) -> str:
    """Markdown, a row for each kind of initial measures."""
    keys = (key for found in held_out.values() for key in found if not key.endswith("along"))
    columns = list(dict.fromkeys(keys))
    lines = ["| initial measures | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines.append("| --- " * (len(columns) + 1) + "|")
    for name, found in held_out.items():
        cells = [f"{found[c]:.3g}" if c in found else "" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
