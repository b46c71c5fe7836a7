"""What can go wrong on Modal, for a test to ask for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """Something that happens to one attempt's container.

    Attributes:
        kind: `preempt` (SIGINT, and SIGKILL when the grace period is over), `kill` (SIGKILL: a crash),
            `timeout` (what happens when the function's timeout is over).
        after_commits: when: on the container's n-th commit of the outputs volume, right after it.
        in_commit: instead of after that commit, in the middle of it: it does not take place.
    """

    kind: Literal["preempt", "kill", "timeout"]
    after_commits: int = 1
    in_commit: bool = False
