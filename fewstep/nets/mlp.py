"""A residual MLP with adaptive layer norm: for vectors and very small pictures."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fewstep.diffusion.extra_inputs import TimeEmbedding, geometric_frequencies
from fewstep.diffusion.model import Net


class Block(nn.Module):
    """h + W2 silu(W1 silu(norm(h) (1 + scale) + shift)), both from the embedding."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        """h, emb: (B, width) -> (B, width)."""
        scale, shift = self.modulate(emb).chunk(2, 1)
        y = F.layer_norm(h, h.shape[1:]) * (1 + scale) + shift
        out: Tensor = h + self.outer(F.silu(self.inner(F.silu(y))))
        return out


class MLPNet(nn.Module):
    """F(x, label, cond): (B, *shape), (B,), (B,) int64 or None -> (B, *shape).

    Its encoder features are the state half way through, (B, width).
    """

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, blocks: int) -> None:
        super().__init__()
        dim = math.prod(shape)
        self.classes, self.width = classes, width
        self.frequencies: Tensor
        self.register_buffer("frequencies", geometric_frequencies(-4, 3, width // 4))
        self.time = nn.Sequential(nn.Linear(2 * (width // 4), width), nn.SiLU())
        self.label = nn.Embedding(classes + 1, width) if classes else None
        self.mix = nn.Linear(width, width)
        self.first = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.middle = (blocks + 1) // 2
        self.feature_shape = (width,)
        self.last = nn.Linear(width, dim)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def time_embedding(self) -> TimeEmbedding:
        """The last layer of time and label, before its activation."""
        return TimeEmbedding(self.mix, self.width)

    @property
    def output_layer(self) -> nn.Module:
        """The last layer, whose result is F but for its shape."""
        return self.last

    def _embedded(self, x: Tensor, label: Tensor, cond: Tensor | None) -> Tensor:
        phase = label[:, None] * self.frequencies
        emb = self.time(torch.cat([phase.cos(), phase.sin()], 1))
        if self.label is not None:
            index = (
                torch.full((x.shape[0],), self.classes, device=x.device) if cond is None else cond
            )
            emb = emb + self.label(index)
        return F.silu(self.mix(emb))

    def forward(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        """F: (B, *shape)."""
        return self.forward_with_features(x, label, cond)[0]

    def encode(self, x: Tensor, label: Tensor, cond: Tensor | None = None) -> Tensor:
        """The state half way through: (B, width)."""
        return self._encoded(x, self._embedded(x, label, cond))

    def forward_with_features(
        self, x: Tensor, label: Tensor, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(F, the state half way through)."""
        emb = self._embedded(x, label, cond)
        h = features = self._encoded(x, emb)
        for block in self.blocks[self.middle :]:
            h = block(h, emb)
        return self.last(F.layer_norm(h, h.shape[1:])).reshape(-1, *x.shape[1:]), features

    def _encoded(self, x: Tensor, emb: Tensor) -> Tensor:
        if math.prod(x.shape[1:]) != self.first.in_features:
            raise ValueError(
                f"this MLP is for samples of {self.first.in_features} numbers, not of "
                f"{tuple(x.shape[1:])}; for pictures of several sizes take PatchUNet"
            )
        h = self.first(x.flatten(1))
        for block in self.blocks[: self.middle]:
            h = block(h, emb)
        out: Tensor = h
        return out


@dataclass(frozen=True)
class MLP(Net):
    """A residual MLP: `width` of its layers and number of residual `blocks`."""

    width: int = 256
    """Width of its layers, 4 or more."""
    blocks: int = 4
    """Number of residual blocks."""

    def __post_init__(self) -> None:
        if self.width < 4 or self.blocks < 0:
            raise ValueError(f"MLP needs width >= 4 and blocks >= 0, got {self}")

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """`MLPNet` for samples of any shape; cond = `classes`, like None, means no label."""
        return MLPNet(shape, classes, self.width, self.blocks)
