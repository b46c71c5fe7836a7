"""Where a run's seconds go: on a rented GPU those before its first step cost as much as training."""

import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

_IMPORTED_AT = time.monotonic()


class Startup:
    """A stopwatch, started when this process was; its first phase, `start`, ends here."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._since = self._began = _process_began_at()
        self._trained = 0.0
        self.ended("start")

    def ended(self, phase: str) -> None:
        """Say what the time since the last phase's end was for."""
        now = time.monotonic()
        self._seconds[phase] = now - self._since
        self._since = now

    def first_step(self, loss: "torch.Tensor") -> None:
        """Called after each step: the first time waits for it, and logs the seconds of each phase."""
        if self._seconds:
            loss.item()
            self.ended("first step")
            phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self._seconds.items())
            log.info("%.1f seconds until the first step was done: %s", sum(self._seconds.values()), phases)
            self._seconds.clear()

    def trained(self, seconds: float) -> None:
        """Count seconds that were spent on steps."""
        self._trained += seconds

    def log_totals(self) -> None:
        """Say how long this process has run, and how much of that it trained; and how full the GPU was."""
        import torch

        if torch.cuda.is_available():
            log.info("%.1f GiB of GPU memory at the peak", torch.cuda.max_memory_allocated() / 2**30)
        log.info(self.totals())

    def totals(self) -> str:
        """How long this process has run so far, and how much of that it trained."""
        total, trained = time.monotonic() - self._began, self._trained
        return f"{total:.0f} seconds in all, {trained:.0f} of them training ({trained / total:.0%})"

    def rate(self, images: int) -> str:
        """How many images it trained on in a second, if it was so many."""
        return f"{images / self._trained:.0f} images/s" if self._trained else "-"


def _process_began_at() -> float:
    """When this process was started, on the clock of time.monotonic; where that is not told, when it got here."""
    try:
        after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.monotonic() - age if 0 <= age < 3600 else _IMPORTED_AT
    except (OSError, AttributeError, ValueError, IndexError):
        return _IMPORTED_AT
