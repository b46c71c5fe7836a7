"""Files of tensors: a run's checkpoint, which must survive everything, and finished models.

A file is what `torch.save` writes, followed by a line with the SHA-256 of it. `torch.load` passes over the
line, so the files are ordinary; and a file that was cut off, or in which a bit has flipped, is known for what
it is before anything in it is believed.
"""

import io
import json
import logging
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from tinycats.run.durable_files import DamagedFile, DigestingWriter, atomic_write, publish_copy, read_whole
from tinycats.script.errors import UserError

log = logging.getLogger(__name__)

CHECKPOINT = "state.pt"
PREVIOUS_CHECKPOINT = "state.previous.pt"
CHECKPOINTS = (CHECKPOINT, PREVIOUS_CHECKPOINT)
FACTS = ".json"  # beside a finished model: what is known of it without torch


def save(path: Path, contents: dict[str, Any]) -> None:
    """Write `contents` (tensors, numbers, text and containers of them) to `path`: whole, synced, or not at all.

    Raises:
        OSError: the disk is full, the folder is not writable.
    """
    import torch

    with atomic_write(path) as file:
        digesting = DigestingWriter(file)
        torch.save(contents, cast(IO[bytes], digesting))  # all of a file that it uses
        file.write(digesting.footer())


def save_model(path: Path, contents: dict[str, Any]) -> None:
    """Write a finished model, and beside it, as JSON, all of it that is no tensor.

    Raises:
        UserError: it cannot be written.
    """
    try:
        save(path, contents)
        with atomic_write(path.with_suffix(FACTS)) as file:
            file.write((json.dumps(facts_in(contents), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; the run's checkpoint has the weights") from error


def facts_in(contents: Mapping[str, Any]) -> dict[str, Any]:
    """All of what a finished model's file holds that is no tensor."""
    return {name: value for name, value in contents.items() if name not in ("state_dict", "guide")}


def publish_model(path: Path, destination: Path) -> None:
    """Copy a run's finished model to where all runs put theirs; of two that do so at the same time one stays.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for suffix in (path.suffix, FACTS):
            publish_copy(path.with_suffix(suffix), destination.with_suffix(suffix))
    except OSError as error:
        raise UserError(f"cannot write {destination}: {error.strerror}; the model is {path}") from error


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, onto the CPU; runs no code that the file may hold.

    Raises:
        DamagedFile: it is not what `save` wrote.
        UserError: it cannot be read.
    """
    import torch

    try:
        payload = read_whole(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    try:
        return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise DamagedFile(f"{path} holds what no file of this program holds; it was not loaded") from error


def save_checkpoint(folder: Path, checkpoint: dict[str, Any]) -> None:
    """Write a run's checkpoint; the one before it is kept as the previous checkpoint.

    Raises:
        UserError: the disk is full or not writable; both old checkpoints are as they were.
    """
    path, newer = folder / CHECKPOINT, folder / "state.newer.pt"
    try:
        save(newer, checkpoint)
        # Between these two renames the run has no state.pt; whoever is killed there resumes from the previous.
        if path.exists():
            path.replace(folder / PREVIOUS_CHECKPOINT)
        newer.replace(path)
    except OSError as error:
        newer.unlink(missing_ok=True)
        raise UserError(f"cannot save {path}: {error.strerror}; the checkpoint saved before it is untouched") from error


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a run's checkpoint; if it is damaged, the one before it, saying so.

    Args:
        path: of the checkpoint; where it is the run's newest, the previous one beside it is the spare.

    Raises:
        UserError: there is none, or none is whole.
    """
    problem = UserError(f"{path} is not there")
    for candidate in [path] + ([path.with_name(PREVIOUS_CHECKPOINT)] if path.name == CHECKPOINT else []):
        if not candidate.exists():
            continue
        try:
            checkpoint = load(candidate)
            step = checkpoint["step"]
        except DamagedFile as error:
            problem = error
            log.warning("%s", error)
        except KeyError:
            problem = UserError(f"{candidate} is not a run's checkpoint")
        else:
            if candidate != path:
                log.warning("Going on from the checkpoint before it, %s (step %d)", candidate, step)
            return checkpoint
    raise problem


def has_checkpoint(folder: Path) -> bool:
    """Whether a run was ever saved in `folder`."""
    return any((folder / name).exists() for name in CHECKPOINTS)
