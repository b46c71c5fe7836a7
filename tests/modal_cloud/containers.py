"""Containers: the real `modal._container_entrypoint` inside bubblewrap, which sees what its image and mounts carry."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from .image import Image, distribution_name, top_level_modules
from .volumes import Mounted, Volume
from .warm_python import PRELOADED, WarmPython

if TYPE_CHECKING:
    from .control_plane import Call

PYTHON = "/opt/python"  # where a container finds the interpreter
PACKAGES = "/opt/packages"  # and what its image installs
CLIENT = "/pkg"  # and the client, which Modal mounts itself
_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
ENTRY_POINT = ("-m", "modal._container_entrypoint")


class NoBubblewrap(RuntimeError):
    """bubblewrap is not installed."""

    def __init__(self) -> None:
        super().__init__("containers need bubblewrap: apt-get install bubblewrap")


def _link(path: Path | str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:  # the process has ended meanwhile
        return ""


@dataclass
class Container:
    """One attempt at one input.

    Attributes:
        attempt: its number, over all containers of the cloud, from 1.
        number: over those of the same function.
        call: the input that it was started for.
        ended: how it ended: `success`, `failure` (an exception), `interrupted` (a KeyboardInterrupt),
            `died` (killed, or crashed), `timeout`; None while it runs.
        output: what it printed.
        commits: how often it has committed each volume, by name.
        started_at: on the clock of time.monotonic.
    """

    task_id: str
    attempt: int
    number: int
    call: "Call"
    mounts: dict[str, Mounted]
    ended: str | None = None
    output: str = ""
    commits: Counter[str] = field(default_factory=Counter)
    process: "asyncio.subprocess.Process | _Forked | None" = None
    pid: int | None = None
    input_sent: bool = False
    result: api_pb2.FunctionPutOutputsItem | None = None
    timed_out: bool = False
    failed_to_start: bool = False
    tasks: list[asyncio.Task] = field(default_factory=list)
    started_at: float = field(default_factory=time.monotonic)

    @property
    def function(self) -> str:
        """The name of the function that runs in it."""
        return self.call.function.definition.function_name

    def send_signal(self, signum: int) -> None:
        """Signal the container's main process (killing it kills all its processes)."""
        if self.pid and self.ended is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signum)

    def open_files(self, mount_path: str) -> list[str]:
        """Files below a volume's mount path that the container's processes have open or mapped."""
        found: set[str] = set()
        namespace = _link(f"/proc/{self.pid}/ns/pid")
        for process in Path("/proc").glob("[0-9]*"):
            if _link(f"{process}/ns/pid") == namespace:
                with contextlib.suppress(OSError):
                    found |= {_link(descriptor) for descriptor in (process / "fd").iterdir()}
                    found |= {line.split(maxsplit=5)[-1] for line in (process / "maps").read_text().splitlines()}
        return sorted(path for path in found if path.startswith(f"{mount_path}/"))

    def report(self, lines: int = 30) -> str:
        """How it ended, and the end of what it printed."""
        printed = self.output.splitlines()[-lines:]
        return "\n".join([f"container {self.attempt}, {self.function}: {self.ended or 'still running'}", *printed])

    def kill(self) -> None:
        """What a crash of the machine is."""
        self.send_signal(signal.SIGKILL)


def sandbox(
    root: Path, image: Image, files: dict[str, bytes], volumes: dict[str, Mounted], environment: dict[str, str]
) -> tuple[list[str], dict[str, str]]:
    """The bubblewrap command line of a container, without the command to run there; and its environment.

    Args:
        root: a folder of this container's own; its mounts' files are laid out there.
        files: what is mounted, by absolute path.
    """
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        raise NoBubblewrap
    words = [bubblewrap, "--unshare-pid", "--unshare-ipc", "--as-pid-1", "--die-with-parent", "--new-session"]
    words += ["--clearenv", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--tmpfs", "/dev/shm"]
    for system in ("/usr", "/etc"):
        words += ["--ro-bind", system, system]
    for link in ("/bin", "/sbin", "/lib", "/lib64"):
        if Path(link).is_symlink():
            words += ["--symlink", str(Path(link).readlink()), link]
        elif Path(link).exists():
            words += ["--ro-bind", link, link]
    words += ["--ro-bind", sys.base_prefix, PYTHON]
    # Whatever this machine's own Python or system has installed is not in the image.
    for own in (f"{PYTHON}/lib/{_VERSION}/site-packages", "/usr/lib/python3/dist-packages"):
        if Path(own.replace(PYTHON, sys.base_prefix, 1)).is_dir():
            words += ["--tmpfs", own]
    for parent, modules in (
        (PACKAGES, top_level_modules(image.requirements())),
        (CLIENT, top_level_modules(["modal"])),
    ):
        words += ["--dir", parent]
        for name, place in sorted(modules.items()):
            if place.exists():
                words += ["--ro-bind", str(place), f"{parent}/{name}"]
    words += ["--tmpfs", "/root"]
    for number, (path, contents) in enumerate(sorted(files.items())):
        local = root / f"file-{number}"
        local.write_bytes(contents)
        words += ["--ro-bind", str(local), path]
    for mount_path, mounted in volumes.items():
        words += ["--bind", str(mounted.folder), mount_path]
    defaults = {"PATH": f"{PYTHON}/bin:/usr/bin:/bin", "HOME": "/root", "LANG": "C.UTF-8", "PYTHONUNBUFFERED": "1"}
    defaults["LD_LIBRARY_PATH"] = f"{PYTHON}/lib"  # a shared libpython is found by its old place otherwise
    if threads := os.environ.get("OMP_NUM_THREADS"):
        defaults["OMP_NUM_THREADS"] = threads  # beside other tests a container has one core
    paths = {"PYTHONPATH": f"/root:{PACKAGES}:{CLIENT}", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = defaults | paths | environment
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return [*words, "--chdir", "/root"], environment


async def start(
    container: Container, image: Image, words: list[str], environment: dict[str, str], warm: WarmPython | None
) -> None:
    """Start the entry point in its sandbox; on return `container.pid` is its main process on this machine.

    Args:
        warm: what to fork it from, if its image has all that is imported there.
    """
    if warm and set(PRELOADED.values()) <= {distribution_name(requirement) for requirement in image.requirements()}:
        await _fork(container, words, environment, warm)
    else:
        container.process, container.pid = await _start(*words, "--", f"{PYTHON}/bin/{_VERSION}", *ENTRY_POINT)


async def _start(bubblewrap: str, *words: str) -> tuple[asyncio.subprocess.Process, int | None]:
    reader, writer = os.pipe()
    process = await asyncio.create_subprocess_exec(
        bubblewrap,
        *("--info-fd", str(writer)),
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        pass_fds=(writer,),
    )
    os.close(writer)
    with os.fdopen(reader) as info:
        text = await asyncio.get_running_loop().run_in_executor(None, info.read)
    return process, json.loads(text)["child-pid"] if text else None


class _Forked:
    """A process that was forked into a sandbox; what else runs there ends with it."""

    def __init__(self, pid: int, stdout: asyncio.StreamReader, sandbox: asyncio.subprocess.Process, first: int):
        self.returncode: int | None = None
        self.stdout = stdout
        self._ended = asyncio.create_task(self._end(pid, sandbox, first))

    async def _end(self, pid: int, sandbox: asyncio.subprocess.Process, first: int) -> None:
        loop, exited = asyncio.get_running_loop(), asyncio.Event()
        descriptor = os.pidfd_open(pid)
        loop.add_reader(descriptor, exited.set)
        try:
            await exited.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        await sandbox.communicate()

    async def wait(self) -> int | None:
        await asyncio.shield(self._ended)
        return self.returncode


async def _fork(container: Container, words: list[str], environment: dict[str, str], warm: WarmPython) -> None:
    # The sandbox's first process only holds it open; it says when everything is mounted.
    process, first = await _start(*words, "--", "/bin/sh", "-c", "echo ready; exec sleep infinity")
    if first is None or await process.stdout.readline() != b"ready\n":
        container.process = process  # bubblewrap says why on its stderr
        return
    loop = asyncio.get_running_loop()
    reader, writer = os.pipe()
    request = {
        "words": ENTRY_POINT,
        "cwd": "/root",
        "env": environment,
        "session": True,
        "launches": container.call.function.definition.resources.gpu_config.count > 1,
        "namespaces_of": first,
        "moved": {sysconfig.get_path("purelib"): PACKAGES, sys.base_prefix: PYTHON},
    }
    try:
        with Path(os.devnull).open() as nothing:
            container.pid = await loop.run_in_executor(None, warm.fork, request, [nothing.fileno(), writer, writer])
    except OSError as error:
        os.close(reader)
        process.kill()
        container.process, container.output = process, f"{error}\n"
        return
    finally:
        os.close(writer)
    stdout = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdout), os.fdopen(reader, "rb"))
    container.process = _Forked(container.pid, stdout, process, first)


def mount_volumes(root: Path, mounts: dict[str, Volume]) -> dict[str, Mounted]:
    """A container's own view of each volume, by mount path."""
    return {path: Mounted(volume, root / f"volume-{number}") for number, (path, volume) in enumerate(mounts.items())}


def clean_up(root: Path, mounts: dict[str, Mounted]) -> None:
    """Forget what a container has not committed."""
    for mounted in mounts.values():
        mounted.unmount()
    shutil.rmtree(root, ignore_errors=True)
