"""The laptop's side of `modal run`, as far as it goes without a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import REPOSITORY
from tinycats.on_modal import laptop, resources
from tinycats.script.errors import UserError

SCRIPT = str(REPOSITORY / "src" / "train.py")


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (["modal", "run", SCRIPT], []),
        (["modal", "run", SCRIPT, "data/cats", "--epochs", "20"], ["data/cats", "--epochs", "20"]),
        (["modal", "run", "--detach", "-q", SCRIPT, "--help"], ["--help"]),
        (["/venv/bin/modal", "run", "--env", "dev", f"{SCRIPT}::main", "--epochs", "2"], ["--epochs", "2"]),
        (["/x/modal/__main__.py", "run", SCRIPT, "--", "--epochs", "2"], ["--", "--epochs", "2"]),
        (["modal", "deploy", SCRIPT], None),
        (["modal", "shell", f"{SCRIPT}::train_on_modal"], None),
        (["modal", "run", f"{SCRIPT}::train_on_modal", "--payload", "{}"], None),
        (["modal", "run", str(REPOSITORY / "tests" / "conftest.py"), SCRIPT + "x"], None),
        (["pytest", "run", SCRIPT], None),
    ],
)
def test_only_a_modal_run_of_this_very_script_is_parsed_at_import(command, arguments):
    assert laptop.script_arguments(command, SCRIPT) == arguments


@pytest.mark.parametrize(
    ("data_dir", "in_container"),
    [
        ("data/cats", "/data/cats"),
        ("data/my/cats", "/data/my/cats"),
        ("data/../secrets", None),
        ("data", None),
        ("/home/me/cats", None),
        ("images", None),
    ],
)
def test_a_path_below_data_is_the_same_path_in_the_dataset_volume(data_dir, in_container):
    path = resources.volume_path(Path(data_dir))
    assert (str(path) if path else None) == in_container


def test_outputs_go_to_the_volume_or_nowhere():
    def path_of(output_dir: str) -> str:
        return str(resources.output_path(Path(output_dir)))

    assert path_of("outputs") == "/outputs"
    assert path_of("outputs/tries/one") == "/outputs/tries/one"
    for elsewhere in ("results", "/outputs", "outputs/../..", "/tmp"):
        with pytest.raises(UserError, match="on Modal it is outputs"):
            path_of(elsewhere)


def modal_run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    """The real `modal run src/train.py …` with torch booby-trapped and nobody at the server's address."""
    trap = cwd / "trap"
    for name in ("torch", "torchvision", "numpy", "PIL", "tqdm"):
        (trap / name).mkdir(parents=True, exist_ok=True)
        (trap / name / "__init__.py").write_text(f"raise SystemExit('{name} was imported on the laptop')")
    environment = os.environ | {
        "PYTHONPATH": str(trap),
        "MODAL_SERVER_URL": "http://127.0.0.1:9",
        "MODAL_TOKEN_ID": "ak-none",
        "MODAL_TOKEN_SECRET": "as-none",
        "MODAL_CONFIG_PATH": str(cwd / "modal.toml"),
    }
    command = [sys.executable, "-m", "modal", "run", SCRIPT, *arguments]
    return subprocess.run(command, check=False, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: 0 is out of range"),
        (["data/cats", "--", "--epochs", "1"], "unrecognized arguments"),
        (["--gpu", "T5"], "--gpu: 'T5': choose from T4, L4"),
        (["--gpu", "A100:9"], "the number of GPUs is 1 to 8"),
        (["--gpu", "H100:2", "--nodes", "2"], "--nodes needs machines with all of their GPUs, such as --gpu H100:8"),
        (["--timeout", "25"], "--timeout: 25 is out of range: above 0 and at most 24"),
        (["--output-dir", "/tmp"], "on Modal it is outputs"),
        (["--resume", "runs/r/state.pt"], "on Modal it is a run's name"),
        (["images"], "images is not there"),
        (["x" * 5000], "file name too long"),
        (["data/" + "x" * 5000], "file name too long"),
        (["--detach"], "unrecognized arguments: --detach"),
    ],
)
def test_a_mistake_under_modal_run_is_one_line_before_anything_is_asked_of_the_server(arguments, message, tmp_path):
    result = modal_run(*arguments, cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--", "--help"], ["-h"]])
def test_help_under_modal_run_is_the_scripts_own(arguments, tmp_path):
    result = modal_run(*arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "--backbone" in result.stdout
    assert "usage: train.py" in result.stdout


@pytest.mark.slow
def test_everything_checked_the_client_turns_to_the_server_without_importing_torch(tmp_path):
    result = modal_run("data/toy", "--epochs", "1", cwd=tmp_path)
    assert result.returncode == 1
    assert "was imported on the laptop" not in result.stdout + result.stderr
    assert "Could not connect to the Modal server" in result.stderr, "the server is all that is missing"
