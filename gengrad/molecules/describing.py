"""What is looked at in one molecule; runs in worker processes, which can be killed and have no PyTorch."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

from rdkit import Chem, DataStructs, rdBase
from rdkit.Chem import BRICS

import gengrad.molecules.scorers  # noqa: F401 - registers the scorers
from gengrad.molecules.properties import Scorer, scaffold
from gengrad.molecules.references import morgan


def look(smiles: str, scorers: Sequence[Scorer]) -> dict:
    """{"smiles": canonical, "scaffold", "fragments": BRICS, "bits": Morgan (2, 2048) in base64, "values"}.

    Raises ``ValueError`` for what cannot be read or has no heavy atom; a property that cannot be computed is None.
    """
    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(smiles)
        if mol is None or not mol.GetNumHeavyAtoms():
            raise ValueError("not a SMILES with a heavy atom")
        values = [_value(scorer, mol) for scorer in scorers]
        return {
            "smiles": Chem.MolToSmiles(mol),
            "scaffold": scaffold(mol),
            "fragments": fragments(mol),
            "bits": base64.b64encode(DataStructs.BitVectToBinaryText(morgan().GetFingerprint(mol))).decode(),
            "values": values,
        }


def _value(scorer: Scorer, mol: Chem.Mol) -> float | None:
    try:
        value = float(scorer.score(mol))
    except Exception:
        return None
    return value if math.isfinite(value) else None


def fragments(mol: Chem.Mol) -> list[str]:
    """The pieces that BRICS cuts a molecule into, each place of a cut marked (Degen et al. 2008; MOSES' fragments)."""
    cut = BRICS.BreakBRICSBonds(mol)
    return [Chem.MolToSmiles(piece) for piece in Chem.GetMolFrags(cut, asMols=True)]
