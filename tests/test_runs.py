"""A run's folder: what is open in it, and who may train there."""

import tempfile
import threading
from pathlib import Path

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from tinycats.errors import UserError
from tinycats.machines import ThisMachine
from tinycats.modal_runs import Container
from tinycats.runs import open_run
from tinycats.signals import StopSignals


def open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process has open."""
    links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [path for path in links if path.is_relative_to(folder)]


def test_an_open_run_has_no_file_open_between_its_rows(tmp_path):
    """A resumed run's TensorBoard file was once written to by a thread of its own while the volume was committed."""
    threads = threading.active_count()
    with open_run(tmp_path / "r", {}, [], 5, StopSignals(), Container("train.py"), save_every=5) as run:
        for step in range(6, 10):
            run.record({"step": step, "loss": 0.5})
            assert open_below(tmp_path) == []
            assert threading.active_count() <= threads


def test_a_disk_that_is_full_is_one_line_wherever_it_shows(tmp_path, monkeypatch):
    """TensorBoard's own writer printed a thread's traceback, and ended the run with another."""

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(UserError, match=r"cannot write to .*No space left on device; the saved checkpoint is untouched"),
        open_run(tmp_path / "r", {}, [], 0, StopSignals(), Container("train.py"), save_every=5) as run,
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
