"""The command line: one parser a script, the same under `python` and `modal run`, checked before anything
is uploaded, built or rented. Needs nothing but the standard library."""

import argparse
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from tinycats.images.data_dirs import CATS, TOY, is_cats, problem_with
from tinycats.on_modal.gpus import KINDS
from tinycats.run import checkpoints, runs
from tinycats.script import launcher
from tinycats.script.errors import UserError, looking_at_what_the_user_named, one_line
from tinycats.script.machines import ThisMachine
from tinycats.script.signals import Stopped, StopSignals
from tinycats.training import processes

log = logging.getLogger(__name__)

MAX_TIMEOUT = 24  # hours; Modal's own limit

# What may differ between a run and its resumption without changing what it computes.
_ABOUT_THE_RUN = "data_dir output_dir run resume submission given debug"
_ABOUT_THE_MACHINE = "num_workers device gpu nodes timeout save_every accumulate compile"
FREE_ON_RESUME = frozenset(f"{_ABOUT_THE_RUN} {_ABOUT_THE_MACHINE}".split())

Options = argparse.Namespace
BooleanOptionalAction = argparse.BooleanOptionalAction


def whole_number(minimum: int, maximum: float = math.inf) -> Callable[[str], int]:
    """An argparse type: an integer from `minimum` to `maximum`."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not minimum <= number <= maximum:
            upper = "" if maximum == math.inf else f" and at most {maximum}"
            raise argparse.ArgumentTypeError(f"{number} is out of range: at least {minimum}{upper}")
        return number

    return parse


def number(
    *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf, below: float = math.inf
):
    """An argparse type: a finite float within the bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        bounds = {
            f"above {above:g}": value > above,
            f"at least {at_least:g}": value >= at_least,
            f"at most {at_most:g}": value <= at_most,
            f"below {below:g}": value < below,
        }
        if not math.isfinite(value) or not all(bounds.values()):
            wanted = " and ".join(bound for bound in bounds if "inf" not in bound) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {wanted}")
        return value

    return parse


def run_name(text: str) -> str:
    """An argparse type: a name that is a plain folder name everywhere."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", text):
        raise argparse.ArgumentTypeError(f"{text!r}: a run's name is letters, digits, '.', '_' and '-'")
    return text


def gpu(text: str) -> str:
    """An argparse type: a GPU that Modal rents, `T4`, or several, `A100:2`."""
    kind, _, count = text.upper().partition(":")
    if kind not in KINDS:
        raise argparse.ArgumentTypeError(f"{text!r}: choose from {', '.join(KINDS)}; :N for several")
    if ":" in text and not re.fullmatch("[1-8]", count):
        raise argparse.ArgumentTypeError(f"{text!r}: the number of GPUs is 1 to 8")
    return text.upper()


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which knows the options that the scripts share."""

    def __init__(self, prog: str, description: str, gpu_default: str):
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=_HelpFormatter,
        )
        self.gpu_default = gpu_default
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
        run.add_argument("--debug", action="store_true", help="show the traceback of an error")
        modal = self.add_argument_group("Modal only")
        modal.add_argument("--gpu", type=gpu, metavar="GPU[:N]", help=f"what to rent (default: {gpu_default})")
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

    def add_optimization_options(self, group: argparse._ArgumentGroup, *, batch_size: int, weight_decay: float) -> None:
        """The options of `optimization` and `devices`, with the defaults that differ between the scripts."""
        group.add_argument(
            "--batch-size", type=whole_number(1), default=batch_size, help="images a step, over all GPUs"
        )
        group.add_argument("--lr", type=number(above=0), default=1e-4, help="the learning rate at its peak")
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
            help="bf16, or fp16 with loss scaling, on a GPU, and bf16 on a CPU with AMX; other CPUs compute in float32",
        )

    def error(self, message: str) -> NoReturn:
        """One line on stderr, of one of the processes that say it, and exit 2."""
        if processes.here().local_rank:
            self.exit(2)
        self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the options)\n")

    def parse(self, arguments: Sequence[str], *, on_modal: bool = False) -> Options:
        """Parse and check a whole command line; exits 2 with one line if anything is wrong with it.

        The result's `given` is the set of options that the user named.
        """
        arguments = list(arguments)
        if arguments[:1] == ["--"]:  # `modal run src/train.py -- --epochs 3`
            del arguments[0]
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        # argparse fills in a default only where nothing is set: what is still unset was not given.
        unset = object()
        options = self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        options.given = frozenset(name for name in defaults if getattr(options, name) not in (unset, None))
        for name in defaults.keys() - options.given:
            setattr(options, name, defaults[name])
        if on_modal and options.gpu is None:
            options.gpu = self.gpu_default
        if options.data_dir is None:
            options.data_dir = CATS if on_modal or CATS.is_dir() else TOY
        options.submission = None
        if on_modal and options.nodes > 1 and not (options.gpu or "").endswith(":8"):
            self.error("--nodes needs machines with all of their GPUs, such as --gpu H100:8")
        if options.run and options.resume:
            self.error("--run names a new run and --resume an old one: give one of them")
        if not on_modal:
            try:
                with looking_at_what_the_user_named():
                    self._check_laptop(options)
            except UserError as error:
                self.error(str(error))
        self.check(options)
        return options

    def check(self, options: Options) -> None:
        """Checks of combinations, for a script to add; calls `error`."""

    def _check_laptop(self, options: Options) -> None:
        for name in sorted({"gpu", "nodes", "timeout"} & options.given):
            self.error(f"--{name} is for Modal (modal run src/{self.prog} …); here the run uses what the machine has")
        if "data_dir" in options.given and (problem := problem_with(options.data_dir)):
            self.error(problem)
        options.output_dir.exists()  # raises for a path that the system will not take
        if options.resume:
            runs.resumed_checkpoint(options.output_dir, options.resume)
        if options.run and checkpoints.has_checkpoint(runs.folder_of(options.output_dir, options.run)):
            self.error(runs.taken(options.run))


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


def run_on_this_machine(parser: Parser, train: Callable[[Options, StopSignals, ThisMachine], object]) -> int:
    """`python src/train.py …`: parse, train, and answer with the exit status; errors are one line on stderr.

    On a machine with several GPUs this process starts one for each, with the same arguments, and they train.
    """
    options = parser.parse(sys.argv[1:])
    runs.log_to_stdout()
    with StopSignals() as stop:
        try:
            gpus = launcher.gpus_here(options.device)
            if gpus > 1:
                return launcher.launch(sys.argv, gpus, debug=options.debug)
            if "data_dir" not in options.given and not options.resume:
                hint = "" if is_cats(options.data_dir) else ". For real cats: bash data/download.sh"
                log.info("Training on %s%s", options.data_dir, hint)
            train(options, stop, ThisMachine(parser.prog))
            return 0
        except (Exception, Stopped) as error:
            if options.debug:
                raise
            stop.ignore()
            message, status = _told(error)
            if processes.here().is_to_tell(error) and message:
                print(one_line(message), file=sys.stderr)
            return status


def _told(error: BaseException) -> tuple[str, int]:
    """What the user is told of an error, and the exit status; nothing, if another process tells it."""
    match error:
        case UserError():
            return f"error: {error}", 1
        case Stopped():
            return str(error) and f"stopped: {error}", error.exit_status
        case _ if processes.is_lost_peer(error):
            return "", processes.LOST_PEER
        case _:
            return f"error: {type(error).__name__}: {error} (--debug shows where)", 1
