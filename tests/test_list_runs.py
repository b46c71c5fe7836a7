"""`python src/runs.py …`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import runs
from tinycats.run.summaries import LocalRuns
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with four runs, of which `c` has only just begun."""
    for name, script, rows, files in (
        ("a", "train.py", [{"step": 50, "loss": 1.0}, {"step": 60, "balanced_accuracy": 0.5}], ["cats_model.pt"]),
        ("b", "train_dit.py", [{"step": 50, "val_loss": 0.25}, {"step": 90, "val_loss": 0.5}], ["state.pt"]),
        ("c", "train.py", [], ["state.pt"]),
    ):
        folder = tmp_path / "outputs" / "runs" / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"script": script, "options": {"seed": 1}, "steps": 100}))
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 10')
        for file in files:
            (folder / file).touch()
    (tmp_path / "outputs" / "runs" / "old").mkdir()
    (tmp_path / "outputs" / "runs" / "old" / "state.pt").touch()
    (tmp_path / "outputs" / "runs" / "no run").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(capsys, *arguments: str) -> str:
    runs.on_this_machine(runs.PARSER.parse(arguments), StopSignals())
    return capsys.readouterr().out


def test_a_line_a_run_says_how_far_it_came_how_good_it_is_and_how_to_go_on(capsys):
    lines = [line.split(maxsplit=3) for line in listed(capsys).splitlines()]
    assert [line[0] for line in lines] == ["a", "b", "c", "old"]
    assert [" ".join(line[3].split()) for line in lines] == [
        "train.py step 60 of 100 balanced_accuracy 0.5000 finished",
        "train_dit.py step 90 of 100 val_loss 0.2500 go on: python src/train_dit.py --resume b",
        "train.py step 0 of 100 - go on: python src/train.py --resume c",
        "? step 0 of ? - go on: python src/? --resume old",
    ]


def test_runs_that_are_named_are_removed_and_a_run_that_is_not_there_is_named(capsys):
    assert listed(capsys, "--remove", "a", "old") == "removed the run a\nremoved the run old\n"
    with pytest.raises(UserError, match="there is no run a; there are b, c"):
        listed(capsys, "--remove", "a")
    with pytest.raises(SystemExit):
        runs.PARSER.parse(["--remove", "../runs"])
    assert sorted(path.name for path in Path("outputs/runs").iterdir()) == ["b", "c", "no run"]


def test_a_run_in_progress_is_said_to_be_and_never_removed(capsys):
    program = f"""
import sys
sys.path.insert(0, {str(Path(runs.__file__).parent)!r})
from pathlib import Path
from tinycats.script.machines import ThisMachine
with ThisMachine("train.py").lock(Path("outputs/runs/b")):
    print("locked", flush=True)
    input()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        assert process.stdout.readline() == "locked\n"
        assert "in progress" in listed(capsys).splitlines()[1]
        with pytest.raises(UserError, match="another process is training outputs/runs/b"):
            listed(capsys, "--remove", "b")
        process.communicate("\n")
    assert "in progress" not in listed(capsys)
    assert Path("outputs/runs/b/state.pt").exists()
    listed(capsys, "--remove", "b")
    assert not Path("outputs/runs/b").exists()


def test_looking_leaves_no_trace():
    before = sorted(map(str, Path("outputs").rglob("*")))
    LocalRuns(Path("outputs")).summaries()
    assert sorted(map(str, Path("outputs").rglob("*"))) == before
    with ThisMachine("train.py").lock(Path("outputs/runs/b")):
        pass


def test_where_there_are_no_runs_it_says_so(capsys):
    assert listed(capsys, "--output-dir", "elsewhere") == "there are no runs in elsewhere/runs\n"
