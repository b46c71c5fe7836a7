"""`python src/sample.py …`, with a generator that has learned nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from conftest import untrained_generator
from tinycats import generator
from tinycats.script.errors import UserError
from tinycats.script.signals import StopSignals


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The current folder, with a finished model."""
    untrained_generator(tmp_path / "outputs" / "tiny_dit.pt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sample_here(*arguments: str) -> Path:
    """`python src/sample.py …`; where the images went."""
    options = sample.PARSER.parse(["--sample-steps", "4", *arguments])
    sample.sample_here(options, StopSignals())
    return options.output_dir


def pixels(path: Path) -> np.ndarray:
    return np.array(Image.open(path)).astype(int)


def test_every_class_is_sampled_into_numbered_files_and_a_grid_with_a_row_each():
    folder = sample_here()
    assert folder.parent == Path("outputs/samples")
    names = [f"{name}-{number:04}.png" for name in ("black", "tabby") for number in (1, 2, 3, 4)]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "grid.png"])
    assert pixels(folder / "black-0001.png").shape == (16, 16, 3)
    grid = pixels(folder / "grid.png")
    assert grid.shape == (2 * 18 + 2, 4 * 18 + 2, 3)
    for place, name in enumerate(names):
        top, left = 2 + 18 * (place // 4), 2 + 18 * (place % 4)
        assert np.array_equal(grid[top : top + 16, left : left + 16], pixels(folder / name))
    assert len({pixels(folder / name).tobytes() for name in names}) == len(names), "each has noise of its own"
    assert sample_here() != folder, "nothing is written over"


def test_the_same_seed_is_the_same_image_whatever_is_sampled_beside_it_and_in_whichever_batch():
    all_of_them = sample_here("--count", "3", "--output-dir", "all")
    some = sample_here("tabby", "--count", "5", "--batch-size", "2", "--output-dir", "some")
    for number in (1, 2, 3):
        name = f"tabby-{number:04}.png"
        assert np.abs(pixels(all_of_them / name) - pixels(some / name)).max() <= 1
    other = sample_here("tabby", "--count", "1", "--seed", "1", "--output-dir", "other")
    assert not np.array_equal(pixels(other / "tabby-0001.png"), pixels(some / "tabby-0001.png"))


def test_guidance_is_the_models_own_unless_it_is_given():
    own = sample_here("tabby", "--count", "1", "--output-dir", "own")
    for scale, is_same in ((generator.load("outputs/tiny_dit.pt").guidance_scale, True), (1.0, False), (0.0, False)):
        given = sample_here("tabby", "--count", "1", "--cfg-scale", str(scale), "--output-dir", f"given-{scale}")
        assert np.array_equal(pixels(given / "tabby-0001.png"), pixels(own / "tabby-0001.png")) == is_same


def test_no_image_is_written_over():
    folder = sample_here("black", "--count", "1", "--output-dir", "mine")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"mine/grid.png is there already: choose another --output-dir"):
        sample_here("tabby", "--output-dir", "mine")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_class_that_there_is_not_is_named_before_anything_is_sampled():
    with pytest.raises(UserError, match="there is no class 'lion'; there are black, tabby"):
        sample_here("black", "lion", "--output-dir", "none")
    assert not Path("none").exists()


def test_a_classs_name_is_made_one_that_every_system_takes():
    assert sample.file_name("British_Shorthair", 1) == "British_Shorthair-0001.png"
    assert sample.file_name('a/b:"c"%\n', 10_000) == "a%2Fb%3A%22c%22%25%0A-10000.png"
    assert sample.file_name("кот", 2) == "кот-0002.png"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count: 0 is out of range"),
        (["--sample-steps", "1"], "--sample-steps: 1 is out of range"),
        (["--cfg-scale", "nan"], "--cfg-scale: nan is out of range"),
        (["--seed", "-1"], "--seed: -1 is out of range"),
        (["--model", "RUN"], "outputs/runs/RUN/tiny_dit.pt is not there: train one first, or name another by --model"),
        (["--output-dir", "outputs/tiny_dit.pt"], "outputs/tiny_dit.pt is not a folder"),
        (["--output-dir", "x" * 5000], "file name too long"),
        (["--gpu", "T4"], "--gpu is for Modal (modal run src/sample.py …)"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        sample.PARSER.parse(arguments)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_disk_that_is_full_is_one_line():
    Path("folder").write_text("")
    with pytest.raises(UserError, match=r"cannot write folder/x.png: "):
        sample.write(Path("folder"), "x.png", b"")
