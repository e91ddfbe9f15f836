"""Handwritten digits of 8x8 pixels, bundled with scikit-learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from fewstep.data import digits as data
from fewstep.data.batches import Images, Latents
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.eval.digit_features import features_and_labels
from fewstep.eval.domain_scores import SampleMetrics


@dataclass(frozen=True)
class Digits(Domain):
    """scikit-learn's bundled digits: 1,433 to train on, 364 held out."""

    drop: float = 0.0
    """Share of labels a teacher learns without, so that it can be guided."""
    share: float = 1.0
    """Share of the training digits that is used, the first ones."""

    def __post_init__(self) -> None:
        if not (0 <= self.drop < 1 and 0 < self.share <= 1):
            raise ValueError(f"Digits needs 0 <= drop < 1 and 0 < share <= 1, got {self}")

    def source(self, model: Model, data_free: bool) -> Source:
        """The training digits with labels; data-free: noise and uniform labels."""
        if model.shape != data.SHAPE or model.classes not in (0, data.CLASSES):
            raise ValueError(
                f"digits are {data.SHAPE} with {data.CLASSES} classes (or 0, to ignore the "
                f"labels), got Model.shape {model.shape} with {model.classes}"
            )
        if data_free:
            return Latents(model.shape, model.classes)
        train, _ = data.load_digits()
        count = math.ceil(self.share * len(train.x0))
        return Images(train.x0[:count], train.labels[:count], self.drop, data.CLASSES)

    def sample_metrics(self) -> SampleMetrics:
        """Metrics against the training digits, with the held-out ones as anchor."""
        train, held_out = data.load_digits()
        return SampleMetrics(
            "fd_digits", train.x0, *held_out, partial(features_and_labels, "digits")
        )
