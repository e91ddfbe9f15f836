"""A discriminator at its optimum in one dimension, and the frozen network that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import VE
from fewstep.distillation.method import Nets
from tests.quadrature import F64, Line


class Glass(nn.Module):
    """A teacher whose encoder features are x_t itself."""

    path = VE()
    feature_shape = (1,)

    def forward(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def encode(self, xt: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return xt

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        return self(*inputs), self.encode(*inputs)


class Exact(nn.Module):
    """scale l*(x_t) + shift for trained heads: at rest at 1 and 0 if l* is the optimum."""

    def __init__(self, optimum: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=F64))
        self.shift = nn.Parameter(torch.zeros((), dtype=F64))
        self.optimum = optimum

    def forward(self, features: Sequence[Tensor], first: int = 0) -> Tensor:
        (xt,) = features
        return self.scale * self.optimum(xt) + self.shift

    def unrest(self, loss: Tensor) -> float:
        """The largest slope of a loss in scale and shift."""
        slopes = torch.autograd.grad(loss, [self.scale, self.shift])
        return max(abs(float(slope)) for slope in slopes)


def judged(student: Line, optimum: Callable[[Tensor], Tensor]) -> Nets:
    return Nets({"student": student, "discriminator": Exact(optimum)})


class Joint(nn.Module):
    """A joint discriminator: `logit` of x_t and, where it is told, of what that was made from."""

    def __init__(self, logit: Callable[[Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=F64))
        self.logit = logit

    def forward(self, *inputs: Any) -> Tensor:
        raise NotImplementedError

    def encode(
        self,
        xt: Tensor,
        t: Tensor,
        cond: Any = None,
        beside: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        return self.scale * self.logit(xt, None if beside is None else beside[0])

    def forward_with_features(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
