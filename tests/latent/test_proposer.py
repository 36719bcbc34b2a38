"""Molecules proposed in the latent space: near codes, uphill where a surrogate says so, nothing for unknown parents."""

import pytest
import torch

from gengrad.latent.proposer import Latent
from gengrad.latent.surrogate import fit_surrogate
from gengrad.molecules.objective import read_objective


@pytest.fixture
def run(codec, molecules, tmp_path):
    codec.save(tmp_path / "autoencoder")
    return tmp_path


def proposals(proposer, parents, n=30, seed=0):
    return proposer.propose(parents, n, torch.Generator().manual_seed(seed))


def test_proposals_are_decoded_steps_from_their_parents_and_a_function_of_the_generator(run, codec, molecules):
    proposer = Latent(run=str(run), nearest=0.0, farthest=1e-6)
    found = proposals(proposer, molecules[:4])
    exact = codec.decode(codec.encode(codec.rows(molecules[:4])))
    assert len(found) == 30 and [p.smiles for p in found] == [exact[p.parent] or None for p in found]
    far = Latent(run=str(run), nearest=3.0, farthest=8.0)
    assert proposals(far, molecules[:4]) == proposals(far, molecules[:4]) != proposals(far, molecules[:4], seed=1)
    assert {p.smiles for p in proposals(far, molecules[:4])} - set(exact)


def test_a_parent_that_the_autoencoder_cannot_take_has_no_proposals(run, molecules):
    found = proposals(Latent(run=str(run)), [molecules[0], "[Si](C)(C)(C)C", molecules[1]])
    assert all((p.smiles is None) == (p.parent == 1) for p in found)


def test_a_guided_step_goes_down_the_potential(run, codec, molecules, monkeypatch):
    x = codec.encode(codec.rows(molecules))
    objective = read_objective({"components": [{"scorer": "qed"}]})
    surrogate = fit_surrogate(x, torch.sigmoid(x[:, :1]).double(), objective)  # QED that rises along the first axis
    surrogate.info["objective"] = objective.settings.model_dump(mode="json")
    surrogate.save(run / "surrogate")
    asked = []
    proposer = Latent(run=str(run), nearest=1.0, farthest=1.0, between=0.0, guided=1.0)
    monkeypatch.setattr(proposer._codec, "decode", lambda points: asked.append(points) or ["C"] * len(points))
    found = proposals(proposer, molecules[:3], 60)
    step = asked[0] - x[torch.tensor([p.parent for p in found])]
    assert step.norm(dim=1).sub(1).abs().max() < 1e-4
    assert step[:, 0].mean() > 0.4  # minus the gradient and a direction by chance, half each
    guess = Latent(run=str(run), nearest=1.0, farthest=1.0, between=0.0, guided=0.0)
    monkeypatch.setattr(guess._codec, "decode", lambda points: asked.append(points) or ["C"] * len(points))
    proposals(guess, molecules[:3], 60)
    assert (asked[1] - x[torch.tensor([p.parent for p in found])])[:, 0].mean().abs() < 0.3


def test_a_folder_without_an_autoencoder_and_ranges_turned_round_are_refused(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="no autoencoder"):
        Latent(run=str(tmp_path / "none"))
    with pytest.raises(ValueError, match="nearest=5 must not lie above farthest=2"):
        Latent(run=str(run), nearest=5.0, farthest=2.0)
