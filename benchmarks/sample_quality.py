"""How far a finished generator's images are from held-out ones, and from the ones that it was trained on.

    python benchmarks/sample_quality.py outputs/tiny_dit.pt cat-faces-64 --picture outputs/samples.png

Samples as many images as the validation set has, of the same classes, and prints their sliced Wasserstein
distance (x 1000) to the validation images at each level of a Laplacian pyramid; above it, for comparison, that
of as many real images from the training set. The distance does not see contrast: that is the deviation of the
pixels, as a part of that of the held-out ones. Then what a network trained on ImageNet makes of them, at the size
that they have, at half of it and at a quarter: the kernel distance (KID x 1000), precision and recall. Then how far,
in the mean, an image is from the training image nearest to it (root mean square over its pixels, of a range of 2): a
generator that only repeats what it was shown is much nearer than a validation image is. The grid shows the first 32
samples.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torchvision.utils import save_image

from image_features import ImageFeatures, likeness
from tinycats import generator
from tinycats.images import frames
from tinycats.images.batches import TrainingBatches, ValidationBatches
from tinycats.images.datasets import open_dataset
from tinycats.images.packed_images import PackedImages
from tinycats.models.flow_matching import STEPS
from tinycats.models.sliced_wasserstein import pyramid_distances
from tinycats.training import devices


def validation_images(images: PackedImages) -> tuple[torch.Tensor, torch.Tensor]:
    """float [N, 3, S, S] in [-1, 1], and their labels."""
    pixels, labels = ValidationBatches(images, len(images), generator.validation_transform)[0]
    return generator.to_unit(pixels), labels


def training_images(images: PackedImages) -> torch.Tensor:
    """float [N, 3, S, S] in [-1, 1], in random order."""
    batches = TrainingBatches(images, len(images), generator.validation_transform, seed=0)
    return generator.to_unit(batches[0][0])


def distances_in_words(distances: dict[int, float]) -> str:
    """The mean over a pyramid's levels, and each level."""
    levels = ", ".join(f"{side} px {distance:.1f}" for side, distance in distances.items())
    return f"{sum(distances.values()) / len(distances):5.1f}  ({levels})"


def features(images: torch.Tensor, network: ImageFeatures) -> dict[int, torch.Tensor]:
    """What the network sees at the size that the images have, at half of it, and at a quarter."""
    sides = [images.shape[-1] // part for part in (1, 2, 4) if images.shape[-1] % part == 0]
    return {side: network(images, side) for side in sides}


def likeness_in_words(samples: dict[int, torch.Tensor], real: dict[int, torch.Tensor]) -> str:
    """A line for each size."""
    return "\n".join(f"    at {side:3} px  {likeness(samples[side], real[side])}" for side in real)


def nearest(images: torch.Tensor, shown: torch.Tensor) -> float:
    """The mean distance of an image to the nearest of those shown, mirrored or not."""
    both = torch.cat([shown, shown.flip(3)]).flatten(1)
    return (torch.cdist(images.flatten(1), both).min(dim=1).values / both.shape[1] ** 0.5).mean().item()


def main() -> None:
    """Sample, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cfg-scale", type=float, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to save a grid of samples")
    options = parser.parse_args()

    finished = generator.load(options.model).to(devices.find("auto"))
    if options.cfg_scale is not None:
        finished = dataclasses.replace(finished, guidance_scale=options.cfg_scale)
    size = finished.model.image_size
    images = open_dataset(options.folder, frames.square(size), options.folder.parent)
    real, labels = validation_images(images)
    shown = training_images(images)
    network, others = ImageFeatures(), shown[: len(real)]
    seen = features(real, network)
    print(f"real images     {distances_in_words(pyramid_distances(others, real))}")
    print(likeness_in_words(features(others, network), seen), flush=True)

    names = [images.classes[label] for label in labels]
    samples = finished.sample(names, seed=options.seed, steps=options.steps, batch_size=64)
    samples = generator.to_unit(samples)
    if options.picture:
        save_image((samples[:32] + 1) / 2, options.picture, nrow=8, padding=2, pad_value=1)
    contrast = samples.std() / real.std()
    print(f"samples         {distances_in_words(pyramid_distances(samples, real))}  contrast {contrast:.2f}")
    print(likeness_in_words(features(samples, network), seen))
    print(f"nearest training image: validation {nearest(real, shown):.3f}, samples {nearest(samples, shown):.3f}")


if __name__ == "__main__":
    main()
