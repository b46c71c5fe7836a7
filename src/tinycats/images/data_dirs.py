"""What a user may call the data: `data/cats`, `data/toy`, or any folder that is there."""

from pathlib import Path

CATS = Path("data/cats")  # the Oxford-IIIT Pet dataset, from data/download.sh
TOY = Path("data/toy")  # drawn on demand


def is_cats(data_dir: Path) -> bool:
    """Whether this is the Oxford-IIIT Pet data, wherever the folder `data` lies."""
    return data_dir.parts[-2:] == CATS.parts


def is_toy(data_dir: Path) -> bool:
    """Whether this is the built-in toy data, wherever the folder `data` lies."""
    return data_dir.parts[-2:] == TOY.parts


def problem_with(data_dir: Path) -> str | None:
    """Why a path given by the user cannot be trained on, in a line; None if it can."""
    if data_dir.is_dir() or (is_toy(data_dir) and not data_dir.exists()):
        return None
    if data_dir.exists():
        return f"{data_dir} is not a folder"
    remedy = "bash data/download.sh downloads it" if is_cats(data_dir) else "data/toy is always there to try"
    return f"{data_dir} is not there; {remedy}"
