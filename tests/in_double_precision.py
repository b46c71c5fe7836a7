"""A training script in double precision, with a row in metrics.jsonl for each step.

In single precision AdamW makes large differences of the small ones between sums in another order.

    python tests/in_double_precision.py train.py data/toy …
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import torch

from tinycats.models import alignment, crops, perceptual_loss
from tinycats.run import options

crops.WORTH_CROPPING = 0  # of a generator's images in these short runs too
alignment.SIDE = perceptual_loss.SMALLEST = 64  # pixels: of more, a run takes three times as long in double precision
torch.set_default_dtype(torch.float64)
torch.Tensor.float = torch.Tensor.double
script = importlib.import_module(sys.argv[1].removesuffix(".py"))
script.LOG_EVERY = 1
del sys.argv[0]
sys.exit(options.train_on_this_machine(script.PARSER, script.train))
