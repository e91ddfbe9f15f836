"""What losses look at pictures with: frozen networks, of digits and of DINOv2, and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fewstep.diffusion.types import Cond
from fewstep.distillation.pictures import PictureFeatures, Reward
from fewstep.eval.digit_features import LAYOUTS, Classifier, shipped
from fewstep.eval.dinov2 import Dinov2, load_dinov2
from fewstep.storage.files import digest


@dataclass(frozen=True)
class DigitFeatures(PictureFeatures):
    """The classifier of handwritten digits that comes with fewstep: (B, 1, S, S) in [-1, 1].

    The outputs of its convolutions, and the vector before its decision. It carries `fd_digits` or
    `fd_mnist` too, so that a student trained through it is measured by what it was trained on.
    """

    name: Literal["digits", "mnist"] = "digits"
    """Which digits it reads: those of "digits" are 8x8 pixels, those of "mnist" 16x16."""

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(F, h, w) of each convolution, and (F,)."""
        layout = LAYOUTS[self.name]
        side, out = layout.side, []
        for channels, stride in layout.convs:
            side //= stride
            out.append((channels, side, side))
        return [*out, (layout.features,)]

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        """Features (B, F, h, w) of each convolution, and (B, F) at the end."""
        return _reader(self, pictures).layers(pictures)


@dataclass(frozen=True)
class LabelReward(Reward):
    """The log-probability of the label that a digit was made for, by the classifier.

    That of `DigitFeatures`, whose decisions carry the label accuracy: a student that is rewarded
    by it is measured by what it was trained on.
    """

    name: Literal["digits", "mnist"] = "digits"
    """Which digits it reads: those of "digits" are 8x8 pixels, those of "mnist" 16x16."""

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        """ln p(label | picture): (B,). ValueError without labels."""
        net = _reader(self, pictures)
        if not isinstance(cond, Tensor):
            raise ValueError("LabelReward needs labels: take a teacher that was given them")
        logits = net.classify(net(pictures))
        return logits.log_softmax(1).gather(1, cond[:, None])[:, 0]


@dataclass(frozen=True)
class Ink(Reward):
    """How near the thickness of a digit's strokes is to one that is wanted.

    With ink = the mean over pixels of (picture + 1) / 2, the reward is
    -(ink - target)^2 / (2 width^2), the logarithm of a Gaussian. The digits of 8x8 pixels have
    an ink of 0.305, with a standard deviation of 0.034.
    """

    target: float = 0.4
    """The ink that is wanted, from 0 to 1; larger is thicker."""
    width: float = 0.05
    """Standard deviation of the Gaussian around it, above 0; smaller is stricter."""

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"Ink.width is positive, got {self.width:g}")

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        """(B,), of pictures of any size; `cond` is not used."""
        return -((ink_of(pictures) - self.target) ** 2) / (2 * self.width**2)


@dataclass(frozen=True)
class Thickness(Reward):
    """How thick a digit's strokes are, a control of `NCT`: ink in standard deviations.

    (ink - mean) / width with ink as of `Ink`, and as defaults its mean and standard deviation
    over the digits of 8x8 pixels.
    """

    mean: float = 0.305
    """The ink whose thickness is 0."""
    width: float = 0.034
    """How much more ink a thickness of 1 has, above 0."""

    def __post_init__(self) -> None:
        if not self.width > 0:
            raise ValueError(f"Thickness.width is positive, got {self.width:g}")

    def __call__(self, pictures: Tensor, cond: Cond) -> Tensor:
        """(B,), of pictures of any size; `cond` is not used."""
        return (ink_of(pictures) - self.mean) / self.width


def ink_of(pictures: Tensor) -> Tensor:
    """The mean over pixels of (picture + 1) / 2: (B, C, H, W) -> (B,)."""
    return (pictures.flatten(1).mean(1) + 1) / 2


def _reader(part: DigitFeatures | LabelReward, pictures: Tensor) -> Classifier:
    """The classifier that `part` names; ValueError for pictures that it does not read."""
    net = _digits(part.name, pictures.device, pictures.dtype)
    side = net.layout.side
    if pictures.shape[1:] != (1, side, side):
        raise ValueError(
            f"{type(part).__name__}({part.name!r}) reads pictures (1, {side}, {side}), got "
            f"{tuple(pictures.shape[1:])}"
        )
    return net


@lru_cache(maxsize=4)
def _digits(name: str, device: torch.device, dtype: torch.dtype) -> Classifier:
    net = Classifier(shipped(name).layout)
    net.load_state_dict(shipped(name).state_dict())
    return net.requires_grad_(False).eval().to(device, dtype)


@dataclass(frozen=True)
class VisionFeatures(PictureFeatures):
    """A DINOv2 of transformers in a local folder, as adversarial diffusion distillation takes it.

    Pictures are resized to 224 x 224. Sauer et al. 2023, https://arxiv.org/abs/2311.17042.
    """

    path: str
    """Folder with config.json and model.safetensors."""
    layers: tuple[int, ...] = (2, 5, 8, 11)
    """Blocks whose outputs are read, from 0."""
    sha256: str = ""
    """SHA-256 of the weights; filled in when a run begins."""

    def settled(self) -> PictureFeatures:
        """With the digest of the weights."""
        found = digest(Path(self.path) / "model.safetensors")
        if self.sha256 not in ("", found):
            raise ValueError(f"{self.path} holds another network than this run was started with")
        return replace(self, sha256=found)

    @property
    def shapes(self) -> Sequence[tuple[int, ...]]:
        """(F,) of each layer's tokens."""
        return [(_vision(self.path, torch.device("cpu")).dim,)] * len(self.layers)

    def __call__(self, pictures: Tensor) -> Sequence[Tensor]:
        """Tokens (B, F, 1 + patches) of each layer."""
        net = _vision(self.path, pictures.device)
        return net.layers((pictures + 1) * 127.5, self.layers)


@lru_cache(maxsize=2)
def _vision(path: str, device: torch.device) -> Dinov2:
    return load_dinov2(Path(path), device)
