"""What a run computes on, and in which precision."""

import logging
from dataclasses import dataclass

import torch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """A device with its way of computing; from `choose`.

    Attributes:
        autocast: the context in which a model's forward pass runs.
        scaler: scales the loss where gradients in fp16 would vanish; does nothing otherwise.
    """

    device: torch.device
    autocast: torch.autocast
    scaler: torch.amp.GradScaler

    @property
    def is_gpu(self) -> bool:
        """Whether batches travel to it, from pinned memory."""
        return self.device.type == "cuda"

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on this device; from pinned memory without waiting for it to arrive."""
        return tensor.to(self.device, non_blocking=True)

    def over_all_gpus(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model (which is on this device), its batches split over all GPUs there are."""
        return torch.nn.DataParallel(model) if self.is_gpu and torch.cuda.device_count() > 1 else model


def choose(mixed_precision: bool, *, expects_gpu: bool = False) -> Device:
    """The GPU if there is one, else the CPU; says what it chose.

    Mixed precision (Micikevicius et al., arXiv 1710.03740) is bf16 where the GPU computes in it, and fp16 with
    a scaled loss where it does not (T4). A CPU computes in float32.
    """
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    if expects_gpu and not on_gpu:
        log.warning("This machine should have a GPU, but torch %s finds none", torch.__version__)
    mixed = mixed_precision and on_gpu
    # Only what the GPU computes in itself: emulated bf16 is slower than float32.
    dtype = torch.bfloat16 if mixed and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    log.info(
        "Training on %s in %s%s",
        f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if on_gpu else "the CPU",
        dtype if mixed else torch.float32,
        " (mixed precision is for GPUs)" if mixed_precision and not on_gpu else "",
    )
    return Device(
        device,
        torch.autocast(device.type, dtype, enabled=mixed),
        torch.amp.GradScaler(device.type, enabled=mixed and dtype is torch.float16),
    )
