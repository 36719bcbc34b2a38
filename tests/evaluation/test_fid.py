"""Image scores: Gaussian closed forms first, then limits, then the weights file and what is said about it."""

import hashlib
import math

import numpy as np
import pytest
import torch

from gengrad.data import Digits
from gengrad.data.images import as_bytes
from gengrad.evaluation import classifier, features
from gengrad.evaluation.features import Features, IdentityFeatures, extractor
from gengrad.evaluation.fid import (
    Statistics,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    reference_statistics,
)
from gengrad.ot import gaussian_w2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """No test reads or fills the user's cache."""
    monkeypatch.setenv("GENGRAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GENGRAD_INCEPTION", raising=False)


def of(x, logits=None, cut=100) -> Statistics:
    parts = zip(x.split(cut), [None] * len(x.split(cut)) if logits is None else logits.split(cut))
    return Statistics.of(Features(a, b) for a, b in parts)


def random_bytes(n, seed=0):
    return torch.randint(0, 256, (n, 1, 3, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_statistics_are_mean_and_covariance_however_they_are_cut():
    x = torch.randn(250, 5, generator=torch.Generator().manual_seed(0))
    for cut in (7, 100, 1000):
        mean, covariance = of(x, cut=cut).moments
        assert np.allclose(mean, x.double().mean(0)) and np.allclose(covariance, np.cov(x.double().numpy().T))
        assert of(x, cut=cut).features.equal(x)


def test_the_frechet_distance_of_pixels_is_the_closed_form_of_gaussians():
    extract = IdentityFeatures()
    x, y = random_bytes(300), random_bytes(400, 1) // 2
    a, b = Statistics.of([extract(x)]), Statistics.of([extract(y)])
    (m, s), (n, t) = a.moments, b.moments
    assert frechet_distance(a, b) == pytest.approx(float(gaussian_w2(m, s, n, t)) ** 2, rel=1e-6)


def test_the_frechet_distance_of_a_shift_is_its_square_and_of_nothing_nothing():
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert frechet_distance(of(x), of(x + 2.0)) == pytest.approx(6 * 4.0, rel=1e-9)
    assert abs(frechet_distance(of(x), of(x))) < 1e-8
    # x -> c x: tr(S + c^2 S - 2 c S) = (1 - c)^2 tr S, and the mean moves likewise
    mean, covariance = of(x).moments
    expected = 4 * (covariance.trace() + mean.square().sum())
    assert frechet_distance(of(x), of(3 * x)) == pytest.approx(float(expected), rel=1e-9)


def test_the_kernel_distance_is_zero_on_average_for_equal_distributions_and_grows_with_a_shift():
    x, y = (torch.randn(1500, 4, generator=torch.Generator().manual_seed(k)) for k in range(2))
    same, near, far = (kernel_distance(of(x), of(y + shift)) for shift in (0.0, 0.5, 1.0))
    assert abs(same) < 0.01 and 0.05 < near < far
    state = torch.get_rng_state()
    assert kernel_distance(of(x), of(y)) == same and torch.equal(torch.get_rng_state(), state)


def test_the_inception_score_is_one_for_one_class_and_the_number_of_classes_for_sure_and_even_guesses():
    x = torch.zeros(1000, 2)
    sure = torch.eye(5).repeat(200, 1) * 100
    # each of the ten splits has its own class shares, about 20 of each: a little below 5
    assert inception_score(of(x, sure)) == pytest.approx(5, rel=0.05)
    assert inception_score(of(x, torch.zeros(1000, 5))) == pytest.approx(1, abs=1e-6)
    assert inception_score(of(x)) is None


def test_precision_and_recall_tell_bad_samples_from_missing_ones():
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(400, 2, generator=generator)
    other = torch.randn(400, 2, generator=generator)
    assert precision_recall(of(data), of(data)) == (1.0, 1.0)
    assert precision_recall(of(data), of(other + 100)) == (0.0, 0.0)
    two_modes = torch.cat([other[:200], other[200:] + 100])
    precision, recall = precision_recall(of(data), of(two_modes))
    assert precision > 0.8 and 0.4 < recall < 0.55  # all good, half missing
    precision, recall = precision_recall(of(two_modes), of(data))
    assert 0.4 < precision < 0.55 and recall > 0.8


def test_the_balls_around_the_data_are_measured_once_for_all_samples(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    data, (x, y) = of(torch.randn(200, 2, generator=generator)), torch.randn(2, 200, 2, generator=generator)
    first, second, sizes, cdist = precision_recall(of(x), data), precision_recall(of(y), data), [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda a, b, **k: (sizes.append(b), cdist(a, b, **k))[1])
    again = of(x)
    assert precision_recall(again, data) == first != second
    assert len(sizes) == 3  # x among the data, x among themselves, the data among x
    data.add(Features(x, None))  # other data have other balls
    precision_recall(again, data)
    assert len(sizes) == 6


def test_the_reference_is_cached_by_images_and_features_and_made_anew_when_damaged(tmp_path, monkeypatch):
    extract, images = IdentityFeatures(), random_bytes(50)
    first = reference_statistics(images, extract)
    (file,) = (tmp_path / "cache").glob("statistics-*")
    with monkeypatch.context() as patch:
        patch.setattr(IdentityFeatures, "forward", None)  # calling it would fail: the cache is read
        again = reference_statistics(images, extract)
    assert again.n == 50 and torch.equal(again.outer, first.outer) and torch.equal(again.features, first.features)
    file.write_bytes(file.read_bytes()[:100])
    assert torch.equal(reference_statistics(images, extract).outer, first.outer)
    reference_statistics(random_bytes(50, 1), extract)
    assert len(list((tmp_path / "cache").glob("statistics-*"))) == 2


def test_the_classifier_is_seeded_cached_and_says_how_good_it_is(monkeypatch):
    monkeypatch.setattr(classifier, "steps_for", lambda n: 60)
    data = Digits()
    state = torch.get_rng_state()
    first = extractor("classifier", data)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.about["accuracy"] > 0.7 and first.distance == "FD-classifier"  # 60 steps; 0.1 is guessing
    monkeypatch.setattr(classifier, "train_classifier", None)
    again = extractor("classifier", data)
    images = as_bytes(data.held_out[:50])
    assert torch.equal(again(images).x, first(images).x) and again.key == first.key
    assert first(images).x.shape == (50, 128) and first(images).logits.shape == (50, 10)


def test_a_classifier_whose_file_is_damaged_is_trained_again(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "steps_for", lambda n: 5)
    first = extractor("classifier", Digits())
    (file,) = (tmp_path / "cache").glob("classifier-*")
    whole, images = file.read_bytes(), as_bytes(Digits().held_out[:20])
    for damaged in (whole[:1000], b"", whole.replace(b"accuracy", b"acurracy")):
        file.write_bytes(damaged)
        again = extractor("classifier", Digits())
        assert again.about == first.about and torch.equal(again(images).x, first(images).x)
        assert len(file.read_bytes()) == len(whole)


def test_data_without_labels_have_no_classifier(tmp_path):
    from gengrad.data import ImageArray

    np.save(tmp_path / "x.npy", random_bytes(20).numpy())
    with pytest.raises(ValueError, match="no labels, so no classifier"):
        extractor("classifier", ImageArray(path=str(tmp_path / "x.npy"), layout="nchw"))


def test_without_inceptions_weights_the_message_says_what_to_put_where(tmp_path):
    with pytest.raises(FileNotFoundError) as told:
        extractor("inception", Digits())
    for words in (
        str(tmp_path / "cache" / features.INCEPTION_FILE),
        "https://",
        features.INCEPTION_SHA256,
        "--features classifier",
    ):
        assert words in str(told.value)


def test_weights_with_another_hash_are_never_opened(tmp_path, monkeypatch):
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    file = tmp_path / "weights.pth"
    file.write_bytes(pickle.dumps(Bomb()))
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"weights\.pth .*SHA-256 is {found}"):
        extractor("inception", Digits(), file)
    assert not (tmp_path / "executed").exists()


def test_inception_takes_grey_bytes_and_gives_its_pooled_features_and_logits(tmp_path, monkeypatch):
    """With weights as they come when it is built: only the way through it is tested here."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file = tmp_path / "weights.pth"
    torch.save({}, file)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
    found = extractor("inception", Digits(), file)(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    assert found.x.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert torch.equal(found.x[0], found.x[1]) and found.x.isfinite().all()


def test_features_keep_full_precision_where_samples_are_drawn_in_a_lower_one(monkeypatch):
    monkeypatch.setattr(classifier, "steps_for", lambda n: 5)
    extract, images = extractor("classifier", Digits()), as_bytes(Digits().held_out[:20])
    with torch.autocast("cpu", torch.bfloat16):
        found = extract(images)
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16  # that it would have done something
    assert torch.equal(found.x, extract(images).x) and found.logits.dtype == torch.float32


def test_only_inceptions_scores_bear_its_names():
    names = {cls.kind: (cls.distance, cls.kernel, cls.score) for cls in features.Extractor.__subclasses__()}
    assert names.pop("inception") == ("FID", "KID", "IS")
    assert len(names) == 2 and not {"FID", "KID", "IS"} & {name for given in names.values() for name in given}
    with pytest.raises(ValueError, match="known: inception, classifier, identity"):
        extractor("vgg", Digits())


def test_a_frechet_distance_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        frechet_distance(of(torch.zeros(1, 2)), of(torch.zeros(5, 2)))
    assert math.isfinite(frechet_distance(of(torch.zeros(2, 2)), of(torch.zeros(5, 2))))
