"""The processes of a run, one a GPU, on one machine or several: whose part of a batch is whose, and how they agree.

torch's elastic launcher (`torchrun`, or `launcher`) starts them, tells each its rank, and ends all when one has ended.
What they compute is what one process computes, up to the rounding of sums: each takes its share of the same batch.
torch is imported where it is used: a process knows its rank before that takes seconds.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from tinycats.script.errors import TransientError, UserError
from tinycats.script.signals import Stopped

if TYPE_CHECKING:
    import torch
    from torch.nn.parallel import DistributedDataParallel

_Result = TypeVar("_Result")

_PATIENCE = 20  # seconds for process 0 to tell what all of them know


class _Connection:
    """What a process knows of the others when it has joined them."""

    store: "torch.distributed.Store | None" = None
    launcher: int | None = None  # its pid


_connection = _Connection()

LOST_PEER = 75  # exit status of a process that ends because another one has: what went wrong there is said elsewhere


@dataclass(frozen=True)
class Processes:
    """This process among those of its run; alone by default.

    Attributes:
        rank: its number, from 0, over all machines; process 0 alone writes files and logs.
        count: how many there are.
        local_rank, local_count: the same on this machine.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is process 0."""
        return self.rank == 0

    def share(self, size: int) -> slice:
        """This process's part of `size` things, as even as it goes: the first processes have one more."""
        each, more = divmod(size, self.count)
        start = self.rank * each + min(self.rank, more)
        return slice(start, start + each + (self.rank < more))

    def weight(self, part: int, size: int) -> float:
        """What the mean over `part` of `size` things is multiplied by, for the mean over the processes (of the sum of
        their parts) to be that over all of the things."""
        return part * self.count / size

    def from_main(self, function: Callable[[], _Result]) -> _Result:
        """What `function` returns in process 0, which alone calls it, or raises there, if that is a UserError."""
        if self.count == 1:
            return function()
        from torch import distributed

        outcome: list[tuple[_Result | None, UserError | None] | None] = [None]
        if self.is_main:
            try:
                outcome = [(function(), None)]
            except UserError as error:
                outcome = [(None, error)]
        distributed.broadcast_object_list(outcome, src=0)
        assert outcome[0] is not None
        result, problem = outcome[0]
        if problem is not None:
            raise problem
        return result  # type: ignore[return-value]  # None is one of the function's results then

    def together(self, function: Callable[[], _Result]) -> _Result:
        """What `function` returns, which each process calls; what it raises in one of them is raised in all."""
        if self.count == 1:
            return function()
        from torch import distributed

        result, problem = None, None
        try:
            result = function()
        except Exception as error:
            problem = error
        problems: list[Exception | None] = [None] * self.count
        distributed.all_gather_object(problems, problem)
        if problem := next(filter(None, problems), None):
            raise problem
        return result  # type: ignore[return-value]  # as above

    def agree(self, *values: int) -> list[int]:
        """The largest of what the processes have for each value; does not wait for a GPU."""
        if self.count == 1:
            return list(values)
        import torch

        tensor = torch.tensor(values)
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX)
        return tensor.tolist()

    def mean(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The mean of the processes' tensors, in place."""
        return self.sum(tensor).div_(self.count) if self.count > 1 else tensor

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """The sum of the processes' tensors, in place; the same in each to the last bit."""
        if self.count > 1:
            import torch

            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: _Result) -> list[_Result] | None:
        """The processes' values, by rank, in process 0; None in the others."""
        if self.count == 1:
            return [value]
        from torch import distributed

        values: list[_Result | None] | None = [None] * self.count if self.is_main else None
        distributed.gather_object(value, values)
        return values  # type: ignore[return-value]  # all are there

    def parallel(self, model: "torch.nn.Module", device: "torch.device") -> "torch.nn.Module":
        """The model (which is on this device) with process 0's weights, whose gradients after a backward pass are the
        mean over the processes (Li et al., arXiv 2006.15704)."""
        if self.count == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        is_gpu = device.type == "cuda"
        parallel_model = DistributedDataParallel(
            model,
            device_ids=[device] if is_gpu else None,
            forward_sync_buffers=False,
            gradient_as_bucket_view=True,
        )
        if not is_gpu:
            parallel_model.register_comm_hook(None, _mean_in_order_of_rank)
        return parallel_model

    def in_parts(
        self, batch: Sequence["torch.Tensor"], count: int, parallel_model: "torch.nn.Module"
    ) -> Iterator[tuple[list["torch.Tensor"], AbstractContextManager]]:
        """This process's share of a batch in `count` parts (fewer where there are fewer images), each with a context
        for its forward and backward pass: gradients are added up here, and in the last part over the processes."""
        parts = list(zip(*(tensor.chunk(count) for tensor in batch), strict=True))
        for number, part in enumerate(parts, start=1):
            is_last = self.count == 1 or number == len(parts)
            yield list(part), nullcontext() if is_last else cast("DistributedDataParallel", parallel_model).no_sync()

    def wait(self) -> None:
        """Until all processes are here."""
        self.agree(0)

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher has ended, which would have ended this process with the others."""
        return self.count > 1 and os.getppid() != _connection.launcher

    def is_to_tell(self, error: BaseException) -> bool:
        """Whether the user is to be told of the error by this process: what happens to all of them is one line.

        Process 0 says what all have raised; of what befell one of them, the one says it.
        """
        store = _connection.store
        if self.count == 1 or store is None:
            return self.local_rank == 0
        befalls_all = isinstance(error, (UserError, Stopped)) and not isinstance(error, TransientError)
        try:
            if befalls_all and not self.is_main:
                deadline = time.monotonic() + _PATIENCE
                while not store.check(["told"]) and time.monotonic() < deadline:
                    time.sleep(0.05)
            return store.add("told", 1) == 1
        except RuntimeError:  # the process that holds the store has ended: the launcher, or process 0
            return self.is_main


def here() -> Processes:
    """This process, as its launcher describes it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Processes()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return Processes(*(int(os.environ[name]) for name in names))


@contextmanager
def joined() -> Iterator[Processes]:
    """This process, connected with the others of its run, with a GPU of its own if there are any."""
    processes = here()
    if processes.count == 1:
        yield processes
        return
    import torch

    if torch.cuda.is_available():
        torch.cuda.set_device(processes.local_rank % torch.cuda.device_count())
    # Through gloo they talk without waiting for a GPU.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    store, rank, count = next(torch.distributed.rendezvous("env://"))
    torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=count)
    _connection.store, _connection.launcher = store, os.getppid()
    try:
        yield processes
    except (UserError, Stopped):  # all of them raise these; in the middle of anything else there is nobody to talk to
        torch.distributed.destroy_process_group()
        raise
    torch.distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """End this process, as `sys.exit` does where it is alone; one of several ends without finalizing the interpreter.

    A thread of gloo's that lets go of a tensor meanwhile asks for Python's lock, is refused it, and aborts the process
    (SIGABRT, "terminate called without an active exception"): its launcher would take a good end for a death.
    """
    if here().count == 1:
        sys.exit(status)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(status)


def _mean_in_order_of_rank(_state, bucket):  # torch wants its own annotations, or none
    """The mean of the processes' gradients, added in the order of their ranks.

    gloo's own sum adds them in an order that depends on where in a bucket a number lies, and buckets are made anew
    after a process's first step: with three processes a run that was resumed would differ in its last bits.
    """
    import torch

    mine = bucket.buffer()
    gradients = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gradients, mine)
    mean = gradients[0]
    for gradient in gradients[1:]:
        mean += gradient
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(mean.div_(len(gradients)))
    return future


def is_lost_peer(error: BaseException) -> bool:
    """Whether this was raised because another process has ended."""
    if here().count == 1 or not isinstance(error, RuntimeError):
        return False
    from torch.distributed import DistError

    return isinstance(error, DistError) or "gloo" in str(error) or "Connection closed by peer" in str(error)
