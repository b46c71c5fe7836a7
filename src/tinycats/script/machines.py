"""Where a run takes place: what a training loop asks of its machine, and the answers of an ordinary one."""

import os
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from tinycats.images.frames import Frame
from tinycats.script.errors import UserError

if TYPE_CHECKING:
    from tinycats.images.packed_images import PackedImages


LOCK_PATIENCE = 0.3  # seconds: who only looks whether a run is locked holds its lock for a moment


class ThisMachine:
    """A laptop, or any machine on which a script is started by `python`.

    Args:
        script: the script's name, for the commands that it recommends.
    """

    expects_gpu = False  # whether training without one is worth a warning
    launcher = "python"  # what starts a script there

    def __init__(self, script: str):
        self.script = script

    def open_dataset(self, data_dir: Path, frame: Frame, output_dir: Path) -> "PackedImages":
        """The images of `data_dir`, ready for random access; see `datasets.open_dataset`."""
        from tinycats.images.datasets import open_dataset  # needs numpy and Pillow, which `modal run` works without

        return open_dataset(data_dir, frame, fallback=output_dir)

    def num_workers(self, on_gpu: bool) -> int:
        """How many loader threads keep a GPU busy, or leave a CPU that trains its cores."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min(8, cores) if on_gpu else min(2, cores // 2)

    def lock(self, run: Path) -> AbstractContextManager[object]:
        """Keeps other processes off the run in the folder `run` until it is left, by the file `.lock` there.

        Raises:
            UserError: another process is training this run.
            OSError: the folder cannot be written.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(run / ".lock")
        try:
            return lock.acquire(timeout=LOCK_PATIENCE)
        except Timeout:
            raise UserError(f"another process is training {run}") from None

    def compiled_code(self, _device: str) -> Path | None:
        """Where compiled code for that kind of device is kept for other machines; None: torch keeps it on this one."""
        return None

    def persist(self) -> None:
        """Make durable what has been written; here it is already."""

    def how_to_resume(self, run: PurePath) -> str:
        """The command that goes on with the run in the folder `run`."""
        by_name = run.parent == Path("outputs/runs")
        return f"python src/{self.script} --resume {run.name if by_name else run / 'state.pt'}"

    def how_to_fetch(self, model: Path) -> str:
        """Where the finished model is to be found."""
        return str(model)
