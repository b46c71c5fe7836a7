"""Finished models: what the scripts that train call them, and which one a user means."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path, PurePath
from typing import TypeVar

from tinycats.run import checkpoints, runs
from tinycats.script.errors import UserError

CLASSIFIER, GENERATOR = "cats_model.pt", "tiny_dit.pt"
MODELS = {"train.py": CLASSIFIER, "train_dit.py": GENERATOR}
OUTPUT_DIR = Path("outputs")

_Model = TypeVar("_Model")


def path_of(named: str | None, name: str, output_dir: Path = OUTPUT_DIR) -> Path:
    """The file that `--model` means: a file (`….pt`), a run's folder, or a run's name; None: what was trained last.

    Args:
        name: CLASSIFIER or GENERATOR.
    """
    if named is None:
        return output_dir / name
    if named.endswith(".pt"):
        return Path(named)
    is_folder = len(Path(named).parts) > 1
    return (Path(named) if is_folder else runs.folder_of(output_dir, named)) / name


def require(path: Path) -> None:
    """Refuse a model that is not there.

    Raises:
        UserError: it is not.
    """
    if path.is_file():
        return
    if path.exists():
        raise UserError(f"{path} is no file")
    if checkpoints.has_checkpoint(path.parent):
        raise UserError(not_finished(path))
    raise UserError(missing(str(path)))


def loaded(load: Callable[[Path], _Model], path: Path) -> _Model:
    """The finished model of a file, as it is there now; read when it is asked for first, or has changed.

    Args:
        load: of `classifier` or `generator`.

    Raises:
        UserError: it is not there, or no model of that kind.
    """
    require(path)
    return _loaded(load, path, path.stat().st_mtime_ns)


@lru_cache(maxsize=2)  # a classifier and a generator
def _loaded(load: Callable[[Path], _Model], path: Path, _changed: int) -> _Model:
    return load(path)


def missing(model: str) -> str:
    """What to say to who names a model that is not there, or none."""
    return f"{model} is not there: train one first, or name another by --model"


def not_finished(path: PurePath) -> str:
    """What to say to who names a run that has no finished model."""
    return f"the run {path.parent.name} is not finished: there is no {path.name} in its folder yet"


def require_classes(names: Iterable[str], classes: Sequence[str]) -> None:
    """Refuse names of classes that a model does not know.

    Raises:
        UserError: there is one.
    """
    if unknown := sorted(set(names) - set(classes)):
        raise UserError(f"there is no class {unknown[0]!r}; there are {', '.join(classes)}")
