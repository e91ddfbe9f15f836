"""What connects the GPUs that a plan is for."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Links:
    """What connects GPUs, in bytes a second and seconds; the defaults are those of H100 nodes.

    ValueError where one is not positive.
    """

    per_node: int = 8
    """GPUs of a node."""
    within: float = 450e9
    """From a GPU to others of its node: NVLink, one direction."""
    between: float = 50e9
    """From a GPU to other nodes: InfiniBand of 400 Gbit/s."""
    hop: float = 4e-6
    """What a message takes from one GPU to the next, however short it is."""
    disk: float = 2e9
    """What process 0 writes a checkpoint at."""

    def __post_init__(self) -> None:
        numbers = (self.per_node, self.within, self.between, self.hop, self.disk)
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(f"links have positive rates and times, got {self}")
