"""`python src/predict.py …`, with the classifier that the command of `make smoke` makes."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from PIL import Image

import predict
from conftest import script_process
from tinycats import classifier
from tinycats.script.command_line import run_on_this_machine
from tinycats.script.signals import StopSignals


@pytest.fixture
def trained(smoke, tmp_path, monkeypatch) -> Path:
    """The current folder: with the finished model of a run, in `outputs`, and photos."""
    shutil.copytree(smoke / "outputs", tmp_path / "outputs")
    for name in ("black", "ginger"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for image in sorted((smoke / "data/toy/val" / name).glob("*.png"))[:2]:
            shutil.copy(image, tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def predict_here(*arguments: str) -> int:
    options = predict.PARSER.parse(arguments)
    return predict.predict_here(options, StopSignals())


def test_a_person_reads_each_photos_class_its_probability_and_the_next_two(trained, capsys):
    assert predict_here("photos") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    expected = classifier.load("outputs/cats_model.pt").predict(sorted(Path("photos").glob("*/*")))
    for line, photo, probabilities in zip(lines, sorted(Path("photos").glob("*/*")), expected, strict=True):
        (first, likely), *others = sorted(probabilities.items(), key=lambda item: -item[1])
        told = ", ".join(f"{name} {share:.0%}" for name, share in others[:2])
        assert line.split() == f"{photo} {first} {likely:.0%} ({told})".split()
        assert first == photo.parent.name
    assert len({line.index("%") for line in lines}) == 1, "it is a table"


def test_a_program_reads_a_line_of_json_each_with_every_class_and_why_a_photo_cannot_be_read(trained, capsys):
    Path("letter.jpg").write_text("no image")
    Image.new("L", (40, 30)).save("grey.gif")
    assert predict_here("letter.jpg", "grey.gif", "photos/black", "--json") == 1
    output = capsys.readouterr()
    answers = [json.loads(line) for line in output.out.splitlines()]
    assert [answer["photo"] for answer in answers[:2]] == ["letter.jpg", "grey.gif"]
    assert answers[0]["error"] == "no image of a format that is known"
    assert output.err == "error: letter.jpg: no image of a format that is known\n"
    for answer in answers[1:]:
        values = list(answer["probabilities"].values())
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1)
        assert set(answer["probabilities"]) == {"black", "ginger", "other", "siamese", "tabby"}


def test_many_photos_are_the_same_as_one_and_one(trained, capsys, monkeypatch):
    predict_here("photos", "--json")
    together = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    monkeypatch.setattr(predict, "BATCH", 1)
    predict_here("photos", "--json")
    alone = [json.loads(line)["probabilities"] for line in capsys.readouterr().out.splitlines()]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_the_model_is_a_file_a_run_or_a_runs_folder(trained, capsys):
    (run,) = Path("outputs/runs").iterdir()
    shutil.move("outputs/cats_model.pt", "fetched.pt")
    for model in ("fetched.pt", run.name, str(run), f"{run}/cats_model.pt"):
        assert predict_here("photos/black", "--model", model) == 0
        assert capsys.readouterr().out.count("black/") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: photos"),
        (["nothing.jpg"], "nothing.jpg is not there"),
        (["empty"], "empty has no images (.bmp, .gif"),
        (["x" * 5000], "file name too long"),
        (["photos", "--model", "none.pt"], "none.pt is not there: train one first, or name another by --model"),
        (["photos", "--model", "begun"], "the run begun is not finished: there is no cats_model.pt in its folder yet"),
        (["photos", "--model", "outputs/runs"], "outputs/runs/cats_model.pt is not there"),
    ],
)
def test_a_mistake_is_one_line_before_torch_is_imported(arguments, message, trained, capsys):
    Path("empty").mkdir()
    Path("outputs/runs/begun").mkdir()
    Path("outputs/runs/begun/state.pt").touch()
    with pytest.raises(SystemExit) as exit:
        predict.PARSER.parse(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_another_file_is_refused(trained):
    Path("wrong.pt").write_bytes(b"PK")
    process = script_process("predict.py", "photos", "--model", "wrong.pt", cwd=trained)
    output, errors = process.communicate(timeout=100)
    assert (process.returncode, output) == (1, "")
    assert errors == "error: wrong.pt is cut off or is no file of this program\n"


def test_a_reader_who_has_seen_enough_is_no_error(trained, monkeypatch, capfd):
    """`… | head`: here in this process, whose standard output goes to a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    monkeypatch.setattr(sys, "argv", ["predict.py", "photos"])
    with os.fdopen(write, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run_on_this_machine(predict.PARSER, predict.predict_here) == 141
    assert capfd.readouterr().err == ""
