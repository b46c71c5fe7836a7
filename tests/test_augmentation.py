"""Crops and mirror images are torchvision's, made for a whole batch at once."""

import numpy as np
import torch
from torchvision.transforms import v2

from tinycats.images.augmentation import ASPECTS, BatchRng, middle_crops, mirror_half, random_boxes, random_crops

SCALE = (0.35, 1.0)


def test_boxes_lie_within_their_images_and_are_spread_as_torchvisions_are():
    """10,000 boxes of one image: means and deviations of area, aspect and place."""
    height, width = 256, 340
    boxes = random_boxes(np.tile((height, width), (10_000, 1)), SCALE, BatchRng(0, 10_000))
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    crop = v2.RandomResizedCrop(224, SCALE, ASPECTS)
    params = [crop.make_params([image]) for _ in range(10_000)]
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in params])

    def facts(found: np.ndarray) -> np.ndarray:
        top, left, tall, wide = found.T
        rest = (np.maximum(1, height - tall), np.maximum(1, width - wide))
        columns = np.stack([tall * wide, np.log(wide / tall), top / rest[0], left / rest[1]])
        return np.stack([columns.mean(1), columns.std(1)])

    assert np.allclose(facts(boxes), facts(theirs), rtol=0.03, atol=0.02)
    top, left, tall, wide = boxes.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (top + tall <= height).all() and (left + wide <= width).all()


def test_where_no_box_fits_it_is_as_large_a_part_of_the_middle_as_the_aspect_allows():
    shapes = np.array([(10, 1000), (1000, 10), (8, 8)])
    boxes = random_boxes(shapes, (1.0, 1.0), BatchRng(0, 3))
    assert boxes[0].tolist() == [0, 493, 10, 13]
    assert boxes[1].tolist() == [493, 0, 13, 10]


def test_a_crop_is_resized_as_torchvision_resizes_it():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (rng.integers(20, 60), rng.integers(20, 60), 3), np.uint8) for _ in range(20)]
    crops = random_crops(images, 32, SCALE, BatchRng(1, 20))
    boxes = random_boxes(np.array([image.shape[:2] for image in images]), SCALE, BatchRng(1, 20))
    for crop, image, (top, left, height, width) in zip(crops, images, boxes.tolist(), strict=True):
        tensor = torch.from_numpy(image).permute(2, 0, 1)
        expected = v2.functional.resized_crop(tensor, top, left, height, width, [32, 32], antialias=True)
        assert torch.equal(torch.from_numpy(crop).permute(2, 0, 1), expected)


def test_the_middle_is_torchvisions_for_images_of_any_size():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), np.uint8) for shape in ((73, 90), (90, 73), (20, 30), (37, 37))]
    crops = middle_crops(images, 64, 73)
    for crop, image in zip(crops, images, strict=True):
        expected = v2.Compose([v2.Resize(73), v2.CenterCrop(64)])(torch.from_numpy(image).permute(2, 0, 1))
        difference = (torch.from_numpy(crop).permute(2, 0, 1).int() - expected.int()).abs()
        assert crop.shape == (64, 64, 3)
        # Where the longer side is odd, torchvision may cut a pixel beside.
        assert difference.float().mean() < 40 if min(image.shape[:2]) != 73 else difference.max() == 0


def test_half_of_the_images_are_mirrored_and_the_others_are_as_they_were():
    images = np.random.default_rng(0).integers(0, 256, (1000, 4, 6, 3), np.uint8)
    batch = mirror_half(images.copy(), BatchRng(1, 1000))
    same = (batch == images).all((1, 2, 3))
    assert (batch[~same] == images[~same][:, :, ::-1]).all()
    assert 440 < same.sum() < 560
