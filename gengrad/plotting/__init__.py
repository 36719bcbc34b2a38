"""Pictures of flows and scores. Every function returns its figure or writes its file; nothing is shown.

Orange is where mass starts, blue what the flow made of it, magenta what is on its way, grey the target: colours that
colour-blind readers tell apart; curves differ by marker too. Figures are drawn without pyplot, so that no global state
is touched and no screen needed.
"""

from .curves import loss_curve, quality_against_nfe, running_median
from .densities import density_figure, density_gif, energy_figure
from .images import image_grid, on_the_way, over_time, side_by_side, strips
from .points import Plane, scatter, snapshots, trajectory_figure, trajectory_gif
from .populations import curves, gain_against_distance, predicted_against_true, property_histogram
from .style import save, svg, write_gif

__all__ = [
    "Plane",
    "curves",
    "density_figure",
    "density_gif",
    "energy_figure",
    "gain_against_distance",
    "image_grid",
    "loss_curve",
    "on_the_way",
    "over_time",
    "predicted_against_true",
    "property_histogram",
    "quality_against_nfe",
    "running_median",
    "save",
    "scatter",
    "side_by_side",
    "snapshots",
    "strips",
    "svg",
    "trajectory_figure",
    "trajectory_gif",
    "write_gif",
]
