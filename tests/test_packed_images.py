"""Packed images are read one by one and in batches, and what is damaged is noticed before it is used."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import damage
from test_packing import RED, folder_with, pack
from tinycats.images import packed_images
from tinycats.images.frames import Frame
from tinycats.images.packed_images import PackedImages, copy_packed
from tinycats.run.durable_files import DamagedFile
from tinycats.run.runs import log_to_stdout
from tinycats.script.errors import TransientError


def noise(root: Path, count: int = 5, size: tuple[int, int] = (20, 18)) -> Path:
    """Two classes of images, each unlike any other."""
    rng = random.Random(0)
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        for number in range(count):
            contents = rng.randbytes(size[0] * size[1] * 3)
            Image.frombytes("RGB", size, contents).save(root / name / f"{number}.png")
    return root


def test_a_batch_is_an_array_where_images_are_square_and_a_list_elsewhere(tmp_path):
    root = noise(tmp_path / "data")
    chosen = np.array([7, 0, 7, 3])
    square = pack(root, Frame(16, square=True))
    batch = square.batch(chosen)
    assert batch.shape == (4, 16, 16, 3)
    assert all((image == square[index]).all() for image, index in zip(batch, chosen.tolist(), strict=True))
    batch[:] = 0
    assert square[7].any(), "a batch is a copy"
    whole = pack(root, Frame(16))
    assert all((image == whole[index]).all() for image, index in zip(whole.batch(chosen), chosen.tolist(), strict=True))


def test_the_training_images_come_first_and_each_knows_its_path(tmp_path):
    images = pack(noise(tmp_path / "data", count=10))
    paths = [images.path(index) for index in range(20)]
    training = paths[: len(images.indices("train"))]
    assert training == sorted(training) and len(training) == 16
    assert [path.partition("/")[0] for path in paths] == [images.classes[label] for label in images.labels]


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
    root = noise(tmp_path / "data")
    images = pack(root)
    pixels, labels = [image.copy() for image in images], images.labels
    for name in ["pixels.bin", "index.json", "images.bin", "paths.bin"] * 30:
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
    with pytest.raises(TransientError, match=rf"pixels\.bin is damaged at {images.path(0)}; run this again"):
        PackedImages(images.folder)[0]
    assert (pack(root)[39] == RED).all()


def test_a_batch_with_a_damaged_image_is_mended(tmp_path, capsys):
    log_to_stdout()
    root = noise(tmp_path / "data")
    images = pack(root, Frame(16, square=True))
    whole, path = images.batch(np.arange(10)).copy(), images.folder / "pixels.bin"
    stored = bytearray(path.read_bytes())
    stored[5 * 16 * 16 * 3] ^= 1
    path.write_bytes(stored)
    again = PackedImages(images.folder, root)
    assert (again.batch(np.array([1, 2])) == whole[[1, 2]]).all()
    assert "is damaged" not in capsys.readouterr().out
    assert (again.batch(np.arange(10)) == whole).all()
    assert "is damaged" in capsys.readouterr().out
    assert PackedImages(images.folder)[5].any(), "the file too"


def test_what_another_version_packed_is_packed_anew(tmp_path, monkeypatch):
    root = folder_with(tmp_path / "data")
    monkeypatch.setattr(packed_images, "FORMAT", 2)
    folder = pack(root).folder
    monkeypatch.undo()
    with pytest.raises(DamagedFile, match="was packed by another version"):
        PackedImages(folder)
    assert (pack(root)[39] == RED).all()


@pytest.mark.parametrize("block", [1, 1000, 2**24])
def test_a_copy_is_verified_on_the_way(tmp_path, monkeypatch, block):
    monkeypatch.setattr(packed_images, "BLOCK", block)
    images = pack(noise(tmp_path / "data"))
    copy = copy_packed(images.folder, tmp_path / "copy", streams=3)
    assert all((one == other).all() for one, other in zip(copy, images, strict=True))
    assert copy.content == images.content
    for name in ("pixels.bin", "images.bin", "paths.bin", "index.json"):
        path = images.folder / name
        whole = path.read_bytes()
        rng = random.Random(0)
        for _ in range(10):
            path.write_bytes(whole)
            damage(path, rng)
            if path.read_bytes() != whole:
                with pytest.raises(DamagedFile, match=name.replace(".", r"\.")):
                    copy_packed(images.folder, tmp_path / "copy", streams=3)
        path.unlink()
        with pytest.raises(DamagedFile, match="is missing"):
            copy_packed(images.folder, tmp_path / "copy", streams=3)
        path.write_bytes(whole)
