"""MNIST at 16x16 pixels, from the user's own copy."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

from fewstep.data import mnist as data
from fewstep.data.batches import Images, Latents
from fewstep.data.digits import LabelledImages
from fewstep.diffusion.model import Model
from fewstep.diffusion.types import Source
from fewstep.domains.domain import Domain
from fewstep.eval.digit_features import features_and_labels
from fewstep.eval.domain_scores import SampleMetrics
from fewstep.storage.files import digest, require_unchanged

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
        return replace(self, sha256=require_unchanged(path, self.sha256, digest(path)))

    def source(self, model: Model, data_free: bool) -> Source:
        """The training digits with labels; data-free: noise and uniform labels."""
        if model.shape != data.SHAPE or model.classes not in (0, data.CLASSES):
            raise ValueError(
                f"MNIST pictures are {data.SHAPE} with {data.CLASSES} classes (or 0, to ignore "
                f"the labels), got Model.shape {model.shape} with {model.classes}"
            )
        train, _ = data.load_mnist(
            self.path
        )  # needed for measuring, even where training is data-free
        if data_free:
            return Latents(model.shape, model.classes)
        return Images(train.x0, train.labels, self.drop, data.CLASSES)

    def sample_metrics(self) -> SampleMetrics:
        """Training digits against test digits, as many of each class, as in samples."""
        train, test = (_balanced(part, MEASURED) for part in data.load_mnist(self.path))
        return SampleMetrics("fd_mnist", train.x0, *test, partial(features_and_labels, "mnist"))


def _balanced(part: LabelledImages, count: int) -> LabelledImages:
    """`count` digits of each class, spread evenly over the set (its ends were written apart)."""
    rows = []
    for digit in range(data.CLASSES):
        of_class = (part.labels == digit).nonzero()[:, 0]
        rows.append(of_class[torch.arange(count) * len(of_class) // count])
    chosen = torch.cat(rows).sort().values
    return LabelledImages(part.x0[chosen], part.labels[chosen])
