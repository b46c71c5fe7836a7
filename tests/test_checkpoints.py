"""Checkpoints that survive: whole, checked, and never a program in disguise."""

import io
import os
import random
import subprocess
import sys

import pytest
import torch

from tinycats.run import checkpoints
from tinycats.run.checkpoints import DamagedFile
from tinycats.script.errors import UserError


def checkpoint(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "weights": torch.randn(500, generator=generator), "metrics": [{"loss": 0.5}], "best": None}


def test_what_was_saved_is_loaded_and_torch_can_read_it_too(tmp_path):
    checkpoints.save(tmp_path / "file.pt", checkpoint(3))
    for loaded in (checkpoints.load(tmp_path / "file.pt"), torch.load(tmp_path / "file.pt", weights_only=True)):
        assert loaded["step"] == 3
        assert torch.equal(loaded["weights"], checkpoint(3)["weights"])


def test_a_single_flipped_bit_anywhere_is_noticed(tmp_path):
    path = tmp_path / "file.pt"
    checkpoints.save(path, checkpoint(1))
    whole = path.read_bytes()
    rng = random.Random(0)
    for position in [0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(100))]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            checkpoints.load(path)


def test_a_file_cut_off_anywhere_is_noticed(tmp_path):
    path = tmp_path / "file.pt"
    checkpoints.save(path, checkpoint(1))
    whole = path.read_bytes()
    for length in (0, 1, 80, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedFile):
            checkpoints.load(path)


def test_a_damaged_state_is_reported_and_passed_over_for_the_previous(tmp_path, capsys):
    from tinycats.run.runs import log_to_stdout

    log_to_stdout()
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))
    checkpoints.save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / checkpoints.CHECKPOINT
    assert checkpoints.load_checkpoint(path)["step"] == 2
    path.write_bytes(path.read_bytes()[:-1])
    assert checkpoints.load_checkpoint(path)["step"] == 1
    output = capsys.readouterr().out
    assert "state.pt is cut off" in output
    assert "Going on from the checkpoint before it" in output

    (tmp_path / checkpoints.PREVIOUS_CHECKPOINT).write_bytes(b"also broken")
    with pytest.raises(DamagedFile):
        checkpoints.load_checkpoint(path)


def test_killed_between_the_two_renames_the_previous_state_is_found(tmp_path):
    checkpoints.save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / checkpoints.CHECKPOINT).rename(tmp_path / checkpoints.PREVIOUS_CHECKPOINT)
    assert checkpoints.has_checkpoint(tmp_path)
    assert checkpoints.load_checkpoint(tmp_path / checkpoints.CHECKPOINT)["step"] == 1


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_bomb_does_not_go_off_even_with_a_right_digest(tmp_path):
    buffer = io.BytesIO()
    torch.save({"step": Bomb(str(tmp_path / "boom"))}, buffer)
    (tmp_path / "raw.pt").write_bytes(buffer.getvalue())
    checkpoints.save(tmp_path / "sealed.pt", {"step": Bomb(str(tmp_path / "boom"))})
    for name in ("raw.pt", "sealed.pt"):
        with pytest.raises(DamagedFile):
            checkpoints.load(tmp_path / name)
    assert not (tmp_path / "boom").exists()


def test_a_finished_model_is_no_state(tmp_path):
    checkpoints.save(tmp_path / "cats_model.pt", {"model": "classifier"})
    with pytest.raises(UserError, match="is not a run's checkpoint"):
        checkpoints.load_checkpoint(tmp_path / "cats_model.pt")


def test_a_full_disk_leaves_both_old_states_and_no_half_written_one(tmp_path):
    # The limit on a file's size is the one full disk that every machine can have.
    program = f"""
import resource, sys
sys.path.insert(0, {str(checkpoints.__file__).rsplit("/", 3)[0]!r})
from pathlib import Path
import torch
from tinycats.run import checkpoints
from tinycats.script.errors import UserError
folder = Path({str(tmp_path)!r})
for step in (1, 2):
    checkpoints.save_checkpoint(folder, {{"step": step, "weights": torch.zeros(100_000)}})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    checkpoints.save_checkpoint(folder, {{"step": 3, "weights": torch.zeros(100_000)}})
except UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "cannot save" in result.stdout
    assert "File too large" in result.stdout
    assert checkpoints.load_checkpoint(tmp_path / checkpoints.CHECKPOINT)["step"] == 2
    assert checkpoints.load(tmp_path / checkpoints.PREVIOUS_CHECKPOINT)["step"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [checkpoints.PREVIOUS_CHECKPOINT, checkpoints.CHECKPOINT]
