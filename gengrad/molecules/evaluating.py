"""Two populations compared, before and after, by every metric; what metrics.json holds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import rdkit
import torch

import gengrad
from gengrad.files import sha256_of, write_json
from gengrad.molecules.metrics import METRICS, Described, describe, describers
from gengrad.molecules.population import Population, read_population
from gengrad.molecules.progress import TOPS, Top, area_under

PROPERTIES = ("qed", "logp", "sa", "weight", "tpsa", "hba", "hbd", "rotatable_bonds", "rings", "fsp3", "alerts")
ALONE = {  # what a population is by itself: its name in the table -> the metric
    "validity": {"name": "validity"},
    "uniqueness": {"name": "uniqueness"},
    "unique_at_1k": {"name": "uniqueness", "first": 1000},
    "unique_at_10k": {"name": "uniqueness", "first": 10_000},
    "internal_diversity": {"name": "internal_diversity"},
    "internal_diversity_2": {"name": "internal_diversity", "p": 2},
    "circles": {"name": "circles"},
    "scaffold_diversity": {"name": "scaffold_diversity"},
    "filters": {"name": "filters"},
}
COMPARED = {  # what it is against another one
    "novelty": {"name": "novelty"},
    "nearest_similarity": {"name": "nearest_similarity"},
    "scaffold_cosine": {"name": "scaffold_cosine"},
    "fragment_cosine": {"name": "fragment_cosine"},
}


def evaluate_files(
    before: Path,
    after: Path,
    out: Path | None = None,
    *,
    training: Path | None = None,
    calls: Path | None = None,
    fcd: bool = False,
    any_size: bool = False,
    seed: int = 0,
    processes: int = 1,
    timeout: float = 10.0,
) -> dict:
    """Metrics of ``after`` beside those of ``before``, against it, and against ``training``; writes ``out``.

    ``calls``: a table in the order of the scorer's calls with a column total, by default calls.csv beside ``after``,
    for the AUC. The FCD is against ``training``, or ``before`` without one. Raises ``ValueError`` for a file without
    a molecule.
    """
    files = {"before": before, "after": after} | ({"training": training} if training else {})
    tables = {name: read_population(path) for name, path in files.items()}
    against = "training" if training else "before"
    if fcd:  # before the work, which the size may make useless
        from gengrad.molecules.fcd import check_sizes, frechet_chemnet  # brings in the evaluation of images

        check_sizes(len(tables["after"].smiles), len(tables[against].smiles), any_size)
    with describers(PROPERTIES, processes, timeout) as workers:
        seen = {name: describe(table.smiles, PROPERTIES, workers=workers) for name, table in tables.items()}
    for name, path in files.items():
        if not seen[name].smiles:
            raise ValueError(f"{path}: none of {len(tables[name].smiles)} rows is a molecule")
    found = {name: alone(seen[name], tables[name]) for name in ("before", "after")}
    found["after_against_before"] = compared(seen["after"], seen["before"])
    if training:
        found["after_against_training"] = compared(seen["after"], seen["training"])
    calls = calls or _beside(after)
    if calls is not None:
        found["search"] = search(read_population(calls), calls)
        files["calls"] = calls
    if fcd:
        distance = frechet_chemnet(seen["after"].smiles, seen[against].smiles, seed, any_size)
        found["fcd"] = {"against": against, **distance}
    found["protocol"] = {
        "gengrad": gengrad.__version__,
        "rdkit": rdkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "seed": seed,
        "timeout": timeout,
        "files": {name: {"name": Path(path).name, "sha256": sha256_of(path)} for name, path in files.items()},
    }
    found = _plain(found)
    if out is not None:
        write_json(out, found)
    return found


def _beside(after: Path) -> Path | None:
    """calls.csv of the same search, if ``after`` is its population."""
    path = Path(after).with_name("calls.csv")
    return path if path.is_file() and Path(after).name == "population_after.csv" else None


def alone(seen: Described, table: Population) -> dict:
    """Metrics of one population, medians of its properties and, where the table has totals, the best of them."""
    found = {"molecules": len(table.smiles), "scaffolds": len(seen.scaffolds.unique())}
    found |= {name: _value(settings, seen) for name, settings in ALONE.items()}
    medians = {name: _value({"name": "property_median", "property": name}, seen) for name in PROPERTIES}
    found["median"] = medians
    totals = table.numbers("total")
    if totals is not None:
        known = torch.tensor([t for t in totals if t == t], dtype=torch.float64)
        found |= {"mean_total": known.mean().item(), "median_total": known.quantile(0.5).item()}
        best = sorted({s: t for s, t in zip(table.smiles, totals) if t == t}.values(), reverse=True)
        found |= {f"top_{k}": sum(best[:k]) / len(best[:k]) for k in TOPS}
    passed = table.numbers("passed")
    return found | ({} if passed is None else {"passed": sum(p == 1 for p in passed) / len(passed)})


def compared(seen: Described, reference: Described) -> dict:
    """Metrics of one population against another: the property distances W1, and exp(-KL) as their mean."""
    found = {name: _value(settings, seen, reference) for name, settings in COMPARED.items()}
    w1 = {p: _value({"name": "property_wasserstein", "property": p}, seen, reference) for p in PROPERTIES}
    kl = {p: _value({"name": "property_kl", "property": p}, seen, reference) for p in PROPERTIES}
    known = torch.tensor([v for v in kl.values() if v == v], dtype=torch.float64)
    score = (-known).exp().mean().item() if len(known) else float("nan")
    return {**found, "kl_score": score, "wasserstein": w1, "kl": kl}


def search(table: Population, path: Path) -> dict:
    """Top-k means and the AUC of the top 10 of molecules in the order in which they were scored."""
    totals = table.numbers("total")
    if totals is None:
        raise ValueError(f"{path}: a column 'total' is needed for the AUC, in the order of the scorer's calls")
    if len(set(table.smiles)) < len(table.smiles):
        raise ValueError(f"{path}: a molecule stands twice, and a second score of it is no call")
    rings = [""] * len(totals)
    curves = {k: Top(k).add(totals, rings).curve for k in TOPS}
    best = {f"top_{k}": curve[-1] for k, curve in curves.items()}
    return {"calls": len(totals), **best, "auc_top_10": area_under(curves[10])}


def _value(settings: dict, seen: Described, reference: Described | None = None) -> float:
    metric = METRICS.build(settings, **({} if reference is None else {"reference": reference}))
    metric.update(seen)
    return metric.compute().item()


def _plain(value):
    """NaN and infinities as None, for JSON."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and value - value != 0 else value


def lines(found: dict) -> list[str]:
    """The comparison as a table of text."""
    rows = [("", "before", "after")]
    for name in found["after"]:
        if name != "median":
            rows.append((name, _shown(found["before"].get(name)), _shown(found["after"][name])))
    for name in found["after"]["median"]:
        rows.append((f"median {name}", *(_shown(found[side]["median"][name]) for side in ("before", "after"))))
    told = [f"{name:28s} {a:>12s} {b:>12s}" for name, a, b in rows]
    for part in ("after_against_before", "after_against_training", "search"):
        single = {k: v for k, v in found.get(part, {}).items() if not isinstance(v, dict)}
        if single:
            told.append(f"{part.replace('_', ' ')}: " + ", ".join(f"{k} {_shown(v)}" for k, v in single.items()))
    if "fcd" in found:
        told.append(fcd_line(found["fcd"]))
    return told


def fcd_line(found: dict) -> str:
    """The FCD never without its floor and the sizes."""
    sizes = f"{found['n']:,} molecules against {found['reference_n']:,} of {found['against']}"
    floor = f"floor {found['floor']:.3f} ({found['floor_n']:,} of it against its others)"
    return f"FCD {found['fcd']:.3f}, {sizes}; {floor}" + ("; BIASED, so few" if found["biased"] else "")


def _shown(value: Sequence | float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
