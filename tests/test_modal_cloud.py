"""The stand-in itself: its volumes, images and containers are as strict as Modal's."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from conftest import REPOSITORY
from modal_cloud import ModalCloud
from modal_cloud.image import Image, top_level_modules
from modal_cloud.volumes import Mounted, Volume


@pytest.fixture
def volume(tmp_path) -> Volume:
    return Volume("vo-1", "outputs", tmp_path / "volume")


def test_it_is_idle_when_calls_and_containers_have_ended():
    """The call of an app that is stopped ends before its container has died."""
    cloud, call, container = ModalCloud(), SimpleNamespace(done=asyncio.Event(), task=None), SimpleNamespace(ended=None)
    cloud._cloud = SimpleNamespace(calls={"fc-1": call}, containers=[container])
    assert not cloud.is_idle
    call.done.set()
    assert not cloud.is_idle
    container.ended = "died"
    assert cloud.is_idle


def test_what_a_container_writes_is_its_own_until_it_commits(volume, tmp_path):
    mine, theirs = Mounted(volume, tmp_path / "mine"), Mounted(volume, tmp_path / "theirs")
    (mine.folder / "deep").mkdir()
    (mine.folder / "deep" / "file").write_text("1")
    assert list(volume.files.iterdir()) == []
    mine.commit()
    assert (volume.files / "deep" / "file").read_text() == "1"
    assert not (theirs.folder / "deep").exists(), "others see it when they reload"
    theirs.reload()
    assert (theirs.folder / "deep" / "file").read_text() == "1"


def test_appending_to_a_file_does_not_reach_into_what_was_committed(volume, tmp_path):
    mine = Mounted(volume, tmp_path / "mine")
    with (mine.folder / "log").open("a") as file:
        file.write("one ")
        file.flush()
        mine.commit()
        file.write("two")
    assert (volume.files / "log").read_text() == "one "
    mine.commit()
    assert (volume.files / "log").read_text() == "one two"


def test_a_commit_carries_renames_and_removals(volume, tmp_path):
    mine = Mounted(volume, tmp_path / "mine")
    (mine.folder / "state.pt").write_text("1")
    mine.commit()
    (mine.folder / "state.pt").rename(mine.folder / "state.previous.pt")
    (mine.folder / "state.pt").write_text("2")
    mine.commit()
    assert {path.name: path.read_text() for path in volume.files.iterdir()} == {
        "state.pt": "2",
        "state.previous.pt": "1",
    }
    (mine.folder / "state.previous.pt").unlink()
    mine.commit()
    assert [path.name for path in volume.files.iterdir()] == ["state.pt"]


def test_a_commit_takes_along_nothing_that_another_container_has_changed(volume, tmp_path):
    mine, theirs = Mounted(volume, tmp_path / "mine"), Mounted(volume, tmp_path / "theirs")
    (theirs.folder / "theirs").write_text("kept")
    theirs.commit()
    (mine.folder / "mine").write_text("new")
    mine.commit()
    assert {path.name for path in volume.files.iterdir()} == {"mine", "theirs"}


def test_an_image_holds_what_its_commands_install_and_what_that_requires_and_no_more():
    base = Image("im-1", ("FROM python:3.11", "RUN python -m pip install tqdm"))
    image = Image(
        "im-2",
        ("COPY /.requirements.txt /.requirements.txt", "RUN python -m pip install -r /.requirements.txt"),
        {"/.requirements.txt": b"# a comment\ntensorboard>=2.16  # curves\n"},
        base,
    )
    assert image.requirements() == ["tqdm", "tensorboard>=2.16"]
    by_uv = Image(
        "im-3",
        (
            "COPY --from=ghcr.io/astral-sh/uv:latest /uv /.uv/uv",
            "COPY /.0_requirements.txt /.uv/0/requirements.txt",
            "RUN /.uv/uv pip install --python $(command -v python) --compile-bytecode"
            " --requirements /.uv/0/requirements.txt",
        ),
        {"/.0_requirements.txt": b"tensorboard>=2.16\n"},
        base,
    )
    assert by_uv.requirements() == image.requirements()
    modules = top_level_modules(image.requirements())
    assert {"tqdm", "tensorboard", "google"} <= modules.keys(), "protobuf comes with tensorboard"
    assert "torch" not in modules
    assert "pytest" not in modules


PROBE = """
import modal
app = modal.App('probe')
image = modal.Image.debian_slim(python_version='3.11').pip_install('tqdm')
@app.function(image=image)
def probe(repository):
    import importlib.util, os, pathlib
    print(sorted(os.listdir('/root')), pathlib.Path(repository).exists())
    print([name for name in ('torch', 'tqdm', 'pytest', 'numpy') if importlib.util.find_spec(name)])
@app.local_entrypoint()
def main(repository: str): probe.remote(repository)
"""


def test_a_container_sees_what_its_image_and_mounts_carry_and_the_repository_least_of_all(modal_cloud, tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    result = modal_cloud.run("modal", "run", "probe.py", "--repository", REPOSITORY, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "['probe.py'] False" in result.stdout
    assert "['tqdm']" in result.stdout


OPEN = """
import modal
app = modal.App('open')
volume = modal.Volume.from_name('outputs', create_if_missing=True)
@app.function(image=modal.Image.debian_slim(python_version='3.11'), volumes={'/outputs': volume})
def write():
    with open('/outputs/file', 'w') as file:
        try:
            volume.commit()
        except Exception as error:
            print(type(error).__name__, error)
    volume.commit()
    print('closed, it is committed')
@app.local_entrypoint()
def main(): write.remote()
"""


def test_a_volume_with_an_open_file_cannot_be_reloaded_and_so_not_committed(modal_cloud, tmp_path):
    """As the client says of `Volume.reload`, which `commit` ends with."""
    (tmp_path / "open.py").write_text(OPEN)
    result = modal_cloud.run("modal", "run", "open.py", cwd=tmp_path)
    assert result.status == 0, result.output
    assert "there are open files preventing the operation" in result.stdout
    assert "/outputs/file" in result.stdout
    assert "closed, it is committed" in result.stdout


RAISING = """
import modal
app = modal.App('raising')
image = modal.Image.debian_slim(python_version='3.11')
@app.function(image=image, retries=modal.Retries(max_retries=2, initial_delay=0.0), single_use_containers=True)
def fail(): raise ValueError('as always')
@app.local_entrypoint()
def main(spawn: bool = False): (fail.spawn().get if spawn else fail.remote)()
"""


@pytest.mark.parametrize("arguments", [[], ["--spawn"]])
def test_what_raises_is_retried_by_the_client_or_for_spawned_calls_by_the_server(arguments, modal_cloud, tmp_path):
    (tmp_path / "raising.py").write_text(RAISING)
    result = modal_cloud.run("modal", "run", "raising.py", *arguments, cwd=tmp_path)
    assert result.status == 1
    assert [container.ended for container in modal_cloud.containers] == ["failure"] * 3
    assert ("FunctionRetryInputs" in modal_cloud.rpcs) == (not arguments)


def test_a_call_that_the_stand_in_does_not_have_is_named(modal_cloud, tmp_path):
    result = modal_cloud.run("modal", "secret", "list", cwd=tmp_path)
    assert result.status != 0
    assert modal_cloud.missing == ["SecretList"]
    assert "does not implement SecretList" in result.output


def test_it_runs_by_hand(tmp_path):
    """The command of AGENTS.md, with a quicker one behind the `--`."""
    command = [sys.executable, "-m", "tests.modal_cloud", "--", "modal", "volume", "create", "mine"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "volume mine:" in result.stdout


def test_without_bubblewrap_it_says_how_to_get_it(modal_cloud, tmp_path, monkeypatch):
    from modal_cloud import containers

    monkeypatch.setattr(containers.shutil, "which", lambda name: None)
    with pytest.raises(containers.NoBubblewrap, match="apt-get install bubblewrap"):
        containers.sandbox(Path(tmp_path), Image("im-1", ()), {}, {}, {})
