"""Packing against a plain loop over Pillow, and how long a large folder takes to list.

    python benchmarks/packing.py data/cats --times 5

Both decode the same photos for the classifier's 224 px, alternately; the loop opens, converts and resizes an image and
appends its bytes to a file, as one would write it down first. Files to list are empty ones in a temporary folder.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from PIL import Image

from tinycats.images import frames
from tinycats.images.image_folders import scan
from tinycats.images.packing import packed

SIDE = frames.to_crop_from(224).side


def plain(folder: Path, output: Path) -> None:
    """One image after another."""
    with output.open("wb") as pixels:
        for file in scan(folder).files:
            with Image.open(folder / file.path) as image:
                rgb = image.convert("RGB")
            scale = min(1, SIDE / min(rgb.size))
            width, height = (round(extent * scale) for extent in rgb.size)
            pixels.write(rgb.resize((width, height), Image.Resampling.BICUBIC).tobytes())


def seconds(action, *arguments: object) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - began


def copies(folder: Path, times: int, destination: Path) -> Path:
    """The folder several times over."""
    for file in scan(folder).files:
        for number in range(times):
            path = destination / Path(file.path).with_name(f"{number}-{Path(file.path).name}")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file.path, path)
    return destination


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/cats"))
    parser.add_argument("--times", type=int, default=5, help="how often each photo is there")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=200_000, help="to list")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        photos = copies(options.folder, options.times, Path(name, "photos"))
        count = len(scan(photos).files)
        rounds = []
        for number in range(options.rounds):
            loop = seconds(plain, photos, Path(name, "pixels"))
            ours = seconds(packed, scan(photos), frames.Frame(SIDE), [Path(name, f"packed-{number}")])
            rounds.append((loop, ours))
        loop, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
        print(
            f"{count} photos: a loop {count / loop:.0f}/s, packing {count / ours:.0f}/s on {os.cpu_count()} cores,",
            end="",
        )
        print(f" ratio {loop / ours:.1f}x")
        many = Path(name, "many")
        for number in range(options.files):
            folder = many / f"class-{number % 10}"
            if number < 10:
                folder.mkdir(parents=True)
            (folder / f"{number:08}.jpg").touch()
        print(f"{options.files:,} files are listed in {seconds(scan, many):.1f} s")


if __name__ == "__main__":
    main()
