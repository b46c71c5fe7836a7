"""report.html: what a finished run was, in one file that can be mailed; nothing in it comes from elsewhere."""

import base64
import html
import io
import platform
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tinycats.images.packed_images import PackedImages
from tinycats.models.sliced_wasserstein import pyramid_distances
from tinycats.run.durable_files import atomic_write
from tinycats.showing import charts

MISTAKES = 16  # that are shown
THUMBNAIL = 112  # pixels
GRIDS = 5  # over time
NEIGHBOURS = 8  # samples that are shown beside the nearest training image
COMPARED_SIDE = 32  # pixels, at which nearness is judged
MOST_COMPARED = 20_000  # training images
_STYLE = """
:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse;font-size:.9rem}td,th{padding:.2rem .5rem;border:1px solid #8886;text-align:left}
td.number{text-align:right;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
.row{display:flex;flex-wrap:wrap;gap:1rem}figure{margin:0;max-width:100%}figcaption{font-size:.85rem;max-width:15rem}
img{image-rendering:pixelated;max-width:100%}code{overflow-wrap:anywhere}.charts svg{width:100%;max-width:40rem}
"""


def write(
    path: Path,
    run: str,
    command: str,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    sections: Iterable[str],
) -> None:
    """Write the report.

    Args:
        command: which makes the same run.
        facts: what else is to be known, in words, by its name.
        metrics: the rows of metrics.jsonl.
        sections: HTML, of `mistakes` and the like.

    Raises:
        OSError: it cannot be written.
    """
    versions = {name: version(name) for name in ("torch", "torchvision", "numpy", "pillow")}
    told = {**facts, "Python": platform.python_version(), **versions}
    charted = "".join(f"<figure>{svg}</figure>" for svg in charts.curves(metrics).values())
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(run)}</title><style>{_STYLE}</style>
<h1>{html.escape(run)}</h1>
<p><code>{html.escape(command)}</code></p>
{"".join(sections)}
<h2>Curves</h2><div class="charts">{charted}</div>
<h2>The run</h2>{_table(told.items())}
<h2>Options</h2>{_table(sorted(options.items()))}
</html>
"""
    with atomic_write(path) as file:
        file.write(page.encode("utf-8", "replace"))


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{html.escape(name)}<td>{html.escape(str(value))}" for name, value in rows)
    return f'<div class="scroll"><table>{cells}</table></div>'


def _figure(image: np.ndarray, width: int, text: str, kind: str = "jpeg") -> str:
    """An image, uint8 [H, W, 3], with what is under it, which is its alternative text, too."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, quality=88)
    data = base64.b64encode(file.getvalue()).decode()
    told = html.escape(text)
    source = f"data:image/{kind};base64,{data}"
    return f'<figure><img src="{source}" width="{width}" alt="{told}"><figcaption>{told}</figcaption></figure>'


# --- the classifier ----------------------------------------------------------------------------------------------


def worst_mistakes(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> list[list[float]]:
    """Of the images that are taken for another class those for which that was most surely said.

    Args:
        logits: float [N, C].
        labels: int64 [N].

    Returns:
        (number of the image, label, what it is taken for, the probability) of each; plain numbers.
    """
    probability, answers = (logits / temperature).softmax(1).max(1)
    wrong = (answers != labels).nonzero()[:, 0]
    worst = wrong[probability[wrong].argsort(descending=True, stable=True)][:MISTAKES]
    return [[int(n), int(labels[n]), int(answers[n]), float(probability[n])] for n in worst]


def confusion(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """The confusion matrix, and the part of each class that is right, as a table."""
    head = "".join(f"<th>{html.escape(name)}" for name in classes)
    rows = []
    for number, (name, counts) in enumerate(zip(classes, matrix, strict=True)):
        total = sum(counts) or 1
        cells = "".join(
            f'<td class="number" style="background:rgba({"0,114,178" if place == number else "213,94,0"},'
            f'{0.7 * count / total:.2f})">{count}'
            for place, count in enumerate(counts)
        )
        rows.append(f'<tr><th>{html.escape(name)}<td class="number">{counts[number] / total:.1%}{cells}')
    return (
        "<h2>What is taken for what</h2><p>A row for each class of the validation images: how many of them are right, "
        "and what they are taken for.</p>"
        f'<div class="scroll"><table><tr><th><th>right{head}{"".join(rows)}</table></div>'
    )


def mistakes(worst: Sequence[Sequence[float]], dataset: PackedImages) -> str:
    """The mistakes that were most surely made, as thumbnails."""
    figures = []
    for number, label, answer, probability in worst:
        index = dataset.indices("val")[int(number)]
        image = Image.fromarray(np.ascontiguousarray(dataset[index]))
        image.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
        names = dataset.classes[int(label)], dataset.classes[int(answer)]
        text = f"{names[0]}, taken for {names[1]} ({probability:.0%}): {dataset.path(index)}"
        figures.append(_figure(np.asarray(image), THUMBNAIL, text))
    none = "" if figures else "<p>None: every validation image is right."
    return f'<h2>The worst mistakes</h2>{none}<div class="row">{"".join(figures)}</div>'


# --- the generator -----------------------------------------------------------------------------------------------


def grids(folder: Path) -> str:
    """The grids of samples in a folder, some of them, over time."""
    paths = sorted(folder.glob("step_*.png"))
    chosen = sorted({round(number * (len(paths) - 1) / max(1, GRIDS - 1)) for number in range(GRIDS)} if paths else [])
    figures = []
    for place in chosen:
        with Image.open(paths[place]) as image:
            pixels = np.asarray(image.convert("RGB"))
        step = int(paths[place].stem.removeprefix("step_"))
        figures.append(_figure(pixels, pixels.shape[1], f"Samples after step {step}"))
    return f"<h2>Samples over time</h2>{''.join(figures)}"


def distances(samples: torch.Tensor, dataset: PackedImages) -> str:
    """The sliced Wasserstein distance of samples, uint8 [B, 3, S, S], from validation images, beside that of other
    validation images from those, as far as there are enough."""
    validation = dataset.indices("val")
    count = min(len(samples), len(validation))
    step = len(validation) // count
    places = [np.arange(validation.start + first, validation.stop, max(1, step))[:count] for first in (0, step // 2)]
    real, others = (torch.from_numpy(np.stack(list(dataset.batch(place)))).permute(0, 3, 1, 2) for place in places)
    rows = {f"{count} samples": pyramid_distances(samples[:count], real)}
    if step > 1:
        rows[f"{count} other images"] = pyramid_distances(others, real)
    head = "".join(f"<th>{side} px" for side in next(iter(rows.values())))
    body = "".join(
        f"<tr><th>{name}" + "".join(f'<td class="number">{value:.1f}' for value in found.values())
        for name, found in rows.items()
    )
    return (
        f"<h2>The distance to {count} validation images</h2><p>Sliced Wasserstein distance, times 1000, by the size at "
        "which the images are looked at. Of so few it is a rough measure.</p>"
        f'<div class="scroll"><table><tr><th>{head}{body}</table></div>'
    )


def neighbours(samples: torch.Tensor, names: Sequence[str], dataset: PackedImages) -> str:
    """Some samples, uint8 [B, 3, S, S], each beside the training image that is nearest to it, mirrored or not: is it
    learned by heart?"""
    training = dataset.indices("train")[:MOST_COMPARED]
    samples = samples[:NEIGHBOURS]
    wanted = _small(samples)
    nearest = torch.full((len(samples),), torch.inf)
    found = torch.zeros(len(samples), dtype=torch.int64)
    for first in range(0, len(training), 256):
        block = np.asarray(training[first : first + 256])
        images = torch.from_numpy(np.stack(list(dataset.batch(block)))).permute(0, 3, 1, 2)
        either = torch.stack([_small(images), _small(images.flip(3))])
        distance, place = torch.cdist(wanted.expand(2, -1, -1), either).amin(0).min(1)
        found = torch.where(distance < nearest, torch.from_numpy(block)[place], found)
        nearest = torch.minimum(nearest, distance)
    side = max(samples.shape[-1], THUMBNAIL)
    figures = []
    for sample, name, index in zip(samples, names, found.tolist(), strict=False):
        pair = np.concatenate([sample.permute(1, 2, 0).numpy(), np.asarray(dataset[index])], axis=1)
        figures.append(_figure(pair, 2 * side, f"{name}, and the nearest: {dataset.path(index)}", "png"))
    compared = f"{len(training)} training images at {COMPARED_SIDE} pixels"
    return (
        f"<h2>Samples, and the nearest training image to each</h2><p>By pixels, among {compared}.</p>"
        f'<div class="row">{"".join(figures)}</div>'
    )


def _small(images: torch.Tensor) -> torch.Tensor:
    side = min(COMPARED_SIDE, images.shape[-1])
    return torch.nn.functional.interpolate(images.float(), (side, side), mode="area").flatten(1)
