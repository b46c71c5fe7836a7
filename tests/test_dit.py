"""TinyDiT: its patches, its positions, its first state."""

import pytest
import torch

from tinycats.models import dit
from tinycats.models.dit import Block, TinyDiT, patchify, unpatchify


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


def test_unpatchify_is_the_inverse_of_patchify():
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(unpatchify(patchify(images, 8), 8), images)
    assert torch.equal(patchify(images, 8)[:, 1], images[:, :, :8, 8:16].reshape(2, -1)), "row by row"


def test_the_default_has_about_34_million_parameters():
    assert sum(parameter.numel() for parameter in TinyDiT(13).parameters()) == pytest.approx(34e6, rel=0.03)


def test_at_first_a_block_is_the_identity_and_the_output_zero():
    block = small().blocks[0]
    tokens = torch.randn(2, 16, 32)
    assert torch.equal(block(tokens, torch.randn(2, 32)), tokens)
    model = small()
    assert not model(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])).any()


def test_on_a_cpu_that_computes_in_bf16_attention_is_in_single_precision(monkeypatch):
    """Seen to fail without `torch.autocast("cpu", enabled=False)`: autocast makes bf16 of what `.float()` made."""
    seen = []

    def attend(*arguments):
        mixed = torch.nn.functional.scaled_dot_product_attention(*arguments)
        seen.append(mixed.dtype)
        return mixed

    monkeypatch.setattr(dit, "scaled_dot_product_attention", attend)
    with torch.autocast("cpu", torch.bfloat16):
        small(depth=1)(torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1]))
    assert seen == [torch.float32]


def test_positions_matter():
    """Past failure 9: it had no position embedding. Seen to fail without `+ self.position`."""
    model = awake(small())
    patches = patchify(torch.randn(1, 3, 16, 16), 4)
    order = torch.randperm(16)
    arguments = torch.tensor([0.5]), torch.tensor([1])
    straight = patchify(model(unpatchify(patches, 4), *arguments), 4)
    shuffled = patchify(model(unpatchify(patches[:, order], 4), *arguments), 4)
    assert not torch.allclose(shuffled, straight[:, order], atol=1e-3)


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
