"""What an image's commands would have installed, out of the packages that this machine happens to have.

Nothing is built: a container is given those top-level modules of this environment that belong to what the
image asks for, and to what that requires in turn. A package that is here by chance is not in the image.
"""

import argparse
import re
import shlex
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

# As much of the command line of pip, and of uv's pip, as tells packages from other words.
_PIP = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
_PIP.add_argument("packages", nargs="*")
_PIP.add_argument("-r", "--requirement", "--requirements", action="append", default=[], dest="requirements")


@dataclass(frozen=True)
class Image:
    """An image as its client described it: Dockerfile commands, and the files that they copy."""

    image_id: str
    commands: tuple[str, ...]
    context_files: dict[str, bytes] = field(default_factory=dict)
    base: "Image | None" = None

    @property
    def all_commands(self) -> tuple[str, ...]:
        """The commands from the first layer on."""
        return (*(self.base.all_commands if self.base else ()), *self.commands)

    def requirements(self) -> list[str]:
        """What the image's commands install with pip or uv."""
        wanted = self.base.requirements() if self.base else []
        copied: dict[str, str] = {}  # path in the image -> in the context
        for command in self.commands:
            if match := re.match(r"COPY (\S+) (\S+)$", command):
                copied[match[2]] = match[1]
            if match := re.match(r"RUN .*?\bpip install\b(.*)", command):
                options, _ = _PIP.parse_known_args(shlex.split(re.sub(r"\$\(.*?\)", "", match[1])))
                wanted += options.packages
                for path in options.requirements:
                    wanted += _lines(self.context_files[copied.get(path, path)].decode())
        return wanted


def _lines(requirements: str) -> list[str]:
    stripped = (line.partition("#")[0].strip() for line in requirements.splitlines())
    return [line for line in stripped if line]


def top_level_modules(requirements: list[str]) -> dict[str, Path]:
    """Where each top-level file or folder of the required packages, and of theirs, lies on this machine."""
    names = {distribution_name(requirement) for requirement in requirements}
    seen: set[str] = set()
    places: dict[str, Path] = {}
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required on another platform, or with an extra that nobody asked for
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__"):
                places[top] = Path(distribution.locate_file(top))
        for requirement in distribution.requires or ():
            if "extra ==" not in requirement:
                names.add(distribution_name(requirement))
    return places


def distribution_name(requirement: str) -> str:
    """`torch` of `Torch==2.14.1`."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    if match is None:
        raise ValueError(f"not a requirement: {requirement!r}")
    return re.sub(r"[-_.]+", "-", match[0]).lower()
