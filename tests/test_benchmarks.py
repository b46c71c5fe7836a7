"""The scripts in benchmarks/ run, and print what they promise; what they measure is in benchmarks/README.md."""

import subprocess
import sys

import pytest
import torch

from conftest import REPOSITORY
from tinycats import generator
from tinycats.dit import TinyDiT

SHAPE = {"image_size": 32, "patch_size": 8, "dim": 32, "depth": 1, "heads": 2}


def benchmark(script: str, *arguments: object) -> str:
    """What `python benchmarks/<script> …` prints."""
    command = [sys.executable, REPOSITORY / "benchmarks" / script, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.mark.slow
def test_the_loader_is_compared_with_the_plain_pipeline(small_toy):
    printed = benchmark("loader.py", small_toy, "--image-size", 32, "--batch-size", 8, "--steps", 3, "--rounds", 1)
    assert "ratio" in printed


def test_what_verifying_packed_images_costs_is_measured():
    printed = benchmark("packed_images.py", "--images", 50, "--side", 16)
    assert [line[:5] for line in printed.splitlines()] == ["50 im", "open ", "read ", "read ", "SHA-2", "verif"]


@pytest.mark.slow
def test_the_loader_is_compared_with_a_step(small_toy):
    printed = benchmark("data_against_step.py", small_toy, "--batch-size", 4, "--rounds", 1)
    assert "on this machine" in printed and "GFLOP an image" in printed


@pytest.mark.slow
def test_the_choices_of_flow_matching_are_compared(small_toy, tmp_path):
    shape = [word for name, value in SHAPE.items() for word in (f"--{name.replace('_', '-')}", value)]
    chosen = ("--variants", "chosen", "late, velocity", "--steps", 3, "--batch-size", 4, "--output", tmp_path)
    printed = benchmark("flow_matching_choices.py", small_toy, *shape, *chosen)
    assert [line.split()[0] for line in printed.splitlines()] == ["real", "chosen", "late,"]
    assert {path.name for path in tmp_path.iterdir()} == {"chosen.png", "late_velocity.png"}


@pytest.mark.slow
def test_a_generators_distance_to_held_out_images_is_measured(small_toy, tmp_path):
    torch.manual_seed(0)
    model = TinyDiT(5, **SHAPE)
    classes = ["black", "ginger", "other", "siamese", "tabby"]
    generator.export(tmp_path / "tiny_dit.pt", model.state_dict(), SHAPE, classes, 1.0, {})
    printed = benchmark("sample_quality.py", tmp_path / "tiny_dit.pt", small_toy, "--steps", 2)
    real, samples, _ = (line.split() for line in printed.splitlines())
    assert float(samples[1]) > 2 * float(real[2]), "an untrained generator samples grey"
