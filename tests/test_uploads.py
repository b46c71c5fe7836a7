"""A folder on its way into a volume: archives that are the same whoever makes them, and a receipt."""

import os
import shutil
from pathlib import Path

import pytest

from tinycats.images.image_folders import scan
from tinycats.on_modal import uploads
from tinycats.on_modal.uploads import Upload, is_upload, unpack
from tinycats.script.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a b", "猫"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for number in range(6):
            (tmp_path / "data" / name / f"{number}.png").write_bytes(f"{name} {number}".encode() * 100)
    return tmp_path / "data"


def written(upload: Upload, remote: Path) -> Path:
    remote.mkdir()
    for part in upload.parts:
        with part.archive(upload.folder) as archive:
            (remote / part.name).write_bytes(archive.read())
    (remote / uploads.RECEIPT).write_bytes(upload.receipt().read())
    return remote


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_it_arrives_as_it_was_in_as_many_archives_as_it_takes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "PART_BYTES", 2000)
    upload = Upload(scan(folder))
    assert len(upload.parts) == 3
    assert sum(part.size for part in upload.parts) == sum(len(image) for image in contents(folder).values())
    remote = written(upload, tmp_path / "remote")
    assert is_upload(remote)
    assert uploads.digest_in((remote / uploads.RECEIPT).read_bytes()) == upload.digest
    assert contents(unpack(remote, tmp_path / "unpacked")) == contents(folder)
    shutil.rmtree(remote)
    assert not is_upload(folder)


def test_the_same_images_make_the_same_archives_whatever_their_times(folder, tmp_path):
    one = contents(written(Upload(scan(folder)), tmp_path / "one"))
    for path in folder.rglob("*.png"):
        os.utime(path, (1, 1))
    assert contents(written(Upload(scan(folder)), tmp_path / "other")) == one


def test_what_has_changed_is_in_other_archives(folder, monkeypatch):
    monkeypatch.setattr(uploads, "PART_BYTES", 2000)
    before = [part.name for part in Upload(scan(folder)).parts]
    (folder / "猫" / "5.png").write_bytes(b"another cat")
    after = [part.name for part in Upload(scan(folder)).parts]
    assert after[:2] == before[:2]
    assert after[2] != before[2]


@pytest.mark.parametrize("fault", ["missing", "cut", "flipped"])
def test_what_arrived_damaged_is_not_trained_on(folder, tmp_path, fault):
    remote = written(Upload(scan(folder)), tmp_path / "remote")
    (part,) = remote.glob("*.tar")
    stored = bytearray(part.read_bytes())
    match fault:
        case "missing":
            part.unlink()
        case "cut":
            part.write_bytes(stored[: len(stored) // 2])
        case "flipped":
            stored[1100] ^= 1
            part.write_bytes(stored)
    with pytest.raises(UserError, match=r"what was uploaded to .* is damaged: remove it"):
        unpack(remote, tmp_path / "unpacked")
