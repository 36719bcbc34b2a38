"""The chain of a run on molecules: prepare, autoencoder, scores, codes, surrogate, flow, decode; each kept when made.

RUN/molecules/      molecules.csv, rejected.csv, prepare.json
RUN/autoencoder/    autoencoder.safetensors, autoencoder.json, reconstruction.json, checkpoints
RUN/latents/        latents.safetensors, latents.json: codes, true properties and totals of every molecule
RUN/surrogate/      surrogate.safetensors, surrogate.json
RUN/                the flow's own files, and objective.yaml, reconstruction.json, steps.csv,
                    population_before.csv, population_after.csv
"""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from pathlib import Path

import torch
import yaml

import gengrad.run
from gengrad.config import ConfigError, RunConfig
from gengrad.files import write_atomically, write_json
from gengrad.flows.flow import Flow, load
from gengrad.latent.codec import Codec
from gengrad.latent.data import KIND, Cloud, Latents
from gengrad.latent.population import write_population
from gengrad.latent.stages import Say, encoded, molecules, surrogate_for
from gengrad.latent.steps import Observer, along
from gengrad.latent.surrogate import Surrogate
from gengrad.latent.training import train_autoencoder
from gengrad.machine import cpus
from gengrad.molecules.objective import Objective, read_objective
from gengrad.molecules.prepare import table
from gengrad.training.loop import Outcome, Progress

# what the commands take where no config says otherwise: the sections of configs/molecules/
FLOWS: dict[str, dict] = {
    "jko_icnn": {
        "network": {"name": "icnn", "width": 64},
        "method": {
            "name": "jko_icnn",
            "functional": [
                {"name": "potential", "weight": 1.0, "potential": {"name": "surrogate"}},
                {"name": "energy_distance", "weight": 1.0},
            ],
            "tau": 1.0,
            "jko_steps": 5,
            "cloud": 20_000,
            "target_samples": 2048,
        },
        "train": {"steps": 700, "batch_size": 256, "lr": 1e-3, "checkpoint_every": 200},
        "evaluate": {"nfe": [5], "n": 1000},
    },
    "nsgf": {
        "network": {"name": "mlp", "width": 512, "depth": 4, "activation": "silu"},
        # one plan of all molecules that start, and a stop on the way: at its end they would be those of the data
        "method": {"name": "nsgf", "target": "match", "ot_batch": "all", "uses": 400, "stop": 0.6},
        "train": {"steps": 6000, "batch_size": 256, "lr": 2e-3, "checkpoint_every": 1000},
        "evaluate": {"nfe": [10], "n": 1000},
    },
    "entropic_map": {
        "network": {"name": "mlp"},
        "method": {"name": "entropic_map", "epsilon_rel": 0.01, "stop": 0.8},
        "evaluate": {"nfe": [10], "n": 1000},
    },
}
TOWARDS = ("nsgf", "entropic_map")  # of them, those that go to molecules that are there


def train(config: RunConfig, *, quiet: bool = False, again: str | None = None) -> Outcome:
    """Makes what is missing, trains the flow as any other run, and follows a population along it."""
    world, rank = (int(os.environ.get(key, default)) for key, default in (("WORLD_SIZE", "1"), ("RANK", "0")))
    out, say = Path(config.general.out), (lambda text: None) if quiet else (lambda text: print(text, flush=True))
    settings = Latents.Config(**{key: value for key, value in config.data.items() if key != "name"})
    if world > 1 and not (out / "surrogate" / "surrogate.json").is_file():
        raise ConfigError(
            f"{out} lacks the autoencoder or the surrogate, which one process makes: run the same command once without "
            "the launcher, until the flow begins"
        )
    ready = placed(config, out)  # before anything is made: it refuses what cannot be
    stopped = make(settings, out, say, device=_device(config), quiet=quiet)
    if stopped is not None:
        return Outcome(False, stopped, Progress(), 0.0, 0.0)
    outcome = gengrad.run.train(ready, quiet=quiet, again=again)
    if outcome.finished and rank == 0:
        follow(load(out), out, n=config.evaluate.n, seed=config.evaluate.seed, nfe=config.evaluate.nfe[0], say=say)
    return outcome


def _device(config: RunConfig) -> str:
    return "cuda" if config.general.device != "cpu" and torch.cuda.is_available() else "cpu"


def placed(config: RunConfig, out: Path) -> RunConfig:
    """The config with the run's folder in it: of its data, of a source of latents, of its surrogate potentials.

    A source of latents takes from the data all but which molecules it is, by bounds and number. The folder is written
    in full, so that the run can be sampled from anywhere.
    """
    out = out.absolute()
    data, method = {**config.data, "folder": str(out)}, config.method
    if data["autoencoder_from"]:
        data["autoencoder_from"] = os.path.abspath(data["autoencoder_from"])
    source = config.source
    if source["name"] == Latents.name:
        source = {**data, **{own: source[own] for own in ("at_least", "at_most", "where", "take", "seed")}}
    for name, latents in (("data", data), ("source", source)):
        if latents["name"] == Latents.name:
            try:
                settings = {key: value for key, value in latents.items() if key != "name"}
                Latents.Config(**settings).columns(data["objective"])
            except ValueError as error:
                raise ConfigError(f"{name}: {error}") from None
    if method.get("functional"):
        method = {**method, "functional": [_with_surrogate(term, out) for term in method["functional"]]}
    return replace(config, data=data, source=source, method=method)


def _with_surrogate(term: dict, out: Path) -> dict:
    potential = term.get("potential")
    if not isinstance(potential, dict) or potential.get("name") != "surrogate" or potential.get("folder"):
        return term
    return {**term, "potential": {**potential, "folder": str(out / "surrogate")}}


def flow_config(method: str, data: dict, out: str, at_most: float | None = None, at_least: float | None = None) -> dict:
    """The config, as plain data, of a run that moves molecules by a method of ``FLOWS``; ``data``: of ``latents``.

    Molecules with a true total of ``at_most`` so much start. ``jko_icnn`` descends the potential and keeps near them;
    ``nsgf`` and ``entropic_map`` go to those with ``at_least`` so much, and refuse to go nowhere.
    """
    if (method in TOWARDS) == (at_least is None):
        raise ValueError(
            f"{method} moves toward the molecules that meet the target: say what meeting it is, e.g. --at-least 0.9"
            if method in TOWARDS
            else f"at_least={at_least:g} chooses the molecules to go to; {method} descends the potential"
        )
    target = {"at_least": at_least} if method in TOWARDS else {"at_most": at_most}
    raw = {"out": out, "data": {"name": Latents.name, **data, **target}}
    raw["source"] = {"name": Latents.name, "at_most": at_most}
    return {**raw, **{key: dict(value) for key, value in FLOWS[method].items()}}


# ------------------------------------------------------------------ stages


def make(settings: Latents.Config, out: Path, say: Say, *, device: str = "cpu", quiet: bool = False) -> int | None:
    """Makes the stages before the flow in ``out``; a stage that is there already is taken, if it is of these settings.

    Gives the number of the signal that stopped the autoencoder's training, else None. Raises ``ConfigError`` where a
    stage in ``out`` was made for something else.
    """
    objective = read_objective(settings.objective)
    ids, smiles = molecules(settings, out / "molecules", say)
    if settings.autoencoder_from:
        codec = Codec.load(settings.autoencoder_from)
    else:
        options = {"processes": cpus(), "device": device, "quiet": quiet}
        codec = train_autoencoder(smiles, out / "autoencoder", settings.autoencoder, **options)
        if isinstance(codec, int):
            return codec
    write_json(out / "reconstruction.json", codec.report())
    cloud = encoded(codec, ids, smiles, objective, out, say)
    surrogate_for(cloud, codec, objective, settings.surrogate, out, say)
    _write_objective(objective, out)
    return None


def _write_objective(objective: Objective, out: Path) -> None:
    text = yaml.safe_dump(objective.settings.model_dump(mode="json"), sort_keys=False)
    write_atomically(out / "objective.yaml", f"# The objective of this run, every default filled in.\n{text}".encode())


# ------------------------------------------------------------------ after the flow


def parts_of(flow: Flow) -> tuple[Codec, Objective, Surrogate, Cloud]:
    """What a run on molecules decodes and scores with, from the folder in its config."""
    data = flow.info.get("config", {}).get("data", {})
    if data.get("name") != Latents.name or not data.get("folder"):
        raise ValueError("this flow does not move molecules: its data are not 'latents'")
    folder, settings = Path(data["folder"]), Latents.Config(**{k: v for k, v in data.items() if k != "name"})
    codec = Codec.load(settings.autoencoder_from or folder / "autoencoder")
    cloud = Cloud.load(folder / KIND)
    if cloud.info["codec"] != codec.digest():
        raise ValueError(
            f"{folder / KIND} was encoded by another autoencoder than the one that is there now: its points cannot be "
            "decoded. Put the autoencoder of this run back, or run the chain again in another folder"
        )
    return codec, read_objective(settings.objective), Surrogate.load(folder / "surrogate"), cloud


def follow(flow: Flow, out: Path, *, n: int, seed: int, nfe: int | None, say: Say = lambda text: None) -> list[dict]:
    """Follows n molecules along the flow; writes population_before.csv, population_after.csv and steps.csv."""
    codec, objective, surrogate, cloud = parts_of(flow)
    n = min(n, len(flow.source)) or n  # each molecule once; 0: a density, which never runs out
    observer = Observer(codec, objective, surrogate, set(cloud.smiles), cloud.info["calls"] + surrogate.info["calls"])
    before, after, rows = along(flow, observer, n, seed, nfe=nfe, processes=cpus(), say=say)
    write_population(before, objective, out / "population_before.csv")
    write_population(after, objective, out / "population_after.csv")
    write_population(after, objective, out / "population_after.png")
    write_atomically(out / "steps.csv", table(list(rows[0]), (row.values() for row in rows)))
    first, last = rows[0]["true_median"], rows[-1]["true_median"]
    say(f"median total {first:.3f} -> {last:.3f}; written: {out}/population_after.csv, .png, steps.csv")
    say(f"more of them: python sample.py {shlex.quote(str(out))} --n 1000 --seed 1 --out hits.csv   (also .sdf, .png)")
    return rows
