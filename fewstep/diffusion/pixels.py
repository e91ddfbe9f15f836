"""Samples in [-1, 1] as pictures of 8 bits, and the refusal of NaN and infinity."""

from __future__ import annotations

import torch
from torch import Tensor


class NotFinite(ValueError):
    """Samples of a model hold NaN or infinity."""


def finite(x: Tensor) -> Tensor:
    """`x`, samples (B, *), all of whose numbers are finite; `NotFinite` says how many are not."""
    if not bool(x.isfinite().all()):
        wrong = int((~x.isfinite()).flatten(1).any(1).sum()) if x.ndim > 1 else 1
        raise NotFinite(
            f"{wrong} of {len(x)} samples are not finite (NaN or infinity): the weights are "
            "damaged, their training diverged, or the precision is too low for them; use an "
            "earlier model, such as that in a run's folder best, or train with a lower rate"
        )
    return x


def to_uint8(x: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) in [-1, 1] -> uint8 (B, H, W, C), as pictures are shown and measured.

    What is beyond [-1, 1] is cut off; `NotFinite` (a ValueError) where there is no number.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"pictures are (B, 1 or 3, H, W), got {tuple(x.shape)}")
    levels = (finite(x.detach()) * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous()
