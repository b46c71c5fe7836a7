"""data/cats from the Oxford-IIIT Pet dataset: arranged by breed, downloaded whole or not at all."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from pets_mirror import dataset_files, jpeg
from tinycats.images import oxford_pets
from tinycats.images.image_folders import scan
from tinycats.script.errors import TransientError, UserError


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


@pytest.mark.slow
def test_the_download_script_prepares_data_cats_beside_itself(mirror, tmp_path):
    """`bash data/download.sh`, in a copy of the project, from any folder."""
    project = tmp_path / "project"
    (project / "data").mkdir(parents=True)
    (project / "src").symlink_to(REPOSITORY / "src")
    (project / ".venv").symlink_to(sys.prefix)
    shutil.copy(REPOSITORY / "data" / "download.sh", project / "data")
    command = ["bash", str(project / "data" / "download.sh")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "about 811 MB" in result.stdout
    assert files_of(project / "data" / "cats") == ARRANGED

    mirror.cut = {"images.tar.gz"}
    shutil.rmtree(project / "data" / "cats")
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: cannot download the dataset")
    assert not (project / "data" / "cats").exists()


def test_without_a_network_it_says_so_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv(oxford_pets.MIRROR_VARIABLE, "http://127.0.0.1:9")
    with pytest.raises(TransientError, match="cannot download"):
        oxford_pets.download(tmp_path / "data" / "cats")
