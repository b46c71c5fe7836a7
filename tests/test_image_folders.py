"""Which images of a folder belong to the data set, and which are held out."""

import unicodedata
from pathlib import Path

import pytest

from tinycats.images.image_folders import scan
from tinycats.script.errors import UserError


def fill(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    return root


def held_out(root: Path) -> set[str]:
    return {file.path for file in scan(root).files if file.split == "val"}


def test_a_split_folder_keeps_its_split(tmp_path):
    folder = scan(fill(tmp_path, "train/b/1.jpg", "train/a/2.PNG", "val/a/3.jpg", "val/b/4.webp"))
    assert folder.classes == ("a", "b")
    assert [(file.path, file.label, file.split) for file in folder.files] == [
        ("train/a/2.PNG", 0, "train"),
        ("train/b/1.jpg", 1, "train"),
        ("val/a/3.jpg", 0, "val"),
        ("val/b/4.webp", 1, "val"),
    ]


def test_a_fifth_of_each_class_is_held_out_and_always_the_same(tmp_path):
    names = [f"{name}/{number}.jpg" for name in "ab" for number in range(20)]
    one = held_out(fill(tmp_path / "one", *names))
    other = held_out(fill(tmp_path / "other", *reversed(names)))
    assert one == other
    assert sum(path.startswith("a/") for path in one) == sum(path.startswith("b/") for path in one) == 4


def test_a_new_image_does_not_reshuffle_the_others(tmp_path):
    names = [f"a/{number}.jpg" for number in range(20)]
    before = held_out(fill(tmp_path, *names))
    after = held_out(fill(tmp_path, "a/new.jpg"))
    assert len(before - after) <= 1


def test_composed_and_decomposed_names_are_held_out_alike(tmp_path):
    names = [f"chatte/é{number}.jpg" for number in range(10)]
    composed = held_out(fill(tmp_path / "c", *(unicodedata.normalize("NFC", name) for name in names)))
    decomposed = held_out(fill(tmp_path / "d", *(unicodedata.normalize("NFD", name) for name in names)))
    assert composed == {unicodedata.normalize("NFC", path) for path in decomposed}


def test_what_is_no_image_is_passed_over(tmp_path):
    folder = scan(
        fill(tmp_path, "a/1.jpg", "a/2.jpg", "a/notes.txt", "a/Thumbs.db", "a/._1.jpg", ".git/x.jpg", "a/deep/3.jpg")
    )
    assert [file.path for file in folder.files] == ["a/1.jpg", "a/2.jpg", "a/deep/3.jpg"]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (["a/1.jpg", "a/2.jpg", "b/readme.txt"], "b has no images"),
        (["train/a/1.jpg", "val/a/1.jpg", "val/b/1.jpg"], "'b' is in val/ but not in train/"),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg"], "'b' has one image"),
        (["1.jpg", "2.jpg"], "has no class folders"),
    ],
)
def test_a_folder_that_cannot_be_trained_on_is_refused_by_name(tmp_path, paths, message):
    with pytest.raises(UserError, match=message):
        scan(fill(tmp_path, *paths))
