"""The adversarial losses, on logits l of "real": l > 0 says real.

    name            discriminator minimises                       generator minimises
    nonsaturating   (softplus(-l_real) + softplus(l_fake)) / 2    softplus(-l_fake)
    hinge           (relu(1 - l_real) + relu(1 + l_fake)) / 2     -l_fake
    least_squares   ((l_real - 1)^2 + (l_fake + 1)^2) / 8         ((l_fake - 1) / 2)^2
    relativistic    softplus(l_fake - l_real)                     softplus(l_real - l_fake)

What the generator is told by a discriminator at its optimum l* is score distillation with a
weight: for data of density q_t, samples of density p_t and r = q_t / p_t, the gradient is

    E_p h(r) (s_p - s_q)^T dx_t,    h(r) = -g'(l*) r dl*/dr,

with g the generator's loss and s the scores, so that h = 1 is the gradient of KL(p || q):

    nonsaturating   l* = log r                     h = 1 / (1 + r)
    hinge           l* = sign(r - 1)               h = 0 almost everywhere: what a smooth or
                                                   penalised discriminator says instead counts
    least_squares   l* = (r - 1) / (r + 1)         h = 2 r / (1 + r)^3
    relativistic    l* = log r + any constant      h = E_{y of q} sigmoid(l*_y - l*)

A discriminator may answer with a map of logits; a sample's loss is the mean over its own map.
SiDA (Zhou et al. 2024, https://arxiv.org/abs/2410.14919) then replaces each sample's loss by the
mean over the batch: the weight of sample i no longer multiplies the loss of sample i
(`average="batch"`). As the product of two means this depends on what "the batch" is: split over
accumulation parts or processes it is another loss. `average="sample"` is free of that. The
relativistic loss pairs a real and a generated sample of one index, and couples no other two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.diffusion.noise_path import same_shape
from fewstep.losses.score import mean_flat

Average = Literal["batch", "sample"]
Pool = Literal["channels", "space", "learned"]
Adversarial = Literal["nonsaturating", "hinge", "least_squares", "relativistic"]


def logits(features: Tensor, pool: Pool = "channels") -> Tensor:
    """Encoder features (B, F, *) -> logits (B, N), at least float32.

    Args:
        features: (B, F, *), channels first.
        pool: "channels", the mean over channels, one logit a place (SiDA, no new parameters);
            "space", the mean over places, one logit a channel (for tokens that a layer norm leaves
            without a mean over channels); "learned", where a head has made features of one
            channel, the logit itself (`fewstep.distillation.discriminator_head`).

    Returns: (B, N), positive for real.

    Raises ValueError for another `pool`, and for "learned" with more than one channel.
    """
    if pool not in ("channels", "space", "learned"):
        raise ValueError(f"pool is 'channels', 'space' or 'learned', got {pool!r}")
    if pool == "learned" and features.shape[1] != 1:
        raise ValueError(
            f"a learned head leaves one channel, got {features.shape[1]}: the fake score has "
            "none; a method's init gives it one with Critic.equipped"
        )
    features = features.float() if features.dtype.itemsize < 4 else features
    flat = features.reshape(*features.shape[:2], -1)
    return flat.mean(2) if pool == "space" else flat.mean(1)


def cross_entropy(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of real against fake, ln 2 at l = 0; its optimum is log r.

    real, fake: (B, N) logits. Returns (B,). ValueError where their shapes differ. Goodfellow et
    al. 2014, https://arxiv.org/abs/1406.2661.
    """
    same_shape(real=real, fake=fake)
    return mean_flat(F.softplus(-real) + F.softplus(fake)) / 2


def nonsaturating(fake: Tensor) -> Tensor:
    """softplus(-l) of generated samples, against `cross_entropy`.

    fake: (B, N) logits. Returns (B,). Goodfellow et al. 2014,
    https://arxiv.org/abs/1406.2661.
    """
    return mean_flat(F.softplus(-fake))


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(relu(1 - l_real) + relu(1 + l_fake)) / 2, 1 at l = 0; its optimum is sign(r - 1).

    real, fake: (B, N) logits. Returns (B,). ValueError where their shapes differ. Lim & Ye 2017,
    https://arxiv.org/abs/1705.02894.
    """
    same_shape(real=real, fake=fake)
    return mean_flat(F.relu(1 - real) + F.relu(1 + fake)) / 2


def negative(fake: Tensor) -> Tensor:
    """-l of generated samples, against `hinge`.

    fake: (B, N) logits. Returns (B,). Lim & Ye 2017,
    https://arxiv.org/abs/1705.02894.
    """
    return mean_flat(-fake)


def squares(real: Tensor, fake: Tensor) -> Tensor:
    """Squared errors of (1 + l) / 2 as 1 for real and 0 for fake; the optimum is (r-1)/(r+1).

    The 0-1 coding, moved so that l > 0 still says real. real, fake: (B, N) logits. Returns (B,),
    1/4 at l = 0. ValueError where their shapes differ. Mao et al. 2017,
    https://arxiv.org/abs/1611.04076.
    """
    same_shape(real=real, fake=fake)
    return mean_flat((real - 1) ** 2 + (fake + 1) ** 2) / 8


def square(fake: Tensor) -> Tensor:
    """((l - 1) / 2)^2 of generated samples, against `squares`.

    fake: (B, N) logits. Returns (B,). Mao et al. 2017,
    https://arxiv.org/abs/1611.04076.
    """
    return mean_flat(((fake - 1) / 2) ** 2)


def relativistic(real: Tensor, fake: Tensor) -> Tensor:
    """softplus(l_fake - l_real) of pairs, ln 2 at equal logits; the optimum is log r + constant.

    real, fake: (B, N) logits, of which those of one index are a pair. Returns (B,). Against it
    stands `nonsaturating` of the difference. ValueError where their shapes differ.
    Jolicoeur-Martineau 2018, https://arxiv.org/abs/1807.00734; with both gradient penalties it is
    R3GAN's, Huang et al. 2024, https://arxiv.org/abs/2501.05441.
    """
    same_shape(real=real, fake=fake)
    return mean_flat(F.softplus(fake - real))


class AdversarialLoss(NamedTuple):
    """The two sides of an adversarial loss.

    discriminator: logits (real, fake), each (B, N) -> (B,).
    generator: logits of generated samples (B, N) -> (B,).
    log_ratio: logits of an optimal discriminator -> log r, of any shape; None where they do not
        tell it. Of the relativistic loss up to a constant.
    paired: whether the generator's side is given l_fake - l_real in place of l_fake, the real
        sample being the one of the same index, and without gradient.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    log_ratio: Callable[[Tensor], Tensor] | None
    paired: bool = False


def _itself(logit: Tensor) -> Tensor:
    return logit


def _of_squares(logit: Tensor) -> Tensor:
    """log (1 + l) / (1 - l), finite beyond +- 1, where an optimal discriminator never is."""
    return 2 * logit.clamp(-0.9999, 0.9999).atanh()


LOSSES: dict[str, AdversarialLoss] = {
    "nonsaturating": AdversarialLoss(cross_entropy, nonsaturating, _itself),
    "hinge": AdversarialLoss(hinge, negative, None),
    "least_squares": AdversarialLoss(squares, square, _of_squares),
    "relativistic": AdversarialLoss(relativistic, nonsaturating, _itself, paired=True),
}


def adversarial(name: str) -> AdversarialLoss:
    """The loss of this name; ValueError for another name."""
    if name not in LOSSES:
        names = ", ".join(get_args(Adversarial))
        raise ValueError(f"the adversarial loss is one of {names}, got {name!r}")
    return LOSSES[name]


@dataclass(frozen=True)
class GradientPenalty:
    """Half of r1 E_q |grad l|^2 + r2 E_p |grad l|^2, added to the discriminator's loss.

    The gradient is that of a sample's mean logit l in the discriminator's input, its square a sum
    over the sample's dimensions, as published: R1 of real samples, R2 of generated ones. With a
    `step` s it is not taken but found from noise n on the input,

        |l(x_t + s n) - l(x_t)|^2 / s^2  =  |grad l|^2 + s^2 / 4 (2 tr H^2 + tr^2 H) + ...

    in the mean, H the second derivatives: one more pass in place of a second derivative, which
    also does where there is none, as with fused attention, or with nets in parts. The noise goes
    on x_t, at whatever noise level that is, and not on the clean sample.

    The input may be that of the heads on a frozen network: then it is the mean over heads of the
    square of each one's gradient in its own features, which needs no second pass back through the
    network (Sauer et al. 2023, https://arxiv.org/abs/2311.17042, equation 3).

    Attributes:
        r1: weight of the penalty on real samples; 0: none.
        r2: weight of the penalty on generated samples; 0: none.
        step: s, the size of the noise that finds the gradient; 0: the exact gradient.
        of: what it is the gradient in: the "input" x_t, or the "features" that heads read.

    Raises ValueError for negative values. Mescheder et al. 2018,
    https://arxiv.org/abs/1801.04406; the noise is that of Lin et al. 2025 (APT),
    https://arxiv.org/abs/2501.08316.
    """

    r1: float = 0.0
    """Weight of the gradient at real samples."""
    r2: float = 0.0
    """Weight of the gradient at generated samples."""
    step: float = 0.0
    """Size of the noise that finds the gradient; 0: it is exact."""
    of: Literal["input", "features"] = "input"
    """In what the gradient is: the input x_t, or the features that heads read."""

    def __post_init__(self) -> None:
        if self.of not in ("input", "features"):
            raise ValueError(f"GradientPenalty.of is 'input' or 'features', got {self.of!r}")
        if min(self.r1, self.r2, self.step) < 0:
            raise ValueError(
                "GradientPenalty.r1, r2 and step are 0 or more, got "
                f"{self.r1:g}, {self.r2:g} and {self.step:g}"
            )

    def __call__(
        self, judge: Callable[[Tensor], Tensor], xt: Tensor, logit: Tensor, noise: Tensor
    ) -> Tensor:
        """|grad l|^2 at x_t, with a graph.

        Args:
            judge: x_t -> logits (B, N); called where there is a `step`.
            xt: (B, *), which needs a gradient where there is none.
            logit: (B, N), judge(xt).
            noise: (B, *), standard normal.

        Returns: (B,).
        """
        if self.step:
            moved = judge(xt + self.step * noise)
            return ((moved - logit).flatten(1).mean(1) / self.step) ** 2
        total = logit.flatten(1).mean(1).sum()
        (slope,) = torch.autograd.grad(total, xt, create_graph=True)
        return slope.flatten(1).square().sum(1)


def averaged(loss: Tensor, weight: Tensor, average: Average) -> Tensor:
    """Weigh the adversarial loss: w_i l_i, or w_i mean_j l_j.

    Args:
        loss: (B,), of each sample.
        weight: (B, 1, ..., 1) or ().
        average: "sample" for the first, "batch" for the second (SiDA,
            https://arxiv.org/abs/2410.14919).

    Returns: (B,). Raises ValueError for another `average`.
    """
    if average not in ("batch", "sample"):
        raise ValueError(f"average is 'batch' or 'sample', got {average!r}")
    return weight.flatten() * (loss.mean() if average == "batch" else loss)
