"""Frechet ChemNet distance, by the network and weights of the package ``fcd_torch`` (an extra, offline)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from gengrad.data.draws import generator_for
from gengrad.evaluation.features import Features
from gengrad.evaluation.fid import Statistics, frechet_distance

LEAST = 5000  # molecules: 6.6 between two samples of one distribution at 400, 1.4 at 2,000
BATCH = 256


def frechet_chemnet(smiles: Sequence[str], reference: Sequence[str], seed: int = 0, any_size: bool = False) -> dict:
    """{"fcd", "floor", sizes}: |m - m'|^2 + tr(S + S' - 2 (S S')^{1/2}) of ChemNet's features (Preuer et al. 2018).

    ``floor``: the same of ``floor_n`` molecules of the reference, as many as there are ``smiles`` or else half of it,
    against its others: what a perfect sample would get. Takes canonical SMILES. Raises ``ValueError`` without
    ``fcd_torch`` and, unless ``any_size``, for fewer than 5,000 molecules on either side.
    """
    check_sizes(len(smiles), len(reference), any_size)
    a, b = features(smiles), features(reference)
    order = torch.randperm(len(b), generator=generator_for(seed, "floor of the FCD"))
    n = min(len(a), len(b) // 2)
    return {
        "fcd": _distance(a, b),
        "floor": _distance(b[order[:n]], b[order[n:]]),
        "n": len(a),
        "reference_n": len(b),
        "floor_n": n,
        "biased": min(len(a), len(b)) < LEAST,
    }


def check_sizes(n: int, reference_n: int, any_size: bool) -> None:
    """Refuses what would mostly be bias."""
    if min(n, reference_n) < LEAST and not any_size:
        raise ValueError(
            f"the FCD of {n:,} against {reference_n:,} molecules would mostly be the bias of small samples: it needs "
            f"{LEAST:,} on either side. --fcd-at-any-size computes it, with its floor beside it"
        )
    if min(n, reference_n) < 4:
        raise ValueError(f"the FCD needs at least 4 molecules on either side; got {n} and {reference_n}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return frechet_distance(Statistics.of([Features(a, None)]), Statistics.of([Features(b, None)]))


@torch.inference_mode()
def features(smiles: Sequence[str]) -> torch.Tensor:
    """ChemNet's features (n, 512) of canonical SMILES."""
    try:
        from fcd_torch import utils
    except ImportError as error:
        raise ValueError(f"the FCD needs the package fcd_torch ({error}): pip install fcd_torch") from None
    weights = torch.load(Path(utils.__file__).with_name("ChemNet_v0.13_pretrained.pt"), weights_only=True)
    network = utils.load_imported_model(weights).eval()
    data = utils.SmilesDataset(list(smiles), canonize=False)
    batches = [range(start, min(start + BATCH, len(data))) for start in range(0, len(data), BATCH)]
    stacks = (torch.stack([torch.from_numpy(data[i]) for i in batch]) for batch in batches)
    return torch.cat([network(x.transpose(1, 2).float()) for x in stacks])
