"""The cat generator: TinyDiT's images, its grids of samples, its file."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import pad

from tinycats.images.augmentation import BatchRng, mirror_half
from tinycats.images.batches import SAMPLING, seed_for
from tinycats.models.crops import NUMBERS
from tinycats.models.dit import TinyDiT
from tinycats.models.flow_matching import STEPS, sample
from tinycats.run import checkpoints
from tinycats.run.finished import require_classes
from tinycats.script.errors import UserError
from tinycats.training.processes import Processes

# A grid of samples: a row a class. Each image takes an evaluation of the model a step, two where it is guided.
COLUMNS = 8

# AdamW's memory of squared gradients while training: twenty steps, not the usual thousand (ADR-026).
BETA2 = 0.95


def training_transform(images: np.ndarray, rng: BatchRng) -> np.ndarray:
    """Square images, uint8 [B, S, S, 3], mirrored or not."""
    return mirror_half(images, rng)


def validation_transform(images: np.ndarray, _rng: BatchRng) -> np.ndarray:
    """Square images as they are."""
    return images


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32 in [-1, 1]."""
    return images.float().div_(127.5).sub_(1)  # in place: on a CPU, memory that is new costs more than computing


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """float [B, 3, S, S] in [-1, 1] (what is outside is cut off) -> uint8."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def png(image: torch.Tensor) -> bytes:
    """An image, uint8 [3, H, W], as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


def noise_of(
    numbers: Iterable[int], image_size: int, seed: int, device: torch.device | str = "cpu"
) -> Iterator[torch.Tensor]:
    """Noise after noise for `sample`, each float32 [len(numbers), 3, S, S]. That of number n depends on the seed and n
    alone, so that the same images are sampled in batches of any size, on any machine."""
    rngs = [torch.Generator().manual_seed(seed_for(seed, SAMPLING, n)) for n in numbers]
    while True:
        noise = [torch.randn(3, image_size, image_size, generator=rng) for rng in rngs]
        yield torch.stack(noise).to(device)


def sample_grid(
    model: torch.nn.Module,
    num_classes: int,
    image_size: int,
    guidance_scale: float,
    steps: int,
    guide: torch.nn.Module | None = None,
    processes: Processes = Processes(),  # noqa: B008  it is immutable
) -> torch.Tensor | None:
    """uint8 [3, H, W]: a row a class, a column a noise, and always the same noise; in process 0 alone.

    Args:
        model: TinyDiT or its EMA, on any device.
        steps, guide: as of `sample`.
        processes: each samples some of the rows.
    """
    device = next(model.parameters()).device
    rows = []
    for label in range(num_classes)[processes.share(num_classes)]:
        classes = torch.full((COLUMNS,), label, device=device)
        noise = noise_of(range(COLUMNS), image_size, seed=0, device=device)
        samples = sample(model, noise, classes, num_classes, steps=steps, guidance_scale=guidance_scale, guide=guide)
        rows.append(to_bytes(samples).cpu())
    from torchvision.utils import make_grid  # takes two seconds to import, which need not pass before training

    shares = processes.gather(rows)
    if shares is None:
        return None
    return make_grid(torch.cat([row for share in shares for row in share]), nrow=COLUMNS, padding=2, pad_value=255)


@dataclass(frozen=True)
class Generator:
    """A finished generator, from `load`."""

    model: TinyDiT
    guide: TinyDiT | None
    classes: tuple[str, ...]
    guidance_scale: float
    metrics: dict[str, Any]

    def sample(
        self,
        names: Sequence[str],
        *,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
        guidance_scale: float | None = None,
        batch_size: int = 16,
        steps: int = STEPS,
    ) -> torch.Tensor:
        """uint8 [len(names), 3, S, S], on the CPU: an image of each named class.

        Args:
            numbers: of each image's noise, as of `noise_of` (default: 0, 1, 2, …).
            guidance_scale: as of `sample`; None: as the model was trained to be sampled.
            steps: as of `sample`.

        Raises:
            UserError: there is no such class.
        """
        require_classes(names, self.classes)
        if not names:
            return torch.empty(0, 3, self.model.image_size, self.model.image_size, dtype=torch.uint8)
        device = self.model.position.device
        labels = torch.tensor([self.classes.index(name) for name in names], device=device)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        how: dict[str, Any] = {"steps": steps, "guidance_scale": scale, "guide": self.guide}
        numbers, samples = numbers or range(len(names)), []
        for first in range(0, len(names), batch_size):
            part = slice(first, first + batch_size)
            noise = noise_of(numbers[part], self.model.image_size, seed, device)
            samples.append(sample(self.model, noise, labels[part], self.model.null_class, **how))
        return to_bytes(torch.cat(samples)).cpu()

    def noise_numbers(self, name: str, count: int) -> list[int]:
        """The numbers of the noise that the first `count` images of a class begin with: an image has its noise to
        itself, and keeps it, whatever else is sampled."""
        return [number * len(self.classes) + self.classes.index(name) for number in range(count)]

    def to(self, device: torch.device | str) -> "Generator":
        """Itself, on that device."""
        for model in (self.model, self.guide):
            if model is not None:
                model.to(device)
        return self


def export(
    path: Path,
    state_dict: dict[str, torch.Tensor],
    guide: dict[str, torch.Tensor],
    shape: dict[str, int],
    classes: Sequence[str],
    guidance_scale: float,
    metrics: dict[str, Any],
) -> None:
    """Write a finished generator: the EMA's weights, and all that sampling takes. `torch.load` reads it.

    Args:
        guide: the weights of `sample`'s guide; empty if there is none.
        shape: the arguments of TinyDiT but the number of classes.

    Raises:
        UserError: it cannot be written.
    """
    contents = {
        "model": "tiny_dit",
        "shape": shape,
        "classes": list(classes),
        "guidance_scale": guidance_scale,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "metrics": metrics,
        "state_dict": state_dict,
        "guide": guide,
    }
    checkpoints.save_model(path, contents)


def _as_today(state_dict: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """The weights of a model, or of one of before: it was not told of crops, had no guide, and saw each patch by
    itself, where today's sees what is around it, too."""
    if not state_dict:
        return {}
    weight = state_dict["x_embedder.weight"]
    if weight.ndim == 2:
        patches = weight.view(len(weight), 3, math.isqrt(weight.shape[1] // 3), -1)
        weight = pad(patches, [patches.shape[-1] // 2] * 4)
    untold = {"crop_embedder": weight.new_zeros(NUMBERS, len(weight))}
    return untold | state_dict | {"x_embedder.weight": weight}


def load(path: Path | str) -> Generator:
    """Read a finished generator (`tiny_dit.pt`), ready to sample on the CPU.

    Raises:
        UserError: the file is missing, damaged, or another model's.
    """
    contents = checkpoints.load(Path(path))
    if contents.get("model") != "tiny_dit":
        raise UserError(f"{path} is not a finished generator")
    weights, of_guide = (_as_today(contents.get(name)) for name in ("state_dict", "guide"))
    shape = contents["shape"] | {"qk_norm": "blocks.0.query_norm.weight" in weights}
    model, guide = (TinyDiT(len(contents["classes"]), **shape).eval().requires_grad_(False) for _ in range(2))
    model.load_state_dict(weights)
    if of_guide:
        guide.load_state_dict(of_guide)
    return Generator(
        model,
        guide if of_guide else None,
        tuple(contents["classes"]),
        contents["guidance_scale"],
        contents["metrics"],
    )
