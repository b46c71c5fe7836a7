"""Whether images are ready before TinyDiT wants them: the loader's images a second against a training step's.

    python benchmarks/data_against_step.py data/cats --num-workers 2

At TinyDiT's default size, 128 px and 256 a batch. The step is timed on the GPU if there is one, else on the CPU
(one step then takes half a minute). A step's floating-point operations are counted too: they say how fast a
GPU would have to compute, in earnest and not on its data sheet, to be kept waiting by this machine's loader.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.utils.flop_counter import FlopCounterMode

from loader import rate
from tinycats import generator
from tinycats.images import frames
from tinycats.images.batches import TrainingBatches, load_batches
from tinycats.images.datasets import open_dataset
from tinycats.models.dit import TinyDiT
from tinycats.models.flow_matching import point_on_path, velocity_loss
from tinycats.training import devices
from tinycats.training.optimization import Muon

IMAGE_SIZE = 128


class Step:
    """A training step of TinyDiT at its default size, without the loader."""

    def __init__(self) -> None:
        self.device = devices.choose("auto", mixed_precision=True)
        self.model = TinyDiT(13, IMAGE_SIZE).to(self.device.device)
        rates = 1e-3, 0.0, generator.BETA2
        self.optimizer = Muon(self.model, self.model.matrices(), *rates, self.device.optimizer_dtype)

    def __call__(self, batch_size: int) -> None:
        images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device.device)
        times = torch.rand(batch_size, device=self.device.device)
        classes = torch.zeros(batch_size, dtype=torch.int64, device=self.device.device)
        with self.device.autocast:
            predicted = self.model(point_on_path(torch.randn_like(images), images, times), times, classes)
            loss = velocity_loss(predicted, images, times)
        self.optimizer.zero_grad()
        self.device.scaler.scale(loss).backward()
        self.device.scaler.step(self.optimizer)
        self.device.scaler.update()
        loss.item()  # waits for the GPU

    def seconds(self, batch_size: int) -> float:
        """Of one step."""
        began = time.perf_counter()
        self(batch_size)
        return time.perf_counter() - began

    def operations(self) -> tuple[int, int]:
        """Floating-point operations of a step: for each image, and for the weights however many images there are."""
        counts = []
        for batch_size in (2, 4):
            with FlopCounterMode(display=False) as counter:
                self(batch_size)
            counts.append(counter.get_total_flops())
        for_image = (counts[1] - counts[0]) // 2
        return for_image, counts[0] - 2 * for_image


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("data/cats"), help="with at least 256 images")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    images = open_dataset(options.folder, frames.square(IMAGE_SIZE), options.folder.parent)
    batches = TrainingBatches(images, options.batch_size, generator.training_transform, seed=0)
    if batches.batch_size < options.batch_size:
        parser.error(f"{options.folder} has only {batches.batch_size} images to train on")
    step = Step()
    step.seconds(2)  # the first is slower than the others
    rates, seconds = [], []
    for _ in range(options.rounds):
        loader = load_batches(batches, range(41), options.num_workers, pin_memory=False)
        rates.append(rate(loader, lambda images: images))
        seconds.append(step.seconds(options.batch_size))
    ready, wanted = statistics.median(rates), options.batch_size / statistics.median(seconds)
    for_image, for_weights = step.operations()
    operations = for_image + for_weights / options.batch_size
    print(f"loader {ready:8.0f} images/s, a batch of {options.batch_size} in {options.batch_size / ready:.3f} s")
    print(f"step   {wanted:8.0f} images/s, a batch of {options.batch_size} in {options.batch_size / wanted:.3f} s")
    print(f"ratio  {ready / wanted:8.1f}x on this machine")
    muons = for_weights / options.batch_size
    print(f"A step takes {operations / 1e9:.1f} GFLOP an image, {muons / 1e9:.1f} of it Muon's:")
    print(f"the loader feeds {operations * ready / 1e12:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
