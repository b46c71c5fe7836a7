"""A run's folder, `<output-dir>/runs/<run>/`: its name, its lock, its logs, its metrics and its checkpoints."""

import argparse
import json
import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, TypeVar

from tinycats.run import checkpoints
from tinycats.run.durable_files import atomic_write
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import NOTHING_TRAINED, Stopped, StopSignals
from tinycats.training.processes import Processes, here

if TYPE_CHECKING:
    import torch

    from tinycats.run.saving import Writer

log = logging.getLogger(__name__)

_Path = TypeVar("_Path", bound=PurePath)  # on a laptop, or in a volume that is seen from a laptop

# Goes up when the same options come to compute another run: other batches, crops, noise. A run that another version
# began could not go on to the end that it would have had.
COMPUTATION = 17
METRICS, REPORT = "metrics.jsonl", "report.html"
DESCRIPTION = "run.json"  # in a run's folder: what is known of it without its checkpoint

LOG_FORMAT = logging.Formatter("%(asctime)s | %(levelname)-8s | %(message)s", "%Y-%m-%d %H:%M:%S")


def new_name() -> str:
    """A name that sorts by time and that no other run has: `20260225-100000-1f3a`."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def folder_of(output_dir: _Path, name: str) -> _Path:
    """Where the run of that name lives."""
    return output_dir / "runs" / name


def taken(name: str) -> str:
    """What to say to a new run that wants the name of an old one."""
    return f"the run {name} exists; go on with it by --resume {name}, or choose another name"


def unknown(name: str, place: str, known: list[str]) -> str:
    """What to say to who would resume a run that is not there."""
    return f"--resume {name}: no such run in {place} (there: {', '.join(known) or 'none'})"


def refuse_other_computation(name: str, computation: int) -> None:
    """Refuse to go on with a run that another version of this program began.

    Raises:
        UserError: it did.
    """
    if computation != COMPUTATION:
        older = "an older" if computation < COMPUTATION else "a newer"
        raise UserError(
            f"the run {name} was begun by {older} version of this program, which makes other batches of the same "
            "images: it cannot go on here; go on with it there, or start a new run"
        )


def resumed_checkpoint(output_dir: Path, resume: str) -> Path:
    """The checkpoint file that `--resume` means: the newest one of the run of that name, or the file of that path.
    The run goes on in the folder where its checkpoint lies.

    Raises:
        UserError: there is no such file or run, or the run never saved a checkpoint.
    """
    if resume.endswith(".pt"):
        if not Path(resume).is_file():
            raise UserError(f"--resume {resume}: no such file")
        return Path(resume)
    folder = folder_of(output_dir, resume)
    if not checkpoints.has_checkpoint(folder):
        known = sorted(path.name for path in output_dir.glob("runs/*") if checkpoints.has_checkpoint(path))
        raise UserError(unknown(resume, str(output_dir / "runs"), known))
    return folder / checkpoints.CHECKPOINT


def starting_point(options: argparse.Namespace, script: str) -> tuple[Path, dict[str, Any] | None]:
    """Where a command's run lives and the checkpoint to go on from, None for a new run.

    A new run's name must be free. On Modal an attempt that follows another's death brings the same
    `options.submission`, by which it knows the checkpoint that it finds for its own.

    Raises:
        UserError: no such run to resume, or another script's; a name that is taken; no checkpoint that is whole.
    """
    if options.resume:
        path = resumed_checkpoint(options.output_dir, options.resume)
        checkpoint = checkpoints.load_checkpoint(path)
        if checkpoint.get("script") != script:
            raise UserError(f"{path} is a checkpoint of {checkpoint.get('script')}, not of {script}")
        refuse_other_computation(path.parent.name, checkpoint.get("computation", 1))
        return path.parent, checkpoint
    folder = folder_of(options.output_dir, options.run or new_name())
    if not checkpoints.has_checkpoint(folder):
        return folder, None
    checkpoint = checkpoints.load_checkpoint(folder / checkpoints.CHECKPOINT)
    if options.submission is None or checkpoint["submission"] != options.submission:
        raise UserError(taken(folder.name))
    return folder, checkpoint


def log_to_stdout() -> None:
    """Send the program's log to stdout, a line a message, in process 0; errors are for stderr and not logged."""
    handler: logging.Handler = logging.StreamHandler(sys.stdout) if here().is_main else logging.NullHandler()
    handler.setFormatter(LOG_FORMAT)
    root = logging.getLogger("tinycats")
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    logging.raiseExceptions = False  # a closed pipe (`… | head`) must not end a run


class Run:
    """An open run: keeps its checkpoint, its `metrics.jsonl` and its TensorBoard events; from `open_run`.

    Each process of a run has one, and process 0's alone writes. No file of the folder stays open between two rows:
    Modal's volumes want it so.

    Attributes:
        folder: the run's folder; its name is what `--resume` calls the run.
        metrics: every recorded row, which the checkpoint carries along: a run that is resumed has in
            `metrics.jsonl` exactly the rows that lead up to its checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        metrics: list[dict[str, Any]],
        step: int,
        stop: StopSignals,
        machine: ThisMachine,
        save_every: float,
        processes: Processes,
        writer: "Writer",
    ):
        from tinycats.run.event_file import EventFile  # needs torch

        self.folder = folder
        self.metrics = metrics
        self._stop = stop
        self._machine = machine
        self._save_every = 60 * save_every
        self._saved_at = time.monotonic()
        self._processes = processes
        self._saved_step = 0
        self._writer = writer
        if processes.is_main:
            with atomic_write(folder / METRICS) as file:
                file.writelines(_json_line(row) for row in metrics)
            self._events = EventFile(folder, step)

    def record(self, row: dict[str, Any]) -> None:
        """Add a row: a `step`, and numbers or dicts of numbers, none of which depends on the clock.

        Raises:
            UserError: the disk is full; of this row, or of what was given to be written before.
        """
        self.metrics.append(row)
        if self._processes.is_main:
            self._writer.write(self._write_row, dict(row))

    def image(self, name: str, image: "torch.Tensor | None", step: int) -> None:
        """Keep an image, uint8 [3, H, W] (None but in process 0), as `<name>/step_NNNNNNN.png` and in TensorBoard.

        Raises:
            UserError: as of `record`.
        """
        if image is not None:
            self._writer.write(self._write_image, name, image, step)

    def _write_row(self, row: dict[str, Any]) -> None:
        with self._full_disk_is_told(), (self.folder / METRICS).open("ab") as file:
            file.write(_json_line(row))
        with self._full_disk_is_told():
            for key, value in row.items():
                if isinstance(value, dict):
                    for name, part in value.items():
                        self._events.add_scalar(f"{key}/{name}", part, row["step"])
                elif key not in ("step", "epoch"):
                    self._events.add_scalar(key, value, row["step"])

    def _write_image(self, name: str, image: "torch.Tensor", step: int) -> None:
        from PIL import Image

        with self._full_disk_is_told():
            path = self.folder / name / f"step_{step:07}.png"
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as file:
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "png")
            self._events.add_image(name, image, step)

    @contextmanager
    def _full_disk_is_told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}; the saved checkpoint is untouched"
            ) from error

    def is_to_stop(self) -> bool:
        """Whether any of the processes was asked to stop; all of them have to ask at the same step."""
        (signum,) = self._processes.agree(self._stop.requested or 0)
        return self._is_told_to_stop(signum)

    def save_due(self) -> bool:
        """Whether it is time to save: the clock says so, or the run was asked to stop; as `is_to_stop`."""
        self._writer.check()
        by_clock = time.monotonic() - self._saved_at > self._save_every and not self._writer.is_saving
        if self._processes.is_orphan and self._stop.requested is None:
            self._stop.requested = signal.SIGTERM
        signum, is_due = self._processes.agree(self._stop.requested or 0, self._processes.is_main and by_clock)
        return self._is_told_to_stop(signum) or bool(is_due)

    def _is_told_to_stop(self, signum: int) -> bool:
        if signum:  # else it is left alone: a signal may have come since it was looked at
            self._stop.requested = signum
        return signum > 0

    def save(self, checkpoint: Callable[[], dict[str, Any]]) -> None:
        """Save the checkpoint, while training goes on; and leave, if the run was asked to stop, when it is durable.

        Args:
            checkpoint: called in process 0 alone.

        Raises:
            UserError: the disk is full; the checkpoint saved before is untouched. Or that befell the one before.
            Stopped: a stop signal came.
        """
        if self._processes.is_main:
            contents = checkpoint()
            self._writer.save(self._make_durable, contents)
            self._saved_at, self._saved_step = time.monotonic(), contents["step"]
        self._leave_if_asked_to()

    def wait_until_saved(self) -> None:
        """Until the last checkpoint is durable, and all else is written.

        Raises:
            UserError: that cannot be; the checkpoint before it is untouched.
            Stopped: a stop signal came meanwhile.
        """
        self._writer.wait()
        self._processes.wait()
        self._leave_if_asked_to()

    def _leave_if_asked_to(self) -> None:
        if not self.is_to_stop():
            return
        self._writer.wait()
        (step,) = self._processes.agree(self._saved_step)  # and all of them have come here
        log.info("Saved at step %d, and stopping", step)
        self._stop.ignore()  # torch's launcher signals those that are slow to end once more
        resume = self._machine.how_to_resume(self.folder)
        assert self._stop.requested is not None
        raise Stopped(self._stop.requested, f"the run is saved at step {step}; go on with it: {resume}")

    def _make_durable(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.save_checkpoint(self.folder, checkpoint)
        self._machine.persist()


@contextmanager
def open_run(
    folder: Path,
    description: dict[str, Any],
    metrics: list[dict[str, Any]],
    step: int,
    stop: StopSignals,
    machine: ThisMachine,
    save_every: float,
    processes: Processes = Processes(),  # noqa: B008  it is immutable
) -> Iterator[Run]:
    """Open the run in `folder` for training on from `step`, with the program's log going to `train.log` too.

    While it is open, a stop signal waits for the next `Run.save`, and a second one does not.

    Args:
        description: of `options.description`, kept as run.json.
        save_every: minutes after which `Run.save_due`.

    Raises:
        UserError: another process is training this run, or the folder cannot be written.
    """
    from tqdm.contrib.logging import logging_redirect_tqdm

    from tinycats.run.saving import LogFile, Writer

    program = logging.getLogger("tinycats")

    def opened(stack: ExitStack) -> tuple[Run, logging.Handler]:
        try:
            file_log: logging.Handler = logging.NullHandler()
            writer = Writer()
            if processes.is_main:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(machine.lock(folder))
                (folder / "train.log").touch()
                file_log = LogFile(folder / "train.log", writer)
                file_log.setFormatter(LOG_FORMAT)
                program.addHandler(file_log)
                stack.callback(program.removeHandler, file_log)
                with atomic_write(folder / DESCRIPTION) as file:
                    file.write(_json_line(description))
            return Run(folder, metrics, step, stop, machine, save_every, processes, writer), file_log
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror}") from error

    def if_stopped_at_once() -> str:
        if not checkpoints.has_checkpoint(folder):
            return NOTHING_TRAINED
        return f"without saving; go on from where the run was saved before: {machine.how_to_resume(folder)}"

    with ExitStack() as stack:
        run, file_log = processes.together(lambda: opened(stack))
        if processes.is_main:
            stack.enter_context(logging_redirect_tqdm([program]))
        try:
            with stop.deferred(if_stopped_at_once):
                try:
                    with closing(run._writer):
                        yield run
                        run._writer.wait()
                except BaseException:
                    stop.ignore()  # there is nothing to stop any more, but something to be said
                    raise
        except BaseException as error:
            # Its user reads this on stderr; the file should say it too, and where an unexpected error arose.
            expected = isinstance(error, (UserError, KeyboardInterrupt))
            trace = None if expected else (type(error), error, error.__traceback__)
            text = f"Ended by {type(error).__name__}: {error}"
            file_log.handle(logging.LogRecord(log.name, logging.ERROR, __file__, 0, text, None, trace))
            raise


def _json_line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row) + "\n").encode()
