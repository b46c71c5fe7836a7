"""Which learning rate is best at which width: does what is found for a small model hold for a large one?

    python benchmarks/rates.py cat-faces-64 --steps 400

TinyDiT is trained as the product trains it (Muon and AdamW, the same images and noise in the same order for all), in
each width with each rate. Printed is the EMA's error of the velocity on validation images (flow_matching_choices.py):
less is better.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from flow_matching_choices import train, velocity_error
from sample_quality import validation_images
from tinycats.images import frames
from tinycats.images.datasets import open_dataset

HEAD = 32  # the width of an attention head


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--widths", type=int, nargs="+", default=[96, 192, 384])
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    images = open_dataset(options.folder, frames.square(options.image_size), options.folder.parent)
    real, _ = validation_images(images)
    print(f"| width | {' | '.join(f'{rate:g}' for rate in options.rates)} |")
    print("|---" * (1 + len(options.rates)) + "|")
    for width in options.widths:
        errors = []
        for rate in options.rates:
            settings = {"dim": width, "heads": width // HEAD, "lr": rate, "seconds": None, "ema_beta": 0.98}
            model, *_ = train(images, argparse.Namespace(**vars(options) | settings))
            errors.append(f"{velocity_error(model, real):.4f}")
        print(f"| {width} | {' | '.join(errors)} |", flush=True)


if __name__ == "__main__":
    main()
