"""The side of the containers: an attempt at a run takes the same path as the first did.

Every attempt gets the same payload: the first container, and each that follows a preemption, a crash or a timeout,
goes on from what it finds in the volumes. What needs no GPU is done without one: a function that has none prepares the
images and then calls the one that trains. See plans/ADR-007.
"""

import logging
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

import modal

from tinycats.images.data_dirs import is_cats, is_toy
from tinycats.images.frames import Frame
from tinycats.images.image_folders import scan
from tinycats.on_modal import uploads
from tinycats.on_modal.gpus import Rental
from tinycats.on_modal.resources import (
    CLAIMS,
    DATASET,
    OUTPUTS,
    OUTPUTS_MOUNT,
    OUTPUTS_VOLUME,
    how_to_resume,
    output_path,
)
from tinycats.on_modal.stored_runs import MAX_PREPARATIONS
from tinycats.run import finished, runs
from tinycats.script.command_line import Options, Parser
from tinycats.script.errors import TransientError, UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals

if TYPE_CHECKING:
    from tinycats.images.packed_images import PackedImages

log = logging.getLogger(__name__)

_Model = TypeVar("_Model")

SCRATCH = Path(tempfile.gettempdir(), "tinycats")  # the container's own disk
COMMIT_ATTEMPTS = 6


class NotPrepared(Exception):
    """The images must be prepared in this frame, or prepared again, before anything can be trained."""

    def __init__(self, frame: Frame, message: str):
        super().__init__(message)
        self.frame = frame


class Container(ThisMachine):
    """A container with the two volumes mounted, for training.

    Args:
        gpu: what it was rented with.
        packed: where the packed images lie in the dataset volume; at once they begin to be copied.
    """

    def __init__(self, script: str, gpu: str, packed: Path | None = None):
        super().__init__(script)
        self.has_written = False  # of a cluster's containers one does
        self._cores = Rental.parse(gpu).cores
        self._copy: Future[PackedImages] | None = None
        if packed:
            # While torch is imported: either takes seconds.
            pool = ThreadPoolExecutor(1)
            self._copy = pool.submit(_copy, packed, self._cores)
            pool.shutdown(wait=False)

    def open_dataset(self, data_dir: Path, frame: Frame, output_dir: Path) -> "PackedImages":
        """The images of `data_dir`, read from the container's own disk.

        Raises:
            NotPrepared: they are not in the volume, or damaged there.
        """
        if is_toy(data_dir):
            return super().open_dataset(SCRATCH / "data" / "toy", frame, SCRATCH)
        from tinycats.run.durable_files import DamagedFile

        if self._copy is None:
            raise NotPrepared(frame, f"{data_dir} is not prepared")
        try:
            images = self._copy.result()
        except (DamagedFile, FileNotFoundError) as error:
            raise NotPrepared(frame, str(error)) from error
        except OSError as error:
            raise UserError(f"cannot copy the packed images to the container's disk: {error.strerror}") from error
        if images.frame != frame:
            raise NotPrepared(frame, f"{images.folder} holds images of {images.frame.name}, not of {frame.name}")
        return images

    def compiled_code(self, device: str) -> Path | None:
        """A file in the outputs volume: compiling takes a minute, and the next container is a new one."""
        import torch

        kind = "".join(letter if letter.isalnum() else "-" for letter in f"{torch.__version__} {device}")
        return Path(OUTPUTS_MOUNT, ".compiled", kind)

    def num_workers(self, on_gpu: bool) -> int:
        """One for each core that the function asks for (the host may have more, which are others')."""
        return min(self._cores, os.cpu_count() or 1)

    def lock(self, _run: Path) -> AbstractContextManager[object]:
        """None: locks do not reach other containers, and a volume cannot be committed while a file on it is open."""
        return nullcontext()

    def persist(self) -> None:
        """Commit the outputs: what the log calls saved can be fetched, and survives this container."""
        self.has_written = True
        _commit(OUTPUTS)

    expects_gpu, launcher = True, "modal run"

    def how_to_resume(self, run: PurePath) -> str:
        """The command that goes on with the run."""
        return how_to_resume(self.script, run)

    def how_to_fetch(self, model: Path) -> str:
        """The command that brings the model to the laptop."""
        return f"modal volume get {OUTPUTS_VOLUME} {model.relative_to(OUTPUTS_MOUNT)} ."


def _commit(volume: modal.Volume) -> None:
    """Commit; a failure is waited out for a while, since the next attempt will most likely work.

    Raises:
        TransientError: it still fails; another container may do better.
    """
    for attempt in range(COMMIT_ATTEMPTS):
        try:
            volume.commit()
            return
        except Exception as error:  # the client's errors have no common base that leaves our own out
            problem = error
            log.warning("The volume cannot be committed (%s), attempt %d", error, attempt + 1)
            time.sleep(2**attempt)
    raise TransientError(f"the volume cannot be committed: {problem}")


def _copy(packed: Path, streams: int) -> "PackedImages":
    from tinycats.images.packed_images import copy_packed

    began = time.monotonic()
    images = copy_packed(packed, SCRATCH / packed.parent.name / packed.name, streams)
    megabytes = sum(file.stat().st_size for file in images.folder.iterdir()) / 1e6
    log.info("Copied the packed images to the container's disk: %.0f MB in %.1f s", megabytes, time.monotonic() - began)
    return images


def prepare(train: modal.Function, payload: dict[str, Any]) -> dict[str, Any]:
    """The body of a script's Modal function without a GPU: prepare the images of a run, then call the one that trains.

    Returns:
        `{"goes_on_in": call}`, the id of that call; or `{"error": message}`, as `train`.

    Raises:
        Stopped, Exception: as `train`; the next attempt goes on with what was committed.
    """
    runs.log_to_stdout()
    DATASET.reload()
    try:
        with StopSignals():
            try:
                packed = _prepare(Path(payload["data_dir"]), Frame(**payload["frame"]), payload.get("damaged", False))
            finally:
                _commit(DATASET)
    except TransientError:
        raise
    except UserError as error:
        return {"error": str(error)}
    preparations = payload.get("preparations", 0) + 1
    call = train.spawn(payload | {"packed": str(packed), "damaged": False, "preparations": preparations})
    return {"goes_on_in": call.object_id}


def _prepare(data_dir: Path, frame: Frame, damaged: bool) -> Path:
    """Have the images of `data_dir` packed in the volume: downloaded, unpacked, decoded, as far as they are not.

    Args:
        damaged: whether all packed images are to be compared with their checksums, and mended.
    """
    from tinycats.images import oxford_pets
    from tinycats.images.packing import beside_folder, packed

    if is_cats(data_dir) and not data_dir.is_dir():
        oxford_pets.download(data_dir)
        _commit(DATASET)
    folder = data_dir
    if uploads.is_upload(data_dir):
        folder = uploads.unpack(data_dir, SCRATCH / "uploads" / data_dir.name)
    for _ in range(2):
        # No lock: it does not reach other containers, which write the same bytes. None of the images is kept: a volume
        # cannot be committed while a file on it is mapped.
        places = [beside_folder(data_dir)]
        images = packed(scan(folder), frame, places, lock=lambda _: nullcontext(), persist=lambda: _commit(DATASET))
        if not damaged or images.mend():
            return images.folder
    raise TransientError(f"{images.folder} is damaged again, as soon as it is packed")


def train(
    parser: Parser,
    train: Callable[[Options, StopSignals, ThisMachine], dict[str, Any]],
    prepare: modal.Function,
    payload: dict[str, Any],
) -> dict[str, Any]:
    """The body of a script's Modal function with a GPU: train, from the checkpoint in the volume if there is one.

    Returns:
        What `train` returns; or `{"error": message}` for a mistake that no retry can mend. That is returned
        and not raised: Modal would run what raises again, eleven times, on a rented GPU. Or `{"goes_on_in": call}`,
        the id of the call in which the run is trained, or its images are prepared first.

    Raises:
        Stopped: preempted, with the checkpoint saved; a KeyboardInterrupt makes Modal start the same input again.
        Exception: whatever else went wrong; Modal tries again, as the function's retries say.
    """
    from tinycats.on_modal import processes  # which is built on this

    preparations = payload.get("preparations", 0)
    if other := _other_call(f"{payload['submission']} {preparations}"):
        return {"goes_on_in": other}
    options = options_of(parser, payload)
    runs.log_to_stdout()
    for volume in (OUTPUTS, DATASET):
        volume.reload()  # a container may have been started before the one that it replaces made its last commit
    container = Container(parser.prog, options.gpu, payload.get("packed") and Path(payload["packed"]))
    try:
        count = _processes(options)
        if count * options.nodes > 1:
            return processes.train_in_processes(train, count, container, payload)
        with StopSignals() as stop:
            return train(options, stop, container)
    except NotPrepared as reason:
        if not processes.is_first_of_cluster(payload):
            return {}
        if preparations == MAX_PREPARATIONS:
            return {"error": f"{reason}, although it was prepared {preparations} times"}
        log.warning("%s: preparing it%s", reason, " again" if payload.get("packed") else "")
        frame = asdict(reason.frame)
        call = prepare.spawn(payload | {"frame": frame, "packed": None, "damaged": True, "preparations": preparations})
        return {"goes_on_in": call.object_id}
    except TransientError:
        raise
    except UserError as error:
        return {"error": str(error)}
    finally:
        # Before the laptop hears of the end: whoever reads that the run is over finds its files, its log above all.
        if options.nodes == 1 or container.has_written:
            _commit(OUTPUTS)


def loaded(load: Callable[[Path], _Model], model: str) -> _Model:
    """A finished model of the outputs volume, as it is there now; read when it is asked for first, or has changed.

    Args:
        load: of `classifier` or `generator`.
        model: its path in the volume.

    Raises:
        UserError: it is not there, or no model of that kind.
    """
    OUTPUTS.reload()
    path = Path(OUTPUTS_MOUNT, PurePosixPath("/", model).relative_to("/"))
    if ".." in path.parts:
        raise UserError(f"{model} is not in the volume {OUTPUTS_VOLUME}")
    return finished.loaded(load, path)


def options_of(parser: Parser, payload: dict[str, Any]) -> Options:
    """The options of the run that was submitted, as they are in a container."""
    options = parser.parse(payload["arguments"], on_modal=True)
    options.output_dir = Path(output_path(options.output_dir))
    options.run, options.submission = payload["run"], payload["submission"]
    options.data_dir = Path(payload["data_dir"])
    return options


def _processes(options: Options) -> int:
    """How many processes train in this container: one a GPU."""
    if count := os.environ.get("TINYCATS_PROCESSES"):  # tests have no GPUs, and few cores
        return int(count)
    rented = Rental.parse(options.gpu).count
    if rented == 1 or options.device == "cpu":
        return 1
    import torch

    return torch.cuda.device_count() or rented


def _other_call(claim: str) -> str | None:
    """The call that has claimed this before us, if there is one; the call of an attempt before this one is ours."""
    mine = modal.current_function_call_id()
    if CLAIMS.put(claim, mine, skip_if_exists=True):
        return None
    first = CLAIMS[claim]
    return None if first == mine else first
