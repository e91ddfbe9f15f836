"""Handwritten digits of 8x8 pixels, bundled with scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from fewstep.data import digits as data
from fewstep.data.batches import Images, Latents, Restored
from fewstep.diffusion.model import Model
from fewstep.diffusion.scale_wise import enlarged, reduced
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Conditions, Domain
from fewstep.eval.digit_features import features_and_labels
from fewstep.eval.domain_scores import SampleMetrics
from fewstep.nets.mlp import MLP


@dataclass(frozen=True)
class Digits(Domain):
    """scikit-learn's bundled digits: 1,433 to train on, 364 held out."""

    drop: float = 0.0
    """Share of labels a teacher learns without, so that it can be guided."""
    share: float = 1.0
    """Share of the training digits that is used, the first ones."""
    restore: int = 0
    """How many times smaller, and enlarged again, digits are given to restore; 0: they are not."""

    def __post_init__(self) -> None:
        if not (0 <= self.drop < 1 and 0 < self.share <= 1):
            raise ValueError(f"Digits needs 0 <= drop < 1 and 0 < share <= 1, got {self}")
        if self.restore not in (0, 2, 4, 8):
            raise ValueError(f"Digits.restore is 0, 2, 4 or 8, got {self.restore}")

    def source(self, model: Model, data_free: bool) -> Source:
        """The training digits with labels; data-free: noise and uniform labels."""
        if model.shape != data.SHAPE or model.classes not in (0, data.CLASSES):
            raise ValueError(
                f"digits are {data.SHAPE} with {data.CLASSES} classes (or 0, to ignore the "
                f"labels), got Model.shape {model.shape} with {model.classes}"
            )
        if self.restore:
            return self._restored(model, data_free)
        if data_free:
            return Latents(model.shape, model.classes)
        train, _ = data.load_digits()
        count = math.ceil(self.share * len(train.x0))
        return Images(train.x0[:count], train.labels[:count], self.drop, data.CLASSES)

    def _restored(self, model: Model, data_free: bool) -> Restored:
        """The training digits with what is to be restored of them; shown are the held-out ones."""
        if model.classes:
            raise ValueError(
                "digits that are restored come without labels: leave out --domain.restore, or say "
                "--model.classes 0"
            )
        train, held_out = data.load_digits()
        x0 = train.x0[: math.ceil(self.share * len(train.x0))]
        return Restored(x0, self._degraded(x0), self._degraded(held_out.x0), data_free)

    def _degraded(self, x0: Tensor) -> Tensor:
        return enlarged(reduced(x0, self.restore), self.restore)

    def conditions(self) -> Conditions | None:
        """What is to be restored of the held-out digits, in turn; None unless `restore` is set."""
        if not self.restore:
            return None
        return self._restored(Model(MLP(), data.SHAPE), True).condition

    def sample_metrics(self) -> SampleMetrics:
        """Metrics against the training digits, with the held-out ones as anchor."""
        train, held_out = data.load_digits()
        return SampleMetrics(
            "fd_digits", train.x0, *held_out, partial(features_and_labels, "digits")
        )
