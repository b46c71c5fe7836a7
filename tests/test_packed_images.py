"""Images of every kind, decoded once and read back from a map of bytes."""

import os
import pickle
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import damage
from tinycats import packed_images
from tinycats.errors import TransientError, UserError
from tinycats.image_folders import scan
from tinycats.packed_images import PackedImages, decode, packed
from tinycats.runs import log_to_stdout

RED = (200, 30, 40)


def folder_with(root: Path, count: int = 20, size: tuple[int, int] = (40, 30)) -> Path:
    """Two classes of plain PNGs, `count` images each."""
    for name, colour in (("red", RED), ("blue", (30, 40, 200))):
        (root / name).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", size, colour).save(root / name / f"{number:02}.png")
    return root


def pack(root: Path, short_side: int = 16) -> PackedImages:
    return packed(scan(root), short_side, fallback=root.parent / "fallback")


def bomb() -> bytes:
    """A PNG of a few hundred bytes that says it is 60,000 pixels square."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def test_images_come_back_as_they_were_within_the_side_asked_for(tmp_path):
    images = pack(folder_with(tmp_path / "data"))
    assert len(images) == 40
    assert images.classes == ("blue", "red")
    assert images[39].shape == (16, 21, 3)
    assert images[39].dtype == np.uint8
    assert (images[39] == RED).all()
    assert images.labels[39] == 1
    assert len(images.indices("val")) == 8
    assert sorted([*images.indices("val"), *images.indices("train")]) == list(range(40))


def test_small_images_are_never_enlarged(tmp_path):
    assert pack(folder_with(tmp_path / "data", size=(10, 12)), short_side=64)[0].shape == (12, 10, 3)


def test_a_folder_is_packed_once_and_again_when_a_file_changes(tmp_path):
    root = folder_with(tmp_path / "data")
    first = pack(root)
    written = (first.folder / "pixels.bin").stat().st_mtime_ns
    assert (pack(root).folder / "pixels.bin").stat().st_mtime_ns == written

    Image.new("RGB", (40, 30), "green").save(root / "red" / "00.png")
    again = pack(root)
    assert again.folder != first.folder
    assert again.content != first.content
    assert not first.folder.exists()


def test_the_same_images_have_the_same_content_digest_wherever_they_lie(tmp_path):
    one, other = folder_with(tmp_path / "one"), folder_with(tmp_path / "other")
    for path in other.rglob("*.png"):
        os.utime(path, (1, 1))
    assert pack(one).content == pack(other).content


def test_a_damaged_pack_is_packed_anew(tmp_path):
    root = folder_with(tmp_path / "data")
    first = pack(root)
    with (first.folder / "pixels.bin").open("ab") as file:
        file.truncate(100)
    assert (pack(root)[39] == RED).all()


def test_whatever_is_damaged_is_noticed_and_packed_again(tmp_path, capsys):
    """Seen to fail without the CRC-32 of `PackedImages.__getitem__`, and without that of the index's footer."""
    log_to_stdout()
    rng = random.Random(0)
    root = tmp_path / "data"
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        for number in range(5):
            Image.frombytes("RGB", (20, 18), rng.randbytes(20 * 18 * 3)).save(root / name / f"{number}.png")
    images = pack(root)
    pixels, labels = [image.copy() for image in images], images.labels
    for name in ["pixels.bin", "index.json"] * 60:
        path = images.folder / name
        whole = path.read_bytes()
        damage(path, rng)
        is_damaged = path.read_bytes() != whole
        capsys.readouterr()
        again = pack(root)
        assert all((one == other).all() for one, other in zip(again, pixels, strict=True))
        assert (again.labels == labels).all()
        assert ("packing" in capsys.readouterr().out) == is_damaged
        assert path.read_bytes() == whole, "it is mended for whoever comes next"


def test_what_is_damaged_and_has_changed_meanwhile_is_packed_anew_by_the_next(tmp_path):
    root = folder_with(tmp_path / "data")
    images = pack(root)
    path = images.folder / "pixels.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(TransientError, match=r"pixels\.bin is damaged at blue/00\.png; run this again"):
        PackedImages(images.folder)[0]
    assert (pack(root)[39] == RED).all()


def test_where_nothing_can_be_written_beside_the_data_the_fallback_is_used(tmp_path):
    root = folder_with(tmp_path / "data")
    (tmp_path / "data.packed").write_text("a file is in the way")
    images = pack(root)
    assert images.folder.is_relative_to(tmp_path / "fallback")
    assert pack(root).folder == images.folder


def test_packed_images_pickle_by_path_and_not_by_pixels(tmp_path):
    images = pack(folder_with(tmp_path / "data"))
    pickled = pickle.dumps(images)
    assert len(pickled) < 500
    assert (pickle.loads(pickled)[7] == images[7]).all()


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
    pixels = decode(path, 16)
    assert pixels.shape == (19, 16, 3)
    if mode in ("L", "I;16"):
        assert (pixels == 90).all(), "sixteen bits are scaled down to eight, not cut off at 255"


def test_what_is_transparent_is_white(tmp_path):
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (decode(tmp_path / "clear.png", 16) == 255).all()


def test_of_an_animation_the_first_image_counts(tmp_path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "green")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (decode(tmp_path / "a.gif", 16)[0, 0] == (255, 0, 0)).all()


def test_photos_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.new("RGB", (40, 20), "red").save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg", 20).shape == (40, 20, 3)


def test_a_strip_loses_its_ends_instead_of_filling_the_disk(tmp_path):
    Image.new("RGB", (8, 5000), "red").save(tmp_path / "strip.png")
    assert decode(tmp_path / "strip.png", 100).shape == (16, 8, 3)


def test_unreadable_images_are_named_and_left_out(tmp_path, capsys):
    log_to_stdout()
    root = folder_with(tmp_path / "data")
    whole = (root / "red" / "01.png").read_bytes()
    (root / "red" / "cut off.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (1, 1)).save(root / "red" / "one pixel.png")
    (root / "blue" / "bömb.png").write_bytes(bomb())
    (root / "blue" / "text.jpg").write_text("I am not an image")
    images = pack(root)
    assert len(images) == 40
    reasons = dict(images.unreadable)
    assert set(reasons) == {"red/cut off.png", "red/one pixel.png", "blue/bömb.png", "blue/text.jpg"}
    assert "too small (1x1 pixels)" in reasons["red/one pixel.png"]
    assert "exceeds limit" in reasons["blue/bömb.png"]
    assert capsys.readouterr().out.count("Left out") == 4
    pack(root)
    assert capsys.readouterr().out.count("Left out") == 4, "a run that finds the folder packed says it too"


def test_too_many_unreadable_images_stop_the_run_and_leave_nothing(tmp_path):
    root = folder_with(tmp_path / "data")
    for number in range(5):
        (root / "red" / f"{number:02}.png").write_text("broken")
    with pytest.raises(UserError, match=r"5 of 40 images cannot be read, the first of them red/00\.png"):
        pack(root)
    assert list((tmp_path / "data.packed").iterdir()) == []


def test_a_class_without_a_readable_image_stops_the_run(tmp_path):
    root = folder_with(tmp_path / "data", count=40)
    (root / "odd").mkdir()
    for number in range(3):
        (root / "odd" / f"{number}.png").write_text("broken")
    with pytest.raises(UserError, match="'odd' has no readable image for train"):
        pack(root)


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    root = folder_with(tmp_path / "data")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_images, "_pack", full)
    with pytest.raises(UserError, match="No space left on device"):
        pack(root)
    assert list((tmp_path / "data.packed").iterdir()) == []
