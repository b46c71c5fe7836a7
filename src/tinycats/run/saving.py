"""What a run writes, written by a thread while training goes on: checkpoints, rows, images, lines of its log."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch


class Writer:
    """A thread that does what it is given, one after another.

    No two things are written at the same time: a commit of a Modal volume ends with a reload, which fails while a file
    on it is open. What goes wrong is raised by whichever method is called next.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "writer")
        self._checkpoint: Future[None] | None = None
        self._problem: BaseException | None = None
        self._buffers: dict[tuple, torch.Tensor] = {}

    def write(self, function: Callable[..., None], *arguments: Any) -> None:
        """Have `function(*arguments)` called."""
        self.check()
        self._pool.submit(self._call, function, *arguments)

    def hand_over(self, function: Callable[..., None], *arguments: Any) -> bool:
        """Have it called, whatever went wrong before; False if the thread has ended."""
        try:
            self._pool.submit(self._call, function, *arguments)
        except RuntimeError:
            return False
        return True

    def save(self, function: Callable[[dict[str, Any]], None], checkpoint: dict[str, Any]) -> None:
        """Copy the checkpoint to host memory, which is kept for the next one, and have `function(copy)` called; waits
        for the checkpoint before it."""
        if self._checkpoint:
            self._checkpoint.result()
        self.check()
        copy = self._copied(checkpoint, ())
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # the copies have arrived
        self._checkpoint = self._pool.submit(self._call, function, copy)

    @property
    def is_saving(self) -> bool:
        """Whether the last checkpoint is still to be saved."""
        return self._checkpoint is not None and not self._checkpoint.done()

    def check(self) -> None:
        """Raise what went wrong."""
        if self._problem is not None:
            problem, self._problem = self._problem, None
            raise problem

    def wait(self) -> None:
        """Until everything is done that was given."""
        self._pool.submit(lambda: None).result()
        self.check()

    def close(self) -> None:
        """End the thread, when it has done what it was given."""
        self._pool.shutdown()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        try:
            function(*arguments)
        except BaseException as error:
            self._problem = self._problem or error

    def _copied(self, value: Any, place: tuple) -> Any:
        if isinstance(value, torch.Tensor):
            buffer = self._buffers.get(place)
            if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
                # In pinned memory a GPU writes several times as fast.
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
                self._buffers[place] = buffer
            return buffer.copy_(value.detach(), non_blocking=True)
        if isinstance(value, Mapping):
            return {key: self._copied(part, (*place, key)) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copied(part, (*place, number)) for number, part in enumerate(value))
        return value


class LogFile(logging.Handler):
    """Appends to a file, which is open for each line only, by the writer's thread while there is one."""

    def __init__(self, path: Path, writer: Writer):
        super().__init__()
        self._path, self._writer = path, writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record) + "\n"
            if not self._writer.hand_over(self._append, line):
                self._append(line)
        except Exception:
            self.handleError(record)

    def _append(self, line: str) -> None:
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError:  # a log that cannot be written ends no run
            pass
