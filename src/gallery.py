"""One page for all of it: the runs, their curves and samples, live; a photo to classify, cats to sample.

    python src/gallery.py                       on http://127.0.0.1:8000, for this machine alone
    python src/gallery.py --port 8001 --output-dir outputs/tries
    modal serve src/gallery.py                  over the volume, until Ctrl-C
    modal deploy src/gallery.py                 over the volume, for good
    modal run src/gallery.py                    prints the deployed page's address, with the token that lets in
    python src/gallery.py --help                every option

On Modal nobody gets in without the token, and the volume is mounted for reading.
"""

import logging
import secrets
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import modal

from tinycats.on_modal import laptop, resources, stored_runs
from tinycats.run import runs
from tinycats.run.finished import OUTPUT_DIR
from tinycats.run.summaries import LocalRuns
from tinycats.script.command_line import Options, Parser, run_on_this_machine, whole_number
from tinycats.script.errors import TransientError, UserError
from tinycats.script.signals import StopSignals

log = logging.getLogger("tinycats.gallery")

APP, TOKEN = "tiny-cats-gallery", "token"
THIS_MACHINE = "127.0.0.1"
REFRESH_EVERY = 5  # seconds between two looks at what the volume holds by now


# --- options -----------------------------------------------------------------------------------------------------


class GalleryParser(Parser):
    def __init__(self) -> None:
        super().__init__("gallery.py", "A page with the runs, and to try what was trained.")
        self.add_argument("--output-dir", type=Path, default=OUTPUT_DIR, help="where runs and finished models are")
        self.add_argument("--port", type=whole_number(1, 65535), default=8000, help="of the page, on this machine")

    def check_laptop(self, options: Options) -> None:
        if options.output_dir.exists() and not options.output_dir.is_dir():
            raise UserError(f"{options.output_dir} is not a folder")


PARSER = GalleryParser()
OPTIONS = laptop.parsed_at_import(PARSER, __file__)


# --- Modal -------------------------------------------------------------------------------------------------------

app = modal.App(APP)
TOKENS = modal.Dict.from_name(APP, create_if_missing=True)


def token() -> str:
    """What lets in; made by whoever asks first."""
    TOKENS.put(TOKEN, secrets.token_urlsafe(24), skip_if_exists=True)
    return TOKENS[TOKEN]


@app.function(
    **resources.using_models() | {"volumes": {resources.OUTPUTS_MOUNT: resources.READ_ONLY_OUTPUTS}}, max_containers=1
)
@modal.concurrent(max_inputs=50)
@modal.asgi_app(label=APP)
def web() -> Any:
    """The page, over the outputs volume."""
    from tinycats.showing import gallery

    output_dir = Path(resources.OUTPUTS_MOUNT)
    refreshed = 0.0

    def refresh() -> None:
        nonlocal refreshed
        if time.monotonic() - refreshed > REFRESH_EVERY:
            try:
                resources.OUTPUTS.reload()
            except Exception as error:  # a file of it is being read: next time
                log.info("The volume is not reloaded: %s", error)
            refreshed = time.monotonic()

    @lru_cache(maxsize=256)
    def asked(submission: str | None, _when: int) -> bool:
        try:
            return stored_runs.is_in_progress({"submission": submission})
        except TransientError:
            return False

    def is_in_progress(_folder: Path, description: dict[str, Any]) -> bool:
        return asked(description.get("submission"), int(time.monotonic() / REFRESH_EVERY))

    return gallery.app(output_dir, token=token(), found=LocalRuns(output_dir, is_in_progress), refresh=refresh)


# --- the two ways in ---------------------------------------------------------------------------------------------


def serve_here(options: Options, stop: StopSignals) -> None:
    """`python src/gallery.py …`: until it is stopped.

    Raises:
        UserError: the port is taken.
    """
    import socket

    import uvicorn

    from tinycats.showing import gallery

    runs.log_to_stdout()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((THIS_MACHINE, options.port))
        except OSError as error:
            raise UserError(
                f"--port {options.port}: {(error.strerror or str(error)).lower()}; choose another"
            ) from error
        listening.listen()  # whoever follows the next line's address waits, and is not refused
        page = gallery.app(options.output_dir, token=None, hosts=frozenset([THIS_MACHINE, "localhost"]))
        server = uvicorn.Server(uvicorn.Config(page, log_level="warning", timeout_graceful_shutdown=1))
        log.info("The gallery of %s is on http://%s:%d; Ctrl-C ends it", options.output_dir, THIS_MACHINE, options.port)
        server.run(sockets=[listening])


@app.local_entrypoint()
def main(*arguments: str) -> None:
    """`modal run src/gallery.py`: where the deployed page is."""
    PARSER.parse(arguments, on_modal=True)
    with laptop.errors_are_told():
        try:
            address = modal.Function.from_name(APP, "web").get_web_url()
        except modal.exception.NotFoundError:
            raise UserError("the gallery is not deployed: modal deploy src/gallery.py") from None
        print(f"{address}?token={token()}")


if __name__ == "__main__":
    sys.exit(run_on_this_machine(PARSER, serve_here))
