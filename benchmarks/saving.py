"""How long saving a checkpoint holds training up: written at once, or copied and written by a thread.

    python benchmarks/saving.py --gigabytes 0.5 5

One after another; «held» is how long the training loop waits, «durable» when the file is synced. What is on a GPU is
copied to pinned memory.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from tinycats.run import checkpoints
from tinycats.run.saving import Writer

TENSOR = 2**24  # numbers in each of the checkpoint's tensors


def seconds(function: Callable[[], object]) -> float:
    """That a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[0.5, 5])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write; the temporary folder by default")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| GB | written at once: held, s | by a thread: held, s | the first time, s | durable, s | ratio |")
    print("|---|---|---|---|---|---|")
    for size in options.gigabytes:
        count = max(1, round(size * 1e9 / 4 / TENSOR))
        numbers = round(size * 1e9 / 4 / count)
        state = {"step": 1, "model": {str(n): torch.rand(numbers, device=device) for n in range(count)}}
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            writer, save = Writer(), functools.partial(checkpoints.save_checkpoint, folder)
            at_once, held, durable = [], [], []
            for _ in range(options.rounds + 1):
                at_once.append(seconds(lambda: save(state)))  # noqa: B023  called here
                held.append(seconds(lambda: writer.save(save, state)))  # noqa: B023
                durable.append(held[-1] + seconds(writer.wait))
            writer.close()
        before, after = statistics.median(at_once[1:]), statistics.median(held[1:])
        row = (before, after, held[0], statistics.median(durable[1:]))
        print(f"| {size:g} | {' | '.join(f'{value:.2f}' for value in row)} | {before / after:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
