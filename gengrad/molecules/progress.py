"""How a search goes: the best found after each scorer call, and where the proposals went."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rdkit import Chem

from gengrad.molecules.ledger import Ledger, best
from gengrad.molecules.metrics import InternalDiversity
from gengrad.molecules.references import morgan

TOPS = (1, 10, 100)


class Top:
    """T_k(c), the mean of the k highest totals among the first c molecules; of fewer while there are few.

    At most ``per_scaffold`` of one scaffold count. NaN counts as 0. ``curve`` has T_k(1), T_k(2), ...
    """

    def __init__(self, k: int, per_scaffold: int | None = None):
        self.k, self.per_scaffold = k, per_scaffold
        self.curve: list[float] = []
        self._kept: list[tuple[float, str]] = []

    def add(self, totals: Sequence[float], scaffolds: Sequence[str]) -> Top:
        for total, scaffold in zip(totals, scaffolds):
            kept = self._kept
            kept.append((total if total == total else 0.0, scaffold))
            if self.per_scaffold is not None and sum(ring == scaffold for _, ring in kept) > self.per_scaffold:
                kept.remove(min(entry for entry in kept if entry[1] == scaffold))
            self._kept = sorted(kept, reverse=True)[: self.k]  # what falls out never comes back: k better ones are in
            self.curve.append(sum(value for value, _ in self._kept) / len(self._kept))
        return self


def area_under(curve: Sequence[float], calls: int | None = None) -> float:
    """(1 / N) sum_c T(c) over N = ``calls`` scorer calls, the last value held where a search ended before (0 of none).

    The AUC of Gao et al. (2022), who take it from every hundredth call by the trapezoidal rule.
    """
    calls = len(curve) if calls is None else calls
    if not len(curve) or not calls:
        return 0.0
    curve = curve[:calls]
    return (sum(curve) + (calls - len(curve)) * curve[-1]) / calls


def tanimoto_of(a: str, b: str) -> float:
    """Tanimoto similarity of Morgan fingerprints (radius 2, 2048 bits) of two readable SMILES."""
    from rdkit.DataStructs import TanimotoSimilarity

    return TanimotoSimilarity(*(morgan().GetFingerprint(Chem.MolFromSmiles(text)) for text in (a, b)))


def diversity(smiles: Sequence[str]) -> float:
    """Internal diversity (``internal_diversity``) of readable SMILES, NaN of none."""
    if not smiles:
        return float("nan")
    bits = [torch.from_numpy(morgan().GetFingerprintAsNumPy(Chem.MolFromSmiles(text))) for text in smiles]
    return InternalDiversity().of(torch.stack(bits)).item()


class Progress:
    """The rows of steps.csv: one for each step of a search, written from its ledger."""

    def __init__(self, ledger: Ledger):
        self.ledger, self.rows = ledger, []
        self.tops = {k: Top(k, ledger.objective.settings.per_scaffold) for k in TOPS}
        self.spent = {"proposed": 0, "valid": 0, "new": 0}

    def spend(self, **counts: int) -> None:
        """Adds to what was proposed, valid and new."""
        for name, count in counts.items():
            self.spent[name] = self.spent.get(name, 0) + count

    def note(self, step: int, **more: float) -> None:
        """One row more, of the ledger as it stands."""
        members, limit = self.ledger.members, self.ledger.objective.settings.per_scaffold
        fresh = members[len(self.tops[1].curve) :]
        for top in self.tops.values():
            top.add([m.total for m in fresh], [m.scaffold for m in fresh])
        known = [m.total for m in members if m.total == m.total]
        self.rows.append(
            {
                "step": step,
                "calls": len(members),
                **self.spent,
                "passed": sum(m.passed for m in members),
                "mean_total": sum(known) / len(known) if known else float("nan"),
                **{f"top_{k}": top.curve[-1] if top.curve else float("nan") for k, top in self.tops.items()},
                "auc_top_10": area_under(self.tops[10].curve),
                "diversity_top_100": diversity([m.smiles for m in best(members, 100, limit)]),
                **more,
            }
        )


def yields(ledger: Ledger, spent: dict[str, int]) -> dict:
    """Where the proposals went: proposed, valid, new, scored, refused by each filter, passed, within the limit."""
    members, limit = ledger.members, ledger.objective.settings.per_scaffold
    passed = [m for m in members if m.passed]
    refused = {str(f): sum(f"filter: {f}" in m.notes for m in members) for f in ledger.objective.filters}
    found = {**spent, "scored": len(members), "refused": refused, "passed": len(passed)}
    return {**found, "passed_within_per_scaffold": len(best(passed, None, limit))} if limit else found
