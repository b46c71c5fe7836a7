"""List the runs, and remove those that are named.

python src/runs.py                        those in outputs/runs
python src/runs.py --remove NAME NAME     these are gone, unless they are in progress
modal run src/runs.py                     those in the volume
modal run src/runs.py --remove NAME
python src/runs.py --help                 every option
"""

import sys
import time
from pathlib import Path

import modal

from tinycats.on_modal import laptop, resources
from tinycats.on_modal.stored_runs import StoredRuns
from tinycats.run.finished import OUTPUT_DIR
from tinycats.run.summaries import INTERRUPTED, LocalRuns, Runs
from tinycats.script.command_line import Options, Parser, run_name, run_on_this_machine
from tinycats.script.signals import StopSignals

# --- options -----------------------------------------------------------------------------------------------------


class RunsParser(Parser):
    def __init__(self) -> None:
        super().__init__("runs.py", "List the runs, and remove those that are named.")
        self.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help="where the runs are")
        self.add_argument("--remove", nargs="+", type=run_name, metavar="RUN", help="runs to remove, for good")


PARSER = RunsParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__, lambda options: resources.output_path(options.output_dir))

app = modal.App("tiny-cats-runs")  # without functions: nothing is rented


# --- the runs ----------------------------------------------------------------------------------------------------


def do(options: Options, runs: Runs) -> None:
    """What the options ask for.

    Raises:
        UserError: a run is not there, or in progress; those that were named before it are removed.
    """
    for name in options.remove or []:
        runs.remove(name)
        print(f"removed the run {name}")
    if not options.remove:
        print(table(runs) or f"there are no runs in {options.output_dir / 'runs'}")


def table(runs: Runs) -> str:
    """A line a run: its name, when it wrote last, what it is, how far it came, how good it is, what is to be done."""
    rows = [
        (
            summary.name,
            time.strftime("%Y-%m-%d %H:%M", time.localtime(summary.changed)),
            summary.script,
            f"step {summary.step} of {summary.steps or '?'}",
            "{} {:.4f}".format(*summary.best) if summary.best else "-",
            f"go on: {runs.how_to_resume(summary)}" if summary.state == INTERRUPTED else summary.state,
        )
        for summary in runs.summaries()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# --- the two ways in ---------------------------------------------------------------------------------------------


def on_this_machine(options: Options, _stop: StopSignals) -> None:
    """`python src/runs.py …`."""
    do(options, LocalRuns(options.output_dir))


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/runs.py …`: of the volume."""
    options = PARSER.parse(arguments, on_modal=True)
    with laptop.errors_are_told():
        do(options, StoredRuns(resources.output_path(options.output_dir)))


if __name__ == "__main__":
    sys.exit(run_on_this_machine(PARSER, on_this_machine))
