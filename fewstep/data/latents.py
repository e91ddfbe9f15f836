"""Latents of Stable Diffusion's autoencoder on disk, as EDM2 stores them: means and deviations.

    00000/img-mean-std-00000000.npy   00000/img-mean-std-00000001.npy   ...   dataset.json

A member has the moments of the posterior of one picture: (8, H, W), four channels of means mu and
four of deviations s. At each visit a latent is drawn from it anew, and brought to about zero mean
and deviation 0.5, channel by channel:

    x0 = (mu + s n - m) 0.5 / d,   n ~ N(0, I)

with m and d the mean and the deviation of ImageNet's latents (Karras et al. 2024,
https://arxiv.org/abs/2312.02696, and its published code).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.data import labels, npz
from fewstep.data.batches import epoch_order
from fewstep.data.errors import Problems, Unfit
from fewstep.data.picture_set import Shape, every
from fewstep.data.zip_archive import ZipArchive
from fewstep.diffusion.rng import Draws
from fewstep.diffusion.types import Batch

MEAN = (5.81, 3.25, 0.12, -2.15)
DEVIATION = (4.17, 4.62, 3.71, 3.28)
"""m and d, of latents of pictures in [0, 1]."""
FINAL = 0.5


def _affine(like: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, bias) of the channels, to be applied as x scale + bias."""
    scale = FINAL / torch.tensor(DEVIATION)[:, None, None]
    bias = -torch.tensor(MEAN)[:, None, None] * scale
    return scale.to(like), bias.to(like)


def standardised(latents: Tensor) -> Tensor:
    """The autoencoder's latents (B, 4, H, W) -> x0, what EDM2's networks denoise."""
    scale, bias = _affine(latents)
    return latents * scale + bias


def restored(x0: Tensor) -> Tensor:
    """The inverse of `standardised`."""
    scale, bias = _affine(x0)
    return (x0 - bias) / scale


@dataclass(frozen=True, eq=False)
class LatentSet:
    """The moments in one zip file; each is read when it is wanted."""

    archive: ZipArchive
    names: Sequence[str]
    shape: Shape
    """(4, H, W) of a latent."""
    labels: Tensor | None
    """(N,) int64, or None for latents without labels."""

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Tensor) -> Tensor:
        """(B, 8, H, W) float32 moments number `rows` (B,); a ValueError names the damaged."""
        moments = (2 * self.shape[0], *self.shape[1:])
        out, problems = np.empty((len(rows), *moments), np.float32), Problems(self.archive.path)

        def job(place: int, row: int) -> None:
            try:
                values = npz.array(self.archive, _stem(self.names[row]))
            except ValueError:
                raise Unfit("damaged") from None
            if values.shape != moments or values.dtype.kind != "f":
                raise Unfit("not of the form of the first", f"{values.dtype} {values.shape}")
            if not np.isfinite(values).all():
                raise Unfit("with numbers that are not finite")
            out[place] = values

        for _ in every(self, rows, job, problems):
            pass
        problems.refuse()
        return torch.from_numpy(out)


def latents_of(path: str | Path) -> LatentSet:
    """The moments in a zip file, sorted by name; ValueError says what is wrong with it.

    That all members have the size of the first is seen in the index. What is in them is read,
    and checked against CRC-32, when it is wanted: published sets have 170 GB.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no zip file {path} of latents")
    archive = ZipArchive(path, limits={labels.FILE: labels.LIMIT})
    names = sorted(name for name in archive.members if name.endswith(".npy"))
    if not names:
        raise ValueError(f"{path} holds no latents (.npy)")
    shape, _, dtype, _ = npz.header(archive, _stem(names[0]))
    if len(shape) != 3 or shape[0] != 2 * len(MEAN) or dtype.kind != "f":
        raise ValueError(
            f"{path}: {names[0]} should be means and deviations, numbers of shape (8, H, W), got "
            f"{dtype} {shape}"
        )
    problems, size = Problems(path), archive.members[names[0]].file_size
    for name in names:
        if archive.members[name].file_size != size:
            problems.add(f"of another size than {names[0]}", name)
    problems.refuse()
    assigned = None
    if labels.FILE in archive.members:
        pairs, _ = labels.parse_labels(
            labels.member(archive, labels.FILE, len(names)), path, len(names)
        )
        assigned = None if pairs is None else labels.assign_labels(pairs, names, path)
    return LatentSet(archive, names, (len(MEAN), *shape[1:]), assigned)


def _stem(name: str) -> str:
    return name.removesuffix(".npy")


@dataclass(frozen=True, eq=False)
class LatentBatches:
    """Batches of latents, drawn from their moments and visited epoch by epoch."""

    latents: LatentSet
    labels: Tensor | None = None
    from_disk: ClassVar[bool] = True

    def __call__(self, draws: Draws) -> Batch:
        device = draws.index.device
        rows = epoch_order(draws, len(self.latents)).cpu()
        mean, deviation = self.latents.take(rows).to(device).chunk(2, 1)
        x0 = standardised(mean + deviation * draws.normal("latent", mean.shape[1:]))
        cond = None if self.labels is None else self.labels[rows].to(device)
        return Batch(draws.normal("z", x0.shape[1:]), cond, x0, draws)
