"""`python src/export.py …`: others compute what torch does."""

import itertools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors import safe_open

import export
from conftest import untrained_generator
from tinycats import classifier, generator
from tinycats.run import checkpoints
from tinycats.script.errors import UserError
from tinycats.script.signals import StopSignals

pytestmark = pytest.mark.slow
CLASSES = ("bengal", "other", "siamese")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a classifier and a generator, neither of which was trained."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    weights = classifier.build("resnet18", len(CLASSES), pretrained=False).state_dict()
    Path("outputs").mkdir()
    metrics = {"temperature": 0.5, "val_accuracy": 0.75}
    classifier.export(Path("outputs/cats_model.pt"), weights, "resnet18", CLASSES, 64, metrics)
    untrained_generator(Path("outputs/tiny_dit.pt"))
    return tmp_path


def exported(*arguments: str) -> Path:
    options = export.PARSER.parse(arguments)
    export.export(options, StopSignals())
    return options.output


def test_onnx_runtime_says_what_the_classifier_says_of_any_number_of_images():
    path = exported()
    assert path == Path("outputs/cats_model.onnx")
    session = onnxruntime.InferenceSession(path)
    model = classifier.load("outputs/cats_model.pt")
    rng = np.random.default_rng(0)
    for count in (1, 3):
        images = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(count)]
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        (answers,) = session.run(["probabilities"], {"images": batch.numpy()})
        with torch.inference_mode():
            expected = (model.model(classifier.normalise(batch)) / 0.5).softmax(1)
        assert answers == pytest.approx(expected.numpy(), abs=1e-5)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["classes"]) == list(CLASSES)
    assert json.loads(told["mean"]) == pytest.approx(classifier.MEAN)
    assert json.loads(told["metrics"])["val_accuracy"] == 0.75
    assert told["model"] == "classifier"


@pytest.mark.parametrize("has_guide", [True, False])
def test_onnx_runtime_samples_the_generators_images(has_guide):
    if not has_guide:
        contents = checkpoints.load(Path("outputs/tiny_dit.pt"))
        checkpoints.save(Path("outputs/tiny_dit.pt"), contents | {"guide": {}})
    session = onnxruntime.InferenceSession(exported("outputs/tiny_dit.pt"))
    told = session.get_modelmeta().custom_metadata_map
    steps, names = 6, ["tabby", "black", "tabby"]
    classes = np.array([json.loads(told["classes"]).index(name) for name in names])
    scale = json.loads(told["guidance_scale"])
    lengths = np.minimum(np.arange(1, steps), steps / 2)
    end = min(json.loads(told["end"]), 1 - 1 / steps)
    timesteps = [0.0, *(end * lengths.cumsum() / lengths.sum()), 1.0]
    noise = generator.noise_of(range(3), json.loads(told["shape"])["image_size"], seed=5)
    points = before = next(noise).numpy()
    length = np.inf
    for now, later in itertools.pairwise(timesteps):
        guided = now >= json.loads(told["guided_from"]) and later < 1
        guidance = np.array(scale if guided else min(scale, 1), np.float32)
        timestep = np.array(now, np.float32)
        inputs = {"points": points, "timestep": timestep, "classes": classes, "guidance_scale": guidance}
        image = points + np.float32(1 - now) * session.run(["velocity"], inputs)[0]
        ahead, reached, added = image, later, 0.0
        if now > 0 and later < 1:
            length, last_length = np.log(later / (1 - later) / now * (1 - now)), length
            ahead = image + np.float32(length / last_length / 2) * (image - before)
            if now < json.loads(told["churn_end"]):
                reached = 1 / (1 + (1 - later) / later * np.exp(-json.loads(told["churn"]) * length))
                added = ((1 - later) ** 2 - (later / reached * (1 - reached)) ** 2) ** 0.5
        points, before = points + np.float32((reached - now) / (1 - now)) * (ahead - points), image
        if added:
            points = np.float32(later / reached) * points + np.float32(added) * next(noise).numpy()
    expected = generator.load("outputs/tiny_dit.pt").sample(names, seed=5, steps=steps)
    assert (generator.to_bytes(torch.from_numpy(points)).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("name", ["cats_model", "tiny_dit"])
def test_a_folder_for_a_hub_has_every_weight_and_a_card(name):
    folder = exported(f"outputs/{name}.pt", "--format", "safetensors", "--output", "hub")
    contents = checkpoints.load(Path(f"outputs/{name}.pt"))
    with safe_open(folder / "model.safetensors", "pt") as stored:
        for weight, expected in contents["state_dict"].items():
            assert torch.equal(stored.get_tensor(weight), expected)
        assert len(stored.keys()) == len(contents["state_dict"]) + len(contents.get("guide", {}))
    config = json.loads((folder / "config.json").read_text())
    assert config["classes"] == list(contents["classes"])
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: pytorch\npipeline_tag: ")
    assert "million parameters" in card
    assert ("| val_accuracy | 0.7500 |" in card) == (name == "cats_model")


def test_a_mistake_is_one_line_and_nothing_is_written_over(capsys):
    for arguments, message in (
        (["none.pt"], "none.pt is not there: train one first"),
        (["RUN"], "outputs/runs/RUN/cats_model.pt is not there"),
        (["--format", "pickle"], "invalid choice: 'pickle'"),
        (["--output", "outputs"], "outputs is there already: choose another --output"),
    ):
        with pytest.raises(SystemExit) as exit:
            export.PARSER.parse(arguments)
        assert exit.value.code == 2
        assert message in (error := capsys.readouterr().err)
        assert error.count("\n") == 1
    checkpoints.save(Path("state.pt"), {"step": 3})
    with pytest.raises(UserError, match=r"state.pt is not a finished generator"):
        exported("state.pt")
    Path("file").touch()
    with pytest.raises(UserError, match=r"cannot write file/x: "):
        exported("--output", "file/x")
