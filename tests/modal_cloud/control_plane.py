"""Modal's control plane, as far as the product uses it: the gRPC service that the real client talks to.

A method `Name(request)` of ControlPlane answers the RPC of that name; an async generator answers a stream.
What is not written here is answered UNIMPLEMENTED, with its name, which is noted in `Cloud.missing`.
"""

import asyncio
import hashlib
import inspect
import itertools
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpclib
from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal._utils.grpc_utils import custom_detail_codec
from modal_proto import api_grpc, api_pb2

from . import containers
from .containers import Container
from .faults import Fault
from .image import Image
from .volumes import Volume
from .warm_python import WarmPython

IMAGE_BUILDER_VERSION = "2025.06"
TERMINATED = api_pb2.GenericResult.GENERIC_STATUS_TERMINATED
SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE
TIMEOUT = api_pb2.GenericResult.GENERIC_STATUS_TIMEOUT
MAX_RESTARTS = 20  # of an input whose containers keep dying


@dataclass
class App:
    """An app: what it has published, and what it prints."""

    app_id: str
    name: str
    state: int
    functions: dict[str, str] = field(default_factory=dict)
    logs: list[str] = field(default_factory=list)
    disconnected: bool = False
    stopped: bool = False


@dataclass
class Function:
    """A function as its client created it."""

    function_id: str
    app: App
    definition: api_pb2.Function
    data: api_pb2.FunctionData
    metadata: api_pb2.FunctionHandleMetadata


@dataclass
class Call:
    """One input of a function: its attempts, and its result when there is one."""

    call_id: str
    function: Function
    input: api_pb2.FunctionInput
    invocation: int
    retry_count: int = 0
    result: api_pb2.FunctionGetOutputsItem | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task | None = None


@dataclass
class Cluster:
    """The containers of one attempt, which run at the same time; mostly one."""

    cluster_id: str
    size: int
    members: dict[int, Container] = field(default_factory=dict)  # by rank


class Cloud:
    """All that the control plane knows; its attributes are what tests look at.

    Args:
        folder: where volumes, blobs and containers lie.
        warm_python: what containers are forked from; without it each starts a Python of its own.
    """

    def __init__(self, folder: Path, warm_python: WarmPython | None):
        self.folder, self.warm_python = folder, warm_python
        self.ids = itertools.count(1)
        self.rpcs: list[str] = []
        self.missing: list[str] = []
        self.apps: dict[str, App] = {}
        self.deployed: dict[str, App] = {}
        self.functions: dict[str, Function] = {}
        self.images: dict[str, Image] = {}
        self.mounts: dict[str, dict[str, str]] = {}
        self.volumes: dict[str, Volume] = {}
        self.dicts: dict[str, dict[bytes, bytes]] = {}
        self.blobs: dict[str, bytes] = {}
        self.calls: dict[str, Call] = {}
        self.containers: list[Container] = []
        # What goes wrong, by a function's name and the number of its container.
        self.faults: dict[tuple[str, int], list[Fault]] = defaultdict(list)
        self.unavailable_until = 0.0
        self.failing_commits = 0
        self.background_commit_every: float | None = None
        self.grace_period = 30.0
        self.longest_retry_delay_ms = 100  # tests need not wait as long as their functions ask for
        self.environment: dict[str, str] = {}
        self.blob_address = ""

    def new_id(self, prefix: str) -> str:
        """An id of the client's liking: two letters and 22 digits (it takes anything else for a name)."""
        return f"{prefix}-{next(self.ids):022}"

    def volume(self, name: str) -> Volume:
        """The volume of that name.

        Raises:
            KeyError: there is none.
        """
        for volume in self.volumes.values():
            if volume.name == name:
                return volume
        raise KeyError(name)


class _Unary:
    """Bridges a method that takes a request and returns an answer to grpclib's streams."""

    def __init_subclass__(cls) -> None:
        for name in dir(api_grpc.ModalClientBase):
            if name[0].isupper() and getattr(getattr(api_grpc.ModalClientBase, name), "__isabstractmethod__", False):
                setattr(cls, name, _bridge(name, cls.__dict__.get(name)))
        cls.__abstractmethods__ = frozenset()


def _bridge(name: str, method: Any) -> Any:
    async def handle(self: "ControlPlane", stream: grpclib.server.Stream) -> None:
        request = await stream.recv_message()
        self.cloud.rpcs.append(name)
        if time.monotonic() < self.cloud.unavailable_until:
            raise GRPCError(Status.UNAVAILABLE, "injected: the service is unavailable")
        if method is None:
            self.cloud.missing.append(name)
            raise GRPCError(Status.UNIMPLEMENTED, f"tests/modal_cloud does not implement {name}")
        if inspect.isasyncgenfunction(method):
            async for answer in method(self, request):
                await stream.send_message(answer)
        else:
            await stream.send_message(await method(self, request))

    return handle


class ControlPlane(_Unary, api_grpc.ModalClientBase):
    """The service, for a client on the laptop, or for one container (which does not name itself in its calls,
    and so gets a server of its own)."""

    def __init__(self, cloud: Cloud, container: Container | None = None, cluster: Cluster | None = None):
        self.cloud = cloud
        self.container = container
        self.cluster = cluster

    # --- clients and environments --------------------------------------------------------------------------------

    async def ClientHello(self, request: Empty) -> api_pb2.ClientHelloResponse:
        return api_pb2.ClientHelloResponse(image_builder_version=IMAGE_BUILDER_VERSION)

    async def EnvironmentGetOrCreate(self, request: Any) -> api_pb2.EnvironmentGetOrCreateResponse:
        settings = api_pb2.EnvironmentSettings(image_builder_version=IMAGE_BUILDER_VERSION, webhook_suffix="")
        metadata = api_pb2.EnvironmentMetadata(name=request.deployment_name or "main", settings=settings)
        return api_pb2.EnvironmentGetOrCreateResponse(environment_id="en-000001", metadata=metadata)

    async def TokenInfoGet(self, request: Any) -> api_pb2.TokenInfoGetResponse:
        return api_pb2.TokenInfoGetResponse(
            token_id="ak-stand-in",
            workspace_name="stand-in",
            user_identity=api_pb2.UserIdentity(username="nobody"),
        )

    # --- apps ----------------------------------------------------------------------------------------------------

    async def AppCreate(self, request: api_pb2.AppCreateRequest) -> api_pb2.AppCreateResponse:
        app = App(self.cloud.new_id("ap"), request.description, request.app_state)
        self.cloud.apps[app.app_id] = app
        return api_pb2.AppCreateResponse(
            app_id=app.app_id, app_page_url=f"http://modal.test/{app.app_id}", app_logs_url="http://modal.test/logs"
        )

    async def AppGetOrCreate(self, request: api_pb2.AppGetOrCreateRequest) -> api_pb2.AppGetOrCreateResponse:
        app = self.cloud.deployed.get(request.app_name)
        if app is None:
            app = App(self.cloud.new_id("ap"), request.app_name, api_pb2.APP_STATE_INITIALIZING)
            self.cloud.apps[app.app_id] = app
        return api_pb2.AppGetOrCreateResponse(app_id=app.app_id)

    async def AppGetByDeploymentName(self, request: Any) -> api_pb2.AppGetByDeploymentNameResponse:
        app = self.cloud.deployed.get(request.name)
        return api_pb2.AppGetByDeploymentNameResponse(app_id=app.app_id if app else "")

    async def AppGetLayout(self, request: api_pb2.AppGetLayoutRequest) -> api_pb2.AppGetLayoutResponse:
        app = self.cloud.apps[request.app_id]
        functions = {name: self.cloud.functions[function_id] for name, function_id in app.functions.items()}
        objects = [
            api_pb2.Object(object_id=function.function_id, function_handle_metadata=function.metadata)
            for function in functions.values()
        ]
        layout = api_pb2.AppLayout(objects=objects, function_ids=app.functions)
        return api_pb2.AppGetLayoutResponse(app_layout=layout)

    async def AppHeartbeat(self, request: Any) -> Empty:
        return Empty()

    async def AppPublish(self, request: api_pb2.AppPublishRequest) -> api_pb2.AppPublishResponse:
        app = self.cloud.apps[request.app_id]
        app.functions = dict(request.function_ids)
        app.state = request.app_state
        if request.app_state == api_pb2.APP_STATE_DEPLOYED:
            app.name = request.name
            self.cloud.deployed[request.name] = app
        return api_pb2.AppPublishResponse(url=f"http://modal.test/{app.app_id}", deployed_at=time.time())

    async def AppClientDisconnect(self, request: api_pb2.AppClientDisconnectRequest) -> Empty:
        app = self.cloud.apps[request.app_id]
        app.disconnected = True
        if app.state == api_pb2.APP_STATE_EPHEMERAL:
            await self._stop(app)
        return Empty()

    async def AppList(self, request: api_pb2.AppListRequest) -> api_pb2.AppListResponse:
        apps = [
            api_pb2.AppListResponse.AppListItem(
                app_id=app.app_id,
                description=app.name,
                state=api_pb2.APP_STATE_STOPPED if app.stopped else app.state,
                created_at=time.time(),
                n_running_tasks=sum(
                    container.ended is None and container.call.function.app is app
                    for container in self.cloud.containers
                ),
            )
            for app in self.cloud.apps.values()
        ]
        return api_pb2.AppListResponse(apps=apps)

    async def AppGetLifecycle(self, request: Any) -> api_pb2.AppGetLifecycleResponse:
        if request.app_id not in self.cloud.apps:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_id}' not found")
        app = self.cloud.apps[request.app_id]
        state = api_pb2.APP_STATE_STOPPED if app.stopped else app.state
        return api_pb2.AppGetLifecycleResponse(lifecycle=api_pb2.AppLifecycle(app_state=state))

    async def AppFetchLogs(self, request: api_pb2.AppFetchLogsRequest) -> api_pb2.AppFetchLogsResponse:
        lines = "".join(self.cloud.apps[request.app_id].logs).splitlines(keepends=True)[-request.limit :]
        items = [
            api_pb2.TaskLogs(data=line, timestamp=time.time(), file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)
            for line in lines
        ]
        return api_pb2.AppFetchLogsResponse(batches=[api_pb2.TaskLogsBatch(items=items)])

    async def AppStop(self, request: api_pb2.AppStopRequest) -> Empty:
        await self._stop(self.cloud.apps[request.app_id])
        return Empty()

    async def _stop(self, app: App) -> None:
        app.stopped = True
        for call in self.cloud.calls.values():
            if call.function.app is app and call.task and not call.done.is_set():
                call.task.cancel()
                call.result = api_pb2.FunctionGetOutputsItem(result=api_pb2.GenericResult(status=TERMINATED))
                call.done.set()
        for container in self.cloud.containers:
            if container.ended is None and container.call.function.app is app:
                container.kill()

    async def AppGetLogs(self, request: api_pb2.AppGetLogsRequest) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        app = self.cloud.apps[request.app_id]
        position = int(request.last_entry_id or 0)
        deadline = time.monotonic() + request.timeout
        while True:
            running = any(
                call.function.app is app and not call.done.is_set() and not app.stopped
                for call in self.cloud.calls.values()
            )
            if len(app.logs) > position:
                text = "".join(app.logs[position:])
                position = len(app.logs)
                item = api_pb2.TaskLogs(data=text, file_descriptor=api_pb2.FILE_DESCRIPTOR_STDOUT)
                yield api_pb2.TaskLogsBatch(entry_id=str(position), items=[item])
            elif app.stopped or (app.disconnected and not running):
                yield api_pb2.TaskLogsBatch(entry_id=str(position), app_done=True)
                return
            elif time.monotonic() > deadline:
                return
            else:
                await asyncio.sleep(0.05)

    async def TaskList(self, request: Any) -> api_pb2.TaskListResponse:
        return api_pb2.TaskListResponse()  # of an app that is served, whose containers nobody here has asked anything

    # --- images and mounts ---------------------------------------------------------------------------------------

    async def ImageGetOrCreate(self, request: api_pb2.ImageGetOrCreateRequest) -> api_pb2.ImageGetOrCreateResponse:
        base = next((self.cloud.images[image.image_id] for image in request.image.base_images if image.image_id), None)
        files = {file.filename: file.data for file in request.image.context_files}
        image = Image(self.cloud.new_id("im"), tuple(request.image.dockerfile_commands), files, base)
        self.cloud.images[image.image_id] = image
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image.image_id,
            result=api_pb2.GenericResult(status=SUCCESS),
            metadata=api_pb2.ImageMetadata(image_builder_version=IMAGE_BUILDER_VERSION),
        )

    async def MountBatchedCheckExistence(self, request: Any) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self.cloud.blobs]
        return api_pb2.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    async def MountPutFile(self, request: api_pb2.MountPutFileRequest) -> api_pb2.MountPutFileResponse:
        match request.WhichOneof("data_oneof"):
            case "data":
                self.cloud.blobs[request.sha256_hex] = request.data
            case "data_blob_id":
                self.cloud.blobs[request.sha256_hex] = self.cloud.blobs[request.data_blob_id]
        return api_pb2.MountPutFileResponse(exists=request.sha256_hex in self.cloud.blobs)

    async def MountGetOrCreate(self, request: api_pb2.MountGetOrCreateRequest) -> api_pb2.MountGetOrCreateResponse:
        mount_id = self.cloud.new_id("mo")
        self.cloud.mounts[mount_id] = {file.filename: file.sha256_hex for file in request.files}
        names = repr(sorted(self.cloud.mounts[mount_id].items())).encode()
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=hashlib.sha256(names).hexdigest())
        return api_pb2.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    async def BlobCreate(self, request: api_pb2.BlobCreateRequest) -> api_pb2.BlobCreateResponse:
        blob_id = self.cloud.new_id("bl")
        urls = api_pb2.UploadUrlList(items=[f"{self.cloud.blob_address}/blob/{blob_id}"])
        return api_pb2.BlobCreateResponse(blob_ids=[blob_id], upload_urls=urls)

    async def BlobGet(self, request: api_pb2.BlobGetRequest) -> api_pb2.BlobGetResponse:
        return api_pb2.BlobGetResponse(download_url=f"{self.cloud.blob_address}/blob/{request.blob_id}")

    async def SecretGetOrCreate(self, request: Any) -> api_pb2.SecretGetOrCreateResponse:
        return api_pb2.SecretGetOrCreateResponse(secret_id=self.cloud.new_id("st"))

    # --- dicts ---------------------------------------------------------------------------------------------------

    async def DictGetOrCreate(self, request: api_pb2.DictGetOrCreateRequest) -> api_pb2.DictGetOrCreateResponse:
        name = request.deployment_name
        if request.object_creation_type != api_pb2.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
            raise GRPCError(Status.INVALID_ARGUMENT, "the stand-in has dicts that are created if missing")
        self.cloud.dicts.setdefault(f"di-{name}", {})
        return api_pb2.DictGetOrCreateResponse(dict_id=f"di-{name}", metadata=api_pb2.DictMetadata(name=name))

    async def DictUpdate(self, request: api_pb2.DictUpdateRequest) -> api_pb2.DictUpdateResponse:
        entries, created = self.cloud.dicts[request.dict_id], False
        for update in request.updates:
            if update.key not in entries or not request.if_not_exists:
                created = update.key not in entries
                entries[update.key] = update.value
        return api_pb2.DictUpdateResponse(created=created)

    async def DictGet(self, request: api_pb2.DictGetRequest) -> api_pb2.DictGetResponse:
        value = self.cloud.dicts[request.dict_id].get(request.key)
        return api_pb2.DictGetResponse(found=value is not None, value=value)

    # --- volumes -------------------------------------------------------------------------------------------------

    async def VolumeGetOrCreate(self, request: api_pb2.VolumeGetOrCreateRequest) -> api_pb2.VolumeGetOrCreateResponse:
        creation = request.object_creation_type
        try:
            volume = self.cloud.volume(request.deployment_name)
            if creation == api_pb2.OBJECT_CREATION_TYPE_CREATE_FAIL_IF_EXISTS:
                raise GRPCError(Status.ALREADY_EXISTS, f"Volume '{request.deployment_name}' already exists")
        except KeyError:
            if creation == api_pb2.OBJECT_CREATION_TYPE_UNSPECIFIED:
                raise GRPCError(Status.NOT_FOUND, f"Volume '{request.deployment_name}' not found") from None
            folder = self.cloud.folder / "volumes" / request.deployment_name
            volume = Volume(self.cloud.new_id("vo"), request.deployment_name, folder)
            self.cloud.volumes[volume.volume_id] = volume
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.volume_id, metadata=api_pb2.VolumeMetadata(name=volume.name)
        )

    def _path(self, volume_id: str, path: str) -> Path:
        files = self.cloud.volumes[volume_id].files
        found = files / path.lstrip("/")
        if not found.resolve().is_relative_to(files.resolve()) or not found.exists():
            raise GRPCError(Status.NOT_FOUND, f"No such file or directory: {path!r}")
        return found

    async def VolumeListFiles(self, request: Any) -> AsyncIterator[api_pb2.VolumeListFilesResponse]:
        root = self.cloud.volumes[request.volume_id].files
        path = self._path(request.volume_id, request.path)
        found = [path] if path.is_file() else sorted(path.rglob("*") if request.recursive else path.iterdir())
        for start in range(0, len(found), 100):
            entries = [
                api_pb2.FileEntry(
                    path=entry.relative_to(root).as_posix(),
                    type=api_pb2.FileEntry.DIRECTORY if entry.is_dir() else api_pb2.FileEntry.FILE,
                    mtime=int(entry.stat().st_mtime),
                    size=entry.stat().st_size,
                )
                for entry in found[start : start + 100]
            ]
            yield api_pb2.VolumeListFilesResponse(entries=entries)

    async def VolumeGetFile2(self, request: api_pb2.VolumeGetFile2Request) -> api_pb2.VolumeGetFile2Response:
        path = self._path(request.volume_id, request.path)
        size, block = path.stat().st_size, 8 * 1024 * 1024
        start = request.start
        length = request.len or size - start
        urls = [
            f"{self.cloud.blob_address}/volume/{request.volume_id}/{offset}/{min(block, start + length - offset)}"
            f"/{request.path.lstrip('/')}"
            for offset in range(start, start + length, block)
        ]
        return api_pb2.VolumeGetFile2Response(get_urls=urls, size=size, start=start, len=length)

    async def VolumePutFiles(self, request: api_pb2.VolumePutFilesRequest) -> Empty:
        files = self.cloud.volumes[request.volume_id].files
        for file in request.files:
            target = files / file.filename.lstrip("/")
            if request.disallow_overwrite_existing_files and target.exists():
                raise GRPCError(Status.ALREADY_EXISTS, f"{file.filename}: already exists")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.cloud.blobs[file.sha256_hex])
        return Empty()

    async def VolumeRemoveFile(self, request: api_pb2.VolumeRemoveFileRequest) -> Empty:
        path = self._path(request.volume_id, request.path)
        if path.is_dir():
            if not request.recursive:
                raise GRPCError(Status.INVALID_ARGUMENT, "is a folder")
            shutil.rmtree(path)
        else:
            path.unlink()
        return Empty()

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest) -> api_pb2.VolumeCommitResponse:
        container = self.container
        mounted = next(m for m in container.mounts.values() if m.volume.volume_id == request.volume_id)
        if self.cloud.failing_commits > 0:
            self.cloud.failing_commits -= 1
            raise GRPCError(Status.FAILED_PRECONDITION, "injected: the commit failed")
        volume = mounted.volume.name
        container.commits[volume] += 1
        due = [
            fault
            for fault in self.cloud.faults[container.function, container.number]
            if not fault.in_spawn and fault.volume == volume and fault.after_commits == container.commits[volume]
        ]
        for fault in due:
            if fault.in_commit:
                await self._strike(fault)
                raise GRPCError(Status.UNAVAILABLE, "injected: gone in the middle of a commit")
        await asyncio.get_running_loop().run_in_executor(None, mounted.commit)
        for fault in due:
            await self._strike(fault)
        return api_pb2.VolumeCommitResponse(skip_reload=False)

    async def _strike(self, fault: Fault) -> None:
        container = self.container
        match fault.kind:
            case "kill":
                container.kill()
            case "timeout":
                container.timed_out = True
                container.kill()
            case "preempt":
                container.send_signal(signal.SIGINT)
                container.tasks.append(asyncio.create_task(self._kill_later(container)))
            case "hang":
                container.send_signal(signal.SIGSTOP)

    async def _kill_later(self, container: Container) -> None:
        await asyncio.sleep(self.cloud.grace_period)
        container.kill()

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest) -> Empty:
        if self.container:
            path, mounted = next(
                (path, m) for path, m in self.container.mounts.items() if m.volume.volume_id == request.volume_id
            )
            if opened := self.container.open_files(path):
                reason = f"there are open files preventing the operation: {opened}"
                raise GRPCError(Status.FAILED_PRECONDITION, reason)
            await asyncio.get_running_loop().run_in_executor(None, mounted.reload)
        return Empty()

    # --- functions -----------------------------------------------------------------------------------------------

    async def FunctionPrecreate(self, request: api_pb2.FunctionPrecreateRequest) -> api_pb2.FunctionPrecreateResponse:
        function_id = request.existing_function_id or self.cloud.new_id("fu")
        metadata = _handle_metadata(request, function_id, request.app_id)
        return api_pb2.FunctionPrecreateResponse(function_id=function_id, handle_metadata=metadata)

    async def FunctionCreate(self, request: api_pb2.FunctionCreateRequest) -> api_pb2.FunctionCreateResponse:
        function_id = request.existing_function_id or self.cloud.new_id("fu")
        if request.HasField("function_data"):
            data = request.function_data
            definition = data.ranked_functions[0].function
        else:
            definition = request.function
            data = api_pb2.FunctionData(module_name=definition.module_name, function_name=definition.function_name)
            data.ranked_functions.add(rank=0, function=definition)
        metadata = _handle_metadata(definition, function_id, request.app_id)
        app = self.cloud.apps[request.app_id]
        self.cloud.functions[function_id] = Function(function_id, app, definition, data, metadata)
        return api_pb2.FunctionCreateResponse(
            function_id=function_id, function=definition, handle_metadata=metadata, function_data=data
        )

    async def FunctionGet(self, request: api_pb2.FunctionGetRequest) -> api_pb2.FunctionGetResponse:
        app = self.cloud.deployed.get(request.app_name)
        if app is None or request.object_tag not in app.functions:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' has no function '{request.object_tag}'")
        function = self.cloud.functions[app.functions[request.object_tag]]
        return api_pb2.FunctionGetResponse(
            function_id=function.function_id, handle_metadata=function.metadata, function=function.data
        )

    async def FunctionMap(self, request: api_pb2.FunctionMapRequest) -> api_pb2.FunctionMapResponse:
        function = self.cloud.functions[request.function_id]
        (item,) = request.pipelined_inputs
        call = Call(self.cloud.new_id("fc"), function, item.input, request.function_call_invocation_type)
        self.cloud.calls[call.call_id] = call
        call.task = asyncio.create_task(self._run(call))
        if self.container:
            for fault in self.cloud.faults[self.container.function, self.container.number]:
                if fault.in_spawn:
                    await self._strike(fault)
                    raise GRPCError(Status.UNAVAILABLE, "injected: gone after a call was made")
        return api_pb2.FunctionMapResponse(
            function_call_id=call.call_id,
            function_call_jwt=call.call_id,
            pipelined_inputs=[api_pb2.FunctionPutInputsResponseItem(idx=0, input_id=f"in-{call.call_id}")],
            retry_policy=function.definition.retry_policy,
            sync_client_retries_enabled=True,
        )

    async def FunctionRetryInputs(self, request: Any) -> api_pb2.FunctionRetryInputsResponse:
        call = self.cloud.calls[request.function_call_jwt]
        call.retry_count += 1
        call.done.clear()
        call.task = asyncio.create_task(self._run(call))
        return api_pb2.FunctionRetryInputsResponse(input_jwts=[""])

    async def FunctionGetOutputs(self, request: Any) -> api_pb2.FunctionGetOutputsResponse:
        call = self.cloud.calls[request.function_call_id]
        try:
            if not call.done.is_set():  # which a wait of no time would not look at
                await asyncio.wait_for(call.done.wait(), request.timeout)
        except TimeoutError:
            return api_pb2.FunctionGetOutputsResponse(last_entry_id="0-0", num_unfinished_inputs=1)
        return api_pb2.FunctionGetOutputsResponse(idxs=[0], outputs=[call.result], last_entry_id="1-0")

    async def FunctionCallFromId(self, request: Any) -> api_pb2.FunctionCallFromIdResponse:
        return api_pb2.FunctionCallFromIdResponse(function_call_id=request.function_call_id, num_inputs=1)

    async def FunctionCallCancel(self, request: Any) -> Empty:
        call = self.cloud.calls[request.function_call_id]
        if call.task:
            call.task.cancel()
        return Empty()

    async def _run(self, call: Call) -> None:
        """Attempt after attempt, as Modal does: an input whose container was preempted or died is started
        again; what failed or ran into its timeout is retried as the function's policy says, by the server if
        the call was spawned and by its client if that waits for it."""
        policy = call.function.definition.retry_policy
        deaths = failures = 0
        while True:
            container = await self._attempt_by_all(call)
            if container.ended in ("interrupted", "died") and deaths < MAX_RESTARTS:
                deaths += 1
                continue
            spawned = call.invocation != api_pb2.FUNCTION_CALL_INVOCATION_TYPE_SYNC
            retry = container.ended in ("failure", "timeout") and not container.failed_to_start
            if retry and spawned and failures < policy.retries:
                delay = policy.initial_delay_ms * policy.backoff_coefficient**failures
                failures += 1
                call.retry_count += 1
                await asyncio.sleep(min(delay, policy.max_delay_ms, self.cloud.longest_retry_delay_ms) / 1000)
                continue
            break
        if container.result is None:
            status = TIMEOUT if container.ended == "timeout" else FAILURE
            result = api_pb2.GenericResult(status=status, exception=f"the container {container.ended}")
            container.result = api_pb2.FunctionPutOutputsItem(result=result, data_format=api_pb2.DATA_FORMAT_PICKLE)
        call.result = api_pb2.FunctionGetOutputsItem(
            result=container.result.result,
            idx=0,
            input_id=f"in-{call.call_id}",
            data_format=container.result.data_format,
            task_id=container.task_id,
        )
        call.done.set()

    async def _attempt_by_all(self, call: Call) -> Container:
        """The container whose end is the attempt's: the only one; or of a cluster, which stands and falls together, the
        first, unless another came to a bad end before."""
        size = max(1, call.function.definition._experimental_group_size)
        cluster = Cluster(self.cloud.new_id("cu"), size)
        running = {asyncio.create_task(self._attempt(call, cluster, rank)) for rank in range(size)}
        bad = None
        while running:
            done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for container in (task.result() for task in done):
                if container.ended != "success":
                    bad = bad or container
                    for member in cluster.members.values():
                        member.kill()
        return bad or cluster.members[0]

    async def _attempt(self, call: Call, cluster: Cluster, rank: int) -> Container:
        definition = call.function.definition
        cloud, loop = self.cloud, asyncio.get_running_loop()
        number = len(cloud.containers) + 1
        root = cloud.folder / f"container-{number}"
        root.mkdir()
        volumes = {mount.mount_path: cloud.volumes[mount.volume_id] for mount in definition.volume_mounts}
        of_function = sum(other.function == definition.function_name for other in cloud.containers) + 1
        container = Container(cloud.new_id("ta"), number, of_function, call, mounts={})
        cloud.containers.append(container)
        cluster.members[rank] = container
        mounts = container.mounts = await loop.run_in_executor(None, containers.mount_volumes, root, volumes)

        server = grpclib.server.Server(
            [ControlPlane(cloud, container, cluster)], status_details_codec=custom_detail_codec
        )
        await server.start("127.0.0.1", 0)
        port = server._server.sockets[0].getsockname()[1]
        files = {
            path: cloud.blobs[digest]
            for mount_id in definition.mount_ids
            for path, digest in cloud.mounts[mount_id].items()
        }
        files["/etc/hosts"] = b"127.0.0.1 localhost\n::1 i6pn.modal.local\n"
        files["/modal/arguments.pb"] = self._arguments(call.function, container).SerializeToString()
        environment = {
            "MODAL_SERVER_URL": f"http://127.0.0.1:{port}",
            "MODAL_TASK_ID": container.task_id,
            "MODAL_IS_REMOTE": "1",
            "MODAL_ENVIRONMENT": "main",
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_AUTO",
            "MODAL_CONTAINER_ARGUMENTS_PATH": "/modal/arguments.pb",
        }
        image = cloud.images[definition.image_id]
        words, environment = containers.sandbox(root, image, files, mounts, environment | cloud.environment)
        try:
            await containers.start(container, image, words, environment, cloud.warm_python)
            if cloud.background_commit_every:
                container.tasks.append(asyncio.create_task(self._commit_now_and_then(container)))
            reading = asyncio.create_task(self._read(container, call.function.app))
            try:
                await asyncio.wait_for(container.process.wait(), definition.timeout_secs)
            except TimeoutError:
                container.timed_out = True
                container.kill()
                await container.process.wait()
            await reading
        finally:
            container.kill()
            for task in container.tasks:
                task.cancel()
            if container.ended is None:
                container.ended = self._how_it_ended(container)
            server.close()
            await loop.run_in_executor(None, containers.clean_up, root, mounts)
        return container

    @staticmethod
    def _how_it_ended(container: Container) -> str:
        if container.result is not None:
            return "success" if container.result.result.status == SUCCESS else "failure"
        if container.timed_out:
            return "timeout"
        return "interrupted" if container.process and container.process.returncode == 0 else "died"

    async def _commit_now_and_then(self, container: Container) -> None:
        while True:
            await asyncio.sleep(self.cloud.background_commit_every)
            for mounted in container.mounts.values():
                await asyncio.get_running_loop().run_in_executor(None, mounted.commit)

    async def _read(self, container: Container, app: App) -> None:
        while chunk := await container.process.stdout.read(65536):
            text = chunk.decode(errors="replace")
            container.output += text
            app.logs.append(text)

    def _arguments(self, function: Function, container: Container) -> api_pb2.ContainerArguments:
        definition = function.definition
        functions = [other for other in self.cloud.functions.values() if other.app is function.app]
        objects = [
            api_pb2.Object(object_id=other.function_id, function_handle_metadata=other.metadata) for other in functions
        ]
        for dependency in definition.object_dependencies:
            thing = api_pb2.Object(object_id=dependency.object_id)
            if volume := self.cloud.volumes.get(dependency.object_id):
                thing.volume_metadata.name = volume.name
            objects.append(thing)
        ids = {other.definition.function_name: other.function_id for other in functions}
        layout = api_pb2.AppLayout(objects=objects, function_ids=ids)
        return api_pb2.ContainerArguments(
            task_id=container.task_id,
            function_id=function.function_id,
            app_id=function.app.app_id,
            function_def=definition,
            environment_name="main",
            app_layout=layout,
        )

    # --- what a container asks -----------------------------------------------------------------------------------

    async def ContainerHello(self, request: Empty) -> Empty:
        return Empty()

    async def ContainerHeartbeat(self, request: Any) -> api_pb2.ContainerHeartbeatResponse:
        return api_pb2.ContainerHeartbeatResponse()

    async def TaskClusterHello(self, request: Any) -> api_pb2.TaskClusterHelloResponse:
        (rank,) = (rank for rank, member in self.cluster.members.items() if member is self.container)
        # Each has an address of its own, all of them this machine's.
        addresses = [f"127.0.0.{number}" for number in range(1, self.cluster.size + 1)]
        return api_pb2.TaskClusterHelloResponse(
            cluster_id=self.cluster.cluster_id,
            cluster_rank=rank,
            container_ips=[f"::ffff:{address}" for address in addresses],
            container_ipv4_ips=addresses,
        )

    async def FunctionGetInputs(self, request: Any) -> api_pb2.FunctionGetInputsResponse:
        call = self.container.call
        if self.container.input_sent:
            return api_pb2.FunctionGetInputsResponse(inputs=[api_pb2.FunctionGetInputsItem(kill_switch=True)])
        self.container.input_sent = True
        item = api_pb2.FunctionGetInputsItem(
            input_id=f"in-{call.call_id}",
            input=call.input,
            function_call_id=call.call_id,
            function_call_invocation_type=call.invocation,
            retry_count=call.retry_count,
        )
        return api_pb2.FunctionGetInputsResponse(inputs=[item])

    async def FunctionPutOutputs(self, request: api_pb2.FunctionPutOutputsRequest) -> Empty:
        (self.container.result,) = request.outputs
        return Empty()

    async def TaskResult(self, request: api_pb2.TaskResultRequest) -> Empty:
        # The script could not be imported: the input was never begun, and no other container will do better.
        self.container.failed_to_start = True
        self.container.result = api_pb2.FunctionPutOutputsItem(
            result=request.result, data_format=api_pb2.DATA_FORMAT_PICKLE
        )
        return Empty()


def _handle_metadata(
    described: api_pb2.Function | api_pb2.FunctionPrecreateRequest, function_id: str, app_id: str
) -> api_pb2.FunctionHandleMetadata:
    """What a client is told of a function, from either of the messages that describe it."""
    return api_pb2.FunctionHandleMetadata(
        function_name=described.function_name,
        function_type=described.function_type,
        definition_id=f"de-{function_id}",
        function_schema=described.function_schema,
        supported_input_formats=described.supported_input_formats,
        supported_output_formats=described.supported_output_formats,
        app_id=app_id,
    )
