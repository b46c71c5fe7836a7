"""Starts a run's processes, one a GPU, with torch's elastic launcher, and ends as they end."""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from tinycats.script.errors import TransientError
from tinycats.script.signals import STOP_SIGNALS, Stopped
from tinycats.training.processes import LOST_PEER

# Seconds for the processes to save when they are asked to stop; where one has died torch gives the others 30.
PATIENCE = 600


@dataclass(frozen=True)
class Nodes:
    """The machines that a run is spread over, and how they find each other.

    Attributes:
        count: how many there are.
        endpoint: host and port of the first, where the others meet it; of no use to a single one.
        is_first: whether this is the first.
        run_id: what the machines of this run call it, and no others theirs.
        address: where the others, and its own processes, reach this one (a container may not know its host name).
    """

    count: int = 1
    endpoint: str = "localhost:0"
    is_first: bool = True
    run_id: str = "tinycats"
    address: str = "localhost"


def gpus_here(device: str) -> int:
    """How many GPUs a script that was started by itself is to use: all of this machine's; 0 if it is one of several
    processes already."""
    if device not in ("auto", "cuda") or "TORCHELASTIC_RUN_ID" in os.environ:
        return 0
    import torch

    return torch.cuda.device_count()


def launch(command: Sequence[str], processes: int, nodes: Nodes = Nodes(), *, debug: bool = False) -> int:  # noqa: B008
    """Run `python <command>` as `processes` processes of one run, and wait for their end.

    Returns:
        The exit status of the one that decided how it ended, and said so if it was not 0.

    Raises:
        TransientError: a process died without a word.
        Stopped: this process was asked to stop, and so were they: one of them has said what was saved.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:  # what these say of a run that ends, its user has been told in a line
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        for name in logging.root.manager.loggerDict:
            if name.startswith("torch.distributed.elastic"):  # each has a level of its own
                logging.getLogger(name).setLevel(logging.CRITICAL)
    if nodes.count == 1 and sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # which else looks for the host name, too
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    logs = tempfile.TemporaryDirectory()  # torch's own would be left behind
    config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=processes,
        run_id=nodes.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=nodes.endpoint,
        local_addr=nodes.address,
        rdzv_configs={"is_host": nodes.is_first} if nodes.count > 1 else {},
        max_restarts=0,  # whoever started the run starts it again, and it goes on from its checkpoint
        logs_specs=DefaultLogsSpecs(log_dir=logs.name),
        shutdown_timeout=PATIENCE,
    )
    handlers = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
    try:
        elastic_launch(config, sys.executable)(*command)
        return 0
    except SignalException as error:
        raise Stopped(int(error.sigval), "") from None  # one of them has told
    except ChildFailedError as error:
        return _status({rank: failure.exitcode for rank, failure in error.failures.items()})
    finally:
        logs.cleanup()
        for signum, handler in handlers.items():  # torch keeps its own
            signal.signal(signum, handler)


def _status(exit_codes: dict[int, int]) -> int:
    """The exit code that says how the run ended, out of those of its processes, by rank."""
    spoken = [code for code in exit_codes.values() if code > 0 and code != LOST_PEER]
    if spoken:
        return spoken[0]
    died = sorted(
        (code == -signal.SIGTERM, rank, signal.Signals(-code).name) for rank, code in exit_codes.items() if code < 0
    )
    if died:  # by SIGTERM those may have that ended because of another
        _, rank, killed_by = died[0]
        raise TransientError(f"process {rank} of the run died ({killed_by}); the others have ended too")
    raise TransientError("a process of the run on another machine has ended, and so have those here")
