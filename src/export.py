"""Write a finished model in the formats of others.

    python src/export.py                                    outputs/cats_model.pt as outputs/cats_model.onnx
    python src/export.py outputs/tiny_dit.pt                the generator likewise
    python src/export.py RUN --format safetensors           a folder with weights and a model card, ready for a hub
    python src/export.py --help                             every option

Needs no GPU, and runs on this machine only: `modal volume get` fetches a model first.
"""

import logging
import sys
from pathlib import Path

from tinycats.run import checkpoints, finished, runs
from tinycats.run.durable_files import atomic_write
from tinycats.run.finished import CLASSIFIER, GENERATOR
from tinycats.script.command_line import Options, Parser, run_on_this_machine
from tinycats.script.errors import UserError
from tinycats.script.signals import StopSignals

log = logging.getLogger("tinycats.export")

ONNX, SAFETENSORS = "onnx", "safetensors"


class ExportParser(Parser):
    def __init__(self) -> None:
        super().__init__("export.py", "Write a finished model in the formats of others.")
        self.add_argument(
            "model",
            nargs="?",
            metavar="FILE|RUN",
            help="a finished model, or the run that made it (default: outputs/cats_model.pt)",
        )
        self.add_argument(
            "--format",
            choices=(ONNX, SAFETENSORS),
            default=ONNX,
            help="onnx: a file for ONNX Runtime; safetensors: a folder with a model card",
        )
        self.add_argument(
            "--output", type=Path, metavar="PATH", help="what is written (default: beside the model, named after it)"
        )

    def check_laptop(self, options: Options) -> None:
        paths = [finished.path_of(options.model, name) for name in (CLASSIFIER, GENERATOR)]
        options.model = next((path for path in paths if path.is_file()), paths[0])
        finished.require(options.model)
        options.output = options.output or options.model.with_suffix(".onnx" if options.format == ONNX else "")
        if options.output.exists():
            raise UserError(f"{options.output} is there already: choose another --output")


PARSER = ExportParser()


def export(options: Options, _stop: StopSignals) -> None:
    """`python src/export.py …`.

    Raises:
        UserError: the file is no finished model, the output cannot be written.
    """
    from tinycats import classifier, generator
    from tinycats.sharing import onnx_files, safetensors_folders

    runs.log_to_stdout()
    contents = checkpoints.load(options.model)
    is_classifier = contents.get("model") == "classifier"
    loaded = classifier.load(options.model) if is_classifier else generator.load(options.model)
    facts = checkpoints.facts_in(contents)
    try:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        if options.format == SAFETENSORS:
            safetensors_folders.write(options.output, contents)
        else:
            of = onnx_files.of_classifier if is_classifier else onnx_files.of_generator
            exported = of(loaded, facts)  # type: ignore[arg-type]  # either of the two, as its contents say
            with atomic_write(options.output) as file:
                file.write(exported)
    except OSError as error:
        raise UserError(f"cannot write {options.output}: {(error.strerror or str(error)).lower()}") from error
    log.info("Wrote %s", options.output)


if __name__ == "__main__":
    sys.exit(run_on_this_machine(PARSER, export))
