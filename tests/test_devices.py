"""What a run computes on."""

import subprocess
import sys

import pytest
import torch

from conftest import REPOSITORY
from tinycats.script.errors import UserError
from tinycats.training import devices


def test_a_device_that_is_not_there_is_one_line():
    for name in ("cuda", "mps"):
        if getattr(torch, name).is_available():
            continue
        with pytest.raises(UserError, match=rf"--device {name}: .*--device cpu works without"):
            devices.choose(name, mixed_precision=True)


@pytest.mark.parametrize("instructions", [{}, {"avx512_f": True}, {"amx_bf16": True}, {"avx512_bf16": True}])
@pytest.mark.parametrize("mixed_precision", [False, True])
def test_a_cpu_computes_in_bf16_where_that_is_faster_and_in_single_precision_elsewhere(
    instructions, mixed_precision, monkeypatch
):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: instructions)
    device = devices.choose("cpu", mixed_precision)
    with device.autocast:
        has_bf16 = "amx_bf16" in instructions or "avx512_bf16" in instructions
        expected = torch.bfloat16 if has_bf16 and mixed_precision else torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
        assert (torch.ones(2, 2).double() @ torch.ones(2, 2).double()).dtype == torch.float64
    assert not device.is_gpu and not device.scaler.is_enabled()


def test_too_little_memory_is_one_line_that_says_what_to_do():
    with (
        pytest.raises(UserError, match=r"the GPU has not enough memory for --batch-size 64; try --accumulate 2"),
        devices.out_of_memory_is_told(64, "--accumulate 2"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate …")


MEMORY_REUSED = """
import resource, torch
from tinycats.training.devices import keep_memory

def pages_that_come_for_a_tensor(times):
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages_that_come_for_a_tensor(40))
keep_memory()
print(pages_that_come_for_a_tensor(40))
"""


def test_after_some_steps_a_cpu_uses_the_memory_of_tensors_again():
    words = [sys.executable, "-c", MEMORY_REUSED]
    printed = subprocess.run(words, cwd=REPOSITORY / "src", capture_output=True, text=True, check=True).stdout
    given_back, kept = map(int, printed.split())
    assert kept < given_back / 10
