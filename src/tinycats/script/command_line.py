"""The command line: one parser a script, the same under `python` and `modal run`, checked before anything
is uploaded, built or rented. Needs nothing but the standard library. The options of training are in `run.options`."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tinycats.on_modal.gpus import KINDS
from tinycats.script.errors import UserError, looking_at_what_the_user_named, one_line
from tinycats.script.signals import Stopped, StopSignals
from tinycats.training import processes

MODAL_ONLY = frozenset(["gpu", "nodes", "timeout"])  # options that say what is rented

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
    """An ArgumentParser whose errors are one line, and whose options know whether the user named them.

    Args:
        gpu_default: what a script rents where `--gpu` is not given; None for a script that has no such option.
    """

    def __init__(self, prog: str, description: str, gpu_default: str | None = None):
        super().__init__(prog=prog, description=description, allow_abbrev=False, formatter_class=_HelpFormatter)
        self.gpu_default = gpu_default
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add_gpu_option(self, group: argparse._ArgumentGroup) -> None:
        """`--gpu`, for scripts that rent one."""
        group.add_argument("--gpu", type=gpu, metavar="GPU[:N]", help=f"what to rent (default: {self.gpu_default})")

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
        for argument in arguments:
            if argument.startswith("--") and argument.endswith("=--"):  # a list without anything, for argparse of 3.11
                self.error(f"argument {argument.removesuffix('=--')}: expected one argument")
        defaults = {action.dest: action.default for action in self._actions if action.dest != "help"}
        # argparse fills in a default only where nothing is set: what is still unset was not given.
        unset = object()
        options = self.parse_args(arguments, argparse.Namespace(**dict.fromkeys(defaults, unset)))
        options.given = frozenset(name for name in defaults if getattr(options, name) not in (unset, None))
        for name in defaults.keys() - options.given:
            setattr(options, name, defaults[name])
        if on_modal and self.gpu_default and options.gpu is None:
            options.gpu = self.gpu_default
        self.complete(options, on_modal)
        if not on_modal:
            for name in sorted(MODAL_ONLY & options.given):
                self.error(
                    f"--{name} is for Modal (modal run src/{self.prog} …); here the run uses what the machine has"
                )
            try:
                with looking_at_what_the_user_named():
                    self.check_laptop(options)
            except UserError as error:
                self.error(str(error))
        self.check(options)
        return options

    def complete(self, options: Options, on_modal: bool) -> None:
        """What is to be known before anything is checked, for a script to add; may call `error`."""

    def check_laptop(self, options: Options) -> None:
        """Checks of what is on this machine, for a script to add.

        Raises:
            UserError: what the user named is of no use.
        """

    def check(self, options: Options) -> None:
        """Checks of combinations, for a script to add; calls `error`."""

    def if_stopped(self, options: Options) -> str:
        """What to say where a script is stopped and says nothing itself; for a script to replace."""
        return ""


def run_on_this_machine(parser: Parser, do: Callable[[Options, StopSignals], int | None]) -> int:
    """`python src/name.py …`: parse, do it, and answer with the exit status; errors are one line on stderr.

    Args:
        do: may return an exit status that is not 0.
    """
    options = parser.parse(sys.argv[1:])
    with StopSignals(parser.if_stopped(options)) as stop:
        try:
            status = do(options, stop) or 0
            sys.stdout.flush()
            return status
        except BrokenPipeError:  # whoever read what is printed has seen enough: `… | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + 13  # as of SIGPIPE
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
