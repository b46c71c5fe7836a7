"""Packing a folder: every image decoded once, so that no training step has to.

Decoding a photo costs several milliseconds, cropping one that is decoded a fraction of one: whoever decodes in the
training loop lets the GPU wait. So the first use of a folder packs it beside itself, <folder>.packed/<frame>-<key>/,
where the key covers the files' names, sizes and times and the packing itself: change any, and it is packed anew.

Packing is interrupted as a run is: a block of images that was written is not decoded again.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from tinycats.images import decoding
from tinycats.images.frames import Frame
from tinycats.images.image_folders import ImageFile, ImageFolder
from tinycats.images.packed_images import FORMAT, IMAGES, PATHS, PIXELS, RECORD, PackedImages, checksum_of, write_index
from tinycats.images.prefetching import prefetch
from tinycats.run.durable_files import DamagedFile, atomic_write, footer, publish_folder, read_whole
from tinycats.script.errors import UserError

log = logging.getLogger(__name__)

MAX_UNREADABLE = 0.1  # the part of the images that may be unreadable before the folder is taken for broken
FEW_UNREADABLE = 3  # and that many may always be
MAX_NAMED = 1000  # so many of them are named in the index
PROGRESS = "progress.json"  # in a folder that is being packed
BLOCK_IMAGES, BLOCK_BYTES = 4096, 2**26  # what is written, and made durable, at once
PERSIST_EVERY = 60  # seconds until `persist` is called again, and a line of progress logged

Lock = Callable[[Path], AbstractContextManager[object]]


def packed(
    source: ImageFolder,
    frame: Frame,
    places: Sequence[Path],
    *,
    lock: Lock = FileLock,
    persist: Callable[[], None] = lambda: None,
) -> PackedImages:
    """The images of `source` packed in `frame`; packs them first if that was not done before.

    Args:
        places: folders for packed folders, the best first; of those that can be written the first is used.
        lock: of a file, keeps others from packing the folder at the same time: they wait.
        persist: called every minute, while no file is open that is written or packed.

    Raises:
        UserError: too many unreadable images, a class without a readable one, a full disk.
    """
    name = f"{frame.name}-{_key(source, frame)}"
    if images := _opened(source, [place / name for place in places]):
        return images
    place = next((place for place in places if _is_writable(place)), places[-1]) / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with lock(place.parent / ".lock"):
            if images := _opened(source, [place]):  # whoever held the lock has packed it
                return images
            partial = place.with_name(f".{name}.partial")
            try:
                _Packing(source, frame, partial).run(persist)
                publish_folder(partial, place)
                (place / PROGRESS).unlink(missing_ok=True)
            except (UserError, OSError):  # what stays is for going on, and this would not get any further
                shutil.rmtree(partial, ignore_errors=True)
                raise
            _remove_stale(place, frame)
    except OSError as error:
        raise UserError(f"cannot pack {source.root} into {place}: {error.strerror}") from error
    images = PackedImages(place, source.root)
    _report_unreadable(source, images)
    return images


def beside_folder(root: Path) -> Path:
    """Where the packed images of a folder belong."""
    return root.resolve().with_name(root.resolve().name + ".packed")


def _opened(source: ImageFolder, places: Sequence[Path]) -> PackedImages | None:
    for place in places:
        if place.is_dir():
            try:
                images = PackedImages(place, source.root)
            except (OSError, DamagedFile) as error:
                log.warning("%s: packing again", error)
                shutil.rmtree(place, ignore_errors=True)
                continue
            _report_unreadable(source, images)
            return images
    return None


def _remove_stale(place: Path, frame: Frame) -> None:
    """What was packed of the folder as it was; whoever still has it mapped keeps it."""
    for stale in [*place.parent.glob(f"{frame.name}-*"), *place.parent.glob(f".{frame.name}-*.partial")]:
        if stale != place:
            shutil.rmtree(stale, ignore_errors=True)


def _key(source: ImageFolder, frame: Frame) -> str:
    constants = (FORMAT, asdict(frame), decoding.MIN_SIDE, decoding.MAX_ASPECT, decoding.MAX_PIXELS)
    digest = hashlib.sha256(repr((constants, source.classes)).encode())
    root = os.fspath(source.root)
    for file in source.files:
        facts: tuple[int, int | None]
        try:
            stat = os.stat(f"{root}/{file.path}")  # noqa: PTH116 (a Path for each of a million files takes seconds)
            facts = (stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            facts = (-1, error.errno)  # a dangling link: it is there by name and will be found unreadable
        digest.update(repr((file.path, file.label, file.split, *facts)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _report_unreadable(source: ImageFolder, images: PackedImages) -> None:
    for path, reason in images.unreadable[:10]:
        log.warning("Left out %s: %s", source.root / path, reason)
    if images.unreadable_count > 10:
        log.warning("Left out %d more images that cannot be read", images.unreadable_count - 10)


@dataclass
class _Progress:
    """How far packing has come; what is in the files beyond it was not made durable.

    Attributes:
        done: files that were decoded or found unreadable.
        images: those that are packed; `training` of them to train on.
        crc32: of what is in images.bin and paths.bin so far.
    """

    done: int = 0
    images: int = 0
    training: int = 0
    pixels_size: int = 0
    paths_size: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    unreadable_count: int = 0
    crc32: dict[str, int] = field(default_factory=lambda: {IMAGES: 0, PATHS: 0})


class _Packing:
    """The packing of a folder into `partial`, from where another process was interrupted in it."""

    def __init__(self, source: ImageFolder, frame: Frame, partial: Path):
        self.source, self.frame, self.folder = source, frame, partial
        self.files = sorted(source.files, key=lambda file: (file.split != "train", file.path))
        self.progress = self._found() or self._begun()

    def run(self, persist: Callable[[], None]) -> None:
        """Pack what is not packed yet.

        Raises:
            UserError: too many unreadable images, a class without a readable one.
            OSError: the disk is full.
        """
        begun = self.progress.done
        log.info(
            "Packing %d images of %s (once) into %s%s",
            len(self.files),
            self.source.root,
            self.folder.parent,
            f": going on at image {begun}" if begun else "",
        )
        with tqdm(total=len(self.files), initial=begun, desc="Packing", unit="img", disable=None) as bar:
            while self.progress.done < len(self.files):
                until = time.monotonic() + PERSIST_EVERY
                with closing(_decode_all(self.source.root, self.files[self.progress.done :], self.frame)) as decoded:
                    for block in _in_blocks(decoded):
                        self._write(block)
                        bar.update(len(block))
                        if time.monotonic() > until:
                            break
                if self.progress.done < len(self.files):
                    log.info("Packed %d of %d images", self.progress.done, len(self.files))
                    persist()
        self._check()
        write_index(self.folder, self._index())

    def _begun(self) -> _Progress:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for name in (PIXELS, IMAGES, PATHS):
            (self.folder / name).touch()
        return _Progress()

    def _found(self) -> _Progress | None:
        """What an interrupted packing left, cut off after what is known to be whole."""
        try:
            progress = _Progress(**json.loads(bytes(read_whole(self.folder / PROGRESS))))
            sizes = {IMAGES: progress.images * RECORD.itemsize, PATHS: progress.paths_size}
            if any(checksum_of(self.folder / name, size) != progress.crc32[name] for name, size in sizes.items()):
                return None
            for name, size in (sizes | {PIXELS: progress.pixels_size}).items():
                if (self.folder / name).stat().st_size < size:
                    return None
                os.truncate(self.folder / name, size)
        except (OSError, DamagedFile):
            return None
        return progress

    def _write(self, block: Sequence["_Decoded"]) -> None:
        """Append a block of images, and make it durable."""
        progress = self.progress
        records, pixels, paths, unreadable = [], [], [], []
        for image in block:
            if image.pixels is None:
                unreadable.append((image.file.path, image.reason))
                continue
            path = image.file.path.encode("utf-8", "surrogateescape")
            progress.pixels_size += image.pixels.size
            progress.paths_size += len(path)
            height, width, _ = image.pixels.shape
            ends = (progress.pixels_size, progress.paths_size)
            records.append((*ends, image.crc32, image.file.label, height, width, 0))
            pixels.append(image.pixels.data)
            paths.append(path)
            progress.training += image.file.split == "train"
        self._append(PIXELS, pixels)
        for name, contents in ((PATHS, b"".join(paths)), (IMAGES, np.array(records, RECORD).tobytes())):
            self._append(name, [contents])
            progress.crc32[name] = zlib.crc32(contents, progress.crc32[name])
        progress.done += len(block)
        progress.images += len(records)
        progress.unreadable += unreadable[: MAX_NAMED - len(progress.unreadable)]
        progress.unreadable_count += len(unreadable)
        with atomic_write(self.folder / PROGRESS) as file:
            payload = json.dumps(asdict(progress)).encode()
            file.write(payload + footer(payload))

    def _append(self, name: str, contents: Sequence[bytes | memoryview]) -> None:
        with (self.folder / name).open("ab") as file:
            file.writelines(contents)
            file.flush()
            os.fsync(file.fileno())

    def _check(self) -> None:
        progress, source = self.progress, self.source
        if progress.unreadable_count > max(FEW_UNREADABLE, MAX_UNREADABLE * len(self.files)):
            path, reason = progress.unreadable[0]
            raise UserError(
                f"{source.root}: {progress.unreadable_count} of {len(self.files)} images cannot be read, "
                f"the first of them {path} ({reason}); mend or remove them"
            )
        labels = np.fromfile(self.folder / IMAGES, RECORD)["label"]
        for split, part in (("train", labels[: progress.training]), ("val", labels[progress.training :])):
            present = set(np.unique(part).tolist())
            for label, name in enumerate(source.classes):
                if label not in present:
                    raise UserError(f"{source.root}: the class {name!r} has no readable image for {split}")

    def _index(self) -> dict[str, object]:
        progress = self.progress
        content = hashlib.sha256(repr((self.source.classes, asdict(self.frame), progress.training)).encode())
        for name in (IMAGES, PATHS):  # with the CRC-32 of every image
            with (self.folder / name).open("rb") as file:
                while chunk := file.read(2**20):
                    content.update(chunk)
        return {
            "frame": asdict(self.frame),
            "classes": self.source.classes,
            "images": progress.images,
            "train": progress.training,
            "unreadable": progress.unreadable,
            "unreadable_count": progress.unreadable_count,
            "content": content.hexdigest(),
        }


# --- decoding ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decoded:
    """A file, with its pixels and their CRC-32 or the reason why it has none."""

    file: ImageFile
    pixels: np.ndarray | None = None
    crc32: int = 0
    reason: str = ""


def _decode(root: Path, file: ImageFile, frame: Frame) -> _Decoded:
    path = root / file.path
    try:
        pixels = decoding.decode(path, frame)
    except Exception as error:  # a broken file makes Pillow's plugins raise whatever they like
        reason = (str(error) or type(error).__name__).replace(os.fspath(path), path.name)
        return _Decoded(file, reason=reason.splitlines()[0])
    return _Decoded(file, pixels, zlib.crc32(pixels.data))


def _decode_all(root: Path, files: Sequence[ImageFile], frame: Frame) -> Generator[_Decoded]:
    """Each file, in order, decoded on all cores. Threads do: Pillow lets go of Python's lock while it decodes and
    resizes."""
    workers = os.cpu_count() or 1
    # Bounded: a slow disk must not fill the memory.
    return prefetch(lambda file: _decode(root, file, frame), files, workers, 8 * workers)


def _in_blocks(images: Iterator[_Decoded]) -> Iterator[list[_Decoded]]:
    block: list[_Decoded] = []
    size = 0
    for image in images:
        block.append(image)
        size += 0 if image.pixels is None else image.pixels.size
        if len(block) == BLOCK_IMAGES or size >= BLOCK_BYTES:
            yield block
            block, size = [], 0
    if block:
        yield block
