"""report.html: what is in it is what happened, and nothing comes from elsewhere."""

import re
import shutil
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from conftest import run_quietly
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import square
from tinycats.images.packed_images import PackedImages
from tinycats.run import options as run_options
from tinycats.run.summaries import parsed_metrics
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals
from tinycats.showing import report

SMALL = ("--backbone", "resnet20", "--batch-size", "8")
SMALL_DIT = ("--image-size", "32", "--patch-size", "8", "--dim", "64", "--depth", "2", "--heads", "2")
SMALL_DIT += ("--batch-size", "8", "--sample-steps", "3", "--steps", "4", "--sample-every", "1")


class Page(HTMLParser):
    """What a page holds: its images' attributes, its tables' cells, whatever it asks of elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[dict] = []
        self.rows: list[list[str]] = []
        self.elsewhere: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        held = dict(attributes)
        if tag == "img":
            self.images.append(held)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")
        if tag in ("script", "link", "iframe", "object"):
            self.elsewhere.append(tag)
        self.elsewhere += [
            held[name] for name in ("src", "href") if name in held and not held[name].startswith("data:image/")
        ]

    def handle_endtag(self, tag):
        if tag == "table":
            self.rows.append([""])  # for what comes after it

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[str]:
        return next(row[1:] for row in self.rows if row[0] == name)


def only_run(outputs: Path) -> Path:
    (run,) = (outputs / "runs").iterdir()
    return run


def test_a_classifiers_report_says_what_was_done_and_what_is_taken_for_what(smoke):
    run = only_run(smoke / "outputs")
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.elsewhere == []
    command = "python src/train.py data/toy --no-pretrained --image-size 64 --batch-size 16 --lr 0.001 --epochs 3"
    command += " --optimizer muon --mixup 0.2"
    assert f"<code>{command}</code>" in text
    best = max(
        (row for row in parsed_metrics((run / "metrics.jsonl").read_bytes()) if "val_loss" in row),
        key=lambda row: (row["balanced_accuracy"], -row["val_loss"]),
    )
    assert page.row("accuracy") == [f"{best['val_accuracy']:.1%}"]
    assert page.row("torch") == [torch.__version__.partition("+")[0]]
    names = page.rows[0][2:]
    assert names == ["black", "ginger", "other", "siamese", "tabby"]
    confusion = np.array([[int(cell) for cell in page.row(name)[1:]] for name in names])
    assert confusion.sum(1).tolist() == [20] * 5
    assert np.trace(confusion) / 100 == pytest.approx(best["val_accuracy"])
    assert len(page.images) == min(16, 100 - np.trace(confusion))
    assert all(image["alt"] for image in page.images)
    assert "Loss over the steps" in text


@pytest.mark.slow
def test_a_generators_report_has_its_grids_its_distance_and_the_nearest_training_image(small_toy, tmp_path):
    run_quietly("train_dit.py", small_toy, *SMALL_DIT, "--run", "r", cwd=tmp_path)
    page = Page((tmp_path / "outputs/runs/r/report.html").read_text())
    assert page.elsewhere == []
    told = [image["alt"] for image in page.images]
    assert told[:4] == [f"Samples after step {step}" for step in (1, 2, 3, 4)]
    assert len(told) == 4 + 8
    assert all(re.fullmatch(r"\w+, and the nearest: train/\w+/\d+\.png", text) for text in told[4:])
    assert float(page.row("16 samples")[0]) > 0
    assert not any("other images" in row[0] for row in page.rows), "there are not enough of them"


@pytest.fixture
def images(small_toy, tmp_path) -> PackedImages:
    shutil.copytree(small_toy, tmp_path / "toy")
    return open_dataset(tmp_path / "toy", square(32), fallback=tmp_path)


def pixels(dataset: PackedImages, places: Iterable[int]) -> torch.Tensor:
    return torch.from_numpy(np.stack([dataset[place] for place in places])).permute(0, 3, 1, 2)


def test_what_was_learned_by_heart_is_found_mirrored_or_not(images):
    samples = pixels(images, [3, 17, 30])
    samples[1] = samples[1].flip(2)
    page = Page(report.neighbours(samples, ["one", "two", "three"], images))
    found = [image["alt"].partition(": ")[2] for image in page.images]
    assert found == [images.path(place) for place in (3, 17, 30)]


def test_the_distance_of_real_images_is_near_that_of_other_real_images_and_noise_is_far(images):
    rng = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (8, 3, 32, 32), generator=rng).to(torch.uint8)
    rows = [Page(report.distances(samples, images)) for samples in (noise, pixels(images, range(40, 60))[::2][:8])]
    far, near = (float(page.row("8 samples")[0]) for page in rows)
    assert far > 2 * near
    assert near < 2 * float(rows[0].row("8 other images")[0])


def test_the_worst_mistakes_are_those_that_were_most_surely_made():
    logits = torch.tensor([[9.0, 0], [0, 1], [2, 0], [0, 3], [1, 0]])
    labels = torch.tensor([0, 0, 1, 0, 1])
    worst = report.worst_mistakes(logits, labels, temperature=1.0)
    assert [mistake[:3] for mistake in worst] == [[3, 0, 1], [2, 1, 0], [1, 0, 1], [4, 1, 0]]
    assert worst[0][3] == pytest.approx(torch.tensor([0.0, 3]).softmax(0)[1].item())


def test_names_are_not_taken_for_markup():
    evil = "<script>alert(1)</script>"
    assert "<script" not in report.confusion([[1, 0], [0, 1]], [evil, "b"])
    assert "<script" not in report._table([(evil, evil)])


@pytest.mark.slow
def test_a_report_that_cannot_be_written_does_not_cost_the_run(small_toy, tmp_path, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "write", full)
    options = train.PARSER.parse([str(small_toy), *SMALL, "--epochs", "1"])
    with caplog.at_level("WARNING"):
        train.train(options, StopSignals(), ThisMachine("train.py"))
    assert Path("outputs/cats_model.pt").exists()
    assert "There is no report: OSError: [Errno 28] No space left on device" in caplog.text


def test_the_command_of_a_report_makes_the_same_options():
    words = [
        "data/my cats",
        "--no-balance",
        "--lr",
        "1e-05",
        "--epochs",
        "3",
        "--image-size",
        "96",
        "--num-workers",
        "2",
    ]
    options = train.PARSER.parse(words, on_modal=True)
    command = run_options.command(train.PARSER, options, "modal run")
    expected = "modal run src/train.py 'data/my cats' --pretrained --image-size 96 --lr 1e-05 --epochs 3"
    expected += " --optimizer adamw --mixup 0 --no-balance"
    assert command == expected
