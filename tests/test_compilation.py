"""torch.compile where it works, and one line where it does not."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tinycats.models.dit import TinyDiT
from tinycats.run.durable_files import read_whole
from tinycats.run.runs import log_to_stdout
from tinycats.training import devices
from tinycats.training.compilation import compile_if_possible


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()
    torch.manual_seed(0)
    model = TinyDiT(3, image_size=8, patch_size=4, dim=16, depth=1, heads=1)
    torch.nn.init.normal_(model.final_layer.to_rgb.weight)
    yield model
    torch.compiler.reset()


def outputs(model: TinyDiT) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    images, timesteps = torch.randn(2, 3, 8, 8, generator=rng), torch.rand(2, generator=rng)
    return model(images, timesteps, torch.tensor([0, 3]))


@pytest.mark.slow
def test_a_compiled_model_computes_the_same_and_what_was_compiled_is_kept(model, tmp_path, capsys):
    log_to_stdout()
    expected, state = outputs(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache = tmp_path / "volume" / "compiled"
    device = devices.choose("cpu", mixed_precision=False)
    assert compile_if_possible(model, device, 2, cache)
    assert torch.allclose(outputs(model), expected, atol=1e-5)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items()), "nothing is trained"
    assert all(parameter.grad is None for parameter in model.parameters())
    whole = cache.read_bytes()
    assert len(whole) > 1000

    cache.write_bytes(whole[:-9])
    del model.with_tokens
    assert compile_if_possible(model, device, 2, cache)
    assert "Compiling from scratch: " in capsys.readouterr().out
    assert len(read_whole(cache)) > 1000, "it is written again"


def test_what_cannot_be_kept_is_a_line_and_not_the_end_of_the_run(model, tmp_path, capsys, monkeypatch):
    """A full disk, say. What is compiled and how is of no concern here."""
    log_to_stdout()
    monkeypatch.setattr("torch.compile", lambda forward, **_: forward)
    monkeypatch.setattr("torch.compiler.save_cache_artifacts", lambda: (b"compiled", None))
    (tmp_path / "volume").write_text("no folder")
    assert compile_if_possible(model, devices.choose("cpu", mixed_precision=False), 2, tmp_path / "volume" / "compiled")
    assert "What was compiled is not kept: " in capsys.readouterr().out


@pytest.fixture
def handed_to_the_compiler() -> Iterator[list[torch.fx.Graph]]:
    """What a C++ compiler, which is not there, would make a program of."""
    from torch._inductor import config  # takes a second

    graphs: list[torch.fx.Graph] = []
    with config.patch({"post_grad_custom_post_pass": graphs.append, "cpp.cxx": (None, "/no/such/compiler")}):
        yield graphs


@pytest.mark.slow
def test_on_a_cpu_compiling_leaves_attention_in_bf16_as_it_is_written(model, handed_to_the_compiler):
    device = replace(devices.choose("cpu", mixed_precision=False), autocast=torch.autocast("cpu", torch.bfloat16))
    compile_if_possible(model, device, 2, None)
    names = [str(node.target) for graph in handed_to_the_compiler for node in graph.nodes]
    assert names.count("aten.bmm.default") == 2  # of one block
    assert not [name for name in names if "scaled_dot_product" in name]


@pytest.mark.slow
@pytest.mark.usefixtures("handed_to_the_compiler")
def test_where_compiling_fails_the_run_goes_on_without_and_says_so(model, capsys):
    log_to_stdout()
    expected = outputs(model)
    assert not compile_if_possible(model, devices.choose("cpu", mixed_precision=False), 2, None)
    output = capsys.readouterr().out
    assert "Training without torch.compile, which failed with InductorError: " in output
    assert output.count("\n") == 2
    assert torch.equal(outputs(model), expected)
