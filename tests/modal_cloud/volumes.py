"""Volumes: directories that outlive a run, and the copies of them that containers see."""

import shutil
import threading
from pathlib import Path

Snapshot = dict[str, tuple[int, int, int]]  # path -> (inode, size, time of change), of files


class Volume:
    """What has been committed, as a plain folder: `Volume.files` is what `modal volume get` serves."""

    def __init__(self, volume_id: str, name: str, files: Path):
        self.volume_id, self.name, self.files = volume_id, name, files
        self.commits = 0
        self.lock = threading.Lock()  # commits, and all that looks at what they leave, take turns
        files.mkdir(parents=True)


class Mounted:
    """A volume as one container sees it: what was last committed, and what it has written itself.

    On Modal a container's writes are its own until they are committed, and others' commits are not seen
    before `reload()`. So this is a copy, brought into step by files.
    """

    def __init__(self, volume: Volume, folder: Path):
        self.volume, self.folder = volume, folder
        self._is_mounted = True
        with volume.lock:
            shutil.copytree(volume.files, folder, symlinks=True)
            self._mine, self._theirs = snapshot(folder), snapshot(volume.files)

    def commit(self) -> None:
        """Make what this container has changed since its last commit the volume's."""
        with self.volume.lock:
            if not self._is_mounted:
                return
            now = snapshot(self.folder)
            _apply(self._mine, now, self.folder, self.volume.files)
            self._mine, self._theirs = now, snapshot(self.volume.files)
            self.volume.commits += 1

    def reload(self) -> None:
        """Take over what others have committed; what this container has changed and not committed stays."""
        with self.volume.lock:
            theirs, before = snapshot(self.volume.files), snapshot(self.folder)
            uncommitted = {path for path, facts in before.items() if self._mine.get(path) != facts}
            _apply(self._theirs, theirs, self.volume.files, self.folder)
            known = {path: facts for path, facts in self._mine.items() if path in uncommitted or path not in before}
            present = {path: facts for path, facts in snapshot(self.folder).items() if path not in uncommitted}
            self._mine, self._theirs = present | known, theirs

    def unmount(self) -> None:
        """The container has ended: a commit that still comes must not take its empty folder for removals."""
        with self.volume.lock:
            self._is_mounted = False


def snapshot(folder: Path) -> Snapshot:
    """What identifies the present contents of each file below `folder`."""
    facts = {}
    for path in folder.rglob("*"):
        try:
            stat = path.lstat()
        except FileNotFoundError:  # renamed while we look: its new name is found or will be
            continue
        if not path.is_dir():
            facts[path.relative_to(folder).as_posix()] = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
    return facts


def _apply(before: Snapshot, after: Snapshot, source: Path, destination: Path) -> None:
    for path, facts in after.items():
        if before.get(path) != facts:
            target = destination / path
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(target.name + ".being-committed")
            try:
                shutil.copy2(source / path, partial, follow_symlinks=False)
            except FileNotFoundError:
                continue
            partial.replace(target)
    for path in before.keys() - after.keys():
        (destination / path).unlink(missing_ok=True)
    for folder in sorted((path for path in destination.rglob("*") if path.is_dir()), reverse=True):
        if not (source / folder.relative_to(destination)).exists() and not any(folder.iterdir()):
            folder.rmdir()
