"""Guidance scales of teacher and fake score in the score-identity losses.

Four scales kappa, of the teacher and of the fake score, in the fake score's own training and in
the student's loss: SiD-LSG (Zhou et al. 2024, https://arxiv.org/abs/2406.01561), Zero-CFG and
Anti-CFG (Zhou et al. 2025, https://arxiv.org/abs/2505.12674).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fewstep.diffusion.guidance import Scale, is_one, is_zero
from fewstep.diffusion.types import Batch
from fewstep.distillation.method import need_draws


class Scales(NamedTuple):
    """kappa_1 .. kappa_4: where the fake score learns (`fake_loss`), where it is compared with the
    teacher (`fake`) and with the sample (`own`) in the student's loss, and the teacher's (`real`).
    """

    fake_loss: Scale = 1.0
    fake: Scale = 1.0
    own: Scale = 1.0
    real: Scale = 1.0


class Guidance(ABC):
    """The four guidance scales, and how often the fake score learns without a condition."""

    drop: float = 0.1
    """Share of conditions dropped where a guided fake score learns, so that it knows both."""

    def __post_init__(self) -> None:
        if not 0 <= self.drop < 1:
            raise ValueError(f"{type(self).__name__}.drop is a share below 1, got {self.drop:g}")

    @abstractmethod
    def scales(self, batch: Batch) -> Scales:
        """kappa_1 .. kappa_4 for these samples, each one number or (B,)."""

    def learning(self, batch: Batch) -> Scale:
        """kappa_1, set to 0 (no condition) for the samples whose condition is dropped.

        Conditions are dropped if the fake score is used with and without one, in either loss.
        """
        kappas = self.scales(batch)
        ours = kappas.fake_loss, kappas.fake, kappas.own
        if not self.drop or all(is_one(k) for k in ours) or all(is_zero(k) for k in ours):
            return kappas.fake_loss
        dropped = need_draws(batch).uniform("fake/drop") < self.drop
        kappa = kappas.fake_loss
        if not isinstance(kappa, torch.Tensor):
            kappa = torch.full((), float(kappa), device=dropped.device)
        return torch.where(dropped, 0, kappa)


@dataclass(frozen=True)
class Unguided(Guidance):
    """No guidance: all scales are 1."""

    def scales(self, batch: Batch) -> Scales:
        """1, 1, 1, 1."""
        return Scales()


@dataclass(frozen=True)
class Kappas(Guidance):
    """Four scales of choice, each the same for all samples."""

    fake_loss: float = 1.0
    """kappa_1, the fake score's guidance scale where it learns."""
    fake: float = 1.0
    """kappa_2, the fake score's where it is compared with the teacher."""
    own: float = 1.0
    """kappa_3, the fake score's where it is compared with the sample."""
    real: float = 1.0
    """kappa_4, the teacher's."""
    drop: float = 0.1

    def scales(self, batch: Batch) -> Scales:
        """The four fields."""
        return Scales(self.fake_loss, self.fake, self.own, self.real)


@dataclass(frozen=True)
class LSG(Guidance):
    """Long and short guidance: the same scale everywhere.

    Published for Stable Diffusion: 1.5 for FID, 3 to 4.5 for alignment. Measured here on digits
    (docs/claims.md): the distance to real data is least from 1.05 to 1.1, and nearly twice that at
    1.5; precision is the highest from 1.35 to 2.
    """

    kappa: float = 1.5
    """Guidance scale, kappa_1 to kappa_4 alike; 1: none."""
    drop: float = 0.1

    def scales(self, batch: Batch) -> Scales:
        """kappa four times."""
        return Scales(self.kappa, self.kappa, self.kappa, self.kappa)


@dataclass(frozen=True)
class RandomLSG(Guidance):
    """LSG with a scale for each sample, uniform on [low, high]."""

    low: float = 1.0
    """Smallest guidance scale."""
    high: float = 4.5
    """Largest guidance scale."""
    drop: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.low < self.high:
            raise ValueError(f"RandomLSG needs low < high, got {self}")

    def scales(self, batch: Batch) -> Scales:
        """One scale (B,) drawn for each sample, four times; ValueError without draws."""
        kappa = self.low + (self.high - self.low) * need_draws(batch).uniform("kappa")
        return Scales(kappa, kappa, kappa, kappa)


@dataclass(frozen=True)
class ZeroCFG(Guidance):
    """The plain teacher against a fake score without condition: the cheapest choice."""

    def scales(self, batch: Batch) -> Scales:
        """0, 0, 0, 1."""
        return Scales(0.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True)
class AntiCFG(Guidance):
    """The plain teacher against a negatively guided fake score."""

    kappa: float = -1.0
    """The fake score's guidance scale, kappa_1 to kappa_3; below 0 leads away from conditions."""
    drop: float = 0.1

    def scales(self, batch: Batch) -> Scales:
        """kappa, kappa, kappa, 1."""
        return Scales(self.kappa, self.kappa, self.kappa, 1.0)
