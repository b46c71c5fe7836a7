"""Files and folders that are whole or not there."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tinycats.run.durable_files import atomic_folder, atomic_write, publish_copy


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


def test_files_that_are_published_to_one_place_at_the_same_time_leave_one_of_them_whole(tmp_path):
    """Two runs that ended together took each other's half-written model away."""
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model").write_bytes(name.encode() * 5_000_000)

    def publish(name: str) -> None:
        for _ in range(5):
            publish_copy(tmp_path / name / "model", tmp_path / "model")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(publish, "ab"))
    assert (tmp_path / "model").read_bytes() in (b"a" * 5_000_000, b"b" * 5_000_000)
    assert len(list(tmp_path.rglob("*"))) == 5


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
