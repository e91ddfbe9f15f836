"""Pictures and texts in one space: contrastive training (CLIP, https://arxiv.org/abs/2103.00020).

It is done twice, from different seeds, with different networks: once for the text encoder of the
pipeline, and once for the judge of its pictures, which the pipeline never meets. What is to be
learnt about blur differs: the text encoder should not care, and the judge must hear it, since blur
is the commonest fault of few-step generators. So the judge learns that a blurred picture is a
wrong picture of its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.emoji.data import Emoji, moved

BATCH = 128
NAMED = 0.75
"""How often a picture is called by its name, and not by a word that others share."""


class ClipText(nn.Module):
    """Token numbers (B, L) to (B, width), by a CLIPTextModel."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.encoder(ids).pooler_output
        return pooled


class BagText(nn.Module):
    """Token numbers (B, L) to (B, width): the mean of their vectors, then two layers."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(vocabulary, 2 * width)
        self.head = nn.Sequential(
            nn.Linear(2 * width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.head(self.words(ids))
        return found


class Pair(nn.Module):
    """An image encoder of four strided convolutions beside a text encoder, both of unit length."""

    def __init__(self, text: nn.Module, width: int, channels: int) -> None:
        super().__init__()
        sizes = [3, channels, 2 * channels, 4 * channels, 4 * channels]
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Conv2d(a, b, 3, 2, 1), nn.GroupNorm(4, b), nn.GELU()]
        self.image = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels, width))
        self.text = text
        self.scale = nn.Parameter(torch.tensor(2.5))

    def see(self, x: Tensor) -> Tensor:
        """Pictures (B, 3, 32, 32) in [-1, 1] -> (B, width) of length one."""
        return F.normalize(self.image(x), dim=1)

    def read(self, ids: Tensor) -> Tensor:
        """Token numbers (B, L) -> (B, width) of length one."""
        return F.normalize(self.text(ids), dim=1)

    def loss(self, x: Tensor, ids: Tensor, wrong: Tensor | None = None) -> Tensor:
        """Cross-entropy over the batch, both ways; texts that are equal are all right.

        wrong: (W, 3, 32, 32), pictures that no text may choose.
        """
        texts = self.read(ids)
        logits = self.scale.exp() * self.see(x) @ texts.T
        same = (ids[:, None] == ids[None]).all(2).float()
        target = same / same.sum(1, keepdim=True)
        choices = logits
        if wrong is not None:
            choices = torch.cat([logits, self.scale.exp() * self.see(wrong) @ texts.T])
        never = target.new_zeros(len(target), len(choices) - len(logits))
        chosen = F.cross_entropy(choices.T, torch.cat([target, never], 1))
        return (F.cross_entropy(logits, target) + chosen) / 2


def called(emoji: Emoji, rows: Sequence[int], draws: torch.Generator) -> list[str]:
    """What each of these pictures is called this time."""
    texts = []
    for row, u, v in zip(rows, *torch.rand(2, len(rows), generator=draws).tolist(), strict=True):
        words = emoji.words[row]
        texts.append(words[int(v * len(words))] if words and u > NAMED else emoji.names[row])
    return texts


def blurred(x: Tensor, amount: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) mixed with their means over 3x3; `amount` (B, 1, 1, 1) is 0 to 1."""
    smooth = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return torch.lerp(x, smooth, amount)


def spoilt(x: Tensor, draws: torch.Generator) -> Tensor:
    """Pictures (B, 3, H, W) with other contrast and brightness, and noise."""
    gain, lift = torch.rand(2, len(x), 1, 1, 1, generator=draws)
    x = x * (0.8 + 0.4 * gain) + 0.3 * (lift - 0.5)
    return x + 0.1 * torch.randn(x.shape, generator=draws)


def shown(x: Tensor, hears_blur: bool, draws: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Moved and spoilt pictures, and wrong ones, as `Pair.loss` takes them.

    Without `hears_blur` the pictures are a little blurred or not, and none is wrong. With it they
    are sharp, and their copies, blurred by a quarter to all, are the wrong ones.
    """
    x = moved(x, draws)
    amount = torch.rand(len(x), 1, 1, 1, generator=draws)
    if not hears_blur:
        return spoilt(blurred(x, amount), draws), None
    return spoilt(x, draws), spoilt(blurred(x, 0.25 + 0.75 * amount), draws)


def fit(
    pair: Pair,
    emoji: Emoji,
    ids: dict[str, Tensor],
    steps: int,
    seed: int,
    hears_blur: bool = False,
) -> Iterator[tuple[int, float]]:
    """Train `pair` in place; (step, loss) after each hundredth step and at the end.

    ids: text -> its token numbers (L,). hears_blur: see `shown`.
    """
    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(pair.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    pair.train()
    for step in range(1, steps + 1):
        rows = torch.randperm(len(emoji.names), generator=draws)[:BATCH].tolist()
        texts = torch.stack([ids[text] for text in called(emoji, rows, draws)])
        x, wrong = shown(emoji.pictures[rows], hears_blur, draws)
        loss = pair.loss(x, texts, wrong)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            yield step, float(loss.detach())
    pair.eval()
