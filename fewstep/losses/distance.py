"""Distances d(y) of score implicit matching and their gradients d'(y).

Norms run over a sample's own dimensions. Table of Luo et al. 2024,
https://arxiv.org/abs/2410.16794; the pseudo-Huber distance is the paper's choice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape


def squared_norm(y: Tensor) -> Tensor:
    """|y|^2 of each sample: (B, *) -> (B, 1, ..., 1)."""
    return (y**2).flatten(1).sum(1).reshape(-1, *(1,) * (y.ndim - 1))


class Distance(ABC):
    """A function d of y: (B, *), convex and smallest at 0, with its gradient."""

    @abstractmethod
    def value(self, y: Tensor) -> Tensor:
        """d(y): (B, *) -> (B,)."""

    @abstractmethod
    def slope(self, y: Tensor) -> Tensor:
        """d'(y): (B, *) -> (B, *), differentiable in y."""


def regression(distance: Distance, prediction: Tensor, x0: Tensor) -> Tensor:
    """d(f - x_0) over the number of a sample's dimensions: (B, *), (B, *) -> (B,).

    With `SquaredL2` and `SumOfAbsolutes` a mean over them. ValueError where the shapes differ.
    """
    same_shape(prediction=prediction, x0=x0)
    return distance.value(prediction - x0) / x0[0].numel()


@dataclass(frozen=True)
class SquaredL2(Distance):
    """d = |y|^2."""

    def value(self, y: Tensor) -> Tensor:
        """|y|^2: (B, *) -> (B,)."""
        return squared_norm(y).flatten()

    def slope(self, y: Tensor) -> Tensor:
        """2 y: (B, *) -> (B, *)."""
        return 2 * y


@dataclass(frozen=True)
class SumOfAbsolutes(Distance):
    """d = sum_i |y_i|: for regressions, whose minimum is then a median.

    Its slope is a sign, which has no derivative where a score loss needs one.
    """

    def value(self, y: Tensor) -> Tensor:
        """sum_i |y_i|: (B, *) -> (B,)."""
        return y.abs().flatten(1).sum(1)

    def slope(self, y: Tensor) -> Tensor:
        """sign(y_i), elementwise: (B, *) -> (B, *)."""
        return y.sign()


@dataclass(frozen=True)
class NormPower(Distance):
    """d = |y|^p, a power of the Euclidean norm; p >= 2 keeps the slope smooth at 0."""

    p: float = 4.0
    """Power of the norm, 2 or more."""

    def __post_init__(self) -> None:
        if self.p < 2:
            raise ValueError(f"NormPower.p must be at least 2, got {self.p}")

    def value(self, y: Tensor) -> Tensor:
        """|y|^p: (B, *) -> (B,)."""
        return squared_norm(y).flatten() ** (self.p / 2)

    def slope(self, y: Tensor) -> Tensor:
        """p |y|^(p - 2) y: (B, *) -> (B, *)."""
        square = squared_norm(y).clamp_min(torch.finfo(y.dtype).tiny)  # 2 < p < 4 at y = 0
        return self.p * square ** (self.p / 2 - 1) * y


@dataclass(frozen=True)
class SumOfPowers(Distance):
    """d = sum_i |y_i|^p; p >= 2 keeps the slope smooth at 0."""

    p: float = 4.0
    """Power of each element, 2 or more."""

    def __post_init__(self) -> None:
        if self.p < 2:
            raise ValueError(f"SumOfPowers.p must be at least 2, got {self.p}")

    def value(self, y: Tensor) -> Tensor:
        """sum_i |y_i|^p: (B, *) -> (B,)."""
        return (y.abs() ** self.p).flatten(1).sum(1)

    def slope(self, y: Tensor) -> Tensor:
        """p |y_i|^(p - 1) sign(y_i), elementwise: (B, *) -> (B, *)."""
        return self.p * y.abs() ** (self.p - 1) * y.sign()


@dataclass(frozen=True)
class Exponential(Distance):
    """d = exp(beta |y|^2) - 1: steeper than any power.

    For differences y of covariance C its gradient has no mean where 2 beta C has an eigenvalue of
    1 or more: keep beta far below.
    """

    beta: float = 0.01
    """Factor of |y|^2 in the exponent, above 0."""

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise ValueError(f"Exponential.beta must be positive, got {self.beta}")

    def value(self, y: Tensor) -> Tensor:
        """exp(beta |y|^2) - 1: (B, *) -> (B,)."""
        return (self.beta * squared_norm(y).flatten()).expm1()

    def slope(self, y: Tensor) -> Tensor:
        """2 beta exp(beta |y|^2) y: (B, *) -> (B, *)."""
        return 2 * self.beta * y * (self.beta * squared_norm(y)).exp()


@dataclass(frozen=True)
class PseudoHuber(Distance):
    """d = sqrt(|y|^2 + c^2) - c: quadratic near 0, linear far out, so it normalises itself."""

    c: float = 0.03
    """Norm at which d turns from quadratic to linear, above 0."""

    def __post_init__(self) -> None:
        if self.c <= 0:
            raise ValueError(f"PseudoHuber.c must be positive, got {self.c}")

    def value(self, y: Tensor) -> Tensor:
        """sqrt(|y|^2 + c^2) - c: (B, *) -> (B,)."""
        return (squared_norm(y).flatten() + self.c**2).sqrt() - self.c

    def slope(self, y: Tensor) -> Tensor:
        """y / sqrt(|y|^2 + c^2): (B, *) -> (B, *)."""
        return y / (squared_norm(y) + self.c**2).sqrt()


def rms_distance(distance: Distance, y: Tensor) -> Tensor:
    """d(y / D^(1/2)), D the dimension of a sample: (B, *) -> (B,).

    What a distance is of norms it then is of root mean squares: `SquaredL2` is the mean square,
    and the constants of the others do not depend on the size of a sample.
    """
    return distance.value(y / math.sqrt(y.shape[1:].numel()))


def huber(y: Tensor, c: float) -> Tensor:
    """The mean of (y_i^2 + c^2)^(1/2) - c over a sample's dimensions: (B, *) -> (B,)."""
    return ((y**2 + c**2).sqrt() - c).flatten(1).mean(1)
