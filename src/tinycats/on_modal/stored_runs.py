"""The runs in the outputs volume, as they are seen from a laptop."""

from pathlib import PurePosixPath
from typing import Any

import modal

from tinycats.on_modal.resources import CLAIMS, OUTPUTS, OUTPUTS_MOUNT, how_to_resume, listed
from tinycats.run import runs
from tinycats.run.summaries import Summary, is_run, measured, no_such_run, parsed_object, summary
from tinycats.script.errors import TransientError, UserError

MAX_PREPARATIONS = 3  # of the images of one run: whoever finds them damaged has them prepared again


class StoredRuns:
    """The runs below a folder of the volume; see `summaries.Runs`.

    Args:
        output_path: as it is called in a container.
    """

    def __init__(self, output_path: PurePosixPath):
        self._output_path = output_path
        self._folder = PurePosixPath("/", runs.folder_of(output_path, "").relative_to(OUTPUTS_MOUNT))

    def summaries(self) -> list[Summary]:
        names = sorted(PurePosixPath(entry.path).name for entry in listed(OUTPUTS, self._folder))
        return [found for name in names if (found := self._summary(name))]

    def how_to_resume(self, summary: Summary) -> str:
        return how_to_resume(summary.script, runs.folder_of(self._output_path, summary.name))

    def remove(self, name: str) -> None:
        if self._summary(name) is None:
            raise UserError(no_such_run(name, [found.name for found in self.summaries()]))
        if is_in_progress(self._description(name)):  # one that has its model is not at its end yet
            raise UserError(f"the run {name} is in progress")
        OUTPUTS.remove_file(str(self._folder / name), recursive=True)

    def _summary(self, name: str) -> Summary | None:
        entries = {PurePosixPath(entry.path).name: entry for entry in listed(OUTPUTS, self._folder / name)}
        if not is_run(entries):
            return None
        told = self._description(name) if runs.DESCRIPTION in entries else {}
        metrics = self._read(name, runs.METRICS) if runs.METRICS in entries else b""
        changed = max(entry.mtime for entry in entries.values())
        return summary(name, entries, told, measured(metrics), changed, lambda: is_in_progress(told))

    def _description(self, name: str) -> dict[str, Any]:
        return parsed_object(self._read(name, runs.DESCRIPTION))

    def _read(self, name: str, file: str) -> bytes:
        try:
            return b"".join(OUTPUTS.read_file(str(self._folder / name / file)))
        except (FileNotFoundError, modal.exception.NotFoundError):
            return b""


def is_in_progress(description: dict[str, Any]) -> bool:
    """Whether one of the calls that a run was submitted in goes on.

    Raises:
        TransientError: Modal does not say.
    """
    claims = [f"{description.get('submission')} {preparations}" for preparations in range(MAX_PREPARATIONS + 1)]
    calls = [call for claim in claims if (call := CLAIMS.get(claim))]
    while calls:
        try:
            outcome = modal.FunctionCall.from_id(calls.pop()).get(timeout=0)
        except TimeoutError:
            return True
        except (modal.exception.ConnectionError, modal.exception.ServiceError, modal.exception.InternalError) as error:
            raise TransientError(f"Modal does not say whether the run is in progress: {error}") from error
        except Exception:  # what it ended with; or it ended so long ago that nobody knows
            continue
        if isinstance(outcome, dict) and "goes_on_in" in outcome:
            calls.append(outcome["goes_on_in"])
    return False
