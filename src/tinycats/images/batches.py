"""Batches as a function of (seed, step): the same ones whatever the number of workers, interruptions or processes."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch

from tinycats.images.augmentation import BatchRng
from tinycats.images.packed_images import PackedImages
from tinycats.images.prefetching import prefetch
from tinycats.images.shuffling import Shuffle
from tinycats.script.errors import UserError
from tinycats.training.processes import Processes

# What a random number is for. Streams with different purposes must not share numbers.
SHUFFLING, AUGMENTATION, INITIALISATION, PATH, NOISE, VALIDATION, SAMPLING, MIXUP = range(8)

PREFETCH = 4  # batches for each worker to prepare ahead of time

Batch = tuple[torch.Tensor, torch.Tensor]
# From what PackedImages.batch returns, and an rng, to uint8 [B, H, W, 3].
Transform = Callable[[Any, BatchRng], np.ndarray]


def seed_for(seed: int, purpose: int, position: int = 0) -> int:
    """A seed of its own for each (seed, purpose, position), by numpy's SeedSequence, which keeps them apart."""
    words = np.random.SeedSequence(seed, spawn_key=(purpose, position)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))  # torch takes 63 bits


class Batches(Protocol):
    """Numbered batches, each a pair of images, uint8 [B, 3, H, W], and labels, int64 [B]."""

    def __getitem__(self, number: int) -> Batch: ...


class TrainingBatches:
    """Item k is this process's share of the batch of step k.

    An epoch is a shuffle of its own, cut into batches of equal size; what is left over at its end sits out,
    by turns. A batch is at most the whole data set.

    Args:
        with_next: the share is followed by the image that comes next in the batch, after the last one the first: each
            has one to be mixed with, the same in however many processes.

    Attributes:
        batch_size: images in a batch, over all processes.
        share: which of them are here.

    Raises:
        UserError: there are more processes than images in a batch.
    """

    def __init__(
        self,
        dataset: PackedImages,
        batch_size: int,
        transform: Transform,
        seed: int,
        processes: Processes = Processes(),  # noqa: B008  it is immutable
        *,
        with_next: bool = False,
    ):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.indices = dataset.indices("train")
        self.batch_size = min(batch_size, len(self.indices))
        self.share = processes.share(self.batch_size)
        if self.batch_size < processes.count:
            raise UserError(f"a batch of {self.batch_size} images is not enough for {processes.count} processes")
        self.steps_per_epoch = len(self.indices) // self.batch_size
        self._here = np.arange(self.share.start, self.share.stop + with_next) % self.batch_size

    def class_counts(self) -> torch.Tensor:
        """int64 [C]: how many images there are of each class."""
        labels = self.dataset.labels[self.indices.start : self.indices.stop]
        return torch.from_numpy(np.bincount(labels, minlength=len(self.dataset.classes)))

    def __getitem__(self, step: int) -> Batch:
        epoch, number = divmod(step, self.steps_per_epoch)
        positions = number * self.batch_size + self._here
        shuffle = Shuffle(len(self.indices), seed_for(self.seed, SHUFFLING, epoch))
        rng = BatchRng(seed_for(self.seed, AUGMENTATION, step), self.batch_size, self._here)
        return _batch(self.dataset, self.indices.start + shuffle[positions], self.transform, rng)


class ValidationBatches:
    """The validation images, in order; of each batch this process's share, which may be empty."""

    def __init__(
        self,
        dataset: PackedImages,
        batch_size: int,
        transform: Transform,
        processes: Processes = Processes(),  # noqa: B008  it is immutable
    ):
        self.dataset, self.transform, self.batch_size, self.processes = dataset, transform, batch_size, processes
        self.indices = dataset.indices("val")

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __getitem__(self, number: int) -> Batch:
        size, share = self.share_of(number)
        chosen = np.array(self._numbered(number)[share], np.int64)
        return _batch(self.dataset, chosen, self.transform, BatchRng(0, size, share))

    def share_of(self, number: int) -> tuple[int, slice]:
        """How many images the batch has, over all processes, and which of them are here."""
        size = len(self._numbered(number))
        return size, self.processes.share(size)

    def _numbered(self, number: int) -> range:
        return self.indices[number * self.batch_size : (number + 1) * self.batch_size]


def _batch(dataset: PackedImages, chosen: np.ndarray, transform: Transform, rng: BatchRng) -> Batch:
    images = torch.from_numpy(transform(dataset.batch(chosen), rng))
    return images.permute(0, 3, 1, 2), torch.from_numpy(dataset.labels[chosen].astype(np.int64))


def load_batches(batches: Batches, order: Iterable[int], num_workers: int, pin_memory: bool) -> Iterator[Batch]:
    """Batches in the given order, prepared ahead of time by `num_workers` threads (0: when they are asked for).

    Threads do: what takes time, copying and resizing, lets go of Python's lock.
    """

    def prepare(number: int) -> Batch:
        images, labels = batches[number]
        return (images.pin_memory(), labels.pin_memory()) if pin_memory else (images, labels)

    return prefetch(prepare, order, num_workers, PREFETCH * num_workers) if num_workers else map(prepare, order)
