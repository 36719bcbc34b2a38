"""The digits: right sizes, grey levels and a split that is stratified and fixed."""

import torch

from gengrad.data import Digits
from gengrad.data.digits import stratified_split


def test_digits_are_images_of_seventeen_grey_levels():
    data = Digits()
    assert data.points.shape == (1497, 1, 8, 8) and data.held_out.shape == (300, 1, 8, 8)
    assert data.points.unique().tolist() == [k / 8 - 1 for k in range(17)]
    assert data.is_image


def test_labels_belong_to_their_images():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    by_image = {(image.astype("float32") / 8 - 1).tobytes(): label for image, label in zip(bunch.images, bunch.target)}
    data = Digits()
    for points, labels in ((data.points, data.labels), (data.held_out, data.held_out_labels)):
        assert [by_image[image.numpy().tobytes()] for image in points] == labels.tolist()


def test_the_split_is_stratified_and_a_function_of_its_seed():
    data, again, other = Digits(), Digits(), Digits(split_seed=1)
    everything = torch.bincount(torch.cat([data.labels, data.held_out_labels]))
    share = torch.bincount(data.held_out_labels)
    assert (share - everything * 300 / 1797).abs().max() < 1  # largest remainders: within one of the exact share
    assert torch.equal(data.held_out, again.held_out) and not torch.equal(data.held_out, other.held_out)


def test_a_split_takes_exactly_as_many_as_asked():
    labels = torch.tensor([0] * 7 + [1] * 2 + [2])
    for held_out in range(1, 10):
        train, held = stratified_split(labels, held_out, seed=0)
        assert len(held) == held_out
        assert torch.cat([train, held]).sort().values.tolist() == list(range(10))
