"""The density ratio r = q_t / p_t of teacher and student, as a discriminator says it.

At its optimum the logit of a discriminator is log r (`Discriminator.log_ratio`), at the x_t and t
that it is read at. A logit that is off by a constant, as by one that favours a class, multiplies
r by a constant; but whatever the laws are,

    E_p r = 1    at every noise level,

so r is divided by its mean over the student's samples of its level, before it is clipped. Levels
are bins of equal mass in the law of t. The means are statistics over the global batch of the step
before (`RatioStatistics`), so that a loss stays a mean over samples. f-distill (Xu et al. 2025,
https://arxiv.org/abs/2502.15681) normalises so, but clips r before.

Losses of which r is a part may need its gradient in x_t. That of an optimal logit is known without
the discriminator, from the predictions of teacher and fake score:

    d log r / d x_t = s_phi - s_psi = (alpha / sigma^2) (f_phi - f_psi)    (`along_scores`).

Where noise is low, what networks err by is divided by sigma^2 there. A law of unit variance has
scores of order 1 / (alpha^2 + sigma^2)^(1/2): a slope of many times that is an error, and is made
shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fewstep.diffusion.noise_path import same_shape
from fewstep.diffusion.types import device_of
from fewstep.distillation.fake_score import NoisedSamples, Predictions
from fewstep.distillation.method import Nets, Step

LARGEST = 10.0
"""Logits are clamped to +- this before they are read as log r."""


class RatioStatistics(nn.Module):
    """The mean of r at each of `bins` noise levels, and the mean of h: buffers, 1 at first."""

    def __init__(self, bins: int) -> None:
        super().__init__()
        self.ratio: Tensor
        self.h: Tensor
        self.register_buffer("ratio", torch.ones(bins))
        self.register_buffer("h", torch.ones(()))

    @torch.no_grad()
    def follow(self, count: Tensor, ratio: Tensor, h: Tensor, rate: float) -> None:
        """Take in a step: `rate` of the old means, and 1 - rate of the step's.

        count: (bins,) samples; ratio: (bins,) sums of r; h: (), the sum of h. A level without
        samples keeps its mean.
        """
        mean = ratio / count.clamp_min(1)
        self.ratio.copy_(torch.where(count > 0, torch.lerp(mean, self.ratio, rate), self.ratio))
        self.h.copy_(torch.lerp(h / count.sum().clamp_min(1), self.h, rate))


class Ratio(NamedTuple):
    """The density ratio at noised samples.

    said: (B,), r as the logits say it; kept: (B,), divided by the mean of its level and clipped;
    level: (B,), the number of its level; clipped: (), the share that the clip has changed.
    """

    said: Tensor
    kept: Tensor
    level: Tensor
    clipped: Tensor

    @property
    def logs(self) -> Mapping[str, Tensor]:
        """The mean of r, 1 where the discriminator is right, and the share that is clipped."""
        return {"ratio": self.said.detach().mean(), "clipped": self.clipped}

    def sums(self, bins: int, h: Tensor) -> Mapping[str, Tensor]:
        """What `follow` needs of these samples; h: (B,)."""
        r = self.said.detach()
        share = torch.zeros(bins, device=r.device, dtype=r.dtype)
        return {
            "count": share.index_add(0, self.level, torch.ones_like(r)),
            "ratio": share.index_add(0, self.level, r),
            "h": h.detach().sum(),
        }


def read_ratio(statistics: Any, log_ratio: Tensor, u: Tensor, clip: tuple[float, float]) -> Ratio:
    """The normalised density ratio of samples.

    Args:
        statistics: the `RatioStatistics` of the step before.
        log_ratio: (B,), log r as the logits say it; its gradient is kept within the bounds.
        u: (B,), uniform on [0, 1]: the quantiles of the samples' times, which say their levels.
        clip: the smallest and the largest normalised ratio.

    Returns: `Ratio`.
    """
    r = log_ratio.clamp(-LARGEST, LARGEST).exp()
    bins = len(statistics.ratio)
    level = (u.to(r) * bins).long().clamp(max=bins - 1)
    normal = r / statistics.ratio.to(r)[level]
    kept = normal.clamp(*clip)
    return Ratio(r, kept, level, (kept != normal).float().mean())


def along_scores(log_ratio: Tensor, n: NoisedSamples, p: Predictions, most: float) -> Tensor:
    """log r (B,) with the gradient in x_t that the scores give it, and no other.

    Args:
        log_ratio: (B,), the values.
        n: the noised samples, with a gradient.
        p: the predictions there.
        most: the largest norm of the gradient times (alpha^2 + sigma^2)^(1/2); longer ones are
            shortened to it. math.inf: none is.

    ValueError where shapes differ.
    """
    same_shape(x=n.xt, real=p.real, fake=p.fake)
    slope = (p.alpha / p.sigma**2 * (p.real - p.fake)).detach()
    length = (slope * (p.alpha**2 + p.sigma**2).sqrt()).flatten(1).norm(dim=1)
    short: Tensor = (most / length.clamp_min(1e-30)).clamp(max=1.0)
    change = (slope * (n.xt - n.xt.detach())).flatten(1).sum(1)
    return log_ratio.detach() + short * change


def require_ratio(method: object, clip: tuple[float, float], bins: int, rate: float) -> None:
    """ValueError for what a density ratio cannot be clipped, normalised or averaged by."""
    if not 0 < clip[0] <= clip[1] or bins < 1 or not 0 <= rate < 1:
        raise ValueError(
            f"{type(method).__name__} needs a clip of two increasing positive numbers, bins >= 1 "
            f"and 0 <= rate < 1, got {clip}, {bins} and {rate:g}"
        )


def with_statistics(nets: Nets, bins: int) -> Nets:
    """`nets`, and the "statistics" of r at so many noise levels."""
    nets["statistics"] = RatioStatistics(bins).to(device_of(nets["student"]))
    return nets


def follow(step: Step, rate: float) -> None:
    """nets["statistics"] take in the step's samples, if they are told of in its sums."""
    statistics: Any = step.nets["statistics"]
    if "count" in step.sums:
        sums = (step.sums[name].to(statistics.h) for name in ("count", "ratio", "h"))
        statistics.follow(*sums, rate)
