"""Runs on Modal: the image, the volumes, the laptop's side of `modal run` and the containers'.

The laptop checks everything, uploads what the volume lacks, and submits one payload, which every attempt
gets: the first container, and each that follows a preemption, a crash or a timeout, takes the same path and
goes on from what it finds in the volumes. What needs no GPU is done without one: a function that has none
prepares the images and then calls the one that trains. See plans/ADR-007.
"""

import argparse
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

import modal

from tinycats import checkpoints, runs, uploads
from tinycats.command_line import Options, Parser, resumed_options, run_name
from tinycats.data_dirs import is_cats, is_toy
from tinycats.errors import TransientError, UserError, looking_at_what_the_user_named, one_line
from tinycats.frames import Frame
from tinycats.gpus import Rental
from tinycats.image_folders import scan
from tinycats.machines import ThisMachine
from tinycats.signals import StopSignals

if TYPE_CHECKING:
    from tinycats.packed_images import PackedImages

log = logging.getLogger(__name__)

OUTPUTS_VOLUME, DATASET_VOLUME = "cats-model-outputs", "cats-dataset"
OUTPUTS = modal.Volume.from_name(OUTPUTS_VOLUME, create_if_missing=True)
DATASET = modal.Volume.from_name(DATASET_VOLUME, create_if_missing=True)
OUTPUTS_MOUNT, DATASET_MOUNT = PurePosixPath("/outputs"), PurePosixPath("/data")  # on a Windows laptop too
VOLUMES: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = {
    OUTPUTS_MOUNT: OUTPUTS,
    DATASET_MOUNT: DATASET,
}

REPOSITORY = Path(__file__).parents[2]  # on the laptop; in a container there is none
IMAGE = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install(requirements=[str(REPOSITORY / "requirements.txt")])
    .add_local_python_source("tinycats")
)

_CONTAINER: dict[str, Any] = {  # of either function
    "image": IMAGE,
    "volumes": VOLUMES,
    "retries": modal.Retries(max_retries=10, initial_delay=1.0, backoff_coefficient=2.0, max_delay=60.0),
    "single_use_containers": True,
}
WITHOUT_GPU: dict[str, Any] = _CONTAINER | {"cpu": 8.0, "memory": 16 * 1024}  # MiB; images are decoded on every core
# Which call trains what was submitted: a call that was made twice, by a container that died in making it or by a client
# whose network did, is found out by the second, which has then cost seconds.
CLAIMS = modal.Dict.from_name("cats-claims", create_if_missing=True)

SCRATCH = Path(tempfile.gettempdir(), "tinycats")  # the container's own disk
COMMIT_ATTEMPTS = 6
MAX_PREPARATIONS = 3  # of the images of one run: whoever finds them damaged has them prepared again
PATIENCE = 600  # seconds that the laptop waits for a control plane that does not answer


def with_gpu(gpu: str) -> dict[str, Any]:
    """What the function that trains asks of Modal, for that GPU or those GPUs."""
    rental = Rental.parse(gpu)
    return _CONTAINER | {"gpu": gpu, "cpu": float(rental.cores), "memory": 1024 * rental.gib}


def on_nodes(count: int) -> Callable[[Callable], Any]:
    """Decorates a function that is to run in so many containers at the same time."""
    return modal.clustered(size=count, rdma=True) if count > 1 else lambda function: function


# --- on the laptop ---------------------------------------------------------------------------------------------


def parsed_at_import(parser: Parser, script: str) -> Options | None:
    """The options, if this process is a local `modal run` of this very script.

    `modal run` imports the script before it creates an app, uploads files or builds an image. Parsing there
    shows a mistake, or the whole `--help`, within a second and at no cost, and tells the decorators below it
    which GPU to ask for. Exits 2 on a mistake.
    """
    arguments = script_arguments(sys.argv, script)
    if arguments is None or not modal.is_local():
        return None
    options = parser.parse(arguments, on_modal=True)
    try:
        _check(options)
    except UserError as error:
        parser.error(str(error))
    return options


def script_arguments(argv: Sequence[str], script: str) -> list[str] | None:
    """What follows the script in `modal run [options] src/train.py[::main] …`; None for other commands."""
    if Path(argv[0]).stem not in ("modal", "__main__") or "run" not in argv:
        return None
    start = list(argv).index("run") + 1
    for position, word in enumerate(argv[start:], start):
        path, _, entry_point = word.partition("::")
        if path.endswith(".py") and Path(path).exists() and Path(path).samefile(script):
            return list(argv[position + 1 :]) if entry_point in ("", "main") else None
    return None


def _check(options: Options) -> None:
    output_path(options)
    if options.resume:
        try:
            run_name(options.resume)
        except argparse.ArgumentTypeError as error:
            raise UserError(f"--resume: on Modal it is a run's name; {error}") from None
    local = options.data_dir
    with looking_at_what_the_user_named():
        is_here = local.is_dir() and not is_cats(local) and not is_toy(local)
    if is_here or volume_path(local) is None:
        scan(local)  # missing, empty, a file: known before anything is uploaded


def output_path(options: Options) -> PurePosixPath:
    """Where `--output-dir` lies in a container: `outputs` is the volume's root, `outputs/x` a folder in it.

    Raises:
        UserError: it is elsewhere, where nothing would be kept.
    """
    parts = options.output_dir.parts
    if parts[:1] == ("outputs",) and ".." not in parts:
        return OUTPUTS_MOUNT.joinpath(*parts[1:])
    raise UserError(f"--output-dir {options.output_dir}: on Modal it is outputs or a folder in it, on the volume")


def volume_path(data_dir: Path) -> PurePosixPath | None:
    """Where a path below `data/` lies in a container (`data/cats` is `/data/cats`); None for other paths."""
    parts = data_dir.parts
    if len(parts) > 1 and parts[0] == "data" and ".." not in parts:
        return DATASET_MOUNT.joinpath(*parts[1:])
    return None


def submit(
    train: modal.Function,
    prepare: modal.Function,
    parser: Parser,
    frame_of: Callable[[Options], Frame],
    arguments: Sequence[str],
) -> None:
    """The body of a `local_entrypoint`: submit the run, follow it, and end as it ends.

    The call is spawned, so that the server retries it: it does not depend on this process, which may be
    gone (`modal run --detach`).

    Args:
        frame_of: the size of the images that a run packs.

    Raises:
        SystemExit: 1 with one line on stderr if the run failed.
    """
    options = parser.parse(arguments, on_modal=True)
    runs.log_to_stdout()
    try:
        _check(options)
        name = options.run or options.resume or runs.new_name()
        description = _check_run(options, parser.prog)
        if description:
            options = resumed_options(options, description["options"])
        resumes_with_same_data = description is not None and "data_dir" not in options.given
        data_dir = PurePosixPath(options.data_dir.as_posix()) if resumes_with_same_data else _provide(options.data_dir)
        frame = frame_of(options)
        packed = _packed(data_dir, frame)
    except UserError as error:
        _fail(str(error))
    payload = {
        "arguments": list(arguments),
        "run": name,
        "submission": secrets.token_hex(8),
        "data_dir": str(data_dir),
        "nodes": options.nodes,
        "frame": asdict(frame),
        "packed": str(packed) if packed else None,
    }
    resume = Container(parser.prog, options.gpu).how_to_resume(runs.folder_of(output_path(options), name))
    log.info("Submitting the run %s. If it is cut short: %s", name, resume)
    rental = Rental.parse(options.gpu)
    log.info(
        "Renting %s%s with %d cores and %d GiB of memory: about $%.2f an hour while it trains",
        *(f"{options.nodes} times " if options.nodes > 1 else "", options.gpu, rental.cores, rental.gib),
        options.nodes * rental.dollars_an_hour,
    )
    is_ready = packed or is_toy(options.data_dir)
    try:
        outcome = _follow((train if is_ready else prepare).spawn(payload))
    except Exception as error:  # whatever the run died of in its last attempt
        _fail(f"the run {name} ended with {type(error).__name__}: {error}; go on with it: {resume}")
    if "error" in outcome:
        _fail(outcome["error"])


def _follow(call: modal.FunctionCall) -> dict[str, Any]:
    """Wait for the run's end, from call to call. The run goes on without us: a control plane that is away for a while
    is waited for."""
    lost_at = None
    while True:
        try:
            outcome = call.get()
        except (modal.exception.ConnectionError, modal.exception.ServiceError, modal.exception.InternalError):
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > PATIENCE:
                raise
            log.warning("Modal does not answer; the run goes on, and so does the wait for it")
            time.sleep(5)
            continue
        if "goes_on_in" not in outcome:
            return outcome
        call, lost_at = modal.FunctionCall.from_id(outcome["goes_on_in"]), None


def _fail(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


def _check_run(options: Options, script: str) -> dict[str, Any] | None:
    """What is known of the run that is resumed, None for a new one.

    Raises:
        UserError: a new run's name is taken in the volume, an old one's is not there, or this program cannot go on with
            it: known before a GPU is rented.
    """
    name = options.run or options.resume
    if name is None:
        return None
    folder = PurePosixPath("/", runs.folder_of(output_path(options), name).relative_to(OUTPUTS_MOUNT))
    files = {PurePosixPath(entry.path).name for entry in _list(OUTPUTS, folder)}
    is_there = not files.isdisjoint(checkpoints.CHECKPOINTS)
    if options.run:
        if is_there:
            raise UserError(runs.taken(name))
        return None
    if not is_there:
        known = sorted(PurePosixPath(entry.path).name for entry in _list(OUTPUTS, folder.parent))
        raise UserError(runs.unknown(name, f"the volume {OUTPUTS_VOLUME}", known))
    is_described = runs.DESCRIPTION in files
    stored = b"".join(OUTPUTS.read_file(str(folder / runs.DESCRIPTION))) if is_described else b"{}"
    description = json.loads(stored)
    runs.refuse_other_computation(name, description.get("computation", 1))
    if description["script"] != script:
        raise UserError(f"--resume {name}: that is a run of {description['script']}, not of {script}")
    return description


def _list(volume: modal.Volume, folder: PurePosixPath) -> list:
    try:
        return volume.listdir(str(folder))
    except modal.exception.NotFoundError:
        return []


def _provide(data_dir: Path) -> PurePosixPath:
    """Where containers find `data_dir`, uploaded if only this laptop has it."""
    path = volume_path(data_dir)
    if is_cats(data_dir) or is_toy(data_dir):  # prepared there
        return path or DATASET_MOUNT / data_dir.name
    if not data_dir.is_dir():
        if path and _list(DATASET, _in_volume(path)):
            return path
        raise UserError(f"{data_dir} is neither here nor in the volume {DATASET_VOLUME}")
    with looking_at_what_the_user_named():
        upload = uploads.Upload(scan(data_dir))
    path = path or DATASET_MOUNT / "uploads" / f"{data_dir.resolve().name}-{upload.digest[:12]}"
    remote = _in_volume(path)
    there = {PurePosixPath(entry.path).name for entry in _list(DATASET, remote)}
    if uploads.RECEIPT in there:
        if uploads.digest_in(b"".join(DATASET.read_file(str(remote / uploads.RECEIPT)))) == upload.digest:
            log.info("%s is in the volume %s", data_dir, DATASET_VOLUME)
            return path
        raise UserError(
            f"{data_dir} has changed since it was uploaded; remove the upload first: "
            f"modal volume rm --recursive {DATASET_VOLUME} {str(remote)[1:]}"
        )
    missing = [part for part in upload.parts if part.name not in there]
    size = sum(part.size for part in missing)
    log.info(
        "Uploading %d images of %s into the volume %s: %d of %d archives (%.0f MB) are to be sent",
        *(len(upload.folder.files), data_dir, DATASET_VOLUME, len(missing), len(upload.parts), size / 1e6),
    )
    for number, part in enumerate(missing, start=1):
        with part.archive(upload.folder) as archive, DATASET.batch_upload(force=True) as batch:
            batch.put_file(archive, str(remote / part.name))
        log.info("Sent %d of %d", number, len(missing))
    with DATASET.batch_upload(force=True) as batch:
        batch.put_file(upload.receipt(), str(remote / uploads.RECEIPT))
    return path


def _packed(data_dir: PurePosixPath, frame: Frame) -> PurePosixPath | None:
    """The packed images of `data_dir` in the volume, if they are there and cannot be out of date."""
    remote = _in_volume(data_dir)
    files = {PurePosixPath(entry.path).name for entry in _list(DATASET, remote)}
    if not is_cats(Path(data_dir)) and uploads.RECEIPT not in files:
        return None  # whoever put it there may have changed it: the function that prepares it will know
    beside = data_dir.with_name(data_dir.name + ".packed")
    for entry in _list(DATASET, _in_volume(beside)):
        name = PurePosixPath(entry.path).name
        if name.startswith(f"{frame.name}-"):
            return beside / name
    return None


def _in_volume(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath("/", path.relative_to(DATASET_MOUNT))


# --- in the containers -----------------------------------------------------------------------------------------


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
        from tinycats.durable_files import DamagedFile

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

    expects_gpu = True

    def how_to_resume(self, run: PurePath) -> str:
        """The command that goes on with the run."""
        output_dir = PurePosixPath("outputs", run.parent.parent.relative_to(OUTPUTS_MOUNT))
        elsewhere = "" if output_dir == PurePosixPath("outputs") else f"--output-dir {output_dir} "
        return f"modal run src/{self.script} {elsewhere}--resume {run.name}"

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
    from tinycats.packed_images import copy_packed

    began = time.monotonic()
    images = copy_packed(packed, SCRATCH / packed.parent.name / packed.name, streams)
    megabytes = sum(file.stat().st_size for file in images.folder.iterdir()) / 1e6
    log.info("Copied the packed images to the container's disk: %.0f MB in %.1f s", megabytes, time.monotonic() - began)
    return images


def prepare_in_container(train: modal.Function, payload: dict[str, Any]) -> dict[str, Any]:
    """The body of a script's Modal function without a GPU: prepare the images of a run, then call the one that trains.

    Returns:
        `{"goes_on_in": call}`, the id of that call; or `{"error": message}`, as `train_in_container`.

    Raises:
        Stopped, Exception: as `train_in_container`; the next attempt goes on with what was committed.
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
    from tinycats import oxford_pets
    from tinycats.packing import beside_folder, packed

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


def train_in_container(
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
    from tinycats import modal_processes  # which is built on this

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
            return modal_processes.train_in_processes(train, count, container, payload)
        with StopSignals() as stop:
            return train(options, stop, container)
    except NotPrepared as reason:
        if not modal_processes.is_first_of_cluster(payload):
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


def options_of(parser: Parser, payload: dict[str, Any]) -> Options:
    """The options of the run that was submitted, as they are in a container."""
    options = parser.parse(payload["arguments"], on_modal=True)
    options.output_dir = Path(output_path(options))
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
