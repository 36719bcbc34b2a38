"""Training the autoencoder: it learns, it goes on bit for bit, and a folder belongs to one training."""

import pytest
import torch

from gengrad.latent import training
from gengrad.latent.codec import Codec
from gengrad.latent.labels import label_loss, labels_of
from gengrad.latent.settings import AutoencoderSettings
from gengrad.latent.training import Fit, batches_of, split, train_autoencoder
from gengrad.molecules.tokens import Alphabet, selfies_of

from .conftest import SMALL

SETTINGS = AutoencoderSettings(steps=6, network=SMALL, batch_size=16, warmup=0, properties=["qed", "logp"])


def fit_of(smiles, **settings) -> Fit:
    symbols = [selfies_of(text) for text in smiles]
    alphabet = Alphabet.of(symbols)
    chosen = SETTINGS.model_copy(update=settings)
    return Fit(chosen, alphabet, [alphabet.numbers(s) for s in symbols], labels_of(smiles, chosen), "cpu")


def test_the_loss_of_few_molecules_falls_far(molecules):
    fit = fit_of(molecules[:8], steps=150, batch_size=8, lr=1e-2, noise=0.0)
    losses = [fit.advance()["loss"] for _ in range(150)]
    assert losses[-1] < 0.2 * losses[0]  # from about log 25, a uniform guess


def test_codes_learn_to_tell_the_properties(molecules):
    fit = fit_of(molecules[:16], steps=150, batch_size=16, lr=1e-2, noise=0.0, property_weight=1.0)
    errors = [fit.advance()["property_error"] for _ in range(150)]
    assert errors[0] > 0.5 and errors[-1] < 0.05 * errors[0]  # 1: the variance of a standardised property


def test_labels_are_standardised_properties_of_some_molecules(molecules):
    settings = SETTINGS.model_copy(update={"properties": ["logp", "qed"], "labelled": 10})
    labels = labels_of(molecules[:20], settings)
    known = ~labels.isnan()
    assert labels.shape == (20, 2) and known.sum(0).tolist() == [10, 10]
    assert labels.nan_to_num(0.0).sum(0).div(10).abs().max() < 1e-5
    assert torch.allclose(labels.nan_to_num(0.0).square().sum(0) / 10, torch.ones(2), atol=1e-5)
    assert labels_of(molecules[:20], settings.model_copy(update={"properties": []})).shape == (20, 0)
    with pytest.raises(ValueError, match="qed"):
        AutoencoderSettings(properties=["qedd"])


def test_what_has_no_label_costs_nothing():
    labels = torch.tensor([[1.0, torch.nan], [torch.nan, torch.nan]])
    assert label_loss(torch.full((2, 2), 3.0), labels) == 4.0
    assert label_loss(torch.full((2, 2), 3.0), torch.full((2, 2), torch.nan)) == 0.0


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(molecules, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_EVERY", -1.0)  # a checkpoint at every step
    whole = train_autoencoder(molecules, tmp_path / "whole", SETTINGS, quiet=True)

    class Killed(BaseException):
        pass

    step = Fit.advance

    def killed_at_4(self):
        if self.step == 4:
            raise Killed
        return step(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Fit, "advance", killed_at_4)
        train_autoencoder(molecules, tmp_path / "cut", SETTINGS, quiet=True)
    assert not (tmp_path / "cut" / "autoencoder.json").exists()
    seen = []
    with monkeypatch.context() as patch:
        patch.setattr(Fit, "advance", lambda self: seen.append(self.step) or step(self))
        again = train_autoencoder(molecules, tmp_path / "cut", SETTINGS, quiet=True)
    assert seen == [4, 5] and again.digest() == whole.digest()
    report = whole.info["reconstruction"]
    assert report["validity"] == 1.0 and report["n"] == 6


def test_a_finished_training_is_taken_as_it_is_and_another_one_refused(molecules, tmp_path):
    first = train_autoencoder(molecules, tmp_path, SETTINGS, quiet=True)
    before = (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns
    assert train_autoencoder(molecules, tmp_path, SETTINGS, quiet=True).digest() == first.digest()
    assert (tmp_path / "autoencoder.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another training"):
        train_autoencoder(molecules[1:], tmp_path, SETTINGS, quiet=True)
    with pytest.raises(ValueError, match="settings"):
        train_autoencoder(molecules, tmp_path, SETTINGS.model_copy(update={"lr": 1e-4}), quiet=True)
    assert Codec.load(tmp_path).digest() == first.digest()


def test_minutes_end_a_training_by_the_clock_it_is_given(molecules, tmp_path):
    ticks = iter(range(1000))
    settings = SETTINGS.model_copy(update={"steps": None, "minutes": 7 / 60})
    codec = train_autoencoder(molecules, tmp_path, settings, quiet=True, clock=lambda: float(next(ticks)))
    assert codec.info["steps"] == 7  # one second each


def test_molecules_that_nothing_can_be_learned_from_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"2 of 3 molecules .* SELFIES"):
        train_autoencoder(["CC", "CCC", "CS(=O)(=O)(C)(C)(C)C"], tmp_path, SETTINGS, quiet=True)


def test_every_molecule_is_in_one_batch_of_an_epoch_beside_others_of_its_length():
    lengths = torch.arange(100).repeat(3)
    batches = batches_of(lengths, 32, seed=0, epoch=1)
    assert torch.cat(batches).sort().values.equal(torch.arange(300))
    assert max(int(lengths[b].max() - lengths[b].min()) for b in batches) <= 32 // 3 + 4
    assert [b.tolist() for b in batches] == [b.tolist() for b in batches_of(lengths, 32, seed=0, epoch=1)]


def test_a_tenth_at_most_is_held_out():
    train, held = split(50, 1000, 0)
    assert len(held) == 5 and sorted(train + held) == list(range(50))
