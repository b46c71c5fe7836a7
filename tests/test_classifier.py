"""The classifier's metrics, its file, and what it says without a network."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from tinycats import classifier
from tinycats.images import frames
from tinycats.images.augmentation import BatchRng
from tinycats.images.decoding import decode
from tinycats.run import checkpoints
from tinycats.script.errors import TransientError, UserError


def test_accuracies_of_a_known_confusion():
    #                                   bengal  other  siamese   (taken for)
    confusion = torch.tensor([[8, 1, 1], [2, 86, 2], [0, 5, 5]])
    result = classifier.accuracies(confusion, ("bengal", "other", "siamese"))
    assert result["val_accuracy"] == pytest.approx(99 / 110)
    assert result["class_accuracy"] == pytest.approx({"bengal": 0.8, "other": 86 / 90, "siamese": 0.5})
    assert result["balanced_accuracy"] == pytest.approx((0.8 + 86 / 90 + 0.5) / 3)
    assert result["cat_accuracy"] == pytest.approx((8 + 1 + 0 + 5 + 86) / 110), "a bengal taken for a siamese is a cat"


def test_cat_accuracy_is_there_only_with_a_class_other():
    assert "cat_accuracy" not in classifier.accuracies(torch.eye(2), ("bengal", "siamese"))


def test_the_confusion_matrix_counts_labels_by_rows_and_answers_by_columns():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
    assert classifier.confusion_matrix(logits, torch.tensor([0, 0, 1])).tolist() == [[1, 1], [1, 0]]


def overconfident(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of three classes that are three times what they should be, and the labels that are drawn by them."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(count, 3, generator=rng)
    return 3 * logits, torch.multinomial(logits.softmax(1), 1, generator=rng)[:, 0]


def test_the_temperature_makes_probabilities_what_they_say():
    logits, labels = overconfident(20_000)
    assert classifier.fit_temperature(logits, labels) == pytest.approx(3, rel=0.05)
    assert classifier.calibration_error(logits.softmax(1), labels) > 0.15
    found = classifier.calibration(logits, labels)
    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert found["calibration_error"] < 0.02


def test_the_temperature_is_where_the_cross_entropy_is_least():
    logits, labels = overconfident(300)
    weights = 1 / labels.bincount()[labels].double()

    def loss(temperature: float) -> float:
        each = torch.nn.functional.cross_entropy(logits.double() / temperature, labels, reduction="none")
        return (weights * each).sum().item()

    best = classifier.fit_temperature(logits, labels)
    assert loss(best) < min(loss(0.97 * best), loss(1.03 * best))


def test_the_calibration_error_of_known_probabilities_counts_every_class_alike():
    # Three of class 0, of which it is said with 0.9 that they are; one of class 1, of which 0.8 is said, and wrongly.
    probabilities = torch.tensor([[0.9, 0.1]] * 3 + [[0.8, 0.2]])
    expected = 0.5 * abs(0.9 - 1) + 0.5 * abs(0.8 - 0)
    assert classifier.calibration_error(probabilities, torch.tensor([0, 0, 0, 1])) == pytest.approx(expected)


def test_where_every_answer_is_right_the_temperature_is_bounded_and_one_image_is_enough():
    assert classifier.calibration(9 * torch.eye(3), torch.arange(3))["temperature"] == pytest.approx(0.25, rel=1e-3)
    assert classifier.calibration(torch.zeros(1, 3), torch.tensor([1]))["calibration_error"] == pytest.approx(1 / 3)


def test_of_a_model_that_diverged_the_calibration_error_is_nan():
    assert math.isnan(
        classifier.calibration(torch.full((4, 2), math.nan), torch.tensor([0, 1, 0, 1]))["calibration_error"]
    )


def test_validation_shows_the_middle_and_training_a_part_and_both_in_bytes():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (73, 90, 3), np.uint8)
    (middle,) = classifier.validation_transform(64)([image], BatchRng(0, 1))
    assert (middle == image[4:68, 13:77]).all()
    (part,) = classifier.training_transform(64)([image], BatchRng(0, 1))
    assert part.shape == (64, 64, 3)
    assert part.dtype == np.uint8


def test_normalised_images_have_imagenets_mean_and_deviation():
    white = classifier.normalise(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))
    expected = [(1 - mean) / std for mean, std in zip(classifier.MEAN, classifier.STD, strict=True)]
    assert white[0, :, 0, 0].tolist() == pytest.approx(expected)
    assert white.is_contiguous(memory_format=torch.channels_last)


def export(path, model, classes=("a", "b", "c")):
    metrics = {"val_accuracy": 0.9, "temperature": 0.8}
    classifier.export(path, model.state_dict(), "resnet18", classes, 64, metrics)


def test_an_exported_classifier_predicts_what_the_trained_one_did(tmp_path):
    torch.manual_seed(0)
    model = classifier.build("resnet18", 3, pretrained=False).eval()
    export(tmp_path / "model.pt", model)
    photo = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")

    loaded = classifier.load(tmp_path / "model.pt")
    (probabilities,) = loaded.predict([tmp_path / "photo.png"])
    assert list(probabilities) == ["a", "b", "c"]
    assert sum(probabilities.values()) == pytest.approx(1)
    with torch.inference_mode():
        small = decode(tmp_path / "photo.png", frames.to_crop_from(64))
        image = classifier.validation_transform(64)([small], np.random.default_rng())
        expected = (model(classifier.normalise(torch.from_numpy(image).permute(0, 3, 1, 2))) / 0.8).softmax(1)
    assert list(probabilities.values()) == pytest.approx(expected[0].tolist(), abs=1e-6)
    assert loaded.metrics == {"val_accuracy": 0.9, "temperature": 0.8}


def test_torch_reads_the_file_with_weights_only(tmp_path):
    export(tmp_path / "model.pt", classifier.build("resnet18", 3, pretrained=False))
    contents = torch.load(tmp_path / "model.pt", weights_only=True)
    assert contents["classes"] == ["a", "b", "c"]
    assert {"backbone", "image_size", "mean", "std", "metrics", "state_dict"} <= contents.keys()


def test_another_models_file_is_refused(tmp_path):
    checkpoints.save(tmp_path / "dit.pt", {"model": "tiny_dit"})
    with pytest.raises(UserError, match="not a finished classifier"):
        classifier.load(tmp_path / "dit.pt")


def test_weights_that_cannot_be_fetched_are_an_error_that_names_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens: as without a network
    with pytest.raises(TransientError, match="--no-pretrained"):
        classifier.build("resnet18", 3, pretrained=True)


@pytest.mark.parametrize("backbone", ["resnet20", "resnet18", "resnet34", "resnet50"])
def test_every_backbone_builds_with_a_head_of_its_own(backbone):
    model = classifier.build(backbone, 13, pretrained=False).eval()
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 13)


def test_a_resnet20_is_the_papers_and_leaves_eight_pixels_of_thirty_two():
    model = classifier.build("resnet20", 10, pretrained=False)
    shortcuts = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64  # convolutions and their norms, where the paper's have no weights
    assert sum(parameter.numel() for parameter in model.parameters()) == 269_722 + shortcuts
    before_pooling = []
    model.avgpool.register_forward_pre_hook(lambda _module, inputs: before_pooling.append(inputs[0].shape))
    model(torch.zeros(2, 3, 32, 32))
    assert before_pooling == [(2, 64, 8, 8)]


def test_mixed_images_are_a_part_of_one_and_the_rest_of_the_next_and_so_are_their_classes():
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    inputs, targets = classifier.mixed(images, torch.eye(3), 0.75)
    assert torch.allclose(inputs, torch.tensor([0.25, 1.25]).view(2, 1, 1, 1).expand(2, 3, 2, 2))
    assert torch.allclose(targets, torch.tensor([[0.75, 0.25, 0.0], [0.0, 0.75, 0.25]]))
