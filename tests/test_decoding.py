"""Files of every kind become pixels within a frame."""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tinycats.images import decoding
from tinycats.images.decoding import decode
from tinycats.images.frames import Frame

RED = (200, 30, 40)


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few hundred bytes that says it is so many pixels square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("mode", "colour", "suffix"),
    [
        ("L", 90, ".png"),
        ("1", 1, ".png"),
        ("P", 5, ".gif"),
        ("RGBA", (*RED, 255), ".png"),
        ("LA", (90, 128), ".png"),
        ("CMYK", (10, 200, 180, 20), ".jpg"),
        ("I;16", 90 * 256, ".png"),
        ("I;16", 90 * 256, ".tif"),
        ("RGB", RED, ".webp"),
        ("RGB", RED, ".bmp"),
        ("RGB", RED, ".ppm"),
    ],
)
def test_images_of_every_mode_and_format_become_rgb(tmp_path, mode, colour, suffix):
    path = tmp_path / f"image{suffix}"
    Image.new(mode, (20, 24), colour).save(path)
    pixels = decode(path, Frame(16))
    assert pixels.shape == (19, 16, 3)
    if mode in ("L", "I;16"):
        assert (pixels == 90).all(), "sixteen bits are scaled down to eight, not cut off at 255"


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", Frame(16)) == 255).all()


def test_of_an_animation_the_first_image_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode(tmp_path / "a.gif", Frame(16))[0, 0] == (255, 0, 0)).all()


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", Frame(20)).shape == (40, 20, 3)


def test_a_strip_loses_its_ends_instead_of_filling_the_disk(tmp_path):
    Image.new("RGB", (8, 5000), "red").save(tmp_path / "strip.png")
    assert decode(tmp_path / "strip.png", Frame(100)).shape == (16, 8, 3)


def test_a_square_frame_is_the_middle_enlarged_if_need_be(tmp_path):
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, 5:15] = RED
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    for side in (4, 10, 33):
        square = decode(tmp_path / "wide.png", Frame(side, square=True))
        assert square.shape == (side, side, 3)
        assert (square == RED).all()


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path):
    (tmp_path / "bomb.png").write_bytes(bomb())
    with pytest.raises(ValueError, match="too large \\(60000x60000 pixels\\)"):
        decode(tmp_path / "bomb.png", Frame(16))


def test_a_huge_jpeg_is_decoded_at_a_fraction_of_its_size_unless_it_is_held_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 300 * 300)
    image = Image.new("RGB", (1200, 1200), RED)
    image.save(tmp_path / "huge.jpg")
    assert decode(tmp_path / "huge.jpg", Frame(16)).shape == (16, 16, 3)
    image.save(tmp_path / "progressive.jpg", progressive=True)
    image.save(tmp_path / "huge.png")
    for name in ("progressive.jpg", "huge.png"):
        with pytest.raises(ValueError, match="too large \\(1200x1200 pixels\\)"):
            decode(tmp_path / name, Frame(16))
