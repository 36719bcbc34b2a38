"""What a scorer is, and the properties that RDKit computes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

from rdkit import Chem, rdBase
from rdkit.Chem import QED, Crippen, Descriptors, rdMolDescriptors
from rdkit.Chem.Scaffolds import MurckoScaffold

from gengrad.registry import SCORERS, Configured

# mean and standard deviation over ZINC250k of logP, -SA and the ring penalty (Kusner et al. 2017, with Jin et al. 2018)
ZINC = (
    (2.4570953396190123, 1.434324401111988),
    (-3.0525811293166134, 0.8335207024513095),
    (-0.0485696876403053, 0.2860212110245455),
)


class Scorer(Configured):
    """SMILES in, one float or NaN out per molecule; a pure function of the string.

    A subclass writes ``score(mol)``, which may raise: that molecule then has no value. ``unit_interval`` says that
    the values lie in [0, 1], so that an objective may use them without a transform; ``outside`` that the scorer runs
    in processes of its own and takes SMILES.
    """

    unit_interval: ClassVar[bool] = False
    outside: ClassVar[bool] = False

    def score(self, mol: Chem.Mol) -> float:
        raise NotImplementedError

    def __call__(self, smiles: Sequence[str]) -> list[float]:
        """One float per SMILES, NaN for one that cannot be read or scored; in this process, without time limits."""
        return [score_or_nan(self, text) for text in smiles]


def score_or_nan(scorer: Scorer, smiles: str) -> float:
    try:
        return score_all([scorer], smiles)["values"][0]
    except ValueError:
        return math.nan


def score_all(scorers: Sequence[Scorer], smiles: str) -> dict:
    """{"values": one float or NaN per scorer, "problems": {position: text}, "scaffold": SMILES}, parsing once.

    Raises ``ValueError`` when the SMILES cannot be read or has no heavy atom.
    """
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        if mol is None or not mol.GetNumHeavyAtoms():
            raise ValueError("not a SMILES with a heavy atom")
        values, problems = [], {}
        for place, scorer in enumerate(scorers):
            try:
                values.append(float(scorer.score(mol)))
                if not math.isfinite(values[-1]):
                    values[-1], problems[place] = math.nan, f"gave {values[-1]}"
            except Exception as error:
                values.append(math.nan)
                problems[place] = f"{type(error).__name__}: {error}"[:200]
        return {"values": values, "problems": problems, "scaffold": scaffold(mol)}


def scaffold(mol: Chem.Mol) -> str:
    """The Bemis-Murcko scaffold as SMILES, empty for a molecule without rings."""
    return Chem.MolToSmiles(MurckoScaffold.GetScaffoldForMol(mol))


@lru_cache(1)
def _sascorer():
    """RDKit's Contrib module; its absence is an error, never a zero."""
    try:
        from rdkit.Contrib.SA_Score import sascorer
    except ImportError as error:
        raise ValueError(
            f"scorer 'sa' needs rdkit.Contrib.SA_Score, which this RDKit lacks ({error}). "
            "RDKit's wheels on PyPI have it: pip install rdkit"
        ) from None
    return sascorer


@lru_cache(1)
def _npscorer():
    try:
        from rdkit.Contrib.NP_Score import npscorer
    except ImportError as error:
        raise ValueError(
            f"scorer 'np' needs rdkit.Contrib.NP_Score, which this RDKit lacks ({error}). "
            "RDKit's wheels on PyPI have it: pip install rdkit"
        ) from None
    return npscorer, npscorer.readNPModel()


@SCORERS.register("qed")
class DrugLikeness(Scorer):
    """QED in [0, 1], RDKit's average weights (Bickerton et al. 2012)."""

    unit_interval = True

    def score(self, mol):
        return QED.qed(mol)


@SCORERS.register("logp")
class LogP(Scorer):
    """Crippen's logP (Wildman and Crippen 1999)."""

    def score(self, mol):
        return Crippen.MolLogP(mol)


@SCORERS.register("sa")
class SyntheticAccessibility(Scorer):
    """SA score, 1 easy to 10 difficult (Ertl and Schuffenhauer 2009)."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        _sascorer()

    def score(self, mol):
        return _sascorer().calculateScore(mol)


@SCORERS.register("np")
class NaturalProductLikeness(Scorer):
    """NP-likeness, about -5 to 5 (Ertl et al. 2008)."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        _npscorer()

    def score(self, mol):
        module, model = _npscorer()
        return module.scoreMol(mol, model)


def penalised_parts(mol: Chem.Mol) -> tuple[float, float, float]:
    """logP, -SA, -(atoms beyond 6 in the largest ring of the SSSR)."""
    largest = max((len(ring) for ring in mol.GetRingInfo().AtomRings()), default=0)
    return Crippen.MolLogP(mol), -_sascorer().calculateScore(mol), -float(max(0, largest - 6))


@SCORERS.register("plogp")
class PenalisedLogP(SyntheticAccessibility):
    """logP - SA - ring penalty, as it is. Without bound: long chains win. The published scale: ``plogp_zinc``."""

    def score(self, mol):
        return sum(penalised_parts(mol))


@SCORERS.register("plogp_zinc")
class PenalisedLogPOfZINC(SyntheticAccessibility):
    """The three parts of ``plogp``, each minus its mean and over its standard deviation on ZINC250k, summed."""

    def score(self, mol):
        return sum((part - mean) / deviation for part, (mean, deviation) in zip(penalised_parts(mol), ZINC))


@SCORERS.register("weight")
class Weight(Scorer):
    """Average molecular weight in daltons."""

    def score(self, mol):
        return Descriptors.MolWt(mol)


@SCORERS.register("tpsa")
class PolarSurface(Scorer):
    """Topological polar surface area in square angstroms, N and O (Ertl et al. 2000)."""

    def score(self, mol):
        return rdMolDescriptors.CalcTPSA(mol)


@SCORERS.register("hba")
class Acceptors(Scorer):
    """Hydrogen-bond acceptors, RDKit's definition."""

    def score(self, mol):
        return rdMolDescriptors.CalcNumHBA(mol)


@SCORERS.register("hbd")
class Donors(Scorer):
    """Hydrogen-bond donors, RDKit's definition."""

    def score(self, mol):
        return rdMolDescriptors.CalcNumHBD(mol)


@SCORERS.register("rotatable_bonds")
class RotatableBonds(Scorer):
    """Rotatable bonds, RDKit's default definition."""

    def score(self, mol):
        return rdMolDescriptors.CalcNumRotatableBonds(mol)


@SCORERS.register("rings")
class Rings(Scorer):
    """Rings of the SSSR."""

    def score(self, mol):
        return rdMolDescriptors.CalcNumRings(mol)


@SCORERS.register("fsp3")
class FractionSp3(Scorer):
    """The share of carbons that are sp3, in [0, 1]."""

    unit_interval = True

    def score(self, mol):
        return rdMolDescriptors.CalcFractionCSP3(mol)


@SCORERS.register("heavy_atoms")
class HeavyAtoms(Scorer):
    """Heavy atoms."""

    def score(self, mol):
        return mol.GetNumHeavyAtoms()
