"""Being asked to stop: by Ctrl-C, a preemption, a closed terminal."""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGHUP; what a closed terminal sends there is SIGBREAK.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)
)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and has come to a clean halt.

    A KeyboardInterrupt, because that is how a function tells Modal that it was preempted and wants the same
    input started again.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """130 for SIGINT, 143 for SIGTERM: the shell's convention of 128 + the signal's number."""
        return 128 + self.signum


NOTHING_TRAINED = "nothing had been trained yet, so there is nothing to resume"


class StopSignals:
    """Turns stop signals into an orderly end, as a context manager on the main thread.

    Outside `deferred()` a signal raises Stopped where the program stands; where Python lets nothing be raised, in a
    destructor, it is `requested` all the same. Inside `deferred()` the first signal only
    sets `requested`, which the training loop looks at after each step; a second one raises at once.

    Args:
        message: of the Stopped that is raised where the program stands.
    """

    def __init__(self, message: str = NOTHING_TRAINED) -> None:
        self.requested: int | None = None
        self._message = message
        self._message_of_second: Callable[[], str] | None = None  # while deferring
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        for signum in STOP_SIGNALS:
            # `nohup` and background shells ignore some signals on purpose; that stays so.
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._previous[signum] = signal.signal(signum, self._handle)
        self._unraisable_hook = sys.unraisablehook
        sys.unraisablehook = self._could_not_be_raised
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        sys.unraisablehook = self._unraisable_hook

    @contextmanager
    def deferred(self, message: Callable[[], str]) -> Iterator[None]:
        """While this is open, the first signal waits for the step in progress.

        Args:
            message: gives that of the Stopped that a second one raises.
        """
        self._message_of_second = message
        try:
            yield
        finally:
            self._message_of_second = None

    def ignore(self) -> None:
        """Let no further signal disturb what is left to do; until the end."""
        for signum in self._previous:
            signal.signal(signum, signal.SIG_IGN)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        is_first, self.requested = self.requested is None, signum
        if self._message_of_second is None:
            raise Stopped(signum, self._message)
        if not is_first:
            raise Stopped(signum, self._message_of_second())

    def _could_not_be_raised(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not issubclass(unraisable.exc_type, Stopped):
            self._unraisable_hook(unraisable)
