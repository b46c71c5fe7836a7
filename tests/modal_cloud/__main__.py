"""Try a command on the stand-in by hand, without an account:

    python -m tests.modal_cloud -- modal run src/train.py data/toy --epochs 1
    python -m tests.modal_cloud -- bash          # several commands on one cloud; `exit` forgets it

The command's exit status is this one's. What the volumes hold at the end is listed.
"""

import sys
from pathlib import Path

from .cloud import ModalCloud


def main() -> int:
    """Run the command that follows `--`."""
    command = sys.argv[1:]
    if command[:1] == ["--"]:
        del command[0]
    if not command or command[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if command else 2
    with ModalCloud() as cloud:
        process = cloud.start(*command, cwd=Path.cwd(), stdout=None, stderr=None)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            status = process.wait()
        cloud.wait()
        for volume in cloud.volumes:
            print(f"\nvolume {volume.name}:")
            for path in sorted(volume.files.rglob("*")):
                if path.is_file():
                    print(f"  {path.stat().st_size:>12,}  {path.relative_to(volume.files)}")
        return status


if __name__ == "__main__":
    sys.exit(main())
