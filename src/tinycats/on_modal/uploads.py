"""A folder of images on its way into a volume: a few large archives instead of ten thousand small files.

On the laptop this needs nothing but the standard library. In the volume the folder holds the archives and, written
last, a receipt: the digest of all that was uploaded, and the names of its archives. An archive is named for what is in
it: one that is there is whole and is not sent again, whatever interrupted the upload.
"""

import hashlib
import io
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tinycats.images.image_folders import ImageFile, ImageFolder, scan
from tinycats.script.errors import UserError

RECEIPT = ".uploaded"
PART_BYTES = 2**27  # images go into an archive until it is as large as this


@dataclass(frozen=True)
class Part:
    """An archive: its name in the volume, the images that are in it, and their size in bytes."""

    name: str
    files: tuple[ImageFile, ...]
    size: int

    @contextmanager
    def archive(self, folder: ImageFolder) -> Iterator[BinaryIO]:
        """The archive (tar), the same whenever it is made, in a temporary file."""
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
                for file in self.files:
                    with (folder.root / file.path).open("rb") as image:
                        entry = tarfile.TarInfo(file.path)
                        entry.size = image.seek(0, io.SEEK_END)
                        image.seek(0)
                        tar.addfile(entry, image)
            archive.seek(0)
            yield archive


class Upload:
    """A folder as it would be uploaded; reads every image once.

    Attributes:
        digest: of the images, their paths, labels and splits.

    Raises:
        OSError: an image cannot be read.
    """

    def __init__(self, folder: ImageFolder):
        self.folder = folder
        self.parts: list[Part] = []
        digest, of_part = hashlib.sha256(), hashlib.sha256()
        files: list[ImageFile] = []
        size = 0
        for number, file in enumerate(folder.files, start=1):
            contents = (folder.root / file.path).read_bytes()
            facts = repr(file).encode("utf-8", "surrogateescape") + hashlib.sha256(contents).digest()
            digest.update(facts)
            of_part.update(facts)
            files.append(file)
            size += len(contents)
            if size >= PART_BYTES or number == len(folder.files):
                self.parts.append(Part(f"{len(self.parts):05}-{of_part.hexdigest()[:16]}.tar", tuple(files), size))
                of_part, files, size = hashlib.sha256(), [], 0
        self.digest = digest.hexdigest()

    def receipt(self) -> BinaryIO:
        """What says that all of it is there."""
        return io.BytesIO("\n".join([self.digest, *(part.name for part in self.parts)]).encode())


def digest_in(receipt: bytes) -> str:
    """The digest of what a receipt is for."""
    return receipt.decode().partition("\n")[0]


def is_upload(folder: Path) -> bool:
    """Whether a folder in the volume holds archives, not the images themselves."""
    return (folder / RECEIPT).is_file() and "\n" in (folder / RECEIPT).read_text()


def unpack(folder: Path, destination: Path) -> Path:
    """Unpack what was uploaded to `folder` into `destination`, which is returned.

    Raises:
        UserError: it is not what its receipt says.
    """
    digest, *names = (folder / RECEIPT).read_text().split("\n")
    shutil.rmtree(destination, ignore_errors=True)
    try:
        for name in names:
            with tarfile.open(folder / name) as tar:
                tar.extractall(destination, filter="data")
        is_whole = Upload(scan(destination)).digest == digest
    except (tarfile.TarError, FileNotFoundError, UserError):
        is_whole = False
    if not is_whole:
        raise UserError(f"what was uploaded to {folder} is damaged: remove it from the volume, and upload it again")
    return destination
