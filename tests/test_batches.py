"""A batch is a function of (seed, step)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tinycats import generator
from tinycats.classifier import training_transform, validation_transform
from tinycats.images.batches import TrainingBatches, ValidationBatches, load_batches, seed_for
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame


@pytest.fixture(scope="module")
def images(small_toy):
    return open_dataset(small_toy, Frame(37), small_toy.parent)


def batches_of(images, seed=0, batch_size=12) -> TrainingBatches:
    return TrainingBatches(images, batch_size, training_transform(32), seed)


def loaded(batches, steps, workers=0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [tuple(batch) for batch in load_batches(batches, steps, workers, pin_memory=False)]


def equal(one, other) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_prepares_the_same_batches(images, workers):
    assert equal(loaded(batches_of(images), range(8), workers), loaded(batches_of(images), range(8)))


def test_batches_of_square_images_are_prepared_alike(small_toy):
    images = open_dataset(small_toy, Frame(32, square=True), small_toy.parent)
    batches = TrainingBatches(images, 12, generator.training_transform, seed=0)
    assert equal(loaded(batches, range(8), 2), loaded(batches, range(8)))
    ((pixels, _labels),) = loaded(batches, [0])
    assert (pixels.shape, pixels.dtype) == ((12, 3, 32, 32), torch.uint8)
    rows = {image.tobytes() for image in images.batch(np.arange(40))}
    mirrored = {image[:, ::-1].tobytes() for image in images.batch(np.arange(40))}
    shown = [image.permute(1, 2, 0).numpy().tobytes() for image in pixels]
    assert {image in rows for image in shown} == {image in mirrored for image in shown} == {True, False}
    assert all((image in rows) != (image in mirrored) for image in shown)


def test_batches_do_not_depend_on_where_one_starts_nor_on_torchs_generator(images):
    torch.manual_seed(1)
    whole = loaded(batches_of(images), range(8))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert equal(whole[5:], loaded(batches_of(images), range(5, 8)))
    assert torch.equal(torch.get_rng_state(), before), "and leave the generator as it was"


def test_another_seed_makes_other_batches(images):
    assert not equal(loaded(batches_of(images, seed=1), range(1)), loaded(batches_of(images), range(1)))


def test_an_epoch_shows_no_image_twice_and_the_next_shuffles_anew(images):
    batches = TrainingBatches(images, 8, validation_transform(32), seed=0)
    assert batches.steps_per_epoch == 5
    epochs = [torch.cat([loaded(batches, [step])[0][0] for step in range(first, first + 5)]) for first in (0, 5)]
    assert len(torch.unique(epochs[0], dim=0)) == 40
    assert not torch.equal(*epochs)


def test_what_is_left_over_at_an_epochs_end_sits_out_by_turns(images):
    batches = batches_of(images, batch_size=12)
    assert batches.steps_per_epoch == 3
    assert {len(labels) for _, labels in loaded(batches, range(6))} == {12}


def test_a_batch_larger_than_the_data_is_all_of_it(images):
    batches = batches_of(images, batch_size=10_000)
    assert batches.steps_per_epoch == 1
    (images, labels), _ = loaded(batches, range(2))
    assert images.shape == (40, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert labels.bincount().tolist() == [8] * 5


def test_validation_shows_every_held_out_image_once_and_never_a_training_one(images):
    batches = ValidationBatches(images, 8, validation_transform(32))
    assert sum(len(labels) for _, labels in loaded(batches, range(len(batches)))) == 20
    assert not set(batches.indices) & set(batches_of(images).indices)
    assert all(Path(images.path(index)).parts[0] == "val" for index in batches.indices)


def test_seeds_for_different_purposes_and_positions_differ():
    seeds = {seed_for(seed, purpose, position) for seed in (0, 1) for purpose in range(3) for position in range(50)}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
