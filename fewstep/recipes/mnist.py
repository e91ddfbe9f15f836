"""MNIST at 16x16: a convolutional teacher and its distillation, on data of your own."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from fewstep.core import Source
from fewstep.data import mnist as data
from fewstep.data.digits import Labelled
from fewstep.data.source import Images, Latents
from fewstep.ema import EMA
from fewstep.eval.classifier import features_and_labels
from fewstep.eval.evaluate import Yardstick
from fewstep.fake_score import FakeScore
from fewstep.files import digest, unchanged
from fewstep.losses.weight import EDMWeight
from fewstep.methods.pretrain import Pretrain
from fewstep.methods.sid import SiD
from fewstep.model import Model
from fewstep.nets.patch_unet import PatchUNet
from fewstep.optim import Optim
from fewstep.recipes.run import Domain, Run
from fewstep.times import Karras

MEASURED = 500
"""Digits of each class that everything is measured against, and as many test digits beside."""


def _path() -> str:
    return os.environ.get("FEWSTEP_MNIST", "mnist.npz")


@dataclass(frozen=True)
class Mnist(Domain):
    """MNIST in the file `path`: 60,000 digits to train on, measured against the 10,000 others."""

    places: ClassVar[tuple[str, ...]] = ("path",)
    path: str = field(default_factory=_path)
    """The .npz file; by default what the environment variable FEWSTEP_MNIST says, else mnist.npz
    in the working folder."""
    drop: float = 0.0
    """Share of training labels replaced by the null label, for guidance."""
    sha256: str = ""
    """Digest of the file, recorded by the run; another one in its place is refused."""

    def settled(self) -> Domain:
        """With the digest of the file, where it is there; `source` says where it is not."""
        path = Path(self.path)
        if not path.is_file():
            return self
        return replace(self, sha256=unchanged(path, self.sha256, digest(path)))

    def source(self, model: Model, data_free: bool) -> Source:
        if model.shape != data.SHAPE or model.classes not in (0, data.CLASSES):
            raise ValueError(
                f"MNIST pictures are {data.SHAPE} with {data.CLASSES} classes (or 0, to ignore "
                f"the labels), got Model.shape {model.shape} with {model.classes}"
            )
        train, _ = data.load(self.path)  # needed for measuring, even where training is data-free
        if data_free:
            return Latents(model.shape, model.classes)
        return Images(train.x0, train.labels, self.drop, data.CLASSES)

    def yardstick(self) -> Yardstick:
        """Training digits against test digits, as many of each class, as in samples."""
        train, test = (_balanced(part, MEASURED) for part in data.load(self.path))
        return Yardstick("fd_mnist", train.x0, *test, partial(features_and_labels, "mnist"))


def _balanced(part: Labelled, count: int) -> Labelled:
    """`count` digits of each class, spread evenly over the set (its ends were written apart)."""
    rows = []
    for digit in range(data.CLASSES):
        of_class = (part.labels == digit).nonzero()[:, 0]
        rows.append(of_class[torch.arange(count) * len(of_class) // count])
    chosen = torch.cat(rows).sort().values
    return Labelled(part.x0[chosen], part.labels[chosen])


MODEL = Model(PatchUNet(), data.SHAPE, data.CLASSES, sigma_data=data.SIGMA_DATA)


def mnist_teacher() -> Run:
    """Train a class-conditional EDM teacher on 16x16 MNIST (about half an hour on one core)."""
    return Run(
        method=Pretrain(weight=EDMWeight(data.SIGMA_DATA)),
        model=MODEL,
        domain=Mnist(drop=0.1),
        steps=18_000,
        batch=64,
        optim=Optim(lr=2e-3, betas=(0.9, 0.99), warmup=100, decay="cosine"),
        ema=EMA(halflife=50_000),
        draw_every=2000,
        save_every=1000,
    )


def mnist() -> Run:
    """Distil the MNIST teacher to one step with SiD."""
    return Run(
        method=SiD(
            alpha=1.0,
            times=Karras(tmax=500.0),
            fake=FakeScore(weight=EDMWeight(data.SIGMA_DATA)),
        ),
        model=MODEL,
        domain=Mnist(),
        steps=3000,
        optim=Optim(lr=3e-4, betas=(0.0, 0.99), warmup=50, decay="linear"),
        ema=EMA(halflife=10_000),
        draw_every=250,
        save_every=500,
    )
