"""The commands: train, sample, evaluate, molecules, doctor. A user's mistake ends with one message and exit code 2."""

from __future__ import annotations

import dis
import errno
import os
import shlex
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import gengrad
from gengrad.cli_arguments import Parser, add_evaluate, add_sample, add_train, positive
from gengrad.cli_doctor import doctor
from gengrad.cli_latent import sample_molecules
from gengrad.cli_molecules import add_molecules

if TYPE_CHECKING:  # the help does not wait for torch
    from gengrad.flows.flow import Flow
    from gengrad.training.ranks import Ranks

FULL = (errno.ENOSPC, errno.EDQUOT)  # a full disk is told without the name of a file


def main(arguments: Sequence[str] | None = None, prog: str = "gengrad") -> int:
    """Runs one command; returns the exit code: 0, 2 for a mistake of the user's, 130 or 143 after a signal."""
    parser = _parser(prog)
    given = parser.parse_args(list(sys.argv[1:]) if arguments is None else list(arguments))
    return guarded(given.command, given)


def run(arguments: Sequence[str] | None = None, prog: str = "gengrad") -> NoReturn:
    """``main`` as the last thing that this process does: ends it with the exit code."""
    leave(main(arguments, prog))


def leave(code: int) -> NoReturn:
    """Ends this process with ``code``; one of several that a launcher started does not wait for Python to tear down.

    Gloo's threads outlive the process group where DistributedDataParallel has been used, and one that lets go of a
    tensor while the interpreter is already going aborts the process: a finished run then ended with SIGABRT, rarely.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone, or ``guarded`` has closed it for that
            stream.flush()
    os._exit(code)


def guarded(command: Callable[[Namespace], int | None], given: Namespace | None) -> int:
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
            print("\n".join([f"gengrad: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return 2


def _is_users(error: Exception) -> bool:
    """Whether gengrad itself raised this with a message for the user; anything else is a bug and shows its place."""
    if type(error).__module__.startswith(("gengrad.", "pydantic")):
        return True
    if isinstance(error, OSError) and (error.filename is not None or error.errno in FULL):
        return True  # of a file that the user named, or of the disk it is on
    if isinstance(error, RuntimeError):
        return False
    last = error.__traceback__
    while last.tb_next is not None:
        last = last.tb_next
    # by a `raise` of its own; a ValueError that Python raises inside gengrad's code, as int("x") does, is a bug
    code = last.tb_frame.f_code
    instruction = next((i.opname for i in dis.get_instructions(code) if i.offset == last.tb_lasti), "")
    return last.tb_frame.f_globals.get("__name__", "").startswith("gengrad") and instruction == "RAISE_VARARGS"


def _parser(prog: str) -> Parser:
    parser = Parser(prog=prog, description="Generative models by Wasserstein gradient flows.")
    parser.add_argument("--version", action="version", version=f"gengrad {gengrad.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=Parser)
    for add, command, said in (
        (add_train, train, "train a run from a config, or go on with it"),
        (add_sample, sample, "draw samples from a trained run"),
        (add_evaluate, evaluate, "judge a run against its data"),
    ):
        subparser = commands.add_parser(command.__name__, help=said)
        add(subparser)
        subparser.set_defaults(command=command)
    add_molecules(commands.add_parser("molecules", help="read, standardise and score molecules"), positive)
    doctor_parser = commands.add_parser("doctor", help="say what is installed and what this machine offers")
    doctor_parser.set_defaults(command=doctor)
    return parser


# ------------------------------------------------------------------ commands


def train(given: Namespace) -> int:
    """``gengrad train CONFIG [key=value ...]``"""
    from gengrad.config import load_config
    from gengrad.run import train as run_training

    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    config = load_config(given.config, given.overrides)
    # under a launcher its own command belongs in front, which a process cannot see
    again = None if "RANK" in os.environ else shlex.join(["python", "train.py", given.config, *given.overrides])
    outcome = run_training(config, again=again)
    return 0 if outcome.finished else 128 + outcome.signal


def sample(given: Namespace) -> int:
    """``gengrad sample RUN --n 64 --nfe 5 --out samples.npy``"""
    from gengrad import plotting, sampling
    from gengrad.files import writable

    flow = _flow(given)
    codes = given.out is not None and given.out.suffix in (".npy", ".pt") and given.source is None
    if given.source is None:
        if given.weights:
            raise ValueError("--weights are those of an operator's energy: give --source POINTS.npy and --steps K too")
        if given.log_density is not None:
            raise ValueError("--log-density is that of points: give --source POINTS.npy and --steps K too")
        _choose_phases(flow, given)
    if flow.info.get("config", {}).get("data", {}).get("name") == "latents" and not codes and given.steps is None:
        return sample_molecules(flow, given)
    if given.source is not None or given.steps is not None:
        return _evolve(flow, given)
    folder = Path(given.run)
    out = writable(given.out, sampling.ENDINGS) if given.out else None
    film = None
    if given.trajectory is not None:
        film = writable(Path(given.trajectory or folder / "trajectory.gif"), (".gif",))
    settings = _settings(flow)
    nfes = given.nfe or settings["nfe"][:1]
    for nfe in nfes:
        flow.cost(nfe, given.solver)  # an NFE that cannot be spent is refused before any work
    choice = {"solver": given.solver, "label": given.label, "guidance": given.guidance}
    flow.check_class(given.label, given.guidance)
    if len(nfes) > 1:
        sampling.writable_folder(folder)
        n, draws = given.n or settings["n"], settings["draws"]
        target = sampling.target_of(flow)
        common = {"n": n, "draws": draws, "seed": given.seed, "solver": given.solver}
        if flow.is_image:
            sampling.write_strip(flow, nfes, folder / "strip.png", seed=given.seed, **choice)
            common |= {"folder": folder / "samples", "features": sampling.features_at_hand(target), **choice}
            report = sampling.judge_images(flow, target, nfes, **common)
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


def _evolve(flow: Flow, given: Namespace) -> int:
    """``gengrad sample RUN --source points.npy --steps 40 --out evolved.npy``"""
    from gengrad.cli_operator import evolve_cloud

    if given.source is None or given.steps is None:
        raise ValueError("--source POINTS.npy and --steps K go together: a cloud, and how many steps it is to make")
    others = {"--n": given.n, "--nfe": given.nfe, "--solver": given.solver, "--class": given.label,
              "--phase-1": given.phase_1, "--guidance": None if given.guidance == 1 else given.guidance}  # fmt: skip
    if surplus := [option for option, value in others.items() if value is not None]:
        raise ValueError(f"--source says which points and --steps how far; leave out {' and '.join(surplus)}")
    return evolve_cloud(flow, given)


def evaluate(given: Namespace) -> int:
    """``gengrad evaluate RUN``"""
    from gengrad import sampling

    flow = _flow(given)
    settings = _settings(flow)
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
        print(f"written: {Path(given.run) / 'steps.json'}, steps.md, {along['pictures']}{tables}")
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
    # a trial of fewer points does not take the place of the figures of the run
    trial = chosen["n"] * chosen["draws"] < settings["n"] * settings["draws"]
    name = f"metrics_n{chosen['n']}_draws{chosen['draws']}" if trial else "metrics"
    print(sampling.write_report(report, Path(given.run), name))
    protocol = report["results"][0]["protocol"]
    print(f"{protocol['reference']}; floor: {protocol['floor']}")
    if "accuracy" in protocol:
        accuracy = f"accuracy {protocol['accuracy']:.4f} on {protocol['accuracy_on']}"
        print(f"classifier: {protocol['description']}; {accuracy}")
    print(f"written: {Path(given.run) / name}.json{', metrics.json is left as it is' if trial else ''}")
    return 0


def _processes() -> Ranks:
    """The processes of a launcher such as torchrun, or this one alone."""
    import torch.distributed as group

    from gengrad.training.ranks import Ranks

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not group.is_initialized():
        group.init_process_group("gloo")
    return Ranks.of_process_group()


def _flow(given: Namespace) -> Flow:
    """The run's flow on the device asked for."""
    import torch

    from gengrad.flows.flow import load

    device = given.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda, but PyTorch sees no CUDA device here; use --device auto or cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return load(given.run, device)


def _choose_phases(flow: Flow, given: Namespace) -> None:
    """Puts ``--phase-1`` and ``--tau`` into the flow's phased transports; refuses them by these names."""
    asked = {"--phase-1": ("phase_1", given.phase_1), "--tau": ("fixed_tau", given.tau)}
    asked = {option: pair for option, pair in asked.items() if pair[1] is not None}
    if asked and not flow.is_phased:
        raise ValueError(
            f"this flow has no phases, so it takes no {' and no '.join(asked)}; nsgf_pp trains one"
            + ("; an operator takes it with --source POINTS.npy and --steps K" if "--tau" in asked else "")
        )
    flow.choose(dict(asked.values()))


def _settings(flow: Flow) -> dict:
    """The ``evaluate:`` section of the run, with the defaults where it has none."""
    from gengrad.config import EvaluateSettings

    return EvaluateSettings().model_dump() | flow.info.get("config", {}).get("evaluate", {})
