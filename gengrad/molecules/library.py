"""An enumerated library that needs no download: end groups, linkers and a ring core joined by ``Chem.molzip``."""

from __future__ import annotations

import random

from rdkit import Chem, rdBase

# Two places of attachment each, [*:1] and [*:2]; they are renumbered when a molecule is put together.
CORES = (
    "c1cc([*:2])ccc1[*:1]",
    "c1cc([*:2])cc([*:1])c1",
    "c1nc([*:2])ccc1[*:1]",
    "c1nc([*:2])ncc1[*:1]",
    "c1cc([*:2])nnc1[*:1]",
    "c1nc([*:2])cnc1[*:1]",
    "c1sc([*:2])cc1[*:1]",
    "c1sc([*:2])nc1[*:1]",
    "c1oc([*:2])cc1[*:1]",
    "c1oc([*:2])nc1[*:1]",
    "c1nn([*:2])cc1[*:1]",
    "c1cn([*:2])nc1[*:1]",
    "n1oc([*:2])cc1[*:1]",
    "n1oc([*:2])nc1[*:1]",
    "n1nc([*:2])sc1[*:1]",
    "c1ccc2c(c1)n([*:2])cc2[*:1]",
    "c1cc2c(cc1[*:1])nc([*:2])[nH]2",
    "c1cc2c(cc1[*:1])oc([*:2])n2",
    "c1cc2ncc([*:2])cc2cc1[*:1]",
    "c1nc([*:2])c2ccccc2c1[*:1]",
    "c1nc2ccc([*:1])cn2c1[*:2]",
    "C1CC([*:2])CCN1[*:1]",
    "C1CN([*:2])CCN1[*:1]",
    "C1C([*:2])CCN1[*:1]",
    "C1C([*:2])CN1[*:1]",
    "C1CC([*:2])CCC1[*:1]",
    "O1CCN([*:2])CC1[*:1]",
    "C1CC2(CCN1[*:1])CCN([*:2])CC2",
    "c1cc([*:2])c(F)cc1[*:1]",
    "c1cc([*:2])c(OC)cc1[*:1]",
    "c1cc([*:2])c(C)cc1[*:1]",
    "c1c([*:2])c(C)nn1[*:1]",
)
LINKERS = (  # the first: none
    "",
    "[*:1]C[*:2]",
    "[*:1]CC[*:2]",
    "[*:1]C(=O)N[*:2]",
    "[*:1]NC(=O)[*:2]",
    "[*:1]OC[*:2]",
    "[*:1]C(=O)[*:2]",
    "[*:1]CNC(=O)[*:2]",
    "[*:1]C(=O)NC[*:2]",
    "[*:1]S(=O)(=O)[*:2]",
    "[*:1]NC(=O)C[*:2]",
    "[*:1]C(C)[*:2]",
    "[*:1]CN(C)[*:2]",
    "[*:1]CC(=O)N[*:2]",
    "[*:1]COC[*:2]",
    "[*:1]CC(O)C[*:2]",
)
ENDS = (
    "C[*:1]",
    "CC[*:1]",
    "CC(C)[*:1]",
    "C1CC1[*:1]",
    "C1CCC1[*:1]",
    "C1CCCC1[*:1]",
    "C1CCCCC1[*:1]",
    "CC(C)(C)[*:1]",
    "c1ccccc1[*:1]",
    "Fc1ccc([*:1])cc1",
    "Clc1ccc([*:1])cc1",
    "COc1ccc([*:1])cc1",
    "Cc1ccc([*:1])cc1",
    "Fc1cccc([*:1])c1",
    "Fc1ccccc1[*:1]",
    "N#Cc1ccc([*:1])cc1",
    "FC(F)(F)c1ccc([*:1])cc1",
    "c1ccncc1[*:1]",
    "c1ccnc([*:1])c1",
    "c1cncc([*:1])n1",
    "c1cnc([*:1])nc1",
    "c1ccsc1[*:1]",
    "c1ccoc1[*:1]",
    "Cc1cc([*:1])on1",
    "Cn1ccc([*:1])n1",
    "Cc1nc([*:1])cs1",
    "C1COCCN1[*:1]",
    "C1CCCN1[*:1]",
    "C1CCCCN1[*:1]",
    "CN1CCN([*:1])CC1",
    "C1CCOCC1[*:1]",
    "C1COC1[*:1]",
    "CN(C)[*:1]",
    "COCC[*:1]",
    "N#CC[*:1]",
    "FC(F)C[*:1]",
    "CS(=O)(=O)C[*:1]",
    "CC(=O)N[*:1]",
    "NC(=O)C[*:1]",
    "OCC[*:1]",
)
ATOMS = range(12, 32)  # heavy atoms of a molecule that is kept
SIZE = len(CORES) * (len(ENDS) * len(LINKERS)) ** 2
HETERO = Chem.MolFromSmarts("[N,O,S;!$([N,O,S]=*);!$([#16](=O)(=O));!a]-[N,O,F,Cl;!a]")  # N-N, N-O, O-O bonds: unlikely


def library(n: int = 20_000, seed: int = 0) -> list[str]:
    """``n`` different canonical SMILES, a function of ``seed``; a longer library begins with the shorter one.

    Raises ``ValueError`` beyond a million: the fragments would still do, their variety would not.
    """
    if not 1 <= n <= 1_000_000:
        raise ValueError(f"n={n}: the enumerated library has 1 to 1,000,000 molecules")
    numbers, found = random.Random(seed), {}
    while len(found) < n:
        smiles = molecule(numbers.randrange(SIZE))
        if smiles is not None:
            found[smiles] = None
    return list(found)


def molecule(number: int) -> str | None:
    """Molecule ``number`` of the product end - linker - core - linker - end; None for one that is not wanted."""
    places = []
    for base in (len(CORES), len(LINKERS), len(LINKERS), len(ENDS), len(ENDS)):
        number, place = divmod(number, base)
        places.append(place)
    core, left, right, first, last = places
    parts = [_numbered(CORES[core], 1, 2)]
    for side, linker, end in ((1, LINKERS[left], ENDS[first]), (2, LINKERS[right], ENDS[last])):
        # without a linker the end group sits on the core
        parts += [_numbered(linker, side, side + 2), _numbered(end, side + 2)] if linker else [_numbered(end, side)]
    with rdBase.BlockLogs():
        mol = Chem.molzip(Chem.MolFromSmiles(".".join(parts)))
        if mol.GetNumHeavyAtoms() not in ATOMS or mol.HasSubstructMatch(HETERO):
            return None
        Chem.SanitizeMol(mol)
        return Chem.MolToSmiles(mol)


def _numbered(fragment: str, *labels: int) -> str:
    """The fragment with its places of attachment numbered for this molecule."""
    for old, new in reversed(list(enumerate(labels, 1))):
        fragment = fragment.replace(f"[*:{old}]", f"[*:{new}]")
    return fragment
