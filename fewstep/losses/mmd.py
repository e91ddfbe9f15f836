"""Maximum mean discrepancy between the patches of two samples.

An encoder turns a sample into features at n places: n tokens of d numbers. Two samples are alike
where their tokens have one law, wherever in the picture each of them stands (Starodubcev et al.
2025, https://arxiv.org/abs/2503.16397, after Gretton et al. 2012):

    MMD^2 = E k(a, a') + E k(b, b') - 2 E k(a, b).

With the kernel k(a, b) = <a, b> it is |E a - E b|^2, the square of the means' distance, and blind
to all else. With a Gaussian kernel, k = exp(-|a - b|^2 / (2 width^2)), it is zero for equal laws
alone; a token is not compared with itself, so that the estimate is without bias.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape

Kernel = Literal["linear", "rbf"]


def tokens(features: Tensor) -> Tensor:
    """Features (B, F, *) as tokens (B, n, F); those without places, (B, F), as one token."""
    return features.flatten(2).transpose(1, 2) if features.ndim > 2 else features[:, None]


def linear_mmd(a: Tensor, b: Tensor, c: float = 1e-3) -> Tensor:
    """The distance of the tokens' means, pseudo-Huber in each number.

    (|m|^2 + c^2)^(1/2) - c of each number m of mean a - mean b, averaged, as released.

    Args: a, b: (B, n, d) tokens; c: below it the distance is a square.

    Returns: (B,). Raises ValueError where the shapes differ.
    """
    same_shape(a=a, b=b)
    return (((a.mean(1) - b.mean(1)) ** 2 + c**2).sqrt() - c).mean(1)


def rbf_mmd(a: Tensor, b: Tensor, width: float) -> Tensor:
    """MMD^2 with a Gaussian kernel, without bias: it may be negative.

    Args: a, b: (B, n, d) tokens; width: of the kernel.

    Returns: (B,). Raises ValueError where the shapes differ, and for a single token.
    """
    same_shape(a=a, b=b)
    count = a.shape[1]
    if count < 2:
        raise ValueError("the rbf kernel compares the patches of a sample, and there is one only")

    def among(x: Tensor) -> Tensor:
        return (_kernel(x, x, width).sum((1, 2)) - count) / (count * (count - 1))

    return among(a) + among(b) - 2 * _kernel(a, b, width).mean((1, 2))


def _kernel(a: Tensor, b: Tensor, width: float) -> Tensor:
    """k of all pairs of tokens: (B, n, n).

    Squares are summed from differences: a distance of zero has no root's gradient.
    """
    squares = ((a[:, :, None] - b[:, None]) ** 2).sum(3)
    return torch.exp(-squares / (2 * width**2))
