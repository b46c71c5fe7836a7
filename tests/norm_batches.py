"""One of the processes of a test: its share of a batch through the batch norm of all of them, forward and backward.

python tests/norm_batches.py <file with images, upstream gradients and the norm's state> <file for what comes out>
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch
from torch import nn

from tinycats.models.batch_norm import synchronised
from tinycats.training.processes import joined

with joined() as processes:
    given = torch.load(sys.argv[1])
    share = processes.share(len(given["images"]))
    norm = nn.BatchNorm2d(given["images"].shape[1]).double()
    norm.load_state_dict(given["state"])
    norm = synchronised(nn.Sequential(norm), torch.device("cpu"))
    images = given["images"][share].requires_grad_()
    outputs = norm(images)
    outputs.backward(given["upstream"][share])
    for parameter in norm.parameters():
        processes.sum(parameter.grad)
    mixed = synchronised(nn.Sequential(nn.BatchNorm2d(images.shape[1])), torch.device("cpu"))
    in_bf16 = processes.gather(mixed(given["images"][share].bfloat16()).detach())
    gathered = processes.gather((outputs.detach(), images.grad))
    if processes.is_main:
        norm.eval()
        torch.save(
            {
                "outputs": torch.cat([output for output, _ in gathered]),
                "images.grad": torch.cat([gradient for _, gradient in gathered]),
                "parameters.grad": [parameter.grad for parameter in norm.parameters()],
                "state": norm[0].state_dict(),
                "in bf16": torch.cat(in_bf16),
                "bf16's mean": mixed[0].running_mean,
                "in evaluation": norm(given["images"]).detach(),
            },
            sys.argv[2],
        )
