"""What can happen to a run, at random and many times: `make campaign`; `python tests/campaign.py --short` in a minute.

Whatever happens, only two ends are right: the one that an undisturbed run has, or a refusal in one line that loses
nothing. Each trial is one or the other, or a defect; the table counts them, and the exit status is 1 if there is one.
"""

import argparse
import contextlib
import io
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # for this process and all that it starts
sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

import numpy as np
from PIL import Image
from tqdm import tqdm

import export
import gallery
import predict
import runs
import sample
import test_train
import test_train_dit
import train
import train_dit
from conftest import REPOSITORY, UNSEEN, WARM_PYTHON, damage, script_process
from modal_cloud import ModalCloud
from tinycats import classifier, generator
from tinycats.images.datasets import open_dataset
from tinycats.images.decoding import decode
from tinycats.images.frames import Frame
from tinycats.images.toy_cats import draw_toy_cats
from tinycats.on_modal import laptop
from tinycats.run import checkpoints
from tinycats.run.finished import MODELS
from tinycats.run.runs import log_to_stdout
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import StopSignals

SAME, REFUSED = "same end", "refused with a line"
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Defect(Exception):
    """Neither the same end nor a refusal; the message says what was seen."""


@dataclass
class Table:
    """What came of the trials, by what was tried."""

    tried: dict[str, Counter[str]] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, row: str, trial: Callable[[], Iterable[str]]) -> None:
        """Run a trial, which yields SAME or REFUSED once or several times, or raises what went wrong."""
        ends: Counter[str] = Counter()
        try:
            ends.update(trial())
        except Exception as error:
            ends["anything else"] += 1
            trace = "" if isinstance(error, Defect) else "\n" + traceback.format_exc()
            self.defects.append(f"{row}: {error}{trace}")
        with self._lock:
            self.tried.setdefault(row, Counter()).update(ends)

    def __str__(self) -> str:
        lines = [f"| | tried | {SAME} | {REFUSED} | anything else |", "|---|---|---|---|---|"]
        for row, ends in self.tried.items():
            counts = (sum(ends.values()), ends[SAME], ends[REFUSED], ends["anything else"])
            lines.append(f"| {row} | {' | '.join(map(str, counts))} |")
        return "\n".join(lines)


@dataclass(frozen=True)
class Script:
    """One of the two scripts, with settings under which a run takes a few seconds.

    Attributes:
        reference: the folder of a run that nothing happened to.
        seconds: what that took.
    """

    name: str
    module: ModuleType
    settings: tuple[str, ...]
    results: Callable[[Path], Any]
    reference: Path
    seconds: float


def scripts(root: Path, data: Path, short: bool) -> list[Script]:
    """Both scripts, their references trained; the short form's generator without the network that looks at images."""
    settings = {
        "train.py": (*test_train.SMALL, "--epochs", str(test_train.EPOCHS), "--save-every", "0.001"),
        "train_dit.py": (*test_train_dit.SMALL, "--save-every", "0.002", *(UNSEEN if short else ())),
    }
    found = []
    for module, tests in ((train, test_train), (train_dit, test_train_dit)):
        name = module.PARSER.prog
        folder = root / f"reference-{name}"
        folder.mkdir()
        began = time.monotonic()
        process = script_process(name, data, *settings[name], "--run", "r", cwd=folder)
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        run = folder / "outputs" / "runs" / "r"
        found.append(Script(name, module, settings[name], tests.results, run, time.monotonic() - began))
    return found


def require_same(script: Script, run: Path) -> None:
    if not test_train_dit.same(script.results(run), script.results(script.reference)):
        raise Defect(f"{script.name}: the run ended otherwise than an undisturbed one")


def require_one_line(text: str, pattern: str) -> None:
    if not re.fullmatch(rf"[^\n]*{pattern}[^\n]*\n", text):
        raise Defect(f"not one line with {pattern!r}: {text[-2000:]!r}")


def beginning(run: Path) -> tuple[str, str]:
    return ("--resume" if checkpoints.has_checkpoint(run) else "--run", run.name)


@contextlib.contextmanager
def folder_below(root: Path) -> Iterator[Path]:
    """A folder for a trial, removed after it."""
    with tempfile.TemporaryDirectory(dir=root, ignore_cleanup_errors=True) as name:
        yield Path(name)


# --- kills -------------------------------------------------------------------------------------------------------


def killed_under_python(script: Script, data: Path, root: Path, seed: int, kills: int) -> Iterator[str]:
    """A run that is signalled at random moments and resumed, until it may end."""
    rng, struck = random.Random(seed), 0
    with folder_below(root) as folder:
        run = folder / "outputs" / "runs" / "r"
        for number in range(kills + 1):
            # A Python of its own imports torch too: signals are to strike there as well.
            cold = rng.random() < 0.25
            arguments = (data, *script.settings, "--num-workers", rng.choice([0, 1, 2]), *beginning(run))
            process = script_process(script.name, *arguments, cwd=folder, cold=cold, start_new_session=True)
            signum = None
            if number < kills:
                signum = rng.choice(SIGNALS)
                timer = threading.Timer(
                    rng.uniform(0.15, script.seconds + (5 if cold else 1)),
                    _signal_quietly,
                    (rng.choice([os.kill, os.killpg]), process.pid, signum),
                )
                timer.start()
            _, errors = process.communicate(timeout=300)
            if number < kills:
                timer.cancel()
            status = process.returncode
            if status == 0 and errors == "":
                continue
            if signum is None:
                raise Defect(f"{script.name} ended with {status}: {errors[-2000:]!r}")
            struck += 1
            if status == -signum and errors == "":
                continue  # before there was anything to say, or by SIGKILL
            if status != 128 + signum:
                raise Defect(f"{script.name} ended with {status} by signal {signum}: {errors[-2000:]!r}")
            require_one_line(errors, "stopped: ")
        require_same(script, run)
    yield from [SAME] * struck


def _signal_quietly(send: Callable[[int, int], None], pid: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        send(pid, signum)


def killed_on_modal(script: Script, data: Path, root: Path, seed: int, kills: int) -> Iterator[str]:
    """A detached run on the stand-in whose containers are signalled at random moments, and at times its laptop too."""
    rng = random.Random(seed)
    with folder_below(root) as folder, ModalCloud(WARM_PYTHON) as cloud:
        shutil.copytree(data, folder / "cats")
        path = REPOSITORY / "src" / script.name
        command = ("modal", "run", "--detach", path, "cats", *script.settings, "--run", "r")
        process = cloud.start(*command, cwd=folder)

        def kill_containers() -> None:
            for number in range(kills):
                while len(cloud.containers) <= number or not cloud.containers[number].pid:
                    if process.poll() is not None and cloud.is_idle:
                        return
                    time.sleep(0.02)
                container = cloud.containers[number]
                strikes = time.monotonic() + rng.uniform(0, script.seconds + 1.5)
                while container.ended is None and time.monotonic() < strikes:
                    time.sleep(0.02)
                if container.ended is None:
                    _signal_quietly(rng.choice([os.kill, os.killpg]), container.pid, rng.choice(SIGNALS))
                    struck.append(number)

        struck: list[int] = []
        killer = threading.Thread(target=kill_containers)
        killer.start()
        laptop_goes = rng.random() < 0.3
        if laptop_goes:
            for line in process.stdout:
                if "images to train on" in line:
                    break
            time.sleep(rng.uniform(0, 2))
            process.kill()
        output, errors = process.communicate(timeout=600)
        cloud.wait()
        killer.join()
        if not laptop_goes and (process.returncode or "Traceback" in errors):
            raise Defect(f"modal run ended with {process.returncode}: {errors[-2000:]}\n{output[-2000:]}")
        if cloud.containers[-1].ended != "success":
            raise Defect(cloud.report())
        try:
            require_same(script, cloud.volume("cats-model-outputs").files / "runs" / "r")
        except Defect as error:
            raise Defect(f"{error}\n{cloud.report()}") from None
    yield from [SAME] * (len(struck) + laptop_goes)


def until_struck(trial: Callable[..., Iterator[str]], *arguments: Any, seed: int, kills: int) -> Iterator[str]:
    """A trial in which at least one of the signals came before the run had ended."""
    for later in itertools.count():
        if ends := list(trial(*arguments, seed + later * 10**6, kills)):
            yield from ends
            return


# --- damages -----------------------------------------------------------------------------------------------------


def damaged_checkpoint(script: Script, root: Path, seed: int) -> Iterator[str]:
    """state.pt, and at times the one before it too."""
    rng = random.Random(seed)
    with folder_below(root) as folder:
        whole = []
        for name in checkpoints.CHECKPOINTS:
            shutil.copy(script.reference / name, folder / name)
            whole.append(checkpoints.load(folder / name))
        damage(folder / checkpoints.CHECKPOINT, rng)
        if rng.random() < 0.2:
            damage(folder / checkpoints.PREVIOUS_CHECKPOINT, rng)
        try:
            found = checkpoints.load_checkpoint(folder / checkpoints.CHECKPOINT)
        except UserError as error:
            require_one_line(f"{error}\n", "state")
            yield REFUSED
            return
        if not any(test_train_dit.same(found, checkpoint) for checkpoint in whole):
            raise Defect(f"{script.name}: a damaged checkpoint was gone on from")
        yield SAME


def damaged_model(script: Script, root: Path, seed: int) -> Iterator[str]:
    """cats_model.pt, tiny_dit.pt."""
    load = {"train.py": classifier.load, "train_dit.py": generator.load}[script.name]
    path = script.reference / MODELS[script.name]
    with folder_below(root) as folder:
        shutil.copy(path, folder / path.name)
        damage(folder / path.name, random.Random(seed))
        try:
            found = load(folder / path.name)
        except UserError as error:
            require_one_line(f"{error}\n", path.name)
            yield REFUSED
            return
        if not test_train_dit.same(dict(found.model.state_dict()), dict(load(path).model.state_dict())):
            raise Defect(f"{path.name}: a damaged model was believed")
        yield SAME


def damaged_pack(data: Path, root: Path, seed: int) -> Iterator[str]:
    """pixels.bin, and what says what is in it."""
    rng = random.Random(seed)
    frame = Frame(37, square=rng.random() < 0.5)
    with folder_below(root) as folder:
        shutil.copytree(data, folder / "cats")
        images = open_dataset(folder / "cats", frame, folder)
        pixels, content = [image.copy() for image in images], images.content
        damage(rng.choice(sorted(images.folder.iterdir())), rng)
        found = open_dataset(folder / "cats", frame, folder)
        if found.content != content or not all((a == b).all() for a, b in zip(found, pixels, strict=True)):
            raise Defect("a damaged pack was trained on")
        yield SAME


def damaged_images(data: Path, root: Path, seed: int) -> Iterator[str]:
    """A few images of a folder: what cannot be read is named and left out, the rest is as Pillow reads it."""
    rng = random.Random(seed)
    frame = Frame(37)
    with folder_below(root) as folder:
        shutil.copytree(data, folder / "cats")
        files = sorted((folder / "cats").rglob("*.png"))
        for path in files[::2]:
            if rng.random() < 0.5:
                Image.open(path).convert("RGB").save(path.with_suffix(".jpg"), quality=90)
                path.unlink()
        victims = rng.sample(sorted(path for path in (folder / "cats").rglob("*.*g")), 8)
        for path in victims:
            damage(path, rng)
        try:
            images = open_dataset(folder / "cats", frame, folder)
        except UserError as error:
            require_one_line(f"{error}\n", "cannot be read")
            yield from [REFUSED] * len(victims)
            return
        left_out = {path for path, _ in images.unreadable}
        paths = [images.path(index) for index in range(len(images))]
        for path in victims:
            name = path.relative_to(folder / "cats").as_posix()
            if name in left_out:
                yield REFUSED
            elif not np.array_equal(images[paths.index(name)], decode(path, frame)):
                raise Defect(f"{name} is packed otherwise than it is decoded")
            else:
                yield SAME


# --- command lines -----------------------------------------------------------------------------------------------

# As lists these would take sixty lines: noqa.
NUMBERS = "0 1 2 3 5 8 -1 -0 0.5 1e-3 1e3 1e400 -1e9 nan inf 1_0 ٣ 0x10 007 +4 .5 5. 1,5".split()  # noqa: SIM905
NUMBERS += [" 7 ", "9" * 25]
TEXTS = "- -- = ../.. / . .. /dev/null ~ * {} ä 猫 \udcff \u202e a/b state.pt nothing.pt @file None".split()  # noqa: SIM905
TEXTS += "r new --help -h T4 A100:2 A100:99 resnet18 cats data/toy data/cats".split()  # noqa: SIM905
TEXTS += ["", " ", "a b", "a\nb", "a\tb", "\x1b[31m", "%s %d", "x" * 300, "x" * 5000]


def random_line(parser: argparse.ArgumentParser, rng: random.Random) -> list[str]:
    """A command line that a user, a script or an enemy could type; many are right but for one word."""
    options = [option for action in parser._actions for option in action.option_strings]
    sane = ["cats", "--image-size", "32", "--batch-size", "8"]
    words = sane if rng.random() < 0.7 else []
    for _ in range(rng.randrange(4)):
        option = rng.choice(options) if rng.random() < 0.9 else rng.choice(TEXTS)
        value = rng.choice(rng.choice([NUMBERS, NUMBERS, TEXTS]))
        words = words + rng.choice([[option, value], [option], [f"{option}={value}"], [value]])
    return words


def read_line(module: ModuleType, words: list[str], on_modal: bool) -> tuple[str, argparse.Namespace | None]:
    """How a script reads a command line, as `python` or as `modal run` does; and its options, if it takes it."""
    parser = module.PARSER
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            options = parser.parse(words, on_modal=on_modal)
            if on_modal and hasattr(options, "data_dir"):
                try:
                    laptop.check_run(options)
                except UserError as error:
                    parser.error(str(error))
        except SystemExit as end:
            if end.code == 0 and not errors.getvalue() and "usage" in output.getvalue():
                return SAME, None  # the help that was asked for
            if end.code != 2:
                raise Defect(f"{words}: exit {end.code}") from None
            require_one_line(errors.getvalue(), "error: ")
            return REFUSED, None
        except BaseException as error:
            raise Defect(f"{parser.prog} {words}: {type(error).__name__}: {error}") from error
    return SAME, options


def command_line_that_uses(module: ModuleType, seed: int) -> Iterator[str]:
    """A random command line of a script that trains nothing."""
    rng = random.Random(seed)
    outcome, _ = read_line(module, random_line(module.PARSER, rng), on_modal=rng.random() < 0.4)
    yield outcome


def command_line(script: Script, data: Path, root: Path, seed: int) -> Iterator[str]:
    """A random command line of one that trains; one that is right starts a run."""
    rng = random.Random(seed)
    words = random_line(script.module.PARSER, rng)
    on_modal = rng.random() < 0.4
    outcome, options = read_line(script.module, words, on_modal)
    if options is None:
        yield outcome
        return
    if on_modal or options.data_dir != Path("cats") or getattr(options, "dim", 0) > 1000:
        yield SAME  # not run here
        return
    # What is accepted starts, and stops at once with its first checkpoint saved.
    with folder_below(root) as folder:
        options.output_dir = folder / "outputs"
        options.data_dir = data
        stop = StopSignals()
        stop.requested = signal.SIGTERM
        with contextlib.redirect_stdout(io.StringIO()):
            log_to_stdout()
            try:
                script.module.train(options, stop, ThisMachine(script.name))
            except UserError as error:
                require_one_line(f"{error}\n", "")
                yield REFUSED
            except KeyboardInterrupt:
                yield SAME
            except BaseException as error:
                raise Defect(f"{script.name} {words}: {type(error).__name__}: {error}") from error
            else:
                raise Defect(f"{script.name} {words}: did not stop")


# --- disks, and two at once --------------------------------------------------------------------------------------


def disk_fills(script: Script, data: Path, root: Path, seed: int) -> Iterator[str]:
    """A run on a disk of a random size, too small for it; what it saved goes on on a larger one."""
    rng = random.Random(seed)
    needed = sum(path.stat().st_size for path in script.reference.parents[1].rglob("*") if path.is_file())
    size = round(rng.uniform(0.001, 1.1) * needed) // 4096 * 4096
    with folder_below(root) as folder:
        disk, kept = folder / "disk", folder / "kept"
        disk.mkdir()
        kept.mkdir()
        # The disk is the sandbox's own: what lies on it is copied out before it goes.
        shell = 'cp -r "$0" cats && "$@"; status=$?; cp -r . "$KEPT"; exit $status'
        command = [sys.executable, str(REPOSITORY / "src" / script.name), "cats", *script.settings, "--run", "r"]
        sandbox = ["bwrap", "--bind", "/", "/", "--dev-bind", "/dev", "/dev", "--size", str(max(size, 2**20))]
        sandbox += ["--tmpfs", str(disk), "--chdir", str(disk), "/bin/sh", "-c", shell, str(data), *command]
        result = subprocess.run(
            sandbox, env=os.environ | {"KEPT": str(kept)}, capture_output=True, text=True, timeout=300, check=False
        )
        outcome = SAME
        if result.returncode:
            if result.returncode != 1:
                raise Defect(f"{script.name} on {size} bytes ended with {result.returncode}: {result.stderr[-2000:]}")
            require_one_line(result.stderr, "error: ")
            outcome = REFUSED
        if leftovers := [path.name for path in kept.rglob("*") if "partial" in path.name or "newer" in path.name]:
            raise Defect(f"{script.name} on {size} bytes left {leftovers}")
        run = kept / "outputs" / "runs" / "r"
        process = script_process(script.name, "cats", *script.settings, *beginning(run), cwd=kept)
        _, errors = process.communicate(timeout=300)
        if process.returncode:
            raise Defect(f"{script.name} did not go on from a disk of {size} bytes: {errors[-2000:]}")
        require_same(script, run)
        yield outcome


def two_pack_at_once(script: Script, data: Path, root: Path, seed: int) -> Iterator[str]:
    """Two runs begin at about the same time in a folder that is not packed yet."""
    rng = random.Random(seed)
    with folder_below(root) as folder:
        shutil.copytree(data, folder / "cats")
        processes = []
        for name in ("one", "two"):
            processes.append(script_process(script.name, "cats", *script.settings, "--run", name, cwd=folder))
            time.sleep(rng.choice([0, 0, 0.02, 0.1, 0.3]))
        for name, process in zip(("one", "two"), processes, strict=True):
            _, errors = process.communicate(timeout=300)
            if process.returncode or errors:
                raise Defect(f"{script.name}: {errors[-2000:]}")
            require_same(script, folder / "outputs" / "runs" / name)
            yield SAME
        if leftovers := [path.name for path in (folder / "cats.packed").iterdir() if "partial" in path.name]:
            raise Defect(f"packing left {leftovers}")


# --- all of it ---------------------------------------------------------------------------------------------------


def campaign(root: Path, short: bool, seed: int, jobs: int) -> Table:
    """Try everything; the short form a tenth to a twentieth of it."""
    data = root / "data" / "cats-to-train-on"
    draw_toy_cats(data, seed=1, images={"train": 8, "val": 4})
    both = scripts(root, data, short)
    os.chdir(data.parent)
    (data.parent / "cats").symlink_to(data.name)
    table = Table()
    seeds = iter(range(seed, seed + 10**9))

    def much(whole: int, part: int) -> range:
        return range(part if short else whole)

    with contextlib.redirect_stdout(io.StringIO()):  # these are all in this process
        for script in both:
            for _ in much(1500, 40):
                table.add("command lines", partial(command_line, script, data, root, next(seeds)))
            for _ in much(75, 4):
                table.add("damaged checkpoints", partial(damaged_checkpoint, script, root, next(seeds)))
                table.add("damaged models", partial(damaged_model, script, root, next(seeds)))
        for module in (predict, sample, runs, export, gallery):
            for _ in much(400, 20):
                table.add("command lines", partial(command_line_that_uses, module, next(seeds)))
        for _ in much(150, 10):
            table.add("damaged packed images", partial(damaged_pack, data, root, next(seeds)))
        for _ in much(15, 2):
            table.add("damaged images", partial(damaged_images, data, root, next(seeds)))
    trials = []
    kills = 2 if short else 4  # of a run
    for number, script in enumerate(both):  # of the slower ones the short form has one for the generator alone
        for _ in much(32, 1):
            trials.append(
                (
                    "kills, python",
                    partial(until_struck, killed_under_python, script, data, root, seed=next(seeds), kills=kills),
                )
            )
        for _ in much(28, number):
            trials.append(
                (
                    "kills, on the stand-in",
                    partial(until_struck, killed_on_modal, script, data, root, seed=next(seeds), kills=kills),
                )
            )
        for _ in much(15, number):
            trials.append(("disks that fill up", partial(disk_fills, script, data, root, next(seeds))))
        for _ in much(6, number):
            trials.append(("runs that pack at once", partial(two_pack_at_once, script, data, root, next(seeds))))
    with ThreadPoolExecutor(jobs) as pool:
        ends = pool.map(lambda trial: table.add(*trial), trials)
        for _ in tqdm(ends, "runs", len(trials), disable=None):
            pass
    return table


def main() -> int:
    """Print the table; 1 if there is anything in its last column."""
    parser = argparse.ArgumentParser(description="What can happen to a run, at random and many times.")
    parser.add_argument("--short", action="store_true", help="a small part of it, in a minute")
    parser.add_argument("--seed", type=int, default=0, help="of what happens; other seeds, other trials")
    parser.add_argument("--jobs", type=int, default=2, help="trials at the same time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="campaign-", ignore_cleanup_errors=True) as root:
        table = campaign(Path(root), options.short, options.seed, options.jobs)
        os.chdir(REPOSITORY)
    print(table)
    for defect in table.defects:
        print(f"\n{defect}")
    return 1 if table.defects else 0


if __name__ == "__main__":
    sys.exit(main())
