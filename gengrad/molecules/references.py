"""Scorers that compare with something given: reference molecules, a pattern, catalogues of alerts."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Literal

from pydantic import AfterValidator, Field
from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import rdFingerprintGenerator
from rdkit.Chem.FilterCatalog import FilterCatalog, FilterCatalogParams

from gengrad.molecules.properties import Scorer
from gengrad.registry import SCORERS, Settings


def _readable_smiles(text: str) -> str:
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(text)
    if mol is None or not mol.GetNumHeavyAtoms():
        raise ValueError("not a SMILES with a heavy atom")
    return text


def _readable_smarts(text: str) -> str:
    with rdBase.BlockLogs():
        pattern = Chem.MolFromSmarts(text)
    if pattern is None or not pattern.GetNumAtoms():
        raise ValueError("not a SMARTS pattern")
    return text


Smiles = Annotated[str, AfterValidator(_readable_smiles)]
Smarts = Annotated[str, AfterValidator(_readable_smarts)]


@lru_cache(8)
def morgan(radius: int = 2, bits: int = 2048):
    """RDKit's generator of Morgan fingerprints."""
    return rdFingerprintGenerator.GetMorganGenerator(radius=radius, fpSize=bits)


@SCORERS.register("similarity")
class Similarity(Scorer):
    """Tanimoto similarity of Morgan fingerprints to the nearest of ``to``: |A and B| / |A or B|, in [0, 1]."""

    unit_interval = True

    class Config(Settings):
        to: list[Smiles] = Field(min_length=1)
        radius: int = Field(2, ge=0)
        bits: int = Field(2048, ge=64)

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        self._morgan = morgan(self.config.radius, self.config.bits)
        self._to = [self._morgan.GetFingerprint(Chem.MolFromSmiles(smiles)) for smiles in self.config.to]

    def score(self, mol):
        return max(DataStructs.BulkTanimotoSimilarity(self._morgan.GetFingerprint(mol), self._to))


@SCORERS.register("substructure")
class Substructure(Scorer):
    """1 when the molecule has the pattern ``smarts``, else 0; with ``count``, the number of distinct matches."""

    unit_interval = True

    class Config(Settings):
        smarts: Smarts
        count: bool = False

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        self.unit_interval = not self.config.count
        self._pattern = Chem.MolFromSmarts(self.config.smarts)

    def score(self, mol):
        if self.config.count:
            return len(mol.GetSubstructMatches(self._pattern))
        return mol.HasSubstructMatch(self._pattern)


@SCORERS.register("alerts")
class Alerts(Scorer):
    """The number of structural alerts in the given catalogues of RDKit (Baell and Holloway 2010; Brenk et al. 2008)."""

    class Config(Settings):
        catalogs: list[Literal["PAINS", "PAINS_A", "PAINS_B", "PAINS_C", "BRENK", "NIH", "ZINC"]] = Field(
            ["PAINS", "BRENK"], min_length=1
        )

    def __init__(self, config=None, **settings):
        super().__init__(config, **settings)
        chosen = FilterCatalogParams()
        for catalog in self.config.catalogs:
            chosen.AddCatalog(getattr(FilterCatalogParams.FilterCatalogs, catalog))
        self._catalog = FilterCatalog(chosen)

    def score(self, mol):
        return len(self._catalog.GetMatches(mol))

    def names(self, mol: Chem.Mol) -> list[str]:
        """What the alerts are called, for a report."""
        return [match.GetDescription() for match in self._catalog.GetMatches(mol)]
