"""Without fcntl, SIGHUP, os.getuid, and with folders that cannot be opened: Windows, as near as it is seen here."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY, SMALL

WITHOUT_POSIX = Path(__file__).with_name("without_posix.py")
SCRIPTS = [REPOSITORY / "src" / "train.py", REPOSITORY / "src" / "train_dit.py"]


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, WITHOUT_POSIX, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize("way", [(), ("-m", "modal", "run")], ids=["python", "modal"])
def test_help_and_mistakes_are_as_anywhere(script, way, tmp_path):
    """Seen to fail with `import fcntl` and `signal.SIGHUP` at the top of what the scripts import."""
    helped = run(*way, script, "--help", cwd=tmp_path)
    assert (helped.returncode, helped.stderr) == (0, "")
    mistaken = run(*way, script, "nowhere", cwd=tmp_path)
    assert mistaken.returncode == 2
    assert "nowhere is not there" in mistaken.stderr


@pytest.mark.slow
def test_a_run_trains_saves_and_goes_on(small_toy, tmp_path):
    """With a loader's thread, and the locks of the run and of packing."""
    first = run(SCRIPTS[0], small_toy, *SMALL, "--epochs", 1, "--num-workers", 1, "--run", "r", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "outputs" / "cats_model.pt").is_file()
    again = run(SCRIPTS[0], "--resume", "r", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "Resuming run r at step 5 of 5" in again.stdout


@pytest.mark.slow
def test_a_laptop_uploads_submits_and_follows(modal_cloud, small_folder, tmp_path):
    command = (sys.executable, WITHOUT_POSIX, "-m", "modal", "run", SCRIPTS[0], small_folder, *SMALL, "--epochs", 1)
    result = modal_cloud.run(*command, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "Epoch 1/1 complete" in result.stdout
    assert [container.ended for container in modal_cloud.containers] == ["success", "success"]
