"""data/toy: drawn cats in four coats, and other things; the offline smoke test of everything here."""

import colorsys
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tinycats.run.durable_files import atomic_folder

SIZE = 64  # pixels a side
IMAGES = {"train": 80, "val": 20}  # a class
SUPERSAMPLING = 3

Colour = tuple[int, int, int]


def draw_toy_cats(folder: Path, seed: int = 0, images: dict[str, int] = IMAGES) -> None:
    """Draw the toy data set into `folder` (`{train,val}/<class>/NNN.png`), which must not be there yet.

    The same seed draws the same pixels. Takes about a second.
    """
    with atomic_folder(folder) as partial:
        for split_number, (split, count) in enumerate(images.items()):
            for class_number, (name, draw) in enumerate(CLASSES.items()):
                (partial / split / name).mkdir(parents=True)
                for number in range(count):
                    rng = np.random.default_rng((seed, split_number, class_number, number))
                    draw(rng).save(partial / split / name / f"{number:03}.png", compress_level=1)


class _Canvas:
    """A square image in units of its side, drawn large and scaled down: smooth edges."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.side = SIZE * SUPERSAMPLING
        self.image = Image.new("RGB", (self.side, self.side), _pastel(rng))
        self.draw = ImageDraw.Draw(self.image)
        horizon = rng.uniform(0.55, 0.85) * self.side
        self.draw.rectangle((0, horizon, self.side, self.side), fill=_pastel(rng))

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Colour) -> None:
        s = self.side
        self.draw.ellipse(((x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s), fill=fill)

    def polygon(self, points: list[tuple[float, float]], fill: Colour) -> None:
        self.draw.polygon([(x * self.side, y * self.side) for x, y in points], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: Colour, width: float) -> None:
        pixels = max(1, round(width * self.side))
        self.draw.line([(x * self.side, y * self.side) for x, y in points], fill=fill, width=pixels, joint="curve")

    def finish(self) -> Image.Image:
        small = self.image.resize((SIZE, SIZE), Image.Resampling.BOX)
        noise = self.rng.normal(0, 3, (SIZE, SIZE, 3))
        return Image.fromarray((np.asarray(small) + noise).clip(0, 255).astype(np.uint8))


def _pastel(rng: np.random.Generator) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.1, 0.35), rng.uniform(0.7, 0.95))
    return round(255 * red), round(255 * green), round(255 * blue)


def _vivid(rng: np.random.Generator) -> Colour:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(), rng.uniform(0.5, 0.9), rng.uniform(0.4, 0.9))
    return round(255 * red), round(255 * green), round(255 * blue)


def _near(colour: Colour, rng: np.random.Generator) -> Colour:
    """The colour a little lighter or darker, and a very little off in hue."""
    levels = np.array(colour) + rng.normal(0, 10) + rng.normal(0, 4, 3)
    red, green, blue = (round(level) for level in levels.clip(0, 255).tolist())
    return red, green, blue


def _cat(
    rng: np.random.Generator, fur: Colour, *, stripes: Colour | None = None, points: Colour | None = None
) -> Image.Image:
    """A sitting cat seen from the front. `points` are the dark ears, face, paws and tail of a Siamese."""
    canvas = _Canvas(rng)
    fur = _near(fur, rng)
    dark = _near(points, rng) if points else fur
    x, y, size = rng.uniform(0.42, 0.58), rng.uniform(0.36, 0.46), rng.uniform(0.8, 1.1)

    def at(dx: float, dy: float) -> tuple[float, float]:
        return x + dx * size, y + dy * size

    side = rng.choice((-1, 1))
    canvas.line([at(side * 0.15, 0.42), at(side * 0.3, 0.38), at(side * 0.33, 0.18)], dark, 0.05 * size)
    canvas.ellipse(*at(0, 0.34), 0.18 * size, 0.25 * size, fur)
    for sign in (-1, 1):
        canvas.ellipse(*at(sign * 0.09, 0.55), 0.07 * size, 0.05 * size, dark)
        canvas.polygon([at(sign * 0.21, -0.02), at(sign * 0.19, -0.31), at(sign * 0.03, -0.15)], dark)
        canvas.polygon([at(sign * 0.17, -0.1), at(sign * 0.165, -0.23), at(sign * 0.08, -0.15)], (236, 168, 170))
    canvas.ellipse(*at(0, 0), 0.22 * size, 0.19 * size, fur)
    if points:
        canvas.ellipse(*at(0, 0.05), 0.13 * size, 0.12 * size, dark)
    if stripes:
        for offset in (-0.07, 0, 0.07):
            canvas.line([at(offset, -0.18), at(offset * 0.8, -0.09)], stripes, 0.028 * size)
        for height in (0.24, 0.34, 0.44):
            for sign in (-1, 1):
                canvas.line([at(sign * 0.17, height - 0.02), at(sign * 0.06, height)], stripes, 0.03 * size)
        for sign in (-1, 1):
            canvas.line([at(sign * 0.21, 0.02), at(sign * 0.13, 0.04)], stripes, 0.025 * size)
    eyes = (90, 150, 230) if points else _near((200, 205, 70), rng)
    for sign in (-1, 1):
        canvas.ellipse(*at(sign * 0.085, -0.02), 0.045 * size, 0.04 * size, eyes)
        canvas.ellipse(*at(sign * 0.085, -0.02), 0.014 * size, 0.036 * size, (20, 20, 20))
    canvas.polygon([at(-0.028, 0.055), at(0.028, 0.055), at(0, 0.085)], (225, 130, 140))
    return canvas.finish()


def _ginger(rng: np.random.Generator) -> Image.Image:
    return _cat(rng, (226, 136, 52), stripes=(176, 88, 22))


def _black(rng: np.random.Generator) -> Image.Image:
    return _cat(rng, (38, 36, 40))


def _siamese(rng: np.random.Generator) -> Image.Image:
    return _cat(rng, (233, 217, 190), points=(84, 62, 52))


def _tabby(rng: np.random.Generator) -> Image.Image:
    return _cat(rng, (142, 142, 146), stripes=(62, 62, 68))


def _other(rng: np.random.Generator) -> Image.Image:
    """A house, a ball, a tree or a fish."""
    canvas = _Canvas(rng)
    colour, second = _vivid(rng), _vivid(rng)
    x, y, size = rng.uniform(0.4, 0.6), rng.uniform(0.45, 0.58), rng.uniform(0.24, 0.34)
    kind = rng.integers(4)
    if kind == 0:
        canvas.polygon([(x - size, y), (x + size, y), (x + size, y + 1.2 * size), (x - size, y + 1.2 * size)], colour)
        canvas.polygon([(x - 1.2 * size, y), (x + 1.2 * size, y), (x, y - size)], second)
        canvas.polygon(
            [(x + dx * size, y + dy * size) for dx, dy in ((-0.2, 1.2), (-0.2, 0.5), (0.2, 0.5), (0.2, 1.2))],
            (90, 60, 40),
        )
    elif kind == 1:
        canvas.ellipse(x, y, size, size, colour)
        canvas.line([(x - size, y), (x, y - 0.2 * size), (x + size, y)], second, 0.3 * size)
    elif kind == 2:
        canvas.line([(x, y), (x, y + 1.3 * size)], (110, 76, 44), 0.25 * size)
        for angle in np.linspace(0, 2 * math.pi, 5, endpoint=False):
            offset = 0.45 * size
            canvas.ellipse(
                x + offset * math.cos(angle),
                y - 0.3 * size + offset * math.sin(angle),
                0.6 * size,
                0.6 * size,
                _near((60, 140, 60), rng),
            )
    else:
        side = rng.choice((-1, 1))
        canvas.ellipse(x, y, 1.1 * size, 0.6 * size, colour)
        tail = [(x + side * size, y), (x + side * 1.6 * size, y - 0.5 * size), (x + side * 1.6 * size, y + 0.5 * size)]
        canvas.polygon(tail, second)
        canvas.ellipse(x - side * 0.6 * size, y - 0.1 * size, 0.1 * size, 0.1 * size, (20, 20, 20))
    return canvas.finish()


CLASSES: dict[str, Callable[[np.random.Generator], Image.Image]] = {
    "black": _black,
    "ginger": _ginger,
    "other": _other,
    "siamese": _siamese,
    "tabby": _tabby,
}
