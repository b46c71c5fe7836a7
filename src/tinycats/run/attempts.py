"""One attempt at a run: what every script begins with, before there is a model to train."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tinycats.images.frames import Frame
from tinycats.images.packed_images import PackedImages
from tinycats.run import options as run_options
from tinycats.run import runs
from tinycats.run.options import TrainingParser
from tinycats.script.command_line import Options
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals
from tinycats.script.startup import Startup
from tinycats.training import devices
from tinycats.training import processes as run_processes
from tinycats.training.devices import Device
from tinycats.training.processes import Processes

log = logging.getLogger(__name__)


class Part(Protocol):
    """Something that changes while training, and whose state a checkpoint keeps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


@dataclass(frozen=True)
class Attempt:
    """What is known when the images are there; the same in each process of the run.

    Attributes:
        folder: the run's.
        options: the command's, or those of the run that goes on.
        checkpoint: what to go on from; None for a new run.
        dataset: the images, packed.
        num_workers: loader threads for this process.
    """

    script: str
    folder: Path
    options: Options
    checkpoint: dict[str, Any] | None
    dataset: PackedImages
    device: Device
    processes: Processes
    num_workers: int
    stop: StopSignals
    machine: ThisMachine
    startup: Startup

    def restore(self, parts: dict[str, Part]) -> None:
        """Give each part the state that it has in the checkpoint, if there is one."""
        if self.checkpoint:
            for name, part in parts.items():
                part.load_state_dict(self.checkpoint[name])

    def checkpoint_of(self, step: int, metrics: list[dict], parts: dict[str, Part], **rest: Any) -> dict[str, Any]:
        """All that going on takes: what the run is, and everything that has changed since it began."""
        return {
            **self._description,
            "submission": self.options.submission,
            "data": self.dataset.content,
            "step": step,
            "metrics": metrics,
            **{name: part.state_dict() for name, part in parts.items()},
            **rest,
        }

    def log_beginning(self, step: int, steps: int) -> None:
        """Say where the run is, and what it has to learn from."""
        begins = "Resuming" if self.checkpoint else "Starting"
        log.info("%s run %s at step %d of %d", begins, self.folder.name, step, steps)
        training, validation = (len(self.dataset.indices(split)) for split in ("train", "val"))
        log.info("%d images to train on, %d to validate with", training, validation)
        log.info("%d classes: %s", len(self.dataset.classes), ", ".join(self.dataset.classes))

    def open_run(self, metrics: list[dict[str, Any]], step: int, steps: int) -> AbstractContextManager[runs.Run]:
        """The run's folder, opened for training on from `step` to `steps`; see `runs.open_run`."""
        every, description = self.options.save_every, self._description
        description |= {"steps": steps, "submission": self.options.submission}
        return runs.open_run(self.folder, description, metrics, step, self.stop, self.machine, every, self.processes)

    def write_report(
        self, parser: TrainingParser, step: int, metrics: list[dict[str, Any]], contents: Callable[[], tuple]
    ) -> None:
        """Write the finished run's report.html. One that cannot be written is no reason to fail: the model is there.

        Args:
            contents: what is particular to the script: facts by their names, and a list of sections (`report`).
        """
        from tinycats.showing import report

        begun_at = self.checkpoint["step"] if self.checkpoint else 0
        counts = (len(self.dataset.indices(split)) for split in ("train", "val"))
        try:
            facts, sections = contents()
            known = {
                **facts,
                "images": "{} to train on, {} to validate with".format(*counts),
                "computed on": f"{self.processes.count} x {self.device.name}",
                "time": f"{self.startup.totals()}, from step {begun_at} to {step}",
                "speed": self.startup.rate((step - begun_at) * self.options.batch_size),
            }
            command = run_options.command(parser, self.options, self.machine.launcher)
            options = run_options.saved_options(self.options)
            report.write(self.folder / runs.REPORT, self.folder.name, command, options, known, metrics, sections)
        except Exception as error:
            log.warning("There is no report: %s: %s", type(error).__name__, error)

    @property
    def _description(self) -> dict[str, Any]:
        return run_options.description(self.script, self.options)


@contextmanager
def attempt(
    script: str,
    options: Options,
    frame_of: Callable[[Options], Frame],
    stop: StopSignals,
    machine: ThisMachine,
    startup: Startup,
) -> Iterator[Attempt]:
    """Find the checkpoint to go on from, open the images, choose the device; in all processes of the run.

    Raises:
        UserError: no such run to resume, or it cannot go on with these options or images; the images are of no use.
    """
    with run_processes.joined() as processes:
        folder, checkpoint = processes.from_main(lambda: runs.starting_point(options, script))
        if checkpoint:
            options = run_options.resumed_options(options, checkpoint["options"])
        device = devices.choose(options.device, options.mixed_precision, expects_gpu=machine.expects_gpu)
        startup.ended("imports")

        # Decoded once, and cut into the same batches whatever happens on the way.
        frame = frame_of(options)
        dataset = processes.together(lambda: machine.open_dataset(options.data_dir, frame, options.output_dir))
        if checkpoint and checkpoint["data"] != dataset.content:
            raise UserError(f"{options.data_dir} does not hold the images that this run was trained on so far")
        startup.ended("images")

        workers = options.num_workers
        if workers is None:
            workers = machine.num_workers(device.is_gpu)
            workers = max(1, workers // processes.local_count) if workers else 0
        yield Attempt(script, folder, options, checkpoint, dataset, device, processes, workers, stop, machine, startup)
