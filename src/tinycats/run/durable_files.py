"""Files that are either whole or not there, written to a temporary name, synced, renamed; and files that are known
for damaged when they are, by a last line with the SHA-256 of all before it."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tinycats.script.errors import UserError

_FOOTER = b"\ntinycats sha256 "
_FOOTER_LENGTH = len(_FOOTER) + 64 + 1


class DamagedFile(UserError):
    """The file is cut off, altered, or was never written by this program."""


def partial_name(path: Path) -> Path:
    """The temporary name of `path`: beside it, so that the rename is atomic, and always the same, so that
    what a killed process leaves is overwritten by the next one and never piles up."""
    return path.with_name(f".{path.name}.partial")


_SYNCABLE = os.O_RDWR if os.name == "nt" else os.O_RDONLY  # Windows syncs only what may be written


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut: a rename lasts once its folder is synced."""
    try:
        descriptor = os.open(path, _SYNCABLE)
    except PermissionError:
        if path.is_dir():  # Windows opens no folder, and keeps its names without being told
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it appears, whole, when the block ends and not at all if it raises.

    Raises:
        OSError: the folder is not writable, the disk is full.
    """
    partial = partial_name(path)
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def publish_copy(file: Path, destination: Path) -> None:
    """Copy a file that nobody else writes to where others publish theirs: the last one stays, whole.

    Raises:
        OSError: `destination` is not writable, or not on the same disk, or that is full.
    """
    partial = partial_name(file.with_name(f"{file.name}.copy"))  # beside the file: one that is ours alone
    try:
        shutil.copyfile(file, partial)
        _sync(partial)
        partial.replace(destination)
        _sync(destination.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `path` when the block ends and vanishes if it raises.

    If another process put `path` in place meanwhile, theirs is kept.
    """
    # Two processes may prepare the same folder at once, so the name carries the process id.
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        publish_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish_folder(partial: Path, path: Path) -> None:
    """Rename a folder that is filled, durably; where another process has put `path` in place, theirs is kept."""
    for entry in partial.rglob("*"):
        _sync(entry)
    try:
        partial.rename(path)
    except OSError:
        if not path.is_dir():
            raise
    _sync(path.parent)


class DigestingWriter:
    """Writes to a file, and knows the line to end it with, so that `read_whole` knows whether it is whole.

    torch.save makes an error of its own of whatever is raised while it writes: so that is kept for `footer`.
    """

    def __init__(self, file: BinaryIO):
        self._file, self._digest = file, hashlib.sha256()
        self._problem: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write as the file does; after an error, nothing."""
        if self._problem is None:
            try:
                self._digest.update(data)
                return self._file.write(data)
            except OSError as error:
                self._problem = error
        return len(data)

    def flush(self) -> None:
        """Flush as the file does."""
        self._file.flush()

    def footer(self) -> bytes:
        """The line that ends what was written.

        Raises:
            OSError: it could not be written.
        """
        if self._problem is not None:
            raise self._problem
        return _footer(self._digest)


def footer(payload: bytes | memoryview) -> bytes:
    """The line that ends a file which holds `payload`, so that `read_whole` knows whether it is whole."""
    return _footer(hashlib.sha256(payload))


def _footer(digest: "hashlib._Hash") -> bytes:
    return _FOOTER + digest.hexdigest().encode() + b"\n"


def read_whole(path: Path) -> memoryview:
    """What a file holds before its footer.

    Raises:
        DamagedFile: a bit of it is not as it was written, or it has no footer.
        OSError: it cannot be read.
    """
    stored = memoryview(path.read_bytes())
    payload, end = stored[:-_FOOTER_LENGTH], bytes(stored[-_FOOTER_LENGTH:])
    if not end.startswith(_FOOTER):
        raise DamagedFile(f"{path} is cut off or is no file of this program")
    if end != footer(payload):
        raise DamagedFile(f"{path} is damaged: its contents do not match their digest")
    return payload
