"""A run's folder: what is open in it, and who may train there."""

import os
import tempfile
import time
from pathlib import Path

import pytest
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from tinycats.errors import UserError
from tinycats.machines import ThisMachine
from tinycats.modal_runs import Container
from tinycats.runs import open_run
from tinycats.signals import StopSignals


def open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process has open."""
    links = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return [path for path in links if path.is_relative_to(folder)]


@pytest.mark.parametrize("step", [0, 5])
def test_an_open_run_has_no_file_open_that_a_forked_worker_could_keep(step, tmp_path, monkeypatch):
    """A resumed run's TensorBoard file was written to by a thread while the loader's worker was forked: no commit
    worked as long as the worker lived, and the container failed after two minutes of trying."""
    append = LocalFileSystem.append

    def slow_append(self, filename, *arguments):
        with Path(os.fsdecode(filename)).open("ab"):  # TensorBoard names its files in bytes
            time.sleep(0.2)
        append(self, filename, *arguments)

    monkeypatch.setattr(LocalFileSystem, "append", slow_append)
    with open_run(tmp_path / "r", [], step, StopSignals(), Container("train.py"), save_every=5):
        for _ in range(10):
            assert open_below(tmp_path) == []
            time.sleep(0.02)


def test_a_lock_leaves_nothing_outside_its_run_and_follows_no_link(tmp_path, monkeypatch):
    """Locks used to pile up in the temporary folder, under names that another user could put a link in place of."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    with open_run(tmp_path / "r", [], 0, StopSignals(), ThisMachine("train.py"), save_every=5):
        pass
    assert list((tmp_path / "tmp").iterdir()) == []

    (tmp_path / "precious").write_text("kept")
    (tmp_path / "r" / ".lock").unlink()
    (tmp_path / "r" / ".lock").symlink_to(tmp_path / "precious")
    with (
        pytest.raises(UserError, match="cannot write to"),
        open_run(tmp_path / "r", [], 0, StopSignals(), ThisMachine("train.py"), save_every=5),
    ):
        pass
    assert (tmp_path / "precious").read_text() == "kept"
