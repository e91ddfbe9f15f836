"""Models that take prompts, measured on a set of prompts: the protocol of published COCO numbers.

Picture i of a run is made for prompt i, one a prompt; run r takes the noise of seeds r n + i. So
several runs are several pictures of each prompt, and tell how much they vary:

    CLIP         mean cosine of picture and prompt, higher is better
    FD, KID, precision, recall, density, coverage   of the pictures, cut to their middle square,
                 brought to 256x256 by Lanczos' filter, against real pictures treated alike
                 ('fewstep data pack')
    diversity    mean distance of two pictures of a prompt, between CLIP's unit vectors
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.data.images import fit
from fewstep.eval.clip import Aligned, alignment
from fewstep.eval.features import Features, metric_title
from fewstep.eval.fid50k import Protocol, neighbourhoods
from fewstep.eval.frechet import frechet_distance, moments
from fewstep.eval.metrics import kid
from fewstep.eval.reference import Reference


@dataclass(frozen=True, eq=False)
class Resized:
    """Features of pictures that are brought to `side` first, as published: Lanczos' filter."""

    features: Features
    side: int
    """0: as they are."""

    @property
    def name(self) -> str:
        """Name of the features, with the side."""
        return f"{self.features.name}-at-{self.side}" if self.side else self.features.name

    @property
    def dim(self) -> int:
        """Length of a feature vector."""
        return self.features.dim

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.features(resized(pictures, self.side) if self.side else pictures)


def resized(pictures: Tensor, side: int) -> Tensor:
    """uint8 (B, H, W, 1 or 3) -> uint8 (B, side, side, 1 or 3), the middle squares by Lanczos."""
    grey = pictures.shape[3] == 1
    arrays = pictures.squeeze(3).numpy() if grey else pictures.numpy()
    out = np.stack([np.asarray(fit(Image.fromarray(array), side)) for array in arrays])
    return torch.from_numpy(out[..., None] if grey else out)


@dataclass(frozen=True, eq=False)
class Joined:
    """Several kinds of features side by side, so that pictures are made only once."""

    kinds: Sequence[Features]

    @property
    def name(self) -> str:
        """All names, joined by "+"."""
        return "+".join(kind.name for kind in self.kinds)

    @property
    def dim(self) -> int:
        """Sum of the lengths of all feature vectors."""
        return sum(kind.dim for kind in self.kinds)

    def __call__(self, pictures: Tensor) -> tuple[Tensor, None]:
        return torch.cat([kind(pictures)[0].float().cpu() for kind in self.kinds], 1), None

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """(N, dim) -> the features of each kind."""
        out: tuple[Tensor, ...] = x.split([kind.dim for kind in self.kinds], 1)
        return out


def diversity(runs: Sequence[Tensor]) -> float:
    """Mean Euclidean distance of two pictures made for the same prompt.

    runs: at least two of (N, D) features, row i of each made for prompt i; all pairs of runs count
    alike. Raises ValueError for fewer.
    """
    if len(runs) < 2:
        raise ValueError("diversity needs two pictures of each prompt: --runs 2 or more")
    gaps = [(a.double() - b.double()).norm(dim=1).mean() for a, b in combinations(runs, 2)]
    return float(torch.stack(gaps).mean())


def scores(
    protocol: Protocol,
    run: int,
    clip: Aligned,
    texts: Tensor,
    features: Features | None,
    reference: Reference | None,
) -> dict[str, Any]:
    """All scores of a run on prompts.

    Arguments:
        protocol: its features are `Joined`: CLIP's, then `features`.
        run: number of the run, from 0.
        clip: names the score.
        texts: (N, dim) CLIP's unit vectors of the prompts.
        features, reference: of real pictures; without them only CLIP is scored.
    """
    assert isinstance(protocol.features, Joined)
    n = protocol.samples
    parts = protocol.features.split(protocol.found(run))
    out: dict[str, Any] = {"seeds": [run * n, (run + 1) * n - 1]}
    out[metric_title("CLIP", clip, n)] = alignment(parts[0], texts)
    if features is None or reference is None:
        return out
    count = reference.count
    out[metric_title("FD", features, n, count)] = frechet_distance(
        moments(parts[1]), reference.moments
    )
    if reference.kept is not None:
        kept = len(reference.kept)
        out[metric_title("KID", features, n, kept)] = kid(reference.kept, parts[1])
        for name, value in neighbourhoods(reference.kept, parts[1]).items():
            out[metric_title(name, features, n)] = value
    return out
