"""What can go wrong on Modal, for a test to ask for."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Fault:
    """Something that happens to one attempt's container.

    Attributes:
        kind: `preempt` (SIGINT, and SIGKILL when the grace period is over), `kill` (SIGKILL: a crash),
            `timeout` (what happens when the function's timeout is over), `hang` (SIGSTOP: it stands still).
        after_commits: when: on the container's n-th commit of a volume, right after it.
        volume: which one.
        in_commit: instead of after that commit, in the middle of it: it does not take place.
        in_spawn: instead, when it has called another function and does not know it yet.
    """

    kind: Literal["preempt", "kill", "timeout", "hang"]
    after_commits: int = 1
    volume: str = "cats-model-outputs"
    in_commit: bool = False
    in_spawn: bool = False
