"""What is asked of Modal: the image, the volumes, a function's machine; and where paths lie in the volumes."""

import logging
from collections.abc import Callable
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import modal

from tinycats.on_modal.gpus import Rental
from tinycats.script.errors import UserError

log = logging.getLogger(__name__)

OUTPUTS_VOLUME, DATASET_VOLUME = "cats-model-outputs", "cats-dataset"
OUTPUTS = modal.Volume.from_name(OUTPUTS_VOLUME, create_if_missing=True)
DATASET = modal.Volume.from_name(DATASET_VOLUME, create_if_missing=True)
READ_ONLY_OUTPUTS = OUTPUTS.with_mount_options(read_only=True)
OUTPUTS_MOUNT, DATASET_MOUNT = PurePosixPath("/outputs"), PurePosixPath("/data")  # on a Windows laptop too
VOLUMES: dict[str | PurePosixPath, modal.Volume | modal.CloudBucketMount] = {
    OUTPUTS_MOUNT: OUTPUTS,
    DATASET_MOUNT: DATASET,
}

REPOSITORY = Path(__file__).parents[3]  # on the laptop; in a container there is none
IMAGE = (
    modal.Image.debian_slim(python_version="3.11")
    .uv_pip_install(requirements=[str(REPOSITORY / "requirements.txt")])
    .add_local_python_source("tinycats", ignore=modal.FilePatternMatcher("**/__pycache__"))  # with the gallery's page
)

_CONTAINER: dict[str, Any] = {  # of either function of a run
    "image": IMAGE,
    "volumes": VOLUMES,
    "retries": modal.Retries(max_retries=10, initial_delay=1.0, backoff_coefficient=2.0, max_delay=60.0),
    "single_use_containers": True,
}
WITHOUT_GPU: dict[str, Any] = _CONTAINER | {"cpu": 8.0, "memory": 16 * 1024}  # MiB; images are decoded on every core
# Which call trains what was submitted: a call that was made twice, by a container that died in making it or by a client
# whose network did, is found out by the second, which has then cost seconds.
CLAIMS = modal.Dict.from_name("cats-claims", create_if_missing=True)


def with_gpu(gpu: str) -> dict[str, Any]:
    """What the function that trains asks of Modal, for that GPU or those GPUs."""
    rental = Rental.parse(gpu)
    return _CONTAINER | {"gpu": gpu, "cpu": float(rental.cores), "memory": 1024 * rental.gib}


def using_models(gpu: str | None = None) -> dict[str, Any]:
    """What a function that uses finished models asks of Modal, with such a GPU or without one; a container answers call
    after call, and waits a minute for the next."""
    rental = Rental.parse(gpu) if gpu else None
    return {
        "image": IMAGE,
        "volumes": {OUTPUTS_MOUNT: OUTPUTS},
        "gpu": gpu,
        "cpu": float(rental.cores if rental else 4),
        "memory": 1024 * (rental.gib if rental else 8),
        "scaledown_window": 60,
        "timeout": 3600,
    }


def on_nodes(count: int) -> Callable[[Callable], Any]:
    """Decorates a function that is to run in so many containers at the same time."""
    return modal.clustered(size=count, rdma=True) if count > 1 else lambda function: function


def output_path(path: Path, option: str = "--output-dir") -> PurePosixPath:
    """Where the path that an option names lies in a container: `outputs` is the volume's root, `outputs/x` in it.

    Raises:
        UserError: it is elsewhere, where nothing is kept.
    """
    if path.parts[:1] == ("outputs",) and ".." not in path.parts:
        return OUTPUTS_MOUNT.joinpath(*path.parts[1:])
    raise UserError(f"{option} {path}: on Modal it is outputs, which is the volume {OUTPUTS_VOLUME}, or what is in it")


def listed(volume: modal.Volume, folder: PurePosixPath) -> list[Any]:
    """What is in a folder of a volume; nothing, if that is not there."""
    try:
        return volume.listdir(str(folder))
    except modal.exception.NotFoundError:
        return []


def volume_path(data_dir: Path) -> PurePosixPath | None:
    """Where a path below `data/` lies in a container (`data/cats` is `/data/cats`); None for other paths."""
    parts = data_dir.parts
    if len(parts) > 1 and parts[0] == "data" and ".." not in parts:
        return DATASET_MOUNT.joinpath(*parts[1:])
    return None


def how_to_resume(script: str, run: PurePath) -> str:
    """The command that goes on with the run in that folder of a container."""
    output_dir = PurePosixPath("outputs", run.parent.parent.relative_to(OUTPUTS_MOUNT))
    elsewhere = "" if output_dir == PurePosixPath("outputs") else f"--output-dir {output_dir} "
    return f"modal run src/{script} {elsewhere}--resume {run.name}"
