"""Everything that only a GPU can show, in one command: `make gpu`. Without a GPU it says so, and that is all.

    python benchmarks/gpu.py data/cats

Both scripts train in each precision, compiled and not, stopped and resumed, on one GPU and on all there are; each
against the same run on the CPU. The classifier sees the same images there, augmented alike: its losses differ by
rounding alone, which a hundred steps make large. TinyDiT's noise comes from the device's own generator: its losses
are other samples of the same mean. Peaks are the data sheets', dense, in 16 bits.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.utils.flop_counter import FlopCounterMode

from tinycats import classifier
from tinycats.models.dit import TinyDiT

REPOSITORY = Path(__file__).parents[1]
TOLERANCE = {"train.py": 0.10, "train_dit.py": 0.10}  # of the last validation loss, relative
TFLOPS = {"T4": 65, "L4": 121, "A10": 125, "L40S": 362, "A100": 312, "H100": 989, "H200": 989, "B200": 2250}


@dataclass(frozen=True)
class Variant:
    """A way to run a script: the options that it adds, and whether it is stopped in the middle, on one GPU."""

    name: str
    options: tuple[str, ...]
    stopped: bool = False
    one_gpu: bool = True


@dataclass(frozen=True)
class Outcome:
    """What became of a run: its last validation loss; from its log what it waited for images, GiB, seconds before."""

    val_loss: float
    images_per_second: float
    waited: str
    peak: str
    before: float


def operations(script: str, size: int) -> int:
    """Floating-point operations for an image in a training step."""
    if script == "train.py":
        model, inputs = classifier.build("resnet18", 13, pretrained=False), [torch.rand(2, 3, size, size)]
    else:
        model = TinyDiT(13, size)
        inputs = [torch.rand(2, 3, size, size), torch.rand(2), torch.zeros(2, dtype=torch.int64)]
    with FlopCounterMode(display=False) as counter:
        model(*inputs).sum().backward()
    return counter.get_total_flops() // 2


def run(script: str, data: Path, settings: list[str], variant: Variant, cwd: Path) -> Outcome:
    """Run a script to its end, after a stop in the middle if the variant wants that."""
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": "0"} if variant.one_gpu else {})
    command = [sys.executable, "-u", str(REPOSITORY / "src" / script)]
    name = re.sub(r"\W+", "-", f"{script} {variant.name}")
    arguments = [str(data.resolve()), *settings, *variant.options, "--run", name]
    log = ""
    if variant.stopped:
        process = subprocess.Popen([*command, *arguments], cwd=cwd, env=environment, stdout=-1, text=True)
        for line in process.stdout:
            log += line
            if "until the first step" in line:
                process.send_signal(signal.SIGTERM)
        process.wait()
        arguments = ["--resume", name]
    log += subprocess.run([*command, *arguments], cwd=cwd, env=environment, stdout=-1, text=True, check=True).stdout
    rows = [json.loads(row) for row in (cwd / "outputs" / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    rates = re.findall(r"\| (\d+) images/s, (\d+%)", log) or [
        (float(steps) * int(settings[settings.index("--batch-size") + 1]), waited)
        for steps, waited in re.findall(r"\| ([\d.]+) steps/s, (\d+%)", log)
    ]
    peak = re.findall(r"([\d.]+ GiB) of GPU memory at the peak", log)
    before = float(re.findall(r"([\d.]+) seconds until the first step", log)[-1])
    loss = [row["val_loss"] for row in rows if "val_loss" in row][-1]
    return Outcome(loss, float(rates[-1][0]), rates[-1][1], peak[-1] if peak else "-", before)


def main() -> int:
    """Measure, compare and print; 1 if a loss is not what the CPU's is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("data/toy"))
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="of TinyDiT")
    parser.add_argument("--epochs", type=int, default=4, help="of the classifier")
    parser.add_argument("--pretend", action="store_true", help="on the CPU, to see that this script works")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.pretend:
        print("There is no CUDA GPU here: nothing to show. (--pretend runs all of it on the CPU.)")
        return 0
    device = "auto" if options.pretend else "cuda"
    gpu = "none" if options.pretend else torch.cuda.get_device_name()
    peak = next((tflops for name, tflops in TFLOPS.items() if name in gpu), None)
    gpus = torch.cuda.device_count()
    shared = ["--image-size", str(options.image_size), "--batch-size", str(options.batch_size), "--lr", "1e-3"]
    scripts = {
        "train.py": [*shared, "--no-pretrained", "--epochs", str(options.epochs)],
        "train_dit.py": [*shared, "--patch-size", "8", "--steps", str(options.steps), "--sample-steps", "5"],
    }
    print(f"{gpu}, {gpus} of them; torch {torch.__version__}\n")
    print("| script | run | validation loss | images/s | of the peak | waited | memory | s before |")
    print("|---|---|---|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory() as name:
        for script, settings in scripts.items():
            on_gpu = ("--device", device)
            variants = [
                Variant("the CPU", ("--device", "cpu")),
                Variant("float32", (*on_gpu, "--no-mixed-precision")),
                Variant("mixed", on_gpu),
                Variant("mixed, resumed", on_gpu, stopped=True),
            ]
            if script == "train_dit.py":
                variants += [
                    Variant("mixed, not compiled", (*on_gpu, "--no-compile")),
                    Variant("mixed, in two parts", (*on_gpu, "--accumulate", "2")),
                ]
            if gpus > 1:
                variants.append(Variant(f"mixed, {gpus} GPUs", on_gpu, one_gpu=False))
            reference = None
            for variant in variants:
                outcome = run(script, options.data, settings, variant, Path(name))
                reference = reference or outcome
                is_far = abs(outcome.val_loss / reference.val_loss - 1) > TOLERANCE[script]
                failed |= is_far
                share = "-"
                if peak and variant.name != "the CPU":
                    used = operations(script, options.image_size) * outcome.images_per_second / 1e12
                    share = f"{used / peak / (1 if variant.one_gpu else gpus):.1%}"
                loss = f"{outcome.val_loss:.4f}{' (far from the CPU)' if is_far else ''}"
                row = (script, variant.name, loss, f"{outcome.images_per_second:.0f}", share, outcome.waited)
                print("|", " | ".join([*row, outcome.peak, f"{outcome.before:.1f}"]), "|", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
