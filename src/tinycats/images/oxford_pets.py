"""data/cats: the Oxford-IIIT Pet dataset (Parkhi et al., "Cats and Dogs", CVPR 2012), arranged by breed.

The twelve breeds of cats become a class each and all dogs together `other`; the official trainval and test
lists become `train` and `val`. Run as a program by data/download.sh:

    python -m tinycats.images.oxford_pets data/cats
"""

import logging
import os
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tinycats.images.image_folders import hold_out
from tinycats.run.durable_files import atomic_folder
from tinycats.script.errors import TransientError, UserError

log = logging.getLogger(__name__)

DOWNLOAD_MB = 811  # images.tar.gz (792 MB) and annotations.tar.gz (19 MB)
OTHER = "other"  # the class of all that is no cat
MIRROR_VARIABLE = "TINYCATS_PETS_MIRROR"


@dataclass(frozen=True)
class Pet:
    """A line of the dataset's lists: `Abyssinian_100 1 1 1` is image, class, species (1 cat, 2 dog), breed."""

    image: str
    is_cat: bool

    @property
    def class_name(self) -> str:
        """The breed for a cat (`British_Shorthair`), `other` for a dog."""
        return self.image.rpartition("_")[0] if self.is_cat else OTHER


def read_list(path: Path) -> list[Pet]:
    """The pets of a list file (`list.txt`, `trainval.txt`, `test.txt`), in its order.

    Raises:
        UserError: the file is missing or is no such list.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [line.split() for line in lines if line.strip() and not line.startswith("#")]
        return [Pet(image, {"1": True, "2": False}[species]) for image, _class, species, _breed in rows]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is no list of the Oxford-IIIT Pet dataset ({error})") from error


def arrange(downloaded: Path, destination: Path) -> None:
    """Lay the pets of `downloaded` out as `destination`/{train,val}/<class>/<image>.jpg.

    Args:
        downloaded: the dataset as it is unpacked (`images/`, `annotations/trainval.txt` and `test.txt`), or a
            sample of it: some photos with the dataset's `list.txt`, of whose classes a fifth is held out.
        destination: must not be there yet; it appears whole or not at all. Photos are hard links where the
            file system has them.

    Raises:
        UserError: a list is missing, or of the whole dataset a photo is.
    """
    images, annotations = downloaded / "images", downloaded / "annotations"
    if annotations.is_dir():
        splits = {"train": read_list(annotations / "trainval.txt"), "val": read_list(annotations / "test.txt")}
    else:
        images = downloaded
        splits = _split(pet for pet in read_list(downloaded / "list.txt") if (images / f"{pet.image}.jpg").exists())

    with atomic_folder(destination) as partial:
        for split, pets in splits.items():
            for pet in pets:
                photo = images / f"{pet.image}.jpg"
                if not photo.exists():
                    raise UserError(f"{photo} is missing: the download is not whole")
                folder = partial / split / pet.class_name
                folder.mkdir(parents=True, exist_ok=True)
                _link_or_copy(photo, folder / photo.name)


def _split(pets: Iterable[Pet]) -> dict[str, list[Pet]]:
    by_class: dict[str, dict[str, Pet]] = {}
    for pet in pets:
        by_class.setdefault(pet.class_name, {})[pet.image] = pet
    splits: dict[str, list[Pet]] = {"train": [], "val": []}
    for members in by_class.values():
        held_out, kept = hold_out(list(members))
        splits["val"] += [members[image] for image in held_out]
        splits["train"] += [members[image] for image in kept]
    return splits


def _link_or_copy(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def download(destination: Path) -> None:
    """Download, check and arrange the dataset into `destination`, unless it is there.

    Archives wait in `<destination>.download/` until the dataset is in place: whoever runs this again after
    a break keeps those that are whole (torchvision compares checksums) and fetches the rest.

    Raises:
        TransientError: the download failed; running it again goes on from there.
        UserError: the disk is full, or what arrived is not the dataset.
    """
    if destination.is_dir():
        log.info("%s is already there", destination)
        return
    from torchvision.datasets import OxfordIIITPet

    archives = destination.with_name(destination.name + ".download")
    unpacked = archives / "oxford-iiit-pet"
    log.info("Downloading the Oxford-IIIT Pet dataset, about %d MB, into %s", DOWNLOAD_MB, archives)
    try:
        archives.mkdir(parents=True, exist_ok=True)
        # torchvision takes folders that exist for whole ones; one that was being unpacked when the power
        # went is not. Unpacking again costs seconds.
        for folder in ("images", "annotations"):
            shutil.rmtree(unpacked / folder, ignore_errors=True)
        pets = type("Pets", (OxfordIIITPet,), {"_RESOURCES": _mirrored(OxfordIIITPet._RESOURCES)})
        pets(archives, download=True)
    except (urllib.error.URLError, ConnectionError, TimeoutError, RuntimeError, EOFError) as error:
        raise TransientError(f"cannot download the dataset ({error}); run this again to go on") from error
    except OSError as error:
        raise UserError(f"cannot download the dataset into {archives}: {error.strerror or error}") from error
    log.info("Arranging it in %s", destination)
    try:
        arrange(unpacked, destination)
    except OSError as error:
        raise UserError(f"cannot arrange the dataset in {destination}: {error.strerror or error}") from error
    shutil.rmtree(archives, ignore_errors=True)


def _mirrored(resources: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The dataset's (address, md5) pairs; from the mirror that the environment names, if it names one.

    A mirror serves the archives under their names, and their checksums as `md5sums.txt`.
    """
    mirror = os.environ.get(MIRROR_VARIABLE)
    if not mirror:
        return resources
    with urllib.request.urlopen(f"{mirror}/md5sums.txt") as response:
        sums = {name: md5 for md5, name in (line.split() for line in response.read().decode().splitlines())}
    names = [address.rpartition("/")[2] for address, _ in resources]
    return tuple((f"{mirror}/{name}", sums[name]) for name in names)


def main() -> int:
    """`python -m tinycats.images.oxford_pets DESTINATION`, for data/download.sh."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        download(Path(sys.argv[1]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; run this again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
