"""A small codec, untrained: what holds for any weights needs no training."""

import pytest
import torch

from gengrad.latent.codec import Codec, Whitening, build_network
from gengrad.molecules.autoencoder import Autoencoder
from gengrad.molecules.library import library
from gengrad.molecules.tokens import Alphabet, selfies_of

SMALL = {"latent": 6, "embedding": 8, "channels": 8, "width": 16, "readout": 8}


@pytest.fixture(scope="session")
def molecules():
    return library(60)


@pytest.fixture(scope="session")
def codec(molecules):
    symbols = [selfies_of(smiles) for smiles in molecules]
    alphabet = Alphabet.of(symbols)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build_network(Autoencoder.Config(**SMALL), alphabet)
    rows = [alphabet.numbers(s) for s in symbols]
    with torch.no_grad():
        whitening = Whitening.of(network.encode(alphabet.rows(rows)))
    return Codec(network, alphabet, whitening, {"note": "untrained"})
