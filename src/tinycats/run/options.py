"""The options of a run: those that all scripts that train share, and which of them a run may go on without."""

import argparse
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from tinycats.images.data_dirs import CATS, TOY, is_cats, problem_with
from tinycats.run import checkpoints, runs
from tinycats.script import command_line, launcher
from tinycats.script.command_line import Options, Parser, number, run_name, whole_number
from tinycats.script.errors import UserError
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import NOTHING_TRAINED, StopSignals
from tinycats.training import processes

log = logging.getLogger(__name__)

MAX_TIMEOUT = 24  # hours; Modal's own limit

# What may differ between a run and its resumption without changing what it computes.
_ABOUT_THE_RUN = "data_dir output_dir run resume submission given debug"
_ABOUT_THE_MACHINE = "num_workers device gpu nodes timeout save_every accumulate compile"
FREE_ON_RESUME = frozenset(f"{_ABOUT_THE_RUN} {_ABOUT_THE_MACHINE}".split())


class TrainingParser(Parser):
    """A parser that knows the options that all scripts that train share."""

    def __init__(self, prog: str, description: str, gpu_default: str):
        super().__init__(prog, description, gpu_default)
        self.add_argument(
            "data_dir",
            nargs="?",
            type=Path,
            help="a folder of images, a subfolder a class, split into train/ and val/ or not "
            "(default: data/cats; on a laptop data/toy if that is not there)",
        )
        run = self.add_argument_group("the run")
        run.add_argument("--output-dir", type=Path, default=Path("outputs"), help="where runs and finished models go")
        run.add_argument("--run", type=run_name, metavar="NAME", help="the run's name; new by default")
        run.add_argument("--resume", metavar="RUN", help="go on with a run: its name, or its checkpoint file's path")
        run.add_argument("--seed", type=whole_number(0, 2**63 - 1), default=0, help="decides every random choice")
        run.add_argument(
            "--num-workers",
            type=whole_number(0, 256),
            metavar="N",
            help="threads that prepare batches, for each GPU (default: by the machine)",
        )
        run.add_argument(
            "--save-every",
            type=number(above=0),
            default=5,
            metavar="MINUTES",
            help="save the checkpoint this often within an epoch",
        )
        run.add_argument(
            "--device",
            choices=("auto", "cpu", "cuda", "mps"),
            default="auto",
            help="auto: CUDA's GPUs, all there are, or else the CPU; mps, Apple's, was never tried",
        )
        modal = self.add_argument_group("Modal only")
        self.add_gpu_option(modal)
        modal.add_argument(
            "--nodes",
            type=whole_number(1, 64),
            default=1,
            metavar="N",
            help="machines to spread the run over, each with all of its GPUs: --gpu H100:8 --nodes 2",
        )
        modal.add_argument(
            "--timeout",
            type=number(above=0, at_most=MAX_TIMEOUT),
            default=MAX_TIMEOUT,
            metavar="HOURS",
            help="of one attempt; the next one goes on from its checkpoint",
        )

    def add_optimization_options(
        self,
        group: argparse._ArgumentGroup,
        *,
        batch_size: int,
        weight_decay: float,
        lr: float | None,
        lr_help: str = "the learning rate at its peak",
    ) -> None:
        """The options of `optimization` and `devices`, with the defaults that differ between the scripts."""
        group.add_argument(
            "--batch-size", type=whole_number(1), default=batch_size, help="images a step, over all GPUs"
        )
        group.add_argument("--lr", type=number(above=0), default=lr, help=lr_help)
        group.add_argument(
            "--weight-decay", type=number(at_least=0), default=weight_decay, help="but none on norms and biases"
        )
        group.add_argument(
            "--gradient-clip", type=number(at_least=0), default=1.0, help="largest gradient norm; 0: any"
        )
        group.add_argument(
            "--mixed-precision",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="bf16, or fp16 with loss scaling, on a GPU; bf16 on a CPU that multiplies it (AMX, AVX-512 BF16); "
            "other CPUs compute in float32",
        )

    def complete(self, options: Options, on_modal: bool) -> None:
        if options.data_dir is None:
            options.data_dir = CATS if on_modal or CATS.is_dir() else TOY
        options.submission = None
        if on_modal and options.nodes > 1 and not (options.gpu or "").endswith(":8"):
            self.error("--nodes needs machines with all of their GPUs, such as --gpu H100:8")
        if options.run and options.resume:
            self.error("--run names a new run and --resume an old one: give one of them")

    def check_laptop(self, options: Options) -> None:
        if "data_dir" in options.given and (problem := problem_with(options.data_dir)):
            raise UserError(problem)
        options.output_dir.exists()  # raises for a path that the system will not take
        if options.resume:
            runs.resumed_checkpoint(options.output_dir, options.resume)
        if options.run and checkpoints.has_checkpoint(runs.folder_of(options.output_dir, options.run)):
            raise UserError(runs.taken(options.run))

    def if_stopped(self, options: Options) -> str:
        if options.resume:
            command = shlex.join(["python", f"src/{self.prog}", "--resume", options.resume])
            return f"nothing more had been trained yet; go on with the run: {command}"
        return NOTHING_TRAINED


def resumed_options(options: Options, saved: dict) -> Options:
    """The options of a run that goes on: the saved ones, and of the new ones those that are free to change.

    Raises:
        UserError: the user gave an option that contradicts the saved run; the message names each.
    """
    wrong = [  # a checkpoint that is older than an option has none of it
        f"--{name.replace('_', '-')} {getattr(options, name)} (the run has {saved.get(name, 'none')})"
        for name in sorted(options.given - FREE_ON_RESUME)
        if name not in saved or getattr(options, name) != saved[name]
    ]
    if wrong:
        raise UserError(f"the run cannot go on with other options: {', '.join(wrong)}")
    merged = vars(options) | saved
    if "data_dir" in options.given:
        merged["data_dir"] = options.data_dir
    merged["data_dir"] = Path(merged["data_dir"])
    return argparse.Namespace(**merged)


def saved_options(options: Options) -> dict:
    """What of the options a checkpoint keeps, in plain values."""
    kept = {name: value for name, value in vars(options).items() if name not in FREE_ON_RESUME}
    return kept | {"data_dir": str(options.data_dir)}


def description(script: str, options: Options) -> dict:
    """What a run is, in its checkpoint and, for whoever has no torch, in its folder: script, version, options."""
    return {"script": script, "computation": runs.COMPUTATION, "options": saved_options(options)}


def command(parser: TrainingParser, options: Options, launcher: str) -> str:
    """The command that makes the same run: what is not by default.

    Args:
        launcher: `python` or `modal run`.
    """
    words = [*launcher.split(), f"src/{parser.prog}", str(options.data_dir).removeprefix("/")]
    for action in parser._actions:
        name = action.dest
        if name in FREE_ON_RESUME or name == "help" or getattr(options, name) in (action.default, None):
            continue
        value = getattr(options, name)
        option = action.option_strings[0]
        words += (
            [f"--no-{option[2:]}"]
            if value is False
            else [option]
            if value is True
            else [option, f"{value:g}" if isinstance(value, float) else str(value)]
        )
    return shlex.join(words)


def train_on_this_machine(
    parser: TrainingParser, train: Callable[[Options, StopSignals, ThisMachine], object]
) -> NoReturn:
    """`python src/train.py …`: parse, train, and exit; errors are one line on stderr.

    On a machine with several GPUs this process starts one for each, with the same arguments, and they train.
    """

    def do(options: Options, stop: StopSignals) -> int | None:
        runs.log_to_stdout()
        gpus = launcher.gpus_here(options.device)
        if gpus > 1:
            return launcher.launch(sys.argv, gpus, debug=options.debug)
        if "data_dir" not in options.given and not options.resume:
            hint = "" if is_cats(options.data_dir) else ". For real cats: bash data/download.sh"
            log.info("Training on %s%s", options.data_dir, hint)
        train(options, stop, ThisMachine(parser.prog))
        return None

    processes.leave(command_line.run_on_this_machine(parser, do))
