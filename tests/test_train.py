"""The classifier end to end: it learns, it can be stopped anywhere, and it refuses what it cannot use."""

import json
import random
import re
import resource
import shutil
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import SMALL, run_quietly, script_process
from tinycats import classifier
from tinycats.images import oxford_pets
from tinycats.run import checkpoints
from tinycats.run.runs import log_to_stdout
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import Stopped, StopSignals

EPOCHS = 8  # of five steps each, with SMALL
RESNET18 = ("--backbone", "resnet18", "--no-pretrained", "--image-size", "32")  # after SMALL: the default's network


def train_here(*arguments: object, stop: StopSignals | None = None) -> dict:
    """What `python src/train.py …` does, in this process."""
    options = train.PARSER.parse([str(argument) for argument in arguments])
    log_to_stdout()
    return train.train(options, stop or StopSignals(), ThisMachine("train.py"))


def results(folder: Path) -> tuple[dict, bytes]:
    """A finished run's weights and its metrics."""
    return checkpoints.load(folder / "cats_model.pt")["state_dict"], (folder / "metrics.jsonl").read_bytes()


def assert_same_results(one: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = results(one), results(other)
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


@pytest.fixture(scope="module")
def undisturbed(small_toy, shared_folder) -> Path:
    """The folder of a run that nothing happened to."""
    command = ("train.py", small_toy, *SMALL, "--epochs", EPOCHS, "--run", "r")
    return shared_folder("classifier", lambda folder: run_quietly(*command, cwd=folder)) / "outputs" / "runs" / "r"


# --- it works ----------------------------------------------------------------------------------------------------


def test_it_learns_the_toy_cats(smoke):
    """The command of `make smoke`."""
    accuracy = float(re.search(r"Done\. Validation accuracy ([0-9.]+)", (smoke / "stdout.txt").read_text())[1])
    assert accuracy >= 0.95


@pytest.mark.slow
def test_with_no_data_it_trains_on_the_toy_cats_and_says_so(run_train, tmp_path):
    result = run_train("--epochs", "1")
    assert result.returncode == 0, result.stderr
    assert "Training on data/toy. For real cats: bash data/download.sh" in result.stdout
    assert (tmp_path / "outputs" / "cats_model.pt").exists()


def test_a_run_leaves_what_the_design_says(undisturbed):
    assert {path.name for path in undisturbed.iterdir() if not path.name.startswith("events.out.tfevents")} == {
        "cats_model.json",
        "cats_model.pt",
        ".lock",
        "metrics.jsonl",
        "report.html",
        "run.json",
        "state.pt",
        "state.previous.pt",
        "train.log",
    }
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows if "val_accuracy" in row] == list(range(1, EPOCHS + 1))
    assert {"train_loss", "val_loss", "balanced_accuracy", "class_accuracy", "cat_accuracy"} <= rows[-1].keys()


def test_the_log_is_made_of_dated_lines_without_a_progress_bar(undisturbed):
    log = (undisturbed / "train.log").read_text()
    for line in log.splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \| (INFO|WARNING) {1,4} \| ", line), line
    assert re.search(r"\| INFO     \| Epoch 1/8 complete\. Loss: \d\.\d{3}", log)


def test_tensorboard_can_read_the_curves(undisturbed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(undisturbed))
    events.Reload()
    assert {"val_loss", "val_accuracy", "class_accuracy/tabby"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("val_accuracy")] == list(range(5, 5 * EPOCHS + 1, 5))


def test_the_finished_model_is_the_best_epochs_and_names_its_classes(undisturbed):
    model = classifier.load(undisturbed.parents[1] / "cats_model.pt")
    assert model.classes == ("black", "ginger", "other", "siamese", "tabby")
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]
    best = max((row for row in rows if "val_loss" in row), key=lambda row: (row["balanced_accuracy"], -row["val_loss"]))
    assert model.metrics["epoch"] == best["epoch"]
    assert model.metrics["val_accuracy"] == best["val_accuracy"]


@pytest.mark.slow
def test_real_photos_arranged_by_breed_train_for_an_epoch(pets_sample, run_train, tmp_path):
    oxford_pets.arrange(pets_sample, tmp_path / "data" / "cats")
    result = run_train("--no-pretrained", "--epochs", "1", "--batch-size", "8")
    assert result.returncode == 0, result.stderr
    assert "Training on data/cats" in result.stdout
    assert "4 classes: Abyssinian, Siamese, Sphynx, other" in result.stdout
    assert classifier.load(tmp_path / "outputs" / "cats_model.pt").image_size == 224


def test_strange_names_and_a_batch_larger_than_the_data_work(tmp_path, monkeypatch, small_toy):
    monkeypatch.chdir(tmp_path)
    for source, name in (("black", "schwarze Kätzchen"), ("other", "その他 & more")):
        shutil.copytree(small_toy / "train" / source, tmp_path / "my cats" / name)
    outcome = train_here("my cats", *SMALL, "--batch-size", 1000, "--epochs", 1)
    model = classifier.load(outcome["model"])
    assert set(model.classes) == {"schwarze Kätzchen", "その他 & more"}
    photo = next((tmp_path / "my cats" / "schwarze Kätzchen").iterdir())
    assert sum(model.predict([photo])[0].values()) == pytest.approx(1)


@pytest.mark.slow
def test_a_folder_that_is_packed_is_never_decoded_again(small_toy, tmp_path, monkeypatch):
    """Past failure 10: images were decoded in the training process, and the GPU waited.

    Seen to fail with `decode` for the image of the map in PackedImages.batch.
    """
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_toy, tmp_path / "cats")
    train_here("cats", *SMALL, "--epochs", 1)

    def opened(*_arguments, **_options):
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", opened)
    train_here("cats", *SMALL, "--epochs", 1, "--num-workers", 1)


# --- it can be stopped anywhere ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_killed_at_random_moments_and_resumed_it_ends_bit_identical(workers, undisturbed, small_toy, tmp_path):
    rng = random.Random(workers)
    run = tmp_path / "outputs" / "runs" / "r"
    kills = [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    rng.shuffle(kills)
    # The checkpoint is saved at every step, so that a kill will often strike while it is being written.
    arguments = (*SMALL, "--epochs", EPOCHS, "--num-workers", workers, "--save-every", 1e-9)
    for kill in [*kills, None]:
        beginning = ("--resume", "r") if checkpoints.has_checkpoint(run) else ("--run", "r")
        process = script_process("train.py", small_toy, *arguments, *beginning, cwd=tmp_path)
        if kill:
            for line in process.stdout:
                if "images to train on" in line:
                    break
            time.sleep(rng.uniform(0, 1.5))
            process.send_signal(kill)
        output, errors = process.communicate(timeout=900)
        if kill and process.returncode == -kill and "Done. " in output:
            continue  # it had ended, and only Python was there to be killed
        if kill in (signal.SIGINT, signal.SIGTERM) and process.returncode:
            assert process.returncode == 128 + kill
            assert re.fullmatch(r"stopped: .*python src/train\.py --resume r\n", errors), errors
        elif kill is None:
            assert process.returncode == 0, errors
    assert_same_results(undisturbed, run)


def stop_in_evaluation(monkeypatch, stop: StopSignals) -> None:
    normalise = classifier.normalise

    def normalise_and_stop(images):
        if torch.is_inference_mode_enabled():
            stop.requested = signal.SIGTERM
        return normalise(images)

    monkeypatch.setattr(classifier, "normalise", normalise_and_stop)


@pytest.mark.slow
def test_stopped_in_evaluation_it_evaluates_that_epoch_when_it_goes_on(undisturbed, small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for beginning in ("--run", "--resume", "--resume"):
        stop = StopSignals()
        with monkeypatch.context() as patch:
            stop_in_evaluation(patch, stop)
            with pytest.raises(Stopped):
                train_here(small_toy, *SMALL, "--epochs", EPOCHS, beginning, "r", "--num-workers", 0, stop=stop)
    train_here("--resume", "r")
    assert_same_results(undisturbed, tmp_path / "outputs" / "runs" / "r")


@pytest.mark.slow
def test_with_muon_too_it_goes_on_to_the_same_end(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = (small_toy, *SMALL, "--optimizer", "muon", "--epochs", 2)
    train_here(*arguments, "--run", "straight")
    stop = StopSignals()
    with monkeypatch.context() as patch:
        stop_in_evaluation(patch, stop)
        with pytest.raises(Stopped):
            train_here(*arguments, "--run", "stopped", stop=stop)
    train_here("--resume", "stopped")
    runs = tmp_path / "outputs" / "runs"
    assert_same_results(runs / "straight", runs / "stopped")
    states = checkpoints.load(runs / "stopped" / "state.pt")["optimizer"]["state"].values()
    assert sum("momentum_buffer" in state for state in states) == 21, "every convolution of a ResNet-20 is Muon's"


def test_from_scratch_it_trains_otherwise_than_from_pretrained_weights(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option, settings in (("--pretrained", (1e-4, "adamw", 0)), ("--no-pretrained", (2e-3, "muon", 0.2))):
        options = train.PARSER.parse([str(small_toy), option])
        assert (options.lr, options.optimizer, options.mixup) == settings
    options = train.PARSER.parse([str(small_toy), "--backbone", "resnet20", "--batch-size", "1"])
    assert (options.pretrained, options.image_size, options.lr) == (False, 32, 2e-3)
    options = train.PARSER.parse(
        [str(small_toy), "--no-pretrained", "--lr", "0.5", "--optimizer", "adamw", "--mixup", "0"]
    )
    assert (options.lr, options.optimizer, options.mixup) == (0.5, "adamw", 0)


def test_mixed_images_are_what_is_trained_on(small_toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed, parts = classifier.mixed, []

    def noted(images, targets, part):
        parts.append(part)
        return mixed(images, targets, part)

    monkeypatch.setattr(classifier, "mixed", noted)
    losses = {}
    for mixup in (0, 0.2):
        train_here(small_toy, *SMALL, "--mixup", mixup, "--epochs", 1, "--run", mixup)
        rows = (tmp_path / "outputs" / "runs" / str(mixup) / "metrics.jsonl").read_text().splitlines()
        losses[mixup] = json.loads(rows[-1])["train_loss"]
    assert losses[0] != losses[0.2]
    assert len(parts) == 5 == len(set(parts)), "another part at each step, and none where nothing is mixed"
    assert all(0 <= part <= 1 for part in parts)


@pytest.mark.slow
def test_from_a_damaged_state_it_goes_on_from_the_one_before(undisturbed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed.parents[1], tmp_path / "outputs")
    run = tmp_path / "outputs" / "runs" / "r"
    path = run / checkpoints.CHECKPOINT
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    train_here("--resume", "r")
    output = capsys.readouterr().out
    assert "state.pt is damaged" in output
    assert "Resuming run r at step 35 of 40" in output
    assert_same_results(undisturbed, run)


def test_a_finished_run_resumed_has_nothing_left_to_do(undisturbed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed.parents[1], tmp_path / "outputs")
    (tmp_path / "outputs" / "cats_model.pt").unlink()
    train_here("--resume", tmp_path / "outputs" / "runs" / "r" / "state.pt")
    assert_same_results(undisturbed, tmp_path / "outputs" / "runs" / "r")
    assert (tmp_path / "outputs" / "cats_model.pt").exists()


def test_the_terminal_that_goes_away_stops_it_with_its_state_saved(small_toy, tmp_path):
    process = script_process("train.py", small_toy, *SMALL, "--epochs", 500, "--run", "r", cwd=tmp_path)
    for line in process.stdout:
        if "Epoch 1/" in line:
            break
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 129
    assert "--resume r" in errors
    checkpoint = checkpoints.load_checkpoint(tmp_path / "outputs" / "runs" / "r" / "state.pt")
    assert checkpoint["step"] >= 5


# --- it refuses what it cannot use, in one line ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "--epochs: 0 is out of range"),
        (["--lr", "-0.001"], "--lr: -0.001 is out of range: above 0"),
        (["--lr", "nan"], "--lr: nan is out of range"),
        (["--lr", "inf"], "--lr: inf is out of range"),
        (["--batch-size", "many"], "--batch-size: 'many' is not a whole number"),
        (["--backbone", "vgg"], "--backbone: invalid choice: 'vgg'"),
        (["nowhere"], "nowhere is not there"),
        (["data/cats"], "bash data/download.sh"),
        ([__file__], "is not a folder"),
        (["--gpu", "A10G"], "--gpu is for Modal"),
        (["--resume", "nothing"], "no such run"),
        (["--resume", "nothing.pt"], "no such file"),
        (["--run", "a/b"], "a run's name is letters"),
        (["--run", "a", "--resume", "b"], "give one of them"),
        (["--epoch", "3"], "unrecognized arguments: --epoch"),
        (["--warmup-epochs", "11"], "is more than --epochs 10"),
        (["--pretrained", "--backbone", "resnet20"], "--backbone resnet20 has no pretrained weights"),
        (["--no-pretrained", "--image-size", "32", "--batch-size", "1"], "--batch-size 1 needs an --image-size above"),
        (["two\nlines"], "two lines is not there"),
        (["\x1b[31m"], "\\x1b[31m is not there"),
        (["--epoch\ns"], "unrecognized arguments: --epoch s"),
        (["x" * 5000], "file name too long"),
        (["--resume", "x" * 5000], "file name too long"),
        (["--output-dir", "x" * 5000], "file name too long"),
        (["--batch-size=--"], "argument --batch-size: expected one argument"),
        (["--output-dir=--"], "argument --output-dir: expected one argument"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train.PARSER.parse(arguments)
    assert exit.value.code == 2
    output, errors = capsys.readouterr()
    assert message in errors
    assert errors.count("\n") == 1
    assert output == ""
    assert list(tmp_path.iterdir()) == []


def one_error(result) -> str:
    """The one line of a run that failed."""
    assert result.returncode == 1, (result.stdout, result.stderr)
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stdout
    return result.stderr


def broken_folder(root: Path, *classes: str) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(root / name / f"{number}.png")
    return root


def test_data_that_cannot_be_trained_on_is_one_line_and_leaves_no_run(run_train, tmp_path):
    broken_folder(tmp_path / "one", "only")
    assert "single class, 'only'" in one_error(run_train("one", *SMALL))
    broken_folder(tmp_path / "empty", "full", "void")
    for path in (tmp_path / "empty" / "void").iterdir():
        path.unlink()
    assert "void has no images" in one_error(run_train("empty", *SMALL))
    assert not (tmp_path / "outputs").exists()


def test_an_output_folder_that_cannot_be_written_is_one_line(run_train, small_toy, tmp_path):
    (tmp_path / "outputs").write_text("a file is in the way")
    assert "cannot write to outputs/runs" in one_error(run_train(small_toy, *SMALL))


FULL = (500_000, 500_000)  # bytes of a file; a checkpoint has several times as many


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, FULL)


@pytest.mark.slow
def test_a_disk_that_fills_up_is_one_line_and_costs_nothing_saved(undisturbed, small_toy, run_train, tmp_path):
    # The limit on a file's size is the one full disk that every machine can have.
    fresh = run_train(small_toy, *SMALL, "--run", "early", cold=True, preexec_fn=limit_file_size)
    assert "cannot save" in one_error(fresh)
    assert not checkpoints.has_checkpoint(tmp_path / "outputs" / "runs" / "early")

    process = script_process("train.py", small_toy, *SMALL, "--epochs", EPOCHS, "--run", "late", cwd=tmp_path)
    for line in process.stdout:
        if "Epoch 1/" in line:
            break
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, FULL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"error: cannot save .*untouched\n", errors), errors
    run = tmp_path / "outputs" / "runs" / "late"
    assert not list(run.glob("*.partial")) and not list(run.glob(".*.partial"))
    assert run_train("--resume", "late").returncode == 0
    assert_same_results(undisturbed, run)


@pytest.mark.slow
def test_a_loss_that_diverges_ends_the_run_and_is_never_saved(small_toy, run_train, tmp_path):
    result = run_train(small_toy, *SMALL, "--lr", "1e8", "--gradient-clip", "0", "--run", "wild")
    assert re.search(r"training diverged: the loss is (nan|inf) at step \d+; a lower --lr may help", one_error(result))
    run = tmp_path / "outputs" / "runs" / "wild"
    checkpoint = checkpoints.load_checkpoint(run / checkpoints.CHECKPOINT)
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    assert "training diverged" in (run / "train.log").read_text(), "the log says why it ends"


def test_weights_that_cannot_be_fetched_name_the_way_out(run_train, small_toy, tmp_path):
    offline = {"TORCH_HOME": str(tmp_path / "cache"), "https_proxy": "http://127.0.0.1:9"}
    error = one_error(run_train(small_toy, "--image-size", "64", env=offline))
    assert "--no-pretrained" in error
    assert not (tmp_path / "outputs").exists()


@pytest.fixture
def copy_of_run(undisturbed, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(undisturbed.parents[1], tmp_path / "outputs")
    return tmp_path / "outputs" / "runs" / "r"


def test_options_that_contradict_the_state_are_named(copy_of_run, small_toy):
    with pytest.raises(UserError, match=r"--backbone resnet34 \(the run has resnet20\), --epochs 9 \(the run has 8\)"):
        train_here(small_toy, "--resume", "r", "--epochs", 9, "--backbone", "resnet34", "--lr", "1e-3")


def test_a_state_of_other_data_is_refused(copy_of_run, tmp_path):
    broken_folder(tmp_path / "others", "a", "b")
    with pytest.raises(UserError, match="does not hold the images"):
        train_here("others", "--resume", "r")


def test_a_state_of_another_script_is_refused(copy_of_run):
    checkpoint = checkpoints.load(copy_of_run / checkpoints.CHECKPOINT)
    checkpoints.save(copy_of_run / checkpoints.CHECKPOINT, checkpoint | {"script": "train_dit.py"})
    with pytest.raises(UserError, match=r"is a checkpoint of train_dit\.py, not of train\.py"):
        train_here("--resume", "r")


def test_a_run_that_another_version_began_is_refused(copy_of_run):
    """Its batches were others: it would not go on to the end that it would have had."""
    checkpoint = checkpoints.load(copy_of_run / checkpoints.CHECKPOINT)
    del checkpoint["computation"]  # as it was before there were versions
    checkpoints.save(copy_of_run / checkpoints.CHECKPOINT, checkpoint)
    with pytest.raises(UserError, match="the run r was begun by an older version of this program, which makes"):
        train_here("--resume", "r")
    checkpoints.save(copy_of_run / checkpoints.CHECKPOINT, checkpoint | {"computation": 99})
    with pytest.raises(UserError, match="by a newer version"):
        train_here("--resume", "r")


def test_the_log_says_where_the_seconds_before_the_first_step_went(undisturbed):
    lines = re.findall(r"([\d.]+) seconds until the first step was done: (.*)", (undisturbed / "train.log").read_text())
    ((total, phases),) = lines
    seconds = {name: float(number) for name, number in (phase.rsplit(" ", 1) for phase in phases.split(", "))}
    assert list(seconds) == ["start", "imports", "images", "model", "first step"]
    assert sum(seconds.values()) == pytest.approx(float(total), abs=0.3)


def test_a_run_that_exists_is_not_continued_or_overwritten_by_accident(copy_of_run, small_toy, capsys):
    before = {path.name: path.read_bytes() for path in copy_of_run.iterdir()}
    with pytest.raises(SystemExit):
        train_here(small_toy, "--run", "r")
    assert "the run r exists; go on with it by --resume r" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in copy_of_run.iterdir()} == before


def test_a_run_that_is_stopped_before_it_goes_on_can_still_be_resumed(copy_of_run):
    said = train.PARSER.if_stopped(train.PARSER.parse(["--resume", "r"]))
    assert said == "nothing more had been trained yet; go on with the run: python src/train.py --resume r"
    assert "nothing to resume" in train.PARSER.if_stopped(train.PARSER.parse([]))


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    (tmp_path / "modal").mkdir()
    (tmp_path / "modal" / "__init__.py").write_text("import os, time; os.kill(os.getpid(), 2); time.sleep(10)")
    process = script_process("train.py", cwd=tmp_path, cold=True, env={"PYTHONPATH": str(tmp_path)})
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_two_processes_cannot_train_the_same_run(small_toy, tmp_path, run_train):
    first = script_process("train.py", small_toy, *SMALL, "--epochs", 500, "--run", "r", cwd=tmp_path)
    for line in first.stdout:
        if "Epoch 1/" in line:
            break
    drain = threading.Thread(target=first.stdout.read, daemon=True)
    drain.start()
    assert "another process is training" in one_error(run_train("--resume", "r"))
    first.terminate()
    assert first.wait(60) == 143


def test_help_and_mistakes_do_not_wait_for_torch(tmp_path):
    """Put the fault back by `import torch` at the top of src/train.py or of a module that it imports."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('torch was imported')")
    for arguments, status in ((["--help"], 0), (["--epochs", "0"], 2)):
        process = script_process("train.py", *arguments, cwd=tmp_path, cold=True, env={"PYTHONPATH": str(tmp_path)})
        output, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert "torch was imported" not in output + errors
    process = script_process("train.py", cwd=tmp_path, cold=True, env={"PYTHONPATH": str(tmp_path)})
    assert "torch was imported" in process.communicate(timeout=60)[1], "the trap itself works"


def grey_photos(folder: Path, mean: float, count: int, seed: int) -> None:
    """Photos of one grey each, which varies around `mean` with a deviation of 30: classes 30 apart overlap."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, grey in enumerate(rng.normal(mean, 30, count).clip(0, 255)):
        Image.fromarray(np.full((32, 32, 3), round(grey), np.uint8)).save(folder / f"{number}.png")


@pytest.mark.slow
def test_a_rare_class_is_learned_although_always_saying_the_other_is_right_nine_times_in_ten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, (split, rare, common) in enumerate((("train", 16, 144), ("val", 50, 50))):
        grey_photos(tmp_path / "greys" / split / "rare", 110, rare, 2 * number)
        grey_photos(tmp_path / "greys" / split / "common", 140, common, 2 * number + 1)
    accuracy = {}
    for balance in ("--balance", "--no-balance"):
        result = train_here("greys", *SMALL, *RESNET18, "--epochs", 4, "--batch-size", 16, balance)
        accuracy[balance] = result["metrics"]["class_accuracy"]
    assert train.PARSER.parse(["greys"]).balance, "it is the default"
    assert min(accuracy["--balance"].values()) > 0.5, "what can be told apart at all: 69 % of each"
    assert accuracy["--no-balance"]["rare"] < 0.3
