"""Where the time of a training step goes: TinyDiT's, part by part, and against what the device multiplies at best.

    python benchmarks/step.py --image-size 64 --patch-size 8 --dim 192 --depth 6 --batch-size 16
    python benchmarks/step.py --device cuda --profile

`alone` is a part with a wait for the device before and after it; `host` is how long the processor takes to hand it to
a GPU, without waiting: where these add up to more than a step, the GPU waits for the processor. The last line sets the
whole step's operations, the optimizer's among them, against those of one large matrix product in the same precision.

    python benchmarks/step.py --batch-size 16 --beside diffusers ../DiT/models.py

The whole step of each, in turn: ours in the three parts of a run, and that of others' DiT of the same shape in a plain
loop, with clipping, fused AdamW and an EMA (pip install diffusers; a clone of facebookresearch/DiT, which wants timm;
neither is in a list of ours).

    git worktree add ../before 7ac0e13
    python benchmarks/step.py --batch-size 64 --steps 8 --checkouts ../before .

The whole step of each checkout of this project, in turn, each in a process of its own.
"""

import argparse
import functools
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.utils.flop_counter import FlopCounterMode

from flow_matching_choices import OfDiffusers
from tinycats import generator
from tinycats.models import alignment, crops
from tinycats.models.dit import TinyDiT
from tinycats.models.ema import ema_model
from tinycats.models.flow_matching import point_on_path, sample_timesteps, velocity_loss
from tinycats.models.perceptual_loss import PerceptualLoss, some_at_the_end
from tinycats.training import devices
from tinycats.training.compilation import compile_if_possible
from tinycats.training.optimization import Muon, adamw
from train_dit import default_lr

CLASSES = 13
# What a step has beside the velocity's loss, in each of the three parts of a run.
PARTS_OF_A_RUN = {
    "up to 0.6 of a run": {"alignment": 0.2, "perceptual": 0.0},
    "up to 0.8": {"alignment": 0.0, "perceptual": 0.0},
    "to its end": {"alignment": 0.0, "perceptual": 0.25},
}
WARM_UP = 3  # steps that are not timed
# A process that makes a checkout's step whenever it is told, and tells how long that took.
OF_A_CHECKOUT = """
import argparse, json, sys
checkout, options = sys.argv[1], argparse.Namespace(**json.loads(sys.argv[2]))
sys.path[:0] = [f"{checkout}/benchmarks", f"{checkout}/src"]
import step
from tinycats.training import devices
device = devices.choose(options.device, options.mixed_precision)
parts = step.parts_of(options, device)
for _ in sys.stdin:
    print(step.seconds(lambda: step.one_after_another(parts), device, waiting=True), flush=True)
"""
Part = Callable[[], None]


class OfOthers(torch.nn.Module):
    """Another's DiT, asked as TinyDiT is: of crops it knows nothing, and its tokens tell nothing.

    Args:
        name: diffusers, or the file that facebookresearch/DiT has it in.
        ours: of the same shape.
    """

    def __init__(self, name: str, ours: TinyDiT):
        super().__init__()
        self.is_diffusers = name == "diffusers"
        if self.is_diffusers:
            self.model = OfDiffusers(ours)
            return
        spec = importlib.util.spec_from_file_location("facebookresearch", name)
        assert spec and spec.loader, f"{name} is no Python file"
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        dim, heads, depth = ours.position.shape[1], ours.blocks[0].heads, len(ours.blocks)
        shape = {"hidden_size": dim, "depth": depth, "num_heads": heads, "num_classes": CLASSES}
        self.model = module.DiT(ours.image_size, ours.patch_size, 3, learn_sigma=False, **shape)

    def forward(
        self, points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor, _cropped: torch.Tensor
    ) -> tuple[torch.Tensor, None]:
        """The predicted images; and nothing."""
        if self.is_diffusers:
            return self.model(points, timesteps, torch.zeros_like(classes)), None  # it was made for one class
        return points + (1 - timesteps).view(-1, 1, 1, 1) * self.model(points, timesteps, classes), None


def parts_of(options: argparse.Namespace, device: devices.Device, other: str = "") -> dict[str, Part]:
    """The parts of a step, in order, as in src/train_dit.py; or of another's DiT."""
    torch.manual_seed(0)
    shape = {name: getattr(options, name) for name in ("image_size", "patch_size", "dim", "depth", "heads")}
    ours = TinyDiT(CLASSES, **shape)
    model: torch.nn.Module = ours
    if other:
        model = network = OfOthers(other, ours).to(device.device)
        optimizer: torch.optim.Optimizer = adamw(model, 1e-4, 0.0)
    else:
        network = alignment.Aligned(ours).to(device.device)
        rates = default_lr(options.dim), 0.0, generator.BETA2
        optimizer = Muon(network, ours.matrices(), *rates, device.optimizer_dtype)
    what_is_seen = alignment.WhatIsSeen(options.image_size // options.patch_size, 1.0, device.device)
    perceptual_loss = PerceptualLoss(device.device)
    ema = ema_model(model, 0.999)
    if options.compile and other:
        model.compile()
    elif options.compile:
        compile_if_possible(ours, device, options.batch_size, None)
    images = torch.randint(256, (options.batch_size, 3, options.image_size, options.image_size), dtype=torch.uint8)
    images = images.pin_memory() if device.is_gpu else images
    labels = torch.randint(CLASSES, (options.batch_size,))
    rng = torch.Generator().manual_seed(0)
    path: tuple[torch.Tensor, ...] = ()
    seen: tuple[torch.Tensor, ...] = ()
    loss = torch.zeros(())

    def take() -> None:
        nonlocal path
        timesteps = sample_timesteps(options.batch_size, rng)
        if options.perceptual:
            timesteps = some_at_the_end(timesteps, 0)
        cropped = device.put(crops.sample_crops(options.batch_size, crops.PROBABILITY, rng))
        targets = crops.crop(generator.to_unit(device.put(images)), cropped)
        path = torch.randn_like(targets), targets, timesteps, device.put(labels), cropped

    def see() -> None:
        nonlocal seen
        if options.alignment:
            with device.autocast:
                seen = what_is_seen(images)

    def forward() -> None:
        nonlocal loss
        optimizer.zero_grad(set_to_none=True)
        noise, targets, timesteps, *conditions = path
        with device.autocast:
            now = device.put(timesteps)
            predicted, told = network(point_on_path(noise, targets, now), now, *conditions)
            loss = velocity_loss(predicted, targets, now)
            if options.perceptual:
                loss = loss + options.perceptual * perceptual_loss(predicted, targets, timesteps)
            if options.alignment:
                loss = loss + options.alignment * alignment.misalignment(told, seen[0]).mean()

    def backward() -> None:
        device.scaler.scale(loss).backward()

    def clip() -> None:
        device.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)

    def step() -> None:
        device.scaler.step(optimizer)
        device.scaler.update()

    def average() -> None:
        ema.update_parameters(model)

    first = {"images": take, "seen": see, "forward": forward, "backward": backward}
    return first | {"clip": clip, "optimizer": step, "EMA": average}


def wait(device: devices.Device) -> None:
    if device.is_gpu:
        torch.cuda.synchronize()


def seconds(part: Part, device: devices.Device, *, waiting: bool) -> float:
    if waiting:
        wait(device)
    began = time.perf_counter()
    part()
    if waiting:
        wait(device)
    return time.perf_counter() - began


def flops_at_best(device: devices.Device, side: int) -> float:
    """Operations a second of a product of two square matrices: the most of five."""
    with device.autocast:
        dtype = (torch.ones(1, 1, device=device.device) @ torch.ones(1, 1, device=device.device)).dtype
    matrix = torch.randn(side, side, device=device.device, dtype=dtype)
    return 2 * side**3 / min(seconds(lambda: matrix @ matrix, device, waiting=True) for _ in range(6))


def one_after_another(parts: dict[str, Part]) -> None:
    for part in parts.values():
        part()


def print_medians(options: argparse.Namespace, steps: dict[str, Callable[[], float]]) -> None:
    """Of steps that tell how long they took, made in turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + options.steps):
        for name, step in steps.items():
            times[name].append(step())
    print("| step | ms | images/s |\n|---|---|---|")
    for name, took in times.items():
        median = statistics.median(took[WARM_UP:])
        print(f"| {name} | {1000 * median:.0f} | {options.batch_size / median:.1f} |")


def compare(options: argparse.Namespace, device: devices.Device) -> None:
    """Whole steps, ours and others'."""
    models = {}
    for part, losses in PARTS_OF_A_RUN.items():
        models[f"TinyDiT, {part}"] = parts_of(argparse.Namespace(**vars(options) | losses), device)
    alone = argparse.Namespace(**vars(options) | PARTS_OF_A_RUN["up to 0.8"])
    for name in options.beside:
        models[name] = parts_of(alone, device, name)

    def timed(parts: dict[str, Part]) -> float:
        return seconds(lambda: one_after_another(parts), device, waiting=True)

    print_medians(options, {name: functools.partial(timed, parts) for name, parts in models.items()})


def compare_checkouts(options: argparse.Namespace) -> None:
    """Whole steps of several checkouts."""

    def started(checkout: str) -> subprocess.Popen:
        words = [sys.executable, "-c", OF_A_CHECKOUT, checkout, json.dumps(vars(options))]
        return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def timed(process: subprocess.Popen) -> float:
        print(file=process.stdin, flush=True)
        return float(process.stdout.readline())

    processes = {checkout: started(checkout) for checkout in options.checkouts}
    print_medians(options, {checkout: functools.partial(timed, process) for checkout, process in processes.items()})
    for process in processes.values():
        process.communicate()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--alignment", type=float, default=0.2, help="0: as in the last part of a run, without")
    parser.add_argument("--perceptual", type=float, default=0.0, help="0.25: as in the last part of a run")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--mixed-precision", action=argparse.BooleanOptionalAction, default=True)
    compared = parser.add_mutually_exclusive_group()
    compared.add_argument(
        "--beside", nargs="+", default=[], metavar="DIT", help="diffusers, or facebookresearch's file"
    )
    compared.add_argument("--checkouts", nargs="+", default=[], metavar="DIR", help="of this project, to be compared")
    parser.add_argument("--profile", action="store_true", help="the kernels that take the longest")
    options = parser.parse_args()
    for name in options.beside:
        if name != "diffusers" and not (name.endswith(".py") and Path(name).is_file()):
            parser.error(f"--beside {name}: neither diffusers nor a Python file")
    for checkout in options.checkouts:
        if not Path(checkout, "benchmarks", "step.py").is_file():
            parser.error(f"--checkouts {checkout}: no checkout of this project")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.compile is None:
        options.compile = devices.find(options.device).type == "cuda"
    if options.checkouts:
        compare_checkouts(options)
        return
    device = devices.choose(options.device, options.mixed_precision)
    if options.beside:
        compare(options, device)
        return
    parts = parts_of(options, device)
    step = functools.partial(one_after_another, parts)
    for _ in range(WARM_UP):
        step()
    alone: dict[str, list[float]] = {name: [] for name in parts}
    host: dict[str, list[float]] = {name: [] for name in parts}
    wait(device)
    began = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait(device)
    whole = (time.perf_counter() - began) / options.steps
    for _ in range(options.steps):
        for name, part in parts.items():
            alone[name].append(seconds(part, device, waiting=True))
    for _ in range(options.steps):
        wait(device)
        for name, part in parts.items():
            host[name].append(seconds(part, device, waiting=False))
    print("| part | alone, ms | host, ms |\n|---|---|---|")
    for name in parts:
        print(f"| {name} | {1000 * statistics.median(alone[name]):.2f} | {1000 * statistics.median(host[name]):.2f} |")
    totals = (sum(statistics.median(times) for times in which.values()) for which in (alone, host))
    print("| sum |", " | ".join(f"{1000 * total:.2f}" for total in totals), "|")

    options.compile = False  # a compiled model's operations are not seen
    uncompiled = parts_of(options, device)
    for name in ("images", "seen"):
        uncompiled[name]()  # what is seen is remembered: looking is not part of a step
    with FlopCounterMode(display=False) as counter:
        one_after_another(uncompiled)
    used = counter.get_total_flops() / whole
    best = flops_at_best(device, 8192 if device.is_gpu else 1024)
    print(f"a step {1000 * whole:.2f} ms, {options.batch_size / whole:.0f} images/s,", end=" ")
    print(f"{used / 1e12:.2f} of {best / 1e12:.2f} TFLOP/s: {used / best:.0%}")
    if options.profile:
        with torch.profiler.profile() as profile:
            for _ in range(5):
                step()
            wait(device)
        by = "self_cuda_time_total" if device.is_gpu else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))


if __name__ == "__main__":
    main()
