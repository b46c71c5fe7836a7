"""Tokens that learn to tell what a network sees: what is seen and where, what is asked, and that it is learned."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from tinycats import generator
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame
from tinycats.models.alignment import CHANNELS, Aligned, WhatIsSeen, misalignment, part_looked_at
from tinycats.models.dit import TinyDiT


@pytest.fixture(scope="module")
def images(small_toy, tmp_path_factory) -> torch.Tensor:
    dataset = open_dataset(small_toy, Frame(32, square=True), tmp_path_factory.mktemp("packed"))
    return torch.from_numpy(dataset.batch(np.arange(8))).permute(0, 3, 1, 2)


@pytest.mark.parametrize("side", [1, 3, 8, 10])
def test_there_is_something_seen_for_each_token_and_in_each_image_it_is_centred_and_scaled(images, side):
    seen, is_seen = WhatIsSeen(side, 1.0)(images)
    assert is_seen.all()
    assert seen.shape == (8, side**2, CHANNELS)
    assert seen.float().mean(1).abs().max() < 0.01
    assert side == 1 or seen.float().std(1, correction=0).median() == pytest.approx(1, abs=0.01)


def test_what_is_seen_lies_where_the_tokens_do(images):
    what_is_seen = WhatIsSeen(8, 1.0)
    seen = what_is_seen(images)[0].float().unflatten(1, (8, 8))
    for axis in (1, 2):
        turned = what_is_seen(images.flip(axis + 1))[0].float().unflatten(1, (8, 8))
        there, elsewhere = (cosine_similarity(turned, other, dim=3).mean() for other in (seen.flip(axis), seen))
        assert there > 0.1 + elsewhere


def test_an_image_is_looked_at_once_alone_and_always_or_never(images, monkeypatch):
    looks, look_at = [], WhatIsSeen._look_at

    def counted(self, image):
        looks.append(image)
        return look_at(self, image)

    monkeypatch.setattr(WhatIsSeen, "_look_at", counted)
    half = WhatIsSeen(4, 0.5)
    seen, is_seen = half(images)
    assert 0 < is_seen.sum() < 8
    assert (seen[~is_seen] == 0).all()
    assert len(looks) == is_seen.sum()
    for order in torch.arange(8).roll(3), torch.arange(8)[is_seen][-1:]:
        again, is_again = half(images[order])
        assert torch.equal(is_again, is_seen[order])
        assert torch.equal(again, seen[order])
    assert len(looks) == is_seen.sum(), "it remembers"
    alone, _ = WhatIsSeen(4, 0.5)(images[is_seen][-1:])
    assert torch.equal(alone[0], seen[is_seen][-1]), "what else is in the batch makes no difference"


def test_no_more_images_are_looked_at_than_are_remembered_and_pay():
    assert part_looked_at(shown=200, number_of_images=2400, side=8) == 1
    assert part_looked_at(shown=6, number_of_images=2400, side=8) == 0.25
    many = part_looked_at(shown=200, number_of_images=1_000_000, side=8)
    assert 2 * many * 1_000_000 * 64 * CHANNELS * 2 <= 2**29
    assert part_looked_at(shown=200, number_of_images=1_000_000, side=16) == pytest.approx(many / 4, rel=0.01)


def test_tokens_are_asked_for_the_direction_alone():
    seen = torch.randn(3, 4, CHANNELS)
    assert torch.allclose(misalignment(2 * seen, seen), torch.zeros(3), atol=1e-5)
    assert torch.allclose(misalignment(-seen, seen), torch.full((3,), 2.0))
    right_at_the_32nd_alone = torch.cat([-seen[..., :112], seen[..., 112:]], dim=2)
    assert torch.allclose(misalignment(right_at_the_32nd_alone, seen), torch.ones(3))


def test_tokens_learn_to_tell_what_is_seen(images):
    torch.manual_seed(0)
    model = TinyDiT(1, image_size=32, patch_size=8, dim=32, depth=3, heads=2)
    aligned = Aligned(model)
    inputs = generator.to_unit(images), torch.full((8,), 0.9), torch.zeros(8, dtype=torch.int64)
    predicted, told = aligned(*inputs)
    assert torch.equal(predicted, model(*inputs)), "what is predicted is as ever"
    seen, _ = WhatIsSeen(4, 1.0)(images)
    optimizer = torch.optim.AdamW(aligned.parameters(), lr=1e-2)
    for _ in range(60):
        error = misalignment(aligned(*inputs)[1], seen).mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert misalignment(told, seen).mean() > 0.9
    assert error < 0.5
    assert model.blocks[0].qkv.weight.grad is not None
    assert model.blocks[1].qkv.weight.grad is None, "the later blocks are not for this"
