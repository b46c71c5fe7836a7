"""Say which cats photos show, by a finished classifier.

    python src/predict.py photo.jpg                        by the one that src/train.py wrote last
    python src/predict.py photos --json                    every image in a folder, a line of JSON each
    python src/predict.py photo.jpg --model cats_model.pt  by one that was fetched
    modal run src/predict.py photo.jpg                     by the one in the volume: photos go up, answers come back
    modal deploy src/predict.py                            as a function that is called by its name
    python src/predict.py --help                           every option

Called by its name: modal.Function.from_name("tiny-cats-predict", "predict").remote([Path("photo.jpg").read_bytes()])
"""

import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import modal

from tinycats.images.image_folders import images_named
from tinycats.on_modal import container, laptop, resources
from tinycats.run import finished
from tinycats.run.finished import CLASSIFIER
from tinycats.script.command_line import Options, Parser, run_on_this_machine
from tinycats.script.errors import UserError, one_line
from tinycats.script.signals import StopSignals

if TYPE_CHECKING:
    from tinycats.classifier import Classifier

BATCH = 32  # photos that are classified at once
CALL_BYTES = 2**24  # of photos that go to Modal in one call, unless a single one is larger
TOLD = 3  # classes of a photo


# --- options -----------------------------------------------------------------------------------------------------


class PredictParser(Parser):
    def __init__(self) -> None:
        super().__init__("predict.py", "Say which cats photos show, by a finished classifier.")
        self.add_argument("photos", nargs="+", type=Path, help="images, and folders of images")
        self.add_argument(
            "--model",
            metavar="FILE|RUN",
            help="a finished classifier, or the run that made it (default: outputs/cats_model.pt)",
        )
        self.add_argument("--json", action="store_true", help="a line of JSON for each photo, with every class")

    def check(self, options: Options) -> None:
        try:
            options.photos = images_named(options.photos)
        except UserError as error:
            self.error(str(error))

    def check_laptop(self, options: Options) -> None:
        finished.require(finished.path_of(options.model, CLASSIFIER))


PARSER = PredictParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__)


# --- Modal -------------------------------------------------------------------------------------------------------

app = modal.App("tiny-cats-predict")


@app.function(**resources.using_models())
def predict(photos: list[bytes], model: str = CLASSIFIER) -> list[dict[str, Any]]:
    """What photos show.

    Args:
        photos: image files.
        model: the classifier's path in the volume cats-model-outputs.

    Returns:
        Of each photo `probabilities`, by class, the likeliest first; or `error`, which says why it cannot be read.

    Raises:
        UserError: there is no such classifier.
    """
    from tinycats import classifier

    return list(answers(container.loaded(classifier.load, model), [io.BytesIO(photo) for photo in photos]))


# --- prediction --------------------------------------------------------------------------------------------------


def answers(model: "Classifier", photos: Sequence[Path | BinaryIO]) -> Iterator[dict[str, Any]]:
    """What `predict` returns of each photo."""
    for first in range(0, len(photos), BATCH):
        images, errors = [], {}
        for number, photo in enumerate(photos[first : first + BATCH]):
            try:
                images.append(model.read(photo))
            except Exception as error:  # a broken file makes Pillow's plugins raise whatever they like
                errors[number] = why_unreadable(error, photo)
        probabilities = iter(model.classify(images))
        for number in range(len(photos[first : first + BATCH])):
            if number in errors:
                yield {"error": errors[number]}
            else:
                yield {"probabilities": dict(sorted(next(probabilities).items(), key=lambda item: -item[1]))}


def why_unreadable(error: Exception, photo: Path | BinaryIO) -> str:
    """In a line, and without the photo's name, which is told beside it."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__name__ == "UnidentifiedImageError":
        return "no image of a format that is known"
    return one_line(str(error) or type(error).__name__)


def show(options: Options, found: Iterable[dict[str, Any]]) -> int:
    """Print what is found of each photo, as soon as it is; what cannot be read is told on stderr.

    Returns:
        The exit status: 1 if a photo could not be read.
    """
    status = 0
    width = max(len(one_line(str(photo))) for photo in options.photos)
    for photo, answer in zip(options.photos, found, strict=True):
        if "error" in answer:
            status = 1
            print(one_line(f"error: {photo}: {answer['error']}"), file=sys.stderr, flush=True)
        probabilities = answer.get("probabilities", {})
        if options.json:
            print(json.dumps({"photo": str(photo), **answer}), flush=True)
        elif probabilities:
            longest = max(map(len, probabilities))
            (first, likely), *rest = list(probabilities.items())[:TOLD]
            others = ", ".join(f"{name} {share:.0%}" for name, share in rest)
            print(f"{one_line(str(photo)):{width}}  {first:{longest}}  {likely:4.0%}  ({others})", flush=True)
    return status


# --- the two ways in ---------------------------------------------------------------------------------------------


def predict_here(options: Options, _stop: StopSignals) -> int:
    """`python src/predict.py …`."""
    from tinycats import classifier

    model = classifier.load(finished.path_of(options.model, CLASSIFIER))
    return show(options, answers(model, options.photos))


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/predict.py …`: the photos go up, a few at a time."""
    options = PARSER.parse(arguments, on_modal=True)
    with laptop.errors_are_told():
        model = laptop.finished_model(options.model, CLASSIFIER)
        status = show(options, (answer for call in calls(options.photos) for answer in answers_to(call, str(model))))
    sys.exit(status)


def calls(photos: Iterable[Path]) -> Iterator[list[bytes | str]]:
    """The photos in lists that are small enough for a call each: their bytes, or why they cannot be read."""
    call: list[bytes | str] = []
    size = 0
    for photo in photos:
        try:
            contents: bytes | str = photo.read_bytes()
        except OSError as error:
            contents = why_unreadable(error, photo)
        if call and (len(call) == BATCH or size + len(contents) > CALL_BYTES):
            yield call
            call, size = [], 0
        call.append(contents)
        size += len(contents)
    yield call


def answers_to(call: list[bytes | str], model: str) -> Iterator[dict[str, Any]]:
    """What Modal says of the photos that can be read, and of each other that it cannot."""
    photos = [contents for contents in call if isinstance(contents, bytes)]
    answered = iter(predict.remote(photos, model) if photos else [])
    for contents in call:
        yield {"error": contents} if isinstance(contents, str) else next(answered)


if __name__ == "__main__":
    sys.exit(run_on_this_machine(PARSER, predict_here))
