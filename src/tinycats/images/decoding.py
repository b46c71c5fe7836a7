"""From an image file to its pixels, within a frame."""

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from tinycats.images.frames import Frame

MIN_SIDE = 8  # pixels; a smaller image shows nothing
MAX_ASPECT = 2  # a longer image loses its ends: unbounded, a 1x10000 strip would fill the disk
MAX_PIXELS = 2**27  # of what is decoded: 400 MB in memory for each thread that decodes

# How large an image may be is checked below, after a JPEG has said that it can be decoded at a fraction of its size.
Image.MAX_IMAGE_PIXELS = None
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def decode(file: Path | BinaryIO, frame: Frame) -> np.ndarray:
    """One image as uint8 [height, width, 3]: upright (EXIF), RGB on white, within `frame`. Of an animation, the first
    image.

    Raises:
        OSError, ValueError and whatever Pillow raises: it is no image, is cut off, is a decompression bomb.
    """
    side = frame.side
    with Image.open(file) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"too small ({width}x{height} pixels)")
        # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; twice the size leaves the resize its say.
        image.draft("RGB", (2 * side, 2 * side))
        # One that is progressive is held whole while it is decoded, whatever comes out.
        in_memory = (width, height) if image.info.get("progressive") else image.size
        if in_memory[0] * in_memory[1] > MAX_PIXELS:
            raise ValueError(f"too large ({width}x{height} pixels)")
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright)

    width, height = rgb.size
    long_side = (1 if frame.square else MAX_ASPECT) * min(width, height)
    if max(width, height) > long_side:
        left, top = (max(0, extent - long_side) // 2 for extent in rgb.size)
        rgb = rgb.crop((left, top, left + min(width, long_side), top + min(height, long_side)))
        width, height = rgb.size
    if frame.square:
        rgb = rgb.resize((side, side), Image.Resampling.BICUBIC)
    elif min(width, height) > side:
        scale = side / min(width, height)
        rgb = rgb.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return np.array(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
