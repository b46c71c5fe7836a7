"""From what the user calls the data to its images, packed."""

from pathlib import Path

from tinycats.images.data_dirs import is_toy
from tinycats.images.frames import Frame
from tinycats.images.image_folders import scan
from tinycats.images.packed_images import PackedImages
from tinycats.images.packing import beside_folder, packed
from tinycats.images.toy_cats import draw_toy_cats
from tinycats.script.errors import UserError


def open_dataset(data_dir: Path, frame: Frame, fallback: Path) -> PackedImages:
    """The images of `data_dir`, packed in `frame`; draws data/toy.

    Args:
        fallback: a folder for the packed images where none can be written beside `data_dir`.

    Raises:
        UserError: see `image_folders.scan` and `packing.packed`.
    """
    if is_toy(data_dir) and not data_dir.exists():
        try:
            draw_toy_cats(data_dir)
        except OSError as error:
            raise UserError(f"cannot draw the toy cats into {data_dir}: {error.strerror}") from error
    beside = beside_folder(data_dir)
    return packed(scan(data_dir), frame, [beside, fallback.absolute() / beside.name])
