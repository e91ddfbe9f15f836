"""Feature networks: they turn pictures into the vectors that distances are computed on.

Anything with a name, a dimension and a call can measure (`Features`). Those of the literature are
recognised by the digest of their weights (`KNOWN`), and scores get their names in `metric_title`
and nowhere else, so that nothing is called an FID that is not one.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fewstep.eval import inception_torchscript

SAMPLES = 50_000
"""Generated pictures in a number that may be compared with published ones."""

LEAST = 10_000
"""Real pictures in a reference that published distances are taken to, at least."""
PUBLISHED = frozenset({"IS", "IS std", "IS of all", "KID"})
"""Scores beside the Frechet distance that are published in Inception's features."""
ELSEWHERE = frozenset({"precision", "recall", "density", "coverage"})
"""Scores that are published in features of other networks."""


class Features(Protocol):
    """A feature network; anything with these three will do."""

    @property
    def name(self) -> str:
        """Short, in small letters, digits and dashes: it is part of every number's name."""

    @property
    def dim(self) -> int:
        """Length of a feature vector."""

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        """uint8 (B, H, W, 1 or 3) -> features (B, dim), and logits (B, classes) or None."""


class KnownWeights(NamedTuple):
    """A published file of weights."""

    title: str
    """The name of the Frechet distance in its features."""
    file: str


KNOWN = {
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2": KnownWeights(
        "FID", "pt_inception-2015-12-05-6726825d.pth"
    ),
    inception_torchscript.SHA256: KnownWeights("FID", "inception-2015-12-05.pt"),
}
"""By SHA-256. That of DINOv2's weights is not known here, so it is not among them."""


class PublishedFeatures:
    """Base of the networks of the literature: recognised, or named after their digest."""

    family: str
    """The name in EDM2's reference statistics: "fid" or "fd_dinov2"."""
    label: str
    dim: int

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    @property
    def name(self) -> str:
        """ "inception"; "inception-1f3a5c7e" where the file is not a known one."""
        return self.label if self.sha256 in KNOWN else f"{self.label}-{self.sha256[:8]}"


def metric_title(score: str, features: Features, samples: int, real: int | None = None) -> str:
    """The name of a score ("FD", "IS", "KID", ...) on `samples` pictures.

    Only 50,000 pictures in features of a known published file carry published names ("FID", "IS",
    "KID"), and those against a reference of `real` pictures (None: unknown) only where it has
    `LEAST`. Others name features and samples: "FD(inception, 5000)". So do precision, recall,
    density and coverage always: the published ones are in features of other networks.
    """
    known = KNOWN.get(features.sha256) if isinstance(features, PublishedFeatures) else None
    few = f" against {real}" if known is not None and real is not None and real < LEAST else ""
    if known is not None and samples == SAMPLES and not few:
        if score == "FD":
            return known.title
        if known.title == "FID" and score in PUBLISHED:
            return score
    return f"{score}({features.name}, {samples}{few})"


def retitled(name: str, features: str, samples: object) -> str:
    """A stored score's name, as `metric_title` would give it today.

    A bare published name that was not earned gets the features and the number of samples.
    """
    known = {known.title for known in KNOWN.values()}
    names = PUBLISHED | known
    if name not in names | ELSEWHERE or (samples == SAMPLES and name in names):
        return name
    return f"{'FD' if name in known else name}({features}, {samples})"


def family(features: Features) -> str:
    """The features' name in files of reference statistics."""
    return features.family if isinstance(features, PublishedFeatures) else features.name


def channels_first(pictures: Tensor, device: torch.device | str) -> Tensor:
    """uint8 (B, H, W, 1 or 3) -> float (B, 3, H, W), values 0 to 255; grey becomes three times."""
    if pictures.dtype != torch.uint8 or pictures.ndim != 4 or pictures.shape[3] not in (1, 3):
        raise ValueError(
            "pictures to measure are uint8 (B, H, W, 1 or 3), got "
            f"{str(pictures.dtype).removeprefix('torch.')} {tuple(pictures.shape)}"
        )
    x = pictures.to(device).permute(0, 3, 1, 2).float()
    return x.expand(-1, 3, -1, -1)
