"""Molecules as rows of tokens: the symbols of SELFIES, of which every sequence is a molecule (Krenn et al. 2020)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # nothing heavy before it is needed: worker processes need no PyTorch, configs no RDKit
    from torch import Tensor

END = 0  # ends a row and fills it up


def selfies_of(smiles: str) -> list[str]:
    """The SELFIES symbols of a canonical SMILES; raises ``ValueError`` where they do not give it back."""
    import selfies

    try:
        symbols = [*selfies.split_selfies(selfies.encoder(smiles))]
    except selfies.EncoderError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(f"SELFIES cannot write it ({reason[:120]})") from None
    if not symbols or smiles_of(symbols) != smiles:
        raise ValueError("SELFIES does not give it back")
    return symbols


def smiles_of(symbols: Sequence[str]) -> str:
    """The canonical SMILES of SELFIES symbols; empty where they make no heavy atom (``[Branch1]`` alone, say)."""
    import selfies
    from rdkit import Chem, rdBase

    with rdBase.BlockLogs():
        mol = Chem.MolFromSmiles(selfies.decoder("".join(symbols)))
        return Chem.MolToSmiles(mol) if mol is not None and mol.GetNumHeavyAtoms() else ""


class Alphabet:
    """The symbols that a set of molecules needs, and rows of their numbers: 0 is the end, symbols count from 1.

    ``length``: symbols of the longest molecule, so that a row has at most ``length + 1`` places.
    """

    def __init__(self, symbols: Sequence[str], length: int):
        if len(set(symbols)) != len(symbols) or not symbols or length < 1:
            raise ValueError("an alphabet has at least one symbol, each once, and a length of at least 1")
        self.symbols, self.length = tuple(symbols), length
        self._numbers = {symbol: number for number, symbol in enumerate(self.symbols, 1)}

    @classmethod
    def of(cls, molecules: Iterable[Sequence[str]]) -> Alphabet:
        """The alphabet of molecules in symbols, sorted, so that their order does not matter."""
        found, length = set(), 0
        for symbols in molecules:
            found.update(symbols)
            length = max(length, len(symbols))
        return cls(sorted(found), length)

    def __len__(self) -> int:
        return len(self.symbols) + 1

    def numbers(self, symbols: Sequence[str]) -> list[int]:
        """One molecule's numbers without the end; raises ``ValueError`` for what this alphabet cannot write."""
        foreign = sorted({symbol for symbol in symbols if symbol not in self._numbers})
        if foreign:
            raise ValueError(f"symbols that the autoencoder has not seen ({', '.join(foreign[:3])})")
        if len(symbols) > self.length:
            raise ValueError(f"longer than the autoencoder's {self.length} symbols ({len(symbols)})")
        return [self._numbers[symbol] for symbol in symbols]

    def rows(self, molecules: Sequence[Sequence[int]]) -> Tensor:
        """Molecules in numbers as int16 rows (n, T), T one more than the longest, filled up with the end."""
        import torch

        rows = torch.zeros(len(molecules), max(map(len, molecules), default=0) + 1, dtype=torch.int16)
        for row, numbers in zip(rows, molecules):
            row[: len(numbers)] = torch.tensor(numbers, dtype=torch.int16)
        return rows

    def symbols_in(self, row: Sequence[int]) -> list[str]:
        """The symbols of a row up to its end."""
        row = list(row)
        return [self.symbols[number - 1] for number in (row[: row.index(END)] if END in row else row)]

    def smiles(self, rows: Tensor) -> list[str]:
        """The canonical SMILES of rows (n, T), empty for a row that makes no molecule."""
        return [smiles_of(self.symbols_in(row)) for row in rows.tolist()]
