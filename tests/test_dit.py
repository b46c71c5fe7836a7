"""TinyDiT: its patches, its positions, its first state."""

import pytest
import torch
from torch.nn.functional import pad, scaled_dot_product_attention, unfold

from tinycats.models import dit
from tinycats.models.dit import Block, PatchEmbedder, TinyDiT, unpatchify


def small(**options) -> TinyDiT:
    torch.manual_seed(0)
    return TinyDiT(
        **({"num_classes": 3, "image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 2} | options)
    )


def awake(model: TinyDiT) -> TinyDiT:
    """As if it had learned something: at first its output is zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """What `unpatchify` is the inverse of."""
    return unfold(images, patch_size, stride=patch_size).mT


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)
    assert torch.equal(patchify(images, 8)[:, 1], images[:, :, :8, 8:16].reshape(2, -1)), "row by row"


@pytest.mark.parametrize("patch_size", [1, 3, 4])
def test_a_token_is_made_of_its_patch_and_the_halves_around_it(patch_size):
    images = torch.randn(1, 3, 5 * patch_size, 5 * patch_size, requires_grad=True)
    tokens = PatchEmbedder(patch_size, 8)(images)
    assert tokens.shape == (1, 25, 8)
    tokens[0, 12].sum().backward()  # the middle one, in the third row and column
    seen, around = images.grad[0].abs().sum(0) > 0, patch_size // 2
    expected = torch.zeros_like(seen)
    window = slice(2 * patch_size - around, 3 * patch_size + around)
    expected[window, window] = True
    assert torch.equal(seen, expected)


def test_tokens_are_those_of_a_convolution():
    images, embedder = torch.randn(2, 3, 12, 12), PatchEmbedder(4, 8)
    torch.nn.init.normal_(embedder.bias)
    expected = torch.nn.Conv2d.forward(embedder, images).flatten(2).mT
    assert torch.allclose(embedder(images), expected, atol=1e-5)


def test_the_default_has_about_35_million_parameters():
    assert sum(parameter.numel() for parameter in TinyDiT(13).parameters()) == pytest.approx(35e6, rel=0.03)


def test_at_first_a_block_is_the_identity_and_the_output_zero():
    block = small().blocks[0]
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)
    model = small()
    assert not model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])).any()


@pytest.mark.parametrize("few", [dit.FEW_TOKENS, 0])
def test_on_a_cpu_attention_in_bf16_is_attention(monkeypatch, few):
    """Of few tokens, whose weights it writes out, and of many, which it asks torch for in single precision."""
    monkeypatch.setattr(dit, "FEW_TOKENS", few)
    query, key, value = torch.randn(3, 2, 4, 16, 8).bfloat16()
    expected = scaled_dot_product_attention(query.float(), key.float(), value.float())
    assert (dit._attention_in_bf16(query, key, value) - expected).abs().max() < 0.05


def test_on_a_cpu_that_computes_in_bf16_attention_among_many_is_in_single_precision(monkeypatch):
    """Seen to fail without `torch.autocast("cpu", enabled=False)`: autocast makes bf16 of what `.float()` made."""
    seen = []

    def attend(*arguments):
        mixed = scaled_dot_product_attention(*arguments)
        seen.append(mixed.dtype)
        return mixed

    monkeypatch.setattr(dit, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(dit, "FEW_TOKENS", 0)
    with torch.autocast("cpu", torch.bfloat16):
        small(depth=1)(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1]))
    assert seen == [torch.float32]


def test_how_long_queries_and_keys_are_does_not_matter():
    """Seen to fail with `qk_norm=False`."""
    block, tokens = Block(32, 2), torch.randn(1, 16, 32)
    expected = block.attention(tokens)
    with torch.no_grad():
        block.qkv.weight[:64] *= 7  # of queries and keys
        block.qkv.bias[:64] *= 7
    assert torch.allclose(block.attention(tokens), expected, atol=1e-5)


def test_positions_matter():
    """Past failure 9: it had no position embedding. Seen to fail without `+ self.position`."""
    model = awake(small())
    with torch.no_grad():
        # What a patch sees or draws of its neighbours tells where it is, too: here it has none.
        for convolution, side in (
            (model.x_embedder, 4),
            (model.final_layer.smoothing, 1),
            (model.final_layer.to_rgb, 1),
        ):
            around = (convolution.kernel_size[0] - side) // 2
            convolution.weight *= pad(torch.ones(side, side), [around] * 4)
    patches = patchify(torch.randn(1, 3, 16, 16), 4)
    order = torch.randperm(16)
    arguments = torch.tensor([0.5]), torch.tensor([1])

    def is_shuffled_alike() -> bool:
        straight = patchify(model(unpatchify(patches, 4), *arguments), 4)
        shuffled = patchify(model(unpatchify(patches[:, order], 4), *arguments), 4)
        return torch.allclose(shuffled, straight[:, order], atol=1e-3)

    assert not is_shuffled_alike()
    model.position.zero_()
    assert is_shuffled_alike()


def test_time_and_class_matter():
    model = awake(small())
    image = torch.randn(1, 3, 16, 16)
    outputs = [
        model(image, torch.tensor([time]), torch.tensor([name]))
        for time, name in ((0.2, 0), (0.8, 0), (0.2, 1), (0.2, model.null_class))
    ]
    for index, output in enumerate(outputs):
        assert all(not torch.allclose(output, other) for other in outputs[:index])


def test_without_a_word_about_crops_there_were_none():
    model = awake(small())
    given = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    assert torch.equal(model(*given, torch.zeros(2, 3)), model(*given))
    assert not torch.allclose(model(*given, torch.tensor([[1.0, 0.5, 0.0]] * 2)), model(*given))


def test_every_parameter_learns():
    model = awake(small())
    model(
        torch.randn(4, 3, 16, 16), torch.rand(4), torch.tensor([0, 1, 2, 3]), torch.randn(4, 3)
    ).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_a_block_attends_to_all_patches():
    torch.manual_seed(0)
    block = Block(32, 2)
    torch.nn.init.normal_(block.adaLN_modulation[-1].weight)
    tokens, condition = torch.randn(1, 16, 32, requires_grad=True), torch.randn(1, 32)
    block(tokens, condition)[0, 0].sum().backward()
    assert (tokens.grad[0].abs().sum(1) > 0).all()
