"""The stand-in as a test uses it: run a command, see what became of it."""

import asyncio
import hashlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import grpclib.server
from aiohttp import web
from modal._utils.grpc_utils import custom_detail_codec

from .containers import Container
from .control_plane import Cloud, ControlPlane, Function
from .faults import Fault
from .volumes import Volume
from .warm_python import WarmPython


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        """Everything it printed."""
        return self.stdout + self.stderr


class ModalCloud:
    """Modal on one machine, as a context manager.

    Its server runs in a thread. `run` gives a command the addresses and credentials that make the real client
    use it. Volumes, functions and containers stay to be looked at after the command.

    Args:
        warm_python: what containers are forked from; without it each starts a Python of its own.
    """

    def __init__(self, warm_python: WarmPython | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="modal-cloud-", ignore_cleanup_errors=True)
        self._cloud = Cloud(Path(self._folder.name), warm_python)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._address = ""

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is not None:
            error.add_note(self.report())
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._folder.cleanup()

    async def _start(self) -> None:
        self._server = server = grpclib.server.Server(
            [ControlPlane(self._cloud)], status_details_codec=custom_detail_codec
        )
        await server.start("127.0.0.1", 0)
        self._address = f"http://127.0.0.1:{server._server.sockets[0].getsockname()[1]}"
        blobs = web.Application(client_max_size=2**40)
        blobs.router.add_put("/blob/{blob_id}", self._put_blob)
        blobs.router.add_get("/blob/{blob_id}", self._get_blob)
        blobs.router.add_get("/volume/{volume_id}/{offset}/{length}/{path:.*}", self._get_volume_block)
        self._blobs = runner = web.AppRunner(blobs)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._cloud.blob_address = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"

    async def _end(self) -> None:
        running = [call.task for call in self._cloud.calls.values() if call.task and not call.task.done()]
        for task in running:
            task.cancel()
        for container in self._cloud.containers:
            container.kill()
        await asyncio.gather(*running, return_exceptions=True)
        self._server.close()
        await self._server.wait_closed()
        await self._blobs.cleanup()
        for container in self._cloud.containers:  # so that its pipes are closed while there is a loop to do it
            if container.process:
                await container.process.wait()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    async def _put_blob(self, request: web.Request) -> web.Response:
        contents = await request.read()
        self._cloud.blobs[request.match_info["blob_id"]] = contents
        return web.Response(headers={"ETag": f'"{hashlib.md5(contents).hexdigest()}"'})

    async def _get_blob(self, request: web.Request) -> web.Response:
        return web.Response(body=self._cloud.blobs[request.match_info["blob_id"]])

    async def _get_volume_block(self, request: web.Request) -> web.Response:
        place = request.match_info
        path = self._cloud.volumes[place["volume_id"]].files / place["path"]
        with path.open("rb") as file:
            file.seek(int(place["offset"]))
            return web.Response(body=file.read(int(place["length"])))

    # --- commands ------------------------------------------------------------------------------------------------

    def environment(self) -> dict[str, str]:
        """What makes the real client talk to this cloud and to nothing else."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MODAL_")}
        return kept | {
            "MODAL_SERVER_URL": self._address,
            "MODAL_TOKEN_ID": "ak-stand-in",
            "MODAL_TOKEN_SECRET": "as-stand-in",
            "MODAL_CONFIG_PATH": str(self._cloud.folder / "modal.toml"),
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *command: object, cwd: Path, env: dict[str, str] | None = None, **options) -> subprocess.Popen:
        """Start a command; a first word `modal` is the client that is installed here."""
        words = [str(word) for word in command]
        if words[0] == "modal":
            words[:1] = [sys.executable, "-m", "modal"]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
        return subprocess.Popen(words, cwd=cwd, env=self.environment() | (env or {}), **options)

    def run(self, *command: object, cwd: Path, env: dict[str, str] | None = None) -> Finished:
        """Run a command to its end."""
        process = self.start(*command, cwd=cwd, env=env)
        stdout, stderr = process.communicate(timeout=900)
        return Finished(process.returncode, stdout, stderr)

    # --- what there is to see ------------------------------------------------------------------------------------

    @property
    def containers(self) -> list[Container]:
        """The containers that ran or run, in the order in which they were started."""
        return self._cloud.containers

    def containers_of(self, function: str) -> list[Container]:
        """Those of one function."""
        return [container for container in self.containers if container.function == function]

    def report(self) -> str:
        """How each container ended and the end of what it printed, for whoever asks why a test failed."""
        return "\n\n".join(container.report() for container in self.containers)

    @property
    def functions(self) -> list[Function]:
        """The functions that were created."""
        return list(self._cloud.functions.values())

    @property
    def rpcs(self) -> list[str]:
        """The names of all calls that came in."""
        return self._cloud.rpcs

    @property
    def missing(self) -> list[str]:
        """The calls that came in and that the stand-in does not have."""
        return self._cloud.missing

    @property
    def image_commands(self) -> list[str]:
        """The commands of the image of the last function."""
        return list(self._cloud.images[self.functions[-1].definition.image_id].all_commands)

    @property
    def volumes(self) -> list[Volume]:
        """All volumes."""
        return list(self._cloud.volumes.values())

    def volume(self, name: str) -> Volume:
        """A volume; its `files` is the folder of what has been committed."""
        return self._cloud.volume(name)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is running any more: a stopped app's calls have ended before its containers have."""
        calls, containers = [*self._cloud.calls.values()], [*self._cloud.containers]
        ended = all(call.done.is_set() or (call.task and call.task.done()) for call in calls)
        return ended and all(container.ended for container in containers)

    def wait(self, timeout: float = 600) -> None:
        """Wait until nothing is running any more."""
        deadline = time.monotonic() + timeout
        while not self.is_idle:
            if time.monotonic() > deadline:
                raise TimeoutError("a call or a container is still running")
            time.sleep(0.1)

    # --- what goes wrong -----------------------------------------------------------------------------------------

    def fail(self, number: int, fault: Fault, function: str = "train_on_modal") -> None:
        """Let something happen to a function's container of that number (from 1)."""
        self._cloud.faults[function, number].append(fault)

    def be_unavailable(self, seconds: float) -> None:
        """Answer every call UNAVAILABLE for a while."""
        self._cloud.unavailable_until = time.monotonic() + seconds

    def fail_commits(self, rpcs: int) -> None:
        """Refuse the next so many commits."""
        self._cloud.failing_commits = rpcs

    def commit_in_background(self, every: float) -> None:
        """Commit each container's volumes now and then, as Modal does, whatever is being written at the time."""
        self._cloud.background_commit_every = every

    def set_in_containers(self, **environment: str) -> None:
        """Environment variables for all containers to come."""
        self._cloud.environment |= environment
