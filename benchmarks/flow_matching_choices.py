"""What TinyDiT should predict and with which last layer, how its errors should be weighed over time, and what should
move its weights, how far.

    python benchmarks/flow_matching_choices.py cat-faces-64 --steps 2500
    python benchmarks/flow_matching_choices.py cat-faces-64 --image-size 64 --dim 192 --batch-size 16 --seconds 420

Every variant begins from the same weights and sees the same images and the same noise in the same order, for as many
steps or for as long. Compared are the EMAs, on validation images: the error of the velocity at timesteps up to 0.9, and
the sliced Wasserstein distance of as many samples (x 1000, mean over the levels of the pyramid; the first line is
that of real images), which does not see their contrast: hence the deviation of their pixels as a part of that
of the validation images' pixels. Then what a network trained on ImageNet sees in them (image_features.py), at their
size, at half and at a quarter of it. `<output>/<variant>.png` shows 16 samples, from the same noise each.

A bound: the error of the image is divided by the time that is left, which makes it that of the velocity, but by no
less than the bound (the product's, if none is named; 1 leaves it the error of the image). Velocity: that is what is
predicted, not the image. Narrow, late, uniform: other timesteps to train at than the product's; a tenth uniform: one
timestep in ten is uniform. Usual: the position embedding of the DiT paper, AdamW's usual memory of squared gradients.
AdamW: for all weights, instead of Muon for the blocks' matrices. Patches: each is drawn by its token alone, no
convolution across their borders. Seen by patches: tokens do not overlap where they are made. Not normalised: queries
and keys. Before both: neither. Decay: weights are pulled towards zero, by 0.1. Paired noise: of its batch's noise an
image gets what it is like (arXiv 2304.14772). Not aligned: tokens do not learn to tell what a network sees. Not
perceptual: predicted images are not to look right to it, late in the run. Neither is done to a model inside another
(sees noise, velocity). Diffusers: DiTTransformer2DModel of the same shape in a plain loop, which predicts the velocity
at uniform timesteps and is moved by AdamW (pip install diffusers; it is in no list of ours, and no test runs it). Sees
noise: what is predicted is mixed with the noisy image, the more of it the less noise it has.
"""

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.optim.lr_scheduler import LambdaLR
from torchvision.utils import make_grid, save_image

from image_features import ImageFeatures
from sample_quality import distances_in_words, features, likeness_in_words, training_images, validation_images
from tinycats import generator
from tinycats.images import frames
from tinycats.images.batches import TrainingBatches, load_batches
from tinycats.images.datasets import open_dataset
from tinycats.images.packed_images import PackedImages
from tinycats.models import alignment, flow_matching, perceptual_loss
from tinycats.models.dit import TinyDiT, modulate, sinusoids, unpatchify
from tinycats.models.ema import EarlierEMA, ema_model
from tinycats.models.sliced_wasserstein import pyramid_distances
from tinycats.training import devices
from tinycats.training.optimization import Muon, adamw, warmup_cosine, warmup_stable_decay
from train_dit import CFG_SCALE, default_ema_beta, default_lr

Timesteps = Callable[[int, torch.Generator], torch.Tensor]


def drawn_by_patches(model: TinyDiT) -> TinyDiT:
    """The same model, with the last layer of the DiT paper."""

    class Patches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            dim = model.position.shape[1]
            self.adaLN_modulation, self.norm = model.final_layer.adaLN_modulation, model.final_layer.norm
            self.linear = torch.nn.Linear(dim, 3 * model.patch_size**2)
            torch.nn.init.zeros_(self.linear.weight)
            torch.nn.init.zeros_(self.linear.bias)

        def forward(self, tokens: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
            shift, scale = self.adaLN_modulation(condition).chunk(2, dim=1)
            return unpatchify(self.linear(modulate(self.norm(tokens), shift, scale)), model.patch_size)

    model.final_layer = Patches()
    return model


def seen_by_patches(model: TinyDiT) -> TinyDiT:
    """The same model, whose tokens are made of their own patches alone, as in the DiT paper."""
    embedder, side = model.x_embedder, model.patch_size
    own = slice(side // 2, side // 2 + side)
    embedder.weight = torch.nn.Parameter(embedder.weight.detach()[:, :, own, own].contiguous())
    embedder.padding = (0, 0)
    torch.nn.init.xavier_uniform_(embedder.weight.flatten(1))
    return model


def not_normalised(model: TinyDiT) -> TinyDiT:
    """The same model, whose queries and keys are as long as they are."""
    for block in model.blocks:
        block.query_norm = block.key_norm = torch.nn.Identity()
    return model


class SeesNoise(torch.nn.Module):
    """The same model, whose output is mixed with the noisy image as in arXiv 2206.00364 (equation 7), with the
    deviation of an image's finest detail, a tenth, for that of images."""

    def __init__(self, model: TinyDiT):
        super().__init__()
        self.model, self.matrices = model, model.matrices

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        t = timesteps.view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 + (0.1 * t) ** 2
        predicted = self.model(points, timesteps, classes)
        return 0.1**2 * t / variance * points + (1 - t) / variance.sqrt() * predicted


class PredictsVelocity(torch.nn.Module):
    """The same model, whose output is taken for the velocity: what it predicts is where that leads."""

    def __init__(self, model: TinyDiT):
        super().__init__()
        self.model, self.matrices = model, model.matrices

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        return points + (1 - timesteps).view(-1, 1, 1, 1) * self.model(points, timesteps, classes)


class OfDiffusers(torch.nn.Module):
    """diffusers' transformer of the same shape, which predicts the velocity."""

    def __init__(self, model: TinyDiT):
        super().__init__()
        from diffusers import DiTTransformer2DModel

        dim, heads = model.position.shape[1], model.blocks[0].heads
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=3,
            out_channels=3,
            num_layers=len(model.blocks),
            sample_size=model.image_size,
            patch_size=model.patch_size,
            num_embeds_ada_norm=1,
        )

    def forward(self, points: torch.Tensor, timesteps: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        # Its timesteps count a thousand steps towards noise.
        velocity = self.transformer(points, timestep=1000 * (1 - timesteps), class_labels=classes).sample
        return points + (1 - timesteps).view(-1, 1, 1, 1) * velocity


def usual_positions(model: TinyDiT) -> TinyDiT:
    """The same model with the position embedding of the DiT paper, whose waves are those made for sentences."""
    side, dim = model.image_size // model.patch_size, model.position.shape[1]
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    model.position.copy_(torch.cat([sinusoids(axis.flatten(), dim // 2) for axis in (rows, columns)], dim=1))
    return model


def uniform(count: int, rng: torch.Generator) -> torch.Tensor:
    """Timesteps anywhere on the path alike."""
    return torch.rand(count, generator=rng)


def tenth_uniform(count: int, rng: torch.Generator) -> torch.Tensor:
    """The product's timesteps, but for one in ten, so that the end of the path is seen more often."""
    evenly = torch.rand(count, generator=rng) < 0.1
    return torch.where(evenly, uniform(count, rng), flow_matching.sample_timesteps(count, rng))


LATE = functools.partial(flow_matching.sample_timesteps, mean=-0.4)
NARROW = functools.partial(flow_matching.sample_timesteps, std=0.8)


def pairing(noise: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """int64 [B]: of a batch, which noise each image gets: those that are most alike find each other first."""
    likeness = noise.flatten(1) @ images.flatten(1).T
    chosen = torch.empty(len(images), dtype=torch.int64)
    for _ in images:
        one, other = divmod(int(likeness.argmax()), len(images))
        chosen[other] = one
        likeness[one] = likeness[:, other] = -torch.inf
    return chosen


def warmup_constant(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: int) -> LambdaLR:
    """As the others, but it stays up."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)))


VARIANTS: dict[str, dict] = {
    "chosen": {},
    "adamw": {"muon": False},
    "patches": {"wrap": drawn_by_patches},
    "seen by patches": {"wrap": seen_by_patches},
    "not normalised": {"wrap": not_normalised},
    "before both": {"wrap": lambda model: seen_by_patches(not_normalised(model))},
    "patches, adamw": {"wrap": drawn_by_patches, "muon": False},
    "diffusers": {
        "wrap": OfDiffusers,
        "muon": False,
        "timesteps": uniform,
        "schedule": warmup_constant,
        "beta2": 0.999,
    },
    "decay": {"weight_decay": 0.1},
    "paired noise": {"paired": True},
    "not aligned": {"alignment_weight": 0.0},
    "not perceptual": {"perceptual_weight": 0.0},
    "sees noise": {"wrap": SeesNoise},
    "velocity": {"wrap": PredictsVelocity},
    "constant rate": {"schedule": warmup_constant},
    "cosine": {"schedule": warmup_cosine},
    "uniform": {"timesteps": uniform},
    "a tenth uniform": {"timesteps": tenth_uniform},
    "usual positions": {"wrap": usual_positions},
    "usual beta2": {"beta2": 0.999},
    "usual both": {"wrap": usual_positions, "beta2": 0.999},
    "narrow": {"timesteps": NARROW},
    "narrow, bound 0.5": {"timesteps": NARROW, "bound": 0.5},
    "narrow, bound 1": {"timesteps": NARROW, "bound": 1.0},
    "late": {"timesteps": LATE},
    "late, velocity": {"timesteps": LATE, "wrap": PredictsVelocity},
    "late, bound 0.2": {"timesteps": LATE, "bound": 0.2},
    "late, bound 0.5": {"timesteps": LATE, "bound": 0.5},
    "late, bound 1": {"timesteps": LATE, "bound": 1.0},
}


@torch.no_grad()
def velocity_error(model: torch.nn.Module, images: torch.Tensor) -> float:
    """The mean squared error of the velocity at timesteps spread evenly over nine tenths of the path,
    with fixed noise."""
    rng = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=rng)
    timesteps = 0.9 * (torch.randperm(len(images), generator=rng) + 0.5) / len(images)
    classes = torch.zeros(len(images), dtype=torch.int64)
    path = flow_matching.point_on_path(noise, images, timesteps), timesteps, classes
    parts = zip(*(whole.split(64) for whole in path), strict=True)
    predicted = torch.cat([model(*part) for part in parts])
    return flow_matching.velocity_loss(predicted, images, timesteps, min_time_left=0.0).item()


def train(
    images: PackedImages,
    options: argparse.Namespace,
    wrap: Callable[[TinyDiT], torch.nn.Module] = lambda model: model,
    timesteps: Timesteps = flow_matching.sample_timesteps,
    schedule: Callable[..., LambdaLR] = warmup_stable_decay,
    bound: float = flow_matching.MIN_TIME_LEFT,
    beta2: float = generator.BETA2,
    weight_decay: float = 0.0,
    muon: bool = True,
    paired: bool = False,
    alignment_weight: float = 0.2,
    perceptual_weight: float = 0.25,
) -> tuple[torch.nn.Module, torch.nn.Module | None, int]:
    """The EMA of a model trained on the images, as if they were of one class, its guide, and the steps that it took."""
    torch.manual_seed(options.seed)
    model = wrap(TinyDiT(1, options.image_size, options.patch_size, options.dim, options.depth, options.heads))
    ema, earlier = ema_model(model, options.ema_beta), EarlierEMA()
    with torch.random.fork_rng():  # the noise is the same with and without
        aligned = alignment.Aligned(model) if isinstance(model, TinyDiT) and alignment_weight else None
        what_is_seen = alignment.WhatIsSeen(options.image_size // options.patch_size, 1.0)
        unlike = perceptual_loss.PerceptualLoss() if isinstance(model, TinyDiT) and perceptual_weight else None
    device = devices.choose("cpu", mixed_precision=True)
    optimizer = adamw(aligned or model, options.lr, weight_decay, beta2)
    if muon:
        optimizer = Muon(aligned or model, model.matrices(), options.lr, weight_decay, beta2, device.optimizer_dtype)
    # The rate's way, in steps or in thousandths of the time.
    length = 1000 if options.seconds else options.steps
    rate = schedule(optimizer, length // 10, length)
    batches = TrainingBatches(images, options.batch_size, generator.training_transform, options.seed)
    steps, passed, began = 0, 0.0, time.perf_counter()
    for images, labels in load_batches(batches, itertools.count(), 0, pin_memory=False):
        targets = generator.to_unit(images)
        noise, now = torch.randn_like(targets), timesteps(len(targets), torch.default_generator)
        if paired:
            noise = noise[pairing(noise, targets)]
        late = unlike is not None and passed >= perceptual_loss.BEGINS * length
        if late:
            now = perceptual_loss.some_at_the_end(now, steps)
        points, beside = flow_matching.point_on_path(noise, targets, now), torch.zeros(())
        with device.autocast:
            if aligned and passed < alignment.PART * length:
                predicted, told = aligned(points, now, 0 * labels)
                beside = alignment_weight * alignment.misalignment(told, what_is_seen(images)[0]).mean()
            else:
                predicted = model(points, now, 0 * labels)
            if late:
                beside = beside + perceptual_weight * unlike(predicted, targets, now)
            loss = beside + flow_matching.velocity_loss(predicted, targets, now, bound)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_((aligned or model).parameters(), 1.0)
        optimizer.step()
        ema.update_parameters(model)
        steps += 1
        earlier.update(ema, steps)
        passed = length * (time.perf_counter() - began) / options.seconds if options.seconds else steps
        if passed >= length:
            break
        while rate.last_epoch < int(passed):
            rate.step()
    return ema, earlier.model(ema.module), steps


def main() -> None:
    """Train each variant, print its numbers, write its samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seconds", type=float, help="for each variant, instead of steps")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, help="the product's rule by width, if none is named")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=8)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--ema-beta", type=float, help="the product's rule by steps, if none is named; 0.999 by time")
    parser.add_argument("--cfg-scale", type=float, default=CFG_SCALE, help="guidance")
    parser.add_argument("--churn", type=float, default=flow_matching.CHURN, help="noise that sampling adds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/choices"))
    options = parser.parse_args()
    if options.lr is None:
        options.lr = default_lr(options.dim)
    if options.ema_beta is None:
        options.ema_beta = 0.999 if options.seconds else default_ema_beta(options.steps)

    options.output.mkdir(parents=True, exist_ok=True)
    images = open_dataset(options.folder, frames.square(options.image_size), options.folder.parent)
    real, _ = validation_images(images)
    others = training_images(images)[: len(real)]
    print(f"{'real images':58} distance {distances_in_words(pyramid_distances(others, real))}", flush=True)
    device, network = devices.choose("cpu", mixed_precision=True), ImageFeatures()
    seen = features(real, network)
    for name in options.variants:
        began = time.perf_counter()
        model, guide, steps = train(images, options, **VARIANTS[name])
        seconds = time.perf_counter() - began
        how = {"guidance_scale": options.cfg_scale, "guide": guide, "churn": options.churn}
        parts = [range(len(real))[first : first + 64] for first in range(0, len(real), 64)]
        with device.autocast:
            samples = torch.cat(
                [
                    flow_matching.sample(
                        model,
                        generator.noise_of(part, options.image_size, seed=0),
                        torch.zeros(len(part), dtype=torch.int64),
                        0,
                        **how,
                    )
                    for part in parts
                ]
            ).clamp(-1, 1)
            error = velocity_error(model, real)
        words = f"contrast {samples.std() / real.std():.2f}  "
        words += f"distance {distances_in_words(pyramid_distances(samples, real))}"
        print(f"{name:20} {seconds:5.0f} s  {steps:6} steps  error {error:.4f}  {words}")
        print(likeness_in_words(features(samples, network), seen), flush=True)
        grid = make_grid((samples[:16] + 1) / 2, nrow=16, padding=2, pad_value=1)
        save_image(grid, options.output / f"{name.replace(',', '').replace(' ', '_')}.png")


if __name__ == "__main__":
    main()
