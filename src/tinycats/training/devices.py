"""What a run computes on, and in which precision."""

import ctypes
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from tinycats.script.errors import UserError
from tinycats.training.processes import here

log = logging.getLogger(__name__)

# With which CPUs multiply bf16: Intel's since Sapphire Rapids, and AMD's since Zen 4.
BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h: how much it keeps, how many blocks it maps by themselves


@dataclass(frozen=True)
class Device:
    """A device with its way of computing; from `choose`.

    Attributes:
        autocast: the context in which a model's forward pass runs.
        scaler: scales the loss where gradients in fp16 would vanish; does nothing otherwise.
        optimizer_dtype: what the optimizer multiplies matrices in; None: in their own.
    """

    device: torch.device
    autocast: torch.autocast
    scaler: torch.amp.GradScaler
    optimizer_dtype: torch.dtype | None

    @property
    def name(self) -> str:
        """What kind of device it is."""
        return torch.cuda.get_device_name(self.device) if self.is_gpu else self.device.type

    @property
    def is_gpu(self) -> bool:
        """Whether batches travel to it, from pinned memory."""
        return self.device.type == "cuda"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this device; from pinned memory without waiting for it to arrive."""
        return tensor.to(self.device, non_blocking=True)


def find(name: str) -> torch.device:
    """The device of that name; `auto` is this process's GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device cuda: torch {torch.__version__} finds no such GPU here; --device cpu works without")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no such GPU here (they are Apple's); --device cpu works without")
    if torch.cuda.is_available() and name in ("auto", "cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if name == "mps" else "cpu")


def choose(name: str, mixed_precision: bool, *, expects_gpu: bool = False) -> Device:
    """The device to train on, as of `find`. Says what it chose.

    Mixed precision (Micikevicius et al., arXiv 1710.03740) is bf16 where the GPU computes in it, and fp16 with
    a scaled loss where it does not (T4). A CPU that multiplies bf16 does so too; others, and Apple's GPUs, compute in
    float32.

    Raises:
        UserError: there is no such device here.
    """
    device = find(name)
    on_gpu = device.type == "cuda"
    if name == "mps":
        log.warning("Training on mps was never tried: please tell us how it went")
    if expects_gpu and name == "auto" and not on_gpu:
        log.warning("This machine should have a GPU, but torch %s finds none", torch.__version__)
    # Only what it computes in itself: emulated bf16 is slower than float32.
    if on_gpu:
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        instructions = torch.cpu.get_capabilities()
        has_bf16 = device.type == "cpu" and any(instructions.get(name) for name in BF16_INSTRUCTIONS)
    mixed = mixed_precision and (on_gpu or has_bf16)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    if device.type == "cpu":
        keep_memory()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    place = torch.cuda.get_device_name() if on_gpu else {"cpu": "the CPU", "mps": "Apple's GPU"}[device.type]
    processes = here().count
    log.info(
        "Training on %s in %s",
        f"{processes} x {place}" if processes > 1 else place,
        f"{dtype} (mixed precision)" if mixed else torch.float32,
    )
    return Device(
        device,
        torch.autocast(device.type, dtype, enabled=mixed),
        torch.amp.GradScaler(device.type, enabled=mixed and dtype is torch.float16),
        torch.bfloat16 if mixed and has_bf16 else None,
    )


def keep_memory() -> None:
    """Have the C library keep what tensors leave for the tensors to come. glibc gives what is large back to the system,
    from which it comes anew, page by page and set to zero: a fifth of a step of 256 images (ADR-029)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


@contextmanager
def out_of_memory_is_told(batch_size: int, remedy: str) -> Iterator[None]:
    """A GPU that has not enough memory for a step.

    Raises:
        UserError: that is so; with what to do about it.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has not enough memory for --batch-size {batch_size}; try {remedy}") from error
