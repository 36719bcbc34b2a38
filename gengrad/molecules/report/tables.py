"""The tables of a report: what was asked, what came of it, where molecules were lost, where it all comes from."""

from __future__ import annotations

import json

import rdkit

import gengrad
from gengrad.molecules.report.figures import LABELS, number
from gengrad.molecules.report.folder import SIDES, Folder, median

WISHES = {  # what a transform says to a chemist
    "double_sigmoid": "between {low:g} and {high:g}",
    "sigmoid": "high: 0 at {low:g}, 1 from {high:g} on",
    "reverse_sigmoid": "low: 1 up to {low:g}, 0 from {high:g} on",
    "linear": "high: 0 at {low:g}, 1 from {high:g} on, straight",
    "reverse_linear": "low: 1 up to {low:g}, 0 from {high:g} on, straight",
    "gaussian": "near {mean:g}, within about {deviation:g}",
    "identity": "as high as possible",
}
METRICS = {  # name in metrics.json -> (shown, what it says)
    "validity": ("validity", "share that are molecules"),
    "uniqueness": ("uniqueness", "different ones among the valid"),
    "passed": ("pass the filters", "share of all"),
    "mean_total": ("mean total", ""),
    "median_total": ("median total", ""),
    "top_1": ("best total", ""),
    "top_10": ("mean of the 10 best", "different molecules"),
    "top_100": ("mean of the 100 best", "different molecules"),
    "internal_diversity": ("internal diversity", "1 − mean Tanimoto of all pairs"),
    "circles": ("circles", "molecules further than 0.75 from each other"),
    "scaffolds": ("scaffolds", "different Murcko scaffolds"),
    "scaffold_diversity": ("scaffold diversity", "scaffolds over molecules"),
    "filters": ("without alerts", "neither PAINS nor BRENK"),
}
AGAINST = {
    "novelty": ("novelty", "share that the other population does not have"),
    "nearest_similarity": ("nearest similarity", "mean Tanimoto to the nearest there"),
    "scaffold_cosine": ("scaffold cosine", ""),
    "fragment_cosine": ("fragment cosine", "BRICS fragments"),
    "kl_score": ("KL score", "mean of exp(−KL) over descriptors"),
}
FUNNEL = {
    "proposed": "proposed",
    "valid": "valid",
    "similar": "similar enough to the lead",
    "new": "new",
    "scored": "scored",
    "passed": "pass the filters",
    "passed_within_per_scaffold": "pass, within the limit for a scaffold",
}


def _change(a: float | None, b: float | None) -> str:
    if a is None or b is None or a != a or b != b:
        return ""
    return "=" if number(a) == number(b) else f"{'+' if b > a else '−'}{number(abs(b - a), 2)}"


# ------------------------------------------------------------------ the top of the page


def story(found: Folder) -> str:
    """One or two sentences: who made it, from what to what."""
    run, flow = found.notes.get("run.json", {}), found.notes.get("flow.json", {})
    name = flow.get("config", {}).get("method", {}).get("name")
    who = f"Flow by {name}" if name else {"baseline": f"Baseline {run.get('method')}"}.get(run.get("command"), "")
    who = who or ("Improvement of given leads" if run.get("command") == "optimize" else "")
    counts = [f"{len(found.tables[side].smiles):,} molecules {side}" for side in SIDES if side in found.tables]
    parts = [who, ", ".join(counts)]
    totals = [median(found.numbers(side, "total")) for side in SIDES]
    if all(t == t for t in totals):
        parts.append(f"the median total went from {number(totals[0])} to {number(totals[1])}")
    return "; ".join(part for part in parts if part) + "."


def facts(found: Folder) -> list[dict]:
    """The figures at the top: {"name", "before", "after"}; ``before`` is None for one that has none."""
    shown = []
    sides = [found.metrics.get(side, {}) for side in SIDES]
    for key, name, percent in (
        ("median_total", "median total", False),
        ("top_10", "mean of the 10 best", False),
        ("passed", "pass the filters", True),
        ("validity", "valid", True),
        ("internal_diversity", "internal diversity", False),
    ):
        values = [side.get(key) for side in sides]
        if any(v is not None and v == v for v in values):
            a, b = (_percent(v) if percent else number(v) for v in values)
            shown.append({"name": name, "before": a if values[0] is not None else None, "after": b})
    calls = found.notes.get("run.json", {}).get("calls")
    steps = found.steps.get("scorer_calls") or found.steps.get("calls")
    if calls is not None or steps:
        spent = calls if calls is not None else steps[-1]
        shown.append({"name": "scorer calls", "before": None, "after": number(spent)})
    return shown


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.3g} %"


def objective_rows(found: Folder) -> dict:
    """{"components": [(property, wish, weight)], "filters": [text], "mean", "per_scaffold", "text"}."""
    objective = found.objective
    if objective is None:
        return {"components": [], "filters": [], "mean": "", "per_scaffold": None, "text": found.objective_text}
    components = []
    for c in objective.components:
        settings = c.transform.config.model_dump()
        wish = WISHES.get(c.transform.name, "")
        wish = wish.format(**settings) if wish else f"{c.transform.name} {json.dumps(settings)}"
        components.append((LABELS.get(c.label, c.label), wish, number(c.weight)))
    return {
        "components": components,
        "filters": [str(f).replace(f.label, LABELS.get(f.label, f.label), 1) for f in objective.filters],
        "mean": objective.settings.mean.replace("_", " "),
        "per_scaffold": objective.settings.per_scaffold,
        "text": found.objective_text,
    }


# ------------------------------------------------------------------ what came of it


def yield_rows(found: Folder) -> dict:
    """{"constraints": rows before and after, "funnel": rows of where the proposals went}; shares from 0 to 1."""
    rows = []
    for name, hold in _constraints(found):
        shares = {side: sum(hold[side]) / len(hold[side]) if hold.get(side) else None for side in SIDES}
        shown = {side: {"share": s, "text": _percent(s)} for side, s in shares.items()}
        rows.append({"name": name, **shown})
    spent = found.notes.get("run.json", {}).get("yield", {})
    most = spent.get("proposed") or spent.get("scored") or 1
    funnel = [
        {"name": shown, "count": f"{spent[key]:,}", "share": min(1.0, spent[key] / most)}
        for key, shown in FUNNEL.items()
        if isinstance(spent.get(key), int)
    ]
    return {"constraints": rows, "funnel": funnel, "refused": spent.get("refused", {})}


def _constraints(found: Folder):
    """(name, {side: whether each molecule holds it}) of validity, each filter, the limit for a scaffold, and all."""
    yield "valid", {side: found.seen[side].valid.tolist() for side in found.seen}
    import torch

    for f in found.objective.filters if found.objective is not None else ():
        label, holds = found.objective.labels[f.column], {}
        for side in found.tables:
            values = torch.tensor(found.numbers(side, label), dtype=torch.float64)
            if not values.isnan().all():
                holds[side] = f.bounds.hold(values).tolist()
        yield str(f).replace(f.label, LABELS.get(f.label, f.label), 1), holds
    passed = {side: found.passed(side) for side in found.tables if found.tables[side].numbers("passed") is not None}
    if passed:
        yield "pass all", passed


def lead_rows(found: Folder) -> dict | None:
    """The leads with what was found for each, {"rows", "more": how many are not shown}."""
    if not found.leads:
        return None
    rows = []
    for lead in found.leads[:50]:
        values = {key: _float(lead.get(key, "")) for key in ("total", "best_total", "gain", "similarity", "calls")}
        rows.append({**lead, **{key: number(value) for key, value in values.items()}})
    return {"rows": rows, "more": len(found.leads) - len(rows)}


def _float(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def metric_rows(found: Folder) -> list[dict]:
    """Groups of rows (name, note, before, after, change)."""
    before, after = (found.metrics.get(side, {}) for side in SIDES)
    rows = [
        (name, note, number(before.get(key)), number(after.get(key)), _change(before.get(key), after.get(key)))
        for key, (name, note) in METRICS.items()
        if before.get(key) is not None or after.get(key) is not None
    ]
    a, b = before.get("median", {}), after.get("median", {})
    medians = [
        (LABELS.get(key, key), "", number(a.get(key)), number(b.get(key)), _change(a.get(key), b.get(key)))
        for key in b or a
    ]
    groups = [{"title": "The population", "rows": rows}, {"title": "Medians of properties", "rows": medians}]
    for key, title in (("after_against_before", "After against before"), ("after_against_training", "After against the training set")):  # fmt: skip  # noqa: E501
        against = found.metrics.get(key, {})
        rows = [(name, note, "", number(against.get(m)), "") for m, (name, note) in AGAINST.items() if m in against]
        w1 = against.get("wasserstein", {})
        rows += [(f"Wasserstein-1 of {LABELS.get(p, p)}", "", "", number(v), "") for p, v in w1.items()]
        groups.append({"title": title, "rows": rows})
    fcd = found.metrics.get("fcd")
    if fcd:
        note = f"against {fcd['reference_n']:,} of {fcd['against']}; floor {number(fcd['floor'])} at {fcd['floor_n']:,}"
        note += "; biased, so few" if fcd["biased"] else ""
        groups.append({"title": "Frechet ChemNet distance", "rows": [("FCD", note, "", number(fcd["fcd"]), "")]})
    return [group for group in groups if group["rows"]]


def reconstruction_rows(found: Folder) -> list[tuple[str, str]]:
    """How well the autoencoder gives molecules back, held out."""
    note = found.notes.get("reconstruction.json", {})
    names = {
        "n": ("held-out molecules", number),
        "exact": ("come back exactly", _percent),
        "tanimoto": ("mean Tanimoto to what went in", number),
        "validity": ("come back as a molecule", _percent),
        "effective": ("directions of the latent in use", number),
    }
    found = {k: note[k] for k in names if isinstance(note.get(k), (int, float))}
    return [(names[k][0], names[k][1](value)) for k, value in found.items()]


def provenance(found: Folder) -> dict:
    """{"facts": [(name, value)], "files": [(name, digest)], "configs": [(name, text)]}."""
    run, flow = found.notes.get("run.json", {}), found.notes.get("flow.json", {})
    seeds = {text for side in found.tables for text in found.tables[side].columns.get("seed", []) if text}
    rows = [
        ("seed", ", ".join(sorted(seeds)[:5]) or "not in the tables"),
        ("made with", f"gengrad {run.get('gengrad') or flow.get('gengrad') or 'unknown'}"),
        ("reported with", f"gengrad {gengrad.__version__}, RDKit {rdkit.__version__}"),
    ]
    if "last_step" in run:
        rows.append(("time", f"{run.get('seconds', 0):.0f} s, {run.get('ended', '')}"))
    limit = found.objective.settings.per_scaffold if found.objective is not None else None
    if limit:
        rows.append(("of each scaffold", f"at most {limit} pass"))
    configs = [("objective.yaml", found.objective_text)] if found.objective_text else []
    flow = {key: value for key, value in flow.items() if key in ("config", "method", "gengrad", "torch")}
    kept = {"run.json": run, "flow.json": flow}
    configs += [(name, json.dumps(value, indent=1)) for name, value in kept.items() if value]
    return {"facts": rows, "files": list(found.digests.items()), "configs": configs}
