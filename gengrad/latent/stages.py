"""What a run on molecules needs before its flow: molecules, codes and scores, a surrogate; each kept when made."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch

from gengrad.data.draws import generator_for
from gengrad.files import read_json, sha256_of, write_atomically, write_json
from gengrad.latent.codec import Codec
from gengrad.latent.data import KIND, Cloud, Latents
from gengrad.latent.settings import SurrogateSettings
from gengrad.latent.surrogate import Surrogate, fit_surrogate, out_of_reach
from gengrad.latent.training import digest_of
from gengrad.machine import cpus
from gengrad.molecules.library import library
from gengrad.molecules.objective import Objective
from gengrad.molecules.prepare import KEPT, prepare_file, table
from gengrad.molecules.scoring import score
from gengrad.strict_yaml import ConfigError

Say = Callable[[str], None]


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
