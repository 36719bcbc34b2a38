"""The chain of a run on molecules: prepare, autoencoder, scores, codes, surrogate, flow, decode; each kept when made.

RUN/molecules/      molecules.csv, rejected.csv, prepare.json
RUN/autoencoder/    autoencoder.safetensors, autoencoder.json, reconstruction.json, checkpoints
RUN/latents/        latents.safetensors, latents.json: codes, true properties and totals of every molecule
RUN/surrogate/      surrogate.safetensors, surrogate.json
RUN/                the flow's own files, and objective.yaml, reconstruction.json, steps.csv,
                    population_before.csv, population_after.csv
"""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

import gengrad.run
from gengrad.config import ConfigError, RunConfig
from gengrad.data.draws import generator_for
from gengrad.files import read_json, sha256_of, write_atomically, write_json
from gengrad.flows.flow import Flow, load
from gengrad.latent.codec import Codec
from gengrad.latent.data import KIND, Cloud, Latents
from gengrad.latent.population import write_population
from gengrad.latent.settings import SurrogateSettings
from gengrad.latent.steps import Observer, along
from gengrad.latent.surrogate import Surrogate, fit_surrogate, out_of_reach
from gengrad.latent.training import digest_of, train_autoencoder
from gengrad.machine import cpus
from gengrad.molecules.library import library
from gengrad.molecules.objective import Objective, read_objective
from gengrad.molecules.prepare import KEPT, prepare_file, table
from gengrad.molecules.scoring import score
from gengrad.training.loop import Outcome, Progress

Say = Callable[[str], None]
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
        "network": {"name": "mlp", "width": 256, "depth": 3, "activation": "silu"},
        "method": {"name": "nsgf", "pool": "geodesic", "target": "match", "ot_batch": 512},
        "train": {"steps": 3000, "batch_size": 512, "lr": 1e-3, "checkpoint_every": 500},
        "evaluate": {"nfe": [10], "n": 1000},
    },
}


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
    stopped = make(settings, out, say, device=_device(config), quiet=quiet)
    if stopped is not None:
        return Outcome(False, stopped, Progress(), 0.0, 0.0)
    outcome = gengrad.run.train(placed(config, out), quiet=quiet, again=again)
    if outcome.finished and rank == 0:
        follow(load(out), out, n=config.evaluate.n, seed=config.evaluate.seed, nfe=config.evaluate.nfe[0], say=say)
    return outcome


def _device(config: RunConfig) -> str:
    return "cuda" if config.general.device != "cpu" and torch.cuda.is_available() else "cpu"


def placed(config: RunConfig, out: Path) -> RunConfig:
    """The config with the run's folder in it: of its data, of a source of latents, of its surrogate potentials.

    A source of latents takes from the data all but the bounds of the total, which are its own. The folder is written
    in full, so that the run can be sampled from anywhere.
    """
    out = out.absolute()
    data, method = {**config.data, "folder": str(out)}, config.method
    if data["autoencoder_from"]:
        data["autoencoder_from"] = os.path.abspath(data["autoencoder_from"])
    source = config.source
    if source["name"] == Latents.name:
        source = {**data, "at_least": source["at_least"], "at_most": source["at_most"]}
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
    ``nsgf`` goes to those with ``at_least`` so much, and refuses to go nowhere.
    """
    if (method == "nsgf") == (at_least is None):
        raise ValueError(
            "nsgf moves toward the molecules that meet the target: say what meeting it is, e.g. --at-least 0.9"
            if method == "nsgf"
            else f"at_least={at_least:g} chooses the molecules that nsgf goes to; {method} descends the potential"
        )
    target = {"at_least": at_least} if method == "nsgf" else {"at_most": at_most}
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


def molecules(settings: Latents.Config, folder: Path, say: Say = lambda text: None) -> tuple[list[str], list[str]]:
    """(ids, canonical SMILES) of the file, standardised, or of the library; some by the seed where there is a limit."""
    given = {"library": settings.library, "seed": settings.seed}
    if settings.path is not None:
        if not Path(settings.path).is_file():
            raise FileNotFoundError(f"no molecule file at {settings.path!r} (looked in {Path.cwd()})")
        given = {"sha256": sha256_of(settings.path), "column": settings.column}
    note = folder / "prepare.json"
    if note.exists() and (folder / "molecules.csv").exists():
        if read_json(note).get("given") != given:
            raise _another(folder, "molecules")
    else:
        if settings.path is not None:
            summary = _taken(Path(settings.path), folder) or prepare_file(
                settings.path, folder, column=settings.column, processes=cpus()
            )
            say(f"molecules: {summary['kept']:,} of {summary['rows']:,} rows, {summary['rejected']:,} rejected")
        else:
            texts = library(settings.library, settings.seed)
            rows = ((str(i), i, text, text, "") for i, text in enumerate(texts, 1))
            write_atomically(folder / "molecules.csv", table(KEPT, rows))
            summary = {"kept": len(texts), "rows": len(texts)}
            say(f"molecules: {len(texts):,} of the library")
        write_json(note, {**summary, "given": given})
    with open(folder / "molecules.csv", newline="", encoding="utf-8") as file:
        rows = [(row["id"], row["smiles"]) for row in csv.DictReader(file)]
    if settings.limit is not None and len(rows) > settings.limit:
        order = torch.randperm(len(rows), generator=generator_for(settings.seed, "molecules limit"))
        rows = [rows[i] for i in order[: settings.limit].sort().values.tolist()]
    return [name for name, _ in rows], [text for _, text in rows]


def _taken(path: Path, folder: Path) -> dict | None:
    """Copies a table that ``prepare`` wrote, which need not be standardised again; None for any other file."""
    header = ",".join(KEPT).encode()
    with open(path, "rb") as file:
        if file.readline().strip() != header:
            return None
    write_atomically(folder / "molecules.csv", path.read_bytes())
    rows = path.read_bytes().count(b"\n") - 1
    return {"input": str(path), "rows": rows, "kept": rows, "rejected": 0}


def encoded(
    codec: Codec, ids: list[str], smiles: list[str], objective: Objective, out: Path, say: Say = lambda text: None
) -> Cloud:
    """Codes and true scores of the molecules that the autoencoder can take; the others: ``latents/left_out.csv``."""
    told = {
        "codec": codec.digest(),
        "molecules": digest_of(smiles),
        "objective": objective.settings.model_dump(mode="json"),
    }
    folder = out / KIND
    if (folder / f"{KIND}.json").is_file():
        cloud = Cloud.load(folder)
        if any(cloud.info.get(key) != value for key, value in told.items()):
            raise _another(folder, "codes and scores")
        return cloud
    rows = codec.rows(smiles, cpus())
    kept = [i for i, row in enumerate(rows) if not isinstance(row, ValueError)]
    if len(kept) < 20:
        reason = next((str(row) for row in rows if isinstance(row, ValueError)), "there are too few")
        raise ValueError(
            f"the autoencoder can take {len(kept)} of {len(smiles)} molecules, at least 20 are needed: {reason}. Train "
            "one on these molecules (gengrad molecules train-autoencoder), or choose the one that they belong to"
        )
    texts = [smiles[i] for i in kept]
    say(f"scoring {len(texts):,} molecules by {', '.join(objective.labels)}")
    scores = score(objective, texts, cpus())
    x = codec.encode([rows[i] for i in kept])
    told |= {"left_out": len(smiles) - len(kept), "calls": scores.calls}
    cloud = Cloud([ids[i] for i in kept], texts, x, scores.properties, scores.total, told)
    lost = ([ids[i], smiles[i], str(row)] for i, row in enumerate(rows) if isinstance(row, ValueError))
    write_atomically(folder / "left_out.csv", table(("id", "smiles", "reason"), lost))
    cloud.save(folder)
    say(f"codes: {len(texts):,} molecules, median total {float(cloud.total.nanmedian()):.3f}")
    return cloud


def surrogate_for(
    cloud: Cloud, codec: Codec, objective: Objective, settings: SurrogateSettings, out: Path,
    say: Say = lambda text: None,
) -> Surrogate:  # fmt: skip
    """The surrogate of the objective on these codes, fitted or as it lies in ``out``."""
    folder = out / "surrogate"
    told = {"codec": codec.digest(), "objective": objective.settings.model_dump(mode="json")}
    told["settings"], told["molecules"] = settings.model_dump(mode="json"), len(cloud.x)
    if (folder / "surrogate.json").is_file():
        found = Surrogate.load(folder)
        if any(found.info.get(key) != value for key, value in told.items()):
            raise _another(folder, "surrogate")
        return found
    x, properties, calls = explored(codec, cloud, objective, settings)
    if calls:
        say(f"explored: {len(x):,} points beside the molecules' codes, {calls:,} more molecules scored")
    x, properties = torch.cat([cloud.x, x]), torch.cat([cloud.properties, properties])
    found = fit_surrogate(x, properties, objective, settings)
    found.info |= {**told, "calls": calls, "warnings": out_of_reach(objective, cloud.properties)}
    found.save(folder)
    for label, held in found.info["held_out"].items():
        figures = ", ".join(f"{key} {value:.3f}" for key, value in held.items() if value is not None)
        say(f"surrogate of {label}, held out: {figures}")
    for warning in found.info["warnings"]:
        say(f"  note: {warning}")
    return found


def explored(codec: Codec, cloud: Cloud, objective: Objective, settings: SurrogateSettings) -> tuple:
    """(points (n, latent), raw properties of what they decode to, scorer calls): where flows go and no molecule is.

    Half of them between the codes of two molecules, half around that of one, up to half the distance of two. A
    surrogate of the codes alone takes any way out of the data for a way up; there decoding makes other molecules.
    """
    n, d = settings.explored, cloud.x.shape[1]
    generator = generator_for(settings.seed, "surrogate explored")
    i, j = torch.randint(len(cloud.x), (2, n), generator=generator)
    a, u = torch.rand(n, 1, generator=generator), torch.randn(n, d, generator=generator)
    around = torch.arange(n)[:, None] % 2 == 0
    x = cloud.x[i] + a * torch.where(around, u * 0.5**0.5, cloud.x[j] - cloud.x[i])
    smiles = codec.decode(x)
    valid = [k for k, text in enumerate(smiles) if text]
    if not valid:
        return x[:0], cloud.properties[:0], 0
    scores = score(objective, [smiles[k] for k in valid], cpus())
    return x[valid], scores.properties, scores.calls


def _another(folder: Path, what: str) -> ConfigError:
    return ConfigError(
        f"{folder} holds {what} made with other settings, or from another file. Nothing was changed there. Give "
        "another out=..., or delete that folder to make them anew"
    )


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
