"""From packed images, whatever their sizes, to a batch of one size: crops and mirror images.

What is random comes from an rng of the batch's own, for all of its images at once. numpy and a resize are all that is
used: torch's other operations on a CPU bring threads of their own, which those of the loader would wait for.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

ASPECTS = (3 / 4, 4 / 3)  # width / height of a random crop
ATTEMPTS = 10


class BatchRng:
    """Random numbers for the images of a batch: whoever has a part of it draws what is drawn for the whole, and takes
    what belongs to that part.

    Args:
        size: images in the batch.
        share: which of them are here, also as an array of their positions; all by default.
    """

    def __init__(self, seed: int, size: int, share: slice | np.ndarray | None = None):
        self._rng, self._size = np.random.default_rng(seed), size
        self._share = slice(size) if share is None else share

    def uniform(self, low: float = 0.0, high: float = 1.0, rows: tuple[int, ...] = ()) -> np.ndarray:
        """float64 [*rows, images that are here], in [low, high)."""
        return self._rng.uniform(low, high, (*rows, self._size))[..., self._share]


def random_crops(images: Sequence[np.ndarray], side: int, scale: tuple[float, float], rng: BatchRng) -> np.ndarray:
    """A random part of each image, resized: uint8 [B, side, side, 3] (Szegedy et al., arXiv 1409.4842, section 6, as
    torchvision's RandomResizedCrop).

    Args:
        images: uint8 [height, width, 3] each.
        scale: the smallest and the largest part of an image's area.
    """
    shapes = np.array([image.shape[:2] for image in images])
    boxes = random_boxes(shapes, scale, rng).tolist()
    batch = np.empty((len(images), side, side, 3), np.uint8)
    for resized, image, (top, left, height, width) in zip(batch, images, boxes, strict=True):
        _resize(image[top : top + height, left : left + width], resized)
    return batch


def random_boxes(shapes: np.ndarray, scale: tuple[float, float], rng: BatchRng) -> np.ndarray:
    """Where to crop: int64 [B, 4] of top, left, height, width, within int64 [B, 2] of height, width.

    An area is uniform in `scale`, an aspect log-uniform in ASPECTS; of ATTEMPTS the first that fits is taken, and where
    none does, as large a part of the middle as ASPECTS allow.
    """
    heights, widths = shapes[:, 0], shapes[:, 1]
    areas = rng.uniform(*scale, (ATTEMPTS,)) * heights * widths
    aspects = np.exp(rng.uniform(math.log(ASPECTS[0]), math.log(ASPECTS[1]), (ATTEMPTS,)))
    crop_widths = np.rint(np.sqrt(areas * aspects)).astype(np.int64)
    crop_heights = np.rint(np.sqrt(areas / aspects)).astype(np.int64)
    fits = (crop_widths > 0) & (crop_widths <= widths) & (crop_heights > 0) & (crop_heights <= heights)
    first = fits.argmax(0), np.arange(len(shapes))
    fit = fits[first]
    # Where none fits, the whole of one side and what it allows of the other.
    height = np.where(fit, crop_heights[first], np.minimum(heights, np.rint(widths / ASPECTS[0]).astype(np.int64)))
    width = np.where(fit, crop_widths[first], np.minimum(widths, np.rint(heights * ASPECTS[1]).astype(np.int64)))
    places = rng.uniform(rows=(2,))
    top = np.where(fit, places[0] * (heights - height + 1), (heights - height) // 2).astype(np.int64)
    left = np.where(fit, places[1] * (widths - width + 1), (widths - width) // 2).astype(np.int64)
    return np.stack([top, left, height, width], axis=1)


def middle_crops(images: Sequence[np.ndarray], side: int, shorter_side: int) -> np.ndarray:
    """The middle of each image after its shorter side was resized: uint8 [B, side, side, 3]."""
    batch = np.empty((len(images), side, side, 3), np.uint8)
    for cropped, image in zip(batch, images, strict=True):
        scale = shorter_side / min(image.shape[:2])
        height, width = (round(extent * scale) for extent in image.shape[:2])
        resized = image if scale == 1 else _resize(image, np.empty((height, width, 3), np.uint8))
        top, left = (height - side) // 2, (width - side) // 2
        cropped[:] = resized[top : top + side, left : left + side]
    return batch


def mirror_half(batch: np.ndarray, rng: BatchRng) -> np.ndarray:
    """The batch, uint8 [B, H, W, 3], in which each image was mirrored, in place, with a probability of a half."""
    mirrored = rng.uniform() < 0.5
    pixels = batch.view("V3")[..., 0]  # moved as a whole, three times as fast as byte by byte
    pixels[mirrored] = pixels[mirrored, :, ::-1]
    return batch


def _resize(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """Bilinear, with antialiasing, into uint8 [height, width, 3], which is returned."""
    # A copy, for torch wants arrays that can be written to. By unsqueeze: then torch sees that the channels are last
    # and leaves them there; by [None] it takes three times as long.
    batch = torch.from_numpy(image.copy()).unsqueeze(0).permute(0, 3, 1, 2)
    resized = interpolate(batch, out.shape[:2], mode="bilinear", antialias=True)
    out[:] = resized[0].permute(1, 2, 0).numpy()
    return out
