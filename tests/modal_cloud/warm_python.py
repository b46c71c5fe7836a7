"""A Python that has imported the large packages already, and forks itself for each process that a test wants.

Importing torch, torchvision and TensorBoard takes seconds, and the end-to-end tests start two hundred processes
that do. A process started here is one all the same: its own pid, signals, working directory, environment and
standard streams, a child of the one that asked for it; inside the namespaces of a container if need be. What
it does not repeat is the import of PRELOADED; nothing of the product and nothing of Modal's client is among it.
Tests of the imports themselves start an ordinary Python.

    parent = WarmPython()
    process = parent.popen([script, *arguments], cwd=…, env=…, stdout=subprocess.PIPE, …)

With `launches=True` what the process itself starts as `python …`, as torch's launcher does, is forked as well: from a
copy of it, made before it has done anything.
"""

import array
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The modules that are imported once, and the distributions that they come from.
PRELOADED = {
    "numpy": "numpy",
    "PIL.Image": "pillow",
    "tqdm.contrib.logging": "tqdm",
    "torch.utils.tensorboard": "torch",
    "torchvision.transforms.v2": "torchvision",
    "tensorboard.summary.writer.event_file_writer": "tensorboard",
}
PR_SET_CHILD_SUBREAPER = 36
NAMESPACES = {"user": 0x10000000, "mnt": 0x00020000, "ipc": 0x08000000, "pid": 0x20000000}

libc = ctypes.CDLL(None, use_errno=True)


class WarmPython:
    """The parent; it starts with the first process that is asked for, and ends with this one.

    Args:
        connection: to one that has been started.
    """

    def __init__(self, connection: socket.socket | None = None) -> None:
        self._socket = connection
        self._lock = threading.Lock()

    def fork(self, request: dict[str, Any], streams: Sequence[int]) -> int:
        """The pid of a new process, this one's child: `request` and its stdin, stdout and stderr are `_become`'s."""
        with self._lock:
            if self._socket is None:
                self._socket = self._start()
            message = json.dumps(request).encode()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
            self._socket.sendmsg([len(message).to_bytes(8, "little")], ancillary)
            self._socket.sendall(message)
            pid = int.from_bytes(_receive(self._socket, 8), "little")
        if not pid:
            raise ChildProcessError(f"no process could be forked for {request['words']}")
        return pid

    @staticmethod
    def _start() -> socket.socket:
        _adopt_orphans()
        ours, theirs = socket.socketpair()
        with theirs:
            subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        return ours

    def popen(self, words: Sequence[str], launches: bool = False, **options: Any) -> subprocess.Popen:
        """`subprocess.Popen([python, *words], …)`."""
        return _WarmPopen(self, [sys.executable, *words], launches, **options)


class _WarmPopen(subprocess.Popen):
    def __init__(self, parent: WarmPython, words: Sequence[str], launches: bool = False, **options: Any):
        self._parent, self._launches = parent, launches
        super().__init__(words, **options)

    def _execute_child(
        self, args, _executable, preexec_fn, _close_fds, pass_fds, cwd, env, _startup, _flags, _shell, *rest
    ) -> None:
        assert preexec_fn is None and not pass_fds, "an ordinary Popen can do that"
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite, _restore, _gid, _gids, _uid, _umask, session, *_ = rest
        request = {"words": args[1:], "cwd": os.fspath(cwd or "."), "env": dict(env or os.environ), "session": session}
        request["launches"] = self._launches
        streams = [number if mine == -1 else mine for number, mine in enumerate((p2cread, c2pwrite, errwrite))]
        self.pid = self._parent.fork(request, streams)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _adopt_orphans() -> None:
    """What is forked here is forked twice and then, an orphan, becomes the child of the process that calls this, which
    can wait for it."""
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _receive(connection: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        chunk = connection.recv(length - len(received))
        if not chunk:
            raise ChildProcessError("the warm Python has ended")
        received += chunk
    return received


# --- the other side ----------------------------------------------------------------------------------------------


def _serve(connection: socket.socket) -> dict[str, Any]:
    """Fork for each request; returns it in the process that was forked for it."""
    while True:
        first, ancillary, *_ = connection.recvmsg(8, socket.CMSG_SPACE(3 * 4))
        if not first:
            os._exit(0)  # nobody is left who could ask
        streams = array.array("i")
        for _level, _kind, data in ancillary:
            streams.frombytes(data)
        request = json.loads(_receive(connection, int.from_bytes(first, "little")))
        reader, writer = os.pipe()
        between = os.fork()
        if between == 0:
            try:
                enter_namespaces(request.get("namespaces_of"))
                pid = os.fork()
            except OSError:
                pid, request["words"] = 0, None
            if pid or not request["words"]:
                os.write(writer, pid.to_bytes(8, "little"))
                os._exit(0)
            connection.close()
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.closerange(3, 1 + max(streams))
            return request
        os.waitpid(between, 0)  # from here on it is an orphan, which can be waited for
        connection.sendall(os.read(reader, 8))
        for descriptor in (reader, writer, *streams):
            os.close(descriptor)


def enter_namespaces(pid: int | None) -> None:
    """Enter the namespaces of a process; of processes, those forked from now on."""
    if pid is None:
        return
    opened = {}
    for name in NAMESPACES:  # all, before the first changes what is to be seen
        if Path(f"/proc/{pid}/ns/{name}").readlink() != Path(f"/proc/self/ns/{name}").readlink():
            opened[name] = os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY)
    for name, descriptor in opened.items():
        if libc.setns(descriptor, NAMESPACES[name]):
            raise OSError(ctypes.get_errno(), f"setns {name}")
        os.close(descriptor)


def _become(request: Mapping[str, Any]) -> list[str]:
    """Make this process what was asked for; returns the words of its command."""
    import importlib
    import io
    import signal

    signal.signal(signal.SIGINT, signal.default_int_handler)
    if request["session"]:
        os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    for number, name in ((1, "stdout"), (2, "stderr")):
        binary = os.fdopen(number, "wb", buffering=0, closefd=False)
        stream = io.TextIOWrapper(binary, encoding="utf-8", errors="backslashreplace", write_through=True)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    if moved := request.get("moved"):
        _move(moved)
    if path := os.environ.get("PYTHONPATH"):
        sys.path[:0] = path.split(os.pathsep)
    importlib.invalidate_caches()
    return request["words"]


def _move(places: Mapping[str, str]) -> None:
    """Let what is imported know where it lies now: a container has the same files in places of its own."""

    def moved(path: str) -> str:
        for old, new in places.items():
            if path == old or path.startswith(old + "/"):
                return new + path[len(old) :]
        return path

    for attributes in [vars(module) for module in list(sys.modules.values())]:  # a few refuse to have them set
        if attributes.get("__path__") is not None:
            attributes["__path__"] = [moved(path) for path in attributes["__path__"]]
            if attributes["__spec__"] is not None:
                attributes["__spec__"].submodule_search_locations = attributes["__path__"]
        if isinstance(attributes.get("__file__"), str):
            attributes["__file__"] = moved(attributes["__file__"])
    sys.path[:] = [moved(path) for path in sys.path]
    sys.prefix, sys.exec_prefix = sys.base_prefix, sys.base_exec_prefix = [moved(sys.base_prefix)] * 2
    sys.executable = f"{sys.prefix}/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    sys.path_importer_cache.clear()


def _fork_what_is_launched() -> list[str] | None:
    """Have what this process starts as `python …` forked, too; returns its words in a process that was."""
    import signal

    _adopt_orphans()
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return _become(_serve(theirs))
    theirs.close()
    parent, ordinary = WarmPython(ours), subprocess.Popen._execute_child

    def execute(popen: subprocess.Popen, args: Any, *rest: Any) -> None:
        if isinstance(args, list | tuple) and args[0] == sys.executable:
            popen._parent, popen._launches = parent, False
            _WarmPopen._execute_child(popen, [word for word in args if word != "-u"], *rest)
        else:
            ordinary(popen, args, *rest)

    subprocess.Popen._execute_child = execute
    return None


def _main() -> None:
    import gc
    import importlib
    import runpy
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests, and for what they started
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # what is shared stays shared
    del sys.path[0]  # this folder
    request = _serve(socket.socket(fileno=int(sys.argv[1])))
    words = _become(request)
    if request.get("launches"):
        words = _fork_what_is_launched() or words
    program, *arguments = words
    if program == "-m":
        module, *arguments = arguments
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [program, *arguments]
        sys.path.insert(0, str(Path(program).parent))
        runpy.run_path(program, run_name="__main__")


if __name__ == "__main__":
    _main()
