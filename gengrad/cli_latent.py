"""The commands of ``gengrad molecules`` over the latent space: train-autoencoder, train-surrogate, flow; sampling."""

from __future__ import annotations

import argparse
from pathlib import Path

from gengrad.machine import cpus


def add_latent(commands, positive) -> None:
    """Adds the commands to those of ``gengrad molecules``."""
    learn = commands.add_parser("train-autoencoder", help="train the autoencoder whose codes the flows move")
    _add_file(learn)
    learn.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    budget = learn.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=None, help="of the wall clock (default 10)")
    budget.add_argument("--steps", type=positive, default=None, help="of the optimiser, which repeat exactly")
    learn.add_argument("--latent", type=positive, default=None, help="coordinates of a code (default 64)")
    learn.add_argument("--width", type=positive, default=None, help="of the LSTM (default 256)")
    learn.add_argument("--batch-size", type=positive, default=None, help="molecules a step (default 128)")
    learn.add_argument("--lr", type=float, default=None, help="of AdamW (default 2e-3)")
    learn.add_argument("--noise", type=float, default=None, help="on the codes (default 0.35)")
    learn.add_argument(
        "--properties", nargs="+", default=None, help="scorers that the codes learn to tell: qed logp sa"
    )
    learn.add_argument("--seed", type=int, default=None)
    learn.set_defaults(command=train_autoencoder)

    fit = commands.add_parser("train-surrogate", help="fit the networks that predict an objective's properties")
    _add_file(fit)
    _add_parts(fit)
    fit.add_argument("--members", type=positive, default=None, help="networks of the ensemble (default 4)")
    fit.add_argument("--steps", type=positive, default=None, help="of the optimiser (default 2000)")
    fit.add_argument("--seed", type=int, default=None)
    fit.set_defaults(command=train_surrogate)

    move = commands.add_parser(
        "flow", help="the whole chain on a file: surrogate, flow, decode, score; writes its config and runs it"
    )
    _add_file(move)
    _add_parts(move, required=False)
    move.add_argument("--method", choices=("jko_icnn", "nsgf", "entropic_map"), default="jko_icnn")
    move.add_argument("--at-most", type=float, default=None, metavar="X", help="only molecules of such a total start")
    move.add_argument("--at-least", type=float, default=None, metavar="X", help="not jko_icnn: go to such a total")
    move.add_argument(
        "--set", dest="overrides", nargs="+", default=[], metavar="key=value", help="as of train.py, e.g. method.tau=2"
    )
    move.set_defaults(command=flow)


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="molecules.csv of prepare, or any file of molecules, which is standardised first")
    parser.add_argument("--column", default=None, help="the SMILES column of a table (default: a usual name)")


def _add_parts(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument("--autoencoder", required=required, metavar="FOLDER", help="what train-autoencoder wrote")
    parser.add_argument("--objective", type=Path, required=True, metavar="FILE.yaml")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")


def _chosen(given, *names: str) -> dict:
    """The options that were given."""
    return {name: getattr(given, name) for name in names if getattr(given, name) is not None}


def _settings(cls, **given):
    """A settings class from options; a mistake in them reads like one in a config."""
    from gengrad.strict_yaml import ConfigError, check

    problems: list[tuple[str, str]] = []
    found = check(cls, given, "", list(cls.model_fields), problems)
    if problems:
        raise ConfigError("\n".join(f"--{key.rpartition('.')[2].replace('_', '-')}: {text}" for key, text in problems))
    return found


def train_autoencoder(given) -> int:
    """``gengrad molecules train-autoencoder FILE --out FOLDER [--minutes 10 | --steps 2000]``"""
    import torch

    from gengrad.latent import Latents, stages
    from gengrad.latent.settings import AutoencoderSettings
    from gengrad.latent.training import train_autoencoder as train

    options = _chosen(given, "minutes", "steps", "batch_size", "lr", "noise", "properties", "seed")
    settings = _settings(AutoencoderSettings, network=_chosen(given, "latent", "width"), **options)
    _, smiles = stages.molecules(Latents.Config(path=given.file, column=given.column), given.out / "molecules", print)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = train(smiles, given.out, settings, processes=cpus(), device=device)
    if isinstance(found, int):
        return 128 + found
    report = found.info["reconstruction"]
    print(
        f"codes: covariance from {report['spectrum_least']:.3g} to {report['spectrum_largest']:.3g}, "
        f"{report['effective']:.1f} directions in use, {report['collapsed']} collapsed; they are whitened"
    )
    print(f"written: {given.out / 'autoencoder.safetensors'}, autoencoder.json, reconstruction.json")
    return 0


def train_surrogate(given) -> int:
    """``gengrad molecules train-surrogate FILE --autoencoder FOLDER --objective FILE.yaml --out FOLDER``"""
    from gengrad.latent import Latents, stages
    from gengrad.latent.codec import Codec
    from gengrad.latent.settings import SurrogateSettings
    from gengrad.molecules.objective import load_objective

    objective, codec = load_objective(given.objective), Codec.load(given.autoencoder)
    settings = _settings(SurrogateSettings, **_chosen(given, "members", "steps", "seed"))
    taken = Latents.Config(path=given.file, column=given.column)
    ids, smiles = stages.molecules(taken, given.out / "molecules", print)
    cloud = stages.encoded(codec, ids, smiles, objective, given.out, print)
    stages.surrogate_for(cloud, codec, objective, settings, given.out, print)
    print(f"written: {given.out / 'surrogate'}, {given.out / 'latents'}")
    return 0


def flow(given) -> int:
    """``gengrad molecules flow FILE --objective FILE.yaml --out RUN [--autoencoder FOLDER] [--method entropic_map]``"""
    import shlex

    import yaml

    from gengrad import chain
    from gengrad.cli import train
    from gengrad.files import write_atomically
    from gengrad.molecules.objective import load_objective

    objective = load_objective(given.objective).settings.model_dump(mode="json")
    data = {"path": given.file, "column": given.column, "objective": objective, "autoencoder_from": given.autoencoder}
    raw = chain.flow_config(given.method, data, str(given.out), given.at_most, given.at_least)
    file = given.out / "flow.yaml"
    write_atomically(file, yaml.safe_dump(raw, sort_keys=False).encode())
    print(f"written: {file}; the same run: {shlex.join(['python', 'train.py', str(file), *given.overrides])}")
    given.config = str(file)
    return train(given)


def sample_molecules(trained, given) -> int:
    """``python sample.py RUN --n 1000 --out hits.csv`` of a run on molecules: decoded, filtered, scored.

    ``--source mine.smi``: the molecules of that file are moved; those that cannot be are in ``hits_left_out.csv``.
    """
    from gengrad import chain
    from gengrad.files import writable, write_atomically
    from gengrad.latent.population import ENDINGS, of_file, population, start, states, write_population
    from gengrad.molecules.prepare import table

    out = writable(given.out, ENDINGS) if given.out else None
    others = {
        "--solver": given.solver,
        "--class": given.label,
        "--guidance": None if given.guidance == 1 else given.guidance,
        "--phase-1": given.phase_1,
    }
    others |= {"--tau": given.tau, "--weights": given.weights, "--trajectory": given.trajectory}
    if surplus := [option for option, value in others.items() if value is not None]:
        raise ValueError(f"a run on molecules takes no {' and no '.join(surplus)} when they are decoded; leave it out")
    if given.nfe and len(given.nfe) > 1:
        raise ValueError("molecules are sampled at one NFE; give one, or leave --nfe out")
    codec, objective, surrogate, _ = chain.parts_of(trained)
    nfe = given.nfe[0] if given.nfe else trained.info["config"]["evaluate"]["nfe"][0]
    if given.source:
        x, parents, left = of_file(codec, given.source, given.column, cpus())
        count, x, parents = len(x), x[: given.n], parents[: given.n]
        before = population(codec, objective, surrogate, x, parents, 0, given.seed, cpus())
        told = "" if len(x) == count else f"the first {len(x)} of "
        print(f"{told}{count} molecules, median total {float(before.scores.total.nanmedian()):.4g}")
        if left:
            print(f"{len(left)} rows of the file are left out; the first: {left[0][2]}")
    else:
        left = []
        x, parents = start(trained, given.n or 64, given.seed)
    n, step, here = len(x), 0, x
    for step, here in enumerate(states(trained, x, given.seed, nfe)):  # noqa: B007 - the last one is used
        pass
    found = population(codec, objective, surrogate, here, parents, step, given.seed, cpus())
    different = len({found.smiles[i] for i in found.valid})
    print(f"{n} points, {len(found.valid)} molecules, {different} different, {int(found.scores.passed.sum())} pass")
    if different:
        print(f"median total {float(found.scores.total.nanmedian()):.4g}")
    if out:
        write_population(found, objective, out)
        names = [str(out)]
        if left:
            rest = out.with_name(f"{out.stem}_left_out.csv")
            if rest.resolve() == given.source.resolve():
                raise ValueError(f"{rest} is the file of --source, and would be overwritten: take another --out")
            write_atomically(rest, table(("id", "input", "reason"), left))
            names.append(str(rest))
        print(f"written: {', '.join(names)}")
    else:
        print("nothing was written: give --out hits.csv, .sdf or .png")
    return 0
