"""What the tests share: small data, and the scripts run as a user runs them."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modal_cloud import ModalCloud
from pets_mirror import Mirror, serve
from tinycats import oxford_pets
from tinycats.toy_cats import draw_toy_cats

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"  # real photos, where a developer has them

# Small enough for a step to take a tenth of a second on two cores.
SMALL = ("--image-size", "32", "--batch-size", "8", "--lr", "1e-3", "--no-pretrained")


@pytest.fixture(scope="session")
def small_toy(tmp_path_factory) -> Path:
    """A toy data set of 80 + 20 images: `<somewhere>/small_toy`."""
    folder = tmp_path_factory.mktemp("data") / "small_toy"
    draw_toy_cats(folder, seed=1, images={"train": 16, "val": 4})
    return folder


@pytest.fixture(scope="session")
def pets_sample() -> Path:
    """A sample of the real Oxford-IIIT Pet photos with its list.txt."""
    folder = SHARED_DATA / "pets"
    if not folder.is_dir():
        pytest.skip(f"no real photos in {folder}; the pets-shaped folder that the tests make is used alone")
    return folder


def script_process(script: str, *arguments: object, cwd: Path, **options) -> subprocess.Popen:
    """`python src/<script> …` in the folder `cwd`, with its output as text through pipes."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | options.pop("env", {})
    return subprocess.Popen(
        [sys.executable, str(REPOSITORY / "src" / script), *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture
def run_train(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """Run `python src/train.py …` in an empty folder and wait for its end."""

    def run(*arguments: object, **options) -> subprocess.CompletedProcess:
        process = script_process("train.py", *arguments, cwd=options.pop("cwd", tmp_path), **options)
        stdout, stderr = process.communicate(timeout=900)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    return run


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """What the containers of a failing test printed stands beside its traceback."""
    report = yield
    if report.failed and isinstance(cloud := getattr(item, "funcargs", {}).get("modal_cloud"), ModalCloud):
        report.sections.append(("containers", cloud.report()))
    return report


@pytest.fixture
def modal_cloud() -> Iterator[ModalCloud]:
    """A Modal of the test's own, empty; see tests/modal_cloud."""
    with ModalCloud() as cloud:
        yield cloud


@pytest.fixture
def small_folder(small_toy, tmp_path) -> Path:
    """The small toy data as a folder of the user's own, in the folder from which commands are run."""
    shutil.copytree(small_toy, tmp_path / "my cats")
    return Path("my cats")


@pytest.fixture
def mirror(tmp_path, monkeypatch) -> Iterator[Mirror]:
    """The pets' download, from loopback."""
    (tmp_path / "mirror").mkdir()
    with serve(tmp_path / "mirror") as server:
        monkeypatch.setenv(oxford_pets.MIRROR_VARIABLE, server.address)
        yield server
