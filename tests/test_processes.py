"""A run in several processes computes what it computes in one, and stops, dies, fails and goes on as one."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import train
import train_dit
from conftest import REPOSITORY, SMALL, UNSEEN, WARM_PYTHON, processes, run_quietly, script_process
from test_train_dit import same
from tinycats.classifier import training_transform, validation_transform
from tinycats.images.batches import TrainingBatches, ValidationBatches
from tinycats.images.datasets import open_dataset
from tinycats.images.frames import Frame
from tinycats.run import checkpoints
from tinycats.script import launcher
from tinycats.script.errors import TransientError
from tinycats.training.processes import LOST_PEER, Processes

DOUBLE = "../tests/in_double_precision.py"
CLASSIFIER = ("train.py", *SMALL, "--batch-size", "5", "--epochs", "3")
DIT = ("train_dit.py", "--image-size", 32, "--patch-size", 8, "--dim", 32, "--depth", 2, "--heads", 2, "--lr", "1e-3")
DIT += ("--batch-size", 10, "--sample-steps", 2, "--sample-every", 10, "--steps", 20)
TOLERANCE = 1e-6  # after twenty steps in double precision; in single precision it would be a hundredth


def finish(started: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    ended = [process.communicate(timeout=600) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, ended, strict=True)]


def succeed(count: int, *command: object, cwd: Path) -> None:
    for number, (status, output, errors) in enumerate(finish(processes(count, *command, cwd=cwd))):
        assert (status, errors) == (0, "")
        assert bool(output) == (number == 0), "process 0 alone has a log"


def numbers(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_as_near_as_sums_are(run: Path, other: Path, model: str) -> None:
    """Every recorded loss and the final weights."""
    assert len(numbers(run)) == len(numbers(other)) >= 20
    for row, other_row in zip(numbers(run), numbers(other), strict=True):
        assert row.keys() == other_row.keys()
        for key in row.keys() & {"loss", "train_loss", "val_loss"}:
            assert row[key] == pytest.approx(other_row[key], abs=TOLERANCE), row
    weights, other_weights = (checkpoints.load(folder / model)["state_dict"] for folder in (run, other))
    for name, tensor in weights.items():
        assert torch.allclose(tensor, other_weights[name], rtol=0, atol=100 * TOLERANCE), name


# --- shares ------------------------------------------------------------------------------------------------------


def test_shares_are_even_cover_all_and_their_means_weigh_as_much_as_they_are_large():
    for size, count in ((10, 1), (10, 3), (8, 4), (2, 3), (0, 2)):
        shares = [Processes(rank, count).share(size) for rank in range(count)]
        assert np.concatenate([np.arange(size)[share] for share in shares]).tolist() == list(range(size))
        sizes = [share.stop - share.start for share in shares]
        assert max(sizes) - min(sizes) <= 1
        if size:
            values = np.random.default_rng(0).random(size)
            means = [
                values[s].mean() * Processes(r, count).weight(len(values[s]), size)
                for r, s in enumerate(shares)
                if len(values[s])
            ]
            assert sum(means) / count == pytest.approx(values.mean())


def test_the_processes_shares_of_a_batch_are_the_batch(small_toy):
    """Images, augmentations and labels; likewise of validation images, of which a share may be empty."""
    images = open_dataset(small_toy, Frame(37), small_toy.parent)

    def joined(batches: list, number: int) -> list[torch.Tensor]:
        return [torch.cat(parts) for parts in zip(*(batch[number] for batch in batches), strict=True)]

    for transform, make in (
        (training_transform(32), lambda t, *p: TrainingBatches(images, 11, t, 0, *p)),
        (validation_transform(32), lambda t, *p: ValidationBatches(images, 6, t, *p)),
    ):
        whole = make(transform)
        parts = [make(transform, Processes(rank, 3)) for rank in range(3)]
        for number in range(3):
            assert all(torch.equal(a, b) for a, b in zip(whole[number], joined(parts, number), strict=True))
    last = ValidationBatches(images, 19, validation_transform(32), Processes(2, 3))
    assert [len(part) for part in last[1]] == [0, 0]


def test_a_share_is_followed_by_the_first_image_of_the_next_one(small_toy):
    """The last process's by the first of all: whatever the processes, each image has the same one beside it."""
    images = open_dataset(small_toy, Frame(37), small_toy.parent)

    def batch(*processes: Processes, with_next: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return TrainingBatches(images, 11, training_transform(32), 0, *processes, with_next=with_next)[1]

    whole = batch(with_next=False)
    assert all(torch.equal(a[:-1], b) for a, b in zip(batch(with_next=True), whole, strict=True))
    beside = []
    for rank in range(3):
        share = batch(Processes(rank, 3), with_next=False)
        followed = batch(Processes(rank, 3), with_next=True)
        assert all(torch.equal(a[:-1], b) for a, b in zip(followed, share, strict=True))
        beside.append([part[1:] for part in followed])
    for part, parts in zip(whole, zip(*beside, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), part.roll(-1, 0))


@pytest.mark.slow
def test_a_batch_norm_over_processes_is_one_over_the_whole_batch(tmp_path):
    """Forward, backward, running statistics, evaluation; of seven images two have fewer than the others."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4).double()
    norm.load_state_dict({name: 1 + torch.rand_like(tensor.double()) for name, tensor in norm.state_dict().items()})
    images = (5 + 3 * torch.randn(7, 4, 5, 6)).double().requires_grad_()
    upstream = torch.randn(7, 4, 5, 6).double()
    given = {"images": images.detach(), "upstream": upstream, "state": norm.state_dict()}
    torch.save(given, tmp_path / "given")
    outputs = norm(images)
    outputs.backward(upstream)
    ended = finish(processes(3, "../tests/norm_batches.py", tmp_path / "given", tmp_path / "found", cwd=tmp_path))
    assert [status for status, *_ in ended] == [0, 0, 0], ended
    found = torch.load(tmp_path / "found")
    assert torch.allclose(found["outputs"], outputs)
    assert torch.allclose(found["images.grad"], images.grad)
    for gradient, parameter in zip(found["parameters.grad"], norm.parameters(), strict=True):
        assert torch.allclose(gradient, parameter.grad)
    for name, tensor in norm.state_dict().items():
        assert torch.allclose(found["state"][name], tensor), name
    assert torch.allclose(found["in evaluation"], norm.eval()(images))

    mixed, images = nn.BatchNorm2d(4), images.detach().bfloat16()
    assert found["in bf16"].dtype == torch.bfloat16
    assert torch.allclose(found["in bf16"], mixed(images), atol=0.02)
    assert torch.allclose(found["bf16's mean"], mixed.running_mean)


# --- the same as one process -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier_in_one(small_toy, shared_folder) -> Path:
    script, *options = CLASSIFIER
    command = (DOUBLE, script, small_toy, *options, "--run", "r")
    return shared_folder("classifier_in_double", lambda folder: run_quietly(*command, cwd=folder))


@pytest.fixture(scope="module")
def generator_in_one(small_toy, shared_folder) -> Path:
    script, *options = DIT
    command = (DOUBLE, script, small_toy, *options, "--run", "r")
    return shared_folder("generator_in_double", lambda folder: run_quietly(*command, cwd=folder))


def run_folder(cwd: Path) -> Path:
    return cwd / "outputs" / "runs" / "r"


@pytest.mark.slow
def test_a_classifier_in_two_processes_is_the_one_of_one(classifier_in_one, small_toy, tmp_path):
    """Five images a batch, in shares of 3 and 2.

    Seen to fail without `synchronised`, and with a weight of 1 for every share.
    """
    script, *options = CLASSIFIER
    succeed(2, DOUBLE, script, small_toy, *options, "--run", "r", cwd=tmp_path)
    assert_as_near_as_sums_are(run_folder(tmp_path), run_folder(classifier_in_one), "cats_model.pt")


@pytest.mark.slow
def test_a_generator_in_three_processes_and_in_parts_is_the_one_of_one(generator_in_one, small_toy, tmp_path):
    """Each share of 4, 3 or 3 images is computed in two parts; EMA, validation and samples included."""
    script, *options = DIT
    succeed(3, DOUBLE, script, small_toy, *options, "--accumulate", 2, "--run", "r", cwd=tmp_path)
    run, other = run_folder(tmp_path), run_folder(generator_in_one)
    assert_as_near_as_sums_are(run, other, "tiny_dit.pt")
    grids = [np.asarray(Image.open(folder / "samples" / "step_0000020.png")).astype(int) for folder in (run, other)]
    assert abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.slow
def test_a_run_of_two_processes_is_stopped_at_any_of_them_and_goes_on_with_one(generator_in_one, small_toy, tmp_path):
    """All stop after the same step, one says so, one checkpoint is saved; it knows nothing of how many there were."""
    script, *options = DIT
    started = processes(2, DOUBLE, script, small_toy, *options, "--run", "r", "--save-every", "1e-9", cwd=tmp_path)
    for line in started[0].stdout:
        if "seconds until the first step" in line:
            break
    started[1].send_signal(signal.SIGTERM)
    (status, output, errors), (other_status, other_output, other_errors) = finish(started)
    assert status == other_status == 128 + signal.SIGTERM
    step = int(re.search(r"Saved at step (\d+), and stopping", output)[1])
    assert re.fullmatch(rf"stopped: the run is saved at step {step}; go on with it: .* --resume r\n", errors)
    assert (other_output, other_errors) == ("", "")
    assert checkpoints.load_checkpoint(run_folder(tmp_path) / "state.pt")["step"] == step
    run_quietly(DOUBLE, script, "--resume", "r", cwd=tmp_path)
    assert_as_near_as_sums_are(run_folder(tmp_path), run_folder(generator_in_one), "tiny_dit.pt")


@pytest.mark.slow
def test_with_the_same_number_of_processes_a_killed_run_ends_bit_identical(small_toy, tmp_path):
    """Three processes add up in an order, and it is the same after a new start.

    Seen to fail with gloo's own sum of the gradients.
    """
    script, *options = DIT
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
    options += UNSEEN
    succeed(3, script, small_toy, *options, "--run", "r", cwd=tmp_path / "undisturbed")
    started = processes(3, script, small_toy, *options, "--run", "r", "--save-every", "1e-9", cwd=tmp_path / "killed")
    for line in started[0].stdout:
        if "Step 10/20. Validation loss" in line:
            break
    started[1].kill()
    began = time.monotonic()
    ended = finish(started)
    assert time.monotonic() - began < 25, "the others wait for nobody"
    assert [status for status, *_ in ended] in ([LOST_PEER, -signal.SIGKILL, LOST_PEER], [0, -signal.SIGKILL, 0])
    told = "".join(errors for *_, errors in ended)  # torch's own store may say that it has lost the connection
    assert not re.search(r"^(error|stopped|Traceback)", told, re.M), "what died is for the launcher to tell"
    succeed(3, script, "--resume", "r", cwd=tmp_path / "killed")
    one, other = (checkpoints.load(run_folder(tmp_path / name) / "state.pt") for name in ("undisturbed", "killed"))
    for name in ("model", "average", "optimizer", "step", "metrics"):
        assert same(one[name], other[name]), name


@pytest.mark.slow
def test_what_befalls_all_processes_is_one_line(small_toy, tmp_path):
    shutil.copytree(small_toy / "train" / "black", tmp_path / "cats" / "black")
    ended = finish(processes(2, "train.py", "cats", *SMALL, cwd=tmp_path))
    assert [status for status, *_ in ended] == [1, 1]
    assert "".join(errors for *_, errors in ended) == (
        "error: cats has a single class, 'black': a classifier needs at least two\n"
    )


def test_more_processes_than_images_in_a_batch_are_refused(small_toy):
    images = open_dataset(small_toy, Frame(37), small_toy.parent)
    with pytest.raises(train.UserError, match="a batch of 2 images is not enough for 3 processes"):
        TrainingBatches(images, 2, training_transform(32), 0, Processes(0, 3))


@pytest.mark.slow
def test_a_process_ends_with_its_status_whatever_threads_of_gloo_are_at(tmp_path):
    """Seen to end by SIGABRT, where the interpreter is finalized meanwhile."""
    program = tmp_path / "ends.py"
    program.write_text(f"""
import sys, threading, time
sys.path.insert(0, {str(REPOSITORY / "src")!r})
import train_dit
from tinycats.run import options
from tinycats.training import processes

def train(*_):
    import torch
    with processes.joined() as here:
        if here.is_main:
            time.sleep(0.5)  # the other's sum is not there yet when it says what comes after it
        begun = threading.Event()
        def hold_the_thread(_):
            begun.set()
            while True:
                pass
        summed = torch.distributed.all_reduce(torch.zeros(1), async_op=True).get_future()
        if not here.is_main:
            summed.then(hold_the_thread)
            begun.wait()
        print("trained")
        raise RuntimeError("as gloo's, where a peer is lost")

options.train_on_this_machine(train_dit.PARSER, train)
""")
    ended = finish(processes(2, str(program), cwd=tmp_path))
    assert [status for status, *_ in ended] == [LOST_PEER, LOST_PEER]
    assert all(output.endswith("trained\n") for _, output, _ in ended), "nothing that was printed is lost"


# --- the launchers -----------------------------------------------------------------------------------------------

LAUNCHED = f"""
import sys
sys.path.insert(0, {str(REPOSITORY / "src")!r})
import train_dit
from tinycats.run import options
from tinycats.script import launcher
from tinycats.training import processes
launcher.gpus_here = lambda device: 0 if processes.here().count > 1 else 2  # as on a machine with two GPUs
options.train_on_this_machine(train_dit.PARSER, train_dit.train)
"""


@pytest.fixture
def start_with_two_gpus(tmp_path):
    """`python src/train_dit.py …` on a machine that has two GPUs, as far as the script is told."""
    program = tmp_path / "train_dit.py"
    program.write_text(LAUNCHED)

    def start(*arguments: object, launches: bool = True, **environment: str) -> subprocess.Popen:
        environment = {"OMP_NUM_THREADS": "1"} | environment
        return script_process(str(program), *arguments, cwd=tmp_path, env=environment, launches=launches)

    return start


def children(process: subprocess.Popen) -> list[int]:
    """The two processes that it has launched, by rank."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            words = status.read_text().rpartition(")")[2].split()
            if int(words[1]) == process.pid:
                found.append((int(words[19]), int(status.parent.name)))  # when it was started
    return [pid for _, pid in sorted(found)][-2:]  # before them there may be what they were forked from


@pytest.mark.slow
def test_started_by_itself_a_script_uses_all_gpus_and_ends_as_its_processes_do(
    start_with_two_gpus, small_toy, tmp_path
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    options = (*DIT[1:], "--steps", 100_000, "--sample-every", 100_000)
    process = start_with_two_gpus(small_toy, *options, "--run", "r", TMPDIR=str(temporary))
    for line in process.stdout:
        if "seconds until the first step" in line:
            break
    process.send_signal(signal.SIGINT)
    ((status, _, errors),) = finish([process])
    assert status == 128 + signal.SIGINT
    assert re.fullmatch(r"stopped: the run is saved at step \d+; go on with it: .* --resume r\n", errors)
    assert not list(temporary.iterdir()), "no temporary file is left behind"

    process = start_with_two_gpus("--resume", "r")
    for line in process.stdout:
        if "seconds until the first step" in line:
            break
    os.kill(children(process)[1], signal.SIGKILL)
    ((status, _, errors),) = finish([process])
    assert (status, errors) == (1, "error: process 1 of the run died (SIGKILL); the others have ended too\n")

    # These two import torch themselves, after its launcher has told them to print less.
    process = start_with_two_gpus("--resume", "r", launches=False)
    for line in process.stdout:
        if "seconds until the first step" in line:
            break
    orphans = children(process)
    process.kill()
    ((_, _, errors),) = finish([process])
    assert re.fullmatch(r"stopped: the run is saved at step \d+; .*\n", errors), "they do not train on unseen"
    assert not any(Path(f"/proc/{pid}/fd").exists() and list(Path(f"/proc/{pid}/fd").iterdir()) for pid in orphans)


@pytest.mark.slow
def test_two_launchers_are_two_machines(generator_in_one, small_toy, tmp_path):
    """`torchrun --nnodes 2` by hand, two processes each; each machine has its own copy of the data, and one of them
    gets the run."""
    script, *options = DIT
    port = random.Random(str(tmp_path)).randrange(20_000, 30_000)
    launchers = []
    for number in range(2):
        machine = tmp_path / f"machine {number}"
        shutil.copytree(small_toy, machine / "cats")
        launched = ("--nnodes", "2", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", str(port))
        launched += ("--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", f"is_host={number == 0}")
        launched += ("--local-addr", "localhost", "--", REPOSITORY / "tests" / "in_double_precision.py")
        command = ["-m", "torch.distributed.run", *launched, script, "cats", *options, "--run", "r"]
        words = list(map(str, command))
        launchers.append(WARM_PYTHON.popen(words, launches=True, cwd=machine, stdout=-1, stderr=-1, text=True))
    ended = finish(launchers)
    assert [status for status, *_ in ended] == [0, 0], ended
    (run,) = tmp_path.glob("*/outputs/runs/r")
    assert len(list(tmp_path.glob("*/cats.packed"))) == 2
    assert_as_near_as_sums_are(run, run_folder(generator_in_one), "tiny_dit.pt")


def test_how_a_run_ended_is_told_by_those_of_its_processes_that_know():
    assert launcher._status({1: LOST_PEER, 0: 143}) == 143
    assert launcher._status({0: 2, 1: -15}) == 2
    with pytest.raises(TransientError, match=r"process 1 of the run died \(SIGKILL\)"):
        launcher._status({0: -15, 1: -9})
    with pytest.raises(TransientError, match=r"process 1 of the run died \(SIGKILL\)"):
        launcher._status({0: LOST_PEER, 1: -9})
    with pytest.raises(TransientError, match="on another machine has ended"):
        launcher._status({0: LOST_PEER})


def test_in_the_scripts_no_other_way_to_several_gpus_is_left():
    for module in (train, train_dit):
        assert "DataParallel" not in Path(module.__file__).read_text()
