"""Exponential moving average of weights, its half-life measured in images.

    beta = 0.5^(batch / min(halflife, ramp * images))

as in EDM (Karras et al. 2022, https://arxiv.org/abs/2206.00364): independent of the batch size,
and short early on, when the average would otherwise remember the initial weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fewstep.training.distributed import local_tensor


@torch.no_grad()
def copy_weights(target: nn.Module, net: nn.Module) -> None:
    """target <- net, in place: all parameters and buffers of two networks of one structure."""
    for mine, other in (
        *zip(target.parameters(), net.parameters(), strict=True),
        *zip(target.buffers(), net.buffers(), strict=True),
    ):
        local_tensor(mine).copy_(local_tensor(other))


@dataclass(frozen=True)
class EMA:
    """An exponential moving average of weights, whose half-life grows with the training.

    Attributes:
        halflife: images after which a weight's part in the average has halved.
        ramp: bounds the half-life by this fraction of the images seen so far.

    Raises ValueError where one is negative. Karras et al. 2022, https://arxiv.org/abs/2206.00364.
    """

    halflife: float = 500_000.0
    ramp: float = 0.05

    def __post_init__(self) -> None:
        if not (self.halflife >= 0 and self.ramp >= 0):
            raise ValueError(f"EMA needs halflife >= 0 and ramp >= 0, got {self}")

    def decay(self, batch: int, images: int) -> float:
        """beta of one update with `batch` images after `images` earlier ones; 0 at the start."""
        halflife = min(self.halflife, self.ramp * images)
        out: float = 0.5 ** (batch / max(halflife, 1e-8))
        return out

    @torch.no_grad()
    def update(self, average: nn.Module, net: nn.Module, batch: int, images: int) -> None:
        """average <- beta average + (1 - beta) net, in place; buffers are copied.

        average, net: networks with the same parameters and buffers; batch: images of this update;
            images:
        those of all updates before.
        """
        beta = self.decay(batch, images)
        kept, new = ([local_tensor(p) for p in module.parameters()] for module in (average, net))
        torch._foreach_lerp_(kept, new, 1 - beta)
        for buffer, other in zip(average.buffers(), net.buffers(), strict=True):
            buffer.copy_(other)
