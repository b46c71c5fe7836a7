"""safetensors: a finished model as a folder that is ready for a hub: weights, `config.json`, and a model card.

The weights can be read by anything that reads safetensors, and hold no code; `src/tinycats` says what to do with them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from tinycats.run import checkpoints
from tinycats.run.durable_files import atomic_folder

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_GUIDE = "guide."  # before the names of its weights


def write(folder: Path, contents: Mapping[str, Any]) -> None:
    """Write what a finished model's file holds as a folder.

    Raises:
        OSError: it cannot be written.
    """
    tensors = {name: tensor.contiguous() for name, tensor in contents["state_dict"].items()}
    tensors |= {_GUIDE + name: tensor.contiguous() for name, tensor in (contents.get("guide") or {}).items()}
    facts = checkpoints.facts_in(contents)
    with atomic_folder(folder) as partial:
        (partial / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        (partial / CONFIG).write_text(json.dumps(facts, indent=1) + "\n")
        (partial / CARD).write_text(card(facts, tensors), encoding="utf-8")


def card(facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """The model card, as hubs expect it: YAML, then text."""
    is_classifier = facts["model"] == "classifier"
    task = "image-classification" if is_classifier else "unconditional-image-generation"
    what = (
        f"A {facts.get('backbone')} that says which of these classes a photo shows."
        if is_classifier
        else "TinyDiT, a class-conditional diffusion transformer that samples images of these classes."
    )
    use = (
        "softmax(logits / temperature) of an RGB image of `image_size`, scaled to [0, 1], less `mean`, over `std`."
        if is_classifier
        else f"Weights whose names begin with `{_GUIDE}` are those of the model that guidance leads away from."
    )
    parameters = sum(tensor.numel() for name, tensor in tensors.items() if not name.startswith(_GUIDE))
    metrics = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in facts["metrics"].items() if isinstance(value, int | float)
    )
    return f"""---
library_name: pytorch
pipeline_tag: {task}
tags: [cats]
---
# Cats: {task}

{what} {parameters / 1e6:.1f} million parameters, trained by tiny-cats-model.

Classes: {", ".join(facts["classes"])}.

| on images that it was not trained on | |
|---|---|
{metrics}

`{WEIGHTS}` has the weights, `{CONFIG}` all else. {use}
"""
