"""A population: whitened points decoded, filtered and scored, each beside the molecule it came from; its files."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengrad.data.draws import Keyed, Shuffle
from gengrad.files import write_atomically
from gengrad.flows.flow import Flow
from gengrad.latent.codec import Codec
from gengrad.latent.data import Latents
from gengrad.latent.surrogate import Surrogate
from gengrad.molecules.metrics import describe, tanimoto
from gengrad.molecules.objective import Objective
from gengrad.molecules.prepare import prepare, table
from gengrad.molecules.reading import read_molecules
from gengrad.molecules.scoring import Scores, score

ENDINGS = (".csv", ".sdf", ".png")
NOTHING = "no molecule comes out"
SHOWN = 24  # molecules of a picture


@dataclass(frozen=True)
class Population:
    """n molecules at one step of a flow. ``smiles`` is empty where none came out; ``scores`` are of ``valid`` alone."""

    x: Tensor  # (n, latent)
    smiles: list[str]
    valid: list[int]  # their places
    scores: Scores
    parents: list[tuple[str, str]]  # (id, SMILES), empty where a point came from no molecule
    similarity: Tensor  # (n,) Tanimoto to the parent, NaN without one
    expected: Tensor  # (n,) the total that the surrogate expects at x
    step: int
    seed: int

    def __len__(self) -> int:
        return len(self.smiles)


def sources(source: Latents, n: int, seed: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """(points (n, latent), (id, SMILES) of each): different molecules until all are used, then again in another order.

    Number i depends on the seed alone and not on n.
    """
    places = Shuffle(len(source), seed, "population").take(0, n)
    rows = source.numbers[places].tolist()
    return source.points[places], [(source.cloud.ids[row], source.cloud.smiles[row]) for row in rows]


def start(flow: Flow, n: int, seed: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """The points from which a flow's population starts, and the molecules that they are, where they are some."""
    if isinstance(flow.source, Latents):
        return sources(flow.source, n, seed)
    from gengrad.data.draws import draw

    return draw(flow.source, 0, n, seed, "source"), [("", "")] * n


def of_file(
    codec: Codec, path: Path, column: str | None = None, processes: int = 1
) -> tuple[Tensor, list[tuple[str, str]], list[list[str]]]:
    """(points, (id, SMILES) of each, [id, input, reason] of what is left out) of the molecules of a user's file.

    They are standardised as for training; equal ones come once. Raises ``ValueError`` where none is left.
    """
    found = prepare(read_molecules(path, column).rows, processes=processes)
    rows = codec.rows(found.smiles, processes)
    left = [[row.name, row.shown, reason] for row, reason in found.rejected]
    left += [[row.name, row.shown, str(r)] for (row, *_), r in zip(found.kept, rows) if isinstance(r, ValueError)]
    good = [(row.name, text, r) for (row, *_), text, r in zip(found.kept, found.smiles, rows) if isinstance(r, list)]
    if not good:
        raise ValueError(
            f"{path}: none of its {len(left)} rows can be moved; the first: {left[0][2] if left else 'empty'}"
        )
    return codec.encode([r for *_, r in good]), [(name, text) for name, text, _ in good], left


@torch.inference_mode()
def states(flow: Flow, x: Tensor, seed: int, nfe: int | None = None):
    """x and where it is after each step of the flow: a transport of JKO, a step of the solver for a velocity."""
    yield x
    here = x.to(flow.device)
    for number, (transport, share) in enumerate(zip(flow.transports, flow.allocate(nfe))):
        noise = Keyed(0, len(x), seed, f"latent/{number}")
        for here in transport.path(here, noise, share):  # noqa: B020 - the next transport starts where it ends
            yield here.cpu()


def population(
    codec: Codec, objective: Objective, surrogate: Surrogate, x: Tensor, parents: Sequence[tuple[str, str]],
    step: int, seed: int, processes: int = 1,
) -> Population:  # fmt: skip
    """Decodes whitened points x (n, latent), then filters and scores what came out."""
    smiles = codec.decode(x)
    valid = [i for i, text in enumerate(smiles) if text]
    scores = score(objective, [smiles[i] for i in valid], processes)
    near, expected = _similarity(smiles, valid, parents), surrogate.scores(objective, x)
    return Population(x, smiles, valid, scores, list(parents), near, expected, step, seed)


def _similarity(smiles: Sequence[str], valid: Sequence[int], parents: Sequence[tuple[str, str]]) -> Tensor:
    found = torch.full((len(smiles),), math.nan, dtype=torch.float64)
    some = [i for i in valid if parents[i][1]]
    a, b = (describe(texts, ()).fingerprints for texts in ([smiles[i] for i in some], [parents[i][1] for i in some]))
    for i, one, other in zip(some, a, b):
        found[i] = tanimoto(one[None], other[None])
    return found


# ------------------------------------------------------------------ files


def columns(objective: Objective) -> list[str]:
    """The header of a population's table."""
    properties = [*objective.labels, *(f"{component.label}.s" for component in objective.components)]
    scored = [*properties, "total", "passed", "surrogate", "similarity", "scaffold"]
    return ["id", "parent", "smiles", "valid", *scored, "step", "seed", "notes"]


def lines(found: Population, objective: Objective):
    """One line for each point: id, parent id, SMILES, properties, desirabilities, total and the rest.

    At step 0 a molecule has the id of the one that it is, which those of later steps name as their parent.
    """
    place, s = {i: k for k, i in enumerate(found.valid)}, found.scores
    width = len(objective.labels) + len(objective.components) + 1
    # four digits: the last ones of a product in float32 depend on how many rows it has
    hopes = [float(f"{value:.4g}") for value in found.expected.tolist()]
    for i, (text, (parent, _), alike) in enumerate(zip(found.smiles, found.parents, found.similarity.tolist())):
        own = f"{found.seed}-{i}"
        head = [own, parent] if found.step else [parent or own, None]
        tail = [found.step, found.seed]
        if i not in place:
            yield [*head, None, 0, *[None] * width, 0, hopes[i], None, None, *tail, NOTHING]
            continue
        k = place[i]
        numbers = [*s.properties[k].tolist(), *s.desirabilities[k].tolist(), s.total[k].item(), int(s.passed[k])]
        yield [*head, text, 1, *numbers, hopes[i], alike, s.scaffolds[k], *tail, s.notes[k]]


def write_population(found: Population, objective: Objective, path: Path) -> None:
    """A table (.csv), structures with the same tags (.sdf) or a picture of the best (.png), by the ending."""
    if path.suffix == ".csv":
        write_atomically(path, table(columns(objective), lines(found, objective)))
    elif path.suffix == ".sdf":
        write_atomically(path, sdf(found, objective))
    else:
        write_atomically(path, grid(found))


def sdf(found: Population, objective: Objective) -> bytes:
    """An SDF of the valid molecules in the plane, with the table's columns as tags."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    text, header = io.StringIO(), columns(objective)
    writer = Chem.SDWriter(text)
    for line in lines(found, objective):
        values = dict(zip(header, line))
        if not values["valid"]:
            continue
        mol = Chem.MolFromSmiles(values["smiles"])
        AllChem.Compute2DCoords(mol)
        mol.SetProp("_Name", values["id"])
        for key, value in values.items():
            empty = value is None or value != value
            mol.SetProp(key, "" if empty else repr(value) if isinstance(value, float) else str(value))
        writer.write(mol)
    writer.close()
    return text.getvalue().encode("utf-8")


def grid(found: Population) -> bytes:
    """A PNG of the best different molecules, each over its total; those that pass the filters first."""
    from rdkit import Chem
    from rdkit.Chem import Draw

    s = found.scores
    key = [(not s.passed[k], -s.total[k].nan_to_num(-1.0).item(), k) for k in range(len(found.valid))]
    best = dict.fromkeys(found.smiles[found.valid[k]] for *_, k in sorted(key))
    chosen = list(best)[:SHOWN]
    if not chosen:
        raise ValueError("no molecule came out: there is nothing to draw")
    total = {found.smiles[i]: s.total[k].item() for k, i in enumerate(found.valid)}
    mols = [Chem.MolFromSmiles(text) for text in chosen]
    legends = [f"{total[text]:.3f}" for text in chosen]
    picture = Draw.MolsToGridImage(mols, molsPerRow=min(6, len(mols)), subImgSize=(260, 200), legends=legends)
    data = io.BytesIO()
    picture.save(data, format="PNG")
    return data.getvalue()
