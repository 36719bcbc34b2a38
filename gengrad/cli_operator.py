"""``sample.py RUN --source points.npy --steps 40 --out evolved.npy``: a learned operator on a cloud of the user's."""

from __future__ import annotations

import warnings
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from gengrad.flows.flow import Flow

ENDINGS = (".npy", ".pt", ".png")


def evolve_cloud(flow: Flow, given: Namespace) -> int:
    """Reads the cloud, moves it by ``--steps`` steps, says energies, writes the last state and a film if asked for."""
    from gengrad import plotting
    from gengrad.files import writable
    from gengrad.flows.operator import operator_of, rises
    from gengrad.sampling import write_samples

    points = read_cloud(given.source)
    known = None if given.log_density is None else read_cloud(given.log_density, "--log-density", ("n",))
    out = writable(given.out, ENDINGS) if given.out else None
    film = None
    if given.trajectory is not None:
        film = writable(Path(given.trajectory or Path(given.run) / "trajectory.gif"), (".gif",))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = flow.evolve(points, given.steps, tau=given.tau, weights=given.weights, log_density=known)
    if known is None and operator_of(flow).network.config.log_density:
        print("this operator is told no log density, and goes by the points alone: --log-density FILE.npy says more")
    for warning in told:
        print(f"gengrad: {warning.message}")
    print(f"{len(points)} points, {given.steps} steps, {found.nfe} network evaluations each, {found.seconds:.2f} s")
    if any(found.corrected):
        print(f"corrected by their own condition: {sum(map(bool, found.corrected))} of {given.steps} steps")
    if found.energies is None:
        dense = operator_of(flow).functional().needs_density and known is None
        why = "needs a density: --log-density FILE.npy, log rho at the points" if dense else "is infinite of this cloud"
        print(f"energies: not known, the energy {why}")
    else:
        rose = sum(rises(found.energies.tolist()))
        ends = f"{float(found.energies[0]):.6g} to {float(found.energies[-1]):.6g}"
        print(f"energy: {ends}" + (f", and it rose in {rose} steps" if rose else ", falling in every step"))
    if out:
        write_samples(found.x, out, flow)
        print(f"written: {out}")
    elif film is None:
        print("nothing was written: give --out evolved.npy, .pt or .png")
    if film:
        plotting.trajectory_gif(found.states, film)
        print(f"written: {film}")
    return 0


def read_cloud(file: Path, option: str = "--source", axes: tuple[str, ...] = ("n", "d")) -> Tensor:
    """The points (n, d) of a .npy file, or what has other ``axes``, float32; ``ValueError`` for what is none."""
    import numpy as np
    import torch

    shape = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
    if file.suffix.lower() != ".npy":
        raise ValueError(f"{option} {file}: a .npy file of shape {shape} is wanted, as numpy.save writes it")
    if not file.is_file():
        raise ValueError(f"{option} {file}: there is no such file")
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{option} {file} is no .npy file of numbers: {error}") from None
    if array.dtype.kind not in "fiu" or array.ndim != len(axes):
        raise ValueError(f"{option} {file}: numbers of shape {shape} are wanted; found {array.dtype} of {array.shape}")
    return torch.from_numpy(array.astype(np.float32))
