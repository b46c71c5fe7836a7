"""Runs on Modal: the image, the volumes, the laptop's side of `modal run` and the container's.

The laptop checks everything, uploads what the volume lacks, and submits one payload, which every attempt
gets: the first container, and each that follows a preemption, a crash or a timeout, takes the same path and
goes on from the checkpoint that it finds in the volume. See plans/ADR-007.
"""

import argparse
import hashlib
import io
import logging
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

import modal

from tinycats import checkpoints, runs
from tinycats.command_line import Options, Parser, run_name
from tinycats.data_dirs import is_cats, is_toy
from tinycats.errors import TransientError, UserError, looking_at_what_the_user_named, one_line
from tinycats.image_folders import ImageFolder, scan
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

CPU = 8.0  # cores: what it takes to keep a GPU in images
MEMORY = 16 * 1024  # MiB
RETRIES = modal.Retries(max_retries=10, initial_delay=1.0, backoff_coefficient=2.0, max_delay=60.0)

SCRATCH = Path(tempfile.gettempdir(), "tinycats")  # the container's own disk
UPLOADED = ".uploaded"  # in an uploaded folder: the digest of what was uploaded, written last
COMMIT_ATTEMPTS = 6
PATIENCE = 600  # seconds that the laptop waits for a control plane that does not answer


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


def submit(function: modal.Function, parser: Parser, arguments: Sequence[str]) -> None:
    """The body of a `local_entrypoint`: submit the run, follow it, and end as it ends.

    The call is spawned, so that the server retries it: it does not depend on this process, which may be
    gone (`modal run --detach`).

    Raises:
        SystemExit: 1 with one line on stderr if the run failed.
    """
    options = parser.parse(arguments, on_modal=True)
    runs.log_to_stdout()
    try:
        _check(options)
        name = options.run or options.resume or runs.new_name()
        _check_run(options)
        payload = {
            "arguments": list(arguments),
            "run": name,
            "submission": secrets.token_hex(8),
            "data_dir": None if options.resume and "data_dir" not in options.given else str(_provide(options.data_dir)),
        }
    except UserError as error:
        _fail(str(error))
    resume = Container(parser.prog).how_to_resume(runs.folder_of(output_path(options), name))
    log.info("Submitting the run %s. If it is cut short: %s", name, resume)
    call = function.spawn(payload)
    try:
        outcome = _follow(call)
    except Exception as error:  # whatever the run died of in its last attempt
        _fail(f"the run {name} ended with {type(error).__name__}: {error}; go on with it: {resume}")
    if "error" in outcome:
        _fail(outcome["error"])


def _follow(call: modal.FunctionCall) -> dict[str, Any]:
    """Wait for the run's end. The run goes on without us: a control plane that is away for a while is waited for."""
    lost_at = None
    while True:
        try:
            return call.get()
        except (modal.exception.ConnectionError, modal.exception.ServiceError, modal.exception.InternalError):
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > PATIENCE:
                raise
            log.warning("Modal does not answer; the run goes on, and so does the wait for it")
            time.sleep(5)


def _fail(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


def _check_run(options: Options) -> None:
    """A new run's name must be free in the volume, an old one's there: known before a GPU is rented."""
    name = options.run or options.resume
    if name is None:
        return
    folder = PurePosixPath("/", runs.folder_of(output_path(options), name).relative_to(OUTPUTS_MOUNT))
    is_there = any(PurePosixPath(entry.path).name in checkpoints.CHECKPOINTS for entry in _list(OUTPUTS, folder))
    if options.run and is_there:
        raise UserError(runs.taken(options.run))
    if options.resume and not is_there:
        known = sorted(PurePosixPath(entry.path).name for entry in _list(OUTPUTS, folder.parent))
        raise UserError(runs.unknown(options.resume, f"the volume {OUTPUTS_VOLUME}", known))


def _list(volume: modal.Volume, folder: PurePosixPath) -> list:
    try:
        return volume.listdir(str(folder))
    except modal.exception.NotFoundError:
        return []


def _provide(data_dir: Path) -> PurePosixPath:
    """Where the container finds `data_dir`, uploaded if only this laptop has it."""
    path = volume_path(data_dir)
    if is_cats(data_dir) or is_toy(data_dir):  # the container prepares these itself
        return path or DATASET_MOUNT / data_dir.name
    if not data_dir.is_dir():
        if path and _list(DATASET, _in_volume(path)):
            return path
        raise UserError(f"{data_dir} is neither here nor in the volume {DATASET_VOLUME}")
    folder = scan(data_dir)
    digest = _digest(folder)
    path = path or DATASET_MOUNT / "uploads" / f"{data_dir.resolve().name}-{digest[:12]}"
    remote = _in_volume(path)
    entries = _list(DATASET, remote)
    if any(PurePosixPath(entry.path).name == UPLOADED for entry in entries):
        if b"".join(DATASET.read_file(str(remote / UPLOADED))).decode() == digest:
            log.info("%s is in the volume %s", data_dir, DATASET_VOLUME)
            return path
        raise UserError(
            f"{data_dir} has changed since it was uploaded; remove the upload first: "
            f"modal volume rm --recursive {DATASET_VOLUME} {str(remote)[1:]}"
        )
    _upload(folder, remote, digest)
    return path


def _in_volume(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath("/", path.relative_to(DATASET_MOUNT))


def _digest(folder: ImageFolder) -> str:
    digest = hashlib.sha256()
    for file in folder.files:
        digest.update(repr(file).encode("utf-8", "surrogateescape"))
        digest.update(hashlib.sha256((folder.root / file.path).read_bytes()).digest())
    return digest.hexdigest()


def _upload(folder: ImageFolder, remote: PurePosixPath, digest: str) -> None:
    log.info("Uploading %d images of %s into the volume %s", len(folder.files), folder.root, DATASET_VOLUME)
    chunk = max(1, len(folder.files) // 20)
    for start in range(0, len(folder.files), chunk):
        files = folder.files[start : start + chunk]
        with DATASET.batch_upload(force=True) as batch:
            for file in files:
                batch.put_file(folder.root / file.path, str(remote / file.path))
        log.info("Uploaded %d of %d", start + len(files), len(folder.files))
    with DATASET.batch_upload(force=True) as batch:
        batch.put_file(io.BytesIO(digest.encode()), str(remote / UPLOADED))


# --- in the container ------------------------------------------------------------------------------------------


class Container(ThisMachine):
    """A container with the two volumes mounted."""

    def open_dataset(self, data_dir: Path, short_side: int, output_dir: Path) -> "PackedImages":
        """The images of `data_dir`, read from the container's own disk; prepares data/cats if the volume lacks it."""
        if is_toy(data_dir):
            return super().open_dataset(SCRATCH / "data" / "toy", short_side, SCRATCH)
        from tinycats.packed_images import PackedImages

        DATASET.reload()
        if is_cats(data_dir) and not data_dir.is_dir():
            from tinycats import oxford_pets

            oxford_pets.download(data_dir)
            _commit(DATASET)
        for _ in range(2):
            # Not kept: a volume cannot be committed while a file on it is mapped.
            folder = super().open_dataset(data_dir, short_side, SCRATCH).folder
            local = SCRATCH / folder.parent.name / folder.name
            if folder != local:
                log.info("Copying the packed images to the container's disk")
                shutil.copytree(folder, local, dirs_exist_ok=True)
                _commit(DATASET)
            images = PackedImages(local)
            damaged = images.damaged()
            if not damaged:
                return images
            log.warning("%s is damaged at %s: packing again", folder, damaged[0])
            for place in {folder, local}:
                shutil.rmtree(place)
        raise TransientError(f"{folder} is damaged again, as soon as it is packed")

    def num_workers(self, on_gpu: bool) -> int:
        """One for each core that the function asks for (the host may have more, which are others')."""
        return min(int(CPU), os.cpu_count() or 1)

    def lock(self, _run: Path) -> AbstractContextManager[object]:
        """None: locks do not reach other containers, and a volume cannot be committed while a file on it is open."""
        return nullcontext()

    def persist(self) -> None:
        """Commit the outputs: what the log calls saved can be fetched, and survives this container."""
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


def run_in_container(
    parser: Parser, train: Callable[[Options, StopSignals, ThisMachine], dict[str, Any]], payload: dict[str, Any]
) -> dict[str, Any]:
    """The body of a script's Modal function: train, from the checkpoint in the volume if there is one.

    Returns:
        What `train` returns; or `{"error": message}` for a mistake that no retry can mend. That is returned
        and not raised: Modal would run what raises again, eleven times, on a rented GPU.

    Raises:
        Stopped: preempted, with the checkpoint saved; a KeyboardInterrupt makes Modal start the same input again.
        Exception: whatever else went wrong; Modal tries again, as the function's retries say.
    """
    options = parser.parse(payload["arguments"], on_modal=True)
    options.output_dir = Path(output_path(options))
    options.run, options.submission = payload["run"], payload["submission"]
    if payload["data_dir"]:
        options.data_dir = Path(payload["data_dir"])
    runs.log_to_stdout()
    OUTPUTS.reload()  # a container may have been started before the one that it replaces made its last commit
    try:
        with StopSignals() as stop:
            return train(options, stop, Container(parser.prog))
    except TransientError:
        raise
    except UserError as error:
        return {"error": str(error)}
    finally:
        # Before the laptop hears of the end: whoever reads that the run is over finds its files, its log above all.
        _commit(OUTPUTS)
