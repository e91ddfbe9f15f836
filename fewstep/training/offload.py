"""What a step does not use just now rests in main memory: a teacher, an optimiser's moments.

While the fake score learns, no method here calls the teacher; Adam's moments are needed in its
own update alone. Both come to the device when they are called and leave it afterwards. Copies
are plain ones, which the device waits for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

REST = torch.device("cpu")


class OffloadedModule:
    """A network that rests in main memory until it is called, and after every `rest`."""

    def __init__(self, net: nn.Module, device: torch.device) -> None:
        """A call brings it to `device`."""
        self.net, self.device, self.awake = net, device, True
        self.rest()
        net.register_forward_pre_hook(self._wake)

    def rest(self) -> None:
        if self.awake:
            self.net.to(REST)
        self.awake = False

    def _wake(self, *_: Any) -> None:
        if not self.awake:
            self.net.to(self.device)
        self.awake = True


def offload_moments(optimizer: torch.optim.Optimizer) -> None:
    """From now on the optimiser's moments are with their parameters in its updates alone."""
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
