"""How many seconds a GPU is rented before a run on data/cats trains, on the stand-in for Modal.

    python benchmarks/first_step.py photos --checkouts . ../other/checkout

Each checkout's src/train.py runs several times on a cloud of its own, which downloads the photos (a folder with the Pet
dataset's list.txt) from loopback at the rate of a network: first when its volume is empty, then when the data is ready
or, for another size of images, the photos are there and have to be packed. Seconds are those of the container with the
GPU, from its start to the line that says that training starts; containers start a Python of their own. A GPU's own
start, and Modal's volumes, are not in it.
"""

import argparse
import re
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from modal_cloud import ModalCloud
from pets_mirror import serve
from tinycats.images.image_folders import hold_out


def dataset(photos: Path) -> dict[str, bytes]:
    """The photos, as the archives of the Pet dataset hold them."""
    lines = (photos / "list.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("#") and (photos / f"{line.split()[0]}.jpg").exists()]
    val = {
        name
        for breed in {line.rpartition("_")[0] for line in lines}
        for name in hold_out([line.split()[0] for line in lines if line.rpartition("_")[0] == breed])[0]
    }
    files = {f"images/{line.split()[0]}.jpg": (photos / f"{line.split()[0]}.jpg").read_bytes() for line in lines}
    for name, chosen in (("trainval", False), ("test", True)):
        part = [line for line in lines if (line.split()[0] in val) == chosen]
        files[f"annotations/{name}.txt"] = "\n".join(part).encode()
    return files


def measure(checkout: Path, cloud: ModalCloud, image_size: int, cwd: Path) -> tuple[float, float]:
    """Seconds of containers with a GPU before they train, and of containers without one."""
    before = len(cloud.containers)
    script = checkout.resolve() / "src" / "train.py"
    settings = ("--no-pretrained", "--image-size", image_size, "--batch-size", "8", "--epochs", "1")
    process = cloud.start("modal", "run", script, "data/cats", *settings, cwd=cwd)
    drain = threading.Thread(target=process.communicate)
    drain.start()
    ended: dict[int, float] = {}
    while drain.is_alive():
        for container in cloud.containers[before:]:
            over = container.ended or re.search("Starting run", container.output)
            if over and container.attempt not in ended:
                ended[container.attempt] = time.monotonic() - container.started_at
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(cloud.report())
    seconds = {"train_on_modal": 0.0, "prepare_on_modal": 0.0}
    for container in cloud.containers[before:]:
        seconds[container.function] += ended[container.attempt]
    return seconds["train_on_modal"], seconds["prepare_on_modal"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("--checkouts", type=Path, nargs="+", default=[Path()])
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[64, 64, 96], help="of one run after another")
    parser.add_argument("--megabytes-per-second", type=float, default=10)
    options = parser.parse_args()
    files = dataset(options.photos)
    print(f"| {sum(map(len, files.values())) / 1e6:.0f} MB of photos | checkout | seconds with a GPU | without |")
    print("|---|---|---|---|")
    for checkout in options.checkouts:
        with tempfile.TemporaryDirectory() as name, serve(Path(name), files) as mirror, ModalCloud() as cloud:
            mirror.bytes_per_second = 1e6 * options.megabytes_per_second
            cloud.set_in_containers(TINYCATS_PETS_MIRROR=mirror.address)
            for number, image_size in enumerate(options.image_sizes, start=1):
                with_gpu, without = measure(checkout, cloud, image_size, Path(name))
                print(f"| run {number}, {image_size} px | {checkout} | {with_gpu:.1f} | {without:.1f} |", flush=True)


if __name__ == "__main__":
    main()
