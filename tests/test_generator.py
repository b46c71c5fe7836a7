"""The generator's images and its file."""

import pytest
import torch
from torch.nn.functional import unfold

from conftest import UNTRAINED, untrained_generator
from tinycats import generator
from tinycats.run import checkpoints
from tinycats.script.errors import UserError


@pytest.fixture
def exported(tmp_path):
    return untrained_generator(tmp_path / "tiny_dit.pt")


def test_bytes_become_numbers_from_minus_one_to_one_and_come_back():
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    assert generator.to_unit(images).min() == -1
    assert generator.to_unit(images).max() == 1
    assert torch.equal(generator.to_bytes(generator.to_unit(images)), images)


def test_the_same_seed_samples_the_same_images_in_batches_of_any_size(exported):
    loaded = generator.load(exported)
    names = ["black", "tabby", "tabby", "black", "black"]
    together = loaded.sample(names, seed=3, batch_size=5, steps=5)
    assert together.shape == (5, 3, 16, 16)
    alone = loaded.sample(names, seed=3, batch_size=1, steps=5)
    assert (together.int() - alone.int()).abs().max() <= 1
    assert not torch.equal(together, loaded.sample(names, seed=4, steps=5))
    some, more = generator.noise_of(range(2), 8, seed=1), generator.noise_of(range(5), 8, seed=1)
    first, second = next(some), next(some)
    assert not torch.equal(first, second)
    assert torch.equal(first, next(more)[:2])
    assert torch.equal(second, next(more)[:2])


def test_a_class_that_it_does_not_know_is_named(exported):
    with pytest.raises(UserError, match="no class 'lion'; there are black, tabby"):
        generator.load(exported).sample(["lion"])


def test_another_models_file_is_refused(tmp_path):
    checkpoints.save(tmp_path / "cats_model.pt", {"model": "classifier"})
    with pytest.raises(UserError, match="not a finished generator"):
        generator.load(tmp_path / "cats_model.pt")


def test_guidance_leads_away_from_the_guide_and_in_a_file_without_one_from_no_class(exported):
    loaded = generator.load(exported)
    led = loaded.sample(["tabby"], steps=5)
    contents = checkpoints.load(exported)
    for nothing in ({}, None):
        checkpoints.save(exported, contents | {"guide": nothing})
        without = generator.load(exported)
        assert without.guide is None
        assert not torch.equal(without.sample(["tabby"], steps=5), led)
    del contents["guide"]
    checkpoints.save(exported, contents)
    assert torch.equal(generator.load(exported).sample(["tabby"], steps=5), without.sample(["tabby"], steps=5))


def test_a_file_from_before_crops_were_told_samples_the_same(exported):
    expected = generator.load(exported).sample(["tabby"], steps=5)
    contents = checkpoints.load(exported)
    for weights in (contents["state_dict"], contents["guide"]):
        del weights["crop_embedder"]
    checkpoints.save(exported, contents)
    assert torch.equal(generator.load(exported).sample(["tabby"], steps=5), expected)


def test_a_file_from_before_patches_overlapped_and_queries_were_normalised_is_the_model_that_it_was(exported):
    contents = checkpoints.load(exported)
    patch_size = contents["shape"]["patch_size"]
    old = torch.randn(contents["shape"]["dim"], 3 * patch_size**2)
    for name in ("state_dict", "guide"):
        weights = {key: weight for key, weight in contents[name].items() if "_norm.weight" not in key}
        contents[name] = weights | {"x_embedder.weight": old.to(weights["x_embedder.weight"].dtype)}
    checkpoints.save(exported, contents)
    loaded = generator.load(exported)
    images = torch.randn(2, 3, 16, 16)
    expected = unfold(images, patch_size, stride=patch_size).mT @ old.T + loaded.model.x_embedder.bias
    assert torch.allclose(loaded.model.x_embedder(images), expected, atol=1e-4)
    assert isinstance(loaded.model.blocks[0].query_norm, torch.nn.Identity)
    assert loaded.sample(["tabby"], steps=5).shape == (1, 3, 16, 16)


def test_torch_reads_the_file_with_weights_only(exported):
    assert torch.load(exported, weights_only=True)["shape"] == UNTRAINED


def test_a_grid_has_a_row_a_class_and_is_always_the_same(exported):
    model = generator.load(exported).model
    grid = generator.sample_grid(model, 2, 16, guidance_scale=1.5, steps=5)
    assert grid.shape == (3, 2 * 18 + 2, generator.COLUMNS * 18 + 2)
    assert grid.dtype == torch.uint8
    assert torch.equal(grid, generator.sample_grid(model, 2, 16, guidance_scale=1.5, steps=5))
