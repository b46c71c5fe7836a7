"""What only CUDA can show; `make gpu` runs these, and benchmarks/gpu.py, on a machine that has it."""

import pytest
import torch

from tinycats.models.batch_norm import synchronised
from tinycats.run.saving import Writer
from tinycats.script.errors import UserError
from tinycats.training import devices, processes
from tinycats.training.optimization import adamw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here; see `make gpu`"),
]


def test_the_gpu_is_chosen_and_computes_in_what_it_is_fast_in():
    device = devices.choose("auto", mixed_precision=True)
    assert device.is_gpu
    is_fp16 = not torch.cuda.is_bf16_supported(including_emulation=False)
    assert device.scaler.is_enabled() == is_fp16
    with device.autocast:
        product = torch.ones(8, 8, device=device.device) @ torch.ones(8, 8, device=device.device)
    assert product.dtype == (torch.float16 if is_fp16 else torch.bfloat16)


def test_a_checkpoint_is_copied_to_pinned_memory_as_it_was():
    saved = []
    writer = Writer()
    weights = torch.randn(1000, 1000, device="cuda")
    expected = weights.cpu()
    writer.save(saved.append, {"step": 1, "weights": weights})
    weights.zero_()
    writer.wait()
    assert torch.equal(saved[0]["weights"], expected)
    assert saved[0]["weights"].is_pinned()
    writer.close()


def test_a_batch_that_does_not_fit_is_one_line():
    everything = torch.cuda.get_device_properties(0).total_memory
    with (
        pytest.raises(UserError, match="the GPU has not enough memory for --batch-size 7"),
        devices.out_of_memory_is_told(7, "less"),
    ):
        torch.empty(2 * everything, dtype=torch.uint8, device="cuda")


def test_batch_norms_are_torchs_and_the_optimizer_is_fused():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).cuda()
    assert isinstance(synchronised(model, torch.device("cuda"))[1], torch.nn.SyncBatchNorm)
    assert adamw(model, 1e-3, 0.0).param_groups[0]["fused"]
    assert processes.Processes().parallel(model, torch.device("cuda")) is model
