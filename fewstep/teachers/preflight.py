"""Pre-flight check: does the teacher denoise as its files say, at five noise levels?

A prediction type or a schedule that is written down wrongly gives no error: the network answers,
and the student learns the wrong distribution. A denoiser f of the distribution p, though, is a
conditional mean, and that can be tested on samples x of p:

    E |x - f|^2  <=  E |x - p f - q x_t|^2        for all numbers p, q,

since no function of x_t, and so no affine function of f and x_t, does better than E[x | x_t]. A
network whose output is taken for another parameterisation is off by exactly such a function; one
on another schedule judges the noise wrongly, which a smaller p mends in part. So x is regressed
on f and x_t at each level, and the teacher is refused where

    gain  = min_pq E |x - p f - q x_t|^2 / E |x - f|^2    falls below 0.75,

or where it is beaten by the best *linear* denoiser, which knows the variance of x alone, by more
than half of that one's error. The samples are the teacher's own where there are no data: made by
a few steps of its sampler, through the very prediction that is under test. A wrong reading can be
consistent with itself only where it makes samples of another scale, so theirs is bounded: models
are trained on pictures or latents whose standard deviation is about one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.generator import Generator
from fewstep.diffusion.noise_path import NoisePath, coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.samplers import FewStep, Heun, MultiStep
from fewstep.diffusion.types import Cond, Denoiser

LOG_SNR = (3.0, 1.0, -1.0, -2.5, -4.0)
"""The levels, as ln(alpha^2 / sigma^2)."""
GAIN, LINEAR = 0.75, 1.5
"""What is refused: a gain below the first, an error above so many linear denoisers'."""
SCALE = 0.05, 5.0
"""Standard deviations that a teacher's own samples may have."""
WAY_OUT = (
    "look at the scheduler's prediction_type and betas, or, where they are right and the teacher "
    "is merely trained too little, go on with --domain.no-check"
)
STEPS = 20
"""Calls that make the teacher's own samples."""


class Level(NamedTuple):
    """The result at one noise level."""

    t: float
    error: float
    """E |x - f|^2 in units of the best linear denoiser's."""
    gain: float
    """What is left of it after x is regressed on f and x_t."""


def own_samples(teacher: Generator, cond: Cond, draws: Draws) -> Tensor:
    """Samples x_0 by a few steps of the teacher's own sampler, not decoded: (N, *)."""
    sampler = teacher.sampler
    if isinstance(sampler, Heun | FewStep | MultiStep):
        sampler = replace(sampler, steps=min(STEPS, sampler.steps))
    z = draws.normal("z", teacher.shape)
    return sampler(teacher.denoiser, z, cond, draws)


def time_of(path: NoisePath, log_snr: float) -> float:
    """t with ln(alpha_t^2 / sigma_t^2) = log_snr, or the nearest end of the path's range."""
    tau = (1 + torch.tensor(log_snr / 2, dtype=torch.float64).exp()).reciprocal()
    return float(path.time_of(tau))


@torch.no_grad()
def examine(denoiser: Denoiser, x: Tensor, cond: Cond, draws: Draws) -> list[Level]:
    """The teacher's error and gain at each level, on samples x: (N, *) with their conditions."""
    levels = []
    variance = (x - x.mean()).double().square().mean()
    for number, log_snr in enumerate(LOG_SNR):
        t = torch.tensor(time_of(denoiser.path, log_snr), dtype=x.dtype, device=x.device)
        xt = perturb(denoiser.path, x, draws.normal(f"eps{number}", x.shape[1:]).to(x), t)
        alpha, sigma = (c.double() for c in coefficients(denoiser.path, x, t))
        f, target = denoiser(xt, t, cond).double().flatten(), x.double().flatten()
        error = (target - f).square().mean()
        linear = variance * sigma**2 / (alpha**2 * variance + sigma**2)
        known = torch.stack([f, xt.double().flatten(), torch.ones_like(f)], 1)
        gain = float("nan")
        if bool(error.isfinite()):
            fit = torch.linalg.lstsq(known, target[:, None]).solution
            gain = float((target - (known @ fit)[:, 0]).square().mean() / error)
        levels.append(Level(float(t), float(error / linear), gain))
    return levels


def preflight(
    teacher: Generator, cond: Cond, x: Tensor | None = None, count: int = 8, seed: int = 0
) -> list[Level]:
    """Check that a teacher denoises, on x or on its own samples; ValueError if it fails.

    Args:
        teacher: the generator to check.
        cond: the conditions of `count` samples, or None.
        x: (count, *), real data in the teacher's space; None: samples of the teacher.
        count: number of samples.
        seed: of the noise and the teacher's samples.

    Returns: a `Level` for each of the five noise levels of `LOG_SNR`.
    """
    draws = Draws.range(0, count, seed, teacher.device).under("preflight")
    with torch.no_grad():
        if x is None:
            x = own_samples(teacher, cond, draws)
            _scaled(x)
        levels = examine(teacher.denoiser, x, cond, draws)
    bad = [level for level in levels if not sound(level)]
    if bad:
        worst = max(bad, key=lambda level: level.error)
        raise ValueError(
            f"the teacher does not denoise as its files say: at t = {worst.t:.3g} its error is "
            f"{worst.error:.3g} times a linear denoiser's, and {1 - worst.gain:.0%} of it goes "
            f"away when its answer is rescaled; {WAY_OUT}"
        )
    return levels


def _scaled(x: Tensor) -> None:
    """ValueError for samples whose standard deviation no picture or latent has."""
    std = float(x.std())
    if not SCALE[0] <= std <= SCALE[1]:
        raise ValueError(
            f"the teacher does not denoise as its files say: its samples have the standard "
            f"deviation {std:.3g}, where about one is usual; {WAY_OUT}"
        )


def sound(level: Level) -> bool:
    """Whether error and gain are those of a denoiser of its samples; not where they are NaN."""
    return level.gain >= GAIN and level.error <= LINEAR
