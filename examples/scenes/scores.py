"""How pictures of captions are scored, so that the figures hear what eyes see.

fd          Frechet distance of the judge's summaries to those of real pictures; `excess` is
            fd less what as many other real pictures have
texture     the same in random convolutions, averaged over the picture: deaf to place and colour
sharpness   mean absolute Laplacian over that of real pictures: below 1 blurred
speckle     median absolute Laplacian, in grey levels: most of a picture is plain background
all_seen    share of pictures with the right objects and no other, in the right place and size,
            on the right colour, of captions whose pairs were learnt; all_unseen: of others
variety     mean distance between summaries of two pictures of a caption, over that of real ones
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.scenes.captions import Caption
from examples.scenes.draw import Objects, draw
from examples.scenes.judge import Judge, right
from fewstep.diffusion.rng import Draws
from fewstep.eval.metrics import frechet

REFERENCE, FLOOR = 3, 4
"""Seeds of the real pictures that are measured against, and of those that give the floor."""


def laplacian(x: Tensor) -> Tensor:
    """Absolute Laplacian of pictures (N, C, H, W) by four neighbours, off the border."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]]).to(x)
    edges = F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).abs()
    return edges.reshape(len(x), -1)


def speckle(x: Tensor) -> float:
    """Median absolute Laplacian of a picture in [-1, 1], in levels of 255, averaged."""
    return float(laplacian(x).median(1).values.mean() * 127.5)


class Texture(nn.Module):
    """Random convolutions, always the same: pictures (B, 3, H, W) -> (B, 64) means."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        first = torch.randn(32, 3, 3, 3, generator=generator)
        self.first = first - first.mean((2, 3), keepdim=True)  # deaf to plain colours
        self.second = torch.randn(64, 32, 3, 3, generator=generator) / (32 * 9) ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(F.conv2d(x, self.first))
        return 4 * F.relu(F.conv2d(h, self.second, stride=2)).mean((2, 3))


@dataclass(frozen=True)
class Exam:
    """What is asked for: captions, each `repeats` times in a row, the seen ones first."""

    judge: Judge
    objects: Objects
    seen: Sequence[Caption]
    unseen: Sequence[Caption]
    repeats: int = 2
    reference: int = 8000

    @cached_property
    def captions(self) -> list[Caption]:
        """One for each picture."""
        return [c for c in (*self.seen, *self.unseen) for _ in range(self.repeats)]

    def real(self, seed: int, count: int = 0) -> Tensor:
        """Real pictures of these captions: one each, or `count` in turn."""
        count = count or len(self.captions)
        asked = [self.captions[i % len(self.captions)] for i in range(count)]
        return draw(self.objects, asked, Draws.range(0, count, seed))[0]

    @cached_property
    def truth(self) -> tuple[Tensor, Tensor, float]:
        """Summaries, textures and mean Laplacian of the reference."""
        x = self.real(REFERENCE, self.reference)
        return self.see(x)[0], Texture()(x), float(laplacian(x).mean())

    @cached_property
    def floor(self) -> dict[str, float]:
        """Scores of real pictures that are not the reference."""
        return self.raw(self.real(FLOOR))

    @torch.no_grad()
    def see(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Summaries (N, 64), and what is right; x: (N, 3, 32, 32) of the captions in turn."""
        summaries, found = [], []
        for rows in torch.arange(len(x)).split(250):
            answers = self.judge(x[rows])
            asked = [self.captions[i % len(self.captions)] for i in rows.tolist()]
            summaries.append(answers.summary)
            found.append(right(answers, asked))
        return torch.cat(summaries), {k: torch.cat([f[k] for f in found]) for k in found[0]}

    def raw(self, x: Tensor) -> dict[str, float]:
        """All scores but those that need the floor."""
        truth, texture, edges = self.truth
        summaries, correct = self.see(x)
        first = len(self.seen) * self.repeats
        row = {
            "fd": frechet(summaries, truth),
            "texture": frechet(Texture()(x), texture),
            "sharpness": float(laplacian(x).mean()) / edges,
            "speckle": speckle(x),
            "variety": spread(summaries, self.repeats),
        }
        for name, part in (("seen", slice(first)), ("unseen", slice(first, None))):
            row |= {f"{k}_{name}": float(v[part].double().mean()) for k, v in correct.items()}
        return row

    def scores(self, x: Tensor) -> dict[str, float]:
        """The scores of pictures (N, 3, 32, 32) in [-1, 1] of the captions, see the module."""
        row = self.raw(x)
        row["variety"] /= self.floor["variety"]
        row["excess"] = row["fd"] - self.floor["fd"]
        return row


def spread(features: Tensor, repeats: int) -> float:
    """Mean distance between two of the `repeats` features in a row, repeats > 1."""
    groups = features.unflatten(0, (-1, repeats))
    gaps = torch.cdist(groups, groups).sum((1, 2)) / (repeats * (repeats - 1))
    return float(gaps.mean())
