"""How many images a second the loader prepares, against the plain torchvision pipeline, side by side.

    python benchmarks/loader.py data/cats --workers 0 1 2

At 128 px as for TinyDiT (the middle square, mirrored or not) and at 224 px as for the classifier (a random part,
mirrored or not), normalised, in batches. The plain side is what tutorials do: ImageFolder opens and decodes a file with
Pillow each time it is wanted, in worker processes; ours are threads. Rounds alternate, so that a noisy machine is noisy
to both; the ratio is of the medians. What normalises runs on one core, as if a GPU did the rest.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tinycats import classifier, generator
from tinycats.images import frames
from tinycats.images.batches import Batch, TrainingBatches, load_batches
from tinycats.images.datasets import open_dataset

SIZES = {128: "the middle, for TinyDiT", 224: "random parts, for the classifier"}
BATCH_SIZES = {128: 256, 224: 32}


def plain(folder: Path, image_size: int, images: int, workers: int) -> float:
    """Images a second of ImageFolder + Pillow + torchvision.transforms."""
    if image_size == 128:
        cut: Sequence[Callable] = [transforms.Resize(image_size), transforms.CenterCrop(image_size)]
        scale = transforms.Normalize([0.5] * 3, [0.5] * 3)
    else:
        cut = [transforms.RandomResizedCrop(image_size, scale=classifier.CROP_SCALE)]
        scale = transforms.Normalize(classifier.MEAN, classifier.STD)
    pipeline = transforms.Compose([*cut, transforms.RandomHorizontalFlip(), transforms.ToTensor(), scale])
    dataset = ImageFolder(str(folder), pipeline)
    batch_size = min(BATCH_SIZES[image_size], max(1, images // 4))
    sampler = RandomSampler(dataset, replacement=True, num_samples=images + batch_size)
    return rate(DataLoader(dataset, batch_size, sampler=sampler, num_workers=workers), lambda batch: batch)


def ours(folder: Path, image_size: int, images: int, workers: int) -> float:
    """Images a second of the packed images, as the scripts take them."""
    if image_size == 128:
        frame, transform, finish = frames.square(image_size), generator.training_transform, generator.to_unit
    else:
        frame, finish = frames.to_crop_from(image_size), classifier.normalise
        transform = classifier.training_transform(image_size)
    dataset = open_dataset(folder, frame, folder.parent)
    batches = TrainingBatches(dataset, BATCH_SIZES[image_size], transform, seed=0)
    steps = images // batches.batch_size + 2
    return rate(load_batches(batches, range(steps), workers, pin_memory=False), finish)


def rate(loader: Iterable[Batch], finish: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """Images a second after the first batch, whose time is the workers' start."""
    batches = iter(loader)
    finish(next(batches)[0])
    began, count = time.perf_counter(), 0
    for images, _ in batches:
        finish(images)
        count += len(images)
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/cats"), help="with train/<class>/ and val/")
    parser.add_argument("--sizes", type=int, nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="processes, or threads")
    parser.add_argument("--images", type=int, default=1000, help="in a round; ten times that for the packed side")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)

    print("| | workers | plain, images/s | packed, images/s | ratio |\n|---|---|---|---|---|")
    for size in options.sizes:
        ours(options.folder, size, 1, 0)  # packs the images, once
        for workers in options.workers:
            rounds = [
                (
                    plain(options.folder / "train", size, options.images, workers),
                    ours(options.folder, size, 10 * options.images, workers),
                )
                for _ in range(options.rounds)
            ]
            theirs, mine = (statistics.median(rates) for rates in zip(*rounds, strict=True))
            row = f"{size} px, {SIZES[size]} | {workers} | {theirs:.0f} | {mine:.0f} | {mine / theirs:.1f}x"
            print(f"| {row} |", flush=True)


if __name__ == "__main__":
    main()
