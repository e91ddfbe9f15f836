"""Classifier-free guidance, of the teacher and of the fake score.

    f_kappa = f(x_t, none) + kappa (f(x_t, c) - f(x_t, none))        (Ho & Salimans 2022,
                                                    https://arxiv.org/abs/2207.12598)

Denoisers are affine in their network's output at a fixed x_t, so guiding x_0-predictions is the
same as guiding noise or velocities. kappa = 0 and kappa = 1 cost one call, any other scale two.
Score distillation has four places for a scale (Zhou et al. 2024, SiD-LSG,
https://arxiv.org/abs/2406.01561): kappa_1 where the fake score learns, kappa_2 and kappa_3 where
it stands in the student's loss, kappa_4 for the teacher:

    <f_phi,k4 - f_psi,k2, f_psi,k3 - x> + (1 - alpha) |f_phi,k4 - f_psi,k2|^2.

    Unguided       1, 1, 1, 1
    LSG(k)         k, k, k, k       long and short guidance: all alike
    ZeroCFG        0, 0, 0, 1       the fake score never sees the condition
    AntiCFG(k)     k, k, k, 1       k < 0: the fake score is pushed away from it
    RandomLSG      as LSG, with one scale drawn for each sample

Zero-CFG and Anti-CFG are Zhou et al. 2025, https://arxiv.org/abs/2505.12674.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fewstep.diffusion.encoder_features import require_encoder_features
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Cond, Denoiser, Sampler, State

Scale = float | Tensor
"""One kappa for all samples, or one each: (B,)."""


def is_one(kappa: Scale) -> bool:
    """Whether kappa is the number 1, so that the unconditional branch is not needed."""
    return isinstance(kappa, float | int) and kappa == 1


def is_zero(kappa: Scale) -> bool:
    """Whether kappa is the number 0, so that the conditional branch is not needed."""
    return isinstance(kappa, float | int) and kappa == 0


@dataclass(frozen=True)
class CFG(Sampler):
    """Sample the guided denoiser f_kappa in place of f: how guided teachers are sampled.

    Attributes:
        sampler: the sampler that calls f_kappa.
        kappa: the guidance scale; 0 is unconditional, 1 conditional without guidance.
        above: noise level sigma / alpha above which it guides, 0 or more.
        upto: the largest noise level at which it guides. Outside of (above, upto] the conditional
            prediction stands, for one call in place of two.

    A guidance interval keeps variety at high noise, where guidance decides too early, and saves
    calls at low noise, where it does little: Kynkaanniemi et al. 2024,
    https://arxiv.org/abs/2404.07724, with (0.28, 2.9] at scale 2 for ImageNet 512.

    Raises ValueError where kappa is not finite, or the interval holds nothing. Ho & Salimans 2022,
    https://arxiv.org/abs/2207.12598.
    """

    sampler: Sampler
    kappa: float = 7.5
    above: float = 0.0
    upto: float = math.inf

    def __post_init__(self) -> None:
        if not math.isfinite(self.kappa):
            raise ValueError(f"CFG.kappa is a finite scale, got {self.kappa:g}")
        if not 0 <= self.above < self.upto:
            raise ValueError(
                "CFG guides at noise levels above one of 0 or more, up to a larger one; got "
                f"{self.above:g} and {self.upto:g}"
            )

    @property
    def calls(self) -> int:
        """Network calls a sample: those of the sampler, twice as many unless kappa is 0 or 1.

        With an interval it is the largest number: outside of it one call is made.
        """
        return self.sampler.calls * (1 if is_one(self.kappa) or is_zero(self.kappa) else 2)

    @property
    def trainable(self) -> bool:
        """False: students learn their guidance."""
        return False

    def states(
        self, denoiser: Denoiser, z: Tensor, cond: Cond = None, draws: Draws | None = None
    ) -> Iterator[State]:
        """The states of the sampler, one for each call of f_kappa."""
        guide = AtScale(denoiser, self.kappa, self.above, self.upto)
        return self.sampler.states(guide, z, cond, draws)


class AtScale:
    """The denoiser f_kappa, by the calls of `guided`: two, or one where kappa is 0 or 1.

    Args: as the fields of `CFG`.
    """

    def __init__(
        self, denoiser: Denoiser, kappa: float, above: float = 0.0, upto: float = math.inf
    ) -> None:
        self.denoiser, self.kappa, self.path = denoiser, kappa, denoiser.path
        self.above, self.upto = above, upto

    def __call__(self, xt: Tensor, t: Tensor, cond: Cond = None, **named: Tensor) -> Tensor:
        kappa = self.scale(t)
        return guided(self.denoiser, xt, t, cond, [kappa], named=named).predictions[0]

    def scale(self, t: Tensor) -> Scale:
        """kappa at t (B,) or (): 1 outside of the interval; a number where it is one for all."""
        if self.above == 0 and self.upto == math.inf:
            return self.kappa
        level = self.path.sigma(t) / self.path.alpha(t)
        inside = (level > self.above) & (level <= self.upto)
        if bool(inside.all()):
            return self.kappa
        return torch.where(inside, self.kappa, 1.0) if bool(inside.any()) else 1.0


class Guided(NamedTuple):
    """The result of `guided`.

    `predictions` has one x_0-prediction (B, *) for each scale, `features` those of the encoder
    (B, F, *), or None where they were not asked for.
    """

    predictions: list[Tensor]
    features: Tensor | None


def guided(
    net: Any,
    xt: Tensor,
    t: Tensor,
    cond: Cond,
    kappas: Sequence[Scale],
    tap: bool = False,
    more: Sequence[Tensor] = (),
    named: Mapping[str, Tensor] = {},
) -> Guided:
    """f_kappa(x_t) for every kappa, with one call for each branch that any of them needs.

    Args:
        net: a `Denoiser`.
        xt: (B, *), noisy samples.
        t: (B,) or (), their time.
        cond: their conditions; None for a model without conditions, which takes scale 1 only.
        kappas: the scales, each one number or (B,).
        tap: also return the features of the denoiser's encoder: of the conditional branch, or of
            the unconditional one where that is all that is computed.
        more: further arguments of the denoiser, after cond.
        named: its further inputs by name (`fewstep.diffusion.extra_inputs`), in both branches.

    Returns: `Guided`, with one prediction (B, *) for each scale.

    Raises ValueError where a scale other than 1 meets cond None, and where `tap` is set for a
    denoiser without encoder features.
    """
    if cond is None and not all(is_one(kappa) for kappa in kappas):
        raise ValueError(
            "guidance needs conditions, but this batch has none (an unconditional model); "
            "use Unguided()"
        )
    first = require_encoder_features(net).forward_with_features if tap else net
    features: Tensor | None = None
    conditional: Any = None
    unconditional: Any = None
    if not all(is_zero(kappa) for kappa in kappas):
        conditional = first(xt, t, cond, *more, **named)
        if tap:
            conditional, features = conditional
    if not all(is_one(kappa) for kappa in kappas):
        alone = conditional is None
        unconditional = (first if alone else net)(xt, t, None, *more, **named)
        if alone and tap:
            unconditional, features = unconditional
    return Guided([_mix(conditional, unconditional, kappa) for kappa in kappas], features)


def _mix(conditional: Tensor | None, free: Tensor | None, kappa: Scale) -> Tensor:
    if is_one(kappa):
        assert conditional is not None
        return conditional
    if is_zero(kappa):
        assert free is not None
        return free
    assert conditional is not None
    assert free is not None
    if isinstance(kappa, Tensor):
        kappa = kappa.to(free).reshape(-1, *(1,) * (free.ndim - 1))
    return free + kappa * (conditional - free)
