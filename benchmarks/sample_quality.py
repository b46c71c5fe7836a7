"""How far a finished generator's pictures are from held-out ones, and from the ones that it was trained on.

    python benchmarks/sample_quality.py outputs/tiny_dit.pt cat-faces-64 --picture outputs/drawn.png

Draws as many pictures as the folder holds out, of the same classes, and prints their sliced Wasserstein
distance (x 1000) to the held-out pictures at each level of a Laplacian pyramid; above it, for comparison, that
of as many real pictures from the training set. The distance does not see contrast: that is the deviation of the
pixels, as a part of that of the held-out ones. Then how far, in the mean, a picture is from the training picture
nearest to it (root mean square over its pixels, of a range of 2): a generator that only repeats what it was
shown is much nearer than a held-out picture is. The picture shows the first 32 that were drawn.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torchvision.utils import save_image

from tinycats import generator
from tinycats.batches import TrainingBatches, ValidationBatches
from tinycats.datasets import open_dataset
from tinycats.packed_images import PackedImages
from tinycats.sliced_wasserstein import pyramid_distances


def held_out_pictures(images: PackedImages, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float [N, 3, S, S] in [-1, 1], and their labels."""
    batches = ValidationBatches(images, len(images), generator.validation_transform(size))
    pictures, labels = batches[0]
    return generator.to_unit(pictures), labels


def training_pictures(images: PackedImages, size: int) -> torch.Tensor:
    """float [N, 3, S, S] in [-1, 1], in random order."""
    batches = TrainingBatches(images, len(images), generator.validation_transform(size), seed=0)
    return generator.to_unit(batches[0][0])


def distances_in_words(distances: dict[int, float]) -> str:
    """The mean over a pyramid's levels, and each level."""
    levels = ", ".join(f"{side} px {distance:.1f}" for side, distance in distances.items())
    return f"{sum(distances.values()) / len(distances):5.1f}  ({levels})"


def nearest(pictures: torch.Tensor, shown: torch.Tensor) -> float:
    """The mean distance of a picture to the nearest of those shown, mirrored or not."""
    both = torch.cat([shown, shown.flip(3)]).flatten(1)
    return (torch.cdist(pictures.flatten(1), both).min(dim=1).values / both.shape[1] ** 0.5).mean().item()


def main() -> None:
    """Draw, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--method", choices=("heun", "euler"), default="heun")
    parser.add_argument("--cfg-scale", type=float, help="default: the model's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="where to save a grid of what was drawn")
    options = parser.parse_args()

    artist = generator.load(options.model)
    if options.cfg_scale is not None:
        artist = dataclasses.replace(artist, guidance_scale=options.cfg_scale)
    size = artist.model.image_size
    images = open_dataset(options.folder, size, options.folder.parent)
    real, labels = held_out_pictures(images, size)
    shown = training_pictures(images, size)
    print(f"real pictures   {distances_in_words(pyramid_distances(shown[: len(real)], real))}", flush=True)

    names = [images.classes[label] for label in labels]
    drawn = artist.draw(names, seed=options.seed, steps=options.steps, method=options.method, batch_size=64)
    drawn = generator.to_unit(drawn)
    if options.picture:
        save_image((drawn[:32] + 1) / 2, options.picture, nrow=8, padding=2, pad_value=1)
    contrast = drawn.std() / real.std()
    print(f"drawn pictures  {distances_in_words(pyramid_distances(drawn, real))}  contrast {contrast:.2f}")
    print(f"nearest training picture: held-out {nearest(real, shown):.3f}, drawn {nearest(drawn, shown):.3f}")


if __name__ == "__main__":
    main()
