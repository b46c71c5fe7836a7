"""The cat classifier: a ResNet with a head of its own, its images, its metrics, its file."""

import math
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn
from torchvision import models

from tinycats.images import frames
from tinycats.images.augmentation import BatchRng, middle_crops, mirror_half, random_crops
from tinycats.images.batches import Transform
from tinycats.images.decoding import decode
from tinycats.images.oxford_pets import OTHER
from tinycats.models.resnet import resnet20
from tinycats.run import checkpoints
from tinycats.script.errors import TransientError, UserError

CROP_SCALE = (0.35, 1.0)  # the part of an image's area that training sees
TEMPERATURES = (0.25, 4.0)  # that calibration may choose from
BINS = 15  # of confidence

# ImageNet's, with which the pretrained backbones were trained.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def build(backbone: str, num_classes: int, *, pretrained: bool) -> nn.Module:
    """A ResNet (He et al., arXiv 1512.03385) with a new head: float [B, 3, H, W] -> logits [B, num_classes].

    Args:
        backbone: resnet20, for which there are no pretrained weights, or one of torchvision's.

    Raises:
        TransientError: the ImageNet weights cannot be downloaded.
    """
    if backbone == "resnet20":
        return resnet20(num_classes)
    try:
        model = models.get_model(backbone, weights="DEFAULT" if pretrained else None)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise TransientError(
            f"cannot fetch the ImageNet weights of {backbone} ({error}); --no-pretrained trains from scratch"
        ) from error
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    return model


def training_transform(image_size: int) -> Transform:
    """A random part of each image, mirrored or not. Colours stay as they are: they are what tells one coat from
    another."""

    def transform(images: Sequence[np.ndarray], rng: BatchRng) -> np.ndarray:
        return mirror_half(random_crops(images, image_size, CROP_SCALE, rng), rng)

    return transform


def validation_transform(image_size: int) -> Transform:
    """The middle of each image."""

    def transform(images: Sequence[np.ndarray], _rng: BatchRng) -> np.ndarray:
        return middle_crops(images, image_size, frames.to_crop_from(image_size).side)

    return transform


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, H, W] -> float32, channels last, with ImageNet's mean and deviation. On the images' device:
    bytes are a quarter of what floats are to move there."""
    batch, _, height, width = images.shape
    mean, std = (255 * torch.tensor(values, device=images.device).repeat(width) for values in (MEAN, STD))
    # Three numbers broadcast over every pixel are five times as slow on a CPU as a row of them over every row.
    rows = images.permute(0, 2, 3, 1).reshape(batch, height, width * 3).float().sub_(mean).div_(std)
    return rows.view(batch, height, width, 3).permute(0, 3, 1, 2)


def mixed(images: torch.Tensor, targets: torch.Tensor, part: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mixup (Zhang et al., arXiv 1710.09412): `part` of each image but the last, and for the rest of it the next one.

    Args:
        images: float [B + 1, 3, H, W].
        targets: float [B + 1, C], the probability of each class.

    Returns:
        As many of both, less one.
    """
    return images[1:].lerp(images[:-1], part), targets[1:].lerp(targets[:-1], part)


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """int64 [C, C]: how many images of class i (row) were taken for class j (column)."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)


def accuracies(confusion: torch.Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """What a confusion matrix says.

    Returns:
        `val_accuracy`, the part of the images that are right; `class_accuracy`, the same for each class;
        `balanced_accuracy`, the mean over the classes; and where there is a class `other`,
        `cat_accuracy`: the part of which it is rightly said whether they show a cat.
    """
    counts = confusion.double()
    by_class = counts.diagonal() / counts.sum(1)
    result = {
        "val_accuracy": (counts.trace() / counts.sum()).item(),
        "balanced_accuracy": by_class.mean().item(),
        "class_accuracy": dict(zip(classes, by_class.tolist(), strict=True)),
    }
    if OTHER in classes:
        is_cat = torch.tensor([name != OTHER for name in classes])
        right = counts[is_cat][:, is_cat].sum() + counts[~is_cat][:, ~is_cat].sum()
        result["cat_accuracy"] = (right / counts.sum()).item()
    return result


def _class_weights(labels: torch.Tensor) -> torch.Tensor:
    """float64 [N], of sum 1, with which each class that is there counts alike, whatever there is of it."""
    weights = 1 / labels.bincount()[labels].double()
    return weights / weights.sum()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide logits by, so that their softmax means what it says: where the cross-entropy is least (Guo et al.,
    arXiv 1706.04599), every class counted alike.

    Args:
        logits: float [N, C], of images that were not trained on.
        labels: int64 [N].
    """
    logits, weights = logits.double(), _class_weights(labels)
    low, high = (math.log(temperature) for temperature in TEMPERATURES)
    while high - low > 1e-4:
        middle = (low + high) / 2
        # The cross-entropy is convex in the inverse of the temperature: its slope there has one change of sign.
        probabilities = (logits / math.exp(middle)).softmax(1)
        slope = (probabilities * logits).sum(1) - logits.gather(1, labels[:, None])[:, 0]
        low, high = (middle, high) if (weights * slope).sum() > 0 else (low, middle)
    return math.exp((low + high) / 2)


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    """The expected calibration error (Naeini et al., AAAI 2015): how far, in the mean, what is said to be right with
    some probability is from being right as often. In bins of equal width, every class counted alike.

    Args:
        probabilities: float [N, C].
        labels: int64 [N].
    """
    confidence, answers = probabilities.double().max(1)
    surplus = _class_weights(labels) * (confidence - (answers == labels).double())
    bins = (confidence * BINS).nan_to_num().long().clamp_max(BINS - 1)  # of NaN the error is NaN
    return torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, surplus).abs().sum().item()


def calibration(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """What held-out logits, as of `fit_temperature`, say about probabilities.

    Returns:
        `temperature`, and `calibration_error` of probabilities with it; each half of the images has for that the
        temperature of the other one.
    """
    one, other = (slice(first, None, 2) for first in (0, 1))
    if len(labels) < 2:
        one = other = slice(None)
    probabilities = torch.empty_like(logits)
    for half, rest in ((one, other), (other, one)):
        probabilities[half] = (logits[half] / fit_temperature(logits[rest], labels[rest])).softmax(1)
    return {
        "temperature": fit_temperature(logits, labels),
        "calibration_error": calibration_error(probabilities, labels),
    }


@dataclass(frozen=True)
class Classifier:
    """A finished classifier, from `load`."""

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    temperature: float
    metrics: dict[str, Any]

    def read(self, photo: Path | str | BinaryIO) -> np.ndarray:
        """A photo (a file in any format that Pillow reads, or its bytes) as uint8 [height, width, 3], for `classify`.

        Raises:
            OSError, ValueError and whatever Pillow raises: it is no image.
        """
        return decode(Path(photo) if isinstance(photo, str) else photo, frames.to_crop_from(self.image_size))

    @torch.inference_mode()
    def classify(self, images: Sequence[np.ndarray]) -> list[dict[str, float]]:
        """The probability of each class for each image of `read`, where it might as well show one class as another."""
        if not images:
            return []
        crops = middle_crops(images, self.image_size, frames.to_crop_from(self.image_size).side)
        batch = torch.from_numpy(crops).permute(0, 3, 1, 2)
        probabilities = (self.model(normalise(batch)) / self.temperature).softmax(1)
        return [dict(zip(self.classes, row.tolist(), strict=True)) for row in probabilities]

    def predict(self, photos: Sequence[Path | str]) -> list[dict[str, float]]:
        """`classify` of `read`, for each photo.

        Raises:
            OSError, ValueError and whatever Pillow raises: a file is no image.
        """
        return self.classify([self.read(photo) for photo in photos])


def export(
    path: Path,
    state_dict: dict[str, torch.Tensor],
    backbone: str,
    classes: Sequence[str],
    image_size: int,
    metrics: dict[str, Any],
) -> None:
    """Write a finished classifier: weights, and all that using them takes. `torch.load` reads it.

    Args:
        metrics: as of `accuracies` and `calibration`.

    Raises:
        UserError: it cannot be written.
    """
    contents = {
        "model": "classifier",
        "backbone": backbone,
        "classes": list(classes),
        "image_size": image_size,
        "mean": list(MEAN),
        "std": list(STD),
        "temperature": metrics["temperature"],
        "metrics": metrics,
        "state_dict": state_dict,
    }
    checkpoints.save_model(path, contents)


def load(path: Path | str) -> Classifier:
    """Read a finished classifier (`cats_model.pt`), ready to predict on the CPU.

    Raises:
        UserError: the file is missing, damaged, or another model's.
    """
    contents = checkpoints.load(Path(path))
    if contents.get("model") != "classifier":
        raise UserError(f"{path} is not a finished classifier")
    model = build(contents["backbone"], len(contents["classes"]), pretrained=False)
    model.load_state_dict(contents["state_dict"])
    return Classifier(
        model.eval(),
        tuple(contents["classes"]),
        contents["image_size"],
        contents.get("temperature", 1.0),  # which models of before had not
        contents["metrics"],
    )
