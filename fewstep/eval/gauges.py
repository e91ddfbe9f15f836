"""Gauges of training progress that loss curves cannot give.

The loss of SiD has no sign and no scale that mean progress. These gauges have:

    fisher      E (alpha^2/sigma^4) |f_phi - f_psi|^2 on the student's samples: the estimated
                Fisher divergence to the teacher, level by level; should fall.
    fake_error  E |f_psi(x_t) - x|^2: how well the fake score knows the student; should stay at
                or below `teacher_error`, the teacher's own error on the same samples.
    diversity   mean distance between two samples of the same label; a collapsing student falls
                towards zero, long before the losses show it.
    passed      share of that difference which is the input noise itself, scaled: a network that
                answers the same to every noise still has the noise in its samples, by the skip
                connection c_skip z of its preconditioning. 1 when nothing else differs.
    spread      root mean square of the deviation from a sample's own mean: contrast, of pictures.
    extremes    share of the values at the ends of the real range or beyond; 1 when saturated.

All squared norms are means over a sample's dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import coefficients, perturb
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.time_distributions import TimeLaw
from fewstep.diffusion.types import Cond, Denoiser


@torch.no_grad()
def by_level(
    x: Tensor,
    cond: Cond,
    teacher: Denoiser,
    fake: Denoiser | None,
    times: TimeLaw,
    draws: Draws,
    levels: int = 9,
) -> list[dict[str, float]]:
    """The gauges at `levels` noise levels, evenly spaced in the quantiles of `times`.

    Arguments:
        x: (B, *) samples of the student.
        cond: their conditions.
        teacher: the denoiser f_phi.
        fake: the fake score f_psi, None where the method has none.
        times: the time distribution.
        draws: random numbers of the B samples.
        levels: number of noise levels.
    Returns an entry for each level with t and teacher_error and, where there is a fake score,
    fisher and fake_error.
    """
    out = []
    quantiles = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    for level, t in enumerate(times.quantile(quantiles).to(x)):
        entry = {"t": float(t)}
        eps = draws.normal(f"gauge{level}", x.shape[1:]).to(x)
        xt = perturb(teacher.path, x, eps, t)
        alpha, sigma = coefficients(teacher.path, x, t)
        real = teacher(xt, t, cond)
        entry["teacher_error"] = float(((real - x) ** 2).mean())
        if fake is not None:
            f = fake(xt, t, cond)
            entry["fisher"] = float(alpha**2 / sigma**4 * ((real - f) ** 2).mean())
            entry["fake_error"] = float(((f - x) ** 2).mean())
        out.append(entry)
    return out


def diversity(x: Tensor, labels: Tensor | None) -> float:
    """Mean root-mean-square difference of two samples of the same label; 0 if there is no pair.

    x: (B, *); labels: (B,), or None where all samples count as alike.
    """
    flat = x.flatten(1)
    gaps = torch.cdist(flat, flat) / flat.shape[1] ** 0.5
    same = torch.ones(len(x), len(x), dtype=torch.bool, device=x.device)
    if labels is not None:
        same = labels[:, None] == labels[None]
    same.fill_diagonal_(False)
    return float(gaps[same].mean()) if bool(same.any()) else 0.0


def passed(x: Tensor, z: Tensor, labels: Tensor | None) -> float:
    """The share r^2 of the variance of x, within a label, that is a multiple of the noise z.

    With x and z taken about their means of each label and dimension, r^2 = <x, z>^2 / (<x, x>
    <z, z>); 0 where samples do not differ at all.

    Arguments:
        x: (B, *) samples.
        z: (B, *) the noise they were made of, sample by sample.
        labels: (B,), or None where all count as alike.
    """
    groups = torch.zeros(len(x), dtype=torch.int64) if labels is None else labels.cpu()
    inner = torch.zeros(3, dtype=torch.float64)
    for label in groups.unique():
        rows = (groups == label).nonzero().flatten().to(x.device)
        a, b = (y[rows].double().flatten(1) for y in (x, z))
        a, b = a - a.mean(0), b - b.mean(0)
        inner += torch.stack([(a * b).sum(), (a * a).sum(), (b * b).sum()]).cpu()
    both, mine, noise = inner.tolist()
    return both**2 / (mine * noise) if mine > 0 and noise > 0 else 0.0


def spread(x: Tensor) -> float:
    """Mean over samples of the standard deviation within one; x: (B, *)."""
    return float(x.flatten(1).std(1, correction=0).mean())


def extremes(x: Tensor, low: float, high: float, near: float = 0.01) -> float:
    """The share of the values of x within `near` of the range's ends, in its units, or beyond.

    x: (B, *); low, high: the ends of the range. A value that is not finite counts.
    """
    margin = near * (high - low)
    return 1.0 - float(((x > low + margin) & (x < high - margin)).double().mean())
