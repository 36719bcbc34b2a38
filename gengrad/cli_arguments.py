"""The arguments of the commands, and how their values are read: numbers, seeds, lists of NFE, paths."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn

from gengrad.machine import cpus

# flows.solvers has the same, which the help need not wait for
SOLVERS = ("euler", "midpoint", "heun", "rk4")


class Parser(argparse.ArgumentParser):
    """argparse with the house's manner of refusing: one line on standard error, exit code 2."""

    def error(self, message: str) -> NoReturn:
        left = message.removeprefix("unrecognized arguments: ")
        if left != message and not left.strip("0123456789, "):
            message += "; several numbers stand in one word with commas, e.g. --nfe 5,10"
        self.exit(2, f"{self.prog}: {message}\n  (see {self.prog} --help)\n")


def add_train(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``gengrad train``."""
    parser.add_argument("config", help="a YAML file, e.g. configs/toy/8gaussians_nsgf.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=2000 seed=3 out=runs/a")


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``gengrad sample``."""
    parser.add_argument("run", type=home, help="the run's folder, the out=... of its training")
    parser.add_argument(
        "--n",
        type=positive,
        default=None,
        help="how many samples (default 64); with several NFE, points per draw (default: the config's)",
    )
    parser.add_argument(
        "--nfe",
        type=positives,
        default=None,
        metavar="K[,K...]",
        help="network evaluations per sample; several give a table and a plot of quality",
    )
    parser.add_argument("--seed", type=seed, default=0, help="of the draws (default 0)")
    parser.add_argument("--out", type=path, default=None, help=".npy, .pt or .png; of molecules .csv, .sdf or .png")
    parser.add_argument("--solver", choices=SOLVERS, default=None)
    add_choices(parser)
    operators = parser.add_argument_group("points or molecules of yours")
    operators.add_argument(
        "--source",
        type=path,
        default=None,
        metavar="FILE",
        help="molecules for a run on molecules; .npy (n, d) for an operator",
    )
    operators.add_argument("--column", default=None, help="the SMILES column of a table (default: a usual name)")
    operators.add_argument("--steps", type=positive, default=None, help="JKO steps that an operator makes")
    operators.add_argument(
        "--log-density",
        type=path,
        default=None,
        metavar="FILE",
        help=".npy (n,): log rho at the points of --source, for an operator's energies and for networks that take it",
    )
    operators.add_argument(
        "--weights",
        type=weights,
        default=None,
        metavar="TERM=W[,...]",
        help="weights of its energy's terms, where it was trained for several: entropy=0.3",
    )
    parser.add_argument(
        "--trajectory",
        nargs="?",
        type=home,
        const="",
        default=None,
        metavar="FILE.gif",
        help="also a GIF of the samples on their way (default: trajectory.gif in the run's folder)",
    )
    parser.add_argument(
        "--chunk", type=positive, default=4096, help="samples moved at once; changes a sample by its rounding alone"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``gengrad evaluate``."""
    parser.add_argument("run", type=home, help="the run's folder")
    parser.add_argument("--nfe", type=positives, default=None, metavar="K[,K...]", help="default: the config's")
    parser.add_argument(
        "--n",
        "--samples",
        type=positive,
        default=None,  # torchrun keeps --n for itself
        help="points or images per draw (default: the config's, 4096)",
    )
    parser.add_argument("--draws", type=positive, default=None, help="independent draws (default: the config's, 3)")
    parser.add_argument("--seed", type=seed, default=None, help="of the draws (default: the config's)")
    parser.add_argument("--solver", choices=SOLVERS, default=None)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    images = parser.add_argument_group("images")
    images.add_argument(
        "--features",
        choices=("inception", "classifier", "identity"),
        default=None,
        help="inception: FID (default); classifier: a small one trained on the data; identity: pixels",
    )
    images.add_argument(
        "--reference",
        choices=("train", "held_out"),
        default=None,
        help="what samples are compared with (default: train for inception, else held_out)",
    )
    images.add_argument("--inception", type=path, default=None, metavar="FILE", help="Inception's weights")
    images.add_argument("--keep-samples", action="store_true", help="leave the samples in RUN/samples")
    images.add_argument("--guidance", type=float, default=1.0, metavar="W")


def add_choices(parser: argparse.ArgumentParser) -> None:
    """What flows with classes or phases let one choose at sampling time."""
    parser.add_argument("--class", dest="label", type=int, default=None, metavar="C", help="samples of this class only")
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="W",
        help="pull towards the class (1: none); other values take two evaluations for each one",
    )
    parser.add_argument("--phase-1", type=int, default=None, metavar="K", help="evaluations of the Sinkhorn phase")
    parser.add_argument(
        "--tau",
        type=float,
        default=None,
        help="start of the straight phase (default: predicted); of an operator: length of a step",
    )


def add_workers(parser: argparse.ArgumentParser) -> None:
    """How many processes handle molecules, and how long one may take."""
    parser.add_argument(
        "--processes",
        type=positive,
        default=cpus(),
        help="worker processes (default: the CPUs of this process); changes no result",
    )
    parser.add_argument("--timeout", type=positive, default=10, metavar="SECONDS", help="for one molecule (default 10)")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {number}")
    return number


def positives(text: str) -> list[int]:
    """Whole numbers of at least 1 between commas."""
    parts = text.split(",")
    if not all(part.strip() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: numbers with a comma between each two are wanted, e.g. 5,10")
    return [positive(part) for part in parts]


def weights(text: str) -> dict[str, float]:
    """``entropy=0.3,potential=2``: numbers by name."""
    found = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name.strip() in found:
            raise argparse.ArgumentTypeError(f"{name.strip()!r} has two weights")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{part!r}: a term's name and its weight are wanted, e.g. entropy=0.3"
            ) from None
    return found


def seed(text: str) -> int:
    """A seed, as a config takes it: a whole number, 0 or more and below 2^63."""
    from gengrad.registry import SEEDS

    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if not 0 <= number < SEEDS:
        raise argparse.ArgumentTypeError(f"a seed is at least 0 and less than 2^63; got {number}")
    return number


def home(text: str) -> str:
    """A path with the user's folder in the place of ~, which a shell puts in at the start of a word only."""
    return os.path.expanduser(text)


def path(text: str) -> Path:
    """The same as a ``Path``."""
    return Path(home(text))
