"""A folder of images, a subfolder a class: which files belong to it, and which are held out.

Nothing here opens an image, and nothing needs more than the standard library: the laptop's side of
`modal run` checks folders with it.
"""

import hashlib
import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tinycats.script.errors import UserError, looking_at_what_the_user_named

IMAGE_SUFFIXES = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"])
HELD_OUT = 0.2  # the part of each class that validates, where the folder itself does not say


@dataclass(frozen=True, slots=True)
class ImageFile:
    """One image: its path relative to the folder (with `/`), its class's index, `train` or `val`."""

    path: str
    label: int
    split: str


@dataclass(frozen=True)
class ImageFolder:
    """A data set on disk: `classes` in alphabetical order, `files` sorted by path."""

    root: Path
    classes: tuple[str, ...]
    files: tuple[ImageFile, ...]


def scan(root: Path) -> ImageFolder:
    """List the images of `root`: `train/<class>/…` with `val/<class>/…`, or just `<class>/…`.

    Without a `val` folder a fifth of each class is held out, chosen by a hash of the file's path: the same
    files on every machine, whatever the order or the times of the files.

    Raises:
        UserError: no such folder, no class folders, a class without images, classes that differ between
            `train` and `val`.
    """
    with looking_at_what_the_user_named():
        if not root.is_dir():
            raise UserError(f"{root} is {'not a folder' if root.exists() else 'not there'}")
        return _scan(root)


def _scan(root: Path) -> ImageFolder:
    has_train, has_val = (root / "train").is_dir(), (root / "val").is_dir()
    if has_train and has_val:
        by_split = {split: _images_by_class(root, split) for split in ("train", "val")}
        train_classes, val_classes = (set(by_split[split]) for split in ("train", "val"))
        if train_classes != val_classes:
            odd = sorted(train_classes ^ val_classes)[0]
            have, lack = ("train", "val") if odd in train_classes else ("val", "train")
            raise UserError(f"{root}: the class {odd!r} is in {have}/ but not in {lack}/")
    else:
        by_class = _images_by_class(root, "train" if has_train else "")
        by_split = {"train": {}, "val": {}}
        for name, paths in by_class.items():
            if len(paths) < 2:
                raise UserError(f"{root}: the class {name!r} has one image; it takes two (one to hold out)")
            by_split["val"][name], by_split["train"][name] = hold_out(paths)

    classes = tuple(sorted(by_split["train"]))
    labels = {name: label for label, name in enumerate(classes)}
    files = [
        ImageFile(path, labels[name], split)
        for split, by_class in by_split.items()
        for name, paths in by_class.items()
        for path in paths
    ]
    return ImageFolder(root, classes, tuple(sorted(files, key=lambda file: file.path)))


def _images_by_class(root: Path, subfolder: str) -> dict[str, list[str]]:
    parent = root / subfolder
    names = sorted(entry.name for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{parent} has no class folders; put the images of each class in a folder of its own")
    by_class = {}
    for name in names:
        by_class[name] = _images_below(parent / name, root)
        if not by_class[name]:
            raise UserError(f"{parent / name} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return by_class


def _images_below(folder: Path, root: Path) -> list[str]:
    """The images in a folder and in those in it: their paths relative to `root`, sorted."""
    return sorted(  # of a million files each is looked at in a microsecond: no Path is made of them
        f"{prefix}/{file}"
        for path, _, files in os.walk(folder)
        for prefix in [Path(path).relative_to(root).as_posix()]
        for file in files
        if file[file.rfind(".") :].lower() in IMAGE_SUFFIXES and not file.startswith(".")
    )


def images_named(paths: Sequence[Path]) -> list[Path]:
    """Each file that is named, whatever its name, and of each folder the images that are in it and below.

    Raises:
        UserError: a path is not there, a folder has no image.
    """
    found = []
    with looking_at_what_the_user_named():
        for path in paths:
            if path.is_dir():
                images = [path / name for name in _images_below(path, path)]
                if not images:
                    raise UserError(f"{path} has no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
                found += images
            elif path.exists():
                found.append(path)
            else:
                raise UserError(f"{path} is not there")
    return found


def hold_out(names: list[str]) -> tuple[list[str], list[str]]:
    """Split the names of a class's images into (held out, for training), by a hash of each name."""
    shuffled = sorted(names, key=_stable_hash)
    count = max(1, round(HELD_OUT * len(names)))
    return shuffled[:count], shuffled[count:]


def _stable_hash(path: str) -> bytes:
    # macOS hands out decomposed letters, others composed ones: normalised, they are held out alike.
    return hashlib.sha256(unicodedata.normalize("NFC", path).encode("utf-8", "surrogateescape")).digest()
