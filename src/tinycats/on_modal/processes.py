"""A run in a Modal container with several GPUs: a process for each, and what they ask of the container's own.

Volumes and calls belong to the process that Modal starts. It has the others started by torch's launcher, copies the
images for all of them, commits when process 0 has saved, and hands on what they return or raise. They are

    python -m tinycats.on_modal.processes <module of the script> <address>
"""

import importlib
import os
import secrets
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import modal

from tinycats.images.frames import Frame
from tinycats.on_modal.container import Container, NotPrepared, options_of
from tinycats.run import runs
from tinycats.script import launcher
from tinycats.script.command_line import Options
from tinycats.script.errors import TransientError, UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import Stopped, StopSignals
from tinycats.training import processes

if TYPE_CHECKING:
    from tinycats.images.packed_images import PackedImages

_KEY = "TINYCATS_CONTAINER_KEY"


class _Host:
    """What the container's own process does for the others."""

    def __init__(self, container: ThisMachine, payload: dict[str, Any]):
        self._container, self._payload = container, payload
        self._lock = threading.Lock()
        self.results: list[Any] = []
        self.errors: list[Exception] = []

    def payload(self) -> dict[str, Any]:
        """What the run was submitted with."""
        return self._payload

    def packed_folder(self, data_dir: Path, frame: Frame, output_dir: Path) -> Path:
        """The folder on the container's disk with the images, verified."""
        with self._lock:
            return self._container.open_dataset(data_dir, frame, output_dir).folder

    def persist(self) -> None:
        """Commit the outputs."""
        self._container.persist()

    def has_returned(self, result: Any) -> None:
        """Take what a process's training returned."""
        self.results.append(result)

    def has_raised(self, error: Exception) -> None:
        """Take what it raised."""
        self.errors.append(error)


class _Manager(BaseManager):
    """Reaches the host from another process; in the container's own, which registers it, serves it."""


_METHODS = ("payload", "packed_folder", "persist", "has_returned", "has_raised")
_Manager.register("host", exposed=_METHODS)


class ContainerProcess(Container):
    """The container as one of its several processes sees it."""

    def __init__(self, script: str, host: Any, gpu: str):
        super().__init__(script, gpu)
        self._host = host

    def open_dataset(self, data_dir: Path, frame: Frame, output_dir: Path) -> "PackedImages":
        """The images, which the container's own process has copied and verified."""
        from tinycats.images.packed_images import PackedImages

        return PackedImages(self._host.packed_folder(data_dir, frame, output_dir))

    def persist(self) -> None:
        """Have the outputs committed."""
        self._host.persist()


def train_in_processes(
    script: Callable[..., Any], count: int, container: ThisMachine, payload: dict[str, Any]
) -> dict[str, Any]:
    """What `script`, the `train` of a module that can be imported, returns in `count` processes of this container; of a
    cluster's containers, in all of theirs.

    Raises:
        Exception: what it raised in one of them.
        TransientError: one of them died.
        Stopped: this container is preempted; what was to be saved is.
    """
    host = _Host(container, payload)
    os.environ[_KEY] = secrets.token_hex(16)
    _Manager.register("host", lambda: host, exposed=_METHODS)
    address = str(Path(tempfile.mkdtemp(prefix="tinycats-"), "host"))
    server = _Manager(address, os.environ[_KEY].encode()).get_server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)  # what is imported here is there too
    command = ["-u", "-m", "tinycats.on_modal.processes", script.__module__, address]
    try:
        status = launcher.launch(command, count, _nodes(payload))
    except TransientError:  # a process has died; of what, another may have told
        if not host.errors:
            raise
    if host.errors:
        raise host.errors[0]
    if not host.results:
        raise TransientError(f"the processes of the run have ended with status {status}, and nothing to tell")
    return host.results[0]


def _nodes(payload: dict[str, Any]) -> launcher.Nodes:
    """This container's cluster, whose launchers meet in the first container."""
    count = payload.get("nodes", 1)
    if count == 1:
        return launcher.Nodes()
    cluster = modal.Cluster.from_context()
    addresses, rank = cluster.container_ips(), cluster.container_rank()
    if interface := _interface(addresses[rank]):  # the others reach this container there, and not by its host name
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface}
    return launcher.Nodes(
        count=count,
        endpoint=f"[{addresses[0]}]:{20_000 + int(payload['submission'], 16) % 10_000}",
        is_first=rank == 0,
        run_id=f"{payload['submission']}-{cluster.object_id}",
        address=addresses[rank],
    )


def _interface(address: str) -> str | None:
    """The name of the network interface with that IPv6 address."""
    import ipaddress

    wanted = ipaddress.ip_address(address).packed.hex()
    try:
        rows = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    except OSError:
        return None
    return next((row[-1] for row in rows if row[0] == wanted), None)


def is_first_of_cluster(payload: dict[str, Any]) -> bool:
    """Whether what this container answers is the call's answer."""
    return payload.get("nodes", 1) == 1 or modal.Cluster.from_context().container_rank() == 0


def _main(module: str, address: str) -> int:
    """One of the processes."""
    script = importlib.import_module(module)
    manager = _Manager(address, os.environ[_KEY].encode())
    manager.connect()
    host = manager.host()  # type: ignore[attr-defined]  # registered above
    options: Options = options_of(script.PARSER, host.payload())
    runs.log_to_stdout()
    with StopSignals() as stop:
        try:
            host.has_returned(script.train(options, stop, ContainerProcess(script.PARSER.prog, host, options.gpu)))
            return 0
        except Stopped as error:
            stop.ignore()
            if processes.here().is_to_tell(error):
                print(f"stopped: {error}", file=sys.stderr)
            return error.exit_status
        except Exception as error:
            stop.ignore()
            if processes.is_lost_peer(error):
                return processes.LOST_PEER
            if not isinstance(error, UserError | NotPrepared):
                traceback.print_exc()
                error = RuntimeError(f"{type(error).__name__}: {error}")
            host.has_raised(error)
            return 1


if __name__ == "__main__":
    processes.leave(_main(*sys.argv[1:]))
