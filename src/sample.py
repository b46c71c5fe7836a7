"""Sample images of cats from a finished generator.

    python src/sample.py                                      four of each class, by what src/train_dit.py wrote last
    python src/sample.py Siamese Bengal --count 8 --seed 1    of these classes, from other noise
    python src/sample.py --model tiny_dit.pt                  by one that was fetched
    modal run src/sample.py Siamese                           on a rented GPU; the images come back
    modal deploy src/sample.py                                as a function that is called by its name
    python src/sample.py --help                               every option

The same seed samples the same images, whichever classes are asked for, and how many, in batches of any size, on any
machine (up to the rounding of floating point). Called by its name:

    modal.Function.from_name("tiny-cats-sample", "sample").remote(["Siamese"], count=4)    # {"Siamese-0001.png": …, …}
"""

import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import modal

from tinycats.on_modal import container, laptop, resources
from tinycats.on_modal.gpus import Rental
from tinycats.run import finished, runs
from tinycats.run.durable_files import atomic_write
from tinycats.run.finished import GENERATOR
from tinycats.script.command_line import Options, Parser, number, run_on_this_machine, whole_number
from tinycats.script.errors import UserError, looking_at_what_the_user_named
from tinycats.script.signals import StopSignals

if TYPE_CHECKING:
    import torch

    from tinycats.generator import Generator

log = logging.getLogger("tinycats.sample")

GRID = "grid.png"  # a row a class
GRID_COLUMNS = 8  # at the most
BATCH = 16  # images that are sampled at once, unless --batch-size says otherwise
STEPS = 25  # of sampling
MAX_COUNT = 10_000  # images of a class


# --- options -----------------------------------------------------------------------------------------------------


class SampleParser(Parser):
    def __init__(self) -> None:
        super().__init__("sample.py", "Sample images of cats from a finished generator.", gpu_default="T4")
        self.add_argument("classes", nargs="*", help="the classes to sample (default: all that the model knows)")
        self.add_argument(
            "--model",
            metavar="FILE|RUN",
            help="a finished generator, or the run that made it (default: outputs/tiny_dit.pt)",
        )
        self.add_argument(
            "--output-dir",
            type=Path,
            help="where the images go, on this machine (default: a new folder in outputs/samples)",
        )
        self.add_argument("--count", type=whole_number(1, MAX_COUNT), default=4, help="images of each class")
        self.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="decides the images")
        self.add_argument(
            "--cfg-scale",
            type=number(at_least=0, at_most=100),
            help="how far guidance exaggerates the class: 1 not at all (default: as the model was trained for)",
        )
        self.add_argument("--sample-steps", type=whole_number(2, 1000), default=STEPS, help="more are slower")
        self.add_argument("--batch-size", type=whole_number(1), default=BATCH, help="images that are sampled at once")
        self.add_argument(
            "--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="auto: a GPU, if any"
        )
        self.add_gpu_option(self.add_argument_group("Modal only"))

    def complete(self, options: Options, on_modal: bool) -> None:
        if on_modal and "device" in options.given:
            self.error("--device is for this machine; on Modal --gpu says what to rent")

    def check(self, options: Options) -> None:
        options.output_dir = options.output_dir or finished.OUTPUT_DIR / "samples" / runs.new_name()
        try:
            with looking_at_what_the_user_named():
                if options.output_dir.exists() and not options.output_dir.is_dir():
                    raise UserError(f"{options.output_dir} is not a folder")
        except UserError as error:
            self.error(str(error))
        if (options.gpu or "").partition(":")[2] not in ("", "1"):
            self.error("--gpu: sampling takes one GPU")

    def check_laptop(self, options: Options) -> None:
        finished.require(finished.path_of(options.model, GENERATOR))


PARSER = SampleParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__) or PARSER.parse([], on_modal=True)


# --- Modal -------------------------------------------------------------------------------------------------------

app = modal.App("tiny-cats-sample")


@app.function(**resources.using_models(OPTIONS.gpu))
def sample(
    classes: Sequence[str] = (),
    count: int = 1,
    seed: int = 0,
    cfg_scale: float | None = None,
    sample_steps: int = STEPS,
    batch_size: int = BATCH,
    model: str = GENERATOR,
) -> dict[str, bytes]:
    """Sample images.

    Args:
        classes: by name; none: all.
        count: of each class.
        cfg_scale: None: as the model was trained for.
        model: the generator's path in the volume cats-model-outputs.

    Returns:
        PNG files by their names, the grid's among them.

    Raises:
        UserError: there is no such generator, or no such class.
    """
    from tinycats import generator
    from tinycats.training import devices

    model_here = container.loaded(generator.load, model).to(devices.find("auto"))
    return dict(png_files(model_here, classes, count, seed, cfg_scale, sample_steps, batch_size))


# --- sampling ----------------------------------------------------------------------------------------------------


def file_name(name: str, number: int) -> str:
    """Of the image of that number, from 1, of a class, whatever its name: one that every system takes."""
    plain = "".join(f"%{ord(letter):02X}" if letter in '<>:"/\\|?*%' or ord(letter) < 32 else letter for letter in name)
    return f"{plain}-{number:04}.png"


def png_files(
    model: "Generator",
    classes: Sequence[str],
    count: int,
    seed: int,
    cfg_scale: float | None,
    steps: int,
    batch_size: int,
) -> Iterator[tuple[str, bytes]]:
    """Names and contents of `count` images of each class, and of the grid, each when it is ready.

    Raises:
        UserError: there is no such class.
    """
    from torchvision.utils import make_grid
    from tqdm import tqdm

    from tinycats.generator import png

    classes = list(dict.fromkeys(classes)) or model.classes
    finished.require_classes(classes, model.classes)
    wanted = [
        (name, number, noise) for name in classes for number, noise in enumerate(model.noise_numbers(name, count))
    ]
    columns = min(count, GRID_COLUMNS)
    of_grid: list[torch.Tensor] = []
    with tqdm(total=len(wanted), unit="img", disable=None) as bar:
        for first in range(0, len(wanted), batch_size):
            batch = wanted[first : first + batch_size]
            names = [name for name, *_ in batch]
            numbers = [noise for *_, noise in batch]
            images = model.sample(
                names, seed=seed, numbers=numbers, guidance_scale=cfg_scale, batch_size=batch_size, steps=steps
            )
            for (name, number, _), image in zip(batch, images, strict=True):
                yield file_name(name, number + 1), png(image)
                if number < columns:
                    of_grid.append(image)
            bar.update(len(batch))
    yield GRID, png(make_grid(of_grid, nrow=columns, padding=2, pad_value=255))


def require_free(folder: Path, classes: Sequence[str], count: int) -> None:
    """Refuse to write over images.

    Raises:
        UserError: one of those that are to be written is there.
    """
    if not folder.is_dir():
        return
    there = {path.name for path in folder.iterdir()}
    names = [GRID, *(file_name(name, number + 1) for name in classes for number in range(count))]
    if taken := [name for name in names if name in there]:
        raise UserError(f"{folder / taken[0]} is there already: choose another --output-dir")


def write(folder: Path, name: str, contents: bytes) -> None:
    """Write a file that was sampled.

    Raises:
        UserError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / name) as file:
            file.write(contents)
    except OSError as error:
        raise UserError(f"cannot write {folder / name}: {(error.strerror or str(error)).lower()}") from error


# --- the two ways in ---------------------------------------------------------------------------------------------


def sample_here(options: Options, _stop: StopSignals) -> None:
    """`python src/sample.py …`."""
    from tinycats import generator
    from tinycats.training import devices

    runs.log_to_stdout()
    device = devices.find(options.device)
    model = generator.load(finished.path_of(options.model, GENERATOR)).to(device)
    finished.require_classes(options.classes, model.classes)
    require_free(options.output_dir, options.classes or model.classes, options.count)
    how = options.count, options.seed, options.cfg_scale, options.sample_steps, options.batch_size
    for name, contents in png_files(model, options.classes, *how):
        write(options.output_dir, name, contents)
    log.info("The images are in %s; all at once: %s", options.output_dir, options.output_dir / GRID)


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/sample.py …`: sample there, and write the images here."""
    options = PARSER.parse(arguments, on_modal=True)
    runs.log_to_stdout()
    with laptop.errors_are_told():
        model = laptop.finished_model(options.model, GENERATOR)
        classes = laptop.facts_of(model).get("classes")
        if classes:
            finished.require_classes(options.classes, classes)
        require_free(options.output_dir, options.classes or classes or [], options.count)
        log.info("Renting %s: about $%.2f an hour", options.gpu, Rental.parse(options.gpu).dollars_an_hour)
        how = options.count, options.seed, options.cfg_scale, options.sample_steps, options.batch_size
        files = sample.remote(options.classes, *how, model=str(model))
        for name, contents in files.items():
            write(options.output_dir, name, contents)
    log.info("The images are in %s; all at once: %s", options.output_dir, options.output_dir / GRID)


if __name__ == "__main__":
    sys.exit(run_on_this_machine(PARSER, sample_here))
