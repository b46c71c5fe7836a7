"""ONNX: a finished model as a graph that ONNX Runtime computes, without torch and without this program.

What a graph expects and gives is in its metadata, too, as JSON: `classes`, and all else that the model's file knows.
"""

import io
import json
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tinycats import classifier
from tinycats.classifier import Classifier
from tinycats.generator import Generator
from tinycats.models.flow_matching import CHURN, CHURN_END, END, guidance_begins, guided, implied_velocity

OPSET = 18


class _Probabilities(nn.Module):
    """uint8 [B, 3, H, W], H and W the model's image size -> float32 [B, C]: the probability of each class."""

    def __init__(self, finished: Classifier):
        super().__init__()
        self.model, self.temperature = finished.model, finished.temperature
        self.mean, self.std = (
            nn.Buffer(255 * torch.tensor(values).view(1, 3, 1, 1)) for values in (classifier.MEAN, classifier.STD)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (self.model((images.float() - self.mean) / self.std) / self.temperature).softmax(1)


class _GuidedVelocity(nn.Module):
    """The velocity that `flow_matching.sample` follows: points float32 [B, 3, S, S], timestep float32 [], classes int64
    [B], guidance_scale float32 [] -> float32 [B, 3, S, S]."""

    def __init__(self, finished: Generator):
        super().__init__()
        self.model, self.guide = finished.model, finished.guide or finished.model

    def forward(
        self, points: torch.Tensor, timestep: torch.Tensor, classes: torch.Tensor, guidance_scale: torch.Tensor
    ) -> torch.Tensor:
        now = timestep.expand(points.shape[0])
        predicted = self.model(points, now, classes)
        away_from = self.guide(points, now, torch.full_like(classes, self.model.null_class))
        return implied_velocity(points, guided(predicted, away_from, guidance_scale), now)


def of_classifier(finished: Classifier, facts: Mapping[str, Any]) -> bytes:
    """An ONNX file: `images`, uint8 [batch, 3, size, size], RGB, a photo's middle -> `probabilities`, float32 [batch,
    classes], the likeliest not first but in the order of `classes`. Normalisation and calibration are in the graph."""
    size = finished.image_size
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    return _exported(_Probabilities(finished), {"images": images}, "probabilities", ["images"], facts)


def of_generator(finished: Generator, facts: Mapping[str, Any]) -> bytes:
    """An ONNX file: what a step of sampling needs, the `velocity` of `points` at a `timestep` from 0 (noise) to 1
    (images in [-1, 1]), of `classes`, with a `guidance_scale`, of 1 at most before the metadata's `guided_from` and in
    the last step. Its `end` is that of `flow_matching.step_timesteps`, `churn` and `churn_end` are those of its
    `overshoots`."""
    size = finished.model.image_size
    inputs = {
        "points": torch.zeros(2, 3, size, size),
        "timestep": torch.tensor(0.5),
        "classes": torch.zeros(2, dtype=torch.int64),
        "guidance_scale": torch.tensor(finished.guidance_scale),
    }
    facts = {**facts, "guided_from": guidance_begins(size), "end": END, "churn": CHURN, "churn_end": CHURN_END}
    return _exported(_GuidedVelocity(finished), inputs, "velocity", ["points", "classes"], facts)


def _exported(
    model: nn.Module, inputs: dict[str, torch.Tensor], output: str, batched: list[str], facts: Mapping[str, Any]
) -> bytes:
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter's about itself
        program = torch.onnx.export(
            model.eval(),
            kwargs=inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes={name: {0: batch} if name in batched else None for name in inputs},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for name, value in facts.items():
        proto.metadata_props.add(key=name, value=value if isinstance(value, str) else json.dumps(value))
    file = io.BytesIO()
    file.write(proto.SerializeToString())
    return file.getvalue()
