"""The pictures of a report, each as {"image": data URI, "alt", "title", "text"}."""

from __future__ import annotations

import base64
import math

import torch

from gengrad import plotting
from gengrad.data.draws import generator_for
from gengrad.molecules.drawing import beside, structure
from gengrad.molecules.report.folder import SIDES, Folder, median

SHOWN = 12  # molecules of a gallery
LABELS = {
    "total": "total score",
    "logp": "logP",
    "qed": "QED",
    "sa": "SA score",
    "np": "NP-likeness",
    "weight": "MW (Da)",
    "tpsa": "TPSA (Å²)",
    "fsp3": "Fsp3",
    "hba": "H-bond acceptors",
    "hbd": "H-bond donors",
    "rotatable_bonds": "rotatable bonds",
    "rings": "rings",
    "alerts": "structural alerts",
    "heavy_atoms": "heavy atoms",
}


def uri(svg: bytes | str) -> str:
    """An SVG as the address of an image; in an image of its own its names meet no others of the page."""
    data = svg.encode() if isinstance(svg, str) else svg
    return f"data:image/svg+xml;base64,{base64.b64encode(data).decode()}"


def number(value: float | None, digits: int = 3) -> str:
    """For a reader: 1,234, 0.873, 12.4; a dash for nothing."""
    if value is None or value != value:
        return "–"
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{digits}g}"


# ------------------------------------------------------------------ histograms


def histograms(found: Folder) -> tuple[list[dict], list[dict]]:
    """(of the total and what the objective names, of what nobody asked for)."""
    asked, names = [], set()
    labels = found.objective.labels if found.objective is not None else []
    for label in ["total", *labels]:
        columns = {side: found.numbers(side, label) for side in SIDES}
        if any(v == v for values in columns.values() for v in values):
            asked.append(_histogram(columns, label, _wished(found, label), _bounds(found, label)))
    names = {scorer.name for scorer in found.objective.scorers} if found.objective is not None else set()
    watched = []
    for name in next(iter(found.seen.values())).properties if found.seen else ():
        if name not in names:
            watched.append(_histogram({s: d.properties[name].tolist() for s, d in found.seen.items()}, name))
    return [h for h in asked if h], [h for h in watched if h]


def _histogram(columns: dict[str, list[float]], label: str, wished=None, bounds=(None, None)) -> dict | None:
    before, after = columns.get("before", []), columns.get("after", [])
    name = LABELS.get(label, label)
    if wished is not None:
        wished = _curve(wished, [v for v in before + after if v == v])
    try:
        figure = plotting.property_histogram(before, after, name, wished, bounds)
    except ValueError:  # nothing to draw
        return None
    a, b = number(median(before)), number(median(after))
    text = f"median {a} → {b}" if before and after else f"median {b if after else a}"
    return {"image": uri(plotting.svg(figure)), "title": name, "text": text, "alt": f"Distribution of {name}: {text}"}


def _wished(found: Folder, label: str):
    """The transform of the first component that looks at the property; the identity is no wish worth a line."""
    for component in found.objective.components if found.objective is not None else ():
        if found.objective.labels[component.column] == label and component.transform.name != "identity":
            return component.transform
    return None


def _curve(transform, values: list[float]):
    if not values or min(values) == max(values):
        return None
    x = torch.linspace(min(values), max(values), 200, dtype=torch.float64)
    return x.tolist(), transform(x).tolist()


def _bounds(found: Folder, label: str) -> tuple[float | None, float | None]:
    for f in found.objective.filters if found.objective is not None else ():
        if found.objective.labels[f.column] == label:
            return f.bounds.at_least, f.bounds.at_most
    return None, None


# ------------------------------------------------------------------ how it went


def progress(found: Folder) -> list[dict]:
    """Curves from steps.csv, the surrogate against the truth, and the gain against the distance moved."""
    steps, drawn = found.steps, []

    def add(title: str, text: str, draw) -> None:
        try:
            figure = draw()
        except ValueError:  # nothing finite in it
            return
        drawn.append({"image": uri(plotting.svg(figure)), "title": title, "text": text, "alt": f"{title}. {text}"})

    def lines(title: str, text: str, x: str, names: dict[str, str], xlabel: str, ylabel: str) -> None:
        there = {shown: steps[name] for name, shown in names.items() if name in steps}
        if x in steps and there and len(steps[x]) > 1:
            add(title, text, lambda: plotting.curves(steps[x], there, xlabel, ylabel))

    tops = {"top_1": "best", "top_10": "ten best", "top_100": "hundred best"}
    lines("Best found", "Mean total of the best molecules so far.", "calls", tops, "scorer calls", "total score")
    scores = {"true_mean": "true", "surrogate_mean": "surrogate", "spare_mean": "spare surrogate"}
    text = "Mean total by RDKit, and as the surrogates see it; the spare one never steers."
    lines("Score along the flow", text, "step", scores, "step", "total score")
    _surrogate(found, add)
    _gain(found, add)
    rates = {k: k for k in ("validity", "uniqueness", "novelty", "internal_diversity")}
    rates = {k: v.replace("_", " ") for k, v in rates.items()}
    lines("What stays", "Shares and diversity of the population at each step.", "step", rates, "step", "share")
    lines("Diversity", "Internal diversity of the hundred best.", "calls", {"diversity_top_100": "d"}, "scorer calls", "internal diversity")  # fmt: skip  # noqa: E501
    lines("Divergence spent", "Energy distance to the population before.", "step", {"divergence": "d"}, "step", "divergence")  # fmt: skip  # noqa: E501
    lines("Leads improved", "Share of the leads with a better molecule near them.", "calls", {"success_rate": "s"}, "scorer calls", "share of leads")  # fmt: skip  # noqa: E501
    return drawn


def _surrogate(found: Folder, add) -> None:
    """Molecule by molecule where the population has a column ``surrogate``, else the mean of each step."""
    predicted = found.numbers("after", "surrogate")
    if any(v == v for v in predicted):
        title, text = "Surrogate against truth", "One dot for each molecule after; on the line both agree."
        pairs = (found.numbers("after", "total"), {"surrogate": predicted})
    elif "true_mean" in found.steps and "surrogate_mean" in found.steps:
        title, text = "Surrogate against truth", "Mean of each step; above the line the surrogate promises too much."
        names = {"surrogate_mean": "surrogate", "spare_mean": "spare surrogate"}
        pairs = found.steps["true_mean"], {v: found.steps[k] for k, v in names.items() if k in found.steps}
    else:
        return
    add(title, text, lambda: plotting.predicted_against_true(*pairs, "true total", "predicted total"))


def _gain(found: Folder, add) -> None:
    """Of each molecule against 1 - similarity to its origin; of a flow the mean against the way in the latent too."""
    gains, distances = [], []
    totals = {side: found.numbers(side, "total") for side in SIDES}
    near = found.numbers("after", "similarity")
    for i, origin in enumerate(found.origins()):
        if origin is not None and near[i] == near[i]:
            gains.append(totals["after"][i] - totals["before"][origin])
            distances.append(1 - near[i])
    if gains:
        text = "Total minus that of the molecule it came from, against 1 − Tanimoto similarity to it."
        labels = ("distance to the origin", "gain in total score")
        add("Gain against distance", text, lambda: plotting.gain_against_distance(distances, gains, *labels))
    steps = found.steps
    if "moved" in steps and "true_mean" in steps and len(steps["moved"]) > 1:
        names = {"true_mean": "true", "surrogate_mean": "surrogate"}
        rise = {v: [x - steps[k][0] for x in steps[k]] for k, v in names.items() if k in steps}
        text = "Rise of the mean total against the way moved in the latent space."
        labels = ("root mean squared way", "gain in total score")
        add("Gain against way in the latent", text, lambda: plotting.curves(steps["moved"], rise, *labels))


# ------------------------------------------------------------------ structures


def structures(found: Folder) -> tuple[list[dict], list[dict]]:
    """(the best different molecules after, each with its origin; galleries of some before and some after by chance)."""
    galleries = []
    for side in SIDES:
        rows = found.readable(side)
        if rows:
            order = torch.randperm(len(rows), generator=generator_for(0, f"gallery {side}")).tolist()
            cards = [_card(found, side, rows[i]) for i in sorted(order[:SHOWN])]
            galleries.append({"side": side, "cards": cards, "of": len(found.tables[side].smiles)})
    return [_pair(found, i) for i in _best(found)] if "after" in found.tables else [], galleries


def _best(found: Folder) -> list[int]:
    """The rows after with the highest totals, each molecule once; what passes comes first."""
    total, passed, smiles = found.numbers("after", "total"), found.passed("after"), found.tables["after"].smiles
    rows = [i for i in found.readable("after") if not math.isnan(total[i])] or found.readable("after")
    rows.sort(key=lambda i: (not passed[i], -total[i] if total[i] == total[i] else 0.0, i))
    once = {smiles[i]: i for i in reversed(rows)}
    return [i for i in rows if once[smiles[i]] == i][:SHOWN]


def _card(found: Folder, side: str, i: int) -> dict:
    """One molecule: its picture, total and what the objective looks at."""
    smiles = found.tables[side].smiles[i]
    labels = found.objective.labels if found.objective is not None else []
    values = [(LABELS.get(x, x), number(found.numbers(side, x)[i])) for x in labels]
    drawn = structure(smiles)
    return {
        "image": uri(drawn) if drawn else None,
        "smiles": smiles,
        "total": number(found.numbers(side, "total")[i]),
        "shown": [(name, value) for name, value in values if value != "–"],
        "passed": found.passed(side)[i],
        "id": found.tables[side].columns.get("id", [""] * (i + 1))[i],
    }


def _pair(found: Folder, i: int) -> dict:
    """A molecule after, beside the one before that it comes from, where that is known and another one."""
    card = _card(found, "after", i)
    origin = found.origins()[i]
    if origin is None or origin not in set(found.readable("before")):
        return {**card, "origin": None, "kept": False}
    before = found.tables["before"].smiles[origin]
    both = beside(before, card["smiles"]) if before != card["smiles"] else None
    if both is None:
        return {**card, "origin": None, "kept": before == card["smiles"]}
    card["image"] = uri(both[1])
    near = number(found.numbers("after", "similarity")[i], 2)
    return {**card, "origin": {**_card(found, "before", origin), "image": uri(both[0])}, "similarity": near}
