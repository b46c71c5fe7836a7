"""What the tests share: small data, and the scripts run as a user runs them."""

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from modal_cloud import ModalCloud
from modal_cloud.warm_python import WarmPython
from pets_mirror import Mirror, serve
from tinycats.images import oxford_pets
from tinycats.images.toy_cats import draw_toy_cats

REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"  # real photos, where a developer has them

WARM_PYTHON = WarmPython()

# Small enough for a step to take a twentieth of a second, and an epoch of small_toy five steps. ResNet-18 has forty
# times as many weights to make, move, save and commit, and Muon is half of so small a step: what has nothing to do with
# either need not wait for them.
SMALL = ("--backbone", "resnet20", "--batch-size", "8", "--lr", "1e-3", "--optimizer", "adamw")

# For a generator as small: what a network sees in its images takes more time than all else.
UNSEEN = ("--alignment", "0", "--perceptual", "0")


def pytest_configure() -> None:
    """What a script starts in the background ignores Ctrl-C and, under nohup, a closed terminal: not here, where tests
    send both."""
    for signum, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, handler)


@pytest.hookimpl(tryfirst=True)  # before `-m "not slow"` is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first: none of them is left over for one process when the others have finished. Before them one
    for which `smoke` is trained: the others that look at it, a few minutes later, need not wait. That takes half a
    minute, so whatever looks at it is slow."""
    need_smoke = [item for item in items if "smoke" in item.fixturenames]
    for item in need_smoke:
        item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: (item not in need_smoke[:1], item.get_closest_marker("slow") is None))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """A folder that the first of the tests' processes to want it fills, for all of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # where the others' lie too

    def shared(name: str, fill: Callable[[Path], object]) -> Path:
        folder, is_filled = root / name, root / f"{name}.filled"
        with FileLock(root / f"{name}.lock"):
            if not is_filled.exists():
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                fill(folder)
                is_filled.touch()
        return folder

    return shared


@pytest.fixture(scope="session")
def small_toy(shared_folder) -> Path:
    """A toy data set of 40 + 20 images: `<somewhere>/small_toy`."""
    images = {"train": 8, "val": 4}
    return shared_folder("data", lambda folder: draw_toy_cats(folder / "small_toy", 1, images)) / "small_toy"


@pytest.fixture(scope="session")
def pets_sample() -> Path:
    """A sample of the real Oxford-IIIT Pet photos with its list.txt."""
    folder = SHARED_DATA / "pets"
    if not folder.is_dir():
        pytest.skip(f"no real photos in {folder}; the pets-shaped folder that the tests make is used alone")
    return folder


def script_process(script: str, *arguments: object, cwd: Path, cold: bool = False, **options) -> subprocess.Popen:
    """`python src/<script> …` in the folder `cwd`, with its output as text through pipes.

    Args:
        cold: start an ordinary Python, not one that has imported torch already.
        options: for WarmPython.popen.
    """
    options["env"] = os.environ | {"PYTHONUNBUFFERED": "1"} | options.get("env", {})
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    words = [str(REPOSITORY / "src" / script), *map(str, arguments)]
    if cold:
        return subprocess.Popen([sys.executable, *words], cwd=cwd, **options)
    return WARM_PYTHON.popen(words, cwd=cwd, **options)


UNTRAINED = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2}


def untrained_generator(path: Path) -> Path:
    """A finished generator of two classes that has learned nothing, for what does not depend on it."""
    import torch

    from tinycats import generator
    from tinycats.models.dit import TinyDiT

    torch.manual_seed(0)
    model = TinyDiT(2, **UNTRAINED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    guide = {name: weight.to(torch.bfloat16) for name, weight in TinyDiT(2, **UNTRAINED).state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    generator.export(path, model.state_dict(), guide, UNTRAINED, ["black", "tabby"], 2.0, {"val_loss": 0.5})
    return path


def run_quietly(script: str, *arguments: object, cwd: Path) -> None:
    """`script_process` to its end, which must be a good one; what it says lies in `cwd` as stdout.txt."""
    process = script_process(script, *arguments, cwd=cwd)
    output, errors = process.communicate(timeout=900)
    assert (process.returncode, errors) == (0, "")
    (cwd / "stdout.txt").write_text(output)


def processes(count: int, script: str, *arguments: object, cwd: Path, **options) -> list[subprocess.Popen]:
    """`python src/<script> …` as so many processes of one run, which nobody ends when one has ended; they meet at a
    store of ours, as at their launcher's."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_RUN_ID": "test"}
    shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environments = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [script_process(script, *arguments, cwd=cwd, env=env, **options) for env in environments]
    for process in started:
        process.store = store  # for as long
    return started


def damage(path: Path, rng: random.Random) -> None:
    """What disks and careless hands do to a file."""
    stored = bytearray(path.read_bytes())
    at, other = rng.randrange(len(stored)), rng.randrange(len(stored))
    match rng.choice(["flip", "swap", "zeros", "cut", "append", "shift", "noise", "empty"]):
        case "flip":
            stored[at] ^= 1 << rng.randrange(8)
        case "swap":
            stored[at], stored[other] = stored[other], stored[at]
        case "zeros":
            stored[at : at + 4096] = bytes(len(stored[at : at + 4096]))
        case "cut":
            del stored[at:]
        case "append":
            stored += rng.randbytes(50)
        case "shift":
            stored[at:] = stored[at + 1 :] + b"x"
        case "noise":
            stored[at : at + 500] = rng.randbytes(len(stored[at : at + 500]))
        case "empty":
            stored.clear()
    path.write_bytes(stored)


@pytest.fixture(scope="session")
def smoke(shared_folder) -> Path:
    """The folder in which the command of `make smoke` was run."""
    command = ("train.py", "data/toy", "--epochs", "3", "--batch-size", "16", "--lr", "1e-3")
    return shared_folder("smoke", lambda folder: run_quietly(*command, cwd=folder))


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
    with ModalCloud(WARM_PYTHON) as cloud:
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
