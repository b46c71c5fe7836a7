"""When a generator begins to learn its photos by heart, and what puts that off.

    python benchmarks/learning_by_heart.py cat-faces-64 --images 300

The product is trained on a few of the folder's images, once as it is and once in each other way that is named. Printed,
and drawn as `<output>/learning_by_heart.svg`, are the validation loss after every tenth of the steps, and how near the
samples of the run's grid come, in the mean, to the nearest training image and to the nearest of as many others (root
mean square of the difference of pixels from 0 to 1, at 32 pixels, mirrored or not): from where the first falls below
the second, they are copies.

Not cropped: images are mirrored, but no parts of them are shown. Not mirrored: neither. Decayed: not cropped, and
weights decay by 0.1. Half as wide: not cropped, and --dim is half as large.
"""

import argparse
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch.nn.functional import interpolate
from torchvision.io import read_image

from tinycats.images.image_folders import hold_out, images_named
from tinycats.run.summaries import parsed_metrics
from tinycats.showing.charts import line_chart

SCRIPT = Path(__file__).parents[1] / "src" / "train_dit.py"
HEAD = 32  # the width of an attention head
# What is done to the product before it trains, and what is changed of the options.
VARIANTS: dict[str, tuple[str, dict[str, float]]] = {
    "as it is": ("", {}),
    "not cropped": ("crops.PROBABILITY = 0", {}),
    "not mirrored": ("crops.PROBABILITY = 0; generator.training_transform = generator.validation_transform", {}),
    "decayed": ("crops.PROBABILITY = 0", {"weight_decay": 0.1}),
    "half as wide": ("crops.PROBABILITY = 0", {"dim": 0.5}),
}
TILE_BORDER = 2


def small(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float [B, D], from 0 to 1, at 32 pixels."""
    return interpolate(images.float() / 255, (32, 32), mode="area").flatten(1)


def nearest(samples: torch.Tensor, images: torch.Tensor) -> float:
    """The root mean square difference of each sample from the nearest image, mirrored or not; the mean of that."""
    either = torch.cat([small(images), small(images.flip(3))])
    return (torch.cdist(small(samples), either).min(1).values / small(samples).shape[1] ** 0.5).mean().item()


def tiles(grid: torch.Tensor, side: int) -> torch.Tensor:
    """The images of a grid of one row."""
    row = grid[:, TILE_BORDER : TILE_BORDER + side, TILE_BORDER:]
    return torch.stack([part[..., :side] for part in row.split(side + TILE_BORDER, 2) if part.shape[2] >= side])


def train(name: str, folder: Path, options: argparse.Namespace) -> Path:
    """The folder of the run."""
    patch, changed = VARIANTS[name]
    dim = round(options.dim * changed.get("dim", 1))
    settings = {
        "run": name.replace(" ", "-"),
        "image-size": options.image_size,
        "patch-size": options.patch_size,
        "dim": dim,
        "depth": options.depth,
        "heads": dim // HEAD,
        "batch-size": options.batch_size,
        "lr": options.lr,
        "steps": options.steps,
        "warmup-steps": options.steps // 50,
        "sample-every": max(1, options.steps // 20),
        "ema-beta": 0.998,
        "num-workers": 0,
        "seed": options.seed,
        "weight-decay": changed.get("weight_decay", 0.0),
    }
    words = ["train_dit.py", folder.name, *(f"--{option}={value}" for option, value in settings.items())]
    program = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = {words!r}
import train_dit
from tinycats import generator
from tinycats.models import crops
from tinycats.run.options import train_on_this_machine
{patch}
sys.exit(train_on_this_machine(train_dit.PARSER, train_dit.train))
"""
    subprocess.run([sys.executable, "-c", program], cwd=folder.parent, check=True, stdout=subprocess.DEVNULL)
    return folder.parent / "outputs" / "runs" / name.replace(" ", "-")


def main() -> None:
    """Train each variant, print its curve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--images", type=int, default=300, help="to train on; as many others are compared")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--patch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=1, help="variants that are trained at the same time")
    parser.add_argument("--output", type=Path, default=Path("outputs/learning_by_heart"))
    options = parser.parse_args()

    files = images_named([options.folder])
    validation, training = hold_out([str(path) for path in files])
    chosen, others = training[: options.images], training[options.images : 2 * options.images]
    few = options.output / "few"
    shutil.rmtree(options.output, ignore_errors=True)
    for split, paths in (("train", chosen), ("val", validation[: options.images])):
        (few / split / "cat").mkdir(parents=True)
        for path in paths:
            shutil.copy(path, few / split / "cat")
    seen, unseen = (torch.stack([read_image(path) for path in paths]) for paths in (chosen, others))
    with ThreadPoolExecutor(options.at_once) as pool:
        found = pool.map(lambda name: train(name, few, options), options.variants)
        runs = dict(zip(options.variants, found, strict=True))
    curves = {}
    for name, run in runs.items():
        rows = [row for row in parsed_metrics((run / "metrics.jsonl").read_bytes()) if "val_loss" in row]
        curves[name] = [(row["step"], row["val_loss"]) for row in rows]
        lowest = min(rows, key=lambda row: row["val_loss"])
        print(f"{name}: the validation loss is lowest at step {lowest['step']}: {lowest['val_loss']:.4f}")
        for row in rows[1::2]:
            grid = read_image(str(run / "samples" / f"step_{row['step']:07}.png"))
            samples = tiles(grid, options.image_size)
            near = f"nearest {nearest(samples, seen):.3f}, of others {nearest(samples, unseen):.3f}"
            print(f"  step {row['step']:6}  validation loss {row['val_loss']:.4f}  {near}", flush=True)
    (options.output / "learning_by_heart.svg").write_text(line_chart("Validation loss", curves))


if __name__ == "__main__":
    main()
