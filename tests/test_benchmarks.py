"""The scripts in benchmarks/ run, and print what they promise; what they measure is in benchmarks/README.md."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import REPOSITORY, WARM_PYTHON
from flow_matching_choices import pairing
from pets_mirror import dataset_files
from tinycats import generator
from tinycats.images.toy_cats import draw_toy_cats
from tinycats.models.dit import TinyDiT

SHAPE = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "heads": 2}
SHAPE_OPTIONS = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", value)]


def benchmark(script: str, *arguments: object) -> str:
    """What `python benchmarks/<script> …` prints."""
    command = [REPOSITORY / "benchmarks" / script, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = WARM_PYTHON.popen([str(word) for word in command], **pipes)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def cells(printed: str) -> list[list[str]]:
    """Of the lines of a table."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]


@pytest.mark.slow
def test_the_loader_is_compared_with_the_plain_pipeline(small_toy):
    printed = benchmark("loader.py", small_toy, "--workers", 0, 1, "--images", 16, "--rounds", 1)
    rows = [line.split("|") for line in printed.splitlines()[2:]]
    assert [(row[1].split()[0], int(row[2])) for row in rows] == [("128", 0), ("128", 1), ("224", 0), ("224", 1)]
    assert all(row[-2].strip().endswith("x") for row in rows)


@pytest.mark.slow
def test_what_many_images_cost_is_measured():
    printed = benchmark("many_images.py", 500, 5000, "--rounds", 1)
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == ["500", "5,000"]


@pytest.mark.slow
def test_packing_is_compared_with_a_loop(small_toy):
    printed = benchmark("packing.py", small_toy, "--times", 2, "--rounds", 1, "--files", 100)
    assert "120 photos: a loop" in printed and "100 files are listed in" in printed


@pytest.mark.slow
def test_what_a_gpu_is_rented_for_before_it_trains_is_measured(tmp_path):
    for name, contents in dataset_files().items():
        if not name.startswith("annotations/t"):
            (tmp_path / Path(name).name).write_bytes(contents)
    printed = benchmark("first_step.py", tmp_path, "--checkouts", REPOSITORY, "--image-sizes", 64)
    rows = cells(printed)[2:]
    assert [row[0] for row in rows] == ["run 1, 64 px"]
    assert float(rows[0][2]) > 0 and float(rows[0][3]) > 0


@pytest.mark.slow
def test_the_loader_is_compared_with_a_step(small_toy):
    printed = benchmark("data_against_step.py", small_toy, "--batch-size", 4, "--rounds", 1)
    assert "on this machine" in printed and "GFLOP an image" in printed


@pytest.fixture(scope="module")
def few_images(shared_folder) -> Path:
    """A toy data set of ten images each to train on and to validate with: what a network sees in each takes a while."""
    counts = {"train": 2, "val": 2}
    return shared_folder("few", lambda folder: draw_toy_cats(folder / "toy", 1, counts)) / "toy"


@pytest.mark.slow
def test_the_choices_of_flow_matching_are_compared(few_images, tmp_path):
    chosen = ("--variants", "chosen", "late, velocity", "patches, adamw", "paired noise", "sees noise")
    rest = ("--seconds", 0.5, "--batch-size", 4, "--output", tmp_path)
    printed = benchmark("flow_matching_choices.py", few_images, *SHAPE_OPTIONS, *chosen, *rest)
    lines = [line.split()[0] for line in printed.splitlines() if not line.startswith("    at ")]
    assert lines == ["real", "chosen", "late,", "patches,", "paired", "sees"]
    written = {path.stem for path in tmp_path.iterdir()}
    assert written == {"chosen", "late_velocity", "patches_adamw", "paired_noise", "sees_noise"}


def test_noise_is_paired_with_the_image_that_it_is_like():
    images, order = torch.randn(24, 3, 8, 8), torch.randperm(24)
    images[1] = images[0] / 2  # both are most like the noise of the first
    noise = images[order] + 0.1 * torch.randn(24, 3, 8, 8)
    assert torch.equal(order[pairing(noise, images)], torch.arange(24))


@pytest.mark.slow
def test_a_generators_distance_to_held_out_images_is_measured(few_images, tmp_path):
    torch.manual_seed(0)
    model = TinyDiT(5, **SHAPE)
    classes = ["black", "ginger", "other", "siamese", "tabby"]
    generator.export(tmp_path / "tiny_dit.pt", model.state_dict(), {}, SHAPE, classes, 1.0, {})
    printed = benchmark("sample_quality.py", tmp_path / "tiny_dit.pt", few_images, "--steps", 2)
    lines = [line.split() for line in printed.splitlines()]
    real, samples = lines[0], lines[4]
    assert float(samples[1]) > 2 * float(real[2]), "an untrained generator samples grey"
    kernel_distances = [(int(line[1]), float(line[4])) for line in lines if line[0] == "at"]
    assert [side for side, _ in kernel_distances] == [32, 16, 8] * 2
    assert kernel_distances[3][1] > 2 * abs(kernel_distances[0][1])


@pytest.mark.slow
def test_learning_rates_are_compared_at_several_widths(few_images):
    how = ("--widths", 32, 64, "--rates", 1e-3, 2e-3, "--steps", 2, "--image-size", 16, "--depth", 1, "--batch-size", 4)
    printed = benchmark("rates.py", few_images, *how)
    rows = cells(printed)
    assert rows[0] == ["width", "0.001", "0.002"]
    assert [row[0] for row in rows[2:]] == ["32", "64"]
    assert all(0 < float(cell) < 10 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_when_photos_are_learned_by_heart_is_measured(small_toy, tmp_path):
    how = ("--images", 8, "--steps", 4, "--image-size", 16, "--variants", "not mirrored")
    printed = benchmark("learning_by_heart.py", small_toy / "train", *how, "--output", tmp_path / "out")
    assert re.search(r"mirrored: the validation loss is lowest at step \d: [\d.]+\n  step +2 +validation loss", printed)
    assert printed.count("nearest") == 2
    assert (tmp_path / "out" / "learning_by_heart.svg").exists()


@pytest.mark.slow
def test_the_fused_optimizer_is_compared_with_the_plain_one():
    assert re.fullmatch(r"plain \d+ ms, fused \d+ ms a step: [\d.]+x\n", benchmark("adamw.py"))


@pytest.mark.slow
def test_where_the_time_of_a_step_goes_is_measured():
    printed = benchmark("step.py", *SHAPE_OPTIONS, "--batch-size", 2, "--steps", 2)
    rows = cells(printed)
    assert [row[0] for row in rows[2:]] == ["images", "seen", "forward", "backward", "clip", "optimizer", "EMA", "sum"]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:])
    assert re.search(r"a step [\d.]+ ms, \d+ images/s, [\d.]+ of [\d.]+ TFLOP/s: \d+%", printed)


@pytest.mark.slow
def test_a_step_is_compared_with_that_of_another_dit(tmp_path):
    (tmp_path / "models.py").write_text("""
import torch

class DiT(torch.nn.Conv2d):
    def __init__(self, input_size, patch_size, in_channels, hidden_size, depth, num_heads, num_classes, learn_sigma):
        assert (input_size, patch_size, hidden_size, depth, num_heads, learn_sigma) == (32, 8, 32, 1, 2, False)
        super().__init__(in_channels, in_channels, 1)

    def forward(self, points, timesteps, classes):
        assert timesteps.shape == classes.shape == points.shape[:1]
        return super().forward(points)
""")
    other = tmp_path / "models.py"
    printed = benchmark("step.py", *SHAPE_OPTIONS, "--batch-size", 2, "--steps", 2, "--beside", other)
    rows = cells(printed)
    parts = [f"TinyDiT, {part}" for part in ("up to 0.6 of a run", "up to 0.8", "to its end")]
    assert [row[0] for row in rows[2:]] == [*parts, str(other)]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_steps_of_checkouts_are_compared():
    printed = benchmark("step.py", *SHAPE_OPTIONS, "--batch-size", 2, "--steps", 2, "--checkouts", REPOSITORY, ".")
    rows = cells(printed)
    assert [row[0] for row in rows[2:]] == [str(REPOSITORY), "."]
    assert all(float(cell) > 0 for row in rows[2:] for cell in row[1:])


@pytest.mark.slow
def test_what_saving_costs_is_measured():
    printed = benchmark("saving.py", "--gigabytes", 0.01, "--rounds", 1)
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == ["0.01"]


def test_where_there_is_no_gpu_its_benchmark_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one; `make gpu` runs the benchmark")
    assert benchmark("gpu.py").startswith("There is no CUDA GPU here: nothing to show.")
