"""What can be said of runs by their folders, on this disk or in a volume, without torch."""

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from tinycats.run import checkpoints, finished, runs
from tinycats.script.errors import UserError, looking_at_what_the_user_named
from tinycats.script.machines import ThisMachine

FINISHED, IN_PROGRESS, INTERRUPTED = "finished", "in progress", "interrupted"


@dataclass(frozen=True)
class Summary:
    """A run in a few words.

    Attributes:
        name: the run's.
        script: which it is of.
        options: those that it was given, or has by default.
        step, steps: how far it has come, by the last row of its metrics, and how far it is to go (None: not known).
        best: the name and the value of its metric, where that was best; None before it was first computed.
        changed: when it wrote last, in seconds since 1970.
        state: FINISHED, IN_PROGRESS or INTERRUPTED.
    """

    name: str
    script: str
    options: dict[str, Any]
    step: int
    steps: int | None
    best: tuple[str, float] | None
    changed: float
    state: str


class Runs(Protocol):
    """The runs of an output folder, wherever that is."""

    def summaries(self) -> list[Summary]:
        """Of all runs, by name."""

    def how_to_resume(self, summary: Summary) -> str:
        """The command that goes on with a run."""

    def remove(self, name: str) -> None:
        """Remove a run for good.

        Raises:
            UserError: there is none of that name, or it is in progress.
        """


class LocalRuns:
    """Runs on this disk; see `Runs`.

    Args:
        is_in_progress: tells it by a run's folder and description; by default, whether a process has it locked.
    """

    def __init__(self, output_dir: Path, is_in_progress: Callable[[Path, dict[str, Any]], bool] | None = None):
        self._output_dir = output_dir
        self._is_in_progress = is_in_progress or _is_locked

    def summaries(self) -> list[Summary]:
        with looking_at_what_the_user_named():
            folders = sorted(runs.folder_of(self._output_dir, "").glob("*/"))
            return [found for folder in folders if (found := self.summary(folder.name))]

    def summary(self, name: str) -> Summary | None:
        """Of one run; None if there is none of that name."""
        folder = runs.folder_of(self._output_dir, name)
        try:
            files = {path.name for path in folder.iterdir()}
            if not is_run(files):
                return None
            told = parsed_object((folder / runs.DESCRIPTION).read_bytes() if runs.DESCRIPTION in files else b"")
            metrics = folder / runs.METRICS
            stat = (metrics if runs.METRICS in files else folder).stat()
            measured = _measured_in(metrics, stat.st_mtime_ns, stat.st_size) if runs.METRICS in files else NOTHING
        except FileNotFoundError:  # it was removed meanwhile
            return None
        return summary(name, files, told, measured, stat.st_mtime, lambda: self._is_in_progress(folder, told))

    def how_to_resume(self, summary: Summary) -> str:
        return ThisMachine(summary.script).how_to_resume(runs.folder_of(self._output_dir, summary.name))

    def remove(self, name: str) -> None:
        folder = runs.folder_of(self._output_dir, name)
        if self.summary(name) is None:
            raise UserError(no_such_run(name, [found.name for found in self.summaries()]))
        with ThisMachine("").lock(folder):
            shutil.rmtree(folder)


def _is_locked(folder: Path, _description: dict[str, Any]) -> bool:
    if not (folder / ".lock").exists():
        return False
    try:
        with ThisMachine("").lock(folder):
            return False
    except (UserError, OSError):
        return True


def no_such_run(name: str, known: list[str]) -> str:
    """What to say to who names a run that is not there."""
    return f"there is no run {name}; there are {', '.join(known) or 'none'}"


@dataclass(frozen=True)
class Measured:
    """What the rows of metrics.jsonl say: the last step, and the best value of what a run is judged by."""

    step: int = 0
    best: tuple[str, float] | None = None


NOTHING = Measured()


def measured(metrics: bytes) -> Measured:
    """What metrics.jsonl says."""
    rows = parsed_metrics(metrics)
    return Measured(max((row["step"] for row in rows), default=0), best(rows))


@lru_cache(maxsize=1024)
def _measured_in(path: Path, _changed: int, _size: int) -> Measured:
    return measured(path.read_bytes())


def summary(
    name: str,
    files: Collection[str],
    description: dict[str, Any],
    measured: Measured,
    changed: float,
    is_in_progress: Callable[[], bool],
) -> Summary:
    """Sum up a run.

    Args:
        files: the names of those in its folder.
        description: what its run.json holds.
        is_in_progress: asked only of a run that is not finished.
    """
    script = str(description.get("script", "?"))
    is_finished = finished.MODELS.get(script) in files
    state = FINISHED if is_finished else IN_PROGRESS if is_in_progress() else INTERRUPTED
    options, steps = description.get("options", {}), description.get("steps")
    return Summary(name, script, options, measured.step, steps, measured.best, changed, state)


def parsed_metrics(metrics: bytes) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; one that is being written, or damaged, is left out."""
    rows = (parsed_object(line) for line in metrics.splitlines())
    return [row for row in rows if isinstance(row.get("step"), int)]


def best(rows: list[dict[str, Any]]) -> tuple[str, float] | None:
    """The best value of what a run is judged by: `balanced_accuracy`, or else `val_loss`."""
    for name, choose in (("balanced_accuracy", max), ("val_loss", min)):
        values = [row[name] for row in rows if isinstance(row.get(name), float) and math.isfinite(row[name])]
        if values:
            return name, choose(values)
    return None


def is_run(files: Collection[str]) -> bool:
    """Whether a folder with such files is a run's."""
    return runs.DESCRIPTION in files or any(name in files for name in checkpoints.CHECKPOINTS)


def parsed_object(text: bytes) -> dict[str, Any]:
    """The JSON object that a text is; empty if it is none."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
