"""The product on Modal: the real client and the real container entry point, on the stand-in of tests/modal_cloud.

Past failures are those of an earlier system of this design (plans/ADR-007); the test of each says how to put
the fault back.
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import REPOSITORY, SMALL, UNSEEN, WARM_PYTHON
from modal_cloud import Fault, Finished, ModalCloud
from modal_cloud.containers import Container
from tinycats import classifier, generator
from tinycats.images.image_folders import scan
from tinycats.on_modal.uploads import Upload
from tinycats.run import checkpoints

SCRIPT = REPOSITORY / "src" / "train.py"
EPOCHS = 3  # of five steps each, with SMALL
SMALL_DIT = ("--image-size", "32", "--patch-size", "8", "--dim", "64", "--depth", "2", "--heads", "2")
SMALL_DIT += ("--batch-size", "8", "--steps", "20", "--sample-every", "10", "--sample-steps", "3", *UNSEEN)

pytestmark = pytest.mark.slow


def outputs(cloud: ModalCloud) -> Path:
    """The files of the outputs volume."""
    return cloud.volume("cats-model-outputs").files


def results(run: Path) -> tuple[dict, str]:
    return checkpoints.load(run / "cats_model.pt")["state_dict"], (run / "metrics.jsonl").read_text()


def train(cloud: ModalCloud, folder: Path, cwd: Path, *arguments: object, name: str = "r") -> Finished:
    """`modal run src/train.py <folder> …` with the small settings."""
    return cloud.run("modal", "run", SCRIPT, folder, *SMALL, "--epochs", EPOCHS, "--run", name, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def undisturbed(small_toy, shared_folder) -> tuple[dict, str]:
    """Weights and metrics of a run that nothing happened to."""

    def fill(folder: Path) -> None:
        shutil.copytree(small_toy, folder / "my cats")
        with ModalCloud(WARM_PYTHON) as cloud:
            result = train(cloud, Path("my cats"), folder)
            assert result.status == 0, result.output
            assert ends(trainings(cloud)) == ["success"]
            shutil.copytree(outputs(cloud) / "runs", folder / "runs")

    return results(shared_folder("on_modal", fill) / "runs" / "r")


def assert_undisturbed(cloud: ModalCloud, undisturbed: tuple[dict, str]) -> None:
    weights, metrics = results(outputs(cloud) / "runs" / "r")
    assert metrics == undisturbed[1]
    assert all(torch.equal(weights[name], undisturbed[0][name]) for name in undisturbed[0])


def trainings(cloud: ModalCloud) -> list[Container]:
    """The containers with a GPU."""
    return cloud.containers_of("train_on_modal")


def preparations(cloud: ModalCloud) -> list[Container]:
    """Those without one."""
    return cloud.containers_of("prepare_on_modal")


def ends(containers: list[Container]) -> list[str | None]:
    return [container.ended for container in containers]


def first_step(container: Container) -> int:
    """At which step the container began."""
    return int(re.search(r"(?:Starting|Resuming) run \S+ at step (\d+)", container.output)[1])


# --- the commands of the README ----------------------------------------------------------------------------------


def test_train_list_fetch_and_predict(modal_cloud, tmp_path):
    """Past failures 1 (positional arguments), 2 (modules missing in the container).

    Seen to fail with `def main(data_dir: str = "data/cats")` as the entry point («unexpected extra argument»),
    and without `.add_local_python_source("tinycats")` in resources.IMAGE («No module named 'tinycats'»).
    """
    result = modal_cloud.run("modal", "run", SCRIPT, "data/toy", "--epochs", "1", cwd=tmp_path)
    assert result.status == 0, result.output
    assert "Epoch 1/1 complete. Loss: " in result.stdout, "the container's log is seen on the terminal"
    assert "modal volume get cats-model-outputs cats_model.pt ." in result.stdout
    assert modal_cloud.missing == []

    listed = modal_cloud.run("modal", "volume", "ls", "cats-model-outputs", cwd=tmp_path)
    assert listed.status == 0
    assert "cats_model.pt" in listed.stdout
    fetched = modal_cloud.run("modal", "volume", "get", "cats-model-outputs", "cats_model.pt", ".", cwd=tmp_path)
    assert fetched.status == 0, fetched.output
    model = classifier.load(tmp_path / "cats_model.pt")
    Image.new("RGB", (80, 80), "black").save(tmp_path / "cat.png")
    assert set(model.predict([tmp_path / "cat.png"])[0]) == {"black", "ginger", "other", "siamese", "tabby"}


def test_what_is_asked_of_modal_and_two_gpus_are_a_process_each(modal_cloud, small_folder, tmp_path):
    """Also with options behind a `--`; and nothing but `modal` is imported on the laptop (test_laptop.py). All
    processes stop when the container is preempted, one state is committed, and the next container's go on from it.

    Seen to fail with the address that torch's launcher takes by default: a container's host name is not known to it.
    """
    modal_cloud.fail(1, Fault("preempt", after_commits=1))  # the end of the first epoch waits for that, if nothing else
    arguments = ("--gpu", "A100:2", "--timeout", "1.5", *SMALL, "--epochs", "2", "--save-every", "1e-9", small_folder)
    result = modal_cloud.run("modal", "run", SCRIPT, "--", *arguments, "--run", "r", cwd=tmp_path)
    assert result.status == 0, result.output
    assert "Renting A100:2 with 8 cores and 12 GiB of memory: about $4.67 an hour" in result.stdout
    assert ends(trainings(modal_cloud)) == ["interrupted", "success"]
    assert 0 < first_step(trainings(modal_cloud)[1]) < 10
    for container in trainings(modal_cloud):
        assert container.output.count("Training on 2 x the CPU") == 1, "process 0 alone has a log"
    assert trainings(modal_cloud)[0].output.count("stopped: the run is saved at step") == 1
    assert trainings(modal_cloud)[1].output.count("Epoch 2/2 complete") == 1
    assert (outputs(modal_cloud) / "cats_model.pt").exists()
    asked = {function.definition.function_name: function.definition for function in modal_cloud.functions}
    assert set(asked) == {"prepare_on_modal", "train_on_modal"}
    cores = {name: definition.resources.milli_cpu / 1000 for name, definition in asked.items()}
    assert cores == {"prepare_on_modal": 8, "train_on_modal": 8}
    for definition in asked.values():
        assert definition.resources.memory_mb >= 8192
        assert definition.timeout_secs == 5400
        assert definition.retry_policy.retries == 10
        assert definition.single_use_containers
        volumes = {mount.mount_path: mount.volume_id for mount in definition.volume_mounts}
        assert set(volumes) == {"/outputs", "/data"}
        assert volumes["/outputs"] == modal_cloud.volume("cats-model-outputs").volume_id
        assert volumes["/data"] == modal_cloud.volume("cats-dataset").volume_id
    assert asked["prepare_on_modal"].resources.gpu_config.count == 0
    gpu = asked["train_on_modal"].resources.gpu_config
    assert (gpu.gpu_type, gpu.count) == ("A100", 2)
    assert any("build-essential" in command for command in modal_cloud.image_commands), "torch.compile needs a compiler"
    assert any("uv pip install" in command and "requirements.txt" in command for command in modal_cloud.image_commands)


def test_a_run_on_two_nodes(modal_cloud, small_folder, tmp_path):
    """The containers of a cluster find one another, by torch's rendezvous in the first; one of them writes.

    Here each has one process. RDMA, and addresses of more than one machine, were never tried.
    """
    modal_cloud.set_in_containers(TINYCATS_PROCESSES="1")
    script = SCRIPT.with_name("train_dit.py")
    arguments = (small_folder, *SMALL_DIT, "--gpu", "H100:8", "--nodes", "2", "--run", "r")
    result = modal_cloud.run("modal", "run", script, *arguments, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "Renting 2 times H100:8 with 48 cores" in result.stdout
    (definition,) = (f.definition for f in modal_cloud.functions if f.definition.function_name == "train_on_modal")
    assert definition._experimental_group_size == 2
    assert (definition.resources.gpu_config.gpu_type, definition.resources.gpu_config.count) == ("H100", 8)
    assert ends(trainings(modal_cloud)) == ["success", "success"]
    assert sum("Training on 2 x the CPU" in container.output for container in trainings(modal_cloud)) == 1
    commits = sorted(container.commits["cats-model-outputs"] for container in trainings(modal_cloud))
    assert commits[0] == 1 < commits[1], "one commits what it has written, the other when Modal's client ends"
    assert generator.load(outputs(modal_cloud) / "tiny_dit.pt").classes[-1] == "tabby"


def test_by_default_it_asks_for_one_t4(modal_cloud, tmp_path):
    assert modal_cloud.run("modal", "deploy", SCRIPT, cwd=tmp_path).status == 0
    gpus = {
        function.definition.function_name: function.definition.resources.gpu_config
        for function in modal_cloud.functions
    }
    assert (gpus["train_on_modal"].gpu_type, gpus["train_on_modal"].count) == ("T4", 1)
    assert gpus["prepare_on_modal"].count == 0


def weights_of_imagenet(cloud: ModalCloud, tmp_path: Path) -> None:
    """Random weights where torchvision looks for ImageNet's: no test downloads any."""
    torch.manual_seed(0)
    checkpoint = classifier.build("resnet18", 1000, pretrained=False).state_dict()
    torch.save(checkpoint, tmp_path / "resnet18-f37072fd.pth")
    for command in (
        ("modal", "volume", "create", "cats-dataset"),
        ("modal", "volume", "put", "cats-dataset", "resnet18-f37072fd.pth", "/torch/hub/checkpoints/"),
    ):
        result = cloud.run(*command, cwd=tmp_path)
        assert result.status == 0, result.output
    cloud.set_in_containers(TORCH_HOME="/data/torch")


def test_with_no_arguments_real_cats_are_prepared_once_in_the_volume(modal_cloud, mirror, tmp_path):
    """Past failures 3 (the download script is not in the container) and 4 (data/cats looked up in the container's
    working directory).

    Seen to fail with `subprocess.run(["bash", "data/download.sh"], check=True)` in container._prepare, and
    with `str(options.data_dir)` for `str(data_dir)` in the payload.
    """
    weights_of_imagenet(modal_cloud, tmp_path)
    modal_cloud.set_in_containers(TINYCATS_PETS_MIRROR=mirror.address)
    result = modal_cloud.run("modal", "run", SCRIPT, cwd=tmp_path)
    assert result.status == 0, result.output
    assert "3 classes: Abyssinian, British_Shorthair, other" in result.stdout
    cats = modal_cloud.volume("cats-dataset").files / "cats"
    assert {path.name for path in cats.iterdir()} == {"train", "val"}
    assert not (cats.parent / "cats.download").exists()
    assert [container.function for container in modal_cloud.containers] == ["prepare_on_modal", "train_on_modal"]
    for waiting in ("Downloading", "Packing"):
        assert waiting in preparations(modal_cloud)[0].output
        assert waiting not in trainings(modal_cloud)[0].output, "no GPU is paid to wait for it"

    asked = len(mirror.requests)
    again = modal_cloud.run("modal", "run", SCRIPT, "data/cats", "--epochs", "1", cwd=tmp_path)
    assert again.status == 0, again.output
    assert len(mirror.requests) == asked, "a second run does not download again"
    assert "Packing" not in again.stdout, "nor decode again"
    assert len(preparations(modal_cloud)) == 1, "nor wait for anything"


def test_preparing_survives_a_preemption_a_crash_and_the_laptops_end(modal_cloud, small_folder, tmp_path, undisturbed):
    """And is called for once: the container that dies after it has called for the training calls for it again, and the
    second call finds out that the first is at work.

    Seen to fail with `return None` in container._other_call (two calls train the same run).
    """
    for number, kind in enumerate(("preempt", "kill"), start=1):
        modal_cloud.fail(number, Fault(kind, volume="cats-dataset"), "prepare_on_modal")
    modal_cloud.fail(3, Fault("kill", in_spawn=True), "prepare_on_modal")
    process = run_until(modal_cloud, tmp_path, "Packing 60 images", *small_run(small_folder, "--detach"))
    process.kill()
    process.communicate()
    modal_cloud.wait()
    assert ends(preparations(modal_cloud)) == ["interrupted", "died", "died", "success"]
    assert ends(trainings(modal_cloud)) == ["success", "success"]
    assert sum("run r at step" in container.output for container in trainings(modal_cloud)) == 1
    assert_undisturbed(modal_cloud, undisturbed)


def test_what_was_put_into_the_volume_by_hand_is_packed_again_when_it_changes(modal_cloud, small_folder, tmp_path):
    for command in (
        ("modal", "volume", "create", "cats-dataset"),
        ("modal", "volume", "put", "cats-dataset", small_folder, "/mine"),
    ):
        result = modal_cloud.run(*command, cwd=tmp_path)
        assert result.status == 0, result.output
    shutil.rmtree(tmp_path / small_folder)
    result = train(modal_cloud, Path("data/mine"), tmp_path, "--epochs", "1", name="one")
    assert result.status == 0, result.output
    Image.new("RGB", (64, 64), "green").save(modal_cloud.volume("cats-dataset").files / "mine/train/black/000.png")
    result = train(modal_cloud, Path("data/mine"), tmp_path, "--epochs", "1", name="two")
    assert result.status == 0, result.output
    assert "Packing 60 images" in result.stdout
    assert len(list((modal_cloud.volume("cats-dataset").files / "mine.packed").glob("37px-*"))) == 1


def test_an_interrupted_upload_goes_on_and_sends_nothing_twice(modal_cloud, small_folder, tmp_path):
    upload = Upload(scan(tmp_path / small_folder))
    remote = f"/uploads/{small_folder}-{upload.digest[:12]}/{upload.parts[0].name}"
    with upload.parts[0].archive(upload.folder) as archive:
        (tmp_path / "part.tar").write_bytes(archive.read())
    for command in (
        ("modal", "volume", "create", "cats-dataset"),
        ("modal", "volume", "put", "cats-dataset", "part.tar", remote),
    ):
        assert modal_cloud.run(*command, cwd=tmp_path).status == 0
    result = train(modal_cloud, small_folder, tmp_path, "--epochs", "1")
    assert result.status == 0, result.output
    assert "0 of 1 archives (0 MB) are to be sent" in result.stdout


def test_a_download_cut_in_the_middle_is_retried_and_not_taken_for_whole(modal_cloud, mirror, tmp_path):
    modal_cloud.set_in_containers(TINYCATS_PETS_MIRROR=mirror.address)
    mirror.cut_next = {"images.tar.gz": 2}  # torchvision first asks where the address leads, by a GET
    result = modal_cloud.run(
        "modal", "run", SCRIPT, "data/cats", *SMALL, "--batch-size", "4", "--epochs", "1", cwd=tmp_path
    )
    assert result.status == 0, result.output
    assert ends(modal_cloud.containers) == ["failure", "success", "success"]
    assert len(trainings(modal_cloud)) == 1
    photos = list((modal_cloud.volume("cats-dataset").files / "cats").rglob("*.jpg"))
    assert len(photos) == 7


def test_a_local_folder_is_uploaded_and_packed_once_and_its_damage_is_noticed(modal_cloud, small_folder, tmp_path):
    first = train(modal_cloud, small_folder, tmp_path, "--epochs", "1", name="one")
    assert first.status == 0, first.output
    assert "Uploading 60 images" in first.stdout
    (uploaded,) = (modal_cloud.volume("cats-dataset").files / "uploads").glob("my cats-????????????")
    assert [path.suffix for path in sorted(uploaded.iterdir())] == ["", ".tar"], "in an archive, with a receipt"

    second = train(modal_cloud, small_folder, tmp_path, "--epochs", "1", name="two")
    assert second.status == 0, second.output
    assert "Uploading" not in second.stdout
    assert "Packing" not in second.stdout
    assert len(preparations(modal_cloud)) == 1

    (pixels,) = uploaded.with_name(f"{uploaded.name}.packed").rglob("pixels.bin")
    whole = pixels.read_bytes()
    pixels.write_bytes(bytes(4096) + whole[4096:])
    third = train(modal_cloud, small_folder, tmp_path, "--epochs", "1", name="three")
    assert third.status == 0, third.output
    assert "is damaged at train/black/000.png: preparing it again" in third.stdout
    assert "Epoch 1/1 complete" in third.stdout, "the laptop follows"
    assert ends(trainings(modal_cloud)[2:]) == ["success", "success"]
    assert pixels.read_bytes() == whole
    metrics = [results(outputs(modal_cloud) / "runs" / name)[1] for name in ("one", "two", "three")]
    assert metrics[0] == metrics[1] == metrics[2]


def test_a_mistake_costs_nothing_and_creates_nothing(modal_cloud, tmp_path):
    for arguments, message in (
        (["--epochs", "0"], "--epochs"),
        (["nowhere"], "nowhere is not there"),
        (["--gpu", "T1000"], "--gpu"),
    ):
        result = modal_cloud.run("modal", "run", SCRIPT, *arguments, cwd=tmp_path)
        assert result.status == 2
        assert message in result.stderr
    assert modal_cloud.run("modal", "run", SCRIPT, "--help", cwd=tmp_path).status == 0
    assert modal_cloud.rpcs == []


def test_a_data_folder_that_is_neither_here_nor_in_the_volume_rents_nothing(modal_cloud, tmp_path):
    result = modal_cloud.run("modal", "run", SCRIPT, "data/mine", cwd=tmp_path)
    assert result.status == 1, result.output
    assert "error: data/mine is neither here nor in the volume cats-dataset" in result.stderr
    assert modal_cloud.containers == []


def test_a_deployed_function_can_be_called_by_name(modal_cloud, small_folder, tmp_path):
    """`.remote()` too: it is the client that retries then."""
    deployed = modal_cloud.run("modal", "deploy", SCRIPT, cwd=tmp_path)
    assert deployed.status == 0, deployed.output
    payload = {
        "arguments": ["data/toy", *SMALL, "--epochs", "1"],
        "run": "r",
        "submission": "s",
        "data_dir": "/data/toy",
    }
    program = f"""
import modal
function = modal.Function.from_name("tiny-cats-model", "train_on_modal")
print(function.remote({payload!r})["model"])
"""
    called = modal_cloud.run(sys.executable, "-c", program, cwd=tmp_path)
    assert called.status == 0, called.output
    assert called.stdout.strip() == "/outputs/cats_model.pt"
    assert (outputs(modal_cloud) / "cats_model.pt").exists()


def test_modal_shell_finds_the_function(modal_cloud, tmp_path):
    """As far as the stand-in goes: the sandbox that the shell would run in is asked for, and not made."""
    modal_cloud.run("modal", "shell", f"{SCRIPT}::train_on_modal", "--cmd", "true", cwd=tmp_path)
    assert modal_cloud.missing
    assert set(modal_cloud.missing) <= {"SandboxCreate"}


def test_a_detached_run_is_watched_and_stopped_by_its_apps_id(modal_cloud, small_folder, tmp_path):
    process = run_until_it_hangs(modal_cloud, tmp_path, *small_run(small_folder, "--detach"))
    process.kill()
    process.communicate()
    assert modal_cloud.run("modal", "token", "info", cwd=tmp_path).status == 0
    listed = modal_cloud.run("modal", "app", "list", "--json", cwd=tmp_path)
    app_id = re.search(r"ap-\d{22}", listed.stdout)[0]
    assert "tiny-cats-model" in listed.stdout
    logs = modal_cloud.run("modal", "app", "logs", app_id, cwd=tmp_path)
    assert "Epoch 1/3 complete" in logs.stdout, logs.output
    runs = ("modal", "run", "-q", SCRIPT.with_name("runs.py"))
    listed = modal_cloud.run(*runs, cwd=tmp_path)
    assert re.match(r"r +\S+ \S+ +train.py +step 5 of 15 +balanced_accuracy [01].\d+ +in progress\n", listed.stdout)
    refused = modal_cloud.run(*runs, "--remove", "r", cwd=tmp_path)
    assert (refused.status, refused.stderr) == (1, "error: the run r is in progress\n"), refused.output
    stopped = modal_cloud.run("modal", "app", "stop", app_id, "--yes", cwd=tmp_path)
    assert stopped.status == 0, stopped.output
    followed = modal_cloud.run("modal", "app", "logs", app_id, "--follow", cwd=tmp_path)
    assert "Epoch 1/3 complete" in followed.output
    assert "go on: modal run src/train.py --resume r" in modal_cloud.run(*runs, cwd=tmp_path).stdout
    assert modal_cloud.run(*runs, "--remove", "r", cwd=tmp_path).stdout == "removed the run r\n"
    assert not (outputs(modal_cloud) / "runs" / "r").exists()
    assert modal_cloud.run(*runs, cwd=tmp_path).stdout == "there are no runs in outputs/runs\n"
    assert modal_cloud.missing == []
    assert ends(trainings(modal_cloud)) == ["died"]


def test_an_uploaded_folder_can_be_forgotten(modal_cloud, tmp_path):
    (tmp_path / "image.png").write_bytes(b"")
    modal_cloud.run("modal", "volume", "create", "cats-dataset", cwd=tmp_path)
    modal_cloud.run("modal", "volume", "put", "cats-dataset", "image.png", "/mine/a/image.png", cwd=tmp_path)
    assert (modal_cloud.volume("cats-dataset").files / "mine" / "a" / "image.png").exists()
    removed = modal_cloud.run("modal", "volume", "rm", "--recursive", "cats-dataset", "mine", cwd=tmp_path)
    assert removed.status == 0, removed.output
    assert list(modal_cloud.volume("cats-dataset").files.iterdir()) == []


# --- what can happen to a run ------------------------------------------------------------------------------------


def test_whatever_ends_a_container_the_next_goes_on(modal_cloud, small_folder, tmp_path, undisturbed):
    """Past failures 6 (restarted at step 0, schedule and random numbers forgotten) and 7 (nothing committed).

    Seen to fail without `schedule.load_state_dict` in src/train.py (other metrics), and with an empty
    `Container.persist` (nothing is ever committed).
    """
    kinds = ["preempt", "kill", "preempt", "timeout", "kill", "timeout"]  # the last strike when all is trained
    for container, kind in enumerate(kinds, start=1):
        modal_cloud.fail(container, Fault(kind, after_commits=2))
    result = train(modal_cloud, small_folder, tmp_path, "--save-every", "1e-9")
    assert result.status == 0, result.output
    ended = {"kill": "died", "preempt": "interrupted", "timeout": "timeout"}
    assert ends(trainings(modal_cloud)) == [ended[kind] for kind in kinds] + ["success"]
    assert_undisturbed(modal_cloud, undisturbed)
    # The first commit of the first container is the beginning's; the second whoever comes next has not lost.
    steps = [first_step(container) for container in trainings(modal_cloud)]
    assert steps == sorted(steps)
    assert steps[0] == 0 < steps[1]


def test_killed_in_the_middle_of_a_commit_it_redoes_what_lay_after_the_last(
    modal_cloud, small_folder, tmp_path, undisturbed
):
    modal_cloud.fail(1, Fault("kill", after_commits=3, in_commit=True))
    result = train(modal_cloud, small_folder, tmp_path)
    assert result.status == 0, result.output
    assert [first_step(container) for container in trainings(modal_cloud)] == [0, 5]
    assert_undisturbed(modal_cloud, undisturbed)


def test_commits_in_the_background_of_half_written_files_do_no_harm(modal_cloud, small_folder, tmp_path, undisturbed):
    modal_cloud.commit_in_background(every=0.02)  # seconds: the file of a checkpoint is being written for as long
    modal_cloud.fail(1, Fault("kill", after_commits=2))
    result = train(modal_cloud, small_folder, tmp_path, "--save-every", "1e-9")
    assert result.status == 0, result.output
    assert_undisturbed(modal_cloud, undisturbed)


def run_until(cloud: ModalCloud, cwd: Path, text: str, *command: object):
    """Start a command and wait until it has printed a text."""
    process = cloud.start(*command, cwd=cwd)
    for line in process.stdout:
        if text in line:
            return process
    raise AssertionError(f"{text!r} was not printed: {process.stderr.read()}")


def run_until_it_hangs(cloud: ModalCloud, cwd: Path, *command: object):
    """Start a run, and wait until its container hangs: when its first epoch is committed, for it need not train on."""
    cloud.fail(1, Fault("hang", after_commits=2))  # the first commit is the beginning's
    process = run_until(cloud, cwd, "Epoch 1/3 complete", *command)
    while trainings(cloud)[0].commits["cats-model-outputs"] < 2:
        time.sleep(0.01)
    return process


def small_run(folder: Path, *before: str) -> list:
    return ["modal", "run", *before, SCRIPT, folder, *SMALL, "--epochs", EPOCHS, "--run", "r"]


def test_while_commits_fail_the_run_waits_and_goes_on(modal_cloud, small_folder, tmp_path, undisturbed):
    modal_cloud.fail_commits(rpcs=2)
    result = train(modal_cloud, small_folder, tmp_path)
    assert result.status == 0, result.output
    assert result.stdout.count("The volume cannot be committed") == 2
    assert len(trainings(modal_cloud)) == 1
    assert_undisturbed(modal_cloud, undisturbed)


def test_a_control_plane_that_is_gone_for_twenty_seconds_costs_nothing(
    modal_cloud, small_folder, tmp_path, undisturbed
):
    process = run_until(modal_cloud, tmp_path, "images to train on", *small_run(small_folder))
    modal_cloud.be_unavailable(seconds=20)
    output, errors = process.communicate(timeout=600)
    modal_cloud.wait()
    assert_undisturbed(modal_cloud, undisturbed)
    assert process.returncode == 0, output + errors


def test_detached_it_outlives_its_laptop_even_when_it_is_preempted_then(
    modal_cloud, small_folder, tmp_path, undisturbed
):
    """Past failure 5: the run died with the terminal that had started it.

    Seen to fail with `function.remote(payload)` for `function.spawn(payload).get()` in laptop.submit: the
    timeout is then nobody's to retry.
    """
    modal_cloud.fail(1, Fault("timeout", after_commits=2))
    modal_cloud.fail(2, Fault("preempt", after_commits=2))
    process = run_until(modal_cloud, tmp_path, "images to train on", *small_run(small_folder, "--detach"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    modal_cloud.wait()
    assert ends(trainings(modal_cloud)) == ["timeout", "interrupted", "success"]
    assert_undisturbed(modal_cloud, undisturbed)


def test_a_run_cut_short_goes_on_by_name(modal_cloud, small_folder, tmp_path, undisturbed):
    process = run_until_it_hangs(modal_cloud, tmp_path, *small_run(small_folder))
    process.send_signal(signal.SIGINT)  # Ctrl-C: without --detach the app is torn down
    process.communicate(timeout=120)
    modal_cloud.wait()
    assert trainings(modal_cloud)[0].ended == "died"
    result = modal_cloud.run("modal", "run", SCRIPT, "--resume", "r", cwd=tmp_path)
    assert result.status == 0, result.output
    assert first_step(trainings(modal_cloud)[1]) == 5
    assert_undisturbed(modal_cloud, undisturbed)


# --- the generator -----------------------------------------------------------------------------------------------


def test_the_generator_too_survives_whatever_ends_its_containers(modal_cloud, small_folder, tmp_path):
    settings = (*SMALL_DIT, "--steps", "60", "--sample-every", "20", "--save-every", "0.001")
    command = ("modal", "run", REPOSITORY / "src" / "train_dit.py", small_folder, *settings)
    undisturbed = modal_cloud.run(*command, "--run", "undisturbed", cwd=tmp_path)
    assert undisturbed.status == 0, undisturbed.output
    assert "modal volume get cats-model-outputs tiny_dit.pt ." in undisturbed.stdout
    assert {function.app.name for function in modal_cloud.functions} == {"tiny-cats-dit"}
    assert "A10G" in [function.definition.resources.gpu_config.gpu_type for function in modal_cloud.functions]

    for container, kind in ((2, "preempt"), (3, "kill"), (4, "timeout")):
        modal_cloud.fail(container, Fault(kind, after_commits=2))
    disturbed = modal_cloud.run(*command, "--run", "disturbed", cwd=tmp_path)
    assert disturbed.status == 0, disturbed.output
    ended = ends(trainings(modal_cloud))
    assert ended == ["success", "interrupted", "died", "timeout", "success"]
    one, other = (outputs(modal_cloud) / "runs" / name for name in ("undisturbed", "disturbed"))
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for grid in ("step_0000020.png", "step_0000040.png", "step_0000060.png"):
        assert (one / "samples" / grid).read_bytes() == (other / "samples" / grid).read_bytes()
    weights, others = (checkpoints.load(run / "tiny_dit.pt")["state_dict"] for run in (one, other))
    assert all(torch.equal(weights[name], others[name]) for name in weights)

    fetched = modal_cloud.run("modal", "volume", "get", "cats-model-outputs", "tiny_dit.pt", ".", cwd=tmp_path)
    assert fetched.status == 0, fetched.output
    assert generator.load(tmp_path / "tiny_dit.pt").sample(["tabby"], steps=2).shape == (1, 3, 32, 32)


# --- mistakes that no retry can mend -----------------------------------------------------------------------------


def assert_one_line_and_no_retry(cloud: ModalCloud, result: Finished, message: str) -> None:
    assert result.status == 1, result.output
    lines = [line for line in result.stderr.splitlines() if line]
    assert len(lines) == 1, result.stderr
    assert re.match(rf"error: .*{message}", lines[0])
    assert ends(cloud.containers) in (["success"], ["success", "success"]), "it ended at once, in either function"
    assert "Traceback" not in result.output


def test_bad_data_fails_once_with_its_line_on_the_terminal(modal_cloud, small_folder, tmp_path):
    broken = tmp_path / small_folder / "train" / "tabby"
    for image in broken.iterdir():
        image.write_text("I am not an image")
    result = train(modal_cloud, small_folder, tmp_path)
    assert_one_line_and_no_retry(modal_cloud, result, "8 of 60 images cannot be read")
    assert not (outputs(modal_cloud) / "runs").exists()


def test_a_loss_that_diverges_fails_once_and_its_log_is_in_the_volume(modal_cloud, small_folder, tmp_path):
    """Past failure 7: nothing was committed when the run failed. (A container that ends by itself commits once
    more, so this does not depend on run_in_container's own commit alone.)"""
    result = train(modal_cloud, small_folder, tmp_path, "--lr", "1e8", "--gradient-clip", "0")
    assert_one_line_and_no_retry(modal_cloud, result, "training diverged")
    log = (outputs(modal_cloud) / "runs" / "r" / "train.log").read_text()
    assert "training diverged" in log


def test_a_run_that_is_not_in_the_volume_cannot_be_resumed_and_rents_nothing(modal_cloud, tmp_path):
    result = modal_cloud.run("modal", "run", SCRIPT, "--resume", "gone", cwd=tmp_path)
    assert result.status == 1
    assert "error: --resume gone: no such run in the volume cats-model-outputs (there: none)" in result.stderr
    assert modal_cloud.containers == []


def test_a_run_that_is_taken_or_cannot_go_on_is_refused_before_anything_is_rented(modal_cloud, small_folder, tmp_path):
    assert train(modal_cloud, small_folder, tmp_path, "--epochs", "1").status == 0
    before = results(outputs(modal_cloud) / "runs" / "r")[1]
    result = train(modal_cloud, small_folder, tmp_path, "--epochs", "2")
    assert result.status == 1, result.output
    assert "error: the run r exists; go on with it by --resume r" in result.stderr
    assert len(trainings(modal_cloud)) == 1
    assert results(outputs(modal_cloud) / "runs" / "r")[1] == before

    other_script = modal_cloud.run("modal", "run", SCRIPT.with_name("train_dit.py"), "--resume", "r", cwd=tmp_path)
    assert other_script.status == 1
    assert "error: --resume r: that is a run of train.py, not of train_dit.py" in other_script.stderr
    contradicted = modal_cloud.run("modal", "run", SCRIPT, "--resume", "r", "--epochs", "7", cwd=tmp_path)
    assert contradicted.status == 1
    assert "error: the run cannot go on with other options: --epochs 7 (the run has 1)" in contradicted.stderr
    (outputs(modal_cloud) / "runs" / "r" / "run.json").unlink()  # as the versions before it left their runs
    older = modal_cloud.run("modal", "run", SCRIPT, "--resume", "r", cwd=tmp_path)
    assert older.status == 1
    assert "error: the run r was begun by an older version of this program" in older.stderr
    assert len(modal_cloud.containers) == 2, "nothing was rented for any of these"


# --- the container holds what the image carries ------------------------------------------------------------------


def test_all_that_a_container_imports_is_installed_by_its_image(modal_cloud, small_folder, tmp_path):
    """Past failure 8: a missing module was papered over with stubs.

    A copy of the project whose requirements lack tensorboard: it is installed on this machine, but the run
    says that it is not in the image, instead of logging curves that nobody will find. Seen to fail with a
    MagicMock for the SummaryWriter that cannot be imported in runs.Run.
    """
    project = tmp_path / "project"
    shutil.copytree(REPOSITORY / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    requirements = (REPOSITORY / "requirements.txt").read_text()
    (project / "requirements.txt").write_text(re.sub(r"tensorboard.*\n", "", requirements))
    modal_cloud.fail(2, Fault("kill"))
    process = modal_cloud.start(
        "modal", "run", project / "src" / "train.py", small_folder, *SMALL, "--epochs", "1", cwd=tmp_path
    )
    for line in process.stdout:
        if "No module named 'tensorboard'" in line:
            break
    process.kill()
    process.communicate()
    assert "No module named 'tensorboard'" in trainings(modal_cloud)[0].output
    assert "Epoch 1" not in trainings(modal_cloud)[0].output


def test_metrics_in_the_volume_can_be_fetched_and_read(modal_cloud, small_folder, tmp_path):
    assert train(modal_cloud, small_folder, tmp_path, "--epochs", "1").status == 0
    fetched = modal_cloud.run("modal", "volume", "get", "cats-model-outputs", "runs/r/metrics.jsonl", ".", cwd=tmp_path)
    assert fetched.status == 0, fetched.output
    (row,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert row["epoch"] == 1
