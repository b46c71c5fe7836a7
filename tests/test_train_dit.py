"""TinyDiT end to end: it learns, it can be stopped anywhere, and it refuses what it cannot use."""

import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from weakref import WeakSet

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor, resize

import train_dit
from conftest import run_quietly, script_process
from tinycats import classifier, generator
from tinycats.images.batches import INITIALISATION, seed_for
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame
from tinycats.models import alignment
from tinycats.models.crops import crop
from tinycats.models.dit import TinyDiT
from tinycats.models.ema import EarlierEMA
from tinycats.models.flow_matching import END, point_on_path, sample, sample_timesteps, velocity_loss
from tinycats.models.perceptual_loss import PerceptualLoss
from tinycats.run import checkpoints
from tinycats.run.options import resumed_options
from tinycats.run.runs import log_to_stdout
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals
from tinycats.training import devices

STEPS = 30
SMALL = ("--image-size", "32", "--patch-size", "8", "--dim", "64", "--depth", "2", "--heads", "2")
SMALL += ("--batch-size", "8", "--lr", "1e-3", "--sample-every", "20", "--sample-steps", "3", "--steps", str(STEPS))


def train_here(*arguments: object, stop: StopSignals | None = None) -> dict:
    """What `python src/train_dit.py …` does, in this process."""
    options = train_dit.PARSER.parse([str(argument) for argument in arguments])
    log_to_stdout()
    return train_dit.train(options, stop or StopSignals(), ThisMachine("train_dit.py"))


def results(run: Path) -> tuple[dict, dict, bytes]:
    """The checkpoint's and the finished model's contents, the metrics and the last grid of samples."""
    checkpoint = checkpoints.load(run / "state.pt")
    kept = {name: checkpoint[name] for name in ("model", "average", "guide", "optimizer", "schedule", "scaler", "step")}
    finished = checkpoints.load(run / "tiny_dit.pt")
    weights = {name: finished[name] for name in ("state_dict", "guide")}
    grid = (run / "samples" / f"step_{STEPS:07}.png").read_bytes()
    return kept, weights, (run / "metrics.jsonl").read_bytes() + grid


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(same(*pair) for pair in zip(one, other, strict=True))
    return one == other


@pytest.fixture(scope="module")
def undisturbed(small_toy, shared_folder) -> Path:
    """The folder of a run that nothing happened to."""
    command = ("train_dit.py", small_toy, *SMALL, "--run", "r")
    return shared_folder("generator", lambda folder: run_quietly(*command, cwd=folder)) / "outputs" / "runs" / "r"


def test_a_run_leaves_what_the_design_says(undisturbed):
    names = {path.name for path in undisturbed.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        ".lock",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "samples",
        "state.pt",
        "state.previous.pt",
        "tiny_dit.json",
        "tiny_dit.pt",
        "train.log",
    }
    assert {path.name for path in (undisturbed / "samples").iterdir()} == {"step_0000020.png", "step_0000030.png"}
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [20, 30]
    assert [row["lr"] for row in rows if "lr" in row] == [0], "the learning rate has come down"
    finished = generator.load(undisturbed.parents[1] / "tiny_dit.pt")
    assert finished.sample(["tabby", "other"], steps=2).shape == (2, 3, 32, 32)
    with devices.choose("cpu", mixed_precision=True).autocast:
        how = {"steps": 3, "guide": finished.guide}
        grid = generator.sample_grid(finished.model, len(finished.classes), 32, finished.guidance_scale, **how)
    sampled = pil_to_tensor(Image.open(undisturbed / "samples" / f"step_{finished.metrics['step']:07}.png"))
    assert torch.equal(sampled, grid)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_at_random_moments_and_resumed_it_ends_bit_identical(workers, undisturbed, small_toy, tmp_path):
    """Every checkpoint that it keeps: weights, EMA, optimizer, schedule, scaler, step, metrics, samples."""
    rng = random.Random(workers)
    run = tmp_path / "outputs" / "runs" / "r"
    arguments = (*SMALL, "--num-workers", workers, "--save-every", 0.005)
    for kill in [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, None]:
        beginning = ("--resume", "r") if checkpoints.has_checkpoint(run) else ("--run", "r")
        process = script_process("train_dit.py", small_toy, *arguments, *beginning, cwd=tmp_path)
        if kill:
            for line in process.stdout:
                if "million parameters" in line:
                    break
            time.sleep(rng.uniform(0, 0.8))
            process.send_signal(kill)
        _, errors = process.communicate(timeout=900)
        assert kill or process.returncode == 0, errors
    assert same(results(run), results(undisturbed))


def test_the_null_class_is_trained_like_the_others(undisturbed):
    """Past failure 9: guidance leaned on an unconditional class that had never been trained."""
    torch.manual_seed(seed_for(0, INITIALISATION))
    before = TinyDiT(5, **checkpoints.load(undisturbed / "tiny_dit.pt")["shape"]).y_embedder.weight
    after = checkpoints.load(undisturbed / "state.pt")["model"]["y_embedder.weight"]
    assert after.shape == before.shape == (6, 64)
    assert ((after - before).abs().amax(dim=1) > 1e-4).all()


@pytest.mark.slow
def test_sixteen_images_are_memorised_and_sampled_again_from_their_own_noise(small_toy, tmp_path):
    dataset = open_dataset(small_toy, Frame(16, square=True), tmp_path)
    images = torch.from_numpy(dataset.batch(np.arange(0, 40, 40 // 16)[:16])).permute(0, 3, 1, 2)
    targets, labels = generator.to_unit(images), torch.arange(16)  # a class of its own for each
    at_once = 4  # timesteps of an image in a batch
    torch.manual_seed(0)
    model = TinyDiT(16, image_size=16, patch_size=4, dim=96, depth=3, heads=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 350)
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(targets.shape, generator=rng)
    path = noise.repeat(at_once, 1, 1, 1), targets.repeat(at_once, 1, 1, 1)
    for _ in range(350):
        timesteps = sample_timesteps(16 * at_once, rng)
        predicted = model(point_on_path(*path, timesteps), timesteps, labels.repeat(at_once))
        loss = velocity_loss(predicted, path[1], timesteps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    samples = sample(model.eval(), iter([noise]), labels, model.null_class, steps=20, churn=0)
    error = (samples - targets).square().mean().sqrt()
    assert error < 0.1, f"off by {error:.3f} of a range of 2"


@pytest.mark.slow
def test_after_400_steps_a_classifier_recognises_the_coats_of_the_samples(smoke, tmp_path):
    """The README's command for a generator on a laptop, for a smaller one; `make smoke`'s classifier. Chance is 0.2.

    It comes to 1. With batches of 64 at half of the rate, in 300 steps and more time, it came to 0.88 to 0.94.
    """
    shape = ("--image-size", 32, "--patch-size", 8, "--dim", 128, "--depth", 4, "--heads", 4)
    settings = ("--steps", 400, "--batch-size", 32, "--lr", "4e-3", "--sample-steps", 5)
    run_quietly("train_dit.py", "data/toy", *shape, *settings, cwd=tmp_path)
    finished = generator.load(tmp_path / "outputs" / "tiny_dit.pt")
    trained_classifier = classifier.load(smoke / "outputs" / "cats_model.pt")
    assert trained_classifier.metrics["val_accuracy"] >= 0.95
    asked = [name for name in finished.classes for _ in range(16)]
    images = finished.sample(asked, seed=5, batch_size=40, steps=25)
    with torch.inference_mode():
        answers = trained_classifier.model(classifier.normalise(resize(images, [64, 64]))).argmax(1)
    right = [trained_classifier.classes[answer] == name for answer, name in zip(answers.tolist(), asked, strict=True)]
    assert sum(right) / len(right) >= 0.9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: 0 is out of range"),
        (["--image-size", "100"], "--image-size 100 is no multiple of --patch-size"),
        (["--dim", "100", "--heads", "3"], "--dim 100 is no multiple of --heads 3"),
        (["--ema-beta", "1"], "--ema-beta: 1 is out of range"),
        (["--warmup-steps", "300", "--steps", "200"], "--warmup-steps 300 is more than --steps 200"),
        (["--backbone", "resnet18"], "unrecognized arguments: --backbone"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train_dit.PARSER.parse(arguments)
    assert exit.value.code == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_short_run_warms_up_and_averages_for_a_short_while(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short, whole, long = (train_dit.PARSER.parse(words) for words in (["--steps", "100"], [], ["--steps", "200000"]))
    assert [options.warmup_steps for options in (short, whole, long)] == [5, 1000, 10_000]
    assert [round(options.ema_beta, 6) for options in (short, whole, long)] == [0.8, 0.999, 0.9999]
    assert train_dit.PARSER.parse(["--steps", "5"]).ema_beta == 0
    assert train_dit.PARSER.parse(["--ema-beta", "0.5"]).ema_beta == 0.5


def test_the_rate_halves_where_the_width_doubles(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rates = [train_dit.PARSER.parse(["--dim", str(dim)]).lr for dim in (96, 192, 384)]
    assert rates == pytest.approx([4e-3, 2e-3, 1e-3])
    assert train_dit.PARSER.parse(["--dim", "96", "--lr", "0.5"]).lr == 0.5


def test_images_that_are_shown_often_are_cropped_and_the_model_is_told_how(small_toy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    images, told, forward = [], [], alignment.Aligned.forward

    def loss(predicted, targets, timesteps):
        if predicted.requires_grad:  # and not in validation
            images.append(targets)
        return velocity_loss(predicted, targets, timesteps)

    def asked(aligned, points, timesteps, classes, cropped):
        told.append(cropped)
        return forward(aligned, points, timesteps, classes, cropped)

    monkeypatch.setattr("tinycats.models.flow_matching.velocity_loss", loss)
    monkeypatch.setattr("tinycats.models.alignment.Aligned.forward", asked)
    train_here(small_toy, *SMALL, "--steps", 4)
    monkeypatch.setattr("tinycats.models.crops.WORTH_CROPPING", 0)
    train_here(small_toy, *SMALL, "--steps", 4)
    assert not any(cropped.any() for cropped in told[:4])
    assert all(cropped.any() for cropped in told[4:])
    for whole, parts, cropped in zip(images[:4], images[4:], told[4:], strict=True):
        assert torch.equal(parts, crop(whole, cropped))
    said = re.findall(r"Each image is shown 1 times(.*)", capsys.readouterr().out)
    assert said == ["", ", 50% of the time in part"]


def test_tokens_are_told_what_is_seen_in_whole_images_up_to_a_part_of_the_run(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tinycats.models.alignment.WORTH_LOOKING", 0.1)
    monkeypatch.setattr("tinycats.models.crops.WORTH_CROPPING", 0)
    cropped, looks, counted = [], [], []
    forward, misalignment, look = alignment.Aligned.forward, alignment.misalignment, alignment.WhatIsSeen.__call__

    def asked(aligned, *inputs):
        cropped.append(inputs[-1][:, 0] > 0)
        return forward(aligned, *inputs)

    def looked(what_is_seen, images):
        looks.append(look(what_is_seen, images))
        return looks[-1]

    def told(tokens, seen):
        assert torch.equal(seen, looks[-1][0])
        untold = misalignment(tokens, seen)
        untold.register_hook(counted.append)
        return untold

    monkeypatch.setattr("tinycats.models.alignment.Aligned.forward", asked)
    monkeypatch.setattr("tinycats.models.alignment.WhatIsSeen.__call__", looked)
    monkeypatch.setattr("tinycats.models.alignment.misalignment", told)
    train_here(small_toy, *SMALL, "--steps", 10)
    assert len(looks) == len(counted) == 6
    assert all(is_seen.all() for _, is_seen in looks)
    for gradient, part in zip(counted, cropped, strict=False):
        assert torch.allclose(gradient, 0.2 / 8 * ~part)
    train_here(small_toy, *SMALL, "--steps", 10, "--alignment", 0)
    assert len(looks) == 6


def test_predicted_images_are_to_look_right_in_the_last_part_of_a_run(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained_on, looked_at, counted, perceptual = [], [], [], PerceptualLoss.__call__
    remembering, remembered, init = WeakSet(), [], alignment.WhatIsSeen.__init__

    def remember(what_is_seen, *of):
        remembering.add(what_is_seen)
        init(what_is_seen, *of)

    def velocity(*of):
        if of[0].requires_grad:  # and not in validation
            trained_on.append(of)
        return velocity_loss(*of)

    def unlike(loss, *of):
        value = perceptual(loss, *of)
        if of[0].requires_grad:
            looked_at.append(of)
            value.register_hook(counted.append)
            remembered.append(len(remembering))
        return value

    monkeypatch.setattr("tinycats.models.flow_matching.velocity_loss", velocity)
    monkeypatch.setattr("tinycats.models.perceptual_loss.PerceptualLoss.__call__", unlike)
    monkeypatch.setattr("tinycats.models.alignment.WhatIsSeen.__init__", remember)
    train_here(small_toy, *SMALL, "--steps", 10)
    assert len(trained_on) == 10
    assert remembered == [1, 0, 0], "what alignment remembers is gone by then, for its memory"
    assert same(looked_at[1:], trained_on[8:])
    assert same(looked_at[0], (*trained_on[0][:2], torch.ones(8))), "tried at once, with every image, for its memory"
    assert counted == [0, 0.25, 0.25]
    at_the_end = [(of[2] == torch.tensor(END)).sum() for of in trained_on]
    assert at_the_end == [0] * 8 + [1, 1], "where sampling's last step begins, which few others are near to"
    train_here(small_toy, *SMALL, "--steps", 10, "--perceptual", 0)
    assert len(trained_on) == 20
    assert len(looked_at) == 3
    assert not any((of[2] == torch.tensor(END)).any() for of in trained_on[10:])


def test_how_unlike_validation_images_look_is_part_of_their_loss_all_along(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = {}
    for weight in (0, 0.25, 0.5):
        run = train_here(small_toy, *SMALL, "--steps", 4, "--sample-every", 1, "--perceptual", weight)["run"]
        rows = map(json.loads, (tmp_path / "outputs" / "runs" / run / "metrics.jsonl").read_text().splitlines())
        losses[weight] = np.array([row["val_loss"] for row in rows if "val_loss" in row][:3])  # the same weights'
    unlike = losses[0.5] - losses[0]
    assert (unlike > 0.1).all()
    assert losses[0.25] - losses[0] == pytest.approx(unlike / 2, rel=1e-3)


def test_a_loss_that_diverges_or_is_zero_stops_the_run_with_the_reason(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="training diverged"):
        train_here(small_toy, *SMALL, "--lr", "1e30", "--gradient-clip", "0", "--warmup-steps", "0")
    nothing = "tinycats.models.flow_matching.velocity_loss"
    monkeypatch.setattr(nothing, lambda predicted, *rest: 0 * predicted.mean())
    with pytest.raises(UserError, match="exactly 0 at step 30: nothing is being learned"):
        train_here(small_toy, *SMALL)


def test_a_state_of_another_shape_is_refused(undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed.parents[1], tmp_path / "outputs")
    with pytest.raises(UserError, match=r"--depth 3 \(the run has 2\), --dim 128 \(the run has 64\)"):
        train_here("--resume", "r", "--depth", 3, "--dim", 128)


def test_a_state_from_before_an_option_existed_is_refused_that_option(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed.parents[2])
    saved = checkpoints.load(undisturbed / "state.pt")["options"]
    del saved["sample_steps"]
    options = train_dit.PARSER.parse(["--resume", "r", "--sample-steps", "7"])
    with pytest.raises(UserError, match=r"--sample-steps 7 \(the run has none\)"):
        resumed_options(options, saved)
    options = train_dit.PARSER.parse(["--resume", "r"])
    assert resumed_options(options, saved).sample_steps is None


def test_the_log_says_how_it_goes(undisturbed):
    log = (undisturbed / "train.log").read_text()
    assert re.search(r"Step 30/30\. Loss: \d\.\d{4} \|", log)
    assert re.search(r"Step 20/30\. Validation loss: \d\.\d{4}; samples/step_0000020\.png", log)


@pytest.mark.slow
def test_when_it_learns_its_photos_by_heart_it_says_so_and_keeps_what_was_best(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(EarlierEMA, "MIN_STEPS", 1)
    monkeypatch.setattr("tinycats.models.crops.PROBABILITY", 0.0)  # with crops the loss goes on falling
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 16)):
        for number in range(count):
            photo = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((16, 16))
            (tmp_path / "few" / split / "cat").mkdir(parents=True, exist_ok=True)
            photo.save(tmp_path / "few" / split / "cat" / f"{number}.png")
    shape = ("--image-size", 16, "--patch-size", 4, "--dim", 64, "--depth", 2, "--heads", 2, "--cfg-scale", 1)
    often = ("--sample-every", 25, "--sample-steps", 1, "--ema-beta", 0.9)
    result = train_here("few", *shape, *often, "--batch-size", 8, "--lr", 3e-3, "--steps", 400, "--run", "r")
    run = tmp_path / "outputs" / "runs" / "r"
    rows = [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "val_loss" in row]
    lowest = min(rows, key=lambda row: row["val_loss"])
    assert lowest["step"] < rows[-1]["step"]
    assert result["metrics"] == generator.load(run / "tiny_dit.pt").metrics == lowest
    said = re.findall(r"The validation loss has risen since step (\d+)", capsys.readouterr().out)
    assert len(said) == len(set(said)) and int(said[-1]) == lowest["step"]
    last = checkpoints.load(run / "state.pt")["average"]
    finished = checkpoints.load(run / "tiny_dit.pt")
    best, guide = (finished[name]["x_embedder.weight"] for name in ("state_dict", "guide"))
    assert not torch.equal(last["module.x_embedder.weight"], best)
    assert guide.dtype == torch.bfloat16
    assert not torch.equal(guide.float(), best), "an earlier one"
