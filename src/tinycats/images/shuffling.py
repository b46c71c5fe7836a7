"""A shuffle that is evaluated where it is needed: its cost does not grow with how much is shuffled."""

import numpy as np

ROUNDS = 24  # with 12, 40,000 shuffles show some orders of six things to be likelier than others; with 16 no longer


class Shuffle:
    """A permutation of range(count), decided by a key: `Shuffle(count, key)[positions]` are the indices at `positions`.

    A Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002): an index is a pair of
    digits, and each round adds to one of them a hash of the other, which could be undone and so keeps all indices
    apart. There are a few more pairs than `count`: what lands outside goes through again until it is inside.

    Args:
        count: how many, from 1 to 2**62.
        key: a non-negative integer, for instance of `batches.seed_for`.
    """

    def __init__(self, count: int, key: int):
        self.count = count
        low = max(2, int(np.ceil(np.sqrt(count))))  # a digit that can only be 0 would leave the other as it is
        self._bases = (np.uint64(low), np.uint64(max(2, -(-count // low))))
        self._keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The int64 indices at int64 positions of range(count), both [N]."""
        indices = self._once(positions.astype(np.uint64))
        while (outside := indices >= self.count).any():
            indices[outside] = self._once(indices[outside])
        return indices.astype(np.int64)

    def _once(self, indices: np.ndarray) -> np.ndarray:
        digits = list(divmod(indices, self._bases[0])[::-1])  # the low one, the high one
        for number, key in enumerate(self._keys):
            turn = number % 2
            base, digit = self._bases[turn], digits[turn]
            digit += _below(base, digits[1 - turn] ^ key)
            digit -= base * (digit >= base)
        return digits[1] * self._bases[0] + digits[0]


def _below(base: np.uint64, words: np.ndarray) -> np.ndarray:
    """A hash of each word, below `base`: SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), in which each
    bit depends on all, and its upper half as a fraction of `base` (Lemire, ACM TOMACS 2019)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return ((words >> np.uint64(32)) * base) >> np.uint64(32)
