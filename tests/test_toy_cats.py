"""The toy data: the same everywhere, and in the shape of any other data."""

import numpy as np
from PIL import Image

from tinycats.images.image_folders import scan
from tinycats.images.toy_cats import CLASSES, SIZE, draw_toy_cats


def pixels(folder):
    return {path.relative_to(folder): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def test_the_same_seed_draws_the_same_pixels_and_another_seed_others(tmp_path):
    few = {"train": 3, "val": 1}
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        draw_toy_cats(tmp_path / name, seed, few)
    one, two, three = (pixels(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys() == three.keys()
    assert all((one[path] == two[path]).all() for path in one)
    assert not any((one[path] == three[path]).all() for path in one)


def test_it_is_four_coats_and_other_and_no_image_twice(small_toy):
    folder = scan(small_toy)
    assert folder.classes == tuple(sorted(CLASSES)) == ("black", "ginger", "other", "siamese", "tabby")
    images = pixels(small_toy)
    assert len(images) == 60
    assert {image.shape for image in images.values()} == {(SIZE, SIZE, 3)}
    assert len({image.tobytes() for image in images.values()}) == 60
