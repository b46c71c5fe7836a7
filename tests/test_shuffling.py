"""A shuffle that is evaluated where it is needed is as good as one that is drawn."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from tinycats.images.shuffling import Shuffle


def whole(count: int, key: int) -> np.ndarray:
    return Shuffle(count, key)[np.arange(count)]


@pytest.mark.parametrize("count", [*range(1, 40), 100, 7390, 99_991, 2**20])
def test_each_index_comes_once(count):
    assert (np.sort(whole(count, key=count)) == np.arange(count)).all()


def test_a_part_is_the_same_whoever_asks_for_it():
    count = 10**12
    positions = np.array([0, 10**11, count - 1])
    indices = Shuffle(count, key=1)[positions]
    assert ((indices >= 0) & (indices < count)).all()
    assert [Shuffle(count, key=1)[positions[[at]]][0] for at in range(3)] == indices.tolist()
    assert not (Shuffle(count, key=2)[positions] == indices).any()


@pytest.mark.parametrize("count", [3, 4, 5])
def test_every_order_of_a_few_is_equally_likely(count):
    """By chi-squared, in standard deviations. Seen to fail with 8 ROUNDS for five."""
    orders = Counter(tuple(whole(count, key).tolist()) for key in range(60 * math.factorial(count)))
    counts = np.array([orders[order] for order in itertools.permutations(range(count))])
    expected, freedom = counts.mean(), counts.size - 1
    assert abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("count", [37, 1000])
def test_every_image_is_equally_likely_at_every_position_and_beside_every_other(count):
    trials, bins = 600, 12  # positions and indices are counted in twelve parts
    shuffles = np.array([whole(count, key) for key in range(trials)])
    part = np.arange(count) * bins // count
    placed = np.histogram2d(np.broadcast_to(part, shuffles.shape).ravel(), part[shuffles].ravel(), bins)[0]
    expected = trials * np.outer(np.bincount(part), np.bincount(part)) / count
    assert (np.abs(placed - expected) < 5 * np.sqrt(expected)).all()
    before, after = shuffles[:, :-1].ravel(), shuffles[:, 1:].ravel()
    # Without replacement the correlation of neighbours is -1 / (count - 1).
    assert abs(np.corrcoef(before, after)[0, 1] + 1 / (count - 1)) < 4 / math.sqrt(before.size)
    consecutive = (np.abs(before - after) == 1).sum()
    assert abs(consecutive - 2 * trials * (count - 1) / count) < 5 * math.sqrt(2 * trials)


def test_epochs_with_neighbouring_keys_have_nothing_to_do_with_each_other():
    one, other = whole(10_000, key=5), whole(10_000, key=6)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.04
    assert (one == other).sum() < 8
