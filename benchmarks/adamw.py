"""A step of AdamW over TinyDiT's weights at their default size: fused, against one tensor after another.

python benchmarks/adamw.py
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from tinycats.models.dit import TinyDiT
from tinycats.training.optimization import adamw

ROUNDS = 15


def main() -> None:
    """Measure and print."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = TinyDiT(13).to(device)
    optimizers = {"fused": adamw(model, 1e-4, 0.0), "plain": adamw(model, 1e-4, 0.0)}
    for group in optimizers["plain"].param_groups:
        group["fused"] = None
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(ROUNDS):
        for name, optimizer in optimizers.items():
            began = time.perf_counter()
            optimizer.step()
            next(model.parameters()).sum().item()  # waits for a GPU
            seconds[name].append(time.perf_counter() - began)
    fused, plain = (statistics.median(seconds[name][1:]) for name in ("fused", "plain"))
    print(f"plain {1000 * plain:.0f} ms, fused {1000 * fused:.0f} ms a step: {plain / fused:.1f}x")


if __name__ == "__main__":
    main()
