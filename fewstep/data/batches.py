"""Sources: images in memory, or noise and labels alone.

Sample number n of a run is a pure function of n and the seed. Pictures are visited epoch by
epoch in an order that is drawn anew for each epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch


@dataclass(frozen=True, eq=False)
class Images:
    """Batches of pictures in memory, epoch by epoch in a new random order each.

    The pictures stay where they are; a batch goes to the device of its draws.

    Arguments:
        x0: (N, *) pictures.
        labels: (N,) int64, or None.
        drop: share of labels replaced by the null label `classes`, so that the model also learns
            without a label (for classifier-free guidance).
        classes: number of classes.
    Called with draws it returns a `Batch` of x0: (B, *), noise z: (B, *) and labels (B,).
    """

    x0: Tensor
    labels: Tensor | None = None
    drop: float = 0.0
    classes: int = 0

    def __call__(self, draws: Draws) -> Batch:
        rows = epoch_order(draws, len(self.x0)).to(self.x0.device)
        x0 = self.x0[rows].to(draws.index.device)
        cond = None if self.labels is None else self.labels[rows].to(x0.device)
        if cond is not None and self.drop:
            dropped = draws.uniform("drop") < self.drop
            cond = torch.where(dropped, torch.full_like(cond, self.classes), cond)
        return Batch(draws.normal("z", x0.shape[1:]).to(x0), cond, x0, draws)


@dataclass(frozen=True, eq=False)
class Restored:
    """Batches of pictures to restore: a degraded copy of each is the condition "start".

    Arguments:
        x0: (N, *) pictures.
        start: (N, *) their degraded copies.
        shown: (M, *) degraded pictures that samples are made of by default, in turn.
        data_free: give no x0.
    Called with draws it returns a `Batch` of noise z: (B, *), {"start": (B, *)} and x0: (B, *).
    """

    x0: Tensor
    start: Tensor
    shown: Tensor
    data_free: bool = False

    def __call__(self, draws: Draws) -> Batch:
        batch = Images(self.x0)(draws)
        rows = epoch_order(draws, len(self.x0)).to(self.start.device)
        cond = {"start": self.start[rows].to(batch.z.device)}
        return batch._replace(cond=cond, x0=None if self.data_free else batch.x0)

    def condition(self, index: Tensor) -> dict[str, Tensor]:
        """The conditions that samples `index` (N,) have by default."""
        rows = (index % len(self.shown)).to(self.shown.device)
        return {"start": self.shown[rows].to(index.device)}


@dataclass(frozen=True)
class Latents:
    """Data-free batches: standard normal noise, and uniform labels where there are classes.

    Arguments:
        shape: of a sample, without the batch.
        classes: labels are uniform on 0 .. classes - 1; 0: no labels.
    Called with draws it returns a `Batch` of z: (B, *shape) and labels (B,), without x0.
    """

    shape: tuple[int, ...]
    classes: int = 0

    def __call__(self, draws: Draws) -> Batch:
        cond = draws.integers("label", self.classes) if self.classes else None
        return Batch(draws.normal("z", self.shape), cond, None, draws)


def epoch_order(draws: Draws, size: int) -> Tensor:
    """(B,) rows of a set of `size`: each epoch is a permutation keyed by seed and epoch."""
    if size < 1:
        raise ValueError("the data set is empty")
    epochs, places = draws.index // size, draws.index % size
    rows = torch.empty_like(places)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        rows[here] = _permutation(draws.seed, epoch, size).to(rows.device)[places[here]]
    return rows


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    keys = Draws(torch.arange(size), seed, f"epoch{epoch}/").bits("order", 2)
    return torch.argsort(keys[:, 0] * 2**20 + (keys[:, 1] >> 12), stable=True)
