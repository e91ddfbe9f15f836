"""Keep idle teachers and optimiser state on the CPU.

While the fake score learns, no method here calls the teacher; Adam's moments are needed in its
own update alone. Both move to the accelerator when they are used and back to main memory
afterwards. Copies are synchronous.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

REST = torch.device("cpu")


class OffloadedModule:
    """A network kept in main memory, moved to its device when called and back by `rest`."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        """Move `net` to main memory, and have its calls move it to `device`."""
        self.net, self.device, self.awake = net, device, True
        self.rest()
        net.register_forward_pre_hook(self._wake)

    def rest(self) -> None:
        """Move the network to main memory."""
        if self.awake:
            self.net.to(REST)
        self.awake = False

    def _wake(self, *_: Any) -> None:
        if not self.awake:
            self.net.to(self.device)
        self.awake = True


def offload_moments(optimizer: torch.optim.Optimizer) -> None:
    """Keep the optimiser's moments in main memory, except during its updates."""
    optimizer.register_step_pre_hook(lambda *_: _move(optimizer, True))
    optimizer.register_step_post_hook(lambda *_: _move(optimizer, False))


def _move(optimizer: torch.optim.Optimizer, wanted: bool) -> None:
    for parameter, entry in optimizer.state.items():
        for name, value in entry.items():
            if value.ndim:  # not the count of updates, which is in main memory anyway
                entry[name] = moved(value, parameter.device if wanted else REST)


def moved(t: Tensor, device: torch.device) -> Tensor:
    """`t` on `device`."""
    return t.to(device)
