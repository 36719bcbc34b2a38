"""Streams: element i is the same however the sequence is cut, and every epoch visits each point once."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gengrad.data import Digits, EightGaussians, FiniteData, Stream, draw, generator_for
from gengrad.data.draws import BLOCK, Shuffle
from gengrad.registry import Settings

FEW = settings(max_examples=40, deadline=None)


class Numbered(FiniteData):
    """The points 0 .. size - 1."""

    class Config(Settings):
        size: int

    def prepare(self) -> None:
        self.points = torch.arange(self.config.size, dtype=torch.float32)[:, None]
        self.held_out = self.points[:0]


@FEW
@given(cuts=st.lists(st.integers(0, 3 * BLOCK), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_draws_of_a_density_do_not_depend_on_the_cuts(cuts, seed):
    data, ends = EightGaussians(), [0, *sorted(cuts)]
    whole = draw(data, 0, ends[-1], seed, "test")
    pieces = [draw(data, a, b, seed, "test") for a, b in pairwise(ends)]
    assert whole.shape == (ends[-1], 2) and torch.equal(torch.cat(pieces), whole)


@FEW
@given(
    size=st.integers(1, 60),
    cuts=st.lists(st.integers(0, 300), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
)
def test_streams_of_finite_data_do_not_depend_on_the_cuts(size, cuts, seed):
    data, ends = Numbered(size=size), [0, *sorted(cuts)]
    whole = Stream(data, seed, "test").take(0, ends[-1])
    stream = Stream(data, seed, "test")
    assert torch.equal(torch.cat([stream.take(a, b) for a, b in pairwise(ends)]), whole)
    # a resumed process starts in the middle
    middle = ends[-1] // 2
    assert torch.equal(Stream(data, seed, "test").take(middle, ends[-1]), whole[middle:])


@FEW
@given(size=st.integers(1, 60), epoch=st.integers(0, 5), seed=st.integers(0, 2**31))
def test_every_epoch_visits_each_point_once(size, epoch, seed):
    taken = Stream(Numbered(size=size), seed, "test").take(epoch * size, (epoch + 1) * size)
    assert taken.flatten().sort().values.tolist() == list(range(size))


def test_epochs_have_different_orders():
    order = Shuffle(100, 0, "test")
    assert not torch.equal(order.take(0, 100), order.take(100, 200))


def test_the_stream_of_a_density_is_its_keyed_draws():
    data = EightGaussians()
    assert torch.equal(Stream(data, 5, "a").take(100, 700), draw(data, 100, 700, 5, "a"))


def test_keys_that_differ_in_anything_give_different_numbers():
    keys = [(0, "a"), (1, "a"), (0, "b"), (0, "a", 0), (0, "a", 1), (0, "a", 0, 0), (0, "a0")]
    first = {torch.randint(2**62, (1,), generator=generator_for(*key)).item() for key in keys}
    assert len(first) == len(keys)


def test_keyed_numbers_are_those_of_every_earlier_version():
    """Recorded: a change here would silently change what every resumed run draws."""
    assert torch.randint(10**9, (2,), generator=generator_for(7, "recorded", 1)).tolist() == RECORDED


RECORDED = [35179626, 513536346]


def test_draws_of_finite_data_are_training_points():
    data = Digits()
    train = {image.numpy().tobytes() for image in data.points}
    assert all(image.numpy().tobytes() in train for image in data.sample(200, generator_for(0, "test")))
