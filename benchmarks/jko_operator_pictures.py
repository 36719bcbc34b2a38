"""Pictures of what benchmarks/jko_operator.py has measured: the ablation, and rollouts beside exact steps.

    python benchmarks/jko_operator_pictures.py [--runs FOLDER] [--out FILE.json] [--pictures FOLDER]

operator_ablation.png: share and gap after each step, a line for each variant of --out. operator_rollout.png: density of
a mixture that the operator of the double well in --runs has not seen, after some steps of it and of the line's solver.
operator_circulation.png: from where exact steps bring the particles of a product in the plane to where those of the
double well do, after twice its horizon, uncorrected and corrected.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from jko_operator_cells import ABLATIONS
from matplotlib.figure import Figure

import gengrad
from gengrad.data.draws import generator_for
from gengrad.data.families import points_of_the_cube
from gengrad.evaluation.references import reference_of_member
from gengrad.files import read_json
from gengrad.flows.densities import doubled
from gengrad.flows.implicit_steps import on_the_line
from gengrad.plotting.style import CURVES, SAMPLES, TARGET, curve_panel, legend_below, new_figure, save
from gengrad.registry import FAMILIES
from gengrad.rollouts import independent_coordinates

ROOT = Path(__file__).parents[1]
TICKS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
SHOWN = (0, 1, 3, 10, 20)  # steps


def ablation(results: dict) -> Figure:
    figure, panels = new_figure(2, 9.0, 3.6)
    for panel, label in zip(panels, ("distance to exact steps / way", "energy gap / fall")):
        curve_panel(panel, "steps", label)
        panel.set_yscale("log")
        panel.set_yticks(TICKS, [f"{100 * tick:g} %" for tick in TICKS])
        panel.set_yticks([], minor=True)
        panel.set_xticks([1, 5, 10, 15, 20])
    for colour, variant in zip(CURVES, ABLATIONS):
        for panel, values in zip(panels, results.get(f"ablation/{variant}/0", {}).get("along", ())):
            shown = [math.nan if value is None else value for value in values]
            panel.plot(range(1, len(shown) + 1), shown, color=colour, label=variant, linewidth=1.5)
    legend_below(figure, panels[0], 3)
    return figure


def rollout(flow: gengrad.Flow, number: int) -> Figure:
    """A held-out mixture: grey the exact steps, a line the operator's density at its particles."""
    operator, generator = doubled(flow)[0], generator_for(1, "operator/held out", number)
    settings = next(family for family in flow.info["config"]["method"]["initial"] if family["name"] == "mixtures")
    members = FAMILIES.build(settings).members(1, 1, generator)
    x = members.cloud(points_of_the_cube(1, 1024, 1 + members.spare, generator))[0]
    log_rho = members.log_density(x[None])[0]
    exact = on_the_line(operator.functional(), operator.tau, lambda z: members.log_density(z[None])[0], x, log_rho)
    figure, panels = new_figure(len(SHOWN), 12.0, 2.6)
    state, order = (x, log_rho), x[:, 0].argsort()
    for step in range(max(SHOWN) + 1):
        if step in SHOWN:
            panel = panels[SHOWN.index(step)]
            for (points, logs), look in ((exact(step), None), (state, SAMPLES)):
                at, height = points[order, 0].numpy(), logs[order].exp().numpy()
                if look is None:
                    panel.fill_between(at, height, color=TARGET, alpha=0.8, linewidth=0, label="exact steps")
                else:
                    panel.plot(at, height, color=look, linewidth=1.5, label="operator")
            curve_panel(panel, "", "")
            panel.set_title("1 step" if step == 1 else f"{step} steps", fontsize=10)
            panel.set_ylim(bottom=0)
        state = operator.moved(*state)[:2]
    legend_below(figure, panels[0], 2)
    return figure


def circulation(flow: gengrad.Flow) -> Figure:
    """Arrows from where exact steps bring particles to where the operator's do, four times as long."""
    operator, generator = doubled(flow)[0], generator_for(1, "operator/held out", 0)
    members = FAMILIES.build(independent_coordinates(flow)[0]).members(1, 2, generator)
    x = members.cloud(points_of_the_cube(1, 1024, 2 + members.spare, generator))[0]
    log_rho, steps = members.log_density(x[None])[0], 2 * flow.info["config"]["method"]["jko_steps"]
    exact = reference_of_member(operator, members, x, log_rho)(steps)[0]
    way = (exact - x).square().sum(1).mean().sqrt()
    figure, panels = new_figure(2, 9.0, 4.6)
    for panel, degree, name in zip(panels, (0, operator.correction), ("the network's steps", "corrected")):
        operator.correction, state = degree, (x, log_rho)
        for _ in range(steps):
            state = operator.moved(*state)[:2]
        off = state[0] - exact
        share = float(off.square().sum(1).mean().sqrt() / way)
        panel.quiver(*exact.T.numpy(), *off.T.numpy(), angles="xy", scale_units="xy", scale=0.25, color=SAMPLES)
        panel.set_title(f"{name}, {steps} steps: {100 * share:.2g} % of the way", fontsize=10)
        panel.set_aspect("equal")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/operator_benchmark"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "jko_operator.json")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--number", type=int, default=1, help="of the held-out mixture")
    given = parser.parse_args()
    save(ablation(read_json(given.out)), given.pictures / "operator_ablation.png")
    if (given.runs / "double_well_1_0" / "flow.json").exists():
        flow = gengrad.load(given.runs / "double_well_1_0")
        save(rollout(flow, given.number), given.pictures / "operator_rollout.png")
    if (given.runs / "double_well_2_0" / "flow.json").exists():
        save(circulation(gengrad.load(given.runs / "double_well_2_0")), given.pictures / "operator_circulation.png")


if __name__ == "__main__":
    main()
