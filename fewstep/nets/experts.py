"""Several networks of one kind that share the noise levels: each call meets that of its time.

Calls of a few-step student at high noise lay out a picture, those at low noise finish it; each may
have a network of its own, as whose calls they are is known beforehand. A picture costs what it
costs with one network; in memory there are all of them. Wan 2.2 has two such experts, and Phased
DMD (Fan et al. 2025, https://arxiv.org/abs/2510.27684) makes them on its way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from fewstep.diffusion.constants import constant
from fewstep.diffusion.model import Net
from fewstep.diffusion.types import Cond, select_rows
from fewstep.nets.routed import chosen


class ExpertsNet(nn.Module):
    """F(x, label, cond): that of its first network above bounds[0], of the next below it, ...

    bounds: decreasing labels, one fewer than there are networks.
    """

    def __init__(self, nets: Iterable[nn.Module], bounds: Iterable[float]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        self.bounds = tuple(bounds)
        path = getattr(self.nets[0], "path", None)
        if path is not None:  # whole denoisers, whose path is theirs and whose label is t
            self.path = path

    def number(self, label: Tensor) -> Tensor:
        """Which network knows each time: (B,) int64, from labels (B,) or ()."""
        bounds = constant(self.bounds, label)
        return (label.reshape(-1, 1) < bounds).sum(1)

    def forward(self, x: Tensor, label: Tensor, cond: Cond = None, *more: Tensor) -> Tensor:
        """What the network of each sample's time makes of it: (B, *).

        x: (B, *); label: (B,) or (); cond: None, labels (B,) or a mapping; more: further inputs,
        (B, ...). Only networks that some sample needs are called, but in a traced graph, whose
        shape cannot depend on times, all are, and the answers are chosen among.
        """
        number = self.number(label)
        if x.is_meta or torch.compiler.is_compiling():
            return chosen(self.nets, number, x, label, cond, *more)
        present = number.unique().tolist()
        if len(present) == 1:
            whole: Tensor = self.nets[present[0]](x, label, cond, *more)
            return whole
        rows = [(number == k).nonzero()[:, 0] for k in present]
        parts = [
            self.nets[k](x[r], label[r], select_rows(cond, r, x.device), *(m[r] for m in more))
            for k, r in zip(present, rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]


@dataclass(frozen=True)
class Experts(Net):
    """Networks like `net`: one for labels above bounds[0], one between it and the next, ..."""

    net: Net
    """What each network is."""
    bounds: tuple[float, ...]
    """Where one network's noise levels end and the next one's begin, in labels of the path
    (t itself for whole denoisers), decreasing."""

    def __post_init__(self) -> None:
        if any(later >= earlier for earlier, later in pairwise(self.bounds)):
            raise ValueError(f"Experts.bounds decrease, got {self.bounds}")

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """`ExpertsNet` of new networks, one more than there are bounds."""
        nets = (self.net.build(shape, classes) for _ in range(len(self.bounds) + 1))
        return ExpertsNet(nets, self.bounds)
