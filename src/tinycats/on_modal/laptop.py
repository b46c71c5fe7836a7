"""The side of the laptop: it checks everything, uploads what the volume lacks, submits a run and follows it.

One payload is submitted, which every attempt gets (`container`). torch is not needed here, and not imported. See
plans/ADR-007.
"""

import argparse
import json
import logging
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import modal

from tinycats.images.data_dirs import is_cats, is_toy
from tinycats.images.frames import Frame
from tinycats.images.image_folders import scan
from tinycats.on_modal import uploads
from tinycats.on_modal.gpus import Rental
from tinycats.on_modal.resources import (
    DATASET,
    DATASET_MOUNT,
    DATASET_VOLUME,
    OUTPUTS,
    OUTPUTS_MOUNT,
    OUTPUTS_VOLUME,
    how_to_resume,
    listed,
    output_path,
    volume_path,
)
from tinycats.run import checkpoints, finished, runs
from tinycats.run.options import resumed_options
from tinycats.script.command_line import Options, Parser, run_name
from tinycats.script.errors import UserError, looking_at_what_the_user_named, one_line

log = logging.getLogger(__name__)

PATIENCE = 600  # seconds to wait for a control plane that does not answer


def parsed_at_import(
    parser: Parser, script: str, check: Callable[[Options], object] = lambda options: None
) -> Options | None:
    """The options, if this process is a local `modal run` of this very script.

    `modal run` imports the script before it creates an app, uploads files or builds an image. Parsing there
    shows a mistake, or the whole `--help`, within a second and at no cost, and tells the decorators below it
    which GPU to ask for. Exits 2 on a mistake.

    Args:
        check: what else is to be checked on a laptop; raises UserError.
    """
    arguments = script_arguments(sys.argv, script)
    if arguments is None or not modal.is_local():
        return None
    options = parser.parse(arguments, on_modal=True)
    try:
        check(options)
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


def check_run(options: Options) -> None:
    """Check what a run that is to be submitted is given, as far as that is known without Modal.

    Raises:
        UserError: some of it is of no use.
    """
    output_path(options.output_dir)
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
        check_run(options)
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
    resume = how_to_resume(parser.prog, runs.folder_of(output_path(options.output_dir), name))
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


def _fail(message: str) -> NoReturn:
    print(f"error: {one_line(message)}", file=sys.stderr)
    sys.exit(1)


@contextmanager
def errors_are_told() -> Iterator[None]:
    """Whatever is raised within, by Modal or in a container, ends this process with status 1 and one line."""
    try:
        yield
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        _fail(f"{type(error).__name__}: {error}")


def finished_model(named: str | None, name: str) -> PurePosixPath:
    """Where in the outputs volume the finished model lies that `--model` means (`finished.path_of`).

    Raises:
        UserError: it is not there.
    """
    path = finished.path_of(named, name)
    if path.parts == (path.name,):  # as it is called in the volume, and as `modal volume get` fetches it
        path = finished.OUTPUT_DIR / path
    in_volume = PurePosixPath(output_path(path, "--model").relative_to(OUTPUTS_MOUNT))
    files = {PurePosixPath(entry.path).name for entry in listed(OUTPUTS, "/" / in_volume.parent)}
    if in_volume.name not in files:
        if not files.isdisjoint(checkpoints.CHECKPOINTS):
            raise UserError(finished.not_finished(in_volume))
        raise UserError(finished.missing(f"{in_volume}, in the volume {OUTPUTS_VOLUME},"))
    return in_volume


def facts_of(model: PurePosixPath) -> dict[str, Any]:
    """What is known of a finished model in the volume without reading it: its `classes` and more; empty if nothing."""
    facts = "/" / model.with_suffix(checkpoints.FACTS)
    try:
        return json.loads(b"".join(OUTPUTS.read_file(str(facts))))
    except (modal.exception.NotFoundError, FileNotFoundError, ValueError):
        return {}


def _check_run(options: Options, script: str) -> dict[str, Any] | None:
    """What is known of the run that is resumed, None for a new one.

    Raises:
        UserError: a new run's name is taken in the volume, an old one's is not there, or this program cannot go on with
            it: known before a GPU is rented.
    """
    name = options.run or options.resume
    if name is None:
        return None
    folder = PurePosixPath("/", runs.folder_of(output_path(options.output_dir), name).relative_to(OUTPUTS_MOUNT))
    files = {PurePosixPath(entry.path).name for entry in listed(OUTPUTS, folder)}
    is_there = not files.isdisjoint(checkpoints.CHECKPOINTS)
    if options.run:
        if is_there:
            raise UserError(runs.taken(name))
        return None
    if not is_there:
        known = sorted(PurePosixPath(entry.path).name for entry in listed(OUTPUTS, folder.parent))
        raise UserError(runs.unknown(name, f"the volume {OUTPUTS_VOLUME}", known))
    is_described = runs.DESCRIPTION in files
    stored = b"".join(OUTPUTS.read_file(str(folder / runs.DESCRIPTION))) if is_described else b"{}"
    description = json.loads(stored)
    runs.refuse_other_computation(name, description.get("computation", 1))
    if description["script"] != script:
        raise UserError(f"--resume {name}: that is a run of {description['script']}, not of {script}")
    return description


def _provide(data_dir: Path) -> PurePosixPath:
    """Where containers find `data_dir`, uploaded if only this laptop has it."""
    path = volume_path(data_dir)
    if is_cats(data_dir) or is_toy(data_dir):  # prepared there
        return path or DATASET_MOUNT / data_dir.name
    if not data_dir.is_dir():
        if path and listed(DATASET, _in_volume(path)):
            return path
        raise UserError(f"{data_dir} is neither here nor in the volume {DATASET_VOLUME}")
    with looking_at_what_the_user_named():
        upload = uploads.Upload(scan(data_dir))
    path = path or DATASET_MOUNT / "uploads" / f"{data_dir.resolve().name}-{upload.digest[:12]}"
    remote = _in_volume(path)
    there = {PurePosixPath(entry.path).name for entry in listed(DATASET, remote)}
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
    files = {PurePosixPath(entry.path).name for entry in listed(DATASET, remote)}
    if not is_cats(Path(data_dir)) and uploads.RECEIPT not in files:
        return None  # whoever put it there may have changed it: the function that prepares it will know
    beside = data_dir.with_name(data_dir.name + ".packed")
    for entry in listed(DATASET, _in_volume(beside)):
        name = PurePosixPath(entry.path).name
        if name.startswith(f"{frame.name}-"):
            return beside / name
    return None


def _in_volume(path: PurePosixPath) -> PurePosixPath:
    return PurePosixPath("/", path.relative_to(DATASET_MOUNT))
