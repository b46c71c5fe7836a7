"""A small dataset in the shape of Oxford-IIIT Pet, and a server of its archives on loopback."""

import contextlib
import hashlib
import http.server
import io
import math
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

HEADER = "#Image CLASS-ID SPECIES BREED ID\n"
TRAINVAL = ["Abyssinian_1 1 1 1", "British_Shorthair_1 5 1 2", "american_bulldog_1 2 2 1", "pug_1 3 2 2"]
TEST = ["Abyssinian_2 1 1 1", "British_Shorthair_2 5 1 2", "american_bulldog_2 2 2 1"]


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "grey").save(buffer, "JPEG")
    return buffer.getvalue()


def dataset_files() -> dict[str, bytes]:
    photos = {f"images/{line.split()[0]}.jpg": jpeg() for line in TRAINVAL + TEST}
    return photos | {
        "annotations/trainval.txt": "\n".join(TRAINVAL).encode(),
        "annotations/test.txt": "\n".join(TEST).encode(),
        "annotations/list.txt": (HEADER + "\n".join(TRAINVAL + TEST)).encode(),
    }


class Mirror:
    """A download server on loopback that can cut an archive off in the middle."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: list[str] = []
        self.cut: set[str] = set()  # archives to cut off, always
        self.cut_next: dict[str, int] = {}  # or the next so many times
        self.bytes_per_second: float = math.inf
        mirror = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self):
                name = self.path.strip("/")
                mirror.requests.append(name)
                contents = (mirror.folder / name).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(contents)))
                self.end_headers()
                left = mirror.cut_next.get(name, 0)
                mirror.cut_next[name] = left - 1
                cut = name in mirror.cut or left > 0
                time.sleep(len(contents) / mirror.bytes_per_second)
                with contextlib.suppress(
                    ConnectionError
                ):  # torchvision asks first where the address leads, and hangs up
                    self.wfile.write(contents[: len(contents) // 2] if cut else contents)

            def do_HEAD(self):
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def serve(folder: Path, files: dict[str, bytes] | None = None) -> Iterator[Mirror]:
    """A mirror of the dataset, or of other files in its shape, its archives made in `folder`."""
    sums = []
    for archive, prefix in (("images.tar.gz", "images/"), ("annotations.tar.gz", "annotations/")):
        with tarfile.open(folder / archive, "w:gz") as tar:
            for name, contents in (files or dataset_files()).items():
                if name.startswith(prefix):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(contents)
                    tar.addfile(entry, io.BytesIO(contents))
        sums.append(f"{hashlib.md5((folder / archive).read_bytes()).hexdigest()}  {archive}\n")
    (folder / "md5sums.txt").write_text("".join(sums))
    mirror = Mirror(folder)
    try:
        yield mirror
    finally:
        mirror.server.shutdown()
