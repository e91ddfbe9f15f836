"""f-divergences D_f(q || p) = E_p f(r), r = q / p, and what they make of the KL direction.

For a student of density p_t and a teacher of density q_t at noise level t, the gradient of
D_f(q_t || p_t) in the student is that of KL(p_t || q_t) with each sample weighted by

    h(r) = r^2 f''(r)

(Xu et al. 2025, f-distill, https://arxiv.org/abs/2502.15681). h is 1 for the reverse KL. Where h
grows with r, samples count most where the student is too rare: such divergences cover modes.

The same h makes a divergence of clean samples out of Fisher divergences of noised ones
(Wang et al. 2025, Uni-Instruct, https://arxiv.org/abs/2505.20755): on a path with alpha = 1

    D_f(q_0 || p_0) = 1/2 int E_p[h(r) |s_psi - s_phi|^2] d sigma^2    (`expanded`).

    reverse_kl    -log r                                    1
    kl            r log r                                   r
    js            r log r - (1 + r) log((1 + r) / 2)        r / (1 + r)      twice Jensen-Shannon
    softened      (1 + r) log((1 + r) / (2 r))              1 / (1 + r)      softened reverse KL
    hellinger     (1 - sqrt r)^2                            sqrt(r) / 2
    jeffreys      (r - 1) log r                             1 + r
    neyman        (1 - r)^2 / r                             2 / r
    pearson       (r - 1)^2                                 2 r^2

neyman and pearson are infinite where one density has much lighter tails than the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape
from fewstep.losses.score import mean_flat

Family = Literal[
    "reverse_kl", "kl", "js", "softened", "hellinger", "jeffreys", "neyman", "pearson"
]


class FDivergence(NamedTuple):
    """f, h = r^2 f'' and h', all elementwise on positive density ratios r of any shape."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


DIVERGENCES: dict[str, FDivergence] = {
    "reverse_kl": FDivergence(lambda r: -r.log(), torch.ones_like, torch.zeros_like),
    "kl": FDivergence(lambda r: r * r.log(), lambda r: r, torch.ones_like),
    "js": FDivergence(
        lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log(),
        lambda r: r / (1 + r),
        lambda r: (1 + r) ** -2,
    ),
    "softened": FDivergence(
        lambda r: (1 + r) * ((1 + r) / (2 * r)).log(),
        lambda r: 1 / (1 + r),
        lambda r: -((1 + r) ** -2),
    ),
    "hellinger": FDivergence(
        lambda r: (1 - r.sqrt()) ** 2, lambda r: r.sqrt() / 2, lambda r: r.rsqrt() / 4
    ),
    "jeffreys": FDivergence(lambda r: (r - 1) * r.log(), lambda r: 1 + r, torch.ones_like),
    "neyman": FDivergence(lambda r: (1 - r) ** 2 / r, lambda r: 2 / r, lambda r: -2 / r**2),
    "pearson": FDivergence(lambda r: (r - 1) ** 2, lambda r: 2 * r**2, lambda r: 4 * r),
}


def f_divergence(family: str) -> FDivergence:
    """The divergence of this name; ValueError for another name."""
    if family not in DIVERGENCES:
        raise ValueError(f"the divergence is one of {', '.join(get_args(Family))}, got {family!r}")
    return DIVERGENCES[family]


def expanded(
    divergence: FDivergence,
    ratio: Tensor,
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    weight: Tensor | float = 1.0,
    own: Tensor | None = None,
) -> Tensor:
    """The expanded divergence: w <delta, h (own - x) + (h - r h') / 2 delta>, delta = real - fake.

    Args:
        divergence: says h and h'.
        ratio: (B,), r = q_t / p_t at x_t, with the gradient in x_t that it has.
        x: (B, *), samples of the student.
        real: (B, *), the teacher's prediction f_phi(x_t), with gradient.
        fake: (B, *), the fake score's prediction f_psi(x_t), with gradient.
        weight: w, a number or broadcastable against x.
        own: (B, *), f_psi where it is compared with x, if guidance makes it another than `fake`.

    Returns: (B,), a mean over a sample's dimensions. With w = alpha^2 / sigma^4 and an exact fake
    score the sum over the dimensions has the gradient of 1/2 E_p[h(r) |s_psi - s_phi|^2]: the
    samples move within (h - r h') |u|^2, since r falls where the student's density grows, and the
    student's score moves within 2 h <u, d s_psi>, which the projection identity of SiD makes a
    loss. It is SiD's loss, at alpha = 1/2 where h is 1 (the reverse KL), and r times that at
    alpha = 1 where h is r (KL).

    Raises ValueError where the shapes differ. Wang et al. 2025, https://arxiv.org/abs/2505.20755.
    """
    own = fake if own is None else own
    same_shape(x=x, real=real, fake=fake, own=own)
    each = (-1,) + (1,) * (x.ndim - 1)
    h = divergence.h(ratio)
    moved = (h - ratio * divergence.slope(ratio)).reshape(each) / 2
    delta = real - fake
    return mean_flat(weight * delta * (h.reshape(each) * (own - x) + moved * delta))
