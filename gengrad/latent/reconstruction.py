"""How well an autoencoder gives molecules back."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gengrad.latent.codec import Codec
from gengrad.molecules.metrics import describe, tanimoto


def reconstruction(codec: Codec, rows: Sequence[Sequence[int]], smiles: Sequence[str]) -> dict:
    """What becomes of molecules: {"n", "exact", "tanimoto", "validity", spectrum's figures}.

    ``exact``: the share whose decoded canonical SMILES is the one that went in. ``tanimoto``: mean similarity (Morgan
    2, 2048 bits) of what comes out to what went in, 0 for no molecule. ``effective``: (sum l)^2 / sum l^2 of the
    eigenvalues l of the codes' covariance, a count of the directions in use.
    """
    found = codec.decode(codec.encode(rows))
    valid = [i for i, text in enumerate(found) if text]
    before, after = (describe([texts[i] for i in valid], ()).fingerprints for texts in (smiles, found))
    alike = sum(float(tanimoto(a[None], b[None])) for a, b in zip(before, after))
    spectrum = codec.whitening.spectrum.double()
    return {
        "n": len(smiles),
        "exact": sum(a == b for a, b in zip(smiles, found)) / len(smiles),
        "tanimoto": alike / len(smiles),
        "validity": len(valid) / len(smiles),
        "spectrum_least": float(spectrum[0]),
        "spectrum_largest": float(spectrum[-1]),
        "effective": float(spectrum.sum() ** 2 / spectrum.square().sum().clamp_min(torch.finfo(torch.double).tiny)),
        "collapsed": codec.whitening.collapsed,
    }
