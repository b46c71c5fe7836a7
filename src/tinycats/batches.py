"""Batches as a function of (seed, step): the same ones whatever the number of workers or of interruptions."""

import math
import sys
from collections.abc import Callable, Iterable
from types import TracebackType

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tinycats.packed_images import PackedImages
from tinycats.signals import leave_stop_signals_to_parent

# What a random number is for. Streams with different purposes must not share numbers.
SHUFFLING, AUGMENTATION, INITIALISATION, PATH, NOISE, VALIDATION, SAMPLING = range(7)

ImageTransform = Callable[[torch.Tensor], torch.Tensor]


def seed_for(seed: int, purpose: int, position: int = 0) -> int:
    """A seed of its own for each (seed, purpose, position), by numpy's SeedSequence, which keeps them apart."""
    words = np.random.SeedSequence(seed, spawn_key=(purpose, position)).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))  # torch takes 63 bits


class TrainingBatches(Dataset):
    """Item k is the batch of step k: (uint8 [B, 3, H, W], int64 [B] labels).

    An epoch is a shuffle of its own, cut into batches of equal size; what is left over at its end sits out,
    by turns. A batch is at most the whole data set.
    """

    def __init__(self, dataset: PackedImages, batch_size: int, transform: ImageTransform, seed: int):
        self.dataset, self.transform, self.seed = dataset, transform, seed
        self.indices = dataset.indices("train")
        self.batch_size = min(batch_size, len(self.indices))
        self.steps_per_epoch = len(self.indices) // self.batch_size

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        shuffle = np.random.default_rng(seed_for(self.seed, SHUFFLING, epoch)).permutation(len(self.indices))
        chosen = self.indices[shuffle[position * self.batch_size : (position + 1) * self.batch_size]]
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from torch's global generator
            torch.manual_seed(seed_for(self.seed, AUGMENTATION, step))
            return _batch(self.dataset, chosen, self.transform)


class ValidationBatches(Dataset):
    """The validation images in order: item k is (uint8 [B, 3, H, W], int64 [B] labels)."""

    def __init__(self, dataset: PackedImages, batch_size: int, transform: ImageTransform):
        self.dataset, self.transform, self.batch_size = dataset, transform, batch_size
        self.indices = dataset.indices("val")

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        return _batch(self.dataset, chosen, self.transform)


def _batch(dataset: PackedImages, chosen: np.ndarray, transform: ImageTransform) -> tuple[torch.Tensor, torch.Tensor]:
    # An image lies in the map with its channels last, for which torchvision has its fastest code; so does a batch.
    images = [transform(torch.from_numpy(dataset[index]).permute(2, 0, 1)) for index in chosen]
    stacked = torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)
    return stacked, torch.from_numpy(dataset.labels[chosen])


def load_batches(batches: Dataset, order: Iterable[int], num_workers: int, pin_memory: bool) -> DataLoader:
    """Whole batches, in the given order, prepared ahead of time by `num_workers` processes (0: by this one)."""
    return DataLoader(
        batches,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=_init_worker,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # else it would draw from the global one
    )


def _init_worker(_number: int) -> None:
    leave_stop_signals_to_parent()
    sys.excepthook = _report_unless_parent_is_gone


def _report_unless_parent_is_gone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    # A parent that is killed while it takes a batch over leaves the worker's thread at the other end of a closed
    # pipe: no fault of the worker's, and its traceback would bury what the user should read.
    if not isinstance(error, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
