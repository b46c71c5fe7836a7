"""The short form of `make campaign`."""

import subprocess
import sys

import pytest

from conftest import REPOSITORY


@pytest.mark.slow
def test_whatever_happens_a_run_ends_the_same_or_is_refused_in_a_line():
    command = [sys.executable, REPOSITORY / "tests" / "campaign.py", "--short"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    rows = [line.split("|")[1:-1] for line in process.stdout.splitlines()[2:]]
    assert len(rows) == 9
    assert all(int(tried) == int(same) + int(refused) > 0 for _, tried, same, refused, _ in rows)
