"""The embedded example: 8x8 handwritten digits, from training a teacher to a one-step student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from fewstep.core import Source
from fewstep.data import digits as data
from fewstep.data.source import Images, Latents
from fewstep.ema import EMA
from fewstep.eval.classifier import features_and_labels
from fewstep.eval.evaluate import Yardstick
from fewstep.fake_score import FakeScore
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.model import Model
from fewstep.nets.mlp import MLP
from fewstep.optim import Optim
from fewstep.recipes.run import Domain, Run
from fewstep.times import Karras


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
        if model.shape != data.SHAPE or model.classes not in (0, data.CLASSES):
            raise ValueError(
                f"digits are {data.SHAPE} with {data.CLASSES} classes (or 0, to ignore the "
                f"labels), got Model.shape {model.shape} with {model.classes}"
            )
        if data_free:
            return Latents(model.shape, model.classes)
        train, _ = data.load()
        count = math.ceil(self.share * len(train.x0))
        return Images(train.x0[:count], train.labels[:count], self.drop, data.CLASSES)

    def yardstick(self) -> Yardstick:
        train, held_out = data.load()
        return Yardstick("fd_digits", train.x0, *held_out, partial(features_and_labels, "digits"))


MODEL = Model(MLP(width=256, blocks=2), data.SHAPE, data.CLASSES, sigma_data=data.SIGMA_DATA)


def digits_teacher() -> Run:
    """Train a class-conditional EDM teacher on 8x8 digits (about a minute on one core)."""
    return Run(
        method=Pretrain(weight=EDMWeight(data.SIGMA_DATA)),
        model=MODEL,
        domain=Digits(),
        steps=6000,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=50, decay="cosine"),
        ema=EMA(halflife=20_000),
        draw_every=1000,
        save_every=2000,
    )


def digits() -> Run:
    """Distil the digits teacher to one step with SiD (about a minute and a half on one core).

    The student's noise levels end at sigma = 2.5 (tmax 500), where it starts from: on pictures
    this small, higher levels carry nothing that the labels do not, and only add noise.
    """
    return Run(
        method=SiD(
            alpha=1.0,
            times=Karras(tmax=500.0),
            fake=FakeScore(weight=EDMWeight(data.SIGMA_DATA)),
        ),
        model=MODEL,
        domain=Digits(),
        steps=1800,
        batch=256,
        optim=Optim(lr=2e-3, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        draw_every=150,
        save_every=600,
    )
