"""data/cats from the Oxford-IIIT Pet dataset: arranged by breed, downloaded whole or not at all."""

import functools
import hashlib
import http.server
import io
import tarfile
import threading
from pathlib import Path

import pytest
from PIL import Image

from tinycats import oxford_pets
from tinycats.errors import TransientError, UserError
from tinycats.image_folders import scan

HEADER = "#Image CLASS-ID SPECIES BREED ID\n"
TRAINVAL = ["Abyssinian_1 1 1 1", "British_Shorthair_1 5 1 2", "american_bulldog_1 2 2 1", "pug_1 3 2 2"]
TEST = ["Abyssinian_2 1 1 1", "British_Shorthair_2 5 1 2", "american_bulldog_2 2 2 1"]


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "grey").save(buffer, "JPEG")
    return buffer.getvalue()


def dataset_files() -> dict[str, bytes]:
    photos = {f"images/{line.split()[0]}.jpg": jpeg() for line in TRAINVAL + TEST}
    return photos | {
        "annotations/trainval.txt": "\n".join(TRAINVAL).encode(),
        "annotations/test.txt": "\n".join(TEST).encode(),
        "annotations/list.txt": (HEADER + "\n".join(TRAINVAL + TEST)).encode(),
    }


@pytest.fixture
def downloaded(tmp_path) -> Path:
    """The dataset as it lies on disk when its archives are unpacked."""
    folder = tmp_path / "oxford-iiit-pet"
    for name, contents in dataset_files().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(contents)
    return folder


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


ARRANGED = {
    "train/Abyssinian/Abyssinian_1.jpg",
    "train/British_Shorthair/British_Shorthair_1.jpg",
    "train/other/american_bulldog_1.jpg",
    "train/other/pug_1.jpg",
    "val/Abyssinian/Abyssinian_2.jpg",
    "val/British_Shorthair/British_Shorthair_2.jpg",
    "val/other/american_bulldog_2.jpg",
}


def test_breeds_of_cats_are_classes_and_all_dogs_are_other(downloaded, tmp_path):
    oxford_pets.arrange(downloaded, tmp_path / "cats")
    assert files_of(tmp_path / "cats") == ARRANGED


def test_a_missing_photo_leaves_nothing_behind(downloaded, tmp_path):
    (downloaded / "images" / "pug_1.jpg").unlink()
    with pytest.raises(UserError, match=r"pug_1\.jpg is missing"):
        oxford_pets.arrange(downloaded, tmp_path / "cats")
    assert [path.name for path in tmp_path.iterdir()] == ["oxford-iiit-pet"]


def test_a_broken_list_is_refused_by_name(downloaded, tmp_path):
    (downloaded / "annotations" / "test.txt").write_text("Abyssinian_2 1")
    with pytest.raises(UserError, match=r"test\.txt is no list"):
        oxford_pets.arrange(downloaded, tmp_path / "cats")


def test_real_photos_with_the_real_list_are_arranged(pets_sample, tmp_path):
    oxford_pets.arrange(pets_sample, tmp_path / "cats")
    folder = scan(tmp_path / "cats")
    assert folder.classes == ("Abyssinian", "Siamese", "Sphynx", "other")
    assert len(folder.files) == len(list(pets_sample.glob("*.jpg")))
    assert {file.path.split("/")[0] for file in folder.files} == {"train", "val"}


class Mirror:
    """A download server on loopback that can cut an archive off in the middle."""

    def __init__(self, folder: Path):
        self.folder, self.requests, self.cut = folder, [], set()
        mirror = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/")
                mirror.requests.append(name)
                contents = (mirror.folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(contents)))
                self.end_headers()
                self.wfile.write(contents[: len(contents) // 2] if name in mirror.cut else contents)

            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()
    sums = []
    for archive, prefix in (("images.tar.gz", "images/"), ("annotations.tar.gz", "annotations/")):
        with tarfile.open(folder / archive, "w:gz") as tar:
            for name, contents in dataset_files().items():
                if name.startswith(prefix):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(contents)
                    tar.addfile(entry, io.BytesIO(contents))
        sums.append(f"{hashlib.md5((folder / archive).read_bytes()).hexdigest()}  {archive}\n")
    (folder / "md5sums.txt").write_text("".join(sums))
    server = Mirror(folder)
    monkeypatch.setenv(oxford_pets.MIRROR_VARIABLE, server.address)
    yield server
    server.server.shutdown()


def test_the_dataset_is_downloaded_arranged_and_not_fetched_again(mirror, tmp_path):
    oxford_pets.download(tmp_path / "data" / "cats")
    assert files_of(tmp_path / "data") == {f"cats/{path}" for path in ARRANGED}
    asked = len(mirror.requests)
    oxford_pets.download(tmp_path / "data" / "cats")
    assert len(mirror.requests) == asked


def test_a_download_cut_in_the_middle_is_not_taken_for_whole_and_goes_on_when_run_again(mirror, tmp_path):
    mirror.cut = {"annotations.tar.gz"}
    with pytest.raises(TransientError, match="run this again"):
        oxford_pets.download(tmp_path / "data" / "cats")
    assert not (tmp_path / "data" / "cats").exists()

    mirror.cut, mirror.requests = set(), []
    oxford_pets.download(tmp_path / "data" / "cats")
    assert "images.tar.gz" not in mirror.requests, "an archive that arrived whole is kept"
    assert files_of(tmp_path / "data" / "cats") == ARRANGED


def test_unpacking_cut_in_the_middle_is_done_again(mirror, tmp_path):
    half = tmp_path / "data" / "cats.download" / "oxford-iiit-pet"
    for folder in ("images", "annotations"):
        (half / folder).mkdir(parents=True)
    (half / "images" / "Abyssinian_1.jpg").write_bytes(b"half a photo")
    oxford_pets.download(tmp_path / "data" / "cats")
    assert files_of(tmp_path / "data" / "cats") == ARRANGED
    assert (tmp_path / "data/cats/train/Abyssinian/Abyssinian_1.jpg").read_bytes() == jpeg()


def test_without_a_network_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv(oxford_pets.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="cannot download"):
        oxford_pets.download(tmp_path / "data" / "cats")
