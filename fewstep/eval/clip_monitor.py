"""How well samples fit their prompts during training, which early stopping can follow.

Guided students become more aligned for a while, then less (Zhou et al. 2024, SiD-LSG,
https://arxiv.org/abs/2406.01561), and no loss tells when.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fewstep.diffusion.pixels import to_uint8
from fewstep.eval.clip import Aligned, alignment, text_vectors

PART = 32
"""Pictures in a batch of the network."""


@dataclass(frozen=True, eq=False)
class PromptMetrics:
    """CLIP similarity of samples and prompts; the network is loaded at first use, on the CPU."""

    network: str
    """See `load_aligned`."""
    prompts: Sequence[str]
    """The prompt of each picture."""

    @cached_property
    def aligned(self) -> Aligned:
        """The network of pictures and texts."""
        from fewstep.eval.load_features import (
            load_aligned,  # which runs without a judge do not need
        )

        return load_aligned(self.network)

    @cached_property
    def texts(self) -> Tensor:
        """Unit vectors (N, D) of the prompts."""
        return text_vectors(self.aligned, self.prompts)

    def __call__(self, pictures: Tensor) -> dict[str, float]:
        """{"clip": mean cosine of pictures and prompts}, nan where a pixel is not finite.

        pictures: (N, 1 or 3, H, W) in [-1, 1].
        """
        if not bool(pictures.isfinite().all()):
            return {"clip": float("nan")}
        seen = [self.aligned(part)[0] for part in to_uint8(pictures).split(PART)]
        return {"clip": alignment(torch.cat(seen), self.texts)}
