"""The commands: train, sample, evaluate, molecules, doctor. A user's mistake ends with one message and exit code 2."""

from __future__ import annotations

import argparse
import dis
import os
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import gengrad
from gengrad.cli_latent import sample_molecules
from gengrad.cli_molecules import add_molecules


class Parser(argparse.ArgumentParser):
    """argparse with the house's manner of refusing: one line on standard error, exit code 2."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: {message}\n  (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None, prog: str = "gengrad") -> int:
    """Runs one command; returns the exit code: 0, 2 for a mistake of the user's, 130 or 143 after a signal."""
    parser = _parser(prog)
    given = parser.parse_args(list(sys.argv[1:]) if arguments is None else list(arguments))
    return guarded(given.command, given)


def guarded(command, given) -> int:
    """Calls ``command(given)``; a mistake of the user's becomes one message instead of a traceback.

    With GENGRAD_DEBUG=1 in the environment the traceback is shown all the same.
    """
    try:
        return command(given) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get("GENGRAD_DEBUG"):
            raise
        if not _is_users(error):
            raise
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"gengrad: {error}", file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Whether gengrad itself raised this with a message for the user; anything else is a bug and shows its place."""
    if isinstance(error, OSError) or type(error).__module__.startswith(("gengrad.", "pydantic")):
        return True
    if isinstance(error, RuntimeError):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    # by a `raise` of its own; a ValueError that Python raises inside gengrad's code, as int("x") does, is a bug
    code = last.tb_frame.f_code
    instruction = next((i.opname for i in dis.get_instructions(code) if i.offset == last.tb_lasti), "")
    return last.tb_frame.f_globals.get("__name__", "").startswith("gengrad") and instruction == "RAISE_VARARGS"


# ------------------------------------------------------------------ arguments


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Generative models by Wasserstein gradient flows.")
    parser.add_argument("--version", action="version", version=f"gengrad {gengrad.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    add_train(commands.add_parser("train", help="train a run from a config, or go on with it"))
    add_sample(commands.add_parser("sample", help="draw samples from a trained run"))
    add_evaluate(commands.add_parser("evaluate", help="judge a run against its data"))
    add_molecules(commands.add_parser("molecules", help="read, standardise and score molecules"), positive)
    doctor_parser = commands.add_parser("doctor", help="say what is installed and what this machine offers")
    doctor_parser.set_defaults(command=doctor)
    return parser


def add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="a YAML file, e.g. configs/toy/8gaussians_nsgf.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. train.steps=2000 seed=3 out=runs/a")
    parser.set_defaults(command=train)


def add_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the run's folder, the out=... of its training")
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help=".npy, .pt or .png; of molecules .csv, .sdf or .png")
    parser.add_argument("--solver", choices=("euler", "midpoint", "heun", "rk4"), default=None)
    add_choices(parser)
    parser.add_argument(
        "--trajectory",
        nargs="?",
        const="",
        default=None,
        metavar="FILE.gif",
        help="also a GIF of the samples on their way (default: trajectory.gif in the run's folder)",
    )
    parser.add_argument("--chunk", type=positive, default=4096, help="samples moved at once; changes no sample")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(command=sample)


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--nfe", type=positives, default=None, metavar="K[,K...]", help="default: the config's")
    parser.add_argument(
        "--n",
        "--samples",
        type=positive,
        default=None,  # torchrun keeps --n for itself
        help="points or images per draw (default: the config's, 4096)",
    )
    parser.add_argument("--draws", type=positive, default=None, help="independent draws (default: the config's, 3)")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--solver", choices=("euler", "midpoint", "heun", "rk4"), default=None)
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
    images.add_argument("--inception", type=Path, default=None, metavar="FILE", help="Inception's weights")
    images.add_argument("--keep-samples", action="store_true", help="leave the samples in RUN/samples")
    images.add_argument("--guidance", type=float, default=1.0, metavar="W")
    parser.set_defaults(command=evaluate)


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
    parser.add_argument("--tau", type=float, default=None, help="start of the straight phase (default: predicted)")


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
    return [positive(part) for part in text.split(",")]


# ------------------------------------------------------------------ commands


def train(given) -> int:
    """``gengrad train CONFIG [key=value ...]``"""
    from gengrad.config import load_config
    from gengrad.run import train as run_training

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    config = load_config(given.config, given.overrides)
    # under a launcher its own command belongs in front, which a process cannot see
    again = None if "RANK" in os.environ else shlex.join(["python", "train.py", given.config, *given.overrides])
    outcome = run_training(config, again=again)
    return 0 if outcome.finished else 128 + outcome.signal


def sample(given) -> int:
    """``gengrad sample RUN --n 64 --nfe 5 --out samples.npy``"""
    from gengrad import plotting, sampling
    from gengrad.files import writable

    flow = _flow(given)
    _choose_phases(flow, given)
    codes = given.out is not None and given.out.suffix in (".npy", ".pt")
    if flow.info.get("config", {}).get("data", {}).get("name") == "latents" and not codes:
        return sample_molecules(flow, given)
    folder = Path(given.run)
    out = writable(given.out, sampling.ENDINGS) if given.out else None
    film = None
    if given.trajectory is not None:
        film = writable(Path(given.trajectory or folder / "trajectory.gif"), (".gif",))
    nfes = given.nfe or [_default_nfe(flow)]
    for nfe in nfes:
        flow.cost(nfe, given.solver)  # an NFE that cannot be spent is refused before any work
    choice = {"solver": given.solver, "label": given.label, "guidance": given.guidance}
    flow.check_class(given.label, given.guidance)
    if len(nfes) > 1:
        sampling.writable_folder(folder)
        settings = flow.info.get("config", {}).get("evaluate", {})
        n, draws = given.n or settings.get("n", 4096), settings.get("draws", 3)
        target = sampling.target_of(flow)
        common = {"n": n, "draws": draws, "seed": given.seed, "solver": given.solver}
        if flow.is_image:
            sampling.write_strip(flow, nfes, folder / "strip.png", seed=given.seed, **choice)
            more = {"folder": folder / "samples", "features": sampling.features_at_hand(target)}
            report = sampling.judge_images(flow, target, nfes, guidance=given.guidance, **more, **common)
        else:
            report = sampling.judge(flow, target, nfes, **common)
        print(sampling.write_report(report, folder, "quality"))
        names = ["quality.md", "quality.json", "quality.png", *(["strip.png"] if flow.is_image else [])]
        print(f"written: {', '.join(str(folder / name) for name in names)}")
    if out or len(nfes) == 1:
        n = given.n or 64
        drawn = flow.draw_samples(n, nfes[-1], seed=given.seed, chunk=given.chunk, **choice)
        print(f"{n} samples, {drawn.bill}, {drawn.seconds:.2f} s")
        if out:
            sampling.write_samples(drawn.x, out, flow, title=f"{drawn.nfe:g} network evaluations")
            print(f"written: {out}")
        elif film is None:
            print("nothing was written: give --out samples.npy, .pt or .png")
    if film:
        path = flow.trajectory(min(given.n or 1000, 2000), nfes[-1], seed=given.seed, **choice)
        plotting.trajectory_gif(path, film, target=sampling.truth_of(flow, 2000))
        print(f"written: {film}")
    return 0


def evaluate(given) -> int:
    """``gengrad evaluate RUN``"""
    from gengrad import sampling

    flow = _flow(given)
    settings = flow.info.get("config", {}).get("evaluate", {"nfe": [5, 10], "n": 4096, "draws": 3, "seed": 0})
    nfes = given.nfe or settings["nfe"]
    for nfe in nfes:
        flow.cost(nfe, given.solver)
    asked = {key: getattr(given, key) for key in ("n", "draws", "seed")}
    chosen = {key: settings[key] if value is None else value for key, value in asked.items()}
    sampling.writable_folder(Path(given.run))
    target = sampling.target_of(flow)
    along = sampling.judge_along(flow, Path(given.run), n=chosen["n"], seed=chosen["seed"])
    if along is not None:
        print(along["table"])
        for part in ("end", "samples"):
            if along.get(part):
                print("  ".join(f"{key.replace('_', ' ')} {value:.5g}" for key, value in along[part].items()))
        tables = ", samples.csv" if (Path(given.run) / "samples.csv").exists() else ""
        print(f"written: {Path(given.run) / 'steps.json'}, energy.png, density.png{tables}")
    if not target.has_samples:
        return 0
    flow.check_class(None, given.guidance)
    if flow.is_image:
        asked = {key: getattr(given, key) for key in ("reference", "inception", "guidance", "solver")}
        report = sampling.judge_images(
            flow,
            target,
            nfes,
            folder=Path(given.run) / "samples",
            features=given.features or "inception",
            keep=given.keep_samples,
            ranks=_processes(),
            **asked,
            **chosen,
        )
    elif given.features or given.reference or given.inception or given.keep_samples:
        raise ValueError(
            "--features, --reference, --inception and --keep-samples are for images; this run's data are "
            "points, which are judged as they are"
        )
    else:
        report = sampling.judge(flow, target, nfes, solver=given.solver, **chosen)
    if not report:  # the first process has it
        return 0
    print(sampling.write_report(report, Path(given.run), "metrics"))
    protocol = report["results"][0]["protocol"]
    print(f"{protocol['reference']}; floor: {protocol['floor']}")
    if "accuracy" in protocol:
        accuracy = f"accuracy {protocol['accuracy']:.4f} on {protocol['accuracy_on']}"
        print(f"classifier: {protocol['description']}; {accuracy}")
    print(f"written: {Path(given.run) / 'metrics.json'}")
    return 0


def _processes():
    """The processes of a launcher such as torchrun, or this one alone."""
    import torch.distributed as group

    from gengrad.training.ranks import Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not group.is_initialized():
        group.init_process_group("gloo")
    return Ranks.of_process_group()


def _flow(given):
    """The run's flow on the device asked for."""
    import torch

    from gengrad.flows.flow import load

    device = given.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA device here; use --device auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(given.run, device)


def _choose_phases(flow, given) -> None:
    """Puts ``--phase-1`` and ``--tau`` into the flow's phased transports."""
    asked = {"phase_1": given.phase_1, "fixed_tau": given.tau}
    flow.choose({key: value for key, value in asked.items() if value is not None})


def _default_nfe(flow) -> int:
    """The first NFE of the run's ``evaluate:`` section."""
    return flow.info.get("config", {}).get("evaluate", {}).get("nfe", [10])[0]


def doctor(given) -> int:
    """``gengrad doctor``: versions and devices, for a bug report."""
    import importlib

    import torch

    print(f"gengrad {gengrad.__version__}, Python {sys.version.split()[0]}, {sys.platform}")
    packages = "torch torchvision accelerate torchmetrics torch_fidelity numpy scipy sklearn ot rdkit numba"
    for name in packages.split():
        try:
            print(f"  {name:14s} {getattr(importlib.import_module(name), '__version__', 'installed')}")
        except ImportError as error:
            print(f"  {name:14s} missing ({error})")
    cuda = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())) or "none"
    print(f"  CUDA devices {cuda}\n  CPU threads  {torch.get_num_threads()}")
    return 0
