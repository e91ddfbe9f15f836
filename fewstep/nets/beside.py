"""A network that sees a given picture beside its noisy input: what is restored, or coloured in.

The picture is the condition "start", of the shape of a sample, and is put beside x along the first
dimension, the channels, as Saharia et al. 2022, https://arxiv.org/abs/2104.07636, condition on a
picture of low resolution. A label may be given beside it, as the condition "label".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Net

START = "start"
"""The name of the condition."""


class BesideNet(nn.Module):
    """F(x, label, cond): (B, *shape), (B,), {"start": (B, *shape), ...} -> (B, *shape)."""

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.data_conditions = {START: shape}

    def forward(self, x: Tensor, label: Tensor, cond: Any = None) -> Tensor:
        """What the network inside makes of both, in the channels of x.

        Raises ValueError where there is no "start", or of another shape than x.
        """
        start = cond.get(START) if isinstance(cond, Mapping) else None
        if not isinstance(start, Tensor) or start.shape != x.shape:
            shape = tuple(start.shape) if isinstance(start, Tensor) else "nothing"
            raise ValueError(
                f"this network needs a picture beside its input {tuple(x.shape)}, the condition "
                f'"{START}" of the same shape, and got {shape}; sample it from the folder of its '
                "run, whose domain gives pictures, or pass cond"
            )
        out: Tensor = self.net(torch.cat([x, start], 1), label, cond.get("label"))
        return out[:, : x.shape[1]]


@dataclass(frozen=True)
class Beside(Net):
    """`net` for twice the channels, the second half being the condition "start"."""

    net: Net
    """The network inside, built for twice the channels."""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """`BesideNet` around a new network."""
        return BesideNet(self.net.build((2 * shape[0], *shape[1:]), classes), shape)
