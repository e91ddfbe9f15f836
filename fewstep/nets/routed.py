"""Several networks of one kind, of which each sample is sent to one, by its label.

With K networks a label c is the business of number c mod K. So K networks hold K times as many
weights, and each has a K-th of the labels to learn, while a sample costs what one of them costs:
the students of multi-student distillation (Song et al. 2024, https://arxiv.org/abs/2410.23274).
The label for none, like any other, has its network.

In a graph that is traced, whose shapes cannot depend on labels, every network sees all samples,
and the answers are chosen among afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.model import Net


class RoutedNet(nn.Module):
    """F(x, label, cond): as of its `nets`; cond are labels (B,) int64."""

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        super().__init__()
        self.nets = nn.ModuleList(nets)
        path = getattr(self.nets[0], "path", None)
        if path is not None:  # whole denoisers, whose path is theirs
            self.path = path

    def forward(self, x: Tensor, label: Tensor, cond: Any = None, *more: Tensor) -> Tensor:
        """What network c mod K makes of each sample: (B, *).

        Args:
            x: (B, *); label: (B,) or (); more: further inputs, (B, ...).
            cond: (B,) int64.

        Raises ValueError where there are no labels.
        """
        if not isinstance(cond, Tensor) or cond.ndim != 1:
            raise ValueError(
                f"{len(self.nets)} networks share the work by labels, but the condition is "
                f"{type(cond).__name__}; give the batch labels (B,)"
            )
        number = cond % len(self.nets)
        if x.is_meta or torch.compiler.is_compiling():
            return chosen(self.nets, number, x, label, cond, *more)
        # Each is called, even with no sample: sharded nets gather weights on all ranks at once.
        rows = [(number == k).nonzero()[:, 0] for k in range(len(self.nets))]
        parts = [
            net(*(t[mine] if t.ndim else t for t in (x, label, cond, *more)))
            for net, mine in zip(self.nets, rows, strict=True)
        ]
        return torch.cat(parts)[torch.cat(rows).argsort()]


def chosen(nets: nn.ModuleList, number: Tensor, x: Tensor, *more: Any) -> Tensor:
    """All networks' answers to all samples, of which each is given that of its `number` (B,)."""
    out: Tensor = nets[0](x, *more)
    for k, net in enumerate(nets):
        mine = (number == k).reshape(-1, *(1,) * (x.ndim - 1))
        out = out if k == 0 else torch.where(mine, net(x, *more), out)
    return out


@dataclass(frozen=True)
class Routed(Net):
    """`students` networks like `net`; label c is for number c mod `students`."""

    net: Net
    """What each network is."""
    students: int = 2
    """Number of networks, 1 or more."""

    def __post_init__(self) -> None:
        if self.students < 1:
            raise ValueError(f"Routed.students is 1 or more, got {self.students}")

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """`RoutedNet` of new networks; ValueError without classes to tell them apart."""
        if not classes:
            raise ValueError(
                "networks that share the work by labels need Model.classes; this model has none"
            )
        return RoutedNet(self.net.build(shape, classes) for _ in range(self.students))
