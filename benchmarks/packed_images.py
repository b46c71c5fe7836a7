"""What it costs that packed images are verified: opening them, reading each for the first time, and again.

    python benchmarks/packed_images.py --images 10000 --side 256

The pixels are made up: 10,000 images of 256 px are 2 GB. «Read» adds up an image's bytes, which stands for whatever
a training step does with them; SHA-256 of the whole file is what verifying it at once, when it is opened, would cost.
"""

import argparse
import hashlib
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np

from tinycats.packed_images import PackedImages, write_index


def make_up(folder: Path, count: int, side: int) -> None:
    """A packed folder of `count` images of noise, two classes."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (16, side, side, 3), np.uint8)
    images = []
    with (folder / "pixels.bin").open("wb") as pixels:
        for number in range(count):
            image = np.roll(noise[number % 16], number // 16, 0)
            pixels.write(image.tobytes())
            split = "val" if number % 5 == 0 else "train"
            facts = {
                "path": f"{split}/{number}.jpg",
                "split": split,
                "label": number % 2,
                "height": side,
                "width": side,
            }
            images.append(facts | {"crc32": zlib.crc32(image.tobytes())})
    write_index(
        folder, {"classes": ["a", "b"], "images": images, "unreadable": [], "short_side": side, "content": "made up"}
    )


def seconds(action: Callable[[], object]) -> float:
    """How long the action takes."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description="What verifying packed images costs.")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--side", type=int, default=256, metavar="PIXELS")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_up(folder, options.images, options.side)
        images = PackedImages(folder)

        def read_all() -> None:
            for index in range(options.images):
                images[index].sum(dtype=np.uint64)

        rows = {
            "open": seconds(lambda: PackedImages(folder)),
            "read each image for the first time": seconds(read_all),
            "read each image again": seconds(read_all),
            "SHA-256 of the whole": seconds(lambda: hashlib.sha256(images._pixels).hexdigest()),
            "verify the whole": seconds(images.damaged),
        }
        gigabytes = (folder / "pixels.bin").stat().st_size / 1e9
    print(f"{options.images} images of {options.side} px, {gigabytes:.1f} GB, in the page cache")
    for what, took in rows.items():
        print(f"{what:36} {took:7.3f} s")


if __name__ == "__main__":
    main()
