"""Where the seconds before the first step go."""

import re
import time

import torch

from tinycats.run.runs import log_to_stdout
from tinycats.script.startup import Startup


def test_each_phase_has_its_seconds_and_they_are_told_once(capsys):
    log_to_stdout()
    startup = Startup()
    time.sleep(0.2)
    startup.ended("imports")
    for _ in range(3):
        startup.first_step(torch.tensor(1.0))
    (line,) = capsys.readouterr().out.splitlines()
    told = re.search(r"seconds until the first step was done: start [\d.]+, imports ([\d.]+), first step [\d.]+$", line)
    assert float(told[1]) >= 0.2
