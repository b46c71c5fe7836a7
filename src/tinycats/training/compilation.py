"""torch.compile (Ansel et al., ASPLOS 2024), where it works, with what it has compiled kept for the next container."""

import logging
from pathlib import Path

import torch

from tinycats.models import crops
from tinycats.models.dit import TinyDiT
from tinycats.run.durable_files import DamagedFile, atomic_write, footer, read_whole
from tinycats.script.errors import one_line
from tinycats.training.devices import Device

log = logging.getLogger(__name__)


def compile_if_possible(model: TinyDiT, device: Device, batch_size: int, cache: Path | None) -> bool:
    """Compile the model's forward and backward pass; where that fails it is left as it was, with a line in the log.

    Args:
        batch_size: images in a batch, for which it is done once here.
        cache: a file with what was compiled before, which is written if it is not there; None: torch's own folder.

    Returns:
        Whether the model is compiled.
    """
    if cache and cache.exists():
        try:
            torch.compiler.load_cache_artifacts(bytes(read_whole(cache)))
        except (DamagedFile, OSError, RuntimeError) as error:
            log.warning("Compiling from scratch: %s", one_line(str(error)))
            cache.unlink()  # so that it is written again
    size = model.image_size
    images = torch.zeros(batch_size, 3, size, size, device=device.device)
    timesteps = torch.zeros(batch_size, device=device.device)
    classes = torch.zeros(batch_size, dtype=torch.int64, device=device.device)
    cropped = torch.zeros(batch_size, crops.NUMBERS, device=device.device)
    # On a CPU, in bf16, what its patterns put in the place of attention takes five to ten times as long (ADR-029).
    compiled = torch.compile(model.with_tokens, options={"pattern_matcher": device.is_gpu})
    model.with_tokens = compiled  # type: ignore[method-assign]  # of this one model; `forward` calls it
    try:
        with device.autocast:
            predicted = model(images, timesteps, classes, cropped)
        predicted.float().mean().backward()
    except Exception as error:  # of the compiler's, the C compiler's, the driver's …
        del model.with_tokens
        reason = one_line(str(error).strip().partition("\n")[0])
        log.warning("Training without torch.compile, which failed with %s: %s", type(error).__name__, reason)
        return False
    finally:
        model.zero_grad(set_to_none=True)
    if cache and not cache.exists() and (artifacts := torch.compiler.save_cache_artifacts()):
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(cache) as file:
                file.write(artifacts[0])
                file.write(footer(artifacts[0]))
        except OSError as error:  # the disk is full: what is compiled serves this process all the same
            log.warning("What was compiled is not kept: %s", one_line(str(error)))
    return True
