"""What was trained, used on Modal: the real client, on the stand-in of tests/modal_cloud."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
import sample
from conftest import REPOSITORY, untrained_generator
from modal_cloud import ModalCloud
from tinycats import classifier, generator

PREDICT, SAMPLE = REPOSITORY / "src" / "predict.py", REPOSITORY / "src" / "sample.py"

pytestmark = pytest.mark.slow


@pytest.fixture
def volume(modal_cloud, tmp_path) -> Path:
    """The files of the outputs volume, which is empty."""
    created = modal_cloud.run("modal", "volume", "create", "cats-model-outputs", cwd=tmp_path)
    assert created.status == 0, created.output
    return modal_cloud.volume("cats-model-outputs").files


def assert_refused(cloud: ModalCloud, message: str, *command: object, cwd: Path) -> None:
    """The command ends with that line, and no container was started."""
    before = len(cloud.containers)
    result = cloud.run("modal", "run", *command, cwd=cwd)
    assert result.status == 1, result.output
    assert result.stderr == f"error: {message}\n"
    assert len(cloud.containers) == before


def test_photos_go_up_and_answers_come_back(modal_cloud, volume, smoke, tmp_path):
    missing = "cats_model.pt, in the volume cats-model-outputs, is not there"
    missing += ": train one first, or name another by --model"
    photos = tmp_path / "photos"
    shutil.copytree(smoke / "data/toy/val/black", photos)
    assert_refused(modal_cloud, missing, PREDICT, "photos", cwd=tmp_path)

    shutil.copy(smoke / "outputs/cats_model.pt", volume)
    (photos / "letter.jpg").write_text("no image")
    result = modal_cloud.run("modal", "run", "-q", PREDICT, "photos", "--json", cwd=tmp_path)
    assert (result.status, result.stderr) == (1, "error: photos/letter.jpg: no image of a format that is known\n")
    answers = {answer["photo"]: answer for answer in map(json.loads, result.stdout.splitlines())}
    here = classifier.load(smoke / "outputs/cats_model.pt").predict(sorted(photos.glob("*.png")))
    for photo, probabilities in zip(sorted(photos.glob("*.png")), here, strict=True):
        assert answers[f"photos/{photo.name}"]["probabilities"] == pytest.approx(probabilities, abs=1e-4)
    assert len(answers) == len(here) + 1
    assert [container.ended for container in modal_cloud.containers_of("predict")] == ["success"]
    assert {function.definition.resources.gpu_config.count for function in modal_cloud.functions} == {0}
    assert modal_cloud.missing == []


def test_images_come_back_from_a_gpu_the_same_as_here(modal_cloud, volume, tmp_path):
    path = untrained_generator(volume / "runs" / "r" / "tiny_dit.pt")
    (volume / "runs" / "begun").mkdir()
    (volume / "runs" / "begun" / "state.pt").touch()
    how = (SAMPLE, "--model", "r", "--sample-steps", "4")
    assert_refused(modal_cloud, "there is no class 'lion'; there are black, tabby", *how, "lion", cwd=tmp_path)
    unfinished = "the run begun is not finished: there is no tiny_dit.pt in its folder yet"
    assert_refused(modal_cloud, unfinished, SAMPLE, "--model", "begun", cwd=tmp_path)

    arguments = ("tabby", "--count", "2", "--output-dir", "mine", "--gpu", "L4")
    result = modal_cloud.run("modal", "run", *how, *arguments, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "Renting L4: about $0.96 an hour" in result.stdout
    assert "The images are in mine; all at once: mine/grid.png" in result.stdout
    there = {path.name: np.array(Image.open(path)) for path in (tmp_path / "mine").iterdir()}
    here = sample.png_files(generator.load(path), ["tabby"], 2, 0, None, 4, 16)
    for name, contents in here:
        (tmp_path / "here.png").write_bytes(contents)
        difference = there.pop(name).astype(int) - np.array(Image.open(tmp_path / "here.png"))
        assert np.abs(difference).max() <= 1
    assert there == {}
    taken = "mine/grid.png is there already: choose another --output-dir"
    assert_refused(modal_cloud, taken, *how, *arguments, cwd=tmp_path)
    gpus = [function.definition.resources.gpu_config.gpu_type for function in modal_cloud.functions]
    assert gpus == ["T4", "T4", "L4", "L4"]
    assert modal_cloud.missing == []


def test_both_are_published_as_functions_that_are_called_by_their_names(modal_cloud, volume, smoke, tmp_path):
    shutil.copy(smoke / "outputs/cats_model.pt", volume)
    untrained_generator(volume / "tiny_dit.pt")
    for script in (PREDICT, SAMPLE):
        deployed = modal_cloud.run("modal", "deploy", script, cwd=tmp_path)
        assert deployed.status == 0, deployed.output
    photo = smoke / "data/toy/val/black/000.png"
    program = f"""
import modal
from pathlib import Path
predict = modal.Function.from_name("tiny-cats-predict", "predict")
print(next(iter(predict.remote([Path({str(photo)!r}).read_bytes()])[0]["probabilities"])))
sample = modal.Function.from_name("tiny-cats-sample", "sample")
print(*sample.remote(["black"], count=2, sample_steps=2))
try:
    sample.remote(["lion"])
except Exception as error:
    print(error)
"""
    called = modal_cloud.run(sys.executable, "-c", program, cwd=tmp_path, env={"PYTHONPATH": str(SAMPLE.parent)})
    assert called.status == 0, called.output
    assert called.stdout.splitlines() == [
        "black",
        "black-0001.png black-0002.png grid.png",
        "there is no class 'lion'; there are black, tabby",
    ]


def test_photos_are_sent_in_calls_that_are_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "CALL_BYTES", 100)
    photos = [tmp_path / str(number) for number in range(6)]
    for photo, size in zip(photos, (60, 30, 20, 500, 1, 0), strict=True):
        photo.write_bytes(bytes(size))
    calls = list(predict.calls([*photos[:2], tmp_path / "gone", *photos[2:]]))
    sizes = [[len(contents) if isinstance(contents, bytes) else contents for contents in call] for call in calls]
    assert sizes == [[60, 30], ["no such file or directory", 20], [500], [1, 0]]
    monkeypatch.setattr(predict, "BATCH", 2)
    assert [len(call) for call in predict.calls(photos[4:] * 3)] == [2, 2, 2]
