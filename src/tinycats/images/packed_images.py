"""Images that were decoded once, in a memory map: a batch costs the same among a thousand and among ten million.

A packed folder, `<folder>.packed/<frame>-<key>/` (see `packing`), holds

    pixels.bin     height x width x 3 uint8 an image, one after another: those to train on, then those to validate with
    images.bin     a RECORD an image: where it ends, its size, its label, its CRC-32
    paths.bin      the images' paths in the folder that was packed, one after another
    index.json     classes, counts, what was left out, and the other files' CRC-32; its own SHA-256 is its last line

What is damaged is noticed before it is used: all but the pixels whenever the folder is opened, and an image when it is
first read.
"""

import contextlib
import json
import logging
import os
import shutil
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from tinycats.images.decoding import decode
from tinycats.images.frames import Frame
from tinycats.run.durable_files import DamagedFile, footer, read_whole
from tinycats.script.errors import TransientError

log = logging.getLogger(__name__)

FORMAT = 3  # goes up when the same images would be packed into other bytes
RECORD = np.dtype(
    [
        ("pixels_end", "<u8"),  # the byte of pixels.bin after the image's last
        ("path_end", "<u8"),  # likewise of paths.bin
        ("crc32", "<u4"),
        ("label", "<u4"),
        ("height", "<u2"),
        ("width", "<u2"),
        ("unused", "<u4"),
    ]
)
PIXELS, IMAGES, PATHS, INDEX = "pixels.bin", "images.bin", "paths.bin", "index.json"
BLOCK = 2**24  # bytes that are read at once


class PackedImages:
    """The images of a packed folder.

    Threads may read it at the same time.

    Attributes:
        frame: the size of the images.
        classes: their names; a label is an index into them.
        labels: uint32 [N].
        content: a digest of pixels, labels, classes and split: the same images have the same, wherever and
            whenever they were packed.
        unreadable: (path, reason) of images that were left out, the first MAX_NAMED of `unreadable_count`.

    Args:
        folder: the packed folder.
        source: the folder that was packed; from it a damaged image is packed again.

    Raises:
        DamagedFile: the index or the records are damaged, or the pixels are not as many as they say.
    """

    def __init__(self, folder: Path, source: Path | None = None):
        index = read_index(folder)
        if index.get("format") != FORMAT:
            raise DamagedFile(f"{folder} was packed by another version of this program")
        self.folder, self.source = folder, source
        self.frame = Frame(**index["frame"])
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.content: str = index["content"]
        self.unreadable: list[tuple[str, str]] = [(path, reason) for path, reason in index["unreadable"]]
        self.unreadable_count: int = index["unreadable_count"]
        for name, checksum in index["crc32"].items():
            if checksum_of(folder / name) != checksum:
                raise DamagedFile(f"{folder / name} is damaged: its contents do not match their checksum")
        self._count, self._training = index["images"], index["train"]
        # Plain arrays: a slice of a np.memmap takes ten times as long as one of its memory.
        self._records = np.asarray(np.memmap(folder / IMAGES, RECORD, mode="r", shape=(self._count,)))
        path = folder / PIXELS
        if path.stat().st_size != self._records["pixels_end"][-1]:
            raise DamagedFile(f"{path} is not of the size that its index says")
        self._pixels = np.asarray(np.memmap(path, np.uint8, mode="r"))
        self._is_verified = np.zeros(self._count, bool)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> np.ndarray:
        """uint32 [N]."""
        return self._records["label"]

    def indices(self, split: str) -> range:
        """The indices of the images of `train` or `val`."""
        return range(self._training) if split == "train" else range(self._training, self._count)

    def path(self, index: int) -> str:
        """The image's path in the folder that was packed."""
        start, end = (int(self._records["path_end"][at]) if at >= 0 else 0 for at in (index - 1, index))
        with (self.folder / PATHS).open("rb") as file:
            file.seek(start)
            return file.read(end - start).decode("utf-8", "surrogateescape")

    def __getitem__(self, index: int) -> np.ndarray:
        """The image, uint8 [height, width, 3], a view of the map that cannot be written to.

        Raises:
            IndexError: there is none.
            TransientError: it is damaged, and cannot be packed again by itself; the folder will be.
        """
        if not 0 <= index < self._count:
            raise IndexError(index)
        record = self._records[index]
        height, width, end = int(record["height"]), int(record["width"]), int(record["pixels_end"])
        return self._verified(index, self._pixels[end - height * width * 3 : end].reshape(height, width, 3))

    def batch(self, indices: np.ndarray) -> np.ndarray | list[np.ndarray]:
        """The images at int64 indices [B]: uint8 [B, side, side, 3] where the frame is square, else a view of each.

        Raises:
            TransientError: as of a single image.
        """
        if not self.frame.square:
            return [self[index] for index in indices.tolist()]
        side = self.frame.side
        images = np.take(self._pixels.reshape(-1, side, side, 3), indices, axis=0)
        for position in np.flatnonzero(~self._is_verified[indices]):
            images[position] = self._verified(int(indices[position]), images[position])
        return images

    def mend(self) -> bool:
        """Verify every image, and pack again what is damaged; False if that cannot be done for one by itself: whoever
        packs the folder next then packs all of it."""
        try:
            for index in range(len(self)):
                self[index]
        except TransientError as error:
            log.warning("%s", error)
            return False
        return True

    def _verified(self, index: int, pixels: np.ndarray) -> np.ndarray:
        """The image, whose pixels in the file are these: compared with its checksum the first time, and mended."""
        if self._is_verified[index] or zlib.crc32(pixels.data) == self._records["crc32"][index]:
            self._is_verified[index] = True
            return pixels
        with self._lock:
            return self._packed_again(index)

    def _packed_again(self, index: int) -> np.ndarray:
        path, name = self.folder / PIXELS, self.path(index)
        image: np.ndarray | None = None
        if self.source:
            log.warning("%s is damaged: packing %s again", path, self.source / name)
            with contextlib.suppress(Exception):  # Pillow's plugins raise whatever they like
                image = decode(self.source / name, self.frame)
        if image is None or zlib.crc32(image.data) != self._records["crc32"][index]:
            (self.folder / INDEX).unlink(missing_ok=True)  # so that whoever comes next packs all of it
            raise TransientError(f"{path} is damaged at {name}; run this again to pack the folder anew")
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.seek(int(self._records["pixels_end"][index]) - image.size)
            file.write(image.data)
        return image


def copy_packed(source: Path, destination: Path, streams: int) -> PackedImages:
    """Copy a packed folder, and verify every image on the way: the copy's are known for whole when they are read.

    Args:
        streams: how many threads read at the same time.

    Raises:
        DamagedFile: something is damaged, or missing.
        OSError: the disk is full.
    """
    destination.mkdir(parents=True, exist_ok=True)
    try:
        for name in (IMAGES, PATHS, INDEX):
            shutil.copyfile(source / name, destination / name)
        with (source / PIXELS).open("rb") as pixels, (destination / PIXELS).open("wb") as copy:
            copy.truncate(os.fstat(pixels.fileno()).st_size)
    except FileNotFoundError as error:
        raise DamagedFile(f"{error.filename} is missing") from error
    images = PackedImages(destination)
    ends = images._records["pixels_end"].astype(np.int64)

    def copy_range(first: int, last: int) -> None:
        start = int(ends[first - 1]) if first else 0
        with (source / PIXELS).open("rb") as pixels, (destination / PIXELS).open("r+b") as copy:
            pixels.seek(start)
            block = memoryview(pixels.read(int(ends[last]) - start))
            copy.seek(start)
            copy.write(block)
        for index, (begin, end) in enumerate(pairwise([start, *ends[first : last + 1].tolist()]), first):
            if zlib.crc32(block[begin - start : end - start]) != images._records["crc32"][index]:
                raise DamagedFile(f"{source / PIXELS} is damaged at {images.path(index)}")

    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(lambda block: copy_range(*block), _blocks(ends)))
    images._is_verified[:] = True
    return images


def _blocks(ends: np.ndarray) -> Iterator[tuple[int, int]]:
    """The first and the last of some images after another, of about BLOCK bytes in all."""
    first = 0
    while first < len(ends):
        start = int(ends[first - 1]) if first else 0
        last = max(first, int(np.searchsorted(ends, start + BLOCK, "right")) - 1)
        yield first, last
        first = last + 1


def read_index(folder: Path) -> dict[str, Any]:
    """What the index of a packed folder says.

    Raises:
        DamagedFile: a bit of it is not as it was written.
        OSError: it cannot be read.
    """
    return json.loads(bytes(read_whole(folder / INDEX)))


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index of a packed folder whose other files are written, with their checksums and its digest."""
    checksums = {name: checksum_of(folder / name) for name in (IMAGES, PATHS)}
    payload = json.dumps(index | {"format": FORMAT, "crc32": checksums}).encode()
    (folder / INDEX).write_bytes(payload + footer(payload))


def checksum_of(path: Path, size: int | None = None) -> int:
    """The CRC-32 of a file, or of its first `size` bytes; takes no memory to speak of."""
    checksum, left = 0, path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while block := file.read(min(left, BLOCK)):
            checksum = zlib.crc32(block, checksum)
            left -= len(block)
    return checksum
