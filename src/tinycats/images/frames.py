"""What an image is cut down to when it is packed. Needs only the standard library: the laptop's side of `modal run`
looks for packed images by a frame's name."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    """The size of packed images.

    Attributes:
        side: pixels of the shorter side.
        square: whether an image is its middle square, exactly side x side, enlarged if need be; else it keeps its
            proportions, its longer side cut to at most twice the shorter, and small ones stay as small as they are.
    """

    side: int
    square: bool = False

    @property
    def name(self) -> str:
        """`256px`, `square-128px`: none begins another."""
        return ("square-" if self.square else "") + f"{self.side}px"


def to_crop_from(image_size: int) -> Frame:
    """For random crops of `image_size`: a shorter side of 256 pixels for 224, as usual, and all of the image."""
    return Frame(round(image_size * 256 / 224))


def square(image_size: int) -> Frame:
    """For images that are shown whole: all of one size, so that a batch of them is a single read."""
    return Frame(image_size, square=True)
