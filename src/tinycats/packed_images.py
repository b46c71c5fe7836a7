"""A folder of images decoded once, into one memory-mapped array of bytes.

Decoding a photo costs several milliseconds, cropping one that is decoded a fraction of one: whoever decodes
in the training loop lets the GPU wait. So the first use of a folder packs it beside itself, as

    <folder>.packed/<short side>px-<key>/pixels.bin     height x width x 3 uint8 an image, one after another
    <folder>.packed/<short side>px-<key>/index.json     classes, and an image's path, split, label, size and CRC-32

where the key covers the files' names, sizes and times and the packing itself: change any, and the folder is
packed anew. What is damaged is noticed before it is used: the index has a digest, and an image is compared with its
CRC-32 when it is first read.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from tinycats.durable_files import DamagedFile, atomic_folder, footer, read_whole
from tinycats.errors import TransientError, UserError
from tinycats.image_folders import ImageFile, ImageFolder

log = logging.getLogger(__name__)

FORMAT = 2  # goes up when the same files would be packed into other bytes
MIN_SIDE = 8  # pixels; a smaller image shows nothing
MAX_ASPECT = 2  # a longer image loses its ends: unbounded, a 1x10000 strip would fill the disk
MAX_UNREADABLE = 0.1  # the part of the images that may be unreadable before the folder is taken for broken
FEW_UNREADABLE = 3  # and that many may always be

# Such an image is refused by name below; Pillow's warning would only repeat it.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class PackedImages:
    """The images of a packed folder, read from a memory map.

    Attributes:
        classes: their names; a label is an index into them.
        labels: int64 [N].
        content: a digest of pixels, labels, classes and split: the same images have the same, wherever and
            whenever they were packed.
        unreadable: (path, reason) of each image that was left out.

    Pickles by path, so that a loader's worker process maps the file itself.

    Args:
        folder: the packed folder.
        source: the folder that was packed; from it a damaged image is packed again.

    Raises:
        DamagedFile: the index is damaged, or the pixels are not as many as it says.
    """

    def __init__(self, folder: Path, source: Path | None = None):
        index = json.loads(bytes(read_whole(folder / "index.json")))
        self.folder, self.source = folder, source
        self._short_side: int = index["short_side"]
        self.classes: tuple[str, ...] = tuple(index["classes"])
        self.content: str = index["content"]
        self.unreadable: list[tuple[str, str]] = [(path, reason) for path, reason in index["unreadable"]]
        self.paths = [image["path"] for image in index["images"]]
        self.labels = np.array([image["label"] for image in index["images"]], np.int64)
        self._is_train = np.array([image["split"] == "train" for image in index["images"]], bool)
        self._checksums = [image["crc32"] for image in index["images"]]
        self._is_verified = np.zeros(len(self.paths), bool)
        self._shapes = [(image["height"], image["width"], 3) for image in index["images"]]
        sizes = np.array([height * width * channels for height, width, channels in self._shapes], np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        path = folder / "pixels.bin"
        if path.stat().st_size != self._offsets[-1]:
            raise DamagedFile(f"{path} is not of the size that its index says")
        self._pixels = np.memmap(path, np.uint8, mode="c")  # torch warns of read-only ones

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:
        """The image, uint8 [height, width, 3], a view of the map (copied on writing).

        Raises:
            TransientError: it is damaged, and cannot be packed again by itself; the folder will be.
        """
        pixels = self._pixels[self._offsets[index] : self._offsets[index + 1]].reshape(self._shapes[index])
        if not self._is_verified[index]:
            if zlib.crc32(pixels.data) != self._checksums[index]:
                self._pack_again(index, pixels)
            self._is_verified[index] = True
        return pixels

    def damaged(self) -> list[str]:
        """The paths of all images whose pixels are not as they were packed; reads every image."""
        whole = np.split(self._pixels, self._offsets[1:-1])
        return [
            path
            for path, pixels, checksum in zip(self.paths, whole, self._checksums, strict=True)
            if zlib.crc32(pixels.data) != checksum
        ]

    def _pack_again(self, index: int, pixels: np.ndarray) -> None:
        path = self.folder / "pixels.bin"
        image: np.ndarray | None = None
        if self.source:
            log.warning("%s is damaged: packing %s again", path, self.source / self.paths[index])
            with contextlib.suppress(Exception):  # Pillow's plugins raise whatever they like
                image = decode(self.source / self.paths[index], self._short_side)
        if image is None or zlib.crc32(image.data) != self._checksums[index]:
            (self.folder / "index.json").unlink(missing_ok=True)  # so that whoever comes next packs all of it
            raise TransientError(f"{path} is damaged at {self.paths[index]}; run this again to pack the folder anew")
        pixels[:] = image  # for this process, whatever becomes of the file
        with contextlib.suppress(OSError), path.open("r+b") as file:
            file.seek(self._offsets[index])
            file.write(image.data)

    def indices(self, split: str) -> np.ndarray:
        """int64 indices of the images of `train` or `val`."""
        return np.flatnonzero(self._is_train == (split == "train"))

    def __reduce__(self) -> tuple:
        return PackedImages, (self.folder, self.source)


def packed(source: ImageFolder, short_side: int, fallback: Path) -> PackedImages:
    """The images of `source` packed with a shorter side of at most `short_side` pixels; packs them first
    if that was not done before. Small images are never enlarged.

    Args:
        fallback: a folder for the packed files where the one beside `source` cannot be written.

    Raises:
        UserError: too many unreadable images, a class without a readable one, a full disk.
    """
    name = f"{short_side}px-{_key(source, short_side)}"
    beside = source.root.resolve().with_name(source.root.resolve().name + ".packed")
    places = [beside / name, fallback.absolute() / beside.name / name]
    for place in places:
        if place.is_dir():
            try:
                images = PackedImages(place, source.root)
            except (OSError, DamagedFile) as error:
                log.warning("%s: packing again", error)
                shutil.rmtree(place, ignore_errors=True)
                continue
            _report_unreadable(source, images.unreadable)
            return images

    place = places[0] if _is_writable(beside) else places[1]
    log.info("Packing %d images of %s (once) into %s", len(source.files), source.root, place)
    try:
        with atomic_folder(place) as partial:
            _pack(source, short_side, partial)
    except OSError as error:
        raise UserError(f"cannot pack {source.root} into {place}: {error.strerror}") from error
    for stale in place.parent.glob(f"{short_side}px-*"):
        if stale != place:
            shutil.rmtree(stale, ignore_errors=True)  # whoever still has it mapped keeps it
    return PackedImages(place, source.root)


def _key(source: ImageFolder, short_side: int) -> str:
    digest = hashlib.sha256(repr((FORMAT, short_side, MIN_SIDE, MAX_ASPECT, source.classes)).encode())
    for file in source.files:
        facts: tuple[int, int | None]
        try:
            stat = (source.root / file.path).stat()
            facts = (stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            facts = (-1, error.errno)  # a dangling link: it is there by name and will be found unreadable
        digest.update(repr((file.path, file.label, file.split, *facts)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _pack(source: ImageFolder, short_side: int, folder: Path) -> None:
    images, unreadable = [], []
    content = hashlib.sha256(repr(source.classes).encode())
    with (folder / "pixels.bin").open("wb") as pixels:
        for file, image in tqdm(
            _decode_all(source, short_side), total=len(source.files), desc="Packing", unit="img", disable=None
        ):
            if isinstance(image, str):
                unreadable.append((file.path, image))
                continue
            pixels.write(image.data)
            content.update(repr((file.path, file.split, file.label, image.shape)).encode("utf-8", "surrogateescape"))
            content.update(image.data)
            height, width, _ = image.shape
            images.append(
                {
                    "path": file.path,
                    "split": file.split,
                    "label": file.label,
                    "height": height,
                    "width": width,
                    "crc32": zlib.crc32(image.data),
                }
            )

    _report_unreadable(source, unreadable)
    if len(unreadable) > max(FEW_UNREADABLE, MAX_UNREADABLE * len(source.files)):
        path, reason = unreadable[0]
        raise UserError(
            f"{source.root}: {len(unreadable)} of {len(source.files)} images cannot be read, "
            f"the first of them {path} ({reason}); mend or remove them"
        )
    present = Counter((image["split"], image["label"]) for image in images)
    for split in ("train", "val"):
        for label, name in enumerate(source.classes):
            if not present[split, label]:
                raise UserError(f"{source.root}: the class {name!r} has no readable image for {split}")
    index = {
        "classes": source.classes,
        "images": images,
        "unreadable": unreadable,
        "short_side": short_side,
        "content": content.hexdigest(),
    }
    write_index(folder, index)


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index of the packed folder `folder`, with its digest."""
    payload = json.dumps(index).encode()
    (folder / "index.json").write_bytes(payload + footer(payload))


def _report_unreadable(source: ImageFolder, unreadable: list[tuple[str, str]]) -> None:
    for path, reason in unreadable[:10]:
        log.warning("Left out %s: %s", source.root / path, reason)
    if len(unreadable) > 10:
        log.warning("Left out %d more images that cannot be read", len(unreadable) - 10)


def _decode_all(source: ImageFolder, short_side: int) -> Iterator[tuple[ImageFile, np.ndarray | str]]:
    """Each file, in order, with its pixels or the reason why it has none.

    Threads do: Pillow lets go of Python's lock while it decodes and resizes.
    """
    workers = os.cpu_count() or 1
    pending: deque[tuple[ImageFile, Future]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for file in source.files:
                pending.append((file, pool.submit(_decode, source.root / file.path, short_side)))
                if len(pending) > 8 * workers:  # bounded: a slow disk must not fill the memory
                    done, future = pending.popleft()
                    yield done, future.result()
            for done, future in pending:
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(path: Path, short_side: int) -> np.ndarray | str:
    try:
        return decode(path, short_side)
    except Exception as error:  # a broken file makes Pillow's plugins raise whatever they like
        return (str(error) or type(error).__name__).replace(os.fspath(path), path.name).splitlines()[0]


def decode(path: Path, short_side: int) -> np.ndarray:
    """One image as uint8 [height, width, 3]: upright (EXIF), RGB on white, its shorter side at most
    `short_side` pixels, its longer one cut to at most twice that. Of an animation, the first frame.

    Raises:
        OSError, ValueError and whatever Pillow raises: it is no image, is cut off, is a decompression bomb.
    """
    with Image.open(path) as image:
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise ValueError(f"too small ({width}x{height} pixels)")
        if Image.MAX_IMAGE_PIXELS is not None and width * height > Image.MAX_IMAGE_PIXELS:
            raise ValueError(f"too large ({width}x{height} pixels)")
        # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; twice the size leaves the resize its say.
        image.draft("RGB", (2 * short_side, 2 * short_side))
        upright = ImageOps.exif_transpose(image)
        rgb = _to_rgb(upright)

    width, height = rgb.size
    long_side = MAX_ASPECT * min(width, height)
    if max(width, height) > long_side:
        rgb = ImageOps.fit(rgb, (min(width, long_side), min(height, long_side)), Image.Resampling.BICUBIC)
        width, height = rgb.size
    if min(width, height) > short_side:
        scale = short_side / min(width, height)
        rgb = rgb.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    return np.array(rgb)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel: Pillow would clip them at 255
        levels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((levels >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
