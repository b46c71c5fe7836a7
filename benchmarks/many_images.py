"""What a thousand and ten million images cost: to open, to take a batch from, in memory.

    python benchmarks/many_images.py 1000 100000 1000000 10000000

The pixels are made up: zeros in a file without blocks on disk, whose pages are in memory before batches are timed. Each
count is measured in a process of its own; memory is that process's own (anonymous), and what of the mapped files it has
touched, which it shares with all others and which the system takes back when it likes. `first` is a batch whose images
are verified because they were never read before; `again`, all others.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np

from tinycats import generator
from tinycats.images import frames
from tinycats.images.batches import TrainingBatches
from tinycats.images.packed_images import IMAGES, PATHS, PIXELS, RECORD, PackedImages, write_index

BATCH_SIZE, BATCHES = 256, 200


def make_up(folder: Path, count: int, side: int) -> None:
    """A packed folder of `count` black images in two classes."""
    size, path = 3 * side**2, len("train/00000000.jpg")
    records = np.zeros(count, RECORD)
    records["pixels_end"] = np.arange(1, count + 1, dtype=np.uint64) * size
    records["path_end"] = np.arange(1, count + 1, dtype=np.uint64) * path
    records["height"] = records["width"] = side
    records["crc32"] = zlib.crc32(bytes(size))
    records["label"] = np.arange(count) % 2
    records.tofile(folder / IMAGES)
    with (folder / PATHS).open("wb") as paths:
        for start in range(0, count, 10**5):
            paths.write(b"".join(b"train/%08d.jpg" % number for number in range(start, min(count, start + 10**5))))
    with (folder / PIXELS).open("wb") as pixels:
        pixels.truncate(count * size)
    facts = {"frame": asdict(frames.square(side)), "classes": ["a", "b"], "images": count, "train": count - count // 5}
    write_index(folder, facts | {"content": "made up", "unreadable": [], "unreadable_count": 0})


def memory() -> dict[str, float]:
    """This process's own memory and that of files it has mapped, in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(status[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}


def milliseconds(action: Callable[[int], object], numbers: range) -> float:
    """The median over the numbers, which are passed to the action."""
    times = []
    for number in numbers:
        began = time.perf_counter()
        action(number)
        times.append(time.perf_counter() - began)
    return 1000 * statistics.median(times)


def measure(folder: Path) -> dict[str, float]:
    """What one process sees."""
    before = memory()
    began = time.perf_counter()
    images = PackedImages(folder)
    opened = time.perf_counter() - began
    batches = TrainingBatches(images, BATCH_SIZE, generator.training_transform, seed=0)
    batches[0]
    after = memory()
    images._pixels[::4096].sum()  # every page is mapped now: what follows is computing, not paging
    first = milliseconds(batches.__getitem__, range(1, 1 + max(3, BATCHES // 10)))
    images._is_verified[:] = True
    again = milliseconds(batches.__getitem__, range(BATCHES))
    grown = {name: after[name] - before[name] for name in after}
    return {"opened": opened, "first": first, "again": again} | grown


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("counts", type=int, nargs="*", default=[10**3, 10**5, 10**6, 10**7])
    parser.add_argument("--side", type=int, default=16, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many processes")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    print(f"| images of {options.side} px | open, s | first, ms | again, ms | against {options.counts[0]:,} |", end="")
    print(" own memory, MB | files, MB |\n|---|---|---|---|---|---|---|")
    base = None
    for count in options.counts:
        with tempfile.TemporaryDirectory() as name:
            make_up(Path(name), count, options.side)
            command = [sys.executable, __file__, "--measure", name]
            rounds = [json.loads(subprocess.check_output(command)) for _ in range(options.rounds)]
        seen = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
        base = base or seen["again"]
        costs = f"{seen['opened']:.3f} | {seen['first']:.2f} | {seen['again']:.2f} | {seen['again'] / base:.2f}x"
        print(f"| {count:,} | {costs} | {seen['RssAnon']:.0f} | {seen['RssFile']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
