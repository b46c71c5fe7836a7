"""The GPUs that Modal rents: what each needs beside it to be kept busy, and about what that costs."""

from dataclasses import dataclass

# What each GPU needs in cores: images that it trains on a second over those that a core prepares (plans/ADR-028).
# Dollars an hour: Modal's list prices of May 2026 as others quote them; an estimate.
_CORES_AND_PRICE = {
    "T4": (2, 0.59),
    "L4": (2, 0.80),
    "A10": (2, 1.10),
    "A10G": (2, 1.10),
    "L40S": (4, 1.95),
    "A100": (4, 2.10),
    "A100-40GB": (4, 2.10),
    "A100-80GB": (4, 2.50),
    "H100": (6, 3.95),
    "H100!": (6, 3.95),
    "H200": (6, 4.54),
    "B200": (8, 6.25),
}
KINDS = tuple(_CORES_AND_PRICE)
_CORE, _GIB = 0.0000131 * 3600, 0.00000222 * 3600  # dollars an hour


@dataclass(frozen=True)
class Rental:
    """What a container with GPUs rents.

    Attributes:
        kind, count: of the GPUs.
        cores: of the CPU.
        gib: of memory: what a process with torch and its buffers take, and 4 for everything else.
    """

    kind: str
    count: int

    @classmethod
    def parse(cls, gpu: str) -> "Rental":
        """`A100:2` is two of KINDS."""
        kind, _, count = gpu.partition(":")
        return cls(kind, int(count or 1))

    @property
    def cores(self) -> int:
        return self.count * _CORES_AND_PRICE[self.kind][0]

    @property
    def gib(self) -> int:
        return 4 + 4 * self.count

    @property
    def dollars_an_hour(self) -> float:
        return self.count * _CORES_AND_PRICE[self.kind][1] + self.cores * _CORE + self.gib * _GIB
