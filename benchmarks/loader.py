"""How many images a second the loader prepares, against the plain torchvision pipeline, side by side.

    python benchmarks/loader.py data/cats --num-workers 2

Both sides take the same photos, crop, mirror and normalise them in the same way and with as many worker
processes. The plain side is what tutorials do: ImageFolder opens and decodes a file with Pillow each time it
is wanted. Rounds alternate, so that a noisy machine is noisy to both; the ratio is of the medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tinycats import classifier
from tinycats.batches import TrainingBatches, load_batches
from tinycats.datasets import open_dataset


def plain(folder: Path, image_size: int, batch_size: int, steps: int, workers: int) -> float:
    """Images a second of ImageFolder + Pillow + torchvision.transforms."""
    pipeline = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size, scale=classifier.CROP_SCALE),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(classifier.MEAN, classifier.STD),
        ]
    )
    images = ImageFolder(str(folder), pipeline)
    sampler = RandomSampler(images, replacement=True, num_samples=(steps + 1) * batch_size)
    return rate(DataLoader(images, batch_size, sampler=sampler, num_workers=workers), batch_size, lambda batch: batch)


def ours(folder: Path, image_size: int, batch_size: int, steps: int, workers: int) -> float:
    """Images a second of the packed images, as src/train.py takes them."""
    images = open_dataset(folder, classifier.stored_side(image_size), folder.parent)
    batches = TrainingBatches(images, batch_size, classifier.training_transform(image_size), seed=0)
    loader = load_batches(batches, range(steps + 1), workers, pin_memory=False)
    return rate(loader, batches.batch_size, classifier.normalise)


def rate(loader: DataLoader, batch_size: int, finish: Callable[[torch.Tensor], torch.Tensor]) -> float:
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
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    settings = (options.image_size, options.batch_size, options.steps, options.num_workers)

    ours(options.folder, *settings)  # packs the images, once
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(options.rounds):
        rates["plain"].append(plain(options.folder / "train", *settings))
        rates["ours"].append(ours(options.folder, *settings))
    for name, values in rates.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        print(f"{name:6} {middle:7.0f} images/s (min {low:.0f}, max {high:.0f})")
    print(f"ratio  {statistics.median(rates['ours']) / statistics.median(rates['plain']):.1f}x")


if __name__ == "__main__":
    main()
