"""Score-distillation losses, all in x_0 space.

Notation: x a sample of the student; x_t = alpha_t x + sigma_t eps; real = f_phi(x_t) and
fake = f_psi(x_t) the x_0-predictions of teacher and fake score at x_t; delta = real - fake.
By Tweedie the difference of scores is s_psi - s_phi = -(alpha / sigma^2) delta, so the Fisher
divergence between student and teacher at time t is E (alpha^2 / sigma^4) |delta|^2.

Where the gradient must flow decides what is computed. `sid` and `sim` need it through x *and*
through x_t into both (frozen) networks; detaching either prediction is another method. `kl`
uses the predictions as constants: run the networks without a graph.
"""

from __future__ import annotations

from torch import Tensor

from fewstep.diffusion.noise_path import same_shape
from fewstep.losses.distance import Distance


def mean_flat(x: Tensor) -> Tensor:
    """(B, *) -> (B,): the mean over a sample's own dimensions."""
    return x.flatten(1).mean(1)


def denoising(prediction: Tensor, x0: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """The denoising loss w |f(x_t) - x_0|^2, Karras et al. 2022, equation 2.

    Args:
        prediction: (B, *), f(x_t).
        x0: (B, *), the clean samples.
        weight: w, a number or broadcastable against x0.

    Returns: (B,), a mean over a sample's dimensions. Raises ValueError where the shapes differ.
    https://arxiv.org/abs/2206.00364
    """
    same_shape(prediction=prediction, x0=x0)
    return mean_flat(weight * (prediction - x0) ** 2)


def sid(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    alpha: float,
    weight: Tensor | float = 1.0,
    own: Tensor | None = None,
) -> Tensor:
    """Score identity distillation: w <delta, (own - x) + (1 - alpha) delta>.

    Args:
        x: (B, *), samples of the student.
        real: (B, *), the teacher's prediction f_phi(x_t), with gradient.
        fake: (B, *), the fake score's prediction f_psi(x_t), with gradient; delta = real - fake.
        alpha: 0.5 for half the Fisher gradient, 1 for SIM, 1.2 as published.
        weight: w, a number or broadcastable against x.
        own: (B, *), f_psi where it is compared with x, if guidance makes it another than `fake`.

    Returns: (B,), a mean over a sample's dimensions. The value says nothing about progress: it may
    have either sign. With an exact fake score its expectation is (1 - alpha) times the (x_0-space)
    Fisher divergence; its gradient is exactly half of the Fisher gradient at alpha = 0.5, and
    SIM's with the squared distance (halved) at alpha = 1.

    Raises ValueError where the shapes differ. Zhou et al. 2024, equation 23,
    https://arxiv.org/abs/2404.04057.
    """
    own = fake if own is None else own
    same_shape(x=x, real=real, fake=fake, own=own)
    delta = real - fake
    return mean_flat(weight * delta * ((own - x) + (1 - alpha) * delta))


def sim(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    distance: Distance,
    scale: Tensor | float = 1.0,
    weight: Tensor | float = 1.0,
    own: Tensor | None = None,
) -> Tensor:
    """Score implicit matching: -w d'(y)^T k (own - x) with y = k (fake - real).

    Args:
        x: (B, *), samples of the student.
        real: (B, *), the teacher's prediction f_phi(x_t), with gradient.
        fake: (B, *), the fake score's prediction f_psi(x_t), with gradient.
        distance: d; the gradient also flows through the normaliser inside d'.
        scale: k, the units in which d measures: 1 for x_0 units, alpha / sigma^2 for scores.
        weight: w, a number or broadcastable against x.
        own: (B, *), f_psi where it is compared with x, if guidance makes it another than `fake`.

    Returns: (B,), a mean over a sample's dimensions.

    Raises ValueError where the shapes differ. Luo et al. 2024, theorem 3.1,
    https://arxiv.org/abs/2410.16794.
    """
    own = fake if own is None else own
    same_shape(x=x, real=real, fake=fake, own=own)
    slope = distance.slope(scale * (fake - real))
    return mean_flat(-weight * scale * slope * (own - x))


def kl(x: Tensor, real: Tensor, fake: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """A surrogate whose gradient in x is the KL direction w (fake - real), per dimension.

    Args:
        x: (B, *), samples of the student, the only argument with gradient.
        real: (B, *), the teacher's prediction f_phi(x_t).
        fake: (B, *), the fake score's prediction f_psi(x_t).
        weight: w, a number or broadcastable against x; alpha^2 / sigma^2 gives the gradient of
            KL(student || teacher) at time t.

    Returns: (B,), a mean over a sample's dimensions. The value means nothing, only its gradient.

    Raises ValueError where the shapes differ. Diff-Instruct (Luo et al. 2023,
    https://arxiv.org/abs/2305.18455) and DMD (Yin et al. 2024, https://arxiv.org/abs/2311.18828,
    equation 7).
    """
    same_shape(x=x, real=real, fake=fake)
    return mean_flat((weight * (fake - real)).detach() * x)
