"""States between calls: noise from s to t, and what a fake score of such states learns.

A call of a student of several leads to a state x_s, which should have the law of data at s. With
r = alpha_t / alpha_s and tau^2 = sigma_t^2 - r^2 sigma_s^2 the kernel of the path from s to t is

    x_t = r x_s + tau eps    (`NoisePath.bridge`).

The score of x_t does not need to know which x_0 made x_s: its regression target is -eps / tau, or
as a prediction of x_0, (x_t + sigma_t^2 score) / alpha_t,

    (x_t - sigma_t^2 eps / tau) / alpha_t  =  x_s / alpha_s - r sigma_s^2 / (alpha_s tau) eps,

score matching in a subinterval (Fan et al. 2025, Phased DMD, https://arxiv.org/abs/2510.27684). At
s = 0 it is x itself. Its noise grows without end where t comes near s, so the loss is taken of
its product with tau / sigma_t, which is finite, as the right side is at alpha_t = 0.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fewstep.diffusion.noise_path import NoisePath, coefficients, perturb
from fewstep.distillation.fake_score import NoisedSamples


class Renoised(NamedTuple):
    """A state with more noise, and the target of a fake score there.

    share: tau / sigma_t, (B, 1, ..., 1); target: (B, *), the subinterval target of the prediction
    of x_0, times share.
    """

    noised: NoisedSamples
    share: Tensor
    target: Tensor


def renoise(path: NoisePath, xs: Tensor, eps: Tensor, s: Tensor | None, t: Tensor) -> Renoised:
    """Move states from s to t.

    Args:
        path: the noise path.
        xs: (B, *), states at s.
        eps: (B, *), standard normal noise that is independent of them.
        s: (B,), their time; None for x_0 itself, which is the end of every path.
        t: (B,), at least s, with sigma_t > 0.

    Returns: `Renoised`. Raises ValueError where t < s, and where the shapes do not fit.
    """
    alpha, sigma = coefficients(path, xs, t)
    if s is None:
        noised = NoisedSamples(perturb(path, xs, eps, t), t, alpha, sigma)
        return Renoised(noised, sigma / sigma, xs)
    noised = NoisedSamples(path.bridge(xs, eps, s, t), t, alpha, sigma)
    alpha_s, sigma_s = coefficients(path, xs, s)
    ratio = alpha / alpha_s
    tau = ((sigma - ratio * sigma_s) * (sigma + ratio * sigma_s)).clamp(min=0).sqrt()
    target = (tau * xs - ratio * sigma_s**2 * eps) / (alpha_s * sigma)
    return Renoised(noised, tau / sigma, target)
