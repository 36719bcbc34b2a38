"""The codec: whitening in closed form, decoding, the two files."""

import json

import pytest
import torch

from gengrad.latent.codec import Codec, Whitening
from gengrad.latent.reconstruction import reconstruction
from gengrad.molecules.autoencoder import on_sphere
from gengrad.molecules.tokens import END


def test_whitened_codes_have_mean_zero_and_unit_covariance_and_come_back():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(500, 4, generator=generator) @ torch.randn(4, 4, generator=generator) + 3.0
    whitening = Whitening.of(z)
    x = whitening(z).double()
    assert x.mean(0).abs().max() < 1e-4  # float32
    assert (x.mT @ x / len(x) - x.mean(0).outer(x.mean(0)) - torch.eye(4)).abs().max() < 1e-3
    assert torch.allclose(whitening.undo(whitening(z)), z, atol=1e-4)
    assert torch.allclose(whitening.forward, whitening.forward.mT, atol=1e-5)  # ZCA
    assert whitening.collapsed == 0


def test_the_whitening_of_a_diagonal_covariance_divides_by_the_deviations():
    z = torch.cartesian_prod(torch.tensor([-2.0, 2.0]), torch.tensor([-0.5, 0.5]))  # covariance diag(4, 1/4)
    whitening = Whitening.of(z)
    assert torch.allclose(whitening.forward, torch.diag(torch.tensor([0.5, 2.0])), atol=1e-5)
    assert torch.allclose(whitening.spectrum, torch.tensor([0.25, 4.0]))


def test_a_collapsed_direction_is_counted_and_not_blown_up():
    z = torch.randn(300, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([1.0, 1.0, 1e-5])
    whitening = Whitening.of(z)
    assert whitening.collapsed == 1
    assert whitening(z).std(0)[2] < 0.01  # noise is not made as large as molecules
    assert torch.allclose(whitening.undo(whitening(z)), z, atol=1e-5)


def test_codes_lie_on_the_sphere_and_the_decoder_sees_their_direction_alone(codec, molecules):
    z = codec.network.encode(codec.alphabet.rows(codec.rows(molecules[:8], 0))).detach()
    assert torch.allclose(z.square().mean(1), torch.ones(8), atol=1e-5)
    before = torch.zeros(8, 5, dtype=torch.long)
    assert torch.allclose(codec.network.logits(3.0 * z, before), codec.network.logits(z, before), atol=1e-4)
    assert torch.equal(on_sphere(torch.zeros(1, 4)), torch.zeros(1, 4))  # no direction, and no NaN


def test_decoding_is_the_same_in_any_batch_and_never_ends_at_once(codec):
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * 3
    rows = codec.network.decode(codec.whitening.undo(x))
    assert (rows[:, 0] != END).all()
    one_by_one = torch.cat([codec.network.decode(codec.whitening.undo(part)) for part in x.split(1)])
    assert torch.equal(rows, one_by_one)
    for row in rows.tolist():  # nothing comes after the end
        assert END not in row or not any(row[row.index(END) :])


def test_the_end_is_forbidden_even_where_it_is_by_far_the_likeliest(codec):
    import copy

    network = copy.deepcopy(codec.network)
    with torch.no_grad():
        network.head.bias[END] = 1e4
    rows = network.decode(torch.zeros(3, 6))
    assert (rows[:, 0] != END).all() and (rows[:, 1:] == END).all()


def test_greedy_decoding_follows_the_scores_of_the_teacher(codec, molecules):
    """At each place the decoded token is the argmax of ``logits`` given the decoded tokens before it."""
    z = codec.network.encode(codec.alphabet.rows(codec.rows(molecules[:5], 0))).detach()
    rows = codec.network.decode(z)
    scores = codec.network.logits(z, codec.network.shifted(rows))
    scores[:, 0, END] = -torch.inf
    for row, best in zip(rows.tolist(), scores.argmax(2).tolist()):
        length = row.index(END) + 1 if END in row else len(row)
        assert row[:length] == best[:length]


def test_a_stored_codec_gives_the_same_points_and_molecules(codec, molecules, tmp_path):
    codec.save(tmp_path)
    again = Codec.load(tmp_path)
    rows = codec.rows(molecules, 0)
    x = codec.encode(rows)
    assert torch.equal(again.encode(rows), x) and again.decode(x) == codec.decode(x)
    assert again.info == codec.info and again.digest() == codec.digest()


def test_an_altered_description_or_weight_is_refused(codec, tmp_path):
    codec.save(tmp_path)
    described = json.loads((tmp_path / "autoencoder.json").read_text())
    (tmp_path / "autoencoder.json").write_text(json.dumps({**described, "length": 3}))
    with pytest.raises(ValueError, match="damaged or was edited"):
        Codec.load(tmp_path)
    codec.save(tmp_path)
    weights = bytearray((tmp_path / "autoencoder.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "autoencoder.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="altered"):
        Codec.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="trained autoencoder"):
        Codec.load(tmp_path / "nowhere")


def test_molecules_of_another_alphabet_have_a_reason_and_the_others_their_rows(codec, molecules):
    found = codec.rows([molecules[0], "CI", "no molecule"], 0)
    assert isinstance(found[0], list)
    assert "not seen" in str(found[1]) and isinstance(found[1], ValueError)
    assert isinstance(found[2], ValueError)


def test_the_report_counts_what_comes_back(codec, molecules):
    """A codec whose decoder answers what it was asked: everything comes back, whatever the weights."""

    class Perfect(Codec):
        def decode(self, x):
            return molecules[:10]

    perfect = Perfect(codec.network, codec.alphabet, codec.whitening)
    rows = codec.rows(molecules, 0)
    report = reconstruction(perfect, rows[:10], molecules[:10])
    assert report["exact"] == report["validity"] == 1.0 and abs(report["tanimoto"] - 1) < 1e-6
    report = reconstruction(perfect, rows[5:15], molecules[5:10] + ["C"] * 5)
    assert report["exact"] == 0.0 and report["tanimoto"] < 1
