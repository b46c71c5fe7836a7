"""A run's folder: what is open in it, and who may train there."""

import logging
import signal
import tempfile
import time
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from tinycats.on_modal.container import Container
from tinycats.run import checkpoints
from tinycats.run.runs import open_run
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import Stopped, StopSignals
from tinycats.training.processes import Processes


def open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process has open."""
    links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [path for path in links if path.is_relative_to(folder)]


def test_an_open_run_has_no_file_open_while_a_checkpoint_is_committed(tmp_path):
    """Rows, images, lines of the log and checkpoints are written one after another: what is recorded while a volume is
    committed waits for that.

    Seen to fail with rows that are written where they are recorded.
    """
    open_files, committed = [], []

    class Volume(Container):
        def persist(self) -> None:
            for _ in range(50):
                open_files.extend(open_below(tmp_path))
                time.sleep(0.002)
            committed.append(len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()))

    with open_run(tmp_path / "r", {}, [], 5, StopSignals(), Volume("train.py", "T4"), save_every=5) as run:
        run.record({"step": 6, "loss": 0.5})
        run.save(lambda: {"step": 6, "metrics": run.metrics})
        for step in range(7, 30):
            run.record({"step": step, "loss": 0.5})
            logging.getLogger("tinycats.test").warning("step %d", step)
            time.sleep(0.002)
        run.wait_until_saved()
        assert open_below(tmp_path) == []
    assert open_files == []
    assert committed == [1]
    assert len((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()) == 24
    assert (tmp_path / "r" / "train.log").read_text().count("step ") == 23
    assert checkpoints.load(tmp_path / "r" / "state.pt")["metrics"] == [{"step": 6, "loss": 0.5}]


def test_a_disk_that_is_full_is_one_line_wherever_it_shows(tmp_path, monkeypatch):
    """TensorBoard's own writer printed a thread's traceback, and ended the run with another."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match=r"cannot write to .*No space left on device; the saved checkpoint is untouched"),
        open_run(tmp_path / "r", {}, [], 0, StopSignals(), Container("train.py", "T4"), save_every=5) as run,
    ):
        monkeypatch.setattr(RecordWriter, "write", full)
        run.record({"step": 1, "loss": 0.5})


def test_a_lock_leaves_nothing_outside_its_run_and_follows_no_link(tmp_path, monkeypatch):
    """Locks used to pile up in the temporary folder, under names that another user could put a link in place of."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with open_run(tmp_path / "r", {}, [], 0, StopSignals(), ThisMachine("train.py"), save_every=5):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []

    (tmp_path / "precious").write_text("kept")
    (tmp_path / "r" / ".lock").unlink()
    (tmp_path / "r" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(UserError, match=r"cannot write to"),
        open_run(tmp_path / "r", {}, [], 0, StopSignals(), ThisMachine("train.py"), save_every=5),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_a_signal_that_arrives_while_the_processes_agree_is_not_forgotten(tmp_path):
    """It counts at the next step.

    Seen to fail with `self._stop.requested = signum or None` in Run._is_told_to_stop.
    """
    stop = StopSignals()

    class SignalledMeanwhile(Processes):
        def agree(self, *values: int) -> list[int]:
            stop.requested = signal.SIGTERM
            return list(values)

    with (
        pytest.raises(Stopped),
        open_run(
            tmp_path / "r", {}, [], 0, stop, ThisMachine("train.py"), save_every=5, processes=SignalledMeanwhile()
        ) as run,
    ):
        assert not run.save_due()
        assert run.save_due()
        run.save(lambda: {"step": 1})


@pytest.mark.parametrize("is_saved", [False, True])
def test_who_does_not_wait_for_the_checkpoint_is_told_what_is_there(tmp_path, is_saved):
    """Seen to fail with the message of a script that has not begun to train: there was nothing to resume, it said."""
    folder = tmp_path / "r"
    with (
        pytest.raises(Stopped) as stopped,
        StopSignals() as stop,
        open_run(folder, {}, [], 0, stop, ThisMachine("train.py"), save_every=5) as run,
    ):
        if is_saved:
            run.save(lambda: {"step": 3})
            run.wait_until_saved()
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
    assert ("nothing to resume" in str(stopped.value)) != is_saved
    assert (f"--resume {folder / 'state.pt'}" in str(stopped.value)) == is_saved
