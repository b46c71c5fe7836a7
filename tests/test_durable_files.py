"""Files and folders that are whole or not there."""

import pytest

from tinycats.durable_files import atomic_folder, atomic_write


def test_a_file_that_fails_halfway_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_process_left_is_overwritten(tmp_path):
    (tmp_path / ".file.partial").write_bytes(b"a much longer leftover than what comes now")
    with atomic_write(tmp_path / "file") as file:
        file.write(b"new")
    assert [(entry.name, entry.read_bytes()) for entry in tmp_path.iterdir()] == [("file", b"new")]


def test_a_folder_that_fails_halfway_is_not_there(tmp_path):
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as partial:
        (partial / "file").write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_of_two_who_prepare_the_same_folder_the_first_is_kept(tmp_path):
    with atomic_folder(tmp_path / "folder") as mine:
        (mine / "file").write_bytes(b"mine")
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "file").write_bytes(b"theirs")
    assert (tmp_path / "folder" / "file").read_bytes() == b"theirs"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
