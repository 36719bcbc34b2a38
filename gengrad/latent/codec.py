"""The codec: molecules as whitened points and back, by a trained autoencoder; two files on the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gengrad.flows.stored import read_stored, write_stored
from gengrad.molecules.autoencoder import CHUNK, Autoencoder
from gengrad.molecules.tokens import Alphabet, selfies_of
from gengrad.molecules.workers import Workers

KIND = "autoencoder"
LEAST = 1e-4  # directions of less variance than this share of the mean one count as collapsed


@dataclass(frozen=True)
class Whitening:
    """x = W (z - m) with W Cov(z) W' = I, and back; ``spectrum`` (d,) are the eigenvalues of Cov(z), ascending.

    A collapsed direction (variance below 1e-4 of the mean one) is stretched as if it had that much, not to one: there
    is no molecule in it that noise would not drown.
    """

    mean: Tensor
    forward: Tensor
    backward: Tensor
    spectrum: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Whitening:
        """Of codes z (n, d); symmetric (ZCA), so that x is as near to z as whitened points can be."""
        mean = z.double().mean(0)
        centred = z.double() - mean
        values, vectors = torch.linalg.eigh(centred.mT @ centred / len(z))
        kept = values.clamp_min(max(LEAST * float(values.mean()), 1e-30))
        forward, backward = ((vectors * kept.pow(power)) @ vectors.mT for power in (-0.5, 0.5))
        return cls(mean.float(), forward.float(), backward.float(), values.float())

    @property
    def collapsed(self) -> int:
        return int((self.spectrum < LEAST * self.spectrum.mean()).sum())

    def __call__(self, z: Tensor) -> Tensor:
        return (z - self.mean.to(z)) @ self.forward.to(z)

    def undo(self, x: Tensor) -> Tensor:
        return x @ self.backward.to(x) + self.mean.to(x)


class Codec:
    """SMILES -> whitened points (n, latent) and back. ``info``: what the autoencoder was trained on, and how well."""

    def __init__(self, network: Autoencoder, alphabet: Alphabet, whitening: Whitening, info: dict | None = None):
        self.network, self.alphabet, self.whitening = network.eval(), alphabet, whitening
        self.info = dict(info or {})
        self._known: dict[str, list[int]] = {}

    @property
    def latent(self) -> int:
        return self.network.config.latent

    def rows(self, smiles: Sequence[str], processes: int = 1) -> list[list[int] | ValueError]:
        """Each molecule in numbers, or why this autoencoder cannot take it; ``processes`` as in ``symbols_of``."""
        unknown = [text for text in dict.fromkeys(smiles) if text not in self._known]
        found = dict(zip(unknown, symbols_of(unknown, processes))) if unknown else {}
        return [self._known[text] if text in self._known else self._numbers(found[text]) for text in smiles]

    def remember(self, smiles: Sequence[str], rows: Sequence[list[int]]) -> None:
        """What ``rows`` would say of these molecules, so that it need not be found again."""
        self._known |= dict(zip(smiles, rows))

    def _numbers(self, symbols: list[str] | ValueError) -> list[int] | ValueError:
        if isinstance(symbols, ValueError):
            return symbols
        try:
            return self.alphabet.numbers(symbols)
        except ValueError as error:
            return ValueError(str(error))

    def encode(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Whitened points (n, latent) of molecules in numbers."""
        with torch.inference_mode():
            parts = [
                self.whitening(self.network.encode(self.alphabet.rows(rows[k : k + CHUNK])))
                for k in range(0, len(rows), CHUNK)
            ]
        return torch.cat(parts).clone() if parts else torch.empty(0, self.latent)

    def decode(self, x: Tensor) -> list[str]:
        """Canonical SMILES of whitened points (n, latent), empty where none comes out; greedy, so always the same."""
        return self.alphabet.smiles(self.network.decode(self.whitening.undo(x.float())))

    # ---------------------------------------------------------------- the two files

    def save(self, folder: str | Path) -> None:
        """Writes ``autoencoder.safetensors`` and ``autoencoder.json``; a kill leaves the old ones or the new."""
        description = {
            "network": self.network.config.model_dump(mode="json"),
            "symbols": list(self.alphabet.symbols),
            "length": self.alphabet.length,
            "info": self.info,
        }
        w = self.whitening
        more = {"mean": w.mean, "forward": w.forward, "backward": w.backward, "spectrum": w.spectrum}
        tensors = {f"network.{name}": t for name, t in self.network.state_dict().items()}
        write_stored(Path(folder), description, tensors | {f"whitening.{k}": t for k, t in more.items()}, KIND)

    @classmethod
    def load(cls, folder: str | Path) -> Codec:
        """The codec in ``folder``; raises ``FileNotFoundError``, or ``ValueError`` for one truncated or altered."""
        description, tensors = read_stored(Path(folder), KIND)
        try:
            alphabet = Alphabet(description["symbols"], description["length"])
            network = build_network(Autoencoder.Config(**description["network"]), alphabet)
            of = {name: {k.partition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{name}.")}
                  for name in ("network", "whitening")}  # fmt: skip
            network.load_state_dict(of["network"], strict=True)
            return cls(network, alphabet, Whitening(**of["whitening"]), description["info"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not hold an autoencoder that this version can build: {error}") from None

    def report(self) -> dict:
        """How well it gives molecules back, the spectrum of its codes and what it was trained on: plain data."""
        rest = {key: value for key, value in self.info.items() if key != "reconstruction"}
        return {**self.info.get("reconstruction", {}), "spectrum": self.whitening.spectrum.tolist(), **rest}

    def digest(self) -> str:
        """What tells this codec from any other: the first digits of the hash of its weights."""
        from hashlib import sha256

        digest = sha256("\n".join(self.alphabet.symbols).encode())
        for tensor in [*self.network.state_dict().values(), self.whitening.forward, self.whitening.mean]:
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def build_network(config: Autoencoder.Config, alphabet: Alphabet) -> Autoencoder:
    """The network for an alphabet: a place for each symbol of its longest molecule and one for the end."""
    return Autoencoder(config, symbols=len(alphabet), places=alphabet.length + 1)


def symbols_of(smiles: Sequence[str], processes: int = 1) -> list[list[str] | ValueError]:
    """The SELFIES symbols of each molecule, or the reason why it has none.

    In processes that may be killed; 0 of them: here, for molecules that the decoder has made.
    """
    if not processes:
        return [_symbols_or_reason(text) for text in smiles]
    answers = Workers("selfies", {}, processes).map(smiles)
    return [ValueError(a.problem) if a.problem is not None else a.value for a in answers]


def _symbols_or_reason(smiles: str) -> list[str] | ValueError:
    try:
        return selfies_of(smiles)
    except ValueError as error:
        return error
