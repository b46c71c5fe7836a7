"""TensorBoard's curves and images, written while the caller waits.

torch's SummaryWriter writes in a thread of its own: a disk that is full then shows as a traceback of that thread, and a
file may be open in the middle of a commit of Modal's volume.
"""

import os
import socket
import time
from pathlib import Path

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import image, scalar


class EventFile:
    """A file of events in a run's folder, closed again after each.

    Args:
        step: where the run goes on from, 0 for a new one: of older files' events TensorBoard shows none after it.

    Raises:
        OSError: the disk is full, the folder is not writable; so do all methods.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._write(Event(file_version="brain.Event:2"))
        if step:
            self._write(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """A point of the curve of that name."""
        self._write(Event(step=step, summary=scalar(name, value)))

    def add_image(self, name: str, pixels: torch.Tensor, step: int) -> None:
        """An image, uint8 [3, H, W]."""
        self._write(Event(step=step, summary=image(name, pixels.numpy(), dataformats="CHW")))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        with self._path.open("ab") as file:
            RecordWriter(file).write(event.SerializeToString())
